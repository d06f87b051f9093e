"""Makes a stock model smaller.

`cutting.py`: a student of some layers of its teacher, and DistilBERT from BERT. `vocabulary.py`: a model and its tokenizer
without the tokens that a text does not use.
"""
