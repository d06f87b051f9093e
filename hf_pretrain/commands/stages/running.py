"""Run programs of this library one after the other, each on the model that the one before has left.

    hf-pretrain stages plan.yaml --output_dir out

    # plan.yaml
    model_name_or_path: bert-base-uncased
    seed: 0
    stages:
      - adapt: {train_file: domain.txt, max_steps: 1000}
      - finetune: {tasks: tasks.yaml, task: mnli}
      - finetune: {tasks: tasks.yaml, task: rte, strategy: layerwise_decay}

A stage is a method, a recipe by its name, adapt, finetune, multitask, features or evaluate, with its options. Each has a folder
in --output_dir: 1-adapt, 2-finetune-mnli, 3-finetune-rte. Options beside `stages` are for all stages that train and have them.
The model there is for the first stage. `from: 1-adapt` begins with the model of an earlier stage instead of the one before, and
`from: 2-multitask/mnli` with one of its tasks. Files are relative to the plan, or else to the current folder.

All stages are checked before the first one trains. The same command goes on after a stop: it runs no stage again that has ended,
and the stage that was stopped goes on from its last checkpoint. Stages that have not begun may be changed, others may not.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from accelerate.utils.memory import clear_device_cache

from hf_pretrain.cli import run_named
from hf_pretrain.commands import parse_command
from hf_pretrain.commands.stages.plan import MEASURES, Stage, check_stages, read_stages
from hf_pretrain.errors import InputError, RunError, StoppedError
from hf_pretrain.files import held_folder, write_text
from hf_pretrain.hub.record import read_content, read_record
from hf_pretrain.hub.text import split_by_held_out_set
from hf_pretrain.options import option
from hf_pretrain.training.output_folder import has_ended
from hf_pretrain.training.processes import done_by_first, stopping_on_sigterm
from hf_pretrain.training.program import print_table

RECORD = "stages.json"
# A stage that has begun goes on from its last checkpoint.
_SHOWN = {"": "to run", "begun": "goes on", "done": "done"}
_LOCK = "_lock"
# What messages of a program advise by options that are the plan's, and what to do instead; {} is the folder of the stage.
_ADVICE = {
    r"name another,.*? or replace the run that is there with --overwrite_output_dir": "remove {}, or name another output_dir",
    "replace both with --overwrite_output_dir": "remove {}-start",
    r"--resume_from_checkpoint (?:true|auto)\b": "the same command",
}


@dataclass
class StagesArguments:
    """Which plan, and where its stages are written."""

    plan: str = option(help="YAML file of the stages; it may be given without the name of the option.")
    output_dir: str = option(help="Folder in which each stage has one of its own.")
    dry_run: bool = option(False, "Check the plan, print the command of each stage, and run nothing.")


ARGUMENTS = (StagesArguments,)


class StageResult(NamedTuple):
    """What a stage has left.

    Attributes:
        name: Name of the stage and of its folder, such as "2-finetune-mnli".
        folder: The folder.
        scores: Numbers that count on the rows, or the text, that were held out, by their names: one of a training, the mean first
            and then one a task of multi-task learning, and one a task of what measures; {} if nothing was measured.
        seconds: Time of the stage, that of its earlier starts included where they ended by SIGTERM or an error.
    """

    name: str
    folder: Path
    scores: dict[str, float]
    seconds: float


def main(argv: list[str] | None = None) -> None:
    """Check the plan, run its stages, and print what each has left; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="stages", description=__doc__, first="plan")
    run_stages(args.plan, output_dir=args.output_dir, dry_run=args.dry_run)


