"""One phase after the other: each has a Trainer of its own, which goes on from the checkpoint at the border.

A run that was cut off and one that was not do the same at a border: they build the Trainer of the next phase and load the
checkpoint. So a resume changes no bit, wherever it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.data.text.search import find_files, is_pipe
from hf_pretrain.errors import InputError
from hf_pretrain.files import read_marker
from hf_pretrain.training.phases.branch import Branch, branch_line
from hf_pretrain.training.phases.course import Course
from hf_pretrain.training.phases.plan import PlannedPhase
from hf_pretrain.training.trainer import PretrainingTrainer


def check_files(args: Any) -> None:
    """Refuse files of a phase that are not there: otherwise that would show when the phases before it are done.

    Args:
        args: The options of data.

    Raises:
        InputError: Naming the file.
    """
    if not isinstance(args, DataArguments):
        return
    for name in ("train_file", "validation_file"):
        paths = getattr(args, name) or []
        if any(is_pipe(path) for path in paths):
            raise InputError(
                f"{name}={paths!r} is a pipe, which can be read once: store the text for a run with phases"
            )
        if paths:
            find_files(paths)


def shapes_of(trainer: PretrainingTrainer) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a Trainer's model, by name."""
    return {name: tuple(parameter.shape) for name, parameter in trainer.model.named_parameters()}


def check_same_model(first: Mapping[str, Any], other: Mapping[str, Any], course: Course) -> None:
    """Refuse a phase whose model has other parameters than that of the first one.

    Args:
        first: Shapes of the parameters in the first phase, by name.
        other: The same in the phase of `course`.
        course: The run.

    Raises:
        InputError: Naming parameters that differ.
    """
    differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    if differing:
        named = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise InputError(
            f"phases: {course.phase.name!r} has other parameters than {course.phases[0].name!r} ({named}): choose objectives "
            "with the same heads in all phases, with the weight 0 where one does not count"
        )


def train_phases(
    phases: Sequence[PlannedPhase],
    *,
    checkpoint: str | None,
    branch: Branch | None,
    build: Callable[[tuple[Any, ...]], tuple[PretrainingTrainer, PreparedData]],
    train: Callable[[PretrainingTrainer], None],
    begins: Callable[[], None],
) -> tuple[PretrainingTrainer, PreparedData]:
    """Train the phases of a run that are left.

    Args:
        phases: All phases.
        checkpoint: The checkpoint of this run to go on from; None to begin.
        branch: What the run is a branch of.
        build: Reads the text of a phase and makes its Trainer, from its options.
        train: Trains it to its end.
        begins: Called when the first of them begins to train.

    Returns:
        The Trainer of the last phase, trained, and its data.
    """
    if checkpoint is not None:
        step = int((read_marker(checkpoint) or {}).get("step", 0))
        first = phases[0].course.index_at(step)
    else:
        first = 0
        checkpoint = branch.checkpoint if branch is not None else None
    clock = _Clock()
    for phase in phases[first:]:
        args = phase.options[2]
        args.resume_from_checkpoint = checkpoint
        if args.process_index == 0:
            if branch is not None and checkpoint == branch.checkpoint:
                print(branch_line(branch), flush=True)
            print(phase.course.line(), flush=True)
        trainer, data = build(phase.options)
        begins()
        train(trainer)
        clock.add(trainer)
        checkpoint = str(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{phase.course.phase.end}"))
        if not phase.course.is_last:
            # The next one must not hold two models.
            del trainer, data
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    clock.set(trainer)
    return trainer, data


class _Clock:
    """Adds up the seconds of all phases, and notes where the first began: the last Trainer knows only its own phase."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._begun: tuple[int, int] | None = None

    def add(self, trainer: PretrainingTrainer) -> None:
        """Note a phase that is trained."""
        if self._begun is None:
            self._begun = (trainer._initial_global_step, trainer._initial_num_input_tokens_seen)
        row = trainer.state.log_history[-1]
        self._seconds += row.get("train_runtime", 0.0)

    def set(self, trainer: PretrainingTrainer) -> None:
        """Give the Trainer of the last phase the numbers of all of them."""
        assert self._begun is not None, "a run has a phase"
        trainer._initial_global_step, trainer._initial_num_input_tokens_seen = self._begun
        row = trainer.state.log_history[-1]
        if "train_runtime" in row:
            steps = trainer.state.global_step - self._begun[0]
            row["train_runtime"] = round(self._seconds, 4)
            row["train_steps_per_second"] = round(steps / max(self._seconds, 1e-9), 3)
            # Examples and losses of phases are not alike.
            for name in ("train_samples_per_second", "train_loss"):
                row.pop(name, None)
