"""Commands on text, which train nothing: near-duplicates are left out, and documents are counted."""
