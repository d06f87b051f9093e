"""Checkpoints: how a run writes them, so that a whole one differs from one that was cut off, and how it goes on from one.

[`Checkpointing`] does both for a Trainer. Below it are the facts of a run that a resume compares; the functions on top look
at a folder alone.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.files import (
    MARKER,
    PART,
    begin_folder,
    damaged_file,
    first_difference,
    is_whole,
    plain,
    read_marker,
    share_weights,
    write_marker,
)
from hf_pretrain.hub.text import portable_options
from hf_pretrain.options import resolved_options
from hf_pretrain.training.arguments import global_batch_size
from hf_pretrain.training.processes import full_disk, is_full_disk, last_whole_checkpoint, not_finite

_STATE = "trainer_state.json"
# What only training needs: the learning rate, or with DeepSpeed, which keeps it with the rest, the name of that.
_FOR_TRAINING = ("scheduler.pt", "latest")


def was_cut_off(folder: str | Path) -> bool:
    """Whether a checkpoint was begun and never became whole; one of an earlier version, without a marker, was not."""
    folder = Path(folder)
    return (folder / (MARKER + PART)).exists() or not (folder / _STATE).is_file()


def check_checkpoint(folder: str | Path, *, reads_files: bool = True) -> int:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        folder: The checkpoint; one without a marker, of an earlier version, must have files that open.
        reads_files: Whether to compare the files with their hashes.

    Returns:
        Its step.

    Raises:
        InputError: If it is incomplete or damaged, or holds weights alone.
    """
    folder = Path(folder)
    option = f"resume_from_checkpoint={str(folder)!r}"
    if not folder.is_dir():
        raise InputError(f"{option} is no folder: name a checkpoint-* folder, or `true` for the last")
    facts = read_marker(folder)
    if facts is None:
        _check_files(folder, option)
    elif (difference := first_difference(folder, facts["files"])) is not None:
        raise InputError(f"{option} is incomplete ({difference}): name another, or `true` for the last that is whole")
    elif reads_files:
        check_hashes(folder)
    if not any((folder / name).is_file() for name in _FOR_TRAINING):
        raise InputError(
            f"{option} holds the weights alone (made with save_only_model?), which a run cannot go on from: name another"
        )
    try:
        return int(json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{option} has no readable {_STATE}: name a checkpoint-* folder that is whole") from error


def check_hashes(folder: str | Path) -> None:
    """Refuse a checkpoint of which a file is not as it was saved.

    Raises:
        InputError: Naming the file.
    """
    damaged = damaged_file(folder)
    if damaged is not None:
        raise InputError(
            f"resume_from_checkpoint={str(folder)!r} is damaged ({damaged} is not as it was saved): name another, or `true` for "
            "the last that is whole"
        )


def _check_files(folder: Path, option: str) -> None:
    """Open every file whose end shows whether it is whole."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{option} is incomplete ({path.name} cannot be read: {error}): name another checkpoint"
            ) from error


def remove_old_checkpoints(output_dir: str | Path, *, limit: int | None, keep: tuple[str | Path | None, ...]) -> None:
    """Remove the oldest checkpoints, those that are not whole before all others.

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints to leave; no limit if None or not positive.
        keep: Checkpoints that stay whatever the limit: the newest and the best.
    """
    if limit is None or limit <= 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    kept = {Path(path).resolve() for path in keep if path is not None}
    removable = [path for path in found if path.resolve() not in kept]
    # The time of one that was being removed when the run was killed is that of the kill: it would pass for the newest.
    removable.sort(key=is_whole)
    for path in removable[: max(0, len(found) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def _are_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return whether the norm of every tensor is finite, as a tensor; of sharded ones, the part of this process."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in local]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()


# Options that change nothing of what is learned, or that are compared in another way; by how their names begin.
_NOT_COMPARED = (
    *("output_dir", "overwrite_", "logging_", "log_", "report_to", "run_name", "project", "save_", "eval_", "hub_"),
    *("push_to_hub", "disable_tqdm", "dataloader_num_", "dataloader_p", "preprocessing_num_", "ddp_", "enable_jit_"),
    *("per_device_", "gradient_accumulation_", "seed", "train_file", "validation_", "language_file", "parallel_file"),
    *("dataset_", "tokenizer_name", "metric_for_", "greater_is_", "load_best_", "torch_compile", "activation_check"),
    *("fsdp", "deepspeed", "accelerator_config", "full_determinism", "teacher_name", "teacher_device", "trackio_"),
    *("prepared_data", "model_name", "generator_name", "use_cpu", "include_", "branch_from"),
)
# Bytes of tokens that are hashed; of more, every so many record batches.
_MOST_HASHED = 1 << 33


class Checkpointing:
    """Writes the checkpoints of a Trainer, and finds the one that a run goes on from.

    A checkpoint is marked as whole when all processes have written their part; only then older ones are removed. It holds the
    composite as it is trained, so that a resume is strict. Numbers that are not finite are not saved.

    Args:
        trainer: The Trainer; its `save_progress` writes what else a resume needs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.is_writing = False
        self._as_given: Mapping[str, Any] = {}
        self._failure: Exception | None = None

    # Writing

    def check_finite(self) -> None:
        """Refuse weights, or a loss since the last row of the log, that are not finite on any process.

        Raises:
            RunError: If one is not; it names the last whole checkpoint.
        """
        trainer = self.trainer
        numbers = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        loss = getattr(trainer, "_tr_loss", None)
        finite = _are_finite(numbers if loss is None else [*numbers, loss])
        if self.any_rank(~finite):
            what = f"the weights or the loss are not finite at step {trainer.state.global_step}"
            raise not_finite(trainer.args.output_dir, what)

    def any_rank(self, flag: torch.Tensor | bool) -> bool:
        """Return whether a flag is set on any process; all must ask."""
        flag = torch.as_tensor(flag, device=self.trainer.args.device).to(torch.int64)
        return bool(self.trainer.accelerator.reduce(flag, reduction="sum"))

    def save(self, folder: Path, *, write: Callable[[], None]) -> None:
        """Write a checkpoint, on every process.

        Args:
            folder: The checkpoint.
            write: The stock method, which calls [`Checkpointing.options_to_keep`] where it saves the options.
        """
        self.check_finite()
        args = self.trainer.args
        self.is_writing = True
        try:
            with self.together(remove=folder):
                # No file of a run that was cut off here must pass for one of this run's.
                self._if_writer(begin_folder, folder)
            # A push, and the removal of older checkpoints, have to wait for the marker.
            with (
                self.together(remove=folder),
                changed(args, push_to_hub=False, save_total_limit=None) as self._as_given,
            ):
                write()
            if not args.save_only_model:
                with self.together(remove=folder):
                    self.trainer.save_progress(folder)
            with self.together(remove=folder):
                self._if_writer(self._mark, folder)
        finally:
            self.is_writing = False

    def _mark(self, folder: Path) -> None:
        share_weights(folder)
        args, step = self.trainer.args, self.trainer.state.global_step
        write_marker(folder, has_hashes=True, step=step, world_size=args.world_size, run=self.run_facts())

    def remove_old(self, newest: Path) -> None:
        """Remove the oldest checkpoints beyond `save_total_limit`, but not the newest, the best and those between phases."""
        best, limit = self.trainer.state.best_model_checkpoint, self.trainer.args.save_total_limit
        course = self.trainer.args.course
        borders = [] if course is None else [f"{PREFIX_CHECKPOINT_DIR}-{phase.end}" for phase in course.phases]
        keep = (newest, best, *(newest.parent / name for name in borders))
        self._if_writer(remove_old_checkpoints, newest.parent, limit=limit, keep=keep)

    @contextmanager
    def options_to_keep(self) -> Iterator[None]:
        """Set the options as they were given, but without token and folders: a checkpoint may be pushed for all to read."""
        # Here and not later a full disk is noted: the stock method has all processes wait for one another next.
        with self._noted_failure(), changed(self.trainer.args, **self._as_given):
            kinds = (str, dict, list, os.PathLike)
            values = {name: value for name, value in vars(self.trainer.args).items() if isinstance(value, kinds)}
            portable = portable_options(values)
            others = {name: portable[name] for name, value in values.items() if portable[name] != plain(value)}
            with changed(self.trainer.args, **others | {"hub_token": None}):
                yield

    def _if_writer(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.trainer.args.should_save:
            function(*args, **kwargs)

    @contextmanager
    def together(self, *, remove: Path | None = None) -> Iterator[None]:
        """Write on every process, and stop all of them when one finds the disk full.

        Args:
            remove: Folder that then holds nothing whole, and whose room is needed.
        """
        with self._noted_failure():
            yield
        failure, self._failure = self._failure, None
        if self.any_rank(failure is not None):
            if remove is not None:
                self._if_writer(shutil.rmtree, remove, ignore_errors=True)
            raise full_disk(self.trainer.args.output_dir, failure) from failure

    @contextmanager
    def _noted_failure(self) -> Iterator[None]:
        """Keep the error of a full disk until all processes know of it: the others would wait for this one forever."""
        try:
            yield
        except Exception as error:
            # Where the processes write together, the next call of the others already needs this one.
            if not is_full_disk(error) or self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
                raise
            self._failure = self._failure or error

    # Going on

    def find(self, checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint to go on from, and say what has changed since it was made.

        Args:
            checkpoint: Its path, or True for the last whole one in the output folder.

        Raises:
            InputError: If there is none, it is damaged, or it is of another model or seed.
        """
        args = self.trainer.args
        if checkpoint is True:
            found = last_whole_checkpoint(args.output_dir)
            if found is None:
                raise InputError(f"resume_from_checkpoint=True, but {args.output_dir} holds no whole checkpoint")
            checkpoint = str(found)
        if not isinstance(checkpoint, str):
            return None
        if checkpoint != args.resume_from_checkpoint:
            # Otherwise the program has looked at it.
            check_hashes(checkpoint)
        marker = read_marker(checkpoint) or {}
        facts = marker.get("run")
        if facts is None:
            self._say(f"{checkpoint} is of an earlier version: order and masks go on as others")
            return checkpoint
        for name, own in (("seed", args.seed), ("model", self._model_types())):
            was = facts[name]
            if was != own:
                raise InputError(
                    f"resume_from_checkpoint={checkpoint!r} was made with the {name} {was}, and this run has {own}: give that of "
                    "the checkpoint, or start anew in another output_dir"
                )
        begins_phase = self._check_phase(checkpoint, facts.get("phase"), step=int(marker["step"]))
        now = self.run_facts()
        if begins_phase:
            now |= {name: facts[name] for name in ("text", "examples_per_step")}
        changes = list(_changes(facts, now)) if self.trainer.is_world_process_zero() else []
        if changes:
            self._say(f"this run differs from {checkpoint}: {'; '.join(changes)}")
        return checkpoint

    def _check_phase(self, checkpoint: str, marks: Mapping[str, Any] | None, *, step: int) -> bool:
        """Return whether the checkpoint is of another phase, which ends where this one begins.

        Raises:
            InputError: If it lies within a phase that is none of this run.
        """
        course, start = self.trainer.args.course, 0 if marks is None else marks["start"]
        if course is not None and course.begins_at(step):
            return True
        if start != (0 if course is None else course.phase.start):
            raise InputError(
                f"resume_from_checkpoint={checkpoint!r} lies in the phase {(marks or {}).get('name')!r} that begins at step "
                f"{start}, and this run has no such phase: give the phases as they were until then"
            )
        return False

    def _say(self, line: str) -> None:
        if self.trainer.is_world_process_zero():
            print(line, flush=True)

    def run_facts(self) -> dict[str, Any]:
        """Return the facts of the run that a checkpoint keeps, so that a resume can say what has changed."""
        args = self.trainer.args
        options = self.trainer.recipe or resolved_options([args])
        phase = {} if args.course is None else {"phase": args.course.marks()}
        return phase | {
            "seed": args.seed,
            "draws": draws.VERSION,
            "model": self._model_types(),
            "examples_per_step": global_batch_size(args),
            "text": self._text_fingerprint,
            "options": {name: value for name, value in options.items() if not name.startswith(_NOT_COMPARED)},
        }

    def _model_types(self) -> list[str]:
        config = self.trainer.model.config
        parts = [getattr(config, name, None) for name in config.sub_configs]
        return [part.model_type for part in parts if part is not None]

    @cached_property
    def _text_fingerprint(self) -> str | None:
        return text_fingerprint(self.trainer.train_dataset)


@contextmanager
def changed(args: TrainingArguments, **values: Any) -> Iterator[dict[str, Any]]:
    """Set options for a while; yields them as they were."""
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield before
    finally:
        for name, value in before.items():
            setattr(args, name, value)


@contextmanager
def fitting_shapes() -> Iterator[None]:
    """Say in one line which parameter of a checkpoint has another shape: torch lists all of them, a line each.

    Raises:
        InputError: If one has.
    """
    try:
        yield
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        if first is None:
            raise
        raise InputError(_DOES_NOT_FIT.format(first)) from error


def check_loaded(load_result: Any, *, tied: Mapping[str, str]) -> None:
    """Refuse a checkpoint that does not fit; the stock Trainer would go on from fresh weights with a log line.

    Args:
        load_result: Missing and unexpected keys.
        tied: Keys of tied parameters, which a checkpoint leaves out.

    Raises:
        InputError: If other keys are missing, or some are unexpected.
    """
    missing = set(load_result.missing_keys) - set(tied)
    if missing or load_result.unexpected_keys:
        keys = f"missing {sorted(missing)[:3]}, unexpected {sorted(load_result.unexpected_keys)[:3]}"
        raise InputError(_DOES_NOT_FIT.format(keys))


_DOES_NOT_FIT = (
    "resume_from_checkpoint: the checkpoint does not fit the model ({}): resume with the options it was made with"
)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between the facts of two runs, a phrase each."""
    if None not in (before["text"], now["text"]) and before["text"] != now["text"]:
        yield "the text has changed, so the examples that come are others"
    if before.get("draws") != now["draws"]:
        yield "random draws are others in this version, so order and masks go on as others"
    was, is_now = before["examples_per_step"], now["examples_per_step"]
    if was != is_now:
        yield f"a step had {was} examples, and has {is_now}"
    for name in sorted(before["options"].keys() | now["options"].keys()):
        was, is_now = (facts["options"].get(name, "its default") for facts in (before, now))
        if was != is_now:
            yield "the phases are others" if name == "phases" else f"{name} was {was}, and is {is_now}"


def text_fingerprint(dataset: Any) -> str | None:
    """Return a hash of the tokens that a dataset is made from; None where there are none that are stored.

    Args:
        dataset: Examples, or views of them, down to the `datasets.Dataset` that holds the tokens. A stream has an identity of
            its own.
    """
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    lengths, tokens, is_empty = xxhash.xxh3_128(), xxhash.xxh3_128(), True
    for table in _stored_tables(dataset, set()):
        if "input_ids" not in table.column_names:
            continue
        is_empty = False
        column = table.data.table.column("input_ids")
        every = 1 + column.nbytes // _MOST_HASHED
        for number, chunk in enumerate(column.chunks):
            if hasattr(chunk, "offsets"):
                lengths.update(_bytes(np.diff(chunk.offsets.to_numpy(zero_copy_only=False)).astype(np.int64)))
                chunk = chunk.flatten()  # noqa: PLW2901
            if number % every == 0:
                tokens.update(_bytes(chunk.to_numpy(zero_copy_only=False)))
        if table._indices is not None:
            lengths.update(_bytes(table._indices.column(0).to_numpy()))
    return None if is_empty else lengths.hexdigest() + tokens.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _stored_tables(value: Any, seen: set[int]) -> Iterator[datasets.Dataset]:
    """Yield the tables that are found behind a dataset, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, datasets.Dataset):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _stored_tables(part, seen)
    elif type(value).__module__.startswith("hf_pretrain."):
        yield from _stored_tables(getattr(value, "__dict__", {}), seen)
