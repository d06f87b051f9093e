"""Checkpoints that can be told from those that were cut off: a marker, written last, names every file, its size and hash.

What ends a run although its input is right, told in one line: what happened, what is left, and how it goes on.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from hf_pretrain.errors import InputError, RunError, StoppedError, one_line
from hf_pretrain.files import (
    MARKER,
    PART,
    damaged_file,
    first_difference,
    is_whole,
    read_marker,
)

_STATE = "trainer_state.json"
# What only training needs: the learning rate, or with DeepSpeed, which keeps it with the rest, the name of that.
_FOR_TRAINING = ("scheduler.pt", "latest")


def was_cut_off(folder: str | Path) -> bool:
    """Whether a checkpoint was begun and never became whole; one of an earlier version, without a marker, was not."""
    folder = Path(folder)
    return (folder / (MARKER + PART)).exists() or not (folder / _STATE).is_file()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, the latest step first."""
    numbered = [
        (int(match[1]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the checkpoint of the latest step that is whole, or None."""
    return next(filter(is_whole, list_checkpoints(output_dir)), None)


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
    asked = f"resume_from_checkpoint={str(folder)!r}"
    if not folder.is_dir():
        raise InputError(f"{asked} is no folder: name a checkpoint-* folder, or `true` for the last")
    facts = read_marker(folder)
    if facts is None:
        _check_files(folder, asked)
    elif (difference := first_difference(folder, facts["files"])) is not None:
        raise InputError(f"{asked} is incomplete ({difference}): name another, or `true` for the last that is whole")
    elif reads_files:
        check_hashes(folder)
    if not any((folder / name).is_file() for name in _FOR_TRAINING):
        raise InputError(
            f"{asked} holds the weights alone (made with save_only_model?), which a run cannot go on from: name another"
        )
    try:
        return int(json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{asked} has no readable {_STATE}: name a checkpoint-* folder that is whole") from error


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


def _check_files(folder: Path, asked: str) -> None:
    """Open every file whose end tells whether it is whole."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{asked} is incomplete ({path.name} cannot be read: {error}): name another checkpoint"
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


def are_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return whether the norm of every tensor is finite, as a tensor; of sharded ones, the part of this process."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in local]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()


# The disk, the quota of a user, the largest file that is allowed: one thing to whoever writes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and tokenizers raise kinds of their own, and a worker's error arrives as text.
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
# What torch.save raises when a write fell short; it does not say why.
_TORCH_WRITE = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc:\d+\] \. unexpected pos")
# How gloo, NCCL and their store tell that a process is gone, or silent.
_DEAD_PROCESS = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe.*(?:gloo|TCPStore|socket)|gloo/transport"
    r"|NCCL (?:error|communicator was aborted)|ncclRemoteError|failed to recv|Socket Timeout|Timed out (?:waiting|after) "
    r"|DistNetworkError|DistStoreError"
)
_TIMED_OUT = re.compile(r"[Tt]ime(?:d )?out")
_TOO_MANY_FILES = re.compile(r"Too many open files|received 0 items of ancdata")
_READ = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PATHS = (*_READ, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ENODEV, errno.EIO, errno.ESTALE)
_LIBRARIES = re.compile(r"/(?:transformers|accelerate|peft|torch|safetensors|huggingface_hub)/")
_REFUSALS = (
    *(ValueError, ImportError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError),
    *(OSError, EOFError, SafetensorError, pickle.UnpicklingError),
)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is )?(.*?)(?:\.|$)")
# torch makes the error anew, of the same type, from the whole traceback.
_WORKERS_OWN = re.compile(r"^hf_pretrain\.errors\.(InputError|RunError): (.*)$", re.MULTILINE)


@contextmanager
def reported_faults(output_dir: str | Path) -> Iterator[None]:
    """Turn a full disk or a dead worker into a [`RunError`], and bad input that a worker found into what it was.

    Args:
        output_dir: Folder of the run, to find its last whole checkpoint in.
    """
    try:
        yield
    except Exception as error:
        known = _from_worker(error) or _known_fault(error, output_dir)
        if known is None:
            raise
        raise known from error


def _known_fault(error: Exception, output_dir: str | Path) -> RunError | None:
    if isinstance(error, InputError | RunError):
        return None
    if is_full_disk(error):
        return full_disk(output_dir, error)
    fault = system_fault(error)
    if isinstance(fault, RunError):
        return fault
    if _DEAD_PROCESS.search(str(error)):
        return _dead_process(output_dir, error)
    died = _DEAD_WORKER.search(" ".join(str(error).split()))
    if isinstance(error, RuntimeError) and died:
        # torch speaks of it where the signal is that of a bus error.
        memory = "shared memory" if "shared memory" in str(error) else "memory"
        return RunError(
            f"a worker of the data loader died ({died[1]}), most often because {memory} ran out: "
            + how_to_go_on(output_dir, f"lower dataloader_num_workers or give more {memory}")
        )
    return None


