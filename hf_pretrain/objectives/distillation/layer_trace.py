"""Follow a stock encoder through its layers while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError


class LayerTrace:
    """Follows a body through its layers, and keeps what is asked for of the last forward.

    Hooks are functions, not methods, and look at the module that calls them: a copy of the model is another model.

    Attributes:
        layer: Number of the layer that runs, None where the body does not run: a layer that checkpointing runs again is not seen.
        records: What was kept, by layer.
        outputs: What the attention of these layers gave; None if that is not to be kept.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        self.body = model.base_model
        self.wanted = frozenset(layers)
        self.records: dict[int, Any] = {}
        self.outputs: dict[int, torch.Tensor] | None = None
        self.layer: int | None = None
        self._has_graph = False

    @contextmanager
    def following(
        self,
        *,
        on_input: Callable[[torch.Tensor], None] | None = None,
        on_output: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[None]:
        """Follow the body in the block; call back with what each layer reads, and with what the body returns."""

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is self.body:
                self.records.clear()
                self.layer, self._has_graph = 0, torch.is_grad_enabled()

        def enter_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.layer is not None:
                if on_input is not None:
                    on_input(args[0] if args else kwargs["hidden_states"])
                self.layer += 1

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is self.body:
                if on_output is not None and output is not None:
                    on_output(output[0])
                self.layer = None

        # First of all hooks: a gathered head's replaces the states.
        handles = [
            self.body.register_forward_pre_hook(begin, prepend=True),
            self.body.register_forward_hook(end, prepend=True, always_call=True),
        ]
        handles += [
            layer.register_forward_pre_hook(enter_layer, prepend=True, with_kwargs=True)
            for layer in layer_modules(self.body)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._check_complete()

    def keep(self, make_record: Callable[[], Any], *, output: torch.Tensor) -> None:
        """Keep a record of the attention of the layer that runs, if it is asked for and the layer's first."""
        if self.layer is None or self.layer not in self.wanted or self.layer in self.records:
            return
        if self._has_graph and not torch.is_grad_enabled():
            raise InputError(
                "gradient checkpointing with use_reentrant=True hides the attention from the loss: "
                "set activation_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.records[self.layer] = make_record()
        if self.outputs is not None:
            self.outputs[self.layer] = output

    def _check_complete(self) -> None:
        missing = sorted(self.wanted - self.records.keys())
        if missing:
            raise InputError(
                f"nothing was captured of the layers {', '.join(map(str, missing))} of {type(self.body).__name__}, which has "
                f"{self.body.config.num_hidden_layers}: ask for layers that a forward inside of the block runs"
            )


def layer_modules(body: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose calls are the layers; one that is called again is another layer.

    Raises:
        InputError: If the architecture does not show them.
    """
    recorded = (getattr(type(body), "_can_record_outputs", None) or {}).get("hidden_states")
    kind = getattr(recorded, "target_class", recorded)
    modules: list[nn.Module] = list(body.modules())
    if isinstance(kind, type):
        layers = [module for module in modules if isinstance(module, kind)]
    else:
        lists = [module for module in modules if isinstance(module, nn.ModuleList)]
        layers = next((list(one) for one in lists if len(one) == body.config.num_hidden_layers), [])
    if not layers:
        raise InputError(f"{type(body).__name__} does not show its layers: distil from and to another architecture")
    return layers