def run_stages(plan: str | Path, *, output_dir: str | Path, dry_run: bool = False) -> list[StageResult]:
    """Run the stages of a plan that have not ended, as ``hf-pretrain stages`` does.

    Args:
        plan: YAML file of the stages.
        output_dir: Folder in which each stage has one of its own.
        dry_run: Check the plan, print the commands, and run nothing.

    Returns:
        What each stage has left, in their order; [] of a dry run.

    Raises:
        InputError: If a stage cannot run as the plan has it, or has begun with other options.
        RunError: If a stage cannot go on, or was stopped by SIGTERM.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    record = _Record.read(Path(output_dir, RECORD))
    with stopping_on_sigterm():
        stages = read_stages(plan, output_dir=output_dir)
        # Before the options are parsed: the processes meet there, and the first one writes only after that.
        states = record.states(stages)
        with _same_environment():
            check_stages(stages, ended=record.ended(stages, states), pushes=is_first and not dry_run)
        if is_first:
            rows = [
                (stage.name, stage.begins_with or "fresh weights", _SHOWN[state])
                for stage, state in zip(stages, states, strict=True)
            ]
            print_table(rows, header=("stage", "begins with", "state"))
            for stage in stages if dry_run else ():
                print(f"hf-pretrain {shlex.join(stage.command(resumes=False))}")
        if dry_run:
            return []
        with held_folder(Path(output_dir), lock=_LOCK) if is_first else nullcontext():
            for stage, state in zip(stages, states, strict=True):
                if state != "done":
                    _run(stage, record, is_first=is_first)
                elif not record.has_noted(stage):
                    # It was killed between its end and the note of that.
                    _note_end(stage, record, is_first=is_first)
    found = [record.result(stage) for stage in stages]
    if is_first:
        _report(found)
    return found


@dataclass
class _Record:
    """What has begun and ended in an output folder: a file, written by the first process."""

    path: Path
    entries: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> _Record:
        """Return what an earlier start has noted."""
        if path.parent.exists() and not path.parent.is_dir():
            raise InputError(f"output_dir={str(path.parent)!r} is a file: name a folder")
        if not path.exists():
            return cls(path, {})
        try:
            return cls(path, json.loads(path.read_text(encoding="utf-8"))["stages"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is no record of stages: name another output_dir, or remove it") from error

    def states(self, stages: Sequence[Stage]) -> list[str]:
        """Return "done", "begun" or "" of each stage.

        Raises:
            InputError: If one has begun with other options, or with a model that is to be made anew.
        """
        names, out = [stage.name for stage in stages], self.path.parent
        for name in self.entries:
            if name not in names and _has_files(out / name):
                raise InputError(
                    f"{out / name} is a stage that the plan no longer has: remove it, or name another output_dir"
                )
        found: list[str] = []
        for number, stage in enumerate(stages):
            entry = self.entries.get(stage.name) if _has_files(stage.folder) else None
            if entry is None and _has_files(stage.folder):
                raise InputError(f"{stage.folder} is in use, and not by this plan: name another output_dir")
            later = [str(after.folder) for after in stages[number:] if _has_files(after.folder)]
            if entry is not None and (change := _change(entry["wanted"], stage.wanted())):
                raise InputError(
                    f"stage {stage.name} has begun, and the plan was changed since: {change}; change it back, name another "
                    f"output_dir, or remove {' and '.join(later)} to run {'these' if len(later) > 1 else 'it'} anew"
                )
            if entry is not None and found and found[-1] != "done":
                raise InputError(
                    f"{stage.folder} was made from a stage that is no longer there: remove {' and '.join(later)} too, or name "
                    "another output_dir"
                )
            has_run = stage.program != "evaluate" and has_ended(stage.folder)
            found.append("" if entry is None else "done" if has_run else str(entry["state"]))
        return found

    def has_noted(self, stage: Stage) -> bool:
        """Whether the end of a stage is noted."""
        return bool(self.entries[stage.name]["state"] == "done")

    def ended(self, stages: Sequence[Stage], states: Sequence[str]) -> dict[str, list[str]]:
        """Return the stages that have ended, with the models that they have left."""
        done = [stage.name for stage, state in zip(stages, states, strict=True) if state == "done"]
        return {name: self.entries[name]["models"] for name in done}

    def note(self, stage: Stage, **facts: Any) -> None:
        """Note what is known of a stage."""
        kept = self.entries.get(stage.name, {}) if _has_files(stage.folder) else {}
        own = {"wanted": stage.wanted(), "models": stage.models}
        self.entries[stage.name] = {"seconds": 0.0} | kept | own | facts

    def write(self) -> None:
        """Write the file."""
        write_text(self.path, json.dumps({"stages": self.entries}, indent=1, ensure_ascii=False) + "\n")

    def result(self, stage: Stage) -> StageResult:
        """Return what a stage has left."""
        entry = self.entries[stage.name]
        return StageResult(stage.name, stage.folder, entry.get("scores", {}), entry["seconds"])


def _has_files(folder: Path) -> bool:
    """Whether a stage has written something: one that failed before may be changed."""
    return folder.is_dir() and any(folder.iterdir())


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first difference of two stages; "" if there is none."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _change(old, new)
        return f"{name} was {'not given' if old is None else old}, and is {'not given' if new is None else new}"
    return ""


@contextmanager
def _same_environment() -> Iterator[None]:
    """Keep what the options of a stage write into the environment, such as those of FSDP, from the others."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _run(stage: Stage, record: _Record, *, is_first: bool) -> None:
    """Run a stage to its end, and note that."""
    begin = time.perf_counter()

    def seconds() -> float:
        before = record.entries.get(stage.name, {}).get("seconds", 0.0)
        return float(round(before + time.perf_counter() - begin, 3))

    if is_first:
        # The record before the folder: a folder without an entry is somebody else's.
        record.note(stage, state="begun")
        record.write()
        if stage.program == "evaluate":
            stage.folder.mkdir(exist_ok=True)
        print(f"\nstage  {stage.name}: hf-pretrain {shlex.join(stage.command(resumes=False))}", flush=True)
    try:
        with _same_environment():
            if stage.program in MEASURES:
                # Once, and what the first process refuses ends the others too.
                done_by_first(_processes(is_first), lambda: _run_alone(stage))
            else:
                run_named(stage.program, stage.command()[1:])
    except BaseException as error:
        record.note(stage, state="begun", seconds=seconds())
        if is_first:
            record.write()
        known = _of_stage(error, stage)
        if known is None:
            raise
        raise known from error
    finally:
        clear_device_cache(garbage_collection=True)
    _note_end(stage, record, is_first=is_first, seconds=seconds())


