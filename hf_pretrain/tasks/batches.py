"""Batches of a task: the collator, and the sampler that puts examples of about one length into a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_pretrain.corruption.rows import few_lengths
from hf_pretrain.data import draws
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, ORDER_STRIDE, EpochDataset, EpochSampler
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.tasks.examples import PAIR, input_names

# Steps whose examples are sorted by length together.
_STEPS_SORTED = 50


@dataclass
class DataCollatorForTask:
    """Pads examples to the longest of them: `input_ids`, `attention_mask`, and what else the tokenizer makes, if they have it.

    `labels` are ``[B]``, one a text; of classes of tokens ``[B, L]``, -100 at padding; of spans ``[B, 2]``, the first
    and the last token. `target_positions` ``[T]`` are the flat positions of the tokens that `is_target` marks, row by
    row.

    Args:
        tokenizer: A tokenizer with a padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples; with `teacher_logits`, one row a prediction, if they have them."""
        batch = _padded(examples, self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
        is_real = batch["attention_mask"].bool()
        if "is_target" in examples[0]:
            is_target = _at_tokens([example["is_target"] for example in examples], is_real, fill=False)
            batch["target_positions"] = is_target.flatten().nonzero().squeeze(1)
        if "labels" in examples[0]:
            batch["labels"] = _labels(examples, is_real)
        if "teacher_logits" in examples[0]:
            batch["teacher_logits"] = torch.cat([example["teacher_logits"] for example in examples])
        return batch

    def fix_shapes(self, *, num_rows: int, length: int) -> None:
        """Round lengths up to few of them, for graphs that are compiled: texts of a task are short and long.

        Args:
            num_rows: Examples of a batch; it makes no difference.
            length: Tokens of the longest example.
        """
        self.pad_to_multiple_of = few_lengths(length) if self.pad_to_multiple_of is None else self.pad_to_multiple_of


@dataclass
class DataCollatorForTextPairs(DataCollatorForTask):
    """Pads first and second texts, each to the longest of them.

    A batch has `input_ids` and `attention_mask` ``[B, L]``, `pair_input_ids` and `pair_attention_mask` ``[B, M]``, and `labels`
    ``[B]``; both texts have token types if the examples have them.

    Args:
        tokenizer: A tokenizer with a padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        if f"{PAIR}input_ids" not in examples[0]:
            raise InputError("pair_input_ids is missing from the examples: make them with encode_text_pairs")
        collate = super().__call__
        known = input_names(self.tokenizer)
        first = [{name: each[name] for name in (*known, "labels") if name in each} for each in examples]
        names = [name for name in known if f"{PAIR}{name}" in examples[0]]
        second = collate([{name: each[f"{PAIR}{name}"] for name in names} for each in examples])
        return collate(first) | {f"{PAIR}{name}": values for name, values in second.items()}


@dataclass
class DataCollatorForTaskHead:
    """Pads examples for transformers' own heads of tasks, each with the names and the forms that it takes.

    All have `input_ids`, `attention_mask`, and `token_type_ids` if the examples have them, ``[B, L]``, and so ELMo's
    `character_ids`, ``[B, L, K]``. `labels` are ``[B]``
    classes, values or numbers of choices, or ``[B, L]`` classes of tokens, -100 at padding. Examples with choices have inputs
    of ``[B, choices, L]``. Examples with the columns `start_positions` and `end_positions` have these, ``[B]``; an unknown one is
    L, which the stock loss ignores: it takes -100 for the first token.

    Args:
        tokenizer: A tokenizer with a padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
        padding_side: Side of the padding, by default the tokenizer's. Predictions of tokens and spans are found again by
            their positions, so they need "right".
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    pad_to_multiple_of: int | None = None
    padding_side: Literal["left", "right"] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        first = examples[0]
        has_choices = isinstance(first["input_ids"][0], Sequence)
        rows = (
            [_choice(row, number, self.tokenizer) for row in examples for number in range(len(row["input_ids"]))]
            if has_choices
            else examples
        )
        batch = _padded(
            rows,
            self.tokenizer,
            pad_to_multiple_of=self.pad_to_multiple_of,
            side=self.padding_side,
        )
        is_real = batch["attention_mask"].bool()
        if has_choices:
            batch = {name: tensor.unflatten(0, (len(examples), -1)) for name, tensor in batch.items()}
        if "labels" in first:
            batch["labels"] = _labels(examples, is_real)
        for name in ("start_positions", "end_positions"):
            if name in first:
                positions_B = torch.tensor([example[name] for example in examples])
                moved_B = positions_B + is_real.int().argmax(dim=1)
                batch[name] = torch.where(positions_B == IGNORED, is_real.shape[1], moved_B)
        return batch


def _choice(example: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: example[name][number] for name in input_names(tokenizer) if name in example}


def _padded(
    examples: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    pad_to_multiple_of: int | None,
    side: str | None = None,
) -> dict[str, torch.Tensor]:
    """Pad the inputs of examples on a side, by default the tokenizer's."""
    usual, names = tokenizer.padding_side, input_names(tokenizer)
    try:
        tokenizer.padding_side = side or usual
        pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        return dict(pad([{name: example[name] for name in names if name in example} for example in examples]))
    finally:
        tokenizer.padding_side = usual


