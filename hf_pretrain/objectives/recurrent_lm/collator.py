"""Batches for language models with a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.modeling.losses import IGNORED


class DataCollatorForRecurrentLM:
    """Stacks the windows of a [`LaneDataset`]; nothing is random.

    The batch holds ``input_ids``, ``attention_mask`` and ``labels``, the next token of each, ``[B, S]``; and ``lanes`` and
    ``memory_reset``, ``[B]``. Windows are padded on the right, with mask 0 and label -100.

    Args:
        pad_to_multiple_of: S is rounded up to a multiple of this.
    """

    def __init__(self, *, pad_to_multiple_of: int | None = None) -> None:
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch."""
        input_ids, valid = stack_column(examples, "input_ids", multiple=self.pad_to_multiple_of or 1)
        labels = np.full(input_ids.shape, IGNORED, dtype=np.int64)
        labels[valid] = np.concatenate([example["labels"] for example in examples])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(valid.astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "lanes": torch.tensor([example["lane"] for example in examples]),
            "memory_reset": torch.tensor([example["memory_reset"] for example in examples]),
        }