def _note_end(stage: Stage, record: _Record, *, is_first: bool, **facts: Any) -> None:
    """Note that a stage has ended, with what it has measured."""
    # The others must not open what the first one still writes, and it must not end while they wait for it.
    scores = done_by_first(_processes(is_first), lambda: _scores(stage.folder))
    record.note(stage, state="done", scores=scores, **facts)
    if is_first:
        record.write()


def _processes(is_first: bool) -> Any:
    """Return how many processes there are and whether this is the first, as the arguments of a training say it."""
    return SimpleNamespace(world_size=int(os.environ.get("WORLD_SIZE", "1")), process_index=int(not is_first))


def _run_alone(stage: Stage) -> None:
    """Run a program of one process, on one of several."""
    with _same_environment():
        os.environ.pop("WORLD_SIZE", None)
        run_named(stage.program, stage.command()[1:])


def _of_stage(error: BaseException, stage: Stage) -> Exception | None:
    """Return an error that names its stage, and says how the plan goes on; None for one that is not a user's."""
    told = str(error)
    for pattern, advice in _ADVICE.items():
        # A folder may have what is no text of a replacement.
        told = re.sub(pattern, advice.format(stage.folder).replace("\\", r"\\"), told)
    text = f"stage {stage.name}: {told}"
    if isinstance(error, StoppedError):
        return StoppedError(text)
    if isinstance(error, RunError):
        return RunError(text)
    return InputError(text) if isinstance(error, InputError) else None


def _scores(folder: Path) -> dict[str, float]:
    """Return the numbers that count of what a stage has left; {} where it measured nothing."""
    results = _json_of(folder / "all_results.json")
    if "metric" in results:
        name = results["metric"]
        return {name: float((results.get("scores") or results["mean"])[name])}
    card = read_record(folder) if read_content(folder) else None
    # Of the weights that are exported, which need not be the last ones.
    sets = {} if card is None else split_by_held_out_set(card.metrics_after)
    if losses := {
        f"{name} held-out loss".strip(): row["eval_loss"] for name, row in sets.items() if "eval_loss" in row
    }:
        return losses
    rows = _json_of(folder / "trainer_state.json").get("log_history", [])
    found = {"mean": float(values[-1])} if (values := [row["eval_mean"] for row in rows if "eval_mean" in row]) else {}
    models = _json_of(folder / "evaluation.json").get("models", {})
    measured = [
        (f"{Path(model).name} {row['task']}" if len(models) > 1 else row["task"], row["metrics"])
        for model, rows in models.items()
        for row in rows
    ]
    if not models and card is not None:
        measured += [(entry.task, entry.metrics) for entry in card.evaluations]
    for task, metrics in measured:
        # The first metric of a task is the one that counts.
        name, value = next(iter(metrics.items()))
        found[f"{task} {name}"] = float(value)
    return found


def _json_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _report(found: Sequence[StageResult]) -> None:
    """Print a table of the stages, a score a row."""
    rows = []
    for entry in found:
        scores = [(name, f"{value:.3f}") for name, value in entry.scores.items()] or [("", "")]
        rows.append((entry.name, *scores[0], f"{entry.seconds:.1f}", str(entry.folder)))
        rows += [("", *score, "", "") for score in scores[1:]]
    print()
    print_table(rows, header=("stage", "metric", "score", "seconds", "folder"))
