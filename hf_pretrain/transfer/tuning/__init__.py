"""Fine-tuning on tasks as data, from the model to its folder.

`fine_tune.py` joins a model, a task and a strategy. `heads.py` opens the model with the head of the task. `references.py` has the
scores without an encoder. `options.py` has the options by which commands name a model and a task. `export.py` writes the folder:
weights, predictions, results and the card.
"""
