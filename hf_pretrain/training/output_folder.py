"""The folder of a run: claimed for it alone, and searched for what an earlier start has left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from hf_pretrain.errors import InputError
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.checkpoints import check_checkpoint, is_whole, list_checkpoints, was_cut_off

# A leading underscore keeps a file out of what is pushed to the Hub.
_LOCK = "_lock"
# There from the start of a run to its end: what a folder holds without a checkpoint is then what a killed run has left.
_UNFINISHED = "_unfinished"
_AUTO, _LAST = "auto", "true"


@contextmanager
def output_directory(args: PretrainingArguments) -> Iterator[Path]:
    """Claim the output folder for this run, from its emptiness to its last file.

    Args:
        args: `output_dir`, `overwrite_output_dir` and `resume_from_checkpoint` decide. The last becomes the path of the last
            whole checkpoint if it is "true", and that or None if it is "auto"; where the run goes on is printed.

    Raises:
        InputError: If the folder holds an earlier run, another process writes to it, or there is nothing to resume from.
    """
    folder = Path(args.output_dir)
    lock = FileLock(folder / _LOCK)
    try:
        args.resume_from_checkpoint = _decided_by_first(args, lambda: _claim(folder, lock, args))
        yield folder
        if lock.is_locked:
            (folder / _UNFINISHED).unlink(missing_ok=True)
    finally:
        # Not held where the folder was refused: then the file is another process's.
        if lock.is_locked:
            lock.release()
            (folder / _LOCK).unlink(missing_ok=True)
            if not _is_used(folder):
                (folder / _UNFINISHED).unlink(missing_ok=True)


def _decided_by_first(args: PretrainingArguments, decide: Callable[[], str | None]) -> str | None:
    """Return on every process what the first one decides, or refuse on every process what it refuses."""
    outcome: list[Any] = [None]
    if args.process_index == 0:
        try:
            outcome = [decide()]
        except InputError as error:
            outcome = [error]
    if args.world_size > 1:
        outcome = broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def _claim(folder: Path, lock: FileLock, args: PretrainingArguments) -> str | None:
    """Lock the folder, empty it if that was asked for, and return the checkpoint to go on from."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={str(folder)!r} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"output_dir={str(folder)!r} is in use by another process: wait for it or name another"
        ) from error
    asked = args.resume_from_checkpoint
    checkpoint = None if asked is None else _checkpoint_to_resume(folder, asked)
    if checkpoint is None and _is_used(folder):
        if args.overwrite_output_dir:
            _clear(folder)
        elif asked is None or not (folder / _UNFINISHED).exists():
            raise InputError(
                f"output_dir={str(folder)!r} is in use{' and holds no checkpoint' if asked else ''}: name another, go on with "
                "--resume_from_checkpoint true (auto if a run may have been cut off before its first checkpoint), or remove what "
                "is there with --overwrite_output_dir"
            )
        else:
            print(f"{folder} holds a run that was cut off before its first checkpoint: starting anew", flush=True)
    (folder / _UNFINISHED).touch()
    return checkpoint


def _is_used(folder: Path) -> bool:
    return any(path.name not in (_LOCK, _UNFINISHED) for path in folder.iterdir())


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _LOCK:
            # A link is removed, never what it points to.
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _checkpoint_to_resume(folder: Path, asked: str) -> str | None:
    """Return the checkpoint that is asked for, and say so; None if there need not be one."""
    if asked.lower() not in (_AUTO, _LAST):
        print(f"going on from step {check_checkpoint(asked)}: {asked}", flush=True)
        return asked
    skipped: list[Path] = []
    for checkpoint in list_checkpoints(folder):
        if is_whole(checkpoint):
            step = check_checkpoint(checkpoint)
            print(f"{_incomplete(skipped)}going on from step {step}: {checkpoint}", flush=True)
            return str(checkpoint)
        skipped.append(checkpoint)
    earlier = next((checkpoint for checkpoint in skipped if not was_cut_off(checkpoint)), None)
    if asked.lower() == _AUTO and earlier is None:
        return None
    where = f"resume_from_checkpoint={asked}, but output_dir={str(folder)!r}"
    if earlier is not None:
        raise InputError(
            f"{where} holds no checkpoint known to be whole: {earlier.name} is of an earlier version, which did not mark them; "
            f"name it, --resume_from_checkpoint {earlier}"
        )
    raise InputError(
        f"{where} holds no checkpoint: {_incomplete(skipped)}start without it, or with auto after a run that was cut off"
    )


def _incomplete(skipped: list[Path]) -> str:
    if not skipped:
        return ""
    names = ", ".join(checkpoint.name for checkpoint in skipped)
    return f"{names} {'is' if len(skipped) == 1 else 'are'} incomplete (killed while saving?): "
