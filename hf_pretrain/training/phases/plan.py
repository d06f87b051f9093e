"""From the list in a recipe to the phases of a run: their lengths and rates, and what does not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hf_pretrain.errors import InputError
from hf_pretrain.files import plain
from hf_pretrain.schedules import Schedule
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.parsing import ParsedPhase
from hf_pretrain.training.phases.branch import Branch
from hf_pretrain.training.phases.course import EPOCHS_OF_A_PHASE, OF_POSITIONS, Course, Phase
from hf_pretrain.training.phases.entries import OF_PHASES

_MOST_PHASES = (1 << 22) // EPOCHS_OF_A_PHASE
# Values that the schedule of the run would have, and that the rates of phases replace.
_OF_THE_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "decay_during_warmup")
_COMPARES_PHASES = "held-out numbers of different phases cannot be compared"
_WITHOUT_EPOCHS = "an epoch is one of its phase: count in steps"
# Options that do not go with phases: the values that do, and why.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_minutes": ((None,), "the phases are as long as their steps say: give max_steps"),
    "num_train_epochs": ((3.0,), "the phases are as long as their steps say: give max_steps"),
    "load_best_model_at_end": ((False,), _COMPARES_PHASES),
    "metric_for_best_model": ((None,), _COMPARES_PHASES),
    "save_strategy": (("no", "steps"), f"{_WITHOUT_EPOCHS}, and {_COMPARES_PHASES}"),
    "eval_strategy": (("no", "steps"), _WITHOUT_EPOCHS),
    "logging_strategy": (("no", "steps"), _WITHOUT_EPOCHS),
    "save_only_model": ((False,), "a phase goes on from the optimizer of the one before"),
    "auto_find_batch_size": ((False,), "each phase has its batch size: give per_device_train_batch_size"),
    "deepspeed": ((None,), "its engine keeps one schedule and one optimizer: launch with ddp.yaml or fsdp2.yaml"),
}


class PlannedPhase(NamedTuple):
    """A phase that can be trained.

    Attributes:
        options: Options of data, model and training, with the phase's own; those of training have the course.
        own: What the entry of the phase has.
    """

    options: tuple[Any, Any, PretrainingArguments]
    own: Mapping[str, Any]

    @property
    def course(self) -> Course:
        """The run, as this phase sees it."""
        course = self.options[2].course
        assert course is not None, "`plan` gives each phase the course"
        return course


@dataclass(frozen=True)
class _Entry:
    """An entry of the list: what only phases have."""

    name: str
    share: float | None = None
    steps: int | None = None
    rate: Schedule | None = None
    shape: str = "linear"
    rope_theta: float | None = None
    max_position_embeddings: int | None = None


def check_run(args: PretrainingArguments, phases: Sequence[ParsedPhase]) -> None:
    """Refuse what does not go with phases, before anything is read.

    Args:
        args: Options of training, of the run.
        phases: The phases as parsed.

    Raises:
        InputError: Naming the option, or the phase.
    """
    for name, (allowed, why) in _FIXED.items():
        value = getattr(args, name)
        value = getattr(value, "value", value)
        if value not in allowed:
            raise InputError(f"{name}={value!r} does not go with phases: {why}")
    entries = _entries(phases)
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"phases: {twice!r} is the name of two phases: give each its own")
    if len(entries) > _MOST_PHASES:
        raise InputError(f"phases: {len(entries)} are more than {_MOST_PHASES}: join some")
    for entry in entries:
        if (entry.share is None) == (entry.steps is None):
            raise InputError(
                f"phases: {entry.name!r} needs either a share, such as 70%, or steps: give one of the two"
            )
    _check_rates(args, entries)
    if getattr(args, "training_mode", "") == "two_stage":
        raise InputError(
            "training_mode='two_stage' has two stages of its own: leave out the phases, or choose 'joint'"
        )


def _entries(phases: Sequence[ParsedPhase]) -> list[_Entry]:
    found = []
    for number, phase in enumerate(phases, 1):
        own = {name: value for name, value in phase.own.items() if name in OF_PHASES}
        found.append(_Entry(**{"name": f"phase {number}"} | own))
    return found


def _check_rates(args: PretrainingArguments, entries: Sequence[_Entry]) -> None:
    """Refuse rates in some phases alone, a shape of none, and a second schedule beside them."""
    with_rate = [entry.name for entry in entries if entry.rate is not None]
    for entry in entries:
        if entry.rate is None and with_rate:
            raise InputError(
                f"phases: {with_rate[0]!r} has a rate and {entry.name!r} has none: give it to all, or to none"
            )
        if entry.shape != "linear" and (entry.rate is None or len(entry.rate.values) < 2):
            raise InputError(
                f"phases: {entry.name!r} has shape={entry.shape!r} and no rate that changes: give rate: '0%:1, 100%:0'"
            )
        if entry.rate is not None and not entry.rate.is_share and entry.rate.points[-1] and entry.steps is not None:
            if entry.rate.points[-1] > entry.steps:
                raise InputError(
                    f"phases: {entry.name!r} has rate={entry.rate.text!r}, which ends after its {entry.steps} steps: give "
                    "points within the phase"
                )
    for name in _OF_THE_SCHEDULE if with_rate else ():
        known = next(known for known in dataclasses.fields(args) if known.name == name)
        value, default = getattr(args, name), known.default
        if value != default and not (value in (None, {}) and default in (None, dataclasses.MISSING)):
            raise InputError(
                f"{name}={getattr(value, 'value', value)!r} has no effect: the phases give the rate; leave it out, or leave out "
                "rate in all phases"
            )
    if not with_rate and args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise InputError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} does not go with phases: {_COMPARES_PHASES}"
        )


def plan(args: PretrainingArguments, phases: Sequence[ParsedPhase], *, branch: Branch | None) -> list[PlannedPhase]:
    """Return the phases of a run with their steps; their options have the course.

    Args:
        args: Options of training, of the run.
        phases: The phases as parsed.
        branch: What the run is a branch of.

    Raises:
        InputError: If the lengths do not make up the run.
    """
    entries = _entries(phases)
    begin = 0 if branch is None else branch.step
    borders = _borders(entries, begin=begin, max_steps=args.max_steps)
    made: list[Phase] = []
    positions = {} if branch is None else dict(branch.positions)
    for entry, phase, start, end in zip(entries, phases, borders, borders[1:], strict=False):
        # A later phase keeps what an earlier one has changed of the model.
        positions |= {name: value for name in OF_POSITIONS if (value := getattr(entry, name)) is not None}
        made.append(Phase(entry.name, start, end, entry.rate, entry.shape, **positions, facts=_facts(phase.options)))
    earlier = 0 if branch is None else branch.phases
    course = Course(tuple(made), earlier=earlier, branch={} if branch is None else branch.facts())
    planned = []
    for index, phase in enumerate(phases):
        data_args, model_args, training = phase.options
        training.max_steps = course.total
        # No option, so that no file or card has it.
        vars(training)["course"] = replace(course, index=index)
        planned.append(PlannedPhase((data_args, model_args, training), phase.own))
    return planned


def _borders(entries: Sequence[_Entry], *, begin: int, max_steps: int) -> list[int]:
    """Return the steps of the run at the begin and at the end of each phase."""
    absolute = sum(entry.steps or 0 for entry in entries)
    if max_steps <= 0:
        shared = next((entry.name for entry in entries if entry.share is not None), None)
        if shared is not None:
            raise InputError(f"max_steps={max_steps}: {shared!r} has a share of all steps: say how many there are")
        max_steps = begin + absolute
    length = max_steps - begin
    if length <= 0:
        raise InputError(
            f"max_steps={max_steps} counts the steps before the branch too, and it begins at step {begin}: give more"
        )
    ends, position = [begin], float(begin)
    for entry in entries:
        position += entry.steps if entry.steps is not None else (entry.share or 0.0) * length
        ends.append(round(position))
        if ends[-1] <= ends[-2]:
            raise InputError(
                f"phases: {entry.name!r} has no step of {length}: give it a greater share, or raise max_steps"
            )
    if ends[-1] != max_steps:
        what = f"{ends[-1] - begin:,} of {length:,} steps"
        shares = sum(entry.share or 0.0 for entry in entries)
        what = f"{shares:.4g} of the run" if not absolute else what
        raise InputError(
            f"phases make up {what}: their shares must have the sum 100%, and their steps that of the run"
        )
    return ends


_SHOWN = ("objectives", "objective_shares", "mlm_probability", "block_size", "block_mode")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _facts(options: Sequence[Any]) -> dict[str, Any]:
    """Return what a card shows of a phase: its text, and the options that tell it from others."""
    values: dict[str, Any] = {}
    for instance in options:
        values |= {known.name: getattr(instance, known.name) for known in dataclasses.fields(instance)}
    names = [name for name in ("train_file", "language_file", "parallel_file") if values.get(name)]
    text = [file for name in names for file in values[name]] or [
        values.get("dataset_name") or values.get("prepared_data") or ""
    ]
    facts = {"text": [item for item in text if item] or (["demo corpus"] if values.get("demo_corpus") else [])}
    facts |= {name: values[name] for name in (*_SHOWN, *_BATCH) if values.get(name) is not None}
    return {name: plain(value) for name, value in facts.items()}
