"""Labelled examples of tasks: files in, batches out, and their augmentation."""
