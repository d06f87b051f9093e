"""Evaluation by likelihood: how probable a text is after another one, under every kind of language model.

`scorer.py` cuts texts into tokens and scores them; single tokens are read by `hf_pretrain.evaluation.token_scores`, and those of
two directions by `directions.py`. `measures.py` has what is made of it: perplexity in windows, the choice among options, tasks
with a few examples in the prompt, and last words.
`hf_pretrain.evaluation.harness` gives the same scorer to lm-evaluation-harness.
"""

from hf_pretrain.evaluation.likelihood.directions import BidirectionalLM
from hf_pretrain.evaluation.likelihood.measures import (
    ClozeScore,
    FewShotScore,
    FewShotTask,
    RollingPerplexity,
    cloze_accuracy,
    few_shot_accuracy,
    rolling_perplexity,
    score_options,
)
from hf_pretrain.evaluation.likelihood.scorer import ContinuationScores, LikelihoodScorer, Request

__all__ = [
    "BidirectionalLM",
    "ClozeScore",
    "ContinuationScores",
    "FewShotScore",
    "FewShotTask",
    "LikelihoodScorer",
    "Request",
    "RollingPerplexity",
    "cloze_accuracy",
    "few_shot_accuracy",
    "rolling_perplexity",
    "score_options",
]
