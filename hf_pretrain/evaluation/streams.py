"""How well a language model with a memory predicts a text: every token is scored once, with as much context as it can hold."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.data.documents.documents import tokenize_documents
from hf_pretrain.data.examples.windows import LaneDataset, LaneStream
from hf_pretrain.data.text.datasets import text_sizes
from hf_pretrain.errors import InputError, check_range
from hf_pretrain.evaluation.metrics import checked_texts
from hf_pretrain.modeling.losses import IGNORED, RecurrentMemory

if TYPE_CHECKING:
    from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM

# Input ids and targets ``[B, L]``; and of each row, whether the memory is emptied before it, or None without a memory.
_Batch = tuple[np.ndarray, np.ndarray, list[bool] | None]


@dataclass(frozen=True, kw_only=True)
class StreamScore:
    """What a text cost.

    Attributes:
        window: Tokens read at a time.
        mem_len: Tokens remembered.
        clamp_len: Distance from which on positions are all alike, -1 for none.
        nats: Negative log-likelihood of all tokens that were scored.
        num_tokens: Number of those tokens; the separator behind each document is one.
        num_characters: Characters of their text, without what lies between documents.
        num_bytes: The same in bytes of UTF-8.
        seconds: How long it took.
    """

    window: int
    mem_len: int
    clamp_len: int
    nats: float
    num_tokens: int
    num_characters: float
    num_bytes: float
    seconds: float

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Perplexity by token, comparable for one tokenizer only."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_character(self) -> float:
        """Bits a character of the text takes, whatever the tokenizer."""
        return self.nats / math.log(2) / self.num_characters

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of the text takes, whatever the tokenizer."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def tokens_per_second(self) -> float:
        """Speed."""
        return self.num_tokens / self.seconds


def stream_evaluate(
    model: TransformerXLForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | datasets.Dataset,
    *,
    window: int = 64,
    mem_lens: Sequence[int] = (640,),
    clamp_lens: Sequence[int] = (400,),
    same_length: bool = True,
    reset_at_documents: bool = False,
    num_lanes: int = 1,
) -> list[StreamScore]:
    """Score every token of a text once, window after window, with the model's memory between them.

    Args:
        model: A Transformer-XL; it is put into evaluation mode.
        tokenizer: Its tokenizer.
        texts: The documents, or a dataset of them with the column ``text``.
        window: Tokens read at a time. With `same_length` it changes the speed and not the result.
        mem_lens: Numbers of remembered tokens to try.
        clamp_lens: Distances to try from which on positions are all alike; -1 for none.
        same_length: Whether every position sees the `mem_len` tokens before it, instead of all the memory and the window.
        reset_at_documents: Whether each document is read without memory of the one before.
        num_lanes: Parts of the text that are read side by side: faster, but each begins without memory.

    Returns:
        A score for each pair of a memory and a clamp.

    Raises:
        InputError: If the text is empty, or a length is out of range.

    Source:
        Dai et al. (2019), section 4: WikiText-103 is evaluated with windows of 64, a memory of 640 and a clamp of 400.
    """
    stream, sizes = _read(texts, tokenizer, num_lanes=num_lanes)
    dataset = LaneDataset(stream, window=window, reset_at_documents=reset_at_documents)
    scores = []
    for mem_len, clamp_len in itertools.product(mem_lens, clamp_lens):
        with memory_lengths(model, mem_len=mem_len, clamp_len=clamp_len, same_length=same_length):
            cost = _cost(model, _windows(dataset), num_batches=dataset.num_windows)
        scores.append(
            StreamScore(
                window=window, mem_len=mem_len, clamp_len=clamp_len, num_tokens=stream.num_tokens, **sizes, **cost
            )
        )
    return scores


def sliding_window_evaluate(
    model: TransformerXLForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | datasets.Dataset,
    *,
    context: int,
    num_targets: int | None = None,
    batch_size: int = 1,
) -> StreamScore:
    """Score tokens one by one, each from the `context` tokens before it, read anew: what a model without memory has to do.

    Args:
        model: A Transformer-XL, used without its memory; it is put into evaluation mode.
        tokenizer: Its tokenizer.
        texts: The documents, or a dataset of them with the column ``text``.
        context: Tokens read for each target; fewer at the beginning of the text.
        num_targets: Score only so many tokens, evenly spread over the text: all take days. Bits by character are then those
            of a text of as many characters a token as the whole.
        batch_size: Targets scored at a time.

    Returns:
        The score of those tokens; `window` is 1.

    Raises:
        InputError: If the text is empty or the context is.
    """
    check_range(context, "[1, inf)", name="context", hint="give the tokens to read for each target")
    check_range(1 if num_targets is None else num_targets, "[1, inf)", name="num_targets")
    check_range(batch_size, "[1, inf)", name="batch_size")
    stream, sizes = _read(texts, tokenizer, num_lanes=1)
    total = stream.num_tokens
    count = total if num_targets is None else min(num_targets, total)
    positions = np.linspace(0, total - 1, count).round().astype(np.int64)
    batches = np.split(positions, range(batch_size, count, batch_size))
    with memory_lengths(model, mem_len=0, clamp_len=-1, same_length=False):
        cost = _cost(model, _contexts(stream, batches, context=context), num_batches=len(batches))
    sizes = {name: size * count / total for name, size in sizes.items()}
    return StreamScore(window=1, mem_len=context, clamp_len=-1, num_tokens=count, **sizes, **cost)


def _read(
    texts: Sequence[str] | datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, num_lanes: int
) -> tuple[LaneStream, dict[str, Any]]:
    """Return texts as a stream, and their `num_characters` and `num_bytes`."""
    if not isinstance(texts, datasets.Dataset):
        texts = datasets.Dataset.from_dict({"text": checked_texts(texts)})
    if not any((text or "").strip() for text in texts["text"]):
        raise InputError("texts hold no text to score: give at least one that is not blank")
    documents = tokenize_documents(texts, tokenizer)
    num_bytes, num_characters = (int(sizes.sum()) for sizes in text_sizes(texts))
    stream = LaneStream(documents, tokenizer=tokenizer, num_lanes=num_lanes, complete=True)
    return stream, {"num_characters": num_characters, "num_bytes": num_bytes}


def _windows(dataset: LaneDataset) -> Iterator[_Batch]:
    """Yield window after window, each with the rows at which the memory is emptied."""
    for window in range(dataset.num_windows):
        examples = [dataset[window * dataset.num_lanes + row] for row in range(dataset.num_lanes)]
        input_ids, valid = stack_column(examples, "input_ids")
        targets = np.full(input_ids.shape, IGNORED, dtype=np.int64)
        targets[valid] = np.concatenate([example["labels"] for example in examples])
        yield input_ids, targets, [example["memory_reset"] for example in examples]


def _contexts(stream: LaneStream, batches: Sequence[np.ndarray], *, context: int) -> Iterator[_Batch]:
    """Yield batches of positions, each with what lies before it; nothing is remembered."""
    for positions in batches:
        # Inputs lie one position before their targets.
        spans = [stream.read_range(max(end - context, -1), end + 1)[0] for end in positions.tolist()]
        input_ids, valid = stack_column([{"input_ids": span[:-1]} for span in spans], "input_ids")
        targets = np.full(input_ids.shape, IGNORED, dtype=np.int64)
        targets[np.arange(len(spans)), valid.sum(axis=1) - 1] = [span[-1] for span in spans]
        yield input_ids, targets, None


@torch.inference_mode()
def _cost(model: TransformerXLForCausalLM, batches: Iterator[_Batch], *, num_batches: int) -> dict[str, Any]:
    """Return the `nats` of all targets, and the `seconds` that they took."""
    model.eval()
    begin = time.perf_counter()
    nats, memory = torch.zeros((), dtype=torch.float64, device=model.device), None
    for input_ids, targets, reset in tqdm(batches, total=num_batches, desc="Scoring", delay=2, disable=None):
        states, lengths = None, None
        if memory is not None and reset is not None:
            states, lengths = memory.reset(torch.tensor(reset, device=model.device))
        ids, labels = (torch.from_numpy(values).to(model.device) for values in (input_ids, targets))
        nll, states, lengths = model.token_nll(ids, labels, mems=states, mem_lengths=lengths)
        memory = RecurrentMemory(states, lengths)
        nats += nll.sum(dtype=torch.float64)
    return {"nats": float(nats), "seconds": time.perf_counter() - begin}


@contextmanager
def memory_lengths(
    model: TransformerXLForCausalLM, *, mem_len: int, clamp_len: int, same_length: bool
) -> Iterator[None]:
    """Let a model remember in another way while a block runs.

    Args:
        model: A Transformer-XL.
        mem_len: Slots of its memory.
        clamp_len: Distance from which on positions are all alike; -1 for none.
        same_length: Whether every position sees the `mem_len` tokens before it, instead of all the memory and the window.

    Raises:
        InputError: If a length is out of range.
    """
    lengths = {"mem_len": mem_len, "clamp_len": clamp_len, "same_length": same_length}
    if mem_len < int(same_length):
        raise InputError(f"mem_len={mem_len} must be at least {int(same_length)} with same_length={same_length}")
    if clamp_len != -1 and clamp_len < 1:
        raise InputError(f"clamp_len={clamp_len} must be at least 1, or -1 for none")
    before = {name: getattr(model.config, name) for name in lengths}
    model.config.update(lengths)
    try:
        yield
    finally:
        model.config.update(before)
