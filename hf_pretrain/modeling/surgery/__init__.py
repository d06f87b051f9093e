"""Makes a stock model smaller, turns it round, or puts adapters into it.

`cutting.py`: a student of some layers of its teacher, and DistilBERT from BERT. `vocabulary.py`: a model and its tokenizer
without the tokens that a text does not use. `directions.py`: an encoder as a decoder, and a decoder as an encoder.
`adapters.py`: adapters of PEFT in pre-training, and exports with them or of them alone.
"""
