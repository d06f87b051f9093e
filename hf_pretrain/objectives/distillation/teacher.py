"""The teacher: a stock model that is asked and never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation.layer_trace import layer_modules
from hf_pretrain.objectives.distillation.observation import Observation, Observer, Wanted


class Teacher:
    """A stock model in evaluation mode, without a graph, that runs no deeper than it is asked.

    It is no module: what holds it does not register it, so that no optimizer, no distributed wrapper, no checkpoint and no change
    of mode ever reaches it.

    Args:
        model: The stock model. It is frozen, put into evaluation mode and cast in place.
        wanted: What it is asked for.
        gathers: Whether its head runs on chosen positions.
        dtype: Type of its weights; logits are in fp32 nevertheless.
        device: Where it runs, if not where the batch is; batches are sent there, and what it makes of them comes back.
        compiles: Whether its layers run under torch.compile.

    Raises:
        InputError: If there is no such device, or layers are to be compiled whose attention is looked into.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: Wanted,
        *,
        gathers: bool,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        compiles: bool = False,
    ) -> None:
        if compiles and wanted.attention:
            raise InputError(
                "teacher_compile=True: a loss of attention or relations looks into the teacher's layers, which a compiled layer "
                "does not let it; leave out one of the two"
            )
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.device = None if device is None else _checked(device)
        self.observer = Observer(model, wanted, gathers=gathers)
        self._compiled = _compiled_layers(model) if compiles else {}

    @property
    def wanted(self) -> Wanted:
        """What it is asked for."""
        return self.observer.wanted

    @torch.compiler.disable
    def __call__(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor | None = None) -> Observation:
        """Return what the teacher makes of a batch, on the batch's device; see [`Observer`]."""
        home = inputs["input_ids"].device
        device = home if self.device is None else self.device
        if self.model.device != device:
            self.model.to(device)
        inputs = {name: values.to(device) for name, values in inputs.items()}
        positions = None if positions is None else positions.to(device)
        # The student's autocast is not the teacher's: it has a type of its own.
        autocast = nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
        with torch.no_grad(), autocast, self._running_compiled():
            return self.observer(self.model, inputs, positions).to(home)

    @contextmanager
    def _running_compiled(self) -> Iterator[None]:
        """Let the layers run compiled, in the block alone: others who use the model find it as it was."""
        for layer, forward in self._compiled.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._compiled:
                del layer.forward


def _checked(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"teacher_device={str(device)!r} cannot be used ({reason}): name one such as cpu or cuda:1"
        ) from error


def _compiled_layers(model: PreTrainedModel) -> dict[nn.Module, Callable[..., Any]]:
    """Return the layers with their forward under torch.compile; layers of one class share what is compiled.

    Only the forward, without the hooks around it, by which states are read.
    """
    layers = dict.fromkeys(layer_modules(model.base_model))
    forwards = {kind: torch.compile(kind.forward) for kind in {type(layer) for layer in layers}}
    return {layer: partial(forwards[type(layer)], layer) for layer in layers}
