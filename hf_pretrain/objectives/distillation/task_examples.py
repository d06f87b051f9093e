"""Examples of a task as models read them: encoded, with labels as the teacher counts them, in batches of one length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.epochs import EPOCH_STRIDE, PLACE_STRIDE, EpochDataset, EpochSampler
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.distillation.augmentation import SOURCE_ID
from hf_pretrain.objectives.distillation.cache import TaskLogitsCache
from hf_pretrain.objectives.distillation.fingerprints import tokenizer_fingerprint

INPUTS = ("input_ids", "token_type_ids")
# Steps whose examples are sorted by length together.
_STEPS_SORTED = 50


def encode(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str],
    labels: str | None,
    config: PreTrainedConfig,
    max_length: int,
) -> datasets.Dataset:
    """Tokenize examples and number their labels; done once, and found again.

    Args:
        examples: Rows of text.
        tokenizer: A tokenizer that pads.
        columns: Column of the text, or of a pair of texts.
        labels: Column of the labels, None if there are none.
        config: The teacher's configuration, with its labels.
        max_length: Most tokens of an example; of a pair, the longer text is cut first.

    Returns:
        Rows of `input_ids`, `token_type_ids` if the tokenizer makes them, and `labels` if there are any.

    Raises:
        InputError: If a label is none of the teacher's.
    """
    numbers = _label_numbers(examples, labels, config) if labels is not None else None

    def to_inputs(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [["" if text is None else str(text) for text in rows[name]] for name in columns]
        found = tokenizer(*texts, truncation=True, max_length=max_length)
        return {name: found[name] for name in INPUTS if name in found}

    encoded = map_texts(examples, to_inputs, tokenizer, key=(list(columns), max_length))
    return encoded if numbers is None else encoded.add_column("labels", numbers)


def map_texts(
    examples: datasets.Dataset,
    function: Callable[..., Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: Any,
    with_indices: bool = False,
) -> datasets.Dataset:
    """Make inputs of texts, once: the same of the same texts is found again.

    Args:
        examples: Rows of text. Of their columns only `source_id` stays, by which variants of a row are known.
        function: Takes rows, with their numbers if `with_indices`, and returns inputs, with `label_ids` for `labels`: a column
            that is overwritten would keep its type.
        tokenizer: What the function tokenizes with.
        key: Whatever else decides the result.
        with_indices: Whether the function takes numbers.
    """
    known = (examples._fingerprint, tokenizer_fingerprint(tokenizer), tokenizer.model_input_names)
    encoded = examples.map(
        function,
        with_indices=with_indices,
        batched=True,
        remove_columns=[name for name in examples.column_names if name != SOURCE_ID],
        new_fingerprint=Hasher.hash(("encode", *known, function.__qualname__, key)),
        desc="Tokenizing",
    )
    return encoded.rename_column("label_ids", "labels") if "label_ids" in encoded.column_names else encoded


def _label_numbers(examples: datasets.Dataset, column: str, config: PreTrainedConfig) -> np.ndarray:
    values = examples[column][:]
    if config.num_labels == 1:
        try:
            # An empty field of a table of text is a label that is missing.
            return np.array([math.nan if value in (None, "") else float(value) for value in values], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"label_column={column!r} holds what is no number, for a teacher of values: {error}"
            ) from None
    feature = examples.features[column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    known = {value: label_number(value, names, config, column) for value in set(values)}
    return np.array([known[value] for value in values], dtype=np.int64)


def label_number(value: Any, names: Sequence[str] | None, config: PreTrainedConfig, column: str) -> int:
    """Return the class of a label by its name, or by its number: -100 for none, which data sets also write -1."""
    if value in (None, "", -1, "-1", IGNORED):
        return IGNORED
    name = names[value] if names is not None else value
    by_name: Mapping[str, int] = config.label2id or {}
    if name in by_name:
        return int(by_name[name])
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < config.num_labels or number != float(value):
        raise InputError(
            f"label_column={column!r} holds {value!r}, but the teacher's labels are {', '.join(map(str, by_name))}: "
            f"use these names, or numbers below {config.num_labels}"
        )
    return number


class DataCollatorForTask:
    """Pads examples to the longest of them: `input_ids`, `attention_mask` and what else models read.

    `labels` are ``[B]``, one a text; of classes of tokens ``[B, L]``, -100 at padding; of spans ``[B, 2]``, the first and the
    last token. `target_positions` ``[T]`` are the flat positions of the tokens that `is_target` marks, row by row.

    Args:
        tokenizer: A tokenizer with a padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, pad_to_multiple_of: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples; with `teacher_logits`, one row a prediction, if they have them."""
        pad = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
        batch = dict(pad([{name: example[name] for name in INPUTS if name in example} for example in examples]))
        is_real = batch["attention_mask"].bool()
        if "is_target" in examples[0]:
            is_target = _at_tokens([example["is_target"] for example in examples], is_real, fill=False)
            batch["target_positions"] = is_target.flatten().nonzero().squeeze(1)
        if "labels" in examples[0]:
            batch["labels"] = _labels(examples, is_real)
        if "teacher_logits" in examples[0]:
            batch["teacher_logits"] = torch.cat([example["teacher_logits"] for example in examples])
        return batch


def _labels(examples: list[dict[str, Any]], is_real: torch.Tensor) -> torch.Tensor:
    labels = [example["labels"] for example in examples]
    if not isinstance(labels[0], Sequence):
        return torch.tensor(labels)
    if all(len(row) == len(example["input_ids"]) for row, example in zip(labels, examples, strict=True)):
        return _at_tokens(labels, is_real, fill=IGNORED)
    places_B2 = torch.tensor(labels)
    # Padding may stand before the text.
    return torch.where(places_B2 >= 0, places_B2 + is_real.int().argmax(dim=1, keepdim=True), IGNORED)


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


class AnsweredDataset(Dataset[dict[str, Any]]):
    """Examples with what the teacher predicts of each, as it was found once.

    Args:
        base: Map-style examples.
        cache: The teacher's logits of these.
    """

    def __init__(self, base: Any, cache: TaskLogitsCache) -> None:
        self.base = base
        self.cache = cache

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.base)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return an example with its `teacher_logits`, one row a prediction."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return examples with their `teacher_logits`, read together."""
        examples = [self.base[row] for row in rows]
        logits = self.cache.lookup_each(rows)
        return [{**example, "teacher_logits": row} for example, row in zip(examples, logits, strict=True)]


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
        base: datasets.Dataset = getattr(dataset.base, "base", dataset.base)
        ids = base.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
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
        for place, index in enumerate((rows + epoch * EPOCH_STRIDE).tolist(), start=1):
            yield place * PLACE_STRIDE + index
