"""Batches of texts that get one vector each.

The texts of the examples are read role by role: all anchors, all positives, then the negatives. They become a list of sequences,
one after the other in flat arrays. Masks, deletions and masked copies change that list. In the end each sequence gets a row of
its own, or several share a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.corruption.masking import Vocabulary, mask_rows, special_table
from hf_pretrain.corruption.rows import (
    ExampleRows,
    RowKeys,
    check_padding,
    few_lengths,
    stack_column,
    stack_examples,
)
from hf_pretrain.corruption.selection import to_uniforms
from hf_pretrain.data import draws
from hf_pretrain.data.examples.packing import BlockTemplate, pack_rows
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.contrastive.arguments import Objective
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.objectives.replaced_token_detection import DataCollatorForReplacedTokenDetection
from hf_pretrain.schedules import TrainingSteps

BesideObjective = Literal["none", "mlm", "rtd"]

_TEXTS = {
    "contrastive": "an anchor, a positive and any negatives",
    "infoword": "a text and one of its n-grams",
    "retromae": "one text",
    "tsdae": "one text",
}
# What draws and schedules of masking read off an example.
_KEYS = ("example_id", "epoch", "order_index", "order_epoch")


@dataclass(frozen=True)
class TextSequences:
    """Sequences of tokens one after the other.

    Attributes:
        input_ids: `[n]` int64, the tokens of all sequences.
        lengths: `[N]` int64, tokens of each sequence.
        token_type_ids: `[n]` int64; None if the texts have none.
        labels: `[n]` int64; None if nothing is to be found again.
        num_texts: The first sequences that are texts with a vector; the others are masked copies.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    token_type_ids: np.ndarray | None
    labels: np.ndarray | None
    num_texts: int

    def text_ids(self) -> np.ndarray:
        """Return the number of the text that each token belongs to, -1 in copies: `[n]` int64."""
        numbers = np.arange(len(self.lengths))
        numbers[self.num_texts :] = -1
        return np.repeat(numbers, self.lengths)

    def columns(self) -> np.ndarray:
        """Return the column of each token in its sequence, from 0: `[n]` int64."""
        return np.arange(len(self.input_ids)) - np.repeat(_begins(self.lengths), self.lengths)


@dataclass(frozen=True)
class _Layout:
    """Where sequences come to lie in the batch.

    Attributes:
        shape: Rows and columns of the batch.
        starts: `[N]` int64, flat position of the first token of each sequence.
        numbers: `[N]` int64, how many sequences come before each in its row.
    """

    shape: tuple[int, int]
    starts: np.ndarray
    numbers: np.ndarray

    @classmethod
    def padded(cls, lengths: np.ndarray, *, width: int, side: str) -> _Layout:
        """Give each sequence a row of its own, padded on `side`."""
        starts = np.arange(len(lengths)) * width
        if side == "left":
            starts += width - lengths
        return cls((len(lengths), width), starts, np.zeros(len(lengths), dtype=np.int64))

    @classmethod
    def packed(cls, lengths: np.ndarray, *, width: int, capacity: int) -> _Layout:
        """Put sequences together in rows that hold `capacity` tokens at most."""
        rows = pack_rows(lengths, capacity=capacity)
        counts = np.diff(rows.bounds)
        in_order = lengths[rows.order]
        row_begins = np.repeat(_begins(in_order)[rows.bounds[:-1]], counts)
        starts, numbers = np.empty_like(lengths), np.empty_like(lengths)
        starts[rows.order] = np.repeat(np.arange(len(rows)) * width, counts) + _begins(in_order) - row_begins
        numbers[rows.order] = np.arange(len(lengths)) - np.repeat(rows.bounds[:-1], counts)
        return cls((len(rows), width), starts, numbers)


