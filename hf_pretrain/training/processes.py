"""The processes of a run: how they wait for one another, stop together and share parameters, and what ends them.

A run ends by SIGTERM, a full disk, a dead worker, or numbers that are not finite. The error says in one line what happened,
what to do, and from which checkpoint the run goes on.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from safetensors import SafetensorError
from torch import nn
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, RunError, StoppedError, Terminated, one_line
from hf_pretrain.files import is_whole

_POLL_SECONDS = 0.5
_WORKER_SECONDS = 1.0
# All processes take their turns in the same order.
_TURNS = itertools.count()


def release_memory() -> None:
    """Give the system back what preparing the data needed: else Arrow and the C library keep it, in pieces too small for a step.

    Of C libraries only glibc has a call for it.
    """
    pa.default_memory_pool().release_unused()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)


# Waiting


@contextmanager
def first_process_first(args: TrainingArguments) -> Iterator[None]:
    """Let the first process do something while the others wait, however long it takes; then these do it too.

    A barrier would end the run after `ddp_timeout` seconds. Here the others only look now and then whether it is done.

    Args:
        args: Those of the run; all processes must come here equally often.
    """
    if args.world_size <= 1 or not dist.is_initialized():
        yield
        return
    store = distributed_c10d._get_default_store()
    key = f"hf_pretrain/first_process_first/{next(_TURNS)}"
    if args.process_index:
        while not store.check([key]):
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        if not args.process_index:
            store.set(key, "done")


def done_by_first(args: TrainingArguments, work: Callable[[], Any]) -> Any:
    """Let the first process do something while the others wait, and return what it returns on every process.

    Args:
        args: Those of the run; all processes must come here equally often.
        work: Called on the first process.

    Raises:
        InputError: The refusal of the first process, on every process.
        RunError: Likewise.
    """
    outcome: list[Any] = [None]
    with first_process_first(args):
        if args.process_index == 0:
            try:
                outcome = [work()]
            except (InputError, RunError) as error:
                outcome = [error]
    if args.world_size > 1:
        outcome = broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError | RunError):
        raise outcome[0]
    return outcome[0]


def set_timeout(args: TrainingArguments) -> None:
    """Let the processes wait for one another as long as `ddp_timeout` says, on a CPU too, where transformers forgets it."""
    # A run that fails must not wait for others as it ends.
    atexit.unregister(_part)
    if args.world_size > 1 and dist.is_initialized() and args.device.type == "cpu":
        distributed_c10d._set_pg_timeout(args.ddp_timeout_delta)


def part_at_exit() -> None:
    """Let the process leave its group when the interpreter ends; called at the end of a run that went well.

    Until then the group stays for what follows in the same processes, such as a next stage. A process that left at once and
    began the next run would meet the first process in the old group, and both would wait for ever.
    """
    atexit.unregister(_part)
    atexit.register(_part)


def _part() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# Stopping


class Stopping:
    """Takes SIGTERM. In training, a checkpoint is saved and the run ends; before and after, the run ends at once."""

    def __init__(self) -> None:
        self.is_requested = False
        self.is_training = False
        self.on_request: Callable[[], None] = lambda: None
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take the signal."""
        if os.getpid() != self._process:
            # A worker, forked from this process.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.is_training and not self.is_requested:
            self.is_requested = True
            self.on_request()
            print("SIGTERM: saving a checkpoint after this step, then ending", file=sys.stderr, flush=True)
        else:
            workers = multiprocessing.active_children()
            for worker in workers:
                worker.terminate()
            for worker in workers:
                # A signal is lost that comes while a process is being forked.
                worker.join(_WORKER_SECONDS)
                worker.kill()
                worker.join(_WORKER_SECONDS)
            raise Terminated


