"""The optimizers and schedules that transformers does not have, and their choice by the options.

`OptimizerName` has the names that the option `optim` takes. `optimizer_of` returns the class and its arguments: one of `adam.py`
(Adam without bias correction, with parameter scale, with clipped updates), `muon.py`, Adafactor with its own options, or a
stock optimizer. `schedule_of` returns the schedule of the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from hf_pretrain.errors import InputError, check_choice, check_range, nearest
from hf_pretrain.modeling.backbone import hidden_matrices
from hf_pretrain.optimizers.adam import (
    AdamWithoutBiasCorrection,
    AdamWithParameterScale,
    FusedAdamW,
    StableAdamW,
)
from hf_pretrain.optimizers.muon import Muon

_OURS: dict[str, type[FusedAdamW]] = {kind.name: kind for kind in (AdamWithParameterScale, StableAdamW, Muon)}
# Options in optim_args, with their type and the range of their numbers.
_OWN_OPTIONS: dict[str, dict[str, tuple[type, str]]] = {
    "adafactor": {
        "scale_parameter": (bool, ""),
        "clip_threshold": (float, "(0, inf)"),
        "decay_rate": (float, "[-1, 0)"),
        "beta1": (float, "[0, 1)"),
    },
    "muon": {"momentum": (float, "[0, 1)"), "nesterov": (bool, ""), "ns_steps": (int, "[1, 20]")},
}
_TITLES = {"adafactor": "Adafactor", "muon": "Muon"}


class _Names(StrEnum):
    @classmethod
    def _missing_(cls, value: object) -> None:
        raise InputError(
            f"optim={value!r} is no optimizer: {nearest(str(value).lower(), [str(name) for name in cls])}"
        )


_STOCK = {name.name: name.value for name in OptimizerNames}
OptimizerName: Any = cast(Any, _Names)(
    "OptimizerName", _STOCK | {name.upper(): name for name in _OURS}, module=__name__
)
"""The names of all optimizers, those of `transformers.training_args.OptimizerNames` and ours; each equals its text."""


def optimizer_of(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """Return class and arguments of the optimizer that the options name.

    Args:
        args: Options of training, a `PretrainingArguments`.
        model: The model, which some stock optimizers need.

    Raises:
        InputError: If optim_args has what the optimizer does not take, it has no bias correction to leave out, or the model
            has no matrix for Muon.
    """
    check_bias_correction(args)
    kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    name = str(OptimizerName(args.optim))
    if name == "muon":
        return Muon, kwargs | {"matrices": _trained_matrices(model)} | _own_options(name, args.optim_args or "")
    if name in _OURS:
        return _OURS[name], kwargs
    if not getattr(args, "adam_bias_correction", True):
        return AdamWithoutBiasCorrection, kwargs | {"fused": True}
    kind, stock = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return kind, stock | (_own_options(name, args.optim_args or "") if name == "adafactor" else {})


def _trained_matrices(model: nn.Module | None) -> dict[nn.Parameter, Any]:
    """Return the hidden matrices.

    Raises:
        InputError: If the stock models have none that is trained.
    """
    if model is None:
        return {}
    found = hidden_matrices(model)
    is_trained = any(parameter.requires_grad for parameter in found)
    if not is_trained and any(isinstance(part, PreTrainedModel) for part in model.modules()):
        raise InputError(
            "optim='muon' has no matrix to train here: it is for a model's linear layers, and AdamW trains adapters, tables and "
            "recurrent layers: choose optim='adamw_torch_fused'"
        )
    return found


@contextmanager
def stock_optimizer_name(args: TrainingArguments) -> Iterator[None]:
    """Let transformers check its own options: it compares `optim` with its own names, so ours are set again afterwards.

    Args:
        args: Options of training; their `optim` becomes an `OptimizerName`.

    Raises:
        InputError: If there is no such optimizer.
    """
    name = OptimizerName(args.optim)
    args.optim = str(name) if name in _STOCK.values() else "adamw_torch"
    try:
        yield
    finally:
        args.optim = name


def check_bias_correction(args: TrainingArguments) -> None:
    """Refuse adam_bias_correction=False with an optimizer that is not Adam, or is always corrected."""
    name = str(OptimizerName(args.optim))
    if not getattr(args, "adam_bias_correction", True) and not name.startswith("adamw_torch"):
        raise InputError(
            f"adam_bias_correction=False is Adam's, but optim={name!r}: set it to True or leave optim out"
        )


def _own_options(optim: str, text: str) -> dict[str, Any]:
    """Return an optimizer's own options from optim_args; transformers leaves Adafactor's out."""
    known, options = _OWN_OPTIONS[optim], {}
    for name, _, value in (part.partition("=") for part in text.replace(" ", "").split(",") if part):
        if optim == "adafactor" and name in ("relative_step", "warmup_init"):
            raise InputError(
                f"optim_args: {name}={value} is not supported: rate and schedule are those of learning_rate and lr_scheduler_type"
            )
        if name not in known:
            raise InputError(f"optim_args: {_TITLES[optim]} has no option {name!r}: {nearest(name, known)}")
        kind, allowed = known[name]
        if kind is bool:
            if value.lower() not in ("true", "false"):
                raise InputError(f"optim_args: {name}={value} must be true or false")
            options[name] = value.lower() == "true"
        else:
            try:
                options[name] = kind(value)
            except ValueError:
                what = "a whole number" if kind is int else "a number"
                raise InputError(f"optim_args: {name}={value} must be {what}") from None
            check_range(options[name], allowed, name=f"optim_args: {name}")
    return options


def check_matrices_are_whole(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse an optimizer that needs the shapes of matrices where the processes hold flat pieces of them.

    Args:
        args: Options of training.
        accelerator: How the model will be divided.

    Raises:
        InputError: If an optimizer that looks at whole matrices would work on pieces.
    """
    names = dict.fromkeys(_OURS, ("ddp.yaml", "fsdp2.yaml")) | {"adafactor": ("ddp.yaml",)}
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


