"""Which parts of a model move in fine-tuning, from when on, and how fast.

The options are in `arguments.py`. `StrategyPlan` cuts a model into parts with a learning rate and a beginning each. What moves at
a step is a function of that step alone, so a resumed run does the same. `strategy_report` shows the plan as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments

from hf_pretrain.errors import InputError
from hf_pretrain.optimizers import schedule_of
from hf_pretrain.transfer.arguments import ADAPTERS
from hf_pretrain.transfer.arguments import StrategyArguments as StrategyArguments
from hf_pretrain.transfer.layers import head_parameters, parameter_depths


def slanted_triangular(step: float, total: int, *, cut_fraction: float = 0.1, ratio: float = 32.0) -> float:
    """Return ULMFiT's share of the peak learning rate: it rises for a short time and falls for a long one, both linearly.

    Args:
        step: Steps done so far.
        total: Steps of the whole training, T.
        cut_fraction: Share of the steps in which it rises; it has its peak after ``floor(T * cut_fraction)`` steps.
        ratio: The peak over the first and the last value.

    Returns:
        ``(1 + p * (ratio - 1)) / ratio``, where p goes from 0 to 1 and back to 0 after T steps.

    Source: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", equation 3.
    """
    cut = math.floor(total * cut_fraction)
    share = step / cut if step < cut else (total - step) / max(total - cut, 1)
    return (1 + max(share, 0.0) * (ratio - 1)) / ratio


class Begin(NamedTuple):
    """When a part begins to move: after some steps, epochs, or a share of all steps."""

    value: float
    unit: Literal["steps", "epochs", "share"] = "steps"

    def step(self, *, total: int, per_epoch: int) -> int:
        """Return the steps that are done before it moves."""
        scale = {"steps": 1, "epochs": per_epoch, "share": total}[self.unit]
        return round(self.value * scale)

    def __str__(self) -> str:
        """Return it in words, for a table."""
        if not self.value:
            return "at once"
        words = {
            "steps": f"{self.value:g} steps",
            "epochs": f"{self.value:g} epochs",
            "share": f"{self.value:.0%} of the steps",
        }
        return f"after {words[self.unit]}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters that have one learning rate and begin to move together.

    Attributes:
        name: "head", "behind the layers", "layer 3", "embeddings", "encoder" or "model".
        parameters: By name.
        learning_rate: The peak.
        begin: When it begins to move; None for never.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    begin: Begin | None

    @property
    def is_head(self) -> bool:
        """Whether it is no part of the encoder."""
        return self.name in ("head", "model")

    def moves(self, step: int, *, total: int, per_epoch: int) -> bool:
        """Return whether it moves at a step, the first of which is 0."""
        return self.begin is not None and step >= self.begin.step(total=total, per_epoch=per_epoch)


class StrategyPlan:
    """The parts of a model under a strategy, from the head down to the embeddings.

    Parameters that do not require a gradient when the plan is made never move.

    Args:
        model: A stock model, or a `peft.PeftModel`; with adapters if the strategy adds some.
        args: The options, with those of a Trainer.

    Raises:
        InputError: If the strategy does not go with the model, or nothing would move.
    """

    def __init__(self, model: nn.Module, args: Any) -> None:
        self.args = args
        self.inner: Any = cast(Any, model).get_base_model() if is_adapted(model) else model
        self.parts = _parts(model, self.inner, args)
        self._has_bare_encoder = isinstance(self.inner, PreTrainedModel) and not is_adapted(model)
        if not self.moving:
            raise InputError(f"strategy={args.strategy!r} leaves nothing of {type(self.inner).__name__} to move")
        if args.strategy == "bitfit" and all(part.is_head for part in self.moving):
            raise InputError(
                f"strategy='bitfit': the encoder of {type(self.inner).__name__} has no biases; choose 'lora'"
            )

    def freeze(self) -> None:
        """Freeze the parts that never move; the parts that move later are frozen when training begins."""
        set_gradients([part for part in self.parts if part.begin is None], False)

    @property
    def moving(self) -> list[Part]:
        """The parts that move at some time."""
        return [part for part in self.parts if part.begin is not None]

    @property
    def is_staged(self) -> bool:
        """Whether some parts begin to move later than others."""
        return any(part.begin.value > 0 for part in self.moving if part.begin is not None)

    @property
    def has_one_rate(self) -> bool:
        """Whether a stock optimizer, with one learning rate for all, does the same."""
        return not self.is_staged and {part.learning_rate for part in self.moving} == {self.args.learning_rate}

    def freezes_encoder(self, moving: Iterable[Part]) -> bool:
        """Return whether the whole encoder stays as it is while these parts move; adapters are part of it."""
        return self._has_bare_encoder and all(part.is_head for part in moving)

    def set_mode(self) -> None:
        """Put the encoder into eval mode, and leave the head as it is: frozen features have no dropout."""
        base: nn.Module = self.inner.base_model
        base.eval()
        pooler = getattr(base, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.train()

    def groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups for an optimizer, of all parts that move at some time, each with its `name`."""
        found = []
        for part in self.moving:
            for is_decayed in (True, False):
                members = [
                    p
                    for name, p in part.parameters.items()
                    if (p.ndim > 1 and not name.endswith("bias")) == is_decayed
                ]
                decay = weight_decay if is_decayed else 0.0
                if members:
                    found.append(
                        {"params": members, "lr": part.learning_rate, "weight_decay": decay, "name": part.name}
                    )
        return found

    def multipliers(self, *, total: int, per_epoch: int) -> dict[str, Callable[[int], float]]:
        """Return, by the names of parts, the share of its peak rate that a part has at each step.

        It is 0 until the part moves. "probe_then_tune" is two trainings with a schedule each.

        Args:
            total: Steps of the training.
            per_epoch: Steps of an epoch.
        """
        begins = {part.name: cast(Begin, part.begin).step(total=total, per_epoch=per_epoch) for part in self.moving}
        if self.args.strategy != "probe_then_tune":
            shape = _shape(self.args, total)
            return {name: partial(_from, begin, shape) for name, begin in begins.items()}
        probe = Begin(self.args.probe_share, "share").step(total=total, per_epoch=per_epoch)
        first, second = _shape(self.args, probe), _shape(self.args, total - probe)

        def tuned(step: int) -> float:
            return second(step - probe) if step >= probe else 0.0

        rate = next(part.learning_rate for part in self.moving if part.is_head)
        wanted = self.args.probe_learning_rate
        factor = 1.0 if wanted is None else wanted / rate

        def head(step: int) -> float:
            return factor * first(step) if step < probe else second(step - probe)

        return {part.name: head if part.is_head else tuned for part in self.moving}


