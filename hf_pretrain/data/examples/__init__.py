"""From documents to examples: packed blocks, pairs, translations, windows; epochs say which and in what order."""
