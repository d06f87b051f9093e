"""Metrics of decisions about tokens, and the batches that a model is evaluated on.

Texts are checked and tokenized (`checked_texts`, `encode_texts`) and put into batches of about one length (`batches_by_length`).
`words_of_tokens` finds the word of each token. `detection_metrics` scores a binary decision a token. The metrics of tasks are in
`hf_pretrain.tasks.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.data.documents.words import character_kinds, next_visible, word_starts
from hf_pretrain.errors import InputError, check_range

# The positions of two special tokens, which are never replaced, alone give a gain of .006 in sequences of 128 tokens.
_LEAST_GAIN = 0.01


def checked_texts(texts: Sequence[str], *, batch_size: int = 1) -> list[str]:
    """Return texts as a list.

    Args:
        texts: The texts; none is right too.
        batch_size: How many, or how many parts of them, a model is to see at once.

    Raises:
        InputError: If they are one text, one of them is none, or the batch is empty.
    """
    if isinstance(texts, (str, bytes)):
        raise InputError("texts is one text: give a list of texts")
    checked = list(texts)
    for number, text in enumerate(checked):
        if not isinstance(text, str):
            raise InputError(f"texts[{number}] is of type {type(text).__name__}, not text: leave it out or convert it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"texts[{number}] has half of a character at {error.start} (a lone surrogate): decode the text anew"
            ) from error
    check_range(batch_size, "[1, inf)", name="batch_size")
    return checked


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not say where a token lies in the text."""
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} is not a fast one, which alone says where a token lies in the text"
        )


def words_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Find the words of a text and those of its tokens.

    Args:
        text: The text.
        offsets: First character of each token, and the one behind it.

    Returns:
        The first characters of the words, ``int64 [W]``, and the word of each token, ``int64 [T]``; -1 for a token before them.
    """
    kinds = character_kinds(text)
    starts = word_starts(text, kinds=kinds)
    # A token's word is that of its first visible character: before it may come the space that separates words.
    positions = next_visible(kinds, np.array([begin for begin, _ in offsets], dtype=np.int64))
    return starts, np.searchsorted(starts, positions, side="right") - 1


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    """Tokenize texts as the text that a model was trained on: the name of a special token is text like any other.

    Args:
        tokenizer: The tokenizer.
        texts: At least one.
        **options: Other options of the tokenizer.

    Returns:
        What the tokenizer returns.
    """
    encoding = tokenizer(texts, split_special_tokens=True, verbose=False, **options)
    if tokenizer.is_fast:
        # The call leaves the backend in that state.
        tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens
    return encoding


def stack_characters(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack the characters of texts, ``[L, K]`` each, into ``int64 [B, L, K]`` with zeros at padding."""
    stacked = torch.zeros(len(rows), max(map(len, rows)), rows[0].shape[1], dtype=torch.long)
    for number, row in enumerate(rows):
        stacked[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return stacked


def batches_by_length(
    sequences: Sequence[Sequence[int] | np.ndarray],
    *,
    pad_token_id: int | None,
    batch_size: int,
    device: torch.device | str = "cpu",
    name: str = "Evaluating",
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Yield batches of sequences of about one length, the longest first, so that little of them is padding.

    Args:
        sequences: Token ids of each text.
        pad_token_id: What padding, on the right, is filled with; the attention mask hides it.
        batch_size: Sequences in a batch.
        device: Where the tensors go.
        name: What the progress bar says.

    Yields:
        Which sequences are in the batch, ``int64 [B]``, and `input_ids` and `attention_mask`, ``[B, L]``.
    """
    order = np.argsort([-len(sequence) for sequence in sequences], kind="stable")
    for begin in tqdm(range(0, len(order), batch_size), desc=name, unit=" batches", delay=2, disable=None):
        indices = order[begin : begin + batch_size]
        rows = [{"input_ids": np.asarray(sequences[index])} for index in indices]
        input_ids, valid = stack_column(rows, "input_ids", fill=pad_token_id or 0)
        batch = {"input_ids": input_ids, "attention_mask": valid}
        yield indices, {key: torch.from_numpy(value.astype(np.int64)).to(device) for key, value in batch.items()}


def detection_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    loss: float | None = None,
    prefix: str = "disc",
    rate_name: str = "fake_rate",
) -> dict[str, float]:
    """Return the metrics of a binary decision a token.

    Accuracy alone says little: a model that calls every token original is right on all but the replaced ones.

    Args:
        logits: ``[N]``, positive for the label one, such as "replaced".
        labels: ``[N]``, zeros and ones; padding left out.
        loss: Mean binary cross-entropy in nats, for the gain.
        prefix: First word of the metrics' names.
        rate_name: Name of the share of ones.

    Returns:
        By default `disc_accuracy`, `disc_precision`, `disc_recall` (zero where undefined), `disc_auc` (0.5 where undefined), the
        share of ones `fake_rate` r, and with a loss `disc_gain` = 1 - loss / H(r): the explained share of the labels' entropy, at
        most 1; a model that has learned nothing has zero or less. Without labels {}.
    """
    if not len(labels):
        return {}
    # Programs that only train start without it.
    from sklearn.metrics import roc_auc_score

    predicted, is_one = logits > 0, labels == 1
    hits = int((predicted & is_one).sum())
    rate = float(is_one.mean())
    metrics = {
        f"{prefix}_accuracy": float((predicted == is_one).mean()),
        f"{prefix}_precision": hits / max(1, int(predicted.sum())),
        f"{prefix}_recall": hits / max(1, int(is_one.sum())),
        f"{prefix}_auc": float(roc_auc_score(is_one, logits)) if 0 < rate < 1 else 0.5,
        rate_name: rate,
    }
    return metrics if loss is None else metrics | discrimination_gain(loss, rate, prefix=prefix)


def discrimination_gain(loss: float, rate: float, *, prefix: str = "disc") -> dict[str, float]:
    """Return the gain 1 - loss / H(r) under its name, `disc_gain` by default; {} where it is undefined.

    Args:
        loss: Mean binary cross-entropy in nats.
        rate: Share r of the label one.
        prefix: First word of the name.
    """
    if not 0 < rate < 1:
        return {}
    return {f"{prefix}_gain": 1 + loss / (rate * math.log(rate) + (1 - rate) * math.log(1 - rate))}


def collapse_warning(metrics: Mapping[str, float]) -> str | None:
    """Return a warning for a discriminator that does no better than the share of replaced tokens alone.

    Trained with too high a learning rate, it may come to give one answer for all tokens; neither its accuracy nor the
    total loss shows that.

    Args:
        metrics: Metrics with `disc_gain`, under any prefix; of several held-out sets, one that is explained is enough.

    Returns:
        The warning, or None if something was learned, or it is not known.
    """
    gains = [value for name, value in metrics.items() if name.endswith("disc_gain")]
    # Not "below": a gain that is no number is no gain.
    if not gains or any(gain >= _LEAST_GAIN for gain in gains):
        return None
    return (
        f"the discriminator has learned nothing: disc_gain={max(gains):.3f}, so it explains none of what tells replaced "
        "tokens from original ones; lower learning_rate, lengthen warmup_steps, or check that the generator's mlm_loss falls"
    )
