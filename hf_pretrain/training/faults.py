"""What ends a run although its input is right, told in one line: what happened, what is left, and how it goes on."""

from __future__ import annotations

import errno
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hf_pretrain.errors import InputError, RunError, StoppedError, one_line
from hf_pretrain.training.checkpoints import last_whole_checkpoint

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
