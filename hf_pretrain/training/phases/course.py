"""Where a phase lies in its run, and the learning rate at each step: plain data that each Trainer of the run has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pretrain.data.examples.epochs import EpochSampler
from hf_pretrain.schedules import Schedule

EPOCHS_OF_A_PHASE = 1 << 12
"""Each phase numbers its epochs from another multiple on, so that it draws no mask of an earlier phase on the same text. Only
a phase of more epochs than this would."""

OF_POSITIONS = ("rope_theta", "max_position_embeddings")
"""What a phase changes of a model, and later ones keep."""

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "1-sqrt": math.sqrt,
}
"""How far a rate has come from one point to the next, by the share of the steps between them that are done."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run.

    Attributes:
        name: Name of the phase.
        start: Steps of the run before it.
        end: Steps of the run after it.
        rate: Factor of `learning_rate` over the phase; None where the run has one scheduler.
        shape: How the rate goes from point to point, one of `SHAPES`.
        rope_theta: Base of the rotary positions, where this phase or an earlier one changes it.
        max_position_embeddings: Longest sequence of a model with rotary positions, likewise.
        facts: What a reader of the card sees of it, by the names of options.
    """

    name: str
    start: int
    end: int
    rate: Schedule | None = None
    shape: str = "linear"
    rope_theta: float | None = None
    max_position_embeddings: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the phase."""
        return self.end - self.start

    def factor(self, step: int) -> float:
        """Return the rate as a factor of `learning_rate`.

        Args:
            step: Steps of the run that are done; before and after the phase it has its first and last value.
        """
        if self.rate is None:
            return 1.0
        done = min(max(step - self.start, 0), self.steps)
        point = done / self.steps if self.rate.is_share else float(done)
        if self.shape == "linear":
            return float(np.interp(point, self.rate.points, self.rate.values))
        values = self.rate.values
        behind, share = divmod(float(np.interp(point, self.rate.points, range(len(values)))), 1)
        before, after = values[int(behind)], values[min(int(behind) + 1, len(values) - 1)]
        return before + (after - before) * SHAPES[self.shape](share)


@dataclass(frozen=True)
class Course:
    """All phases of a run, and which of them a Trainer trains.

    Attributes:
        phases: The phases in order, each from the end of the one before.
        index: Which one is trained.
        earlier: Phases that the run had before, where this one is a branch of it.
        branch: What it is a branch of: name of the run ("name"), "step" and "phase"; {} if it is none.
    """

    phases: tuple[Phase, ...]
    index: int = 0
    earlier: int = 0
    branch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def phase(self) -> Phase:
        """The phase that is trained."""
        return self.phases[self.index]

    @property
    def is_last(self) -> bool:
        """Whether the run ends with the phase that is trained."""
        return self.index == len(self.phases) - 1

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.phases[-1].end

    @property
    def number(self) -> int:
        """Phases of the run before this one."""
        return self.earlier + self.index

    @property
    def first_epoch(self) -> int:
        """Number of the phase's first epoch, among the epochs of all phases."""
        return self.number * EPOCHS_OF_A_PHASE

    @property
    def has_rates(self) -> bool:
        """Whether the phases give the learning rate."""
        return self.phases[0].rate is not None

    def begins_at(self, step: int) -> bool:
        """Whether the phase goes on from a checkpoint of another phase, of that step."""
        return step == self.phase.start > 0

    def index_at(self, step: int) -> int:
        """Return the index of the phase that trains the next step, after `step` steps of the run."""
        return next((i for i, phase in enumerate(self.phases) if step < phase.end), len(self.phases) - 1)

    def factor(self, step: int) -> float:
        """Return the learning rate after `step` steps of the run, as a factor of `learning_rate`."""
        return self.phases[self.index_at(step)].factor(step)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return the schedule of all parameter groups, over all phases."""
        # The state of a partial function is empty, so that of another phase does not replace it.
        return LambdaLR(optimizer, partial(_factor, course=self))

    @property
    def is_decayed(self) -> bool:
        """Whether the rate at the end of the phase is below its greatest value so far; true if one scheduler sets all rates."""
        rates = [phase.rate for phase in self.phases[: self.index + 1]]
        return any(rate is None or max(rate.values) > self.phase.factor(self.phase.end) for rate in rates)

    def marks(self) -> dict[str, Any]:
        """Return what a checkpoint says of its phase."""
        phase = self.phase
        marks = {"name": phase.name, "number": self.number, "start": phase.start, "end": phase.end}
        positions = {name: value for name in OF_POSITIONS if (value := getattr(phase, name)) is not None}
        return marks | {"is_decayed": self.is_decayed, "branch": dict(self.branch), "positions": positions}

    def line(self) -> str:
        """Return one line that says which phase begins, for the screen."""
        phase = self.phase
        shown = {
            name: phase.facts[name] for name in ("objectives", "mlm_probability", "block_size") if name in phase.facts
        }
        parts = [
            f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in shown.items()
        ]
        parts += [] if phase.rate is None else [f"rate {phase.rate.text}"]
        where = f"steps {phase.start + 1:,} to {phase.end:,}"
        return f"phase {self.index + 1} of {len(self.phases)}, {phase.name}: {', '.join([where, *parts])}"

    def described(self) -> list[dict[str, Any]]:
        """Return all phases as a card has them."""
        return [
            {"name": phase.name, "start": phase.start, "end": phase.end}
            | dict(phase.facts)
            | {name: round(value) for name in OF_POSITIONS if (value := getattr(phase, name)) is not None}
            | ({} if phase.rate is None else {"rate": phase.rate.text, "shape": phase.shape})
            for phase in self.phases
        ]


def _factor(step: int, course: Course) -> float:
    return course.factor(step)


@contextmanager
def kept_options(trainer: Trainer) -> Iterator[None]:
    """Load the state of an optimizer and its schedule, and leave them the options and rates that this phase wants.

    The state in a checkpoint has those of the phase before, and would replace weight decay and the like.

    Args:
        trainer: The Trainer that loads them.
    """
    optimizer, scheduler = cast(Any, trainer.optimizer), cast(Any, trainer.lr_scheduler)
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]
    rates = list(scheduler.base_lrs)
    yield
    scheduler.base_lrs = list(rates)
    # With the rate of the next step.
    for group, kept, base, factor in zip(optimizer.param_groups, groups, rates, scheduler.lr_lambdas, strict=True):
        group.update(kept)
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


class PhaseEnd(TrainerCallback):
    """Ends a phase with a row of the log, an evaluation and a checkpoint, which the next phase goes on from.

    Args:
        trainer: The Trainer of the phase.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after the last step of a phase that is not the last one; the end of the run comes by itself."""
        course = self.trainer.course
        if course is not None and not course.is_last and state.global_step >= course.phase.end:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = self.trainer.eval_dataset is not None


def sampler_from(sampler_fn: Any, first_epoch: int, dataset: Any) -> Any:
    """Return a sampler whose epochs are numbered from another one on."""
    sampler = sampler_fn(dataset)
    if isinstance(sampler, EpochSampler):
        sampler.begin_at(first_epoch)
    return sampler
