"""Labelled examples of tasks: classes of texts and words, choices, spans that answer questions.

`files.py` reads rows, and `examples.py` and `questions.py` tokenize them; `batches.py` makes batches of the examples.

For fine-tuning, `spec.py` reads tasks that are given as data. It returns a `TaskData` (`labelled.py`), which knows the head, the
batches and the score, by `metrics.py` and `answers.py`. For distillation, `data.py` has the options of one task. It multiplies
rows by other words (`augmentation.py`), which `words.py` proposes.
"""
