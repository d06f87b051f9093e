"""Transformer-XL: segment recurrence, relative positions, adaptive softmax."""
