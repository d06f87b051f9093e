"""The batches and options of masked language modelling, for every masking unit; other objectives build on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.corruption.masking import MaskedRows, Vocabulary, mask_rows, needs_word_starts
from hf_pretrain.corruption.rows import ExampleRows, RowKeys, check_padding, stack_examples
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.options import schedules_of
from hf_pretrain.schedules import TrainingSteps
from hf_pretrain.training.arguments import PretrainingArguments


@dataclass(frozen=True)
class PaddedLayout:
    """Where left-aligned rows come to lie in the batch.

    Attributes:
        mask: `[B, width]` bool, the positions that hold tokens.
        shifts: `[B]` int64, columns of padding before the first token of each row.
    """

    mask: np.ndarray
    shifts: np.ndarray

    @classmethod
    def of(cls, valid: np.ndarray, *, side: str, extra: int = 0) -> PaddedLayout:
        """Lay out rows whose tokens are at `valid`, `[B, L]`, padded on `side`, with `extra` more columns."""
        lengths, width = np.count_nonzero(valid, axis=1), valid.shape[1] + extra
        if not extra and (side == "right" or valid.all()):
            return cls(mask=valid, shifts=np.zeros(len(lengths), dtype=np.int64))
        shifts = (width - lengths) * (side == "left")
        columns = np.arange(width) - shifts[:, None]
        return cls(mask=(columns >= 0) & (columns < lengths[:, None]), shifts=shifts)

    def place(self, values: np.ndarray, *, valid: np.ndarray, fill: int) -> torch.Tensor:
        """Move left-aligned `values`, `[B, L]`, to their positions in the batch: a `[B, width]` tensor with `fill` at padding."""
        if self.mask is valid:
            return torch.from_numpy(values)
        placed = np.full(self.mask.shape, fill, dtype=values.dtype)
        placed[self.mask] = values[valid]
        return torch.from_numpy(placed)

    def flat(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the flat indices in the batch of tokens given by their row and their column in the example."""
        return rows * self.mask.shape[1] + self.shifts[rows] + columns