def _from(begin: int, shape: Callable[[int], float], step: int) -> float:
    return shape(step) if step >= begin else 0.0


def _shape(args: Any, total: int) -> Callable[[int], float]:
    """Return the share of the peak rate at each step of a training: the slanted triangle, or transformers' own schedule."""
    if args.slanted_triangular:
        return partial(
            slanted_triangular, total=total, cut_fraction=args.slanted_cut_fraction, ratio=args.slanted_ratio
        )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 1.0)
    scheduler = schedule_of(args, optimizer, steps=total)
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"lr_scheduler_type={str(args.lr_scheduler_type)!r} is no function of the step, which strategy={args.strategy!r} "
            "needs: choose linear, cosine or constant"
        )
    return scheduler.lr_lambdas[0]


def set_gradients(parts: Iterable[Part], wanted: bool) -> None:
    """Unfreeze parts, or freeze them: without a gradient, no optimizer changes a parameter, by decay or momentum either."""
    for part in parts:
        for parameter in part.parameters.values():
            parameter.requires_grad_(wanted)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model is a `peft.PeftModel`."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def _parts(model: nn.Module, inner: Any, args: Any) -> list[Part]:
    """Return the parts of a model, those that move before those that do not."""
    depths, top, head = _depths(inner, args)
    members: dict[tuple[int, str, float, Begin | None], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        # What an adapter has beside the model, such as the vectors of a prompt, learns as the head does.
        depth = depths.get(parameter, top)
        is_head = parameter in head or parameter not in depths
        what = _name(depth, top, is_head=is_head)
        begin = _begin(args, depth=depth, top=top, is_head=is_head, is_bias=name.endswith("bias"))
        begin = begin if parameter.requires_grad else None
        order = -(depth + is_head)
        key = (order, what, _rate(args, depth=depth, top=top, is_head=is_head), begin)
        members.setdefault(key, {})[name] = parameter
    keys = sorted(members, key=lambda key: (key[0], key[3] is None))
    return [Part(name=key[1], parameters=members[key], learning_rate=key[2], begin=key[3]) for key in keys]


def _depths(inner: Any, args: Any) -> tuple[dict[nn.Parameter, int], int, set[nn.Parameter]]:
    """Return the depth of each parameter, the head's depth, and the parameters of the head.

    A model whose layers cannot be told apart is two parts: the encoder, of depth -1, and the head.
    """
    needs_layers = args.layerwise_learning_rate_decay != 1 or args.strategy in ("gradual", "top_layers")
    needs_layers = needs_layers or args.freeze_embeddings or bool(args.reinit_layers)
    if not isinstance(inner, PreTrainedModel):
        if needs_layers or args.strategy != "full":
            raise InputError(
                f"strategy={args.strategy!r} needs a PreTrainedModel, and {type(inner).__name__} is none: choose strategy='full'"
            )
        return {}, 0, set()
    head = head_parameters(inner)
    if not head and args.strategy in ("frozen", "gradual", "probe_then_tune", "scalar_mix"):
        raise InputError(
            f"strategy={args.strategy!r} needs a model with a head, and {type(inner).__name__} has none: open it with a class "
            "such as AutoModelForSequenceClassification"
        )
    try:
        depths, top = parameter_depths(inner)
    except InputError:
        if needs_layers:
            raise
        return {parameter: 1 if parameter in head else -1 for parameter in inner.parameters()}, 1, head
    frozen = _frozen_layers(args, top) if args.strategy == "top_layers" else 0
    if frozen > top - 1:
        raise InputError(f"frozen_layers={frozen} must be at most {top - 1}, the number of the model's layers")
    if args.reinit_layers > top - 1 - frozen:
        raise InputError(
            f"reinit_layers={args.reinit_layers} must be at most {top - 1 - frozen}, the number of layers that move"
        )
    return depths, top, head


def _frozen_layers(args: Any, top: int) -> int:
    return (top - 1) // 2 if args.frozen_layers is None else int(args.frozen_layers)


def _name(depth: int, top: int, *, is_head: bool) -> str:
    if is_head:
        return "head" if top else "model"
    if depth == -1:
        return "encoder"
    return "embeddings" if depth == 0 else "behind the layers" if depth == top else f"layer {depth}"


def _rate(args: Any, *, depth: int, top: int, is_head: bool) -> float:
    rate, decay = float(args.learning_rate), args.layerwise_learning_rate_decay
    if is_head:
        return rate if args.head_learning_rate is None else float(args.head_learning_rate)
    if decay == 1 or depth == top:
        return rate
    return float(rate * decay ** (top - depth + (args.layerwise_decay_mode == "official")))


def _begin(args: Any, *, depth: int, top: int, is_head: bool, is_bias: bool) -> Begin | None:
    """Return when a parameter begins to move under the strategy, None for never."""
    strategy, at_once = args.strategy, Begin(0)
    if args.freeze_embeddings and depth == 0 and not is_head:
        return None
    if is_head:
        return at_once
    if strategy == "frozen" or (strategy == "scalar_mix" and not args.tune_encoder):
        return None
    if strategy == "bitfit":
        return at_once if is_bias else None
    if strategy == "top_layers":
        return None if depth <= _frozen_layers(args, top) else at_once
    if strategy == "probe_then_tune":
        return Begin(args.probe_share, "share")
    if strategy == "gradual":
        # What stands behind the layers moves with the last of them.
        stages, every = max(top - depth, 1), args.unfreeze_every
        if every is None:
            return Begin(stages, "epochs")
        return Begin(stages * every, "steps" if every >= 1 else "share")
    return at_once


class ReportRow(NamedTuple):
    """A part of a model in [`strategy_report`]: its name, peak learning rate, when it begins to move, and its size."""

    part: str
    learning_rate: float
    begins: str
    parameters: int


def strategy_report(model: nn.Module, args: TrainingArguments) -> list[ReportRow]:
    """Return what a strategy does to each part of a model, from the head down to the embeddings.

    Args:
        model: The model of a `FineTuningTrainer`; one that has its adapters already if the strategy adds some.
        args: Its `FineTuningArguments`.

    Returns:
        A row for each part. The rate of a part that never moves is 0.
    """
    if args.strategy in ADAPTERS and not is_adapted(model):
        raise InputError(
            f"strategy={args.strategy!r}: the model has no adapters yet; give the Trainer's, trainer.model"
        )
    rows = []
    for part in StrategyPlan(model, args).parts:
        size = sum(parameter.numel() for parameter in part.parameters.values())
        rate = 0.0 if part.begin is None else part.learning_rate
        rows.append(ReportRow(part.name, rate, "never" if part.begin is None else str(part.begin), size))
    return rows
