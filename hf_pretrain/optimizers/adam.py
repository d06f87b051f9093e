"""Kinds of Adam that torch does not have: without bias correction, with parameter scale, and with clipped updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from hf_pretrain.errors import InputError

_MANY_STEPS = 2.0**40
# The scale of a matrix or vector that is zero or nearly so.
_LEAST_SCALE = 1e-3
_LEAST_NUMBER = torch.finfo(torch.float32).tiny


class AdamWithoutBiasCorrection(torch.optim.AdamW):
    """Adam with decoupled weight decay and no bias correction, epsilon outside the square root.

    The first update is 3.16 learning rates long instead of one, and warm-up is tuned to that. It is `torch.optim.AdamW` with
    its step counter so far on that both corrections are one, so the fused and multi-tensor kernels stay in use.

    Source: `AdamWeightDecayOptimizer` of the official BERT and ELECTRA code.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        fresh = [p for p in group["params"] if p.grad is not None and len(self.state[p]) == 0]
        has_complex = super()._init_group(group, *lists)
        for parameter in fresh:
            self.state[parameter]["step"].fill_(_MANY_STEPS)
        return has_complex


class FusedAdamW(torch.optim.AdamW):
    """AdamW on torch's fused kernel, with a place for other rates: the base of the optimizers here.

    Args:
        params: Parameters or groups of them, in float32 or float64.
        lr: Learning rate.
        betas: Decay of the means of gradients and of their squares.
        eps: Added to the root of the mean of squares.
        weight_decay: Decoupled weight decay.

    Raises:
        InputError: If a parameter has half precision: most steps would be lost when they are rounded.
    """

    name: ClassVar[str]

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # A scaler of gradients is to divide them and skip steps by itself: decay and step counter are outside of the kernel.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise InputError(
                    f"optim={self.name!r} with a parameter of {parameter.dtype}: load the model in float32, and set bf16=True to "
                    "compute in bf16"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: Computes the loss again.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        params, grads, means, squares, largest, steps = lists = tuple[list[Tensor], ...]([] for _ in range(6))
        self._init_group(group, *lists)
        if not params:
            return
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        options = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "amsgrad": False, "maximize": False}
        rates = self._rates(group, params, grads, squares, steps)
        kernel = cast(Any, torch)._fused_adamw_
        if rates is None:
            rate, decay = group["lr"], group["weight_decay"]
            kernel(params, grads, means, squares, largest, steps, lr=rate, weight_decay=decay, **options)
            return
        for *state, step, (rate, decay) in zip(params, grads, means, squares, steps, rates, strict=True):
            tensors: Any = ([tensor] for tensor in state)
            kernel(*tensors, largest, [step], lr=rate, weight_decay=decay, **options)

    def _rates(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
    ) -> Iterable[tuple[float | Tensor, float]] | None:
        """Return the rate and the weight decay of each parameter, None for those of the group.

        The kernel multiplies the decay by the rate. The means of squares are those before the step, and the step counters those
        after it.
        """
        return None


class AdamWithParameterScale(FusedAdamW):
    """AdamW whose update of each parameter is multiplied by the root mean square (RMS) of that parameter.

    With learning rate r and weight decay d, a step takes p to ``p - r (s u + d p)``. Here u is Adam's update with bias
    correction, and ``s = max(RMS(p), 0.001)``, with p as it was before the step. The learning rate is then relative: a step moves
    each matrix by about that share of its size. So one rate suits T5's word table, whose numbers are near 1, and its
    projections, whose numbers are near 0.05. Vectors and scalars follow the same rule; at zero they begin with the floor.

    Args:
        params: Parameters or groups of them, in float32 or float64.
        lr: Relative learning rate.
        betas: Decay of the means of gradients and of their squares.
        eps: Added to the root of the mean of squares.
        weight_decay: Decoupled weight decay, which is not multiplied by the scale.

    Raises:
        InputError: If a parameter has half precision: most steps would be lost when they are rounded.

    Source: The scale is that of Adafactor (Shazeer and Stern 2018, section 8); with Adam's update it is known from nanoT5, which
        decays after the update instead of before it.
    """

    name = "adamw_rms"

    def __init__(self, params: Any, *, lr: float = 1e-2, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)

    def _rates(
        self, group: dict[str, Any], params: list[Tensor], *others: Any
    ) -> Iterable[tuple[float | Tensor, float]]:
        is_on_host = all(parameter.device.type == "cpu" for parameter in params)
        rates_of = _rates_on_the_host if is_on_host else _rates_on_the_device
        return rates_of(params, rate=group["lr"], decay=group["weight_decay"])


