"""Several tasks with one encoder: each has a stock head of its own, and each step of training is of one task.

`sampling.py` draws the task of each step and its rows, `modeling.py` has the encoder with its heads, `trainer.py` the options and
the Trainer, and `card.py` what the export says of itself.
"""
