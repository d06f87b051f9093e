"""Runs a worker on two ranks: one process imports what it takes, which is most of the time, then forks into both."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch


def run_on_two_ranks(worker, folder):
    """Call `main(folder)` of a module of the tests on each of two ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, worker, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def run_rank(main, folder, *, rank, port):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, 2, 2, "127.0.0.1", port)), strict=True))
    status = 1
    try:
        main(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # The interpreter's exit can abort while gloo's threads still run; all results are on disk.
        os._exit(status)


def fork_ranks(main, folder):
    """Return whether both ranks came to their end; when one fails, the other would wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = set()
    for rank in range(2):
        process = os.fork()
        if process == 0:
            run_rank(main, folder, rank=rank, port=port)
        ranks.add(process)
    while ranks:
        process, status = os.wait()
        ranks.discard(process)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return False
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(not fork_ranks(importlib.import_module(sys.argv[1]).main, Path(sys.argv[2])))
