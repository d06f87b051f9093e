"""A batch of examples as arrays: one row an example, left-aligned, with the keys of its draws."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError

# Of columns that hold no integers.
_FORMATS = {"word_starts": "?", "sent_starts": "?", "goes_on": "?"}
_DTYPES = {"q": np.int64, "?": np.bool_}
_WORDS_FIX = "prepare the data with hf_pretrain (documents have this column), or use masking_unit='token'"


@dataclass(frozen=True)
class RowKeys:
    """The keys of the draws of a batch.

    Attributes:
        example_ids: `[B]` int64.
        epochs: `[B]` int64.
        seed: Seed of the run.
    """

    example_ids: np.ndarray
    epochs: np.ndarray
    seed: int

    @classmethod
    def from_examples(cls, examples: Sequence[Mapping[str, Any]], *, seed: int = 0, static_masks: int = 0) -> RowKeys:
        """Read the keys that `EpochDataset` gave to examples.

        Args:
            examples: Each with the entries `example_id` and `epoch`.
            seed: Seed of the run.
            static_masks: If not 0, epochs count modulo this, so that draws repeat.

        Returns:
            The keys.

        Raises:
            InputError: If an example lacks them.
        """
        try:
            example_ids = np.array([example["example_id"] for example in examples], dtype=np.int64)
            epochs = np.array([example["epoch"] for example in examples], dtype=np.int64)
        except KeyError as error:
            raise InputError(
                f"examples have no entry {error}, by which draws are keyed: wrap the dataset in "
                "hf_pretrain.data.examples.epochs.EpochDataset"
            ) from None
        return cls(example_ids=example_ids, epochs=epochs % static_masks if static_masks else epochs, seed=seed)

    def bits(self, stream: str, *, length: int) -> np.ndarray:
        """Return 64 random bits a position of each row, `uint64` `[B, length]`; a longer row changes no draw."""
        keys = draws.row_keys(self.example_ids, seed=self.seed, epoch=self.epochs, stream=stream)
        return draws.bits(keys, length)


@dataclass(frozen=True)
class ExampleRows:
    """Examples stacked into arrays; token `i` of an example lies in column `i`, padding follows.

    Attributes:
        input_ids: `[B, L]` int64.
        valid: `[B, L]` bool, False at padding.
        keys: Keys of the draws.
        word_starts: `[B, L]` bool, or None if the masking does not need them.
        token_type_ids: `[B, L]` int64, or None if the examples have none.
        spans: `[S, 3]` int64 of (row, start, end), the given spans, or None if the masking does not need them.
        document_ids: `[B, L]` int64, which of the row's isolated documents a token belongs to, -1 at padding; None if
            the examples have none.
        order_indices: `[B]` int64, the index of each example in the order of an epoch, -1 where it has none.
        order_epochs: `[B]` int64, the epoch of that order; that of a mixture is not that of the examples' own draws.
        also_maskable: `[B, L]` bool, special tokens that may be selected all the same; None if there are none.
        not_maskable: `[B, L]` bool, tokens that may not be selected; None if all others may.
        next_tokens: `[B, L]` bool, targets that stay as they are: the next tokens of causal rows; None without such rows.
    """

    input_ids: np.ndarray
    valid: np.ndarray
    keys: RowKeys
    word_starts: np.ndarray | None = None
    token_type_ids: np.ndarray | None = None
    spans: np.ndarray | None = None
    document_ids: np.ndarray | None = None
    order_indices: np.ndarray | None = None
    order_epochs: np.ndarray | None = None
    also_maskable: np.ndarray | None = None
    not_maskable: np.ndarray | None = None
    next_tokens: np.ndarray | None = None

    def bits(self, stream: str) -> np.ndarray:
        """Return 64 random bits a position, `uint64` `[B, L]`."""
        return self.keys.bits(stream, length=self.input_ids.shape[1])

    def document_starts(self) -> np.ndarray | None:
        """Return whether an isolated document, or padding, begins at a token: `[B, L]` bool; None if there are none."""
        return None if self.document_ids is None else np.diff(self.document_ids, axis=1, prepend=-2) != 0

    def document_positions(self) -> np.ndarray:
        """Return the position of each token in its isolated document, from 0: `[B, L]` int64, 0 at padding."""
        begins = self.document_starts()
        assert begins is not None, "the examples have no document_ids"
        columns = np.arange(begins.shape[1])
        return (columns - np.maximum.accumulate(columns * begins, axis=1)) * self.valid


def check_padding(tokenizer: Any, *, pad_to_multiple_of: int | None, target_slots: int | None) -> None:
    """Refuse a tokenizer without a padding token, and numbers to round up to that are not positive.

    Args:
        tokenizer: The tokenizer of a collator.
        pad_to_multiple_of: What the length of a batch is rounded up to; None for no rounding.
        target_slots: What the number of targets is rounded up to; None for no rounding.

    Raises:
        InputError: Naming the token or the number.
    """
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} has no padding token: set tokenizer.pad_token, for example "
            "tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
        )
    for name, value in (("pad_to_multiple_of", pad_to_multiple_of), ("target_slots", target_slots)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1, or None for no such rounding")


def few_lengths(longest: int, *, step: int = 64) -> int:
    """Return what lengths are rounded up to so that there are few of them and none is above the longest.

    Args:
        longest: The longest length; a model may have no position behind it.
        step: About the step wanted.

    Returns:
        The largest divisor of the longest length that is at most `step`, the length itself where all of them are small.
    """
    divisors = [number for number in range(step // 4, step + 1) if longest % number == 0]
    return max(divisors, default=longest)


def stack_column(
    examples: Sequence[Mapping[str, Any]],
    name: str,
    *,
    valid: np.ndarray | None = None,
    fill: int = 0,
    multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Stack one column of lists or arrays into a left-aligned array.

    Args:
        examples: The examples.
        name: Column with an entry a token.
        valid: `[B, L]` bool of a column already stacked, whose lengths this one must have; None to find them.
        fill: Value at padding.
        multiple: `L` is rounded up to a multiple of this.

    Returns:
        The values `[B, L]`, and `valid`.

    Raises:
        InputError: If lengths differ from those of `valid`.
    """
    columns = [example[name] for example in examples]
    lengths = np.array([len(column) for column in columns], dtype=np.int64)
    if valid is None:
        width = -(-max(int(lengths.max()), 1) // multiple) * multiple
        valid = np.arange(width) < lengths[:, None]
    elif not np.array_equal(lengths, np.count_nonzero(valid, axis=1)):
        raise InputError(f"{name} is not as long as input_ids in some example: give one entry a token")
    flat = _concatenate(columns, _FORMATS.get(name, "q"))
    if flat.size == valid.size:
        return flat.reshape(valid.shape), valid
    values = np.full(valid.shape, fill, dtype=flat.dtype)
    values[valid] = flat
    return values, valid


def _concatenate(columns: Sequence[Any], code: str) -> np.ndarray:
    """Join lists or arrays into one fresh array; packing a list into bytes is twice as fast as `np.fromiter`."""
    if not all(isinstance(column, list) for column in columns):
        return np.concatenate([np.asarray(column) for column in columns], dtype=_DTYPES[code], casting="unsafe")
    if code == "?":
        return np.frombuffer(b"".join(map(_pack_flags, columns)), dtype=np.uint8) != 0
    packed = bytearray().join([struct.pack(f"{len(column)}{code}", *column) for column in columns])
    return np.frombuffer(packed, dtype=_DTYPES[code])


def _pack_flags(column: list[bool]) -> bytes:
    try:
        return bytes(column)
    except TypeError:  # NumPy's booleans are no integers.
        return struct.pack(f"{len(column)}?", *column)


def stack_examples(
    examples: Sequence[Mapping[str, Any]],
    *,
    keys: RowKeys,
    pad_id: int = 0,
    pad_type_id: int = 0,
    multiple: int = 1,
    with_words: bool = False,
    with_spans: bool = False,
) -> ExampleRows:
    """Stack examples into arrays.

    Args:
        examples: Each with `input_ids`, perhaps with `order_index`; `token_type_ids` and `document_ids` if the first has
            them.
        keys: Keys of the draws.
        pad_id: Token id at padding.
        pad_type_id: Token type id at padding.
        multiple: Rows are padded to a multiple of this.
        with_words: Whether `word_starts` is needed.
        with_spans: Whether `spans` is needed.

    Returns:
        The rows.

    Raises:
        InputError: If a needed column is missing or does not fit `input_ids`.
    """
    input_ids, valid = stack_column(examples, "input_ids", fill=pad_id, multiple=multiple)
    types = words = spans = documents = None
    try:
        if "document_ids" in examples[0]:
            documents, _ = stack_column(examples, "document_ids", valid=valid, fill=-1)
        if "token_type_ids" in examples[0]:
            types, _ = stack_column(examples, "token_type_ids", valid=valid, fill=pad_type_id)
        if with_words:
            words, _ = stack_column(examples, "word_starts", valid=valid)
        if with_spans:
            spans = _stack_spans([example["spans"] for example in examples], np.count_nonzero(valid, axis=1))
    except KeyError as error:
        fix = _WORDS_FIX if error.args[0] == "word_starts" else "give it to every example, or choose another unit"
        raise InputError(f"examples have no column {error}, which these masking options need: {fix}") from None
    order_indices = np.array([example.get("order_index", -1) for example in examples], dtype=np.int64)
    order_epochs = np.array(
        [example.get("order_epoch", example.get("epoch", 0)) for example in examples], dtype=np.int64
    )
    return ExampleRows(
        input_ids,
        valid,
        keys,
        word_starts=words,
        token_type_ids=types,
        spans=spans,
        document_ids=documents,
        order_indices=order_indices,
        order_epochs=order_epochs,
    )


def ends_of_rows(input_ids: np.ndarray, valid: np.ndarray, suffix: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where rows end with the special tokens that a tokenizer puts behind a text: `[B, L]` bool, True at these tokens.

    Args:
        input_ids: `[B, L]`, padded on the right.
        valid: `[B, L]` bool, False at padding.
        suffix: The special tokens in their order; a row that does not end with all of them, or has nothing before them, has none.
    """
    found, size = np.zeros_like(valid), len(suffix)
    for row, length in enumerate(valid.sum(axis=1).tolist()):
        if length > size and np.array_equal(input_ids[row, length - size : length], suffix):
            found[row, length - size : length] = True
    return found


def _stack_spans(columns: Sequence[Any], lengths: np.ndarray) -> np.ndarray:
    """Join the given spans of each example into a table (row, start, end), checked against the lengths."""
    counts = [len(column) for column in columns]
    bounds = [
        np.asarray(column, dtype=np.int64).reshape(count, 2) for column, count in zip(columns, counts, strict=True)
    ]
    rows = np.repeat(np.arange(len(columns)), counts)
    table = np.column_stack([rows, np.concatenate(bounds)])
    wrong = (table[:, 1] < 0) | (table[:, 1] >= table[:, 2]) | (table[:, 2] > lengths[rows])
    if wrong.any():
        row, start, end = table[wrong][0].tolist()
        raise InputError(
            f"spans holds ({start}, {end}) in an example of {lengths[row]} tokens: give 0 <= start < end <= length"
        )
    return table
