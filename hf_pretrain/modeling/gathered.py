"""Run a stock model's head at the target positions only."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class GatheredHead:
    """Calls a stock model so that its head sees only chosen positions.

    A masked-LM head costs as much as the encoder of a small model, and 85 % of its work is thrown away. The body's output is
    swapped for the gathered rows by a forward hook, so the head's own code runs unchanged, whatever its architecture: any model
    whose head treats each position on its own gives the same logits as the dense call, up to the order of floating-point sums.

    The hook stays on the model for as long as it is trained. Who only borrows a model takes it off again:

        with GatheredHead(model) as head:
            logits = head(model, positions, **inputs)

    Args:
        model: A model with a body (`model.base_model`) and a head, such as any `AutoModelForMaskedLM`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._positions: torch.Tensor | None = None
        self._hook: RemovableHandle = model.base_model.register_forward_hook(self._gather)
        # Asked in each call in place of the handle, at which a compiled graph would break.
        self._is_attached = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hook off the model, which is then as it was before; the head cannot be called any more."""
        self._hook.remove()
        self._is_attached = False

    def __call__(self, model: PreTrainedModel, positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Return the head's output at ``positions``.

        Args:
            model: The model the hook was set on.
            positions: ``[T]`` flat row-major positions of a ``[B, L]`` batch.
            **inputs: What the model's forward takes, without labels.

        Returns:
            ``[T, V]`` logits.
        """
        assert self._is_attached, "without the hook the head would see all positions"
        self._positions = positions
        try:
            return model(**inputs).logits.squeeze(0)
        finally:
            self._positions = None

    def _gather(self, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> ModelOutput | None:
        if self._positions is None:
            return None
        hidden_BLD = output[0]
        output.last_hidden_state = hidden_BLD.flatten(0, 1).index_select(0, self._positions).unsqueeze(0)
        return output
