"""Batches of tokenized texts for models that are only asked, not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.errors import InputError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Ask a model without dropout and without gradients, and leave it in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


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
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be positive")
    return checked


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
