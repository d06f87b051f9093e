"""The batches of an encoder with several heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hf_pretrain.corruption.masking import MaskedRows
from hf_pretrain.corruption.rows import ExampleRows, ends_of_rows, stack_column
from hf_pretrain.corruption.spans import span_boundary_targets
from hf_pretrain.corruption.word_order import ShuffledRows, shuffle_runs
from hf_pretrain.data.examples.lm_modes import stop_candidates
from hf_pretrain.data.examples.packing import BlockTemplate
from hf_pretrain.errors import check_range
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM, PaddedLayout

# More tokens have too many orders for a table of them.
_LONGEST_RUN = 7


class DataCollatorForEncoder(DataCollatorForMaskedLM):
    """Hide and shuffle tokens of examples and make a batch for an [`EncoderForPreTraining`].

    To the batch of [`DataCollatorForMaskedLM`] it adds what the heads need:

    - "word_order": `order_positions`, `order_labels`, `[O]` int64: flat positions of shuffled tokens, and the token that stood
      there. The runs that are shuffled hold no target of another kind and no special token, and lie in one isolated document;
      if the examples have `sent_starts`, in one sentence;
    - "span_boundary": `span_left`, `span_right`, `span_offsets`, `span_labels`, `[S]` int64: the flat positions of the tokens
      around a hidden span, and of each token in it the offset, from 0, and the token itself;
    - "pair": `pair_labels`, `[B]` int64 from the column `pair_label`, -100 for an example without one;

    and, if any example of the batch has the column:

    - `langs`, `position_ids`, `[B, L]` int64: language and position of each token; by default 0, and the column;
    - `lm_modes`, `source_lengths`, `[B]` int64 from `lm_mode` and `source_length`; 0 for an example without. From sequence to
      sequence the last token, which ends the target, may be selected too;
    - `is_bitext`, `is_causal`, `[B]` bool. Of a causal example nothing is hidden, and every token but the first is a target; but
      not the special tokens at its end where `predicts_end` is False, or the column `goes_on` says that its document goes on.

    Args:
        tokenizer: A transformers tokenizer with a mask and a padding token; its `padding_side` is respected.
        heads: Names of the heads.
        word_order_probability: Share of the tokens of an example that lie in shuffled runs.
        word_order_size: Tokens of a run.
        keep_identity_order: Whether a shuffle may leave a run as it is.
        span_positions: Tokens of a hidden span that are predicted from its boundaries.
        shifted: Whether a hidden token is predicted from the state of the token before it. The first token of an example or of
            an isolated document, which has none before it, is then never hidden.
        predicts_end: Whether the special tokens that the tokenizer puts behind a text are targets at the end of a causal example.
            Where text is cut at the end of a row, they would teach that texts end anywhere.
        **options: Those of [`DataCollatorForMaskedLM`]. With `target_slots`, `O` and `S` too are filled up to multiples of it;
            labels of the filling are -100.

    Raises:
        InputError: See [`DataCollatorForMaskedLM`]; also if a number is out of range.

    Source:
        StructBERT (Wang et al. 2020, section 2.2); SpanBERT (Joshi et al. 2020, section 3.2); GPT-BERT (Charpentier and Samuel
        2024).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        heads: Sequence[str] = ("mlm",),
        word_order_probability: float = 0.05,
        word_order_size: int = 3,
        keep_identity_order: bool = False,
        span_positions: int = 20,
        shifted: bool = False,
        predicts_end: bool = True,
        **options: Any,
    ) -> None:
        """Check the options."""
        super().__init__(tokenizer, **options)
        check_range(word_order_probability, "[0, 1]", name="word_order_probability")
        check_range(word_order_size, f"[2, {_LONGEST_RUN}]", name="word_order_size")
        check_range(span_positions, "[1, inf)", name="span_positions")
        self.heads = frozenset(heads)
        self.word_order_probability = word_order_probability
        self.word_order_size = word_order_size
        self.keep_identity_order = keep_identity_order
        self.span_positions = span_positions
        self.shifted = shifted
        self.predicts_end = predicts_end

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        rows = self.read(examples)
        masked, shuffled = self.corrupt(rows), None
        ordinary = rows.valid & ~self.vocabulary.is_protected(rows.input_ids)
        if "word_order" in self.heads:
            shuffled = self._shuffle(examples, rows, masked, free=ordinary & ~masked.selection.mask)
            masked = dataclasses.replace(masked, input_ids=shuffled.input_ids)
        batch, layout = self.assemble(rows, masked), self.layout(rows, masked)
        if shuffled is not None:
            batch |= self._order_targets(rows, shuffled, layout)
        if "span_boundary" in self.heads:
            batch |= self._span_targets(rows, masked, layout, ordinary=ordinary)
        if "pair" in self.heads:
            batch["pair_labels"] = _numbers(examples, "pair_label", default=IGNORED)
        return batch | _columns(examples, rows, layout)

    def read(self, examples: Sequence[Mapping[str, Any]]) -> ExampleRows:
        """Stack the examples, and mark the tokens that each kind of example lets be hidden, or predicted as they are."""
        if any("token_type_ids" in example for example in examples):
            # Of several kinds, those that are one segment need not say so.
            examples = _with_default(examples, "token_type_ids", step=0)
        rows = super().read(examples)
        if any("lm_mode" in example for example in examples):
            modes = _numbers(examples, "lm_mode", default=0).numpy()
            rows = dataclasses.replace(rows, also_maskable=stop_candidates(rows.valid, lm_modes=modes))
        is_causal = _numbers(examples, "is_causal", default=0).numpy() != 0
        if not (self.shifted or is_causal.any()):
            return rows
        rows = _with_next_tokens(rows, is_causal, shifted=self.shifted)
        # Causal examples hold no isolated documents, so the flag is one for all tokens of a row.
        goes_on = np.array([any(example.get("goes_on", ())[-1:]) for example in examples])
        is_cut = goes_on if self.predicts_end else np.ones_like(goes_on)
        if rows.next_tokens is None or not is_cut.any():
            return rows
        ends = ends_of_rows(rows.input_ids, rows.valid, self._suffix)
        return dataclasses.replace(rows, next_tokens=rows.next_tokens & ~(ends & is_cut[:, None]))

    @cached_property
    def _suffix(self) -> tuple[int, ...]:
        return BlockTemplate.of(self.tokenizer).suffix

    def corrupt(self, rows: ExampleRows) -> MaskedRows:
        """Hide tokens; the next tokens of causal rows are targets that stay as they are."""
        masked = super().corrupt(rows)
        if rows.next_tokens is None:
            return masked
        is_target = masked.selection.mask | rows.next_tokens
        selection = dataclasses.replace(masked.selection, mask=is_target)
        return dataclasses.replace(masked, selection=selection, positions=np.flatnonzero(is_target))

    def _shuffle(
        self, examples: Sequence[Mapping[str, Any]], rows: ExampleRows, masked: MaskedRows, *, free: np.ndarray
    ) -> ShuffledRows:
        breaks = rows.document_starts()
        if all("sent_starts" in example for example in examples):
            sentences, _ = stack_column(examples, "sent_starts", valid=rows.valid)
            breaks = sentences if breaks is None else sentences | breaks
        return shuffle_runs(
            masked.input_ids,
            free=free,
            lengths=np.count_nonzero(rows.valid, axis=1),
            keys=rows.keys,
            probability=self.word_order_probability,
            size=self.word_order_size,
            keep_identity=self.keep_identity_order,
            breaks=breaks,
        )

    def _order_targets(
        self, rows: ExampleRows, shuffled: ShuffledRows, layout: PaddedLayout
    ) -> dict[str, torch.Tensor]:
        positions = shuffled.positions.ravel()
        in_batch = layout.flat(*np.divmod(positions, rows.valid.shape[1]))
        return self._fill(order_positions=in_batch, order_labels=rows.input_ids.ravel()[positions])

    def _span_targets(
        self, rows: ExampleRows, masked: MaskedRows, layout: PaddedLayout, *, ordinary: np.ndarray
    ) -> dict[str, torch.Tensor]:
        targets = span_boundary_targets(
            rows, mask=masked.selection.mask, ordinary=ordinary, span_positions=self.span_positions
        )
        return self._fill(
            span_left=layout.flat(targets.rows, targets.left),
            span_right=layout.flat(targets.rows, targets.right),
            span_offsets=targets.offsets,
            span_labels=targets.labels,
        )

    def most_targets(self, num_rows: int, length: int) -> int:
        """Return the targets of a batch of full rows, of the head that has the most."""
        shuffled = round(self.word_order_probability * length) if "word_order" in self.heads else 0
        # A run is shuffled as a whole.
        shuffled = -(-shuffled // self.word_order_size) * self.word_order_size
        return max(super().most_targets(num_rows, length), num_rows * shuffled)

    def _fill(self, **entries: np.ndarray) -> dict[str, torch.Tensor]:
        """Fill entries of one length up to a multiple of `target_slots`, with position 0 and labels to be ignored."""
        missing = self.missing_slots(len(next(iter(entries.values()))))
        return {
            name: torch.from_numpy(np.pad(values, (0, missing), constant_values=IGNORED * name.endswith("labels")))
            for name, values in entries.items()
        }


def _with_next_tokens(rows: ExampleRows, is_causal: np.ndarray, *, shifted: bool) -> ExampleRows:
    """Return rows with the targets of the causal ones, ``bool [B]``, and with the tokens that may not be hidden."""
    is_first = np.zeros_like(rows.valid)
    is_first[:, 0] = True
    starts = rows.document_starts()
    if starts is not None:
        is_first |= starts
    barred = np.broadcast_to(is_causal[:, None], rows.valid.shape)
    return dataclasses.replace(
        rows,
        not_maskable=barred | is_first if shifted else barred,
        next_tokens=rows.valid & barred & ~is_first if is_causal.any() else None,
    )


def _columns(
    examples: Sequence[Mapping[str, Any]], rows: ExampleRows, layout: PaddedLayout
) -> dict[str, torch.Tensor]:
    """Return the columns of the examples that go into the batch as they are."""
    present = {name for example in examples for name in example}
    batch: dict[str, torch.Tensor] = {}
    for name, step in (("langs", 0), ("position_ids", 1)):
        if name in present:
            values, _ = stack_column(_with_default(examples, name, step=step), name, valid=rows.valid)
            batch[name] = layout.place(values, valid=rows.valid, fill=0)
    if "lm_mode" in present:
        batch["lm_modes"] = _numbers(examples, "lm_mode", default=0)
        batch["source_lengths"] = _numbers(examples, "source_length", default=0)
    for name in ("is_bitext", "is_causal"):
        if name in present:
            batch[name] = _numbers(examples, name, default=0).bool()
    return batch


def _numbers(examples: Sequence[Mapping[str, Any]], name: str, *, default: int) -> torch.Tensor:
    """Return one number an example, `[B]` int64."""
    return torch.tensor([int(example.get(name, default)) for example in examples])


def _with_default(examples: Sequence[Mapping[str, Any]], name: str, *, step: int) -> list[dict[str, Any]]:
    """Return the examples, with the numbers 0, `step`, 2 `step`, ... for the tokens of those that lack a column."""
    return [{name: step * np.arange(len(example["input_ids"]))} | dict(example) for example in examples]
