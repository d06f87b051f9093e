"""Runs that are killed, or find the disk full, on the way: one process imports what programs take and forks into each run.

A run reports its actions, each as a word and a path: `open`, `rename`, `remove` and `mkdir` before they happen, `half` when
half of a file of tensors lies on the disk, `step` before a step, `push` before an upload. A fault is a pattern of such a
report, and the number of its occurrences.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

SECONDS = 240
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir"}


class Fault(NamedTuple):
    """What happens to a run, and where."""

    at: str
    times: int = 1
    disk_is_full: bool = False
    """Let no file grow from then on; otherwise the process is killed."""
    rank: int = 0


class Ended(NamedTuple):
    """How a run ended: the exit status of each process, or the negative number of the signal that killed the run."""

    statuses: list[int]
    output: str


class KilledRuns:
    """Starts runs of `hf-pretrain mlm`; use it as a context."""

    def __init__(self, folder):
        self.folder = folder
        self.count = 0

    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment |= {"HF_DATASETS_CACHE": str(self.folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, "-m", __name__], env=environment, **pipes)
        return self

    def __exit__(self, *error):
        # A word, for the end of the pipe would not come while a worker that a test has forked still holds it open.
        print(json.dumps(None), file=self.server.stdin, flush=True)
        self.server.wait()
        self.server.stdin.close()
        self.server.stdout.close()

    def run(self, *argv, fault=None, world_size=1):
        """Run a program to its end, whatever that is."""
        self.count += 1
        log = self.folder / f"run-{self.count}.log"
        order = {"argv": [str(word) for word in argv], "fault": fault, "world_size": world_size, "log": str(log)}
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return Ended(json.loads(self.server.stdout.readline()), log.read_text(encoding="utf-8"))


class _Watch:
    def __init__(self, at, times, disk_is_full, rank):
        self.at, self.left, self.disk_is_full, self.rank = re.compile(at), times, disk_is_full, rank

    def saw(self, word, path=""):
        if self.left and int(os.environ.get("RANK", 0)) == self.rank and self.at.search(f"{word} {path}"):
            self.left -= 1
            if not self.left:
                self.strike()

    def strike(self):
        if not self.disk_is_full:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))

    def audit(self, event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            self.saw("open", args[0])
        elif event in _EVENTS:
            self.saw(_EVENTS[event], args[1] if event == "os.rename" else args[0])


def _watched(watch):
    """Let the run tell what it does."""
    import safetensors.torch
    import torch
    from transformers import Trainer

    from hf_pretrain.hub.pushing import Pushing
    from hf_pretrain.training import program
    from hf_pretrain.training.trainer import PretrainingTrainer

    def halved(write, place):
        def wrapped(*args, **kwargs):
            write(*args, **kwargs)
            path = Path(args[place])
            whole = path.read_bytes()
            if watch.at.search(f"half {path}"):
                path.write_bytes(whole[: len(whole) // 2])
            watch.saw("half", path)
            path.write_bytes(whole)

        return wrapped

    def step(self, *args, **kwargs):
        watch.saw("step")
        return training_step(self, *args, **kwargs)

    def upload(self, folder, **options):
        watch.saw("push", folder)
        done = Future()
        done.set_result(None)
        return done

    def open_repository(self, **options):
        self.hub_model_id = "tester/model"

    training_step, Trainer.training_step = Trainer.training_step, step
    torch.save = halved(torch.save, 1)
    safetensors.torch.serialize_file = halved(safetensors.torch.serialize_file, 1)
    Pushing.upload, PretrainingTrainer.init_hf_repo = upload, open_repository
    program.repository_of = lambda args: "tester/model"
    sys.addaudithook(watch.audit)


def _run(order, folder=None):
    """Run on this process, of one or several; its status is written beside the log."""
    import torch

    from hf_pretrain.cli import run_program
    from hf_pretrain.objectives.encoder import MASKED_LM as mlm

    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    _watched(_Watch(*(order["fault"] or Fault("nothing"))))
    status = run_program(mlm.run, order["argv"])
    sys.stdout.flush()
    Path(f"{order['log']}.{os.environ.get('RANK', 0)}").write_text(str(status))


def _fork(order):
    """Return how a run ended."""
    from helpers.two_ranks import fork_ranks

    process = os.fork()
    if not process:
        status = 1
        try:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if order["world_size"] == 1:
                _run(order)
            else:
                signal.alarm(SECONDS)
                fork_ranks(lambda folder: _run(order), None, world_size=order["world_size"])
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(process, 0)
    written = [Path(f"{order['log']}.{rank}") for rank in range(order["world_size"])]
    statuses = [int(path.read_text()) for path in written if path.exists()]
    return [-os.WTERMSIG(ended)] if os.WIFSIGNALED(ended) else statuses


def _serve():
    # What a run imports, and what it does only once: none of it may depend on the run.
    import matplotlib.pyplot  # noqa: F401

    import hf_pretrain.hub.plots  # noqa: F401
    import hf_pretrain.objectives.encoder  # noqa: F401

    for order in map(json.loads, sys.stdin):
        if order is None:
            break
        print(json.dumps(_fork(order)), flush=True)


if __name__ == "__main__":
    _serve()
