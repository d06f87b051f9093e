"""Batches for replaced token detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_pretrain.objectives.masking_collator import DataCollatorForMaskedLM


class DataCollatorForReplacedTokenDetection(DataCollatorForMaskedLM):
    """A masked-LM batch with one more thing: `sample_uniforms`, ``[T]`` keyed uniforms that decide the generator's samples.

    The sample is then a function of the seed, the epoch, the example and the generator's weights, on any device.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples; see [`DataCollatorForMaskedLM`]."""
        batch = super().__call__(examples)
        batch["sample_uniforms"] = self.target_uniforms(examples, batch, stream="generator")
        return batch
