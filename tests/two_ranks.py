"""Runs a worker on several ranks: one process imports what it takes, which is most of the time, then forks into all."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch


def run_on_ranks(worker, folder, *, world_size):
    """Call `main(folder)` of a module of the tests on each rank.

    Args:
        worker: Name of the module; it finds its `RANK` and `WORLD_SIZE` in the environment.
        folder: Where it may write.
        world_size: Number of ranks, or several numbers for one group after another, which share the imports.
    """
    sizes = [world_size] if isinstance(world_size, int) else world_size
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, worker, str(folder), *map(str, sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def run_on_two_ranks(worker, folder):
    """Call `main(folder)` of a module of the tests on each of two ranks."""
    run_on_ranks(worker, folder, world_size=2)


def run_rank(main, folder, *, rank, world_size, port):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, world_size, world_size, "127.0.0.1", port)
    os.environ.update(zip(names, map(str, values), strict=True))
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


def fork_ranks(main, folder, *, world_size):
    """Return whether all ranks came to their end; when one fails, the others would wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = set()
    for rank in range(world_size):
        process = os.fork()
        if process == 0:
            run_rank(main, folder, rank=rank, world_size=world_size, port=port)
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
    name, path, *counts = sys.argv[1:]
    worker_main = importlib.import_module(name).main
    # all() stops at the first group that fails.
    sys.exit(not all(fork_ranks(worker_main, Path(path), world_size=int(count)) for count in counts))
