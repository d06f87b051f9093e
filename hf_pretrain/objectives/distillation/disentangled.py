"""See the disentangled attention of DeBERTa-v2, which is not one of transformers' attention functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

DISENTANGLED = frozenset({"deberta-v2"})


@contextmanager
def watch_disentangled(body: nn.Module, on_attention: Callable[..., None]) -> Iterator[None]:
    """Call back with what each attention of a DeBERTa-v2 gives, and what it compares as parts of an `AttentionRecord`.

    What positions add to the products, which the model itself holds as ``[B * h, L, L]``, is the bias.
    """
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    with ExitStack() as stack:
        for module in body.modules():
            if isinstance(module, DisentangledSelfAttention):
                _watch(module, on_attention, stack)
        yield


def _watch(module: Any, on_attention: Callable[..., None], stack: ExitStack) -> None:
    parts: dict[str, torch.Tensor] = {}

    def keep_projection(name: str) -> Callable[..., None]:
        def keep(projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            # The first call is for the content; the same weights may project positions afterwards.
            parts.setdefault(name, output)

        return keep

    def keep_bias(self: Any, *args: Any) -> torch.Tensor:
        bias: torch.Tensor = type(self).disentangled_attention_bias(self, *args)
        if self is module:
            parts["bias"] = bias
        return bias

    def finish(attention: Any, args: tuple[Any, ...], output: Any) -> None:
        on_attention(output[0], **_compared(module, **parts))
        parts.clear()

    handles = [
        getattr(module, f"{name}_proj").register_forward_hook(keep_projection(name))
        for name in ("query", "key", "value")
    ]
    handles.append(module.register_forward_hook(finish))
    # A method: a copy of the model calls it as its own.
    module.disentangled_attention_bias = MethodType(keep_bias, module)
    stack.callback(delattr, module, "disentangled_attention_bias")
    for handle in handles:
        stack.callback(handle.remove)


def _compared(
    module: Any, *, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> dict[str, Any]:
    query, key, value = (
        states.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for states in (query, key, value)
    )
    num_terms = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
    return {
        "query": query,
        "key": key,
        "value": value,
        "scaling": (num_terms * query.shape[-1]) ** -0.5,
        "bias": None if bias is None else bias.unflatten(0, query.shape[:2]),
    }
