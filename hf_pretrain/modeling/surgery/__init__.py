"""Makes a stock model smaller, or turns it round.

`cutting.py`: a student of some layers of its teacher, and DistilBERT from BERT. `vocabulary.py`: a model and its tokenizer
without the tokens that a text does not use. `directions.py`: an encoder as a decoder, and a decoder as an encoder.
"""
