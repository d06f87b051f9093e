"""Metrics and probes; everything works offline.

`probes.py` and `similarity.py` measure vectors of texts, `words.py` those of words. `token_scores.py` scores tokens in their
context; `minimal_pairs.py` and `likelihood/` add them up, and `harness.py` lends them to lm-evaluation-harness. `detector.py`
tells replaced words. `samples.py`, `streams.py` and `references.py` serve runs of pre-training: what a model fills in, windows of
long text, and what counts alone would reach. `suite/` runs a list of tasks. `metrics.py` has what these share.
"""
