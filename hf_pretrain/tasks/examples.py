"""Examples of a task as models read them: encoded, with labels as the teacher counts them, in batches of one length.

Examples of token classification: a class of each word stands at its first token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets.fingerprint import Hasher
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import check_offsets
from hf_pretrain.data.documents.words import character_kinds, next_visible
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, ORDER_STRIDE, EpochDataset, EpochSampler
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.modeling.observing.cache import tokenizer_fingerprint
from hf_pretrain.tasks.augmentation import SOURCE_ID, TEXT

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


def encode_tokens(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str,
    labels: str | None,
    config: PreTrainedConfig,
    max_length: int,
) -> datasets.Dataset:
    """Tokenize texts, or words with their classes; done once, and found again.

    Args:
        examples: Rows of text, or of lists of words, which are joined by spaces.
        tokenizer: A fast tokenizer that pads.
        column: Column of the text or the words.
        labels: Column of the classes of the words, None if there are none.
        config: The teacher's configuration, with its classes.
        max_length: Most tokens of an example; what goes beyond is cut off.

    Returns:
        Rows of `input_ids`, `token_type_ids` if the tokenizer makes them, `is_target`, true of all but special tokens, and
        `labels` if there are any: of each token, -100 but at the first token of a word.

    Raises:
        InputError: If words and classes are not equally many, or a class is none of the teacher's, or there are classes but
            no words.
    """
    check_offsets(tokenizer)
    is_text = getattr(examples.features[column], "dtype", None) in TEXT
    if is_text and labels is not None:
        raise InputError(
            f"text_columns names {column!r}, which holds texts, but label_column={labels!r} has a class for each word: name a "
            "column of lists of words"
        )
    classes = None if labels is None else _Classes(examples, labels, config)

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        words = [[text] if is_text else [str(word).strip() for word in text] for text in rows[column]]
        found = tokenizer(
            [_joined(row) for row in words],
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        inputs = {name: found[name] for name in INPUTS if name in found}
        inputs["is_target"] = [[not flag for flag in row] for row in found["special_tokens_mask"]]
        if classes is not None:
            inputs["label_ids"] = [
                _labels_of_token_examples(row, classes(tags, row, index), offsets, targets)
                for row, tags, index, offsets, targets in zip(
                    words, rows[str(labels)], indices, found["offset_mapping"], inputs["is_target"], strict=True
                )
            ]
        return inputs

    key = (column, labels, None if classes is None else classes.key, max_length)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


class _Classes:
    """Numbers the classes of words as the teacher does."""

    def __init__(self, examples: datasets.Dataset, column: str, config: PreTrainedConfig) -> None:
        feature = getattr(examples.features[column], "feature", None)
        if feature is None:
            raise InputError(
                f"label_column={column!r} holds no lists, but each word needs a class: name a column of lists"
            )
        self.column = column
        self.config = config
        self.names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.key = (self.names, config.label2id, config.num_labels)
        self._known: dict[Any, int] = {}

    def __call__(self, tags: Sequence[Any] | None, words: Sequence[str], index: int) -> np.ndarray:
        """Return the number of each word's class."""
        if tags is None:
            return np.full(len(words), IGNORED)
        if len(tags) != len(words):
            raise InputError(
                f"row {index} has {len(words)} words and {len(tags)} {self.column!r}: give a class to each"
            )
        for tag in tags:
            if tag not in self._known:
                self._known[tag] = label_number(tag, self.names, self.config, self.column)
        return np.array([self._known[tag] for tag in tags], dtype=np.int64)


def _joined(words: Sequence[str]) -> str:
    """Return words as a text; words of nothing would only be more spaces."""
    return " ".join(filter(None, words))


def _labels_of_token_examples(
    words: Sequence[str],
    classes: np.ndarray,
    offsets: Sequence[tuple[int, int]],
    is_target: Sequence[bool],
) -> list[int]:
    """Return the label of each token of words that were joined by spaces."""
    classes = classes[[bool(word) for word in words]]
    begins, text = np.cumsum([0, *(len(word) + 1 for word in words if word)])[:-1], _joined(words)
    # A token may begin with the space before its word.
    places = next_visible(character_kinds(text), np.array([begin for begin, _ in offsets], dtype=np.int64))
    numbers = np.searchsorted(begins, places, side="right") - 1
    numbers = np.where(is_target, numbers, -1)
    is_first = (numbers >= 0) & (numbers != np.append(-1, numbers)[:-1])
    return np.where(is_first, np.append(classes, IGNORED)[numbers], IGNORED).tolist()
