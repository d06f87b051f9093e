"""What the processes of a run have in common: who prepares first, how long one waits, and when all stop.

How a composite is divided where parameters are sharded (FSDP2), and whether it is.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_pretrain.errors import InputError, Terminated

_POLL_SECONDS = 0.5
_WORKER_SECONDS = 1.0
# All processes come to the same places in the same order.
_TURNS = itertools.count()


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


def set_timeout(args: TrainingArguments) -> None:
    """Let the processes wait for one another as long as `ddp_timeout` says, on a CPU too, where transformers forgets it."""
    if args.world_size > 1 and dist.is_initialized() and args.device.type == "cpu":
        distributed_c10d._set_pg_timeout(args.ddp_timeout_delta)


# Stopping


class Stopping:
    """What is done about SIGTERM: in training, a checkpoint and an end; before and after, an end at once."""

    def __init__(self) -> None:
        self.is_asked = False
        self.is_training = False
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take the signal."""
        if os.getpid() != self._process:
            # A worker, forked from this process.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.is_training and not self.is_asked:
            self.is_asked = True
            print("SIGTERM: saving a checkpoint after this step, then ending", file=sys.stderr, flush=True)
        else:
            workers = multiprocessing.active_children()
            for worker in workers:
                worker.terminate()
            for worker in workers:
                # A signal is lost that comes while a process is being forked.
                worker.join(_WORKER_SECONDS)
                worker.kill()
            raise Terminated


@contextmanager
def stopping_on_sigterm() -> Iterator[Stopping]:
    """Take SIGTERM for a while, see [`Stopping`]; the handler that was there comes back."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, stopping)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


class StopWhenAsked(TrainerCallback):
    """Ends training with a checkpoint after the step in which SIGTERM came, on all processes after the same step.

    Several processes tell each other at each step, beside the training: what was sent at one step is read at the next, so no
    step waits.

    Args:
        stopping: Notes the signal.
    """

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping
        self.has_begun = False
        self.has_stopped = False
        self._group: Any = None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signal from now on."""
        if args.world_size > 1:
            if not (dist.is_initialized() and dist.is_gloo_available()):
                return  # They could not stop together: SIGTERM ends each at once.
            self._group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        self.stopping.is_training = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that there is a first step."""
        self.has_begun = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if any process was asked to."""
        if self._any_asked():
            control.should_save = True
            control.should_training_stop = True
            self.has_stopped = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the signal to what comes after."""
        self.stopping.is_training = False
        self.has_stopped = self.has_stopped or self._received() or self.stopping.is_asked
        self._sent = None

    def _any_asked(self) -> bool:
        if self._group is None:
            return self.stopping.is_asked
        asked = self._received()
        flag = torch.tensor(int(self.stopping.is_asked))
        self._sent = (dist.all_reduce(flag, group=self._group, async_op=True), flag)
        return asked

    def _received(self) -> bool:
        """Return whether any process was asked at the step before."""
        if self._sent is None:
            return False
        self._sent[0].wait()
        return bool(self._sent[1])


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


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse a launch that asks for FSDP where accelerate leaves it out without a word: on a CPU, or for one process.

    Raises:
        InputError: If the parameters will not be shared out although that was asked for.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and getattr(accelerator.state, "fsdp_plugin", None) is None:
        raise InputError(
            "FSDP was asked for, but accelerate shares parameters out on several GPUs only, and here "
            f"num_processes={accelerator.num_processes} on device={accelerator.device.type!r}: launch with cpu.yaml, single.yaml "
            "or ddp.yaml"
        )


def check_batches(accelerator: Accelerator) -> None:
    """Refuse a launch in which processes share out each batch instead of taking turns with whole ones.

    Raises:
        InputError: If that was asked for.
    """
    if accelerator.split_batches:
        raise InputError(
            "accelerator_config: split_batches=True would make per_device_train_batch_size the batch of all processes together, "
            "and nothing here counts with that: leave it out, and divide that number by the processes"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a share of the parameters only (FSDP2, DeepSpeed's stage 3): then none can run the model alone.

    Args:
        model: The model, prepared for training.
    """
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in model.parameters())
