"""The teacher: a stock model that is asked and never trained."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hf_pretrain.objectives.distillation.observation import Observation, Observer, Wanted


class Teacher:
    """A stock model in evaluation mode, without a graph, that runs no deeper than it is asked.

    It is no module: what holds it does not register it, so that no optimizer, no distributed wrapper, no checkpoint and no change
    of mode ever reaches it.

    Args:
        model: The stock model. It is frozen, put into evaluation mode and cast in place.
        wanted: What it is asked for.
        is_masked_lm: Whether its head runs on chosen positions.
        dtype: Type of its weights; logits are in fp32 nevertheless.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: Wanted,
        *,
        is_masked_lm: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.observer = Observer(model, wanted, is_masked_lm=is_masked_lm)

    @property
    def wanted(self) -> Wanted:
        """What it is asked for."""
        return self.observer.wanted

    @torch.compiler.disable
    def __call__(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor | None = None) -> Observation:
        """Return what the teacher makes of a batch; see [`Observer`]. The model follows the batch to its device."""
        device = inputs["input_ids"].device
        if self.model.device != device:
            self.model.to(device)
        # The student's autocast is not the teacher's: it has a type of its own.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self.observer(self.model, inputs, positions)
