"""Run a stock model's head at the target positions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class GatheredOutput(NamedTuple):
    """What a stock model returns when its head sees only chosen positions.

    Attributes:
        logits: ``[T, V]`` of the masked-LM head.
        states: ``[B, L, D]`` last hidden states, at all positions.
        output: The stock output, where further heads left their logits.
    """

    logits: torch.Tensor
    states: torch.Tensor
    output: ModelOutput


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
        self._states: torch.Tensor | None = None
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
        return self.run(model, positions, **inputs).logits

    def run(self, model: PreTrainedModel, positions: torch.Tensor, **inputs: Any) -> GatheredOutput:
        """Return what the call returns, along with the states that heads of another kind start from."""
        assert self._is_attached, "without the hook the head would see all positions"
        self._positions = positions
        try:
            output = model(**inputs)
            assert self._states is not None, "the hook ran with the body"
            # The classes with a second head have two kinds of logits.
            logits = output.prediction_logits if "prediction_logits" in output else output.logits
            return GatheredOutput(logits.squeeze(0), self._states, output)
        finally:
            self._positions = self._states = None

    def _gather(self, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> ModelOutput | None:
        if self._positions is None:
            return None
        hidden_BLD = self._states = output[0]
        output.last_hidden_state = hidden_BLD.flatten(0, 1).index_select(0, self._positions).unsqueeze(0)
        return output


def begin_in_column_0(
    inputs: Mapping[str, torch.Tensor], places: Sequence[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Move padding from the left to the right: heads on the first token read column 0.

    Args:
        inputs: What a stock model takes; entries of the shape of `attention_mask`, ``[B, L]``, are moved.
        places: Flat positions, which move along.

    Returns:
        The inputs and the places. Rows that begin in column 0 stay as they are.
    """
    mask_BL = inputs["attention_mask"]
    length, first_B1 = mask_BL.shape[1], mask_BL.argmax(dim=1, keepdim=True)
    columns_BL = (torch.arange(length, device=mask_BL.device) + first_B1) % length
    moved = {
        name: value.gather(1, columns_BL) if value.shape == mask_BL.shape else value for name, value in inputs.items()
    }
    rows = [torch.div(positions, length, rounding_mode="floor") for positions in places]
    return moved, [
        row * length + (positions - row * length - first_B1[row, 0]) % length
        for row, positions in zip(rows, places, strict=True)
    ]