def _rates_on_the_host(params: list[Tensor], *, rate: float, decay: float) -> Iterable[tuple[float, float]]:
    """Yield the learning rate of each parameter, and the weight decay for the kernel, which multiplies it by that rate."""
    for parameter in params:
        norm = float(whole(torch.linalg.vector_norm(parameter)))
        scale = max(norm / math.sqrt(max(1, parameter.numel())), _LEAST_SCALE)
        yield rate * scale, decay / scale


def _rates_on_the_device(params: list[Tensor], *, rate: float, decay: float) -> Iterable[tuple[Tensor, float]]:
    """Yield the same with rates that stay on the device, so that nothing waits for it; the decay is done here."""
    rates = [whole(norm) for norm in torch._foreach_norm(params)]
    torch._foreach_div_(rates, [math.sqrt(max(1, parameter.numel())) for parameter in params])
    torch._foreach_clamp_min_(rates, _LEAST_SCALE)
    torch._foreach_mul_(rates, rate)
    if decay:
        torch._foreach_mul_(params, 1 - rate * decay)
    yield from ((scaled, 0.0) for scaled in rates)


class StableAdamW(FusedAdamW):
    """AdamW that takes a shorter step where the mean of squares has not yet seen how large the gradients have become.

    A step takes p to ``p - r / max(1, R) (u + d p)``, with learning rate r, weight decay d and Adam's update u. R is the root
    mean square of ``g / sqrt(max(v, eps²))`` over the numbers of this parameter: g is the gradient, and v the mean of its squares
    up to this step, with bias correction. R is about 1 as long as gradients keep their size, and greater after a jump. It takes
    the place of clipping the gradients' norm, and no step waits for the device.

    Args:
        params: Parameters or groups of them, in float32 or float64.
        lr: Learning rate.
        betas: Decay of the means of gradients and of their squares.
        eps: Added to the root of the mean of squares.
        weight_decay: Decoupled weight decay.

    Raises:
        InputError: If a parameter has half precision: most steps would be lost when they are rounded.

    Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", algorithm 2, which
        takes the clipping of Adafactor (Shazeer and Stern 2018, section 6) with a threshold of 1.
    """

    name = "stable_adamw"

    def _rates(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
    ) -> Iterable[tuple[Tensor, float]]:
        beta2 = group["betas"][1]
        # 1 - beta2 ** step, without the loss of digits of that difference.
        corrections = torch._foreach_mul(steps, math.log(beta2) if beta2 else -math.inf)
        torch._foreach_expm1_(corrections)
        torch._foreach_neg_(corrections)
        floors = torch._foreach_mul(corrections, group["eps"] ** 2)
        torch._foreach_clamp_min_(floors, _LEAST_NUMBER)
        ratios = torch._foreach_mul(squares, beta2)
        torch._foreach_addcmul_(ratios, grads, grads, 1 - beta2)
        torch._foreach_maximum_(ratios, floors)
        torch._foreach_rsqrt_(ratios)
        torch._foreach_mul_(ratios, grads)
        rates = [whole(norm) for norm in torch._foreach_norm(ratios)]
        torch._foreach_div_(corrections, [float(max(1, parameter.numel())) for parameter in params])
        torch._foreach_sqrt_(corrections)
        torch._foreach_mul_(rates, corrections)
        torch._foreach_clamp_min_(rates, 1.0)
        torch._foreach_reciprocal_(rates)
        torch._foreach_mul_(rates, group["lr"])
        return [(rate, group["weight_decay"]) for rate in rates]


def whole(tensor: Any) -> Tensor:
    """Return a tensor that is the same on all processes, from one that FSDP2 has shared out."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found