@contextmanager
def stopping_on_sigterm() -> Iterator[Stopping]:
    """Take SIGTERM for a while, see [`Stopping`]; the earlier handler comes back."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, stopping)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


class StopOnRequest(TrainerCallback):
    """Ends training with a checkpoint after the step in which SIGTERM came, on all processes after the same step.

    One process does nothing at a step before the signal. Several processes exchange a flag at each step, beside the training:
    they read at one step what was sent at the step before, so no step waits.

    Args:
        stopping: Notes the signal.
    """

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping
        self.has_stopped = False
        self._group: Any = None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signal from now on."""
        if args.world_size == 1:
            self.stopping.on_request = lambda: self._at_each_step(self._stop)
        elif dist.is_initialized() and dist.is_gloo_available():
            self._group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
            self._at_each_step(self._stop_together)
        else:
            return  # The processes could not stop together: SIGTERM ends each at once.
        self.stopping.is_training = True

    def _at_each_step(self, function: Callable[..., None]) -> None:
        self.on_step_end = function

    def _stop(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = self.has_stopped = True

    def _stop_together(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._received():
            self._stop(args, state, control)
        flag = torch.tensor(int(self.stopping.is_requested))
        self._sent = (dist.all_reduce(flag, group=self._group, async_op=True), flag)

    def _received(self) -> bool:
        """Return whether any process had the signal at the step before."""
        if self._sent is None:
            return False
        self._sent[0].wait()
        return bool(self._sent[1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the signal to what comes after."""
        self.stopping.is_training = False
        self.has_stopped = self.has_stopped or self._received() or self.stopping.is_requested
        self._sent = None


# Sharding


def check_launch(accelerator: Accelerator) -> None:
    """Refuse a launch that asks for FSDP where accelerate leaves it out without a word, or that splits each batch.

    Raises:
        InputError: If the parameters will not be shared out although the launch says so, or batches are split.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and getattr(accelerator.state, "fsdp_plugin", None) is None:
        raise InputError(
            "FSDP was asked for, but accelerate shares parameters out on several GPUs only, and here "
            f"num_processes={accelerator.num_processes} on device={accelerator.device.type!r}: launch with cpu.yaml, single.yaml "
            "or ddp.yaml"
        )
    if accelerator.split_batches:
        raise InputError(
            "accelerator_config: split_batches=True would make per_device_train_batch_size the batch of all processes together, "
            "and nothing here counts with that: leave it out, and divide that number by the processes"
        )


def sharding_of(args: TrainingArguments) -> str | None:
    """Return what shares the weights out among the processes, "FSDP" or "DeepSpeed", by the options and the launch; or None."""
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    return "DeepSpeed" if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None


def dropout_of_process(args: TrainingArguments) -> None:
    """Give each process dropout of its own: transformers seeds all alike. A resume restores each one's own state."""
    torch.manual_seed(draws.generator_seed(args.process_index, seed=args.seed, stream="dropout"))


def sharded_blocks(model: nn.Module) -> set[str]:
    """Return the names of the classes whose modules are sharded one by one: the blocks that share no parameter with others.

    Args:
        model: A composite of stock models.
    """
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    blocks: dict[str, bool] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            is_alone = all(owners[id(parameter)] == 1 for parameter in module.parameters())
            name = type(module).__name__
            blocks[name] = blocks.get(name, True) and is_alone
    return {name for name, is_alone in blocks.items() if is_alone}


@contextmanager
def sharded_by_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Let accelerate shard each block by itself and everything else together, while this is open.

    It would make units of the word embeddings too, and of what an architecture names in `_no_split_modules`. But FSDP takes a
    parameter into one unit only, and word tables are shared: by embeddings and head, by generator and discriminator. Some are
    read outside of their module as well, which must be while they are gathered; what is in no block is gathered from the
    beginning of the forward pass to the end of the backward pass.

    Args:
        model: A composite of stock models.
    """
    named = model._no_split_modules
    model._no_split_modules = sharded_blocks(model)
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings
        model._no_split_modules = named


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a share of the parameters only (FSDP2, DeepSpeed's stage 3): then none can run the model alone.

    Args:
        model: The model, prepared for training.
    """
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in model.parameters())


# Faults


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


# The disk, the quota of a user, the largest file that is allowed: one thing to whoever writes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_IS_FULL = "the disk of {} is full, or its quota or the largest size of a file is reached: "
# safetensors and tokenizers raise kinds of their own, and a worker's error arrives as text.
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
# What torch.save raises when a write fell short; it does not say why.
_TORCH_WRITE = re.compile(
    r"PytorchStreamWriter failed writing|basic_ios::clear|inline_container\.cc:\d+\] \. unexpected pos"
)
# What gloo, NCCL and their store say of a process that is gone, or silent.
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
            return RunError(
                _DISK_IS_FULL.format(error.filename or "what was being written") + "free space, and start again"
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
    name = getattr(error, "filename", None) or output_dir
    return RunError(_DISK_IS_FULL.format(name) + how_to_go_on(output_dir, "free space"))


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
        unless: Called after an error; whether it is too late for it to be about options.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, InputError | RunError) or is_full_disk(error)
        if known or not isinstance(error, kinds) or unless() or not is_refused_by_a_library(error):
            raise
        raise InputError(one_line(error)) from error
