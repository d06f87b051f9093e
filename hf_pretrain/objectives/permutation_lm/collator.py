"""Batches for permutation language modelling: real tokens, an order as two integers a token, and compact targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch

from hf_pretrain.corruption.permutation import (
    PADDING_RANK,
    RowParts,
    given_order,
    given_ranks,
    given_targets,
    random_order,
    sample_targets,
    visibility,
)
from hf_pretrain.corruption.rows import ExampleRows, RowKeys, check_padding, stack_examples
from hf_pretrain.errors import InputError, check_choice, check_numbers
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.masking import PaddedLayout
from hf_pretrain.options import option

TargetUnit = Literal["official", "word", "given"]
_LANE_COLUMNS = {"lane": "lanes", "memory_reset": "memory_reset", "backward": "backward"}


@dataclass
class PermutationArguments:
    """Which tokens a permutation language model predicts, and in which order.

    The defaults are XLNet's. See the `help` of each field.
    A subclass with a `__post_init__` of its own calls `super().__post_init__()`.

    Raises:
        InputError: If an option is out of range, or two options contradict each other.

    Source:
        XLNet (Yang et al. 2019, sections 2.2, 2.3 and 3.1) and its repository.
    """

    ranges: ClassVar[dict[str, str]] = {
        "context_factor": "[1, 65536]",
        **dict.fromkeys(("max_span_length", "reuse_len", "perm_size"), "[1, 16777216]"),
    }

    context_factor: float = option(6.0, "K of XLNet, from 1: one of K tokens of each example is predicted.")
    target_unit: TargetUnit = option(
        "official",
        "What spans of targets are made of: 'official' (sub-word tokens from a word start on, XLNet's code), "
        "'word' (whole words, XLNet's intention), or 'given' (the column targets says what is predicted, the column "
        "order, if there is one, in which order).",
    )
    max_span_length: int = option(
        5, "Most tokens or words of a span; n are drawn with probability proportional to 1/n."
    )
    halves: bool = option(
        True,
        "Whether the first half of an example sees nothing of the second, as memory needs; otherwise there is "
        "one order over the whole example.",
    )
    reuse_len: int | None = option(
        None, "Tokens of the first half, which memory may keep. Default: half of each example, rounded up."
    )
    perm_size: int | None = option(
        None,
        "Tokens of a block: blocks are ordered left to right, and one permutation is repeated in each. "
        "Default: a half is one block.",
    )

    def __post_init__(self) -> None:
        """Check the options, then let the next class of a mixture do its own."""
        check_choice(self.target_unit, get_args(TargetUnit), name="target_unit")
        check_numbers(self)
        if self.reuse_len is not None and not self.halves:
            raise InputError(
                f"reuse_len={self.reuse_len} has no meaning for halves=False, where no half is kept: drop one"
            )
        if self.reuse_len is not None and self.perm_size is not None and self.perm_size > self.reuse_len:
            raise InputError(
                f"perm_size={self.perm_size} is more than reuse_len={self.reuse_len}: use at most that, because "
                "a block lies in one half"
            )
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()


class DataCollatorForPermutationLM:
    """Choose targets and an order for examples and make a batch for permutation language modelling.

    Both depend on the seed and on each example's `epoch` and `example_id` only: not on the batch, the worker, the rank or
    the side of padding. Each epoch draws anew.

    The examples are dicts of lists or arrays: `input_ids` with the special tokens, `example_id`, `epoch`, unless targets
    are given `word_starts`, and optionally `token_type_ids`. With `target_unit="given"`, `targets` lists the positions of the
    tokens to predict (functional ones are passed over), and `order`, if the examples have it, lists all positions in the order of
    prediction. Examples of lanes have `lane`, `memory_reset` and, where some lanes run backwards, `backward`. The batch is a dict
    of tensors:

    - `input_ids`, `attention_mask`: `[B, L]` int64; the tokens are never corrupted;
    - `key_ranks`, `thresholds`: `[B, L]` int64; `i` sees the content of `j` iff `key_ranks[j] < thresholds[i]`, and the
      content stream also itself. Padding has the key rank `PADDING_RANK`, which no token sees;
    - `target_columns`: `[B, P]` int64, ascending in each row, 0 where a row has fewer targets;
    - `labels`: `[B, P]` int64, the original ids, -100 where a row has fewer targets;
    - `slots`: `[B * P]` int64, with `target_slots` only: the flat positions of all labels;
    - `token_type_ids`: `[B, L]` int64, `lanes`: `[B]` int64, `memory_reset`, `backward`: `[B]` bool, if the examples have
      them.

    Functional are the separator and classification tokens alone: a document end or an unknown token may be a target.

    Args:
        tokenizer: A transformers tokenizer with a padding token; its `padding_side` is respected.
        permutation: The options; XLNet's by default.
        seed: Seed of the run.
        pad_to_multiple_of: `L` is rounded up to a multiple of this.
        target_slots: If given, `P` is rounded up to a multiple of this, for fixed shapes.

    Raises:
        InputError: If the tokenizer has no padding token, or a number is not positive. When called: if examples lack an
            entry, or given targets or orders do not fit them.

    Source:
        See `PermutationArguments`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        permutation: PermutationArguments | None = None,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
        target_slots: int | None = None,
    ) -> None:
        """Read what is needed from the tokenizer."""
        check_padding(tokenizer, pad_to_multiple_of=pad_to_multiple_of, target_slots=target_slots)
        self.tokenizer = tokenizer
        self.permutation = PermutationArguments() if permutation is None else permutation
        self.functional_ids = [i for i in (tokenizer.sep_token_id, tokenizer.cls_token_id) if i is not None]
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.target_slots = target_slots

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        rows = self.read(examples)
        functional = self._is_functional(rows)
        parts = RowParts.of(rows.valid, halves=self.permutation.halves, reuse_len=self.permutation.reuse_len)
        targets = self.choose(examples, rows, candidates=rows.valid & ~functional, parts=parts)
        if self.permutation.target_unit == "given" and "order" in examples[0]:
            ranks = given_ranks([example["order"] for example in examples], valid=rows.valid)
            order = given_order(ranks, parts=parts)
        else:
            order = random_order(rows.keys, parts=parts, perm_size=self.permutation.perm_size)
        key_ranks, thresholds = visibility(order, targets=targets, functional=functional, valid=rows.valid)
        batch = self._assemble(rows, key_ranks=key_ranks, thresholds=thresholds, targets=targets)
        for column, name in _LANE_COLUMNS.items():
            if column in examples[0]:
                batch[name] = torch.tensor([example[column] for example in examples])
        return batch

    def fix_shapes(self, *, num_rows: int, length: int) -> None:
        """Round up so that all batches of a training have one shape; see [`DataCollatorForMaskedLM.fix_shapes`]."""
        self.pad_to_multiple_of = length if self.pad_to_multiple_of is None else self.pad_to_multiple_of
        if self.target_slots is None:
            # The last span of a row may go beyond its share.
            options = self.permutation
            share = -(-length // options.context_factor) + options.max_span_length
            self.target_slots = length if options.target_unit == "given" else min(length, int(share))

    def read(self, examples: Sequence[Mapping[str, Any]]) -> ExampleRows:
        """Stack the examples into left-aligned arrays."""
        needed = "targets" if self.permutation.target_unit == "given" else "word_starts"
        if not all(needed in example for example in examples):
            raise InputError(
                f"examples have no column {needed!r}, which target_unit={self.permutation.target_unit!r} needs: prepare "
                "the data with hf_pretrain (documents have word_starts), or give what to predict in a column targets"
            )
        return stack_examples(
            examples,
            keys=RowKeys.from_examples(examples, seed=self.seed),
            pad_id=self.tokenizer.pad_token_id,
            pad_type_id=self.tokenizer.pad_token_type_id,
            multiple=self.pad_to_multiple_of or 1,
            with_words=needed == "word_starts",
        )

    def choose(
        self, examples: Sequence[Mapping[str, Any]], rows: ExampleRows, *, candidates: np.ndarray, parts: RowParts
    ) -> np.ndarray:
        """Return the targets among the candidates, `[B, L]` bool."""
        options = self.permutation
        if options.target_unit == "given":
            return given_targets([example["targets"] for example in examples], valid=rows.valid) & candidates
        return sample_targets(
            rows,
            candidates=candidates,
            parts=parts,
            unit=options.target_unit,
            context_factor=options.context_factor,
            max_span_length=options.max_span_length,
            backward=np.array([example.get("backward", False) for example in examples], dtype=np.bool_),
        )

    def _is_functional(self, rows: ExampleRows) -> np.ndarray:
        return np.isin(rows.input_ids, self.functional_ids) & rows.valid

    def _assemble(
        self, rows: ExampleRows, *, key_ranks: np.ndarray, thresholds: np.ndarray, targets: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """Turn left-aligned arrays into the tensors of the batch, padded on the tokenizer's side."""
        valid, layout = rows.valid, PaddedLayout.of(rows.valid, side=self.tokenizer.padding_side)
        counts = np.count_nonzero(targets, axis=1)
        slots = self.target_slots or 1
        num_slots = -(-max(int(counts.max()), 1) // slots) * slots
        is_used = np.arange(num_slots) < counts[:, None]
        columns = np.zeros(is_used.shape, dtype=np.int64)
        labels = np.full(is_used.shape, IGNORED, dtype=np.int64)
        target_rows, target_columns = np.nonzero(targets)
        columns[is_used] = target_columns + layout.shifts[target_rows]
        labels[is_used] = rows.input_ids[targets]
        batch = {
            "input_ids": layout.place(rows.input_ids, valid=valid, fill=self.tokenizer.pad_token_id),
            "attention_mask": torch.from_numpy(layout.mask.astype(np.int64)),
            "key_ranks": layout.place(key_ranks, valid=valid, fill=PADDING_RANK),
            "thresholds": layout.place(thresholds, valid=valid, fill=0),
            "target_columns": torch.from_numpy(columns),
            "labels": torch.from_numpy(labels),
        }
        if self.target_slots is not None:
            # All slots, those without a target too: their number does not change.
            batch["slots"] = torch.arange(labels.size)
        if rows.token_type_ids is not None:
            fill = self.tokenizer.pad_token_type_id
            batch["token_type_ids"] = layout.place(rows.token_type_ids, valid=valid, fill=fill)
        return batch
