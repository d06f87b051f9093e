"""Batches for Electric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_pretrain.corruption.masking import MaskedRows
from hf_pretrain.corruption.rows import ExampleRows
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM


class DataCollatorForElectric(DataCollatorForMaskedLM):
    """Batches in which nothing is hidden: the text, and which of its tokens the noise replaces.

    Beside what [`DataCollatorForMaskedLM`] gives (`input_ids` is the original text here, `labels` tells the selected positions)
    the batch has

    - `candidate_positions`: ``[C]`` int64, the flat indices of all tokens that could have been selected, ascending: the real
      tokens but the special ones and the unknown one;
    - `sample_uniforms`: ``[T]`` keyed uniforms that decide the generator's samples at `target_positions`. The sample is then a
      function of the seed, the epoch, the example and the generator's weights, on any device.

    Raises:
        InputError: If the options hide tokens, or select the unknown token.
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        for name in ("mask_share", "random_share"):
            if getattr(self.masking, name):
                raise InputError(
                    f"{name}={getattr(self.masking, name)}: Electric's generator reads the text itself: set it to 0"
                )
        if self.masking.mask_unknown:
            raise InputError("mask_unknown=True: the unknown token is never sampled, so set it to False")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples; see [`DataCollatorForMaskedLM`]."""
        batch = super().__call__(examples)
        batch["sample_uniforms"] = self.target_uniforms(examples, batch, stream="generator")
        return batch

    def assemble(self, rows: ExampleRows, masked: MaskedRows) -> dict[str, torch.Tensor]:
        """Add the candidates to the batch."""
        batch = super().assemble(rows, masked)
        candidates = np.nonzero(rows.valid & ~self.vocabulary.is_protected(rows.input_ids))
        batch["candidate_positions"] = torch.from_numpy(self.layout(rows, masked).flat(*candidates))
        return batch
