"""The probability that each word of a text was replaced, from a model trained on replaced token detection.

`ReplacedTokenScorer` tokenizes a text, cuts it into windows that overlap, runs the discriminator, and gives each word the highest
probability among its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.data.examples.packing import BlockTemplate
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.metrics import batches_by_length, check_fast, checked_texts, encode_texts, words_of_tokens
from hf_pretrain.modeling.backbone import evaluating, longest_text
from hf_pretrain.modeling.heads import DISCRIMINATOR_HEAD_FOLDER, DiscriminatorHead
from hf_pretrain.modeling.loading import find_file, from_pretrained

# Stock classes with one logit a token that are no token classifiers.
_DETECTORS = ("ElectraForPreTraining", "FunnelForPreTraining")
_LENGTH_OF_UNBOUNDED = 512


class WordScore(NamedTuple):
    """A word of a text.

    Attributes:
        word: The word.
        start: Character at which it starts.
        end: Character before which it ends.
        score: Probability that it was replaced: the highest among its tokens.
    """

    word: str
    start: int
    end: int
    score: float


class ReplacedTokenScorer:
    """Scores each word of a text by the probability that it was replaced.

    A text that is longer than the model's input is read in windows that overlap by a quarter; each token's score is that of the
    window in whose middle it is most.

        scorer = ReplacedTokenScorer.from_pretrained("my-electra")
        scorer("The chef ate the meal.")  # [WordScore("The", 0, 3, 0.02), ...]

    Args:
        model: A model with one logit a token, positive for "replaced", such as `ElectraForPreTraining`; or an encoder.
        tokenizer: Its tokenizer, a fast one.
        head: What turns the encoder's states ``[B, L, D]`` into logits ``[B, L]``, if the model is one.
        max_length: Most tokens of a window, special ones included; as many as the model takes by default.

    Raises:
        InputError: If the tokenizer is not fast, or a window is too short for text or too long for the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head: PreTrainedModel | None = None,
        max_length: int | None = None,
    ) -> None:
        check_fast(tokenizer)
        self.model = model
        self.head = head
        self.tokenizer = tokenizer
        self.template = BlockTemplate.of(tokenizer)
        longest = _longest_input(model, tokenizer)
        self.window = (longest if max_length is None else max_length) - self.template.num_special_tokens
        if max_length is not None and not (self.window > 0 and max_length <= longest):
            raise InputError(
                f"max_length={max_length} must be above the {self.template.num_special_tokens} special tokens and at most "
                f"{longest}, which is what the model takes"
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        device: torch.device | str | None = None,
        max_length: int | None = None,
        revision: str | None = None,
    ) -> ReplacedTokenScorer:
        """Open a discriminator: a stock one, or an encoder with a head in the folder of such heads.

        Args:
            name_or_path: A folder, or a repository of the Hub.
            device: Where it computes; the CPU by default.
            max_length: See the class.
            revision: Branch, tag or commit of a repository; "main" by default.

        Raises:
            InputError: If there is no such checkpoint, or it is no discriminator.
        """
        model, head = open_detector(name_or_path, revision=revision)
        model, head = model.to(device), None if head is None else head.to(device)
        tokenizer = from_pretrained(AutoTokenizer, name_or_path, revision=revision)
        return cls(model, tokenizer, head=head, max_length=max_length)

    @overload
    def __call__(self, texts: str, *, batch_size: int = 16) -> list[WordScore]: ...
    @overload
    def __call__(self, texts: list[str], *, batch_size: int = 16) -> list[list[WordScore]]: ...
    def __call__(self, texts: str | list[str], *, batch_size: int = 16) -> list[WordScore] | list[list[WordScore]]:
        """Score the words of a text, or of each of several.

        Args:
            texts: One text, or several.
            batch_size: Windows that the model sees at once.

        Returns:
            The words of the text in order, or a list of them a text.

        Raises:
            InputError: If something is no text, or a batch is empty.
        """
        if isinstance(texts, str):
            return self([texts], batch_size=batch_size)[0]
        texts = checked_texts(texts, batch_size=batch_size)
        if not texts:
            return []
        options = {"return_offsets_mapping": True, "return_attention_mask": False}
        encoded = encode_texts(self.tokenizer, texts, add_special_tokens=False, **options)
        scores = self.token_scores(encoded["input_ids"], batch_size=batch_size)
        return [_word_scores(*each) for each in zip(texts, encoded["offset_mapping"], scores, strict=True)]

    def token_scores(self, token_ids: Sequence[Sequence[int]], *, batch_size: int = 16) -> list[np.ndarray]:
        """Return the probability that each token was replaced, a float32 array a text.

        Args:
            token_ids: Tokens of each text, without special ones.
            batch_size: Windows that the model sees at once.
        """
        scores = [np.zeros(len(ids), dtype=np.float32) for ids in token_ids]
        windows = [
            (text, *window) for text, ids in enumerate(token_ids) for window in _windows(len(ids), size=self.window)
        ]
        prefix, suffix = self.template.prefix, self.template.suffix
        inputs = [(*prefix, *token_ids[text][start : start + self.window], *suffix) for text, start, _, _ in windows]
        with evaluating(self.model), evaluating(self.model if self.head is None else self.head):
            for indices, batch in batches_by_length(
                inputs,
                pad_token_id=self.tokenizer.pad_token_id,
                batch_size=batch_size,
                device=self.model.device,
                name="Scoring",
            ):
                probabilities = self._logits(batch).float().sigmoid().cpu().numpy()
                for index, row in zip(indices, probabilities, strict=True):
                    text, start, first, last = windows[index]
                    shift = len(prefix) - start
                    scores[text][first:last] = row[first + shift : last + shift]
        return scores

    def _logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = self.model(**batch)
        logits = output.logits if self.head is None else self.head(output.last_hidden_state)
        return logits.reshape(batch["input_ids"].shape)


