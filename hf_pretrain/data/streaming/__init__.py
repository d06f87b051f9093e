"""Text that does not fit the disk: shards are read, tokenized and packed while the model trains."""
