"""A model under evaluation: it is opened with the parts that a measure needs, and refused where it lacks them.

[`EvaluatedModel`] opens each part once: the encoder, the language model with the score of a text that fits it, or the vectors of
words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.detector import is_detector, open_detector
from hf_pretrain.evaluation.likelihood import LikelihoodScorer
from hf_pretrain.evaluation.minimal_pairs import (
    causal_log_likelihoods,
    denoising_log_likelihoods,
    originality_scores,
    pseudo_log_likelihoods,
)
from hf_pretrain.evaluation.probes import encode, encoder_of
from hf_pretrain.evaluation.suite.tasks import How
from hf_pretrain.hub.record import RECORD
from hf_pretrain.modeling.loading import find_file, from_config, from_pretrained
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.vectors.folder import WordVectors

# A pooler is not read: pooling is done here.
_POOLER = "pooler"
# Architectures of vectors without a context.
_STATIC, _SPARSE = "static_embedding", "sparse_text"
_WORDS_AT_A_TIME = 256

Score = Callable[[Sequence[str]], np.ndarray]
"""Takes texts, and returns ``[N]`` scores in nats."""


class LanguageModel(NamedTuple):
    """A model that scores texts.

    Attributes:
        kind: "masked", "causal", "encoder-decoder", "permutation" or "discriminator".
        model: The model with its head.
        score: The score that fits its kind.
        method: What that is, in words for a card.
    """

    kind: str
    model: PreTrainedModel
    score: Score
    method: str


class EvaluatedModel:
    """A model by its name, opened with the parts that a measure needs.

    Args:
        name: Folder, name on the Hub, or a file of word vectors.
        untrained: Draw all weights anew, by the architecture's own initialisation.
        seed: Key of these weights.
        batch_size: Texts in a batch.
        device: Where it computes; by default a GPU if there is one.
    """

    def __init__(
        self,
        name: str,
        *,
        untrained: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        self.name, self.untrained, self.seed, self.batch_size = name, untrained, seed, batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def label(self) -> str:
        """The name as a table shows it: of a folder the last part."""
        return Path(self.name.rstrip("/")).name if os.path.exists(self.name) else self.name

    @property
    def has_record(self) -> bool:
        """Whether the model is a folder with the record of its run, and so has a card that can be made again."""
        return Path(self.name, RECORD).is_file()

    @cached_property
    def config(self) -> PreTrainedConfig | None:
        """The configuration; None of a file of word vectors and of a folder that has vectors alone."""
        if Path(self.name).is_file():
            return None
        if self.has_static_modules:
            return None
        config: PreTrainedConfig = from_pretrained(AutoConfig, self.name)
        return config

    @cached_property
    def has_static_modules(self) -> bool:
        """Whether the folder is one of model2vec or of sentence-transformers' `StaticEmbedding`, with no architecture."""
        path = find_file(self.name, "config.json")
        if path is None:
            return find_file(self.name, "modules.json") is not None
        return "model_type" not in Path(path).read_text(encoding="utf-8", errors="replace")

    @property
    def is_static(self) -> bool:
        """Whether it has one vector a word, whatever stands around it."""
        return self.config is None or self.config.model_type == _STATIC

    @property
    def architecture(self) -> str:
        """Name of the class that the weights were saved from; "" if the configuration does not say."""
        names = [] if self.config is None else self.config.architectures or []
        return str(names[0]) if names else ""

    @property
    def is_detector(self) -> bool:
        """Whether it tells replaced words from others."""
        return self.config is not None and is_detector(self.name, self.config)

    def check(self, how: How, *, task: str) -> None:
        """Refuse a model without the parts that a measure needs, before anything is computed.

        Args:
            how: The measure.
            task: Name of the task, for the message.

        Raises:
            InputError: Naming the model, the task and the way on.
        """
        if self.config is not None and self.config.model_type == _SPARSE:
            raise self._refused(task, how, "counts words and has no vectors: evaluate it by hf-pretrain features")
        if self.config is None and how != "words":
            raise self._refused(task, how, "is vectors of words alone: leave the task out, or give an encoder")
        if self.untrained and self.is_static:
            raise self._refused(task, how, "has no architecture to draw untrained weights of: leave untrained out")
        if how in ("pairs", "likelihood"):
            kind = self.language_model_kind
            if kind is None or (kind == "discriminator" and how == "likelihood"):
                has = f"has the architecture {self.architecture or 'none'}"
                raise self._refused(
                    task, how, f"{has}, which does not score text: name a checkpoint with a language-modelling head"
                )
            if kind == "discriminator" and self.untrained:
                raise self._refused(
                    task, how, "is a discriminator, of which none is made untrained: leave untrained out"
                )
        if how == "finetune" and self.untrained:
            raise self._refused(
                task, how, "would be fine-tuned untrained: leave untrained out, and use hf-pretrain compare"
            )
        if how == "finetune" and self.is_static:
            raise self._refused(task, how, "has one vector a word: give an encoder, or choose another how")

    def _refused(self, task: str, how: How, why: str) -> InputError:
        return InputError(f"model={self.name!r} cannot be measured on {task!r} by how={how!r}: it {why}")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, self.name)
        return tokenizer

    @cached_property
    def encoder(self) -> PreTrainedModel:
        """The encoder, without a head."""
        return encoder_of(self._opened(AutoModel)).eval()

    @cached_property
    def modules(self) -> SentenceModules:
        """What follows the encoder in a sentence-transformers folder; the mean of the states where there is nothing."""
        return SentenceModules.read(self.name) or SentenceModules()

    @cached_property
    def language_model_kind(self) -> str | None:
        """The kind of the language model by the architecture; None if it is none."""
        if self.config is None:
            return None
        if self.is_detector:
            return "discriminator"
        name = self.architecture
        if self.config.is_encoder_decoder:
            is_seq2seq = name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
            return "encoder-decoder" if is_seq2seq or name.endswith("ForConditionalGeneration") else None
        if name == "XLNetLMHeadModel":
            return "permutation"
        if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM"):
            return "masked"
        is_causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(("ForCausalLM", "LMHeadModel"))
        return "causal" if is_causal else None

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model with its head, and the score that fits what it was trained for.

        Raises:
            InputError: If it is no language model.
        """
        kind, tokenizer = self.language_model_kind, self.tokenizer
        options: dict[str, Any] = {"batch_size": self.batch_size}
        if kind is None:
            raise InputError(f"model={self.name!r} has no head that scores text: name one with such a head")
        if kind == "discriminator":
            model, head = self._detector()
            score: Score = partial(originality_scores, model, tokenizer, head=head, **options)
            return LanguageModel(kind, model, score, "log-probability of being original, summed over the tokens")
        if kind == "masked":
            model = self._opened(AutoModelForMaskedLM)
            score = partial(pseudo_log_likelihoods, model, tokenizer, within_word="l2r", **options)
            return LanguageModel(kind, model, score, "pseudo-log-likelihood, words masked from left to right")
        if kind == "encoder-decoder":
            model = self._opened(AutoModelForSeq2SeqLM)
            score = partial(denoising_log_likelihoods, model, tokenizer, within_word="l2r", **options)
            return LanguageModel(kind, model, score, "log-likelihood of each hidden word")
        model = self._opened(AutoModelForCausalLM)
        if kind == "permutation":
            scorer = LikelihoodScorer(model, tokenizer, kind="permutation", **options)
            return LanguageModel(kind, model, partial(_alone, scorer), "log-likelihood from left to right")
        score = partial(causal_log_likelihoods, model, tokenizer, **options)
        return LanguageModel(kind, model, score, "log-likelihood")

    def word_vectors(self, words: Sequence[str]) -> tuple[WordVectors, str]:
        """Return vectors of words, and in words how they were made.

        Static vectors are those of the model's own vocabulary. An encoder reads each of the words alone, and the vector is the
        mean of its states.

        Args:
            words: The words that a task asks for.
        """
        if self.is_static:
            return WordVectors.open(self.name), "of static vectors"
        known = list(dict.fromkeys(words))
        vectors = encode(self.encoder, self.tokenizer, known, batch_size=max(self.batch_size, _WORDS_AT_A_TIME))
        return WordVectors(tuple(known), vectors), "of mean-pooled states, each word read alone"

    def _detector(self) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        model, head = open_detector(self.name)
        return model.to(self.device), None if head is None else head.to(self.device)

    def _opened(self, auto_class: Any) -> PreTrainedModel:
        """Open the model, or make an untrained one; raise InputError if a part would be drawn at random unasked."""
        if self.untrained:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(draws.generator_seed(seed=self.seed, stream="untrained model"))
                model: PreTrainedModel = from_config(auto_class, self.config)
            return model.eval().to(self.device)
        model = from_pretrained(auto_class, self.name, announce=False)
        fresh = [name for name in getattr(model, "fresh_parameters", ()) if _POOLER not in name.split(".")]
        if fresh:
            raise InputError(
                f"model={self.name!r} has no {fresh[0]}, which would be drawn at random: name a whole checkpoint, or leave the "
                "task out"
            )
        return model.eval().to(self.device)


def _alone(scorer: LikelihoodScorer, texts: Sequence[str]) -> np.ndarray:
    """Score texts that follow on nothing."""
    return scorer.score([("", text) for text in texts]).log_likelihoods
