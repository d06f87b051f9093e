"""What ends a run although its input is right, told in one line: what happened, what is left, and how it goes on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_pretrain.errors import InputError, RunError
from hf_pretrain.training.checkpoints import last_whole_checkpoint

# The disk, the quota of a user, the largest file that is allowed: one thing to whoever writes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and tokenizers raise kinds of their own, and a worker's error arrives as text.
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
# What torch.save raises when a write fell short; it does not say why.
_TORCH_WRITE = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc:\d+\] \. unexpected pos")
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
    died = _DEAD_WORKER.search(" ".join(str(error).split()))
    if isinstance(error, RuntimeError) and died:
        # torch speaks of it where the signal is that of a bus error.
        memory = "shared memory" if "shared memory" in str(error) else "memory"
        return RunError(
            f"a worker of the data loader died ({died[1]}), most often because {memory} ran out: "
            + how_to_go_on(output_dir, f"lower dataloader_num_workers or give more {memory}")
        )
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
