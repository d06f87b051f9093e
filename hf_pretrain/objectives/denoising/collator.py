"""Batches of pairs: what the encoder reads and what the decoder writes.

The texts of the examples are cut out of their special tokens and noised (`corruption/texts.py`). Then the special tokens come
back around both sides, and the pairs of isolated documents lie one after the other in the row of their example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_pretrain.corruption.masking import special_table
from hf_pretrain.corruption.rows import ExampleRows, RowKeys, check_padding, stack_column, stack_examples
from hf_pretrain.corruption.texts import Noise, NoisedTexts, Texts
from hf_pretrain.data.examples.packing import BlockTemplate
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED

START = -1
"""Stands in the decoder's input for the start token of the model."""


class DataCollatorForDenoising:
    """Make pairs of noised text and target of examples, and a batch for an encoder-decoder.

    What is drawn depends on the seed and on each example's `epoch` and `example_id` only: not on the batch, the worker or the
    rank. Each epoch draws anew unless `static_masks` is set.

    The examples are dicts of lists or arrays: `input_ids` with the special tokens, `example_id`, `epoch`, where the noise needs
    them `word_starts` and `sent_starts`, and optionally `document_ids`: the documents of such an example are noised each by
    itself, and no pair sees another. The batch is a dict of tensors, padded on the right:

    - `input_ids`, `attention_mask`: `[B, L]` int64, what the encoder reads;
    - `decoder_input_ids`, `decoder_attention_mask`, `labels`: `[B, T]` int64; `labels` is -100 at padding. Each target is
      predicted from those before it: the decoder's input is the target moved by one. It begins with -1, where the model puts
      its own start token; that of a fragment, with the token before the fragment;
    - `target_positions`: `[N]` int64, the flat indices `row * T + column` of the targets, ascending;
    - `is_hidden`: `[B, T]` bool, the targets that the input does not show;
    - `target_kinds`: `[B, T]` int64, which of the kinds of the noise a target is of;
    - `decoder_position_ids`: `[B, T]` int64, if the noise gives fragments: the positions that their tokens have in the text;
    - `document_ids`, `position_ids`, `decoder_document_ids`, `decoder_position_ids`: int64, if the examples have
      `document_ids`: which pair a token is of (-1 at padding), and its position in its side of the pair.

    Args:
        tokenizer: A transformers tokenizer with a padding token; it gives the special tokens around a text.
        noise: Makes the pairs.
        seed: Seed of the run.
        static_masks: If not 0, epochs count modulo this, so that draws repeat.
        pad_to_multiple_of: `L` and `T` are rounded up to a multiple of this.
        target_slots: If given, `N` is filled up to a multiple of this, for fixed shapes, with a position whose label is -100.

    Raises:
        InputError: If the tokenizer has no padding token, or a number is not positive. When called: if examples lack an entry.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        noise: Noise,
        seed: int = 0,
        static_masks: int = 0,
        pad_to_multiple_of: int | None = None,
        target_slots: int | None = None,
    ) -> None:
        """Read the special tokens off the tokenizer."""
        check_padding(tokenizer, pad_to_multiple_of=pad_to_multiple_of, target_slots=target_slots)
        self.tokenizer = tokenizer
        self.noise = noise
        self.template = BlockTemplate.of(tokenizer)
        self.special = special_table(tokenizer)
        self.end = end_of_target(tokenizer, self.template)
        self.seed = seed
        self.static_masks = static_masks
        self.pad_to_multiple_of = pad_to_multiple_of
        self.target_slots = target_slots
        # Most tokens of a target, to which all are padded; the model may have no position behind it.
        self.target_length: int | None = None

    def fix_sides(self, *, num_rows: int, inputs: int, targets: int) -> None:
        """Round up so that all batches of a training have one shape, for a graph that is compiled once.

        Args:
            num_rows: Examples of a batch.
            inputs: Most tokens of a row that the encoder reads.
            targets: Most tokens of a row that the decoder reads.
        """
        self.pad_to_multiple_of, self.target_length = inputs, targets
        self.target_slots = num_rows * targets

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        texts, isolates = self.read(examples)
        return self.assemble(texts, self.noise(texts), num_rows=len(examples), isolates=isolates)

    def read(self, examples: Sequence[Mapping[str, Any]]) -> tuple[Texts, bool]:
        """Return the texts of the examples, and whether an example holds several that are kept apart."""
        for column, is_needed in (
            ("word_starts", self.noise.needs_words),
            ("sent_starts", self.noise.needs_sentences),
        ):
            if is_needed and column not in examples[0]:
                raise InputError(
                    f"examples have no column {column!r}, which this noise reads: give text, or another noise; of BART's "
                    "noise_steps only rotation needs neither words nor sentences"
                )
        keys = RowKeys.from_examples(examples, seed=self.seed, static_masks=self.static_masks)
        pad_id = self.tokenizer.pad_token_id
        rows = stack_examples(examples, keys=keys, pad_id=pad_id, with_words=self.noise.needs_words)
        sentences = None
        if self.noise.needs_sentences:
            sentences, _ = stack_column(examples, "sent_starts", valid=rows.valid)
        return self._cut_out(rows, sentences), rows.document_ids is not None

    def _cut_out(self, rows: ExampleRows, sentences: np.ndarray | None) -> Texts:
        """Return the texts without the special tokens around them."""
        width, begins = rows.valid.shape[1], rows.document_starts()
        is_first = np.zeros_like(rows.valid)
        is_first[:, 0] = True
        if begins is not None:
            is_first |= begins & rows.valid
        row, start = np.nonzero(is_first)
        lengths = np.count_nonzero(rows.valid, axis=1)
        is_last_of_row = np.append(row[1:] != row[:-1], True)
        end = np.where(is_last_of_row, lengths[row], np.append(start[1:], 0))
        start, end = self._without_frame(rows.input_ids, row, start, end)
        columns = start[:, None] + np.arange(max(int((end - start).max()), 1))
        valid = columns < end[:, None]
        flat = row[:, None] * width + np.minimum(columns, width - 1)
        ids = rows.input_ids.ravel()[flat]
        words = valid if rows.word_starts is None else rows.word_starts.ravel()[flat]
        is_special = self.special[np.where(valid, ids, self.tokenizer.pad_token_id)] & valid
        first_sentences = None if sentences is None else sentences.ravel()[flat] & valid
        words = words & valid | is_special
        for starts in (words, first_sentences):
            if starts is not None:
                starts[:, 0] = valid[:, 0]
        return Texts(ids, valid, words, first_sentences, is_special, rows=row, offsets=start, keys=rows.keys)

    def _without_frame(
        self, ids: np.ndarray, row: np.ndarray, start: np.ndarray, end: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of texts without the special tokens of the template, where they are there."""
        prefix, suffix = self.template.prefix, self.template.suffix
        last = ids.shape[1] - 1
        has_prefix = end - start >= len(prefix)
        for place, token in enumerate(prefix):
            has_prefix &= ids[row, np.minimum(start + place, last)] == token
        start = start + len(prefix) * has_prefix
        has_suffix = end - start >= len(suffix)
        for place, token in enumerate(reversed(suffix), 1):
            has_suffix &= ids[row, np.maximum(end - place, 0)] == token
        return start, end - len(suffix) * has_suffix

    def assemble(self, texts: Texts, pairs: NoisedTexts, *, num_rows: int, isolates: bool) -> dict[str, torch.Tensor]:
        """Put the special tokens around both sides of the pairs, and lay them out in the rows of their examples."""
        noise, template, pad_id = self.noise, self.template, self.tokenizer.pad_token_id
        inputs, input_valid = _framed(pairs.input_ids, pairs.input_valid, template.prefix, template.suffix)
        prefix = template.prefix if noise.has_whole_target else ()
        suffix = template.suffix if noise.has_whole_target else self.end[: noise.ends_target]
        targets, target_valid = _framed(pairs.targets, pairs.target_valid, prefix, suffix)
        hidden, _ = _framed(pairs.is_hidden, pairs.target_valid, [False] * len(prefix), [False] * len(suffix))
        positions = np.broadcast_to(np.arange(targets.shape[1]), targets.shape)
        if pairs.starts is not None:
            positions = positions + (len(template.prefix) + pairs.starts)[:, None]
        kinds = np.broadcast_to(pairs.kinds[:, None], targets.shape)
        encoder = _Rows.of(texts.rows, input_valid, num_rows=num_rows, multiple=self.pad_to_multiple_of)
        multiple = self.pad_to_multiple_of if self.target_length is None else self.target_length
        decoder = _Rows.of(texts.rows, target_valid, num_rows=num_rows, multiple=multiple)
        if self.target_slots is not None and self.target_length is None and decoder.valid.all():
            decoder = decoder.wider(self.pad_to_multiple_of or 1)
        batch = {
            "input_ids": encoder.place(inputs, fill=pad_id),
            "attention_mask": encoder.valid.astype(np.int64),
            "decoder_input_ids": decoder.place(self._moved(targets, texts, pairs), fill=pad_id),
            "decoder_attention_mask": decoder.valid.astype(np.int64),
            "labels": decoder.place(targets, fill=IGNORED),
            "target_positions": self._slots(decoder.valid),
            "is_hidden": decoder.place(hidden, fill=0),
            "target_kinds": decoder.place(kinds, fill=0),
        }
        if isolates or pairs.starts is not None:
            batch["decoder_position_ids"] = decoder.place(positions, fill=0)
        if isolates:
            columns = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
            batch["position_ids"] = encoder.place(columns, fill=0)
            numbers = _numbers_in_row(texts.rows)[:, None]
            batch["document_ids"] = encoder.place(np.broadcast_to(numbers, inputs.shape), fill=-1)
            batch["decoder_document_ids"] = decoder.place(np.broadcast_to(numbers, targets.shape), fill=-1)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _moved(self, targets: np.ndarray, texts: Texts, pairs: NoisedTexts) -> np.ndarray:
        """Return the decoder's input: what comes before each target."""
        moved = np.empty_like(targets)
        moved[:, 1:] = targets[:, :-1]
        moved[:, 0] = START
        if pairs.starts is not None:
            prefix = self.template.prefix
            first = prefix[-1] if prefix else START
            before = np.take_along_axis(texts.input_ids, np.maximum(pairs.starts - 1, 0)[:, None], axis=1)[:, 0]
            moved[:, 0] = np.where(pairs.starts > 0, before, first)
        return moved

    def _slots(self, valid: np.ndarray) -> np.ndarray:
        """Return the flat positions of the targets, filled up to a multiple of `target_slots`."""
        positions = np.flatnonzero(valid)
        if self.target_slots is None or valid.all():
            # Without a free position a batch is left as it is: of a fixed shape it is full.
            return positions
        missing = -len(positions) % self.target_slots
        return np.append(positions, np.full(missing, np.argmin(valid)))