def schedule_of(args: TrainingArguments, optimizer: Optimizer, *, steps: int) -> LRScheduler:
    """Return the schedule of the learning rate that the options name.

    For `warmup_stable_decay`, `num_decay_steps` may be a share of all steps, below 1, as `warmup_steps` may be.

    Args:
        args: Options of training.
        optimizer: Optimizer whose learning rates are scheduled.
        steps: All steps of the training.

    Raises:
        InputError: If lr_scheduler_kwargs has what the schedule does not take, or would have no effect.
    """
    warmup, kwargs = args.get_warmup_steps(steps), dict(args.lr_scheduler_kwargs or {})
    if getattr(args, "decay_during_warmup", False):
        return linear_product_schedule(optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    if args.lr_scheduler_type == "warmup_stable_decay":
        kwargs = _checked_decay(kwargs, warmup=warmup, steps=steps)
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=kwargs,
    )


def _checked_decay(kwargs: Mapping[str, Any], *, warmup: int, steps: int) -> dict[str, Any]:
    """Return the arguments of a schedule of warm-up, stable rate and decay, with the decay in steps."""
    name = "lr_scheduler_kwargs: num_decay_steps"
    known = ("num_decay_steps", "decay_type", "warmup_type", "min_lr_ratio", "num_cycles")
    usual = '{"num_decay_steps": 0.1, "decay_type": "1-sqrt"}'
    for key in kwargs:
        if key == "num_stable_steps":
            raise InputError(
                f"lr_scheduler_kwargs: {key}={kwargs[key]} follows from the others: the rate is stable between warm-up and decay"
            )
        if key not in known:
            raise InputError(f"lr_scheduler_kwargs: warmup_stable_decay has no option {key!r}: {nearest(key, known)}")
    if "num_decay_steps" not in kwargs:
        raise InputError(
            f"lr_scheduler_type='warmup_stable_decay' needs the length of the decay: lr_scheduler_kwargs='{usual}'"
        )
    for key, shapes in (
        ("decay_type", ("cosine", "linear", "1-sqrt")),
        ("warmup_type", ("linear", "cosine", "1-sqrt")),
    ):
        check_choice(kwargs.get(key, shapes[0]), shapes, name=f"lr_scheduler_kwargs: {key}")
    if "num_cycles" in kwargs and kwargs.get("decay_type", "cosine") != "cosine":
        raise InputError(
            f"lr_scheduler_kwargs: num_cycles={kwargs['num_cycles']} is of decay_type='cosine' only: leave it out"
        )
    decay = kwargs["num_decay_steps"]
    for key, value, allowed in (
        (name, decay, "[0, 2147483647]"),
        ("min_lr_ratio", kwargs.get("min_lr_ratio", 0), "[0, 1]"),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{key}={value!r} must be a number; a share of all steps is below 1: 0.1 for a tenth")
        check_range(value, allowed, name=key if key == name else f"lr_scheduler_kwargs: {key}")
    if decay >= 1 and decay != int(decay):
        raise InputError(f"{name}={decay} must be a whole number of steps, or a share of them below 1")
    number = round(steps * decay) if decay < 1 else int(decay)
    if warmup + number > steps:
        raise InputError(
            f"{name}={decay} and warmup_steps are {warmup + number} steps, but the run has {steps}: make one of them shorter"
        )
    return {**kwargs, "num_decay_steps": number}


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
