"""The optimizers and the schedule that transformers does not have, and the choice of an optimizer by its name.

`OptimizerName` has the names that the option `optim` takes. `optimizer_of` returns the class and its arguments: Adam without bias
correction, AdamW with parameter scale, Adafactor with its own options, or a stock optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_pretrain.errors import InputError, check_range, nearest

_MANY_STEPS = 2.0**40
# The scale of a matrix or vector that is zero or nearly so.
_LEAST_SCALE = 1e-3
# Options of Adafactor in optim_args, with the range of their numbers; None is a flag.
_OF_ADAFACTOR = {"scale_parameter": None, "clip_threshold": "(0, inf)", "decay_rate": "[-1, 0)", "beta1": "[0, 1)"}


class _Names(StrEnum):
    @classmethod
    def _missing_(cls, value: object) -> None:
        raise InputError(
            f"optim={value!r} is no optimizer: {nearest(str(value).lower(), [str(name) for name in cls])}"
        )


_STOCK = {name.name: name.value for name in OptimizerNames}
OptimizerName: Any = cast(Any, _Names)("OptimizerName", _STOCK | {"ADAMW_RMS": "adamw_rms"}, module=__name__)
"""The names of all optimizers, those of `transformers.training_args.OptimizerNames` and ours; each equals its text."""


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


class AdamWithParameterScale(torch.optim.AdamW):
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

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
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
                    f"optim='adamw_rms' with a parameter of {parameter.dtype}: load the model in float32, and set bf16=True to "
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
            params, grads, means, squares, largest, steps = lists = tuple[list[Tensor], ...]([] for _ in range(6))
            self._init_group(group, *lists)
            if not params:
                continue
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            options = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "amsgrad": False, "maximize": False}
            is_on_host = all(parameter.device.type == "cpu" for parameter in params)
            rates_of = _rates_on_the_host if is_on_host else _rates_on_the_device
            rates = rates_of(params, rate=group["lr"], decay=group["weight_decay"])
            for *state, step, (rate, decay) in zip(params, grads, means, squares, steps, rates, strict=True):
                tensors: Any = ([tensor] for tensor in state)
                cast(Any, torch)._fused_adamw_(*tensors, largest, [step], lr=rate, weight_decay=decay, **options)
        return loss


def _rates_on_the_host(params: list[Tensor], *, rate: float, decay: float) -> Iterator[tuple[float, float]]:
    """Yield the learning rate of each parameter, and the weight decay for the kernel, which multiplies it by that rate."""
    for parameter in params:
        norm = float(_whole(torch.linalg.vector_norm(parameter)))
        scale = max(norm / math.sqrt(max(1, parameter.numel())), _LEAST_SCALE)
        yield rate * scale, decay / scale


def _rates_on_the_device(params: list[Tensor], *, rate: float, decay: float) -> Iterator[tuple[Tensor, float]]:
    """Yield the same with rates that stay on the device, so that nothing waits for it; the decay is done here."""
    rates = [_whole(norm) for norm in torch._foreach_norm(params)]
    torch._foreach_div_(rates, [math.sqrt(max(1, parameter.numel())) for parameter in params])
    torch._foreach_clamp_min_(rates, _LEAST_SCALE)
    torch._foreach_mul_(rates, rate)
    if decay:
        torch._foreach_mul_(params, 1 - rate * decay)
    yield from ((scaled, 0.0) for scaled in rates)


def _whole(tensor: Any) -> Tensor:
    """Return a tensor that is the same on all processes, from one that FSDP2 has shared out."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def optimizer_of(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """Return class and arguments of the optimizer that the options name.

    Args:
        args: Options of training, a `PretrainingArguments`.
        model: The model, which some stock optimizers need.

    Raises:
        InputError: If optim_args has what Adafactor does not take, or the optimizer has no bias correction to leave out.
    """
    check_bias_correction(args)
    kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optim == "adamw_rms":
        return AdamWithParameterScale, kwargs
    if not args.adam_bias_correction:
        return AdamWithoutBiasCorrection, kwargs | {"fused": True}
    kind, stock = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return kind, stock | (_adafactor_options(args.optim_args or "") if args.optim == "adafactor" else {})


def check_bias_correction(args: TrainingArguments) -> None:
    """Refuse adam_bias_correction=False with an optimizer that is not Adam, or is always corrected."""
    name = str(OptimizerName(args.optim))
    if not args.adam_bias_correction and not name.startswith("adamw_torch"):
        raise InputError(
            f"adam_bias_correction=False is Adam's, but optim={name!r}: set it to True or leave optim out"
        )


def _adafactor_options(text: str) -> dict[str, Any]:
    """Return Adafactor's own options from optim_args; transformers leaves them out."""
    options: dict[str, Any] = {}
    for name, _, value in (part.partition("=") for part in text.replace(" ", "").split(",") if part):
        if name in ("relative_step", "warmup_init"):
            raise InputError(
                f"optim_args: {name}={value} is not supported: rate and schedule are those of learning_rate and lr_scheduler_type"
            )
        if name not in _OF_ADAFACTOR:
            raise InputError(f"optim_args: Adafactor has no option {name!r}: {nearest(name, _OF_ADAFACTOR)}")
        allowed = _OF_ADAFACTOR[name]
        if allowed is None:
            if value.lower() not in ("true", "false"):
                raise InputError(f"optim_args: {name}={value} must be true or false")
            options[name] = value.lower() == "true"
        else:
            try:
                options[name] = float(value)
            except ValueError:
                raise InputError(f"optim_args: {name}={value} must be a number") from None
            check_range(options[name], allowed, name=f"optim_args: {name}")
    return options


def check_matrices_are_whole(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse an optimizer that needs the shapes of matrices where the processes hold flat pieces of them.

    Args:
        args: Options of training.
        accelerator: How the model will be divided.

    Raises:
        InputError: If Adafactor or AdamW with parameter scale would work on pieces.
    """
    names = {"adamw_rms": ("ddp.yaml", "fsdp2.yaml"), "adafactor": ("ddp.yaml",)}
    if args.optim not in names:
        return
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    is_fsdp2 = plugin is not None and plugin.fsdp_version >= 2
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        divided = "DeepSpeed"
    elif plugin is not None and not (is_fsdp2 and "fsdp2.yaml" in names[args.optim]):
        divided = f"FSDP{plugin.fsdp_version}"
    else:
        return
    raise InputError(
        f"optim={str(args.optim)!r} needs whole matrices, and {divided} gives each process a piece of them: launch with "
        f"{' or '.join(names[args.optim])}, or take another optim, such as adamw_torch"
    )


def linear_product_schedule(optimizer: Optimizer, *, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Return the schedule that multiplies linear decay by linear warm-up.

    At step s of T with w steps of warm-up the factor is ``(1 - s/T) * min(1, s/w)``; the rate is zero at step 0.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        num_warmup_steps: Steps of warm-up, w.
        num_training_steps: All steps, T.

    Source: `create_optimizer` of the official ELECTRA code. (BERT's leaves the decay out while warming up.)
    """
    return LambdaLR(optimizer, partial(_linear_product, warmup=num_warmup_steps, total=num_training_steps))


def _linear_product(step: int, *, warmup: int, total: int) -> float:
    return max(0.0, 1.0 - step / total) * min(1.0, step / max(1, warmup) if warmup else 1.0)
