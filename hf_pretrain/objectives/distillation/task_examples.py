"""Examples of a task as models read them: encoded, with labels as the teacher counts them, in batches of one length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from hf_pretrain.objectives.distillation.cache import TaskLogitsCache
from hf_pretrain.objectives.distillation.fingerprints import tokenizer_fingerprint

_INPUTS = ("input_ids", "token_type_ids")
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
        return {name: found[name] for name in _INPUTS if name in found}

    key = (examples._fingerprint, tokenizer_fingerprint(tokenizer), tokenizer.model_input_names, columns, max_length)
    encoded = examples.map(
        to_inputs,
        batched=True,
        remove_columns=examples.column_names,
        new_fingerprint=Hasher.hash(("encode", *key)),
        desc="Tokenizing",
    )
    return encoded if numbers is None else encoded.add_column("labels", numbers)


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
    known = {value: _label_number(value, names, config, column) for value in set(values)}
    return np.array([known[value] for value in values], dtype=np.int64)


def _label_number(value: Any, names: Sequence[str] | None, config: PreTrainedConfig, column: str) -> int:
    """Return the class of a label by its name, or by its number: -100 for none, which data sets also write -1."""
    if value in (None, "", -1, "-1"):
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
    """Pads examples to the longest of them: `input_ids`, `attention_mask`, what else models read, and `labels` ``[B]``.

    Args:
        tokenizer: A tokenizer with a padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, pad_to_multiple_of: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples; with `teacher_logits` ``[B, C]`` if they have them."""
        pad = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
        batch = dict(pad([{name: example[name] for name in _INPUTS if name in example} for example in examples]))
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        if "teacher_logits" in examples[0]:
            batch["teacher_logits"] = torch.stack([example["teacher_logits"] for example in examples])
        return batch


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
        """Return an example with its `teacher_logits` ``[C]``."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return examples with their `teacher_logits`, read together."""
        examples = [self.base[row] for row in rows]
        logits = self.cache.lookup(np.asarray(rows))
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
