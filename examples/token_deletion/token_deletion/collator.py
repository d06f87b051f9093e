"""Delete tokens and close the gaps: examples in, batches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_pretrain.corruption.masking import Vocabulary
from hf_pretrain.corruption.rows import RowKeys, stack_column
from hf_pretrain.modeling.losses import IGNORED


def delete_tokens(
    input_ids: np.ndarray, *, valid: np.ndarray, may_go: np.ndarray, keys: RowKeys, probability: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Delete tokens of left-aligned rows, each with the same probability, and close the gaps.

    Args:
        input_ids: `[B, L]` int64.
        valid: `[B, L]` bool, False at padding.
        may_go: `[B, L]` bool, the tokens that may be deleted.
        keys: Keys of the draws.
        probability: Share of these tokens that is deleted.

    Returns:
        `[B, L]` each: the tokens that are left, left-aligned; whether there is one; whether something is missing right behind it.
    """
    # Of 64 random bits the upper 53 make a number in [0, 1).
    uniforms = (keys.bits("deletion", length=input_ids.shape[1]) >> np.uint64(11)) * 2.0**-53
    is_deleted = may_go & (uniforms < probability)
    is_left = valid & ~is_deleted
    gap_follows = np.zeros_like(is_deleted)
    gap_follows[:, :-1] = is_deleted[:, 1:]
    # A stable sort brings the tokens that are left to the front, in their order.
    order = np.argsort(~is_left, axis=1, kind="stable")
    left, gaps, ids = (np.take_along_axis(values, order, axis=1) for values in (is_left, gap_follows, input_ids))
    return ids, left, gaps & left


class DataCollatorForTokenDeletion:
    """Makes batches for token deletion detection.

    What is deleted depends on the seed and on each example's `epoch` and `example_id` only. The batch is a dict of `[B, L]` int64
    tensors: `input_ids` and `attention_mask`, padded on the right; `labels`, 1 at a token behind which something is missing, 0 at
    others, -100 at padding. Documents are not kept apart: there are no `document_ids`, so the Trainer refuses data that isolates
    them.

    Args:
        tokenizer: A tokenizer with a padding token. Its special tokens are never deleted.
        deletion_probability: Share of the other tokens that is deleted.
        seed: Seed of the run.
        pad_to_multiple_of: `L` is rounded up to a multiple of this.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        deletion_probability: float = 0.15,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)
        self.pad_token_id = tokenizer.pad_token_id
        self.deletion_probability = deletion_probability
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        input_ids, valid = stack_column(examples, "input_ids", fill=self.pad_token_id)
        ids, left, gaps = delete_tokens(
            input_ids,
            valid=valid,
            may_go=valid & ~self.vocabulary.is_protected(input_ids),
            keys=RowKeys.from_examples(examples, seed=self.seed),
            probability=self.deletion_probability,
        )
        multiple = self.pad_to_multiple_of or 1
        width = -(-int(left.sum(1).max()) // multiple) * multiple
        columns = (np.where(left, ids, self.pad_token_id), left, np.where(left, gaps, IGNORED))
        fills = (self.pad_token_id, 0, IGNORED)
        return {
            name: torch.from_numpy(_fit(values.astype(np.int64), width=width, fill=fill))
            for name, values, fill in zip(("input_ids", "attention_mask", "labels"), columns, fills, strict=True)
        }


def _fit(values: np.ndarray, *, width: int, fill: int) -> np.ndarray:
    """Return `[B, width]` of `[B, L]`: cut, or filled up."""
    missing = max(0, width - values.shape[1])
    return np.pad(values[:, :width], ((0, 0), (0, missing)), constant_values=fill)
