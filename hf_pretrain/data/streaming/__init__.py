"""Text that is read, tokenized and packed while training runs.

sources (shards of files or of a streamed dataset) -> blocks (examples, and how far each reader has come).
"""