class _Rows:
    """Where the tokens of pairs come to lie: pairs of one example one after the other in its row.

    Attributes:
        valid: `[B, width]` bool, the positions that hold tokens.
        of_pairs: `[P, W]` bool, the tokens of the pairs.
    """

    def __init__(self, valid: np.ndarray, of_pairs: np.ndarray) -> None:
        self.valid = valid
        self.of_pairs = of_pairs

    @classmethod
    def of(cls, rows: np.ndarray, valid: np.ndarray, *, num_rows: int, multiple: int | None) -> _Rows:
        """Lay out pairs of which `valid`, `[P, W]`, are tokens; a row is rounded up to a multiple."""
        lengths = np.bincount(rows, weights=np.count_nonzero(valid, axis=1), minlength=num_rows).astype(np.int64)
        multiple = multiple or 1
        width = -(-max(int(lengths.max()), 1) // multiple) * multiple
        return cls(np.arange(width) < lengths[:, None], valid)

    def wider(self, columns: int) -> _Rows:
        """Return the same with more columns of padding."""
        return _Rows(np.pad(self.valid, ((0, 0), (0, columns))), self.of_pairs)

    def place(self, values: np.ndarray, *, fill: int) -> np.ndarray:
        """Return values of the pairs, `[P, W]`, in the rows, with `fill` at padding."""
        if values.shape == self.valid.shape and self.of_pairs.all():
            return np.ascontiguousarray(values)
        placed = np.full(self.valid.shape, fill, dtype=values.dtype)
        placed[self.valid] = values[self.of_pairs]
        return placed


def _framed(
    values: np.ndarray, valid: np.ndarray, prefix: Sequence[Any], suffix: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Put constants around left-aligned rows; return the values, and where they are."""
    if not len(prefix) and not len(suffix):
        return values, valid
    begin, lengths = len(prefix), np.count_nonzero(valid, axis=1)
    framed = np.zeros((len(values), begin + values.shape[1] + len(suffix)), dtype=values.dtype)
    framed[:, :begin] = prefix
    framed[:, begin : begin + values.shape[1]] = values
    every = np.arange(len(values))
    for place, value in enumerate(suffix):
        framed[every, begin + lengths + place] = value
    return framed, np.arange(framed.shape[1]) < (begin + lengths + len(suffix))[:, None]


def _numbers_in_row(rows: np.ndarray) -> np.ndarray:
    """Return for each pair how many come before it in its row; rows ascend."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)


def end_of_target(tokenizer: Any, template: BlockTemplate) -> tuple[int, ...]:
    """Return the token that ends a target: of those behind a text the end token, else the last; empty if there is none at all."""
    if tokenizer.eos_token_id in template.suffix:
        return (tokenizer.eos_token_id,)
    known = (*template.suffix[-1:], tokenizer.eos_token_id, tokenizer.sep_token_id)
    return tuple(token for token in known if token is not None)[:1]
