"""From text to examples: reading, words and sentences, tokenizers, documents, packing, keyed draws."""
