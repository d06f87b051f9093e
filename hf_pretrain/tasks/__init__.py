"""Labelled examples of tasks: classes of texts and words, spans that answer questions.

`files.py` reads rows, `augmentation.py` multiplies them by other words, which `words.py` proposes, and `examples.py`
tokenizes them; `data.py` has the options and calls these in turn. `batches.py` makes batches of the examples.
"""
