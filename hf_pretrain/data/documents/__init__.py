"""From text to tokens: words and sentences, tokenizers, documents, and the store that holds them."""
