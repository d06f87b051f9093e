"""Commands on text before any training: near-duplicates and statistics."""
