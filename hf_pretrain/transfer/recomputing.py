"""Forward passes that keep less for backward and give the same numbers to the bit: cheap results are computed twice.

Adapters need no gradients and moments of the frozen weights, but backward needs the input of each adapted layer all the same.
On a CPU most memory is that of attention with dropout, which has no fused kernel there and keeps three tensors of
B × heads × L × L numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# Their input is kept for their own backward, so their result can be had again.
_ACTIVATIONS = (F.gelu, F.silu)


@contextmanager
def recomputed() -> Iterator[None]:
    """Let forward passes keep neither results of activation functions nor, on a CPU, the inside of attention with dropout.

    Both are computed again in backward, with the same dropout. An activation costs one pass over its input, attention about a
    third of its share of a step. Losses and gradients are the same to the bit.
    """
    mode = _Recomputing()
    with torch.autograd.graph.saved_tensors_hooks(mode.pack, _unpack), mode:
        yield
    mode.results.clear()


class _Recomputing(TorchFunctionMode):
    """Remembers how the results of activation functions are made, and takes attention apart from the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[int, tuple[weakref.ref[torch.Tensor], int, Callable[[], torch.Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is F.scaled_dot_product_attention
            and kwargs.get("dropout_p", 0.0) > 0
            and args[0].device.type == "cpu"
        ):
            return checkpoint(func, *args, use_reentrant=False, **kwargs)
        found = func(*args, **kwargs)
        if func in _ACTIVATIONS and found.requires_grad and found is not args[0]:
            given = args[0].detach()
            # A result that is gone leaves its memory to others.
            self.results[found.data_ptr()] = (
                weakref.ref(found),
                found._version,
                lambda: func(given, *args[1:], **kwargs),
            )
        return found

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return how a saved tensor is made again if it is the result of an activation function, else the tensor."""
        if tensor.data_ptr() not in self.results:
            return tensor
        kept, version, make = self.results[tensor.data_ptr()]
        result = kept()
        if (
            result is None
            or tensor.numel() != result.numel()
            or not tensor.is_contiguous()
            or tensor._version != version
        ):
            return tensor
        shape = tensor.shape
        return lambda: make().view(shape)


def _unpack(packed: Any) -> torch.Tensor:
    found: torch.Tensor = packed if isinstance(packed, torch.Tensor) else packed()
    return found
