"""GPT-1's way to fine-tune a decoder: a task as rows of text, and the language-model loss beside the task's.

`inputs.py` makes the rows, `modeling.py` has the model with both losses, `trainer.py` the options, the Trainer and the metrics.
"""