def _dead_process(output_dir: str | Path, error: Exception) -> RunError:
    if _TIMED_OUT.search(str(error)):
        what = (
            "another process of the run did not answer for ddp_timeout seconds: raise --ddp_timeout if it is at work"
        )
    else:
        what = "another process of the run has ended: its own message says why"
    return RunError(f"{what}; {how_to_go_on(output_dir, 'mend that')}")


def system_fault(error: BaseException | None) -> InputError | RunError | None:
    """Return what the operating system refused: a path, a full disk, or too many open files.

    Args:
        error: An error; what it came from is looked at too.

    Returns:
        An `InputError` for a path, a `RunError` for a limit; None if it is neither.
    """
    while error is not None:
        if _TOO_MANY_FILES.search(str(error)) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            return RunError(
                "too many files are open for the limit of this machine: raise it (ulimit -n 4096), or lower "
                "dataloader_num_workers"
            )
        if isinstance(error, OSError) and error.errno in _PATHS and error.filename is not None:
            name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
            return InputError(
                f"{name} cannot be {'read or ' if error.errno in _READ else ''}written: {error.strerror}"
            )
        if isinstance(error, OSError) and error.errno in _FULL:
            place = error.filename or "what was being written"
            return RunError(
                f"the disk of {place} is full, or its quota or the largest size of a file is reached: free space, and start again"
            )
        error = error.__cause__
    return None


def _from_worker(error: Exception) -> InputError | RunError | None:
    found = _WORKERS_OWN.findall(str(error)) if str(error).startswith("Caught ") else []
    if not found:
        return None
    kind, message = found[-1]
    return InputError(message) if kind == "InputError" else RunError(message)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that something could not be written for want of room."""
    while error is not None:
        numbers = [int(number) for pair in _ERROR_NUMBER.findall(str(error)) for number in pair if number]
        if isinstance(error, OSError) and error.errno is not None:
            numbers.append(error.errno)
        if any(number in _FULL for number in numbers) or _TORCH_WRITE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(output_dir: str | Path, error: BaseException | None) -> RunError:
    """Return the error of a disk that is full, as this process found it, or another one."""
    # A cache may lie on another disk.
    place = getattr(error, "filename", None) or output_dir
    return RunError(
        f"the disk of {place} is full, or its quota or the largest size of a file is reached: "
        + how_to_go_on(output_dir, "free space")
    )


def stopped(output_dir: str | Path, step: int) -> StoppedError:
    """Return the error of a run that SIGTERM has stopped after a step."""
    checkpoint = last_whole_checkpoint(output_dir)
    how = "auto" if checkpoint is None else f"true (the last whole checkpoint is {checkpoint})"
    return StoppedError(f"stopped by SIGTERM after step {step}: start again with --resume_from_checkpoint {how}")


def nothing_trained(num_examples: int | None) -> RunError:
    """Return the error of a run that came to its end without a step."""
    examples = "the text" if num_examples is None else f"the text of {num_examples} examples"
    return RunError(
        f"no step was trained on {examples}, so nothing is exported: give more text, lower per_device_train_batch_size or "
        "gradient_accumulation_steps, or raise max_steps"
    )


def not_finite(output_dir: str | Path, what: str) -> RunError:
    """Return the error of numbers that are not finite.

    Args:
        output_dir: Folder of the run.
        what: Which are not, and when: "the loss is nan at step 7".
    """
    return RunError(f"{what}: " + how_to_go_on(output_dir, "lower learning_rate or lengthen warmup_steps"))


def how_to_go_on(output_dir: str | Path, remedy: str) -> str:
    """Return the end of a message: the remedy, and how the run goes on from its last whole checkpoint if there is one."""
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is None:
        return f"{remedy}, and start again with --resume_from_checkpoint auto (there is no whole checkpoint in {output_dir})"
    return f"{remedy}, and start again with --resume_from_checkpoint true (the last whole checkpoint is {checkpoint})"


def is_refused_by_a_library(error: BaseException) -> bool:
    """Whether transformers, accelerate, peft or torch refused something in their own code, as they refuse options."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, _REFUSALS)
        and bool(frames)
        and bool(_LIBRARIES.search(frames[-1].filename.replace(os.sep, "/")))
    )


@contextmanager
def refused_by_libraries(
    kinds: tuple[type[Exception], ...] = _REFUSALS, *, unless: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn what a library refuses while a model or a Trainer is made into an [`InputError`] with its sentence.

    Args:
        kinds: Errors that are taken for a refusal.
        unless: Asked after an error, whether it is too late for it to be about options.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, InputError | RunError) or is_full_disk(error)
        if known or not isinstance(error, kinds) or unless() or not is_refused_by_a_library(error):
            raise
        raise InputError(one_line(error)) from error
