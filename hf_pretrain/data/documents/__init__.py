"""From text to documents: tokens in Arrow files, with the words and sentences of the text marked on them.

words -> tokenizers (training one) -> documents (tokenizing) -> token_store (reading ranges of tokens).
"""