def _labels(examples: list[dict[str, Any]], is_real: torch.Tensor) -> torch.Tensor:
    labels = [example["labels"] for example in examples]
    if not isinstance(labels[0], Sequence):
        return torch.tensor(labels)
    if all(len(row) == len(example["input_ids"]) for row, example in zip(labels, examples, strict=True)):
        return _at_tokens(labels, is_real, fill=IGNORED)
    spans_B2 = torch.tensor(labels)
    # With padding on the left, the text begins later.
    return torch.where(spans_B2 >= 0, spans_B2 + is_real.int().argmax(dim=1, keepdim=True), IGNORED)


def _at_tokens(rows: Sequence[Sequence[Any]], is_real: torch.Tensor, *, fill: Any) -> torch.Tensor:
    """Return a value for each token ``[B, L]``, and `fill` at padding, on whichever side that is."""
    values = torch.tensor([value for row in rows for value in row])
    return torch.full(is_real.shape, fill, dtype=values.dtype).masked_scatter(is_real, values)


def count_predictions(dataset: datasets.Dataset) -> np.ndarray | None:
    """Return how many tokens of each example are targets, ``[N]``; None if predictions are made for whole texts."""
    if "is_target" not in dataset.column_names:
        return None
    column = dataset.select_columns("is_target").with_format("arrow")[:]["is_target"].combine_chunks()
    ends = np.append(0, pc.list_value_length(column).to_numpy(zero_copy_only=False)).cumsum()
    before = np.append(0, column.flatten().to_numpy(zero_copy_only=False).cumsum())
    return before[ends[1:]] - before[ends[:-1]]


class LengthGroupedSampler(EpochSampler):
    """An epoch's examples in a keyed random order in which those of a step are of about one length.

    Args:
        lengths: ``[N]`` tokens of each example.
        seed: Seed of the run.
        batch_size: Examples of a step, over all devices and accumulation steps.
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, batch_size: int) -> None:
        super().__init__(len(lengths), seed=seed)
        self.lengths = lengths
        self.batch_size = batch_size

    @classmethod
    def of(cls, dataset: EpochDataset, *, seed: int, batch_size: int) -> LengthGroupedSampler:
        """Return the sampler of a data set with a column `input_ids`."""
        ids = dataset.base.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        return cls(pc.list_value_length(ids).to_numpy(), seed=seed, batch_size=batch_size)

    def _indices(self, epoch: int) -> Iterator[int]:
        rows, size = draws.permutation(self.num_examples, seed=self.seed, epoch=epoch), self.batch_size
        for first in range(0, len(rows), size * _STEPS_SORTED):
            window = rows[first : first + size * _STEPS_SORTED]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        # What does not fill a step comes last.
        steps = len(rows) // size
        order = draws.permutation(steps, seed=self.seed, epoch=epoch, stream="length groups")
        rows[: steps * size] = rows[: steps * size].reshape(steps, size)[order].ravel()
        for number, index in enumerate((rows + epoch * EPOCH_STRIDE).tolist(), start=1):
            yield number * ORDER_STRIDE + index
