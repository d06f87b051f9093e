"""Read a stock model while it runs.

`capture.py` records queries, keys, values and hidden states of one forward pass; `outputs.py` runs a model for the
requested outputs alone; `cache.py` keeps the logits of a teacher on disk, by example and epoch, with a fingerprint of
all that decides them; `profile.py` times a training and counts its operations.
"""
