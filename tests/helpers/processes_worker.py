"""Two ranks wait for each other, stop together, and end with one line."""

import contextlib
import io
import json
import os
import time

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from helpers.method_matrix import build, programs
from hf_pretrain.cli import run_program
from hf_pretrain.errors import InputError, StoppedError
from hf_pretrain.training.processes import Stopping, first_process_first, set_timeout
from hf_pretrain.training.program import run


class AskOne(TrainerCallback):
    """Asks only the second process to stop."""

    def __init__(self, stopping):
        self.stopping = stopping

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            self.stopping.is_requested = True


def said(error):
    def program(argv):
        raise error

    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        assert run_program(program) == 2
    return stream.getvalue().splitlines()


def wait_at_most(trainer, seconds):
    trainer.args.ddp_timeout = seconds
    set_timeout(trainer.args)


def main(folder):
    rank = int(os.environ["RANK"])
    trainer = build(programs()["mlm"], folder / "out", per_device_train_batch_size=4, max_steps=8)
    # Shorter than the preparation of the first process.
    wait_at_most(trainer, 1)
    with first_process_first(trainer.args):
        if not rank:
            time.sleep(2)
        order = time.time()
    found = {"order": order}
    wait_at_most(trainer, 120)
    stopping = Stopping()
    trainer.add_callback(AskOne(stopping))
    try:
        run(trainer, (trainer.args,), stopping=stopping)
    except StoppedError:
        found["stopped"] = trainer.state.global_step
    found["said"] = said(InputError("of all ranks"))
    found["own"] = said(InputError("of rank 1")) if rank else []
    wait_at_most(trainer, 1)
    started = time.time()
    # Longer than the wait of the other process.
    time.sleep(4 * rank)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        found["timeout"] = str(error)
    found["waited"] = time.time() - started
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