class DataCollatorForContrastive:
    """Make a batch of texts that get one vector each, for [`ContrastiveForPreTraining`].

    What is drawn depends on the seed and on each example's `epoch` and `example_id` only: not on the batch, the worker, the rank
    or the side of padding. Each epoch draws anew unless `masking.static_masks` is set.

    The examples are dicts:

    - `texts`: a list of dicts, each with the columns of one text: `input_ids` with the special tokens, where masking needs it
      `word_starts`, perhaps `token_type_ids`. The first is the anchor, the second its positive, the others are its negatives.
      For "retromae" and "tsdae" there is the anchor alone, for "infoword" the text and its n-gram;
    - `document`: number of the document of the anchor;
    - `ngram`: for "infoword" the columns (begin, end) of the n-gram in the anchor;
    - `example_id`, `epoch`, and perhaps `order_index`, which a schedule of the mask rate reads.

    The batch is a dict of int64 tensors. B is the number of examples, R that of texts, P that of rows, W their width. Text j of
    example b, from 0, has the number `j * B + b`:

    - `input_ids`, `attention_mask`: `[P, W]`. If each row is one text, row r is text r;
    - `document_ids`, `position_ids`: `[P, W]`, if texts share rows: number of the text inside its row, -1 at padding, and the
      position in the text, 0 at padding;
    - `token_type_ids`: `[P, W]`, if the texts have them;
    - `text_ids`: `[P, W]`, number of the text that a token belongs to, -1 at padding and in masked copies;
    - `first_positions`: `[R]`, flat position `row * W + column` of the first token of each text;
    - `documents`: `[B]`, and `text_keys`: `[R]`, see `text_keys`;
    - `labels`: `[P, W]`, and `target_positions`: `[T]`, with "mlm", as in the batch of [`DataCollatorForMaskedLM`].

    The rows of the anchors differ by objective. The other texts are never changed.

    - "contrastive": the anchor as it is. With "mlm", masked copies of the anchors are further sequences. They have no vector: the
      copy of example b is sequence `R + b`.
    - "infoword": the mask token replaces every token of the n-gram. With "mlm", targets are selected among the other tokens.
    - "retromae": the anchor with the masks of `masking`; with "mlm" they are targets too.
    - "tsdae": the anchor, from which each ordinary token is deleted with `deletion_probability`. If that takes all of them, one
      stays, each as likely. With "mlm", masked copies of the untouched anchors are further sequences.

    Ordinary are the tokens that masking may select. For "retromae" and "tsdae" the batch has what a decoder reads and writes. It
    is padded on the right, whatever the side of the tokenizer:

    - `decoder_input_ids`, `decoder_labels`: `[B, L]`; labels are -100 where nothing is predicted;
    - `decoder_mask`: `[B, L]`, 1 at tokens;
    - `decoder_keys`: `[B]`, with `enhanced_decoding`: keys of the draws that say which tokens see which.

    The model puts the vector into column 0, so no label is there but that of the first token of "tsdae".

    - "retromae": the decoder reads the text under a second mask. It is drawn as `masking` draws, independently of the first, at
      the rate `decoder_mask_probability`, and the mask token is at every selected token. Labels are the originals there. With
      `enhanced_decoding` it reads the untouched text, and every ordinary token is a label in its own column. Column 0 has the
      first special token. If the tokenizer puts none before a text, a column with the padding token comes before it.
    - "tsdae": a token is predicted from the vector and the tokens before it. Column 0 has the padding token, and column t has the
      token t - 1 of the untouched text, from 0; its last token is left out. The label of column t is the token t if that is
      ordinary or the last one, whatever it is, so that the decoder learns to stop.

    With "rtd" the batch of a [`DataCollatorForReplacedTokenDetection`] on the untouched anchors comes along, each entry with the
    prefix `rtd_`.

    Args:
        tokenizer: A transformers tokenizer with a padding token, and with a mask token where something is masked; its
            `padding_side` is respected unless texts share rows.
        objective: "contrastive", "infoword", "retromae" or "tsdae".
        beside: What is learnt along with it: "none", "mlm" or "rtd".
        masking: The options of masking; BERT's by default.
        seed: Seed of the run.
        packed: Whether texts share rows. The fullest row with room takes a text, the longest text first.
        row_length: `W` of rows that are shared, so that it does not change; by default that of the longest text of the batch.
        deletion_probability: Of each ordinary token, for "tsdae".
        decoder_mask_probability: Share of the tokens that "retromae" masks for its decoder.
        enhanced_decoding: Whether "retromae" predicts every token, each from a sample of the others.
        pad_to_multiple_of: `W` and `L` are rounded up to a multiple of this.
        target_slots: If given, `T` is filled up to a multiple of this, for fixed shapes, with a position whose label is -100.

    Raises:
        InputError: If the tokenizer lacks a token, a number is out of range, or an option has no effect. When called: if examples
            lack an entry, have different numbers of texts, texts without tokens or ids that are not the tokenizer's, if an n-gram
            does not lie in its text, or a text is longer than `row_length`.

    Source:
        InfoWord (Kong et al. 2020), RetroMAE (Xiao et al. 2022), TSDAE (Wang et al. 2021). Masked language modelling beside the
        contrast is an option of SimCSE (Gao et al. 2021).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        objective: Objective = "contrastive",
        beside: BesideObjective = "none",
        masking: MaskingArguments | None = None,
        seed: int = 0,
        packed: bool = False,
        row_length: int | None = None,
        deletion_probability: float = 0.6,
        decoder_mask_probability: float = 0.5,
        enhanced_decoding: bool = False,
        pad_to_multiple_of: int | None = None,
        target_slots: int | None = None,
    ) -> None:
        """Check the options and make the collators of what is masked."""
        check_choice(objective, get_args(Objective), name="objective")
        check_choice(beside, get_args(BesideObjective), name="beside")
        check_padding(tokenizer, pad_to_multiple_of=pad_to_multiple_of, target_slots=target_slots)
        check_range(deletion_probability, "[0, 1]", name="deletion_probability", hint="0.6 is usual")
        check_range(decoder_mask_probability, "(0, 1]", name="decoder_mask_probability", hint="0.5 is usual")
        if row_length is not None and not packed:
            raise InputError(
                f"row_length={row_length} has no effect on rows of one text: set packed=True or leave it out"
            )
        if enhanced_decoding and objective != "retromae":
            raise InputError(f"enhanced_decoding=True has no effect on objective={objective!r}: leave it out")
        self.tokenizer = tokenizer
        self.objective = objective
        self.beside = beside
        self.masking = MaskingArguments() if masking is None else masking
        self.seed = seed
        self.packed = packed
        self.row_length = row_length
        self.deletion_probability = deletion_probability
        self.enhanced_decoding = enhanced_decoding
        self.pad_to_multiple_of = pad_to_multiple_of
        self.target_slots = target_slots
        options: dict[str, Any] = {"masking": self.masking, "seed": seed, "target_slots": target_slots}
        self._masked: DataCollatorForMaskedLM | None = None
        self._detection: DataCollatorForReplacedTokenDetection | None = None
        if beside == "mlm" or objective in ("infoword", "retromae"):
            self._masked = DataCollatorForMaskedLM(tokenizer, **options)
        if beside == "rtd":
            self._detection = DataCollatorForReplacedTokenDetection(
                tokenizer, pad_to_multiple_of=pad_to_multiple_of, **options
            )
        self.vocabulary = _vocabulary(tokenizer, mask_unknown=self.masking.mask_unknown)
        # Of the same unit as the encoder's masks, and independent of them.
        self._decoder_masking = replace(
            self.masking, mlm_probability=decoder_mask_probability, mask_share=1.0, random_share=0.0
        )
        self._decoder_seed = draws.generator_seed(seed=seed, stream="masks of the decoder")
        self._leading_columns = int(objective == "retromae" and not BlockTemplate.of(tokenizer).prefix)

    @property
    def training_steps(self) -> TrainingSteps | None:
        """How examples are counted as steps, for a schedule of the mask rate; the Trainer sets it before the first batch."""
        known = [collator.training_steps for collator in (self._masked, self._detection) if collator is not None]
        return known[0] if known else None

    @training_steps.setter
    def training_steps(self, steps: TrainingSteps | None) -> None:
        for collator in (self._masked, self._detection):
            if collator is not None:
                collator.training_steps = steps

    def fix_shapes(self, *, num_rows: int, length: int) -> None:
        """Round up so that the batches of a training have few shapes, for graphs that are compiled: rows of their own for texts.

        Texts are of many lengths, so rows are as long as the longest of the batch, rounded up; the number of targets is fixed.

        Args:
            num_rows: Examples of a batch.
            length: Tokens of the longest text.
        """
        self.packed = False
        if self.pad_to_multiple_of is None:
            self.pad_to_multiple_of = few_lengths(length)
        if self.target_slots is None:
            targets = num_rows * (length + self._leading_columns)
            if self._masked is not None and self.objective not in ("retromae", "tsdae"):
                targets = self._masked.most_targets(num_rows, length)
            self.target_slots = targets
        if self._detection is not None:
            self._detection.pad_to_multiple_of = self.pad_to_multiple_of
            self._detection.fix_shapes(num_rows=num_rows, length=length)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        sequences = self.read(examples)
        entries = {
            "documents": np.array([example["document"] for example in examples], dtype=np.int64),
            "text_keys": text_keys(sequences.input_ids, lengths=sequences.lengths),
        }
        anchors = [_anchor(example) for example in examples]
        if self._masked is not None or self.objective == "tsdae":
            rows = self._stack(anchors)
            sequences = self.corrupt(examples, rows, sequences)
            if self.objective in ("retromae", "tsdae"):
                entries |= self._decoder_entries(rows)
        entries |= self.assemble(sequences, num_examples=len(examples))
        batch = {name: torch.from_numpy(values) for name, values in entries.items()}
        if self._detection is not None:
            batch |= {f"rtd_{name}": values for name, values in self._detection(anchors).items()}
        return batch

    def read(self, examples: Sequence[Mapping[str, Any]]) -> TextSequences:
        """Return the untouched texts of the examples, role by role, after checking them."""
        for name in ("texts", "document", *["ngram"] * (self.objective == "infoword")):
            if not all(name in example for example in examples):
                raise InputError(
                    f"examples have no entry {name!r}, which objective={self.objective!r} reads: give a dataset of "
                    "hf_pretrain's views of texts, or add the entry"
                )
        counts = {len(example["texts"]) for example in examples}
        least, most = {"contrastive": (2, np.inf), "infoword": (2, 2)}.get(self.objective, (1, 1))
        if len(counts) > 1 or not least <= min(counts) <= most:
            raise InputError(
                f"texts has {' or '.join(map(str, sorted(counts)))} texts in the examples of a batch: "
                f"objective={self.objective!r} needs {_TEXTS[self.objective]}, as many in each example"
            )
        texts = [text for role in zip(*(example["texts"] for example in examples), strict=True) for text in role]
        ids, valid = stack_column(texts, "input_ids")
        lengths = np.count_nonzero(valid, axis=1)
        if not lengths.all():
            example = examples[int(lengths.argmin()) % len(examples)]
            raise InputError(
                f"texts has a text without tokens in the example with document={example['document']}: leave such texts out"
            )
        types, have_types = None, {"token_type_ids" in text for text in texts}
        if len(have_types) > 1:
            raise InputError(
                "token_type_ids is a column of some texts of a batch only: give it to all texts or to none"
            )
        if True in have_types:
            types = stack_column(texts, "token_type_ids", valid=valid)[0][valid]
        flat = ids[valid]
        self.vocabulary.is_protected(flat)  # Refuses unknown ids.
        return TextSequences(flat, lengths, types, labels=None, num_texts=len(texts))

    def corrupt(self, examples: Sequence[Mapping[str, Any]], rows: ExampleRows, texts: TextSequences) -> TextSequences:
        """Change the rows of the anchors as the objective says, and add masked copies where it has them.

        Args:
            examples: The examples.
            rows: Their anchors.
            texts: All texts, untouched.

        Returns:
            The sequences of the batch.
        """
        if self.objective in ("infoword", "retromae"):
            return self._mask_in_place(examples, rows, texts)
        sequences = self._delete(rows, texts) if self.objective == "tsdae" else texts
        return sequences if self._masked is None else self._with_copies(rows, sequences, masked_by=self._masked)

    def _stack(self, anchors: Sequence[Mapping[str, Any]]) -> ExampleRows:
        if self._masked is not None:
            return self._masked.read(anchors)
        keys = RowKeys.from_examples(anchors, seed=self.seed, static_masks=self.masking.static_masks)
        return stack_examples(anchors, keys=keys, pad_id=self.tokenizer.pad_token_id)

    def _mask_in_place(
        self, examples: Sequence[Mapping[str, Any]], rows: ExampleRows, texts: TextSequences
    ) -> TextSequences:
        """Mask the anchors in their own rows; an n-gram is hidden first, so that no target is selected there."""
        assert self._masked is not None, "both objectives have masks"
        if self.objective == "infoword":
            rows = replace(rows, input_ids=self._hide_ngrams(examples, rows))
        input_ids, labels = rows.input_ids, None
        num_tokens = np.count_nonzero(rows.valid)
        if self.objective == "retromae" or self.beside == "mlm":
            masked = self._masked.corrupt(rows)
            input_ids = masked.input_ids
            if self.beside == "mlm":
                labels = np.full(len(texts.input_ids), IGNORED, dtype=np.int64)
                labels[:num_tokens] = np.where(masked.selection.mask, rows.input_ids, IGNORED)[rows.valid]
        flat = texts.input_ids.copy()
        flat[:num_tokens] = input_ids[rows.valid]  # The anchors come first.
        return replace(texts, input_ids=flat, labels=labels)

    def _hide_ngrams(self, examples: Sequence[Mapping[str, Any]], rows: ExampleRows) -> np.ndarray:
        """Return the ids of the anchors with the mask token at every token of the n-grams: `[B, La]` int64."""
        bounds = np.array([example["ngram"] for example in examples], dtype=np.int64)
        begins, ends = bounds[:, :1], bounds[:, 1:]
        lengths = np.count_nonzero(rows.valid, axis=1)[:, None]
        wrong = ((begins < 0) | (begins >= ends) | (ends > lengths))[:, 0]
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(
                f"ngram={tuple(bounds[row].tolist())} is no range of the text of {lengths[row, 0]} tokens: give columns "
                "0 <= begin < end <= length"
            )
        columns = np.arange(rows.valid.shape[1])
        return np.where((columns >= begins) & (columns < ends), self.vocabulary.mask_id, rows.input_ids)

    def _delete(self, rows: ExampleRows, texts: TextSequences) -> TextSequences:
        """Delete ordinary tokens of texts, each with the probability by its own draw."""
        ordinary = rows.valid & ~self.vocabulary.is_protected(rows.input_ids)
        uniforms = np.where(ordinary, to_uniforms(rows.bits("deletion")), -1.0)
        stays = rows.valid & ((uniforms < 0) | (uniforms >= self.deletion_probability))
        # Wherever one stays the greatest does, so this changes only texts that would lose all.
        stays[np.arange(len(stays)), uniforms.argmax(axis=1)] = True
        kept = stays[rows.valid]
        types = None if texts.token_type_ids is None else texts.token_type_ids[kept]
        lengths = np.count_nonzero(stays, axis=1)
        return replace(texts, input_ids=texts.input_ids[kept], lengths=lengths, token_type_ids=types)

    def _with_copies(
        self, rows: ExampleRows, texts: TextSequences, *, masked_by: DataCollatorForMaskedLM
    ) -> TextSequences:
        """Add masked copies of the anchors behind the texts."""
        masked, valid = masked_by.corrupt(rows), rows.valid
        hidden = np.where(masked.selection.mask, rows.input_ids, IGNORED)[valid]
        types = texts.token_type_ids
        if types is not None:
            assert rows.token_type_ids is not None, "they are the anchors of the same texts"
            types = np.concatenate([types, rows.token_type_ids[valid]])
        return TextSequences(
            input_ids=np.concatenate([texts.input_ids, masked.input_ids[valid]]),
            lengths=np.concatenate([texts.lengths, np.count_nonzero(valid, axis=1)]),
            token_type_ids=types,
            labels=np.concatenate([np.full(len(texts.input_ids), IGNORED, dtype=np.int64), hidden]),
            num_texts=texts.num_texts,
        )

    def _decoder_entries(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        """Return what the decoder reads and writes, from the untouched anchors."""
        ids, valid, pad_id = rows.input_ids, rows.valid, self.tokenizer.pad_token_id
        entries: dict[str, np.ndarray] = {}
        if self.objective == "retromae" and not self.enhanced_decoding:
            own = replace(rows.keys, seed=self._decoder_seed)
            masked = mask_rows(replace(rows, keys=own), arguments=self._decoder_masking, vocabulary=self.vocabulary)
            inputs, is_target = masked.input_ids, masked.selection.mask
        else:
            inputs, is_target = ids, valid & ~self.vocabulary.is_protected(ids)
        if self.enhanced_decoding:
            entries["decoder_keys"] = rows.keys.bits("enhanced_decoding", length=1)[:, 0].astype(np.int64)
        if self.objective == "tsdae":
            inputs = np.concatenate([np.full_like(ids[:, :1], pad_id), ids[:, :-1]], axis=1)
            inputs[~valid] = pad_id
            is_target[np.arange(len(ids)), np.count_nonzero(valid, axis=1) - 1] = True
        labels = np.where(is_target, ids, IGNORED)
        for name, values, lead, fill in (
            ("decoder_input_ids", inputs, pad_id, pad_id),
            ("decoder_labels", labels, IGNORED, IGNORED),
            ("decoder_mask", valid.astype(np.int64), 1, 0),
        ):
            width = self._rounded(values.shape[1] + self._leading_columns)
            placed = np.full((len(values), width), fill, dtype=np.int64)
            placed[:, : self._leading_columns] = lead
            placed[:, self._leading_columns : self._leading_columns + values.shape[1]] = values
            entries[name] = placed
        entries["decoder_positions"] = self._slots(entries["decoder_labels"])
        return entries

    def assemble(self, sequences: TextSequences, *, num_examples: int) -> dict[str, np.ndarray]:
        """Lay sequences out in rows; return the entries of the batch that the encoder reads, by name."""
        layout = self._layout(sequences)
        columns = sequences.columns()
        at = np.repeat(layout.starts, sequences.lengths) + columns

        def placed(values: np.ndarray | int, *, fill: int) -> np.ndarray:
            rows = np.full(layout.shape, fill, dtype=np.int64)
            rows.reshape(-1)[at] = values
            return rows

        entries = {
            "input_ids": placed(sequences.input_ids, fill=self.tokenizer.pad_token_id),
            "attention_mask": placed(1, fill=0),
            "text_ids": placed(sequences.text_ids(), fill=-1),
            "first_positions": layout.starts[: sequences.num_texts],
        }
        if self.packed:
            entries["document_ids"] = placed(np.repeat(layout.numbers, sequences.lengths), fill=-1)
            entries["position_ids"] = placed(columns, fill=0)
        if sequences.token_type_ids is not None:
            entries["token_type_ids"] = placed(sequences.token_type_ids, fill=self.tokenizer.pad_token_type_id)
        if sequences.labels is not None:
            entries["labels"] = placed(sequences.labels, fill=IGNORED)
            entries["target_positions"] = self._slots(entries["labels"])
            # Roles and copies have their examples in one order.
            numbers = np.repeat(np.arange(len(sequences.lengths)) % num_examples, sequences.lengths)
            entries["target_examples"] = placed(numbers, fill=0).ravel()[entries["target_positions"]]
        return entries

    def _layout(self, sequences: TextSequences) -> _Layout:
        lengths = sequences.lengths
        longest = int(lengths.max())
        if self.row_length is not None and longest > self.row_length:
            raise InputError(
                f"row_length={self.row_length} is less than the {longest} tokens of a text: set it to the most tokens of a "
                "text, or leave it out"
            )
        width = self._rounded(self.row_length or longest)
        capacity = width
        if self.target_slots is not None and sequences.labels is not None and (sequences.labels != IGNORED).all():
            # Filling target slots takes a position without a label. If all tokens have one, widen the batch.
            width += self.pad_to_multiple_of or 1
        if self.packed:
            return _Layout.packed(lengths, width=width, capacity=capacity)
        return _Layout.padded(lengths, width=width, side=self.tokenizer.padding_side)

    def _slots(self, labels: np.ndarray) -> np.ndarray:
        """Return the flat positions of the targets, filled up to a multiple of `target_slots`."""
        is_target = labels.ravel() != IGNORED
        positions = np.flatnonzero(is_target)
        if self.target_slots is None:
            return positions
        missing = -len(positions) % self.target_slots
        return np.concatenate([positions, np.full(missing, is_target.argmin())])

    def _rounded(self, width: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple


def text_keys(input_ids: np.ndarray, *, lengths: np.ndarray) -> np.ndarray:
    """Return a key a text, by which equal texts are known also where their tokens are not at hand.

    Each token is mixed with its column into 64 bits, and a key is the sum over the text.

    Args:
        input_ids: `[n]` int64, the tokens of the texts one after the other.
        lengths: `[R]` int64, tokens of each text, at least 1.

    Returns:
        `[R]` int64. Texts with the same ids have the same key, in any batch, on any rank and in any run. Different texts have
        different keys, except by a chance of 2**-64 a pair.
    """
    columns = np.arange(len(input_ids)) - np.repeat(_begins(lengths), lengths)
    tokens = draws.row_keys(input_ids, seed=0, epoch=columns, stream="tokens of a text")
    return np.add.reduceat(tokens, _begins(lengths)).view(np.int64)


def _vocabulary(tokenizer: Any, *, mask_unknown: bool) -> Vocabulary:
    """Return the tables over ids; without a mask token nothing is masked, and all special tokens are protected."""
    if tokenizer.mask_token_id is not None:
        return Vocabulary.from_tokenizer(tokenizer, mask_unknown=mask_unknown)
    return Vocabulary(mask_id=-1, protected=special_table(tokenizer), ordinary_ids=np.empty(0, dtype=np.int64))


def _anchor(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return the anchor of an example as an example by itself."""
    return {**example["texts"][0], **{name: example[name] for name in _KEYS if name in example}}


def _begins(lengths: np.ndarray) -> np.ndarray:
    """Return where each of some stretches begins that lie one after the other."""
    return np.cumsum(lengths) - lengths