class DataCollatorForMaskedLM:
    """Hide tokens of examples and make a batch for masked language modelling.

    What is hidden depends on the seed and on each example's `epoch` and `example_id` only: not on the batch, the
    worker, the rank or the side of padding. Each epoch draws anew unless `masking.static_masks` is set. With
    a schedule of `masking.mlm_probability` it also depends on the step of training, which follows from the example's
    `order_index`. An example without that, and any before `training_steps` is set, gets the schedule's last value.

    The examples are dicts of lists or arrays: `input_ids` with the special tokens, `example_id`, `epoch`, where the
    options need it `word_starts` or `spans`, and optionally `token_type_ids` and `document_ids`. The batch is a dict of
    tensors:

    - `input_ids`, `attention_mask`, `labels`: `[B, L]` int64; `labels` is the original id at targets, -100 elsewhere;
    - `target_positions`: `[T]` int64, the flat indices `row * L + column` of the targets, ascending;
    - `token_type_ids`: `[B, L]` int64, if the examples have them;
    - `document_ids`, `position_ids`: `[B, L]` int64, if the examples have `document_ids`: which of the row's documents
      a token belongs to (-1 at padding), and its position in that document. With them the model isolates documents.

    A subclass with more entries overrides `assemble`, which sees the selected units, or extends `__call__` with
    `target_uniforms`.

    Args:
        tokenizer: A transformers tokenizer with a mask and a padding token; its `padding_side` is respected.
        masking: The options of masking; BERT's by default.
        seed: Seed of the run.
        pad_to_multiple_of: `L` is rounded up to a multiple of this.
        target_slots: If given, `T` is filled up to a multiple of this, for fixed shapes, with one flat index whose
            label is -100. The filling comes last and repeats that index.

    Raises:
        InputError: If the tokenizer lacks a token, or a number is not positive. When called: if examples lack an
            entry, or hold ids that are not the tokenizer's.

    Source:
        See `MaskingArguments`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        masking: MaskingArguments | None = None,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
        target_slots: int | None = None,
    ) -> None:
        """Read what masking needs from the tokenizer."""
        self.masking = MaskingArguments() if masking is None else masking
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer, mask_unknown=self.masking.mask_unknown)
        check_padding(tokenizer, pad_to_multiple_of=pad_to_multiple_of, target_slots=target_slots)
        self.tokenizer = tokenizer
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.target_slots = target_slots
        self._mask_rates = schedules_of(self.masking).get("mlm_probability")
        self.training_steps: TrainingSteps | None = None  # The Trainer sets it before the first batch.

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        rows = self.read(examples)
        return self.assemble(rows, self.corrupt(rows))

    def read(self, examples: Sequence[Mapping[str, Any]]) -> ExampleRows:
        """Stack the examples into left-aligned arrays."""
        return stack_examples(
            examples,
            keys=self._keys(examples),
            pad_id=self.tokenizer.pad_token_id,
            pad_type_id=self.tokenizer.pad_token_type_id,
            multiple=self.pad_to_multiple_of or 1,
            with_words=needs_word_starts(self.masking),
            with_spans=self.masking.masking_unit == "given",
        )

    def corrupt(self, rows: ExampleRows) -> MaskedRows:
        """Hide tokens; everything is still left-aligned."""
        probability = self.mask_probability(rows)
        return mask_rows(rows, arguments=self.masking, vocabulary=self.vocabulary, probability=probability)

    def mask_probability(self, rows: ExampleRows) -> float | np.ndarray:
        """Return the share of tokens to select: one for all rows, or `[B]` where it changes in training."""
        if self._mask_rates is None or self.training_steps is None or rows.order_indices is None:
            return float(self.masking.mlm_probability)
        assert rows.order_epochs is not None, "they are stacked with the indices"
        steps = self.training_steps.step_of(epochs=rows.order_epochs, indices=rows.order_indices)
        rates = self._mask_rates.at(steps, self.training_steps.total)
        return np.where(rows.order_indices < 0, float(self.masking.mlm_probability), rates)

    def layout(self, rows: ExampleRows, masked: MaskedRows) -> PaddedLayout:
        """Return where the rows lie in the batch: padded on the tokenizer's side."""
        # Filling target slots takes a position without a label. If all have one, widen the batch.
        is_full = self.target_slots is not None and len(masked.positions) == rows.valid.size
        extra = (self.pad_to_multiple_of or 1) if is_full else 0
        return PaddedLayout.of(rows.valid, side=self.tokenizer.padding_side, extra=extra)

    def assemble(self, rows: ExampleRows, masked: MaskedRows) -> dict[str, torch.Tensor]:
        """Turn masked rows into the tensors of the batch, padded on the tokenizer's side."""
        layout, valid = self.layout(rows, masked), rows.valid
        labels = np.where(masked.selection.mask, rows.input_ids, IGNORED)
        positions = layout.flat(*np.divmod(masked.positions, valid.shape[1]))
        batch = {
            "input_ids": layout.place(masked.input_ids, valid=valid, fill=self.tokenizer.pad_token_id),
            "attention_mask": torch.from_numpy(layout.mask.astype(np.int64)),
            "labels": layout.place(labels, valid=valid, fill=IGNORED),
        }
        batch["target_positions"] = self._fill_slots(torch.from_numpy(positions), batch["labels"])
        if rows.token_type_ids is not None:
            fill = self.tokenizer.pad_token_type_id
            batch["token_type_ids"] = layout.place(rows.token_type_ids, valid=valid, fill=fill)
        if rows.document_ids is not None:
            batch["document_ids"] = layout.place(rows.document_ids, valid=valid, fill=-1)
            batch["position_ids"] = layout.place(rows.document_positions(), valid=valid, fill=0)
        return batch

    def keyed_uniforms(self, examples: Sequence[Mapping[str, Any]], stream: str, *, length: int) -> np.ndarray:
        """Draw one uniform a token of each example, by the keys that the masks are drawn by.

        Args:
            examples: The examples.
            stream: Name of what is drawn; streams are independent of each other and of the masks.
            length: Tokens of the longest example.

        Returns:
            float32 in [0, 1), `[B, length]`; column `i` belongs to token `i` of the example, wherever padding lies.
        """
        # 24 bits fill a float32 exactly; rounding a finer number could give 1.
        bits = self._keys(examples).bits(stream, length=length) >> np.uint64(40)
        return bits.astype(np.float32) * np.float32(2**-24)

    def target_uniforms(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, torch.Tensor], *, stream: str
    ) -> torch.Tensor:
        """Draw one uniform a target of a batch.

        Args:
            examples: The examples of the batch.
            batch: What this collator made of them.
            stream: Name of what is drawn, for example "generator".

        Returns:
            float32 in [0, 1), `[T]`, in the order of `target_positions`.
        """
        mask = batch["attention_mask"].numpy()
        width = mask.shape[1]
        rows, columns = np.divmod(batch["target_positions"].numpy(), width)
        # The modulus touches only filled slots, which may point at padding.
        tokens = (columns - mask.argmax(axis=1)[rows]) % width
        return torch.from_numpy(self.keyed_uniforms(examples, stream, length=width)[rows, tokens])

    def _keys(self, examples: Sequence[Mapping[str, Any]]) -> RowKeys:
        return RowKeys.from_examples(examples, seed=self.seed, static_masks=self.masking.static_masks)

    def fix_shapes(self, *, num_rows: int, length: int) -> None:
        """Round up so that all batches of a training have one shape, for a graph that is compiled once.

        What the collator was made with stays. A batch with more targets than expected, as words longer than the budget of their
        row may give, has twice as many slots.

        Args:
            num_rows: Examples of a batch.
            length: Tokens of the longest example.
        """
        self.pad_to_multiple_of = length if self.pad_to_multiple_of is None else self.pad_to_multiple_of
        if self.target_slots is None:
            # Hardware likes multiples of 8.
            self.target_slots = max(8, -(-self.most_targets(num_rows, length) // 8) * 8)

    def most_targets(self, num_rows: int, length: int) -> int:
        """Return how many targets a batch of full rows has: exactly, or where each is drawn by itself hardly ever more."""
        masking, rate = self.masking, float(self.masking.mlm_probability)
        if self._mask_rates is not None:
            rate = max(self._mask_rates.values)
        if masking.masking_unit == "given":
            return num_rows * length
        mean = num_rows * rate * length
        if masking.masking_count == "exact":
            return num_rows * max(1, round(rate * length))
        # Words are drawn whole, so counts vary more than those of tokens.
        return min(num_rows * length, round(mean + 6 * (3 * mean * (1 - rate)) ** 0.5))

    def missing_slots(self, num_targets: int) -> int:
        """Return how many fillers make a number of targets a positive multiple of `target_slots`."""
        if self.target_slots is None:
            return 0
        return -num_targets % self.target_slots if num_targets else self.target_slots

    def _fill_slots(self, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Fill the targets up to a multiple of `target_slots` with the first position that has no label."""
        missing = self.missing_slots(len(positions))
        if not missing:
            return positions
        unlabelled = int((labels.flatten() == IGNORED).to(torch.uint8).argmax())
        return torch.cat([positions, positions.new_full((missing,), unlabelled)])


@dataclass
class MaskedLMTrainingArguments(MaskingArguments, PretrainingArguments):
    """Options of `MaskedLMTrainer`: those of masking and of every pre-training."""

    def __post_init__(self) -> None:
        """Refuse to learn from masks where nothing is masked."""
        super().__post_init__()
        if not self.mlm_probability and getattr(self, "mlm_weight", True):
            raise InputError("mlm_probability=0.0 leaves no target: set it to 0.15, or as much as the tokens to find")

    @property
    def masking(self) -> MaskingArguments:
        """The options of masking alone, as the collator takes them."""
        return MaskingArguments(**{field.name: getattr(self, field.name) for field in fields(MaskingArguments)})
