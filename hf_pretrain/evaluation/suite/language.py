"""The score of a text that fits a model: of each kind of language model, of a discriminator, of an energy.

[`kind_of`] sees the kind from the architecture, before anything is opened. [`language_model_of`] makes the score of a live model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hf_pretrain.evaluation.likelihood import LikelihoodScorer
from hf_pretrain.evaluation.minimal_pairs import (
    causal_log_likelihoods,
    denoising_log_likelihoods,
    originality_scores,
    pseudo_log_likelihoods,
)
from hf_pretrain.modeling.base import GENERATOR_FOLDER
from hf_pretrain.modeling.loading import find_file
from hf_pretrain.objectives.electric.modeling import score_texts
from hf_pretrain.objectives.electric.two_tower import TwoTowerClozeConfig

Score = Callable[[Sequence[str]], np.ndarray]
"""Takes texts, and returns ``[N]`` scores in nats."""

AUTO_CLASSES: dict[str, Any] = {
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "permutation": AutoModelForCausalLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "bidirectional": AutoModelForPreTraining,
}
"""Kind of language model -> the Auto class that opens it."""

NO_LIKELIHOOD = ("discriminator", "energy")
"""Kinds that score a text, and not one text after another."""


class LanguageModel(NamedTuple):
    """A model that scores texts.

    Attributes:
        kind: "masked", "causal", "encoder-decoder", "permutation", "bidirectional", "discriminator" or "energy".
        model: The model with its head.
        score: The score that fits its kind.
        method: What that is, in words for a card.
    """

    kind: str
    model: PreTrainedModel
    score: Score
    method: str


def kind_of(config: PreTrainedConfig, architecture: str) -> str | None:
    """Return the kind of a language model by its architecture; None if it is none.

    Args:
        config: Its configuration.
        architecture: Name of the class with its head.
    """
    if config.is_encoder_decoder:
        is_seq2seq = architecture in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        return "encoder-decoder" if is_seq2seq or architecture.endswith("ForConditionalGeneration") else None
    if architecture == "XLNetLMHeadModel":
        return "permutation"
    if architecture == "ElmoForPreTraining":
        return "bidirectional"
    if architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or architecture.endswith("ForMaskedLM"):
        return "masked"
    is_causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return "causal" if is_causal or architecture.endswith(("ForCausalLM", "LMHeadModel")) else None


def is_electric(name: str) -> bool:
    """Whether the generator beside a discriminator is Electric's, whose logits are energies."""
    path = find_file(name, "config.json", subfolder=GENERATOR_FOLDER)
    try:
        content = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") == TwoTowerClozeConfig.model_type


def language_model_of(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: PreTrainedModel | None = None,
    batch_size: int,
) -> LanguageModel:
    """Return a model with the score that fits what it was trained for.

    Args:
        kind: Its kind.
        model: The model.
        tokenizer: Its tokenizer.
        head: The head of a discriminator that has one apart.
        batch_size: Texts in a batch.
    """
    options: dict[str, Any] = {"batch_size": batch_size}

    def scored(score: Score, method: str) -> LanguageModel:
        return LanguageModel(kind, model, score, method)

    if kind == "discriminator":
        score: Score = partial(originality_scores, model, tokenizer, head=head, **options)
        return scored(score, "log-probability of being original, summed over the tokens")
    if kind == "energy":
        method = "pseudo-log-likelihood by the energies, all tokens in one pass"
        return scored(lambda texts: np.array(score_texts(model, tokenizer, texts, **options)), method)
    if kind == "masked":
        score = partial(pseudo_log_likelihoods, model, tokenizer, within_word="l2r", **options)
        return scored(score, "pseudo-log-likelihood, words masked from left to right")
    if kind == "encoder-decoder":
        score = partial(denoising_log_likelihoods, model, tokenizer, within_word="l2r", **options)
        return scored(score, "log-likelihood of each hidden word")
    if kind == "causal":
        return scored(partial(causal_log_likelihoods, model, tokenizer, **options), "log-likelihood")
    scorer = LikelihoodScorer(model, tokenizer, kind=kind, **options)  # type: ignore[arg-type]
    methods = {
        "permutation": "log-likelihood from left to right",
        "bidirectional": "mean of the forward and the backward log-likelihood",
    }
    return scored(partial(_alone, scorer), methods[kind])


def _alone(scorer: LikelihoodScorer, texts: Sequence[str]) -> np.ndarray:
    """Score texts that follow on nothing."""
    return scorer.score([("", text) for text in texts]).log_likelihoods