def _windows(num_tokens: int, *, size: int) -> list[tuple[int, int, int]]:
    """Cover a text by windows that overlap by a quarter: each one's start, and the range of tokens that it decides on."""
    last = max(0, num_tokens - size)
    starts = [*range(0, last, max(1, size - size // 4)), last]
    # Where two windows overlap, each decides on its half.
    borders = [0, *((b + a + size) // 2 for a, b in pairwise(starts)), num_tokens]
    return [(start, *borders) for start, borders in zip(starts, pairwise(borders), strict=True)] if num_tokens else []


def _word_scores(text: str, offsets: Sequence[tuple[int, int]], scores: np.ndarray) -> list[WordScore]:
    """Give each word the highest score among its tokens."""
    starts, words = words_of_tokens(text, offsets)
    highest = np.zeros(len(starts))
    np.maximum.at(highest, words[words >= 0], scores[words >= 0])
    found = []
    for (start, stop), score in zip(pairwise([*starts.tolist(), len(text)]), highest.tolist(), strict=True):
        word = text[start:stop].rstrip()
        found.append(WordScore(word, start, start + len(word), score))
    return found


def _longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    # A tokenizer that knows no limit says 10**30.
    limits = [limit for limit in (longest_text(model), tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits, default=_LENGTH_OF_UNBOUNDED)


def is_detector(name_or_path: str, config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint is a discriminator: a stock one, or an encoder with a head in the folder of such heads."""
    architecture = (config.architectures or ["none"])[0]
    return (
        is_stock_detector(architecture, config)
        or find_file(name_or_path, "config.json", subfolder=DISCRIMINATOR_HEAD_FOLDER) is not None
    )


def is_stock_detector(architecture: str, config: PreTrainedConfig) -> bool:
    """Return whether models of a stock class, with this configuration, are discriminators."""
    return architecture in _DETECTORS or (architecture.endswith("ForTokenClassification") and config.num_labels == 1)


def open_detector(name_or_path: str, *, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Open a discriminator: a stock one, or an encoder and its head.

    Args:
        name_or_path: A folder, or a repository of the Hub.
        revision: Branch, tag or commit of a repository; "main" by default.

    Returns:
        The model, and the head that turns its states into logits; None where the model has it.

    Raises:
        InputError: If there is no such checkpoint, or it is no discriminator.
    """
    config = from_pretrained(AutoConfig, name_or_path, revision=revision)
    of_head: dict[str, Any] = {"subfolder": DISCRIMINATOR_HEAD_FOLDER, "revision": revision}
    if find_file(name_or_path, "config.json", **of_head) is None:
        return from_pretrained(_detector_class(name_or_path, config), name_or_path, revision=revision), None
    head: PreTrainedModel = from_pretrained(DiscriminatorHead, name_or_path, **of_head)
    return from_pretrained(AutoModel, name_or_path, revision=revision), head


def _detector_class(name_or_path: str, config: PreTrainedConfig) -> Any:
    """Return the Auto class that opens a stock model with one logit a token."""
    architecture = (config.architectures or ["none"])[0]
    if architecture in _DETECTORS:
        return AutoModelForPreTraining
    if architecture.endswith("ForTokenClassification") and config.num_labels == 1:
        return AutoModelForTokenClassification
    raise InputError(
        f"{name_or_path!r} is no discriminator: its architecture is {architecture}, which has not one logit a token; name a "
        "model trained by replaced token detection"
    )
