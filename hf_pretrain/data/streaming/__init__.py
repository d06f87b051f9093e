"""Text that is read, tokenized and packed while training runs.

sources (shards of files or of a streamed dataset) -> blocks (examples, and how far each reader has come) -> reader (what
a Trainer takes from a stream, and where it goes on after a resume).
"""
