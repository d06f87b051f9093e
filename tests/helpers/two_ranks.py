"""Runs a module of the tests on several ranks, which are forks of this process: they need no imports of their own."""

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState


def run_on_ranks(worker, folder, *, world_size):
    """Call `main(folder)` of a module of the tests on each rank.

    Args:
        worker: Name of the module; it finds its `RANK` and `WORLD_SIZE` in the environment.
        folder: Where it may write.
        world_size: Number of ranks, or several numbers for one group after another.
    """
    sizes = [world_size] if isinstance(world_size, int) else world_size
    log = Path(folder) / "ranks.log"
    if torch.cuda.is_available():
        # A process that has used a GPU can not be forked.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", __name__, worker, str(folder), *map(str, sizes)]
        with log.open("w") as stream:
            status = subprocess.run(command, env=environment, stdout=stream, stderr=stream).returncode
    else:
        status = fork_launcher(worker, folder, sizes, log)
    assert status == 0, log.read_text()[-4000:]


def run_on_two_ranks(worker, folder):
    """Call `main(folder)` of a module of the tests on each of two ranks."""
    run_on_ranks(worker, folder, world_size=2)


def fork_launcher(worker, folder, sizes, log):
    """Return the exit status of a forked process that runs all groups; its output goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    launcher = os.fork()
    if launcher:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
        except BaseException:
            os.killpg(launcher, signal.SIGKILL)
            raise
    status = 1
    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        # Nobody removes what this process makes for itself but pytest, with the folder.
        tempfile.tempdir = str(folder)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        status = run_groups(worker, folder, sizes)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run_groups(worker, folder, sizes):
    """Return 0 if all ranks of all groups come to their end, else 1; after a failure no group begins."""
    main = importlib.import_module(worker).main
    # A garbage collection of a rank then writes to no page that the ranks share.
    gc.freeze()
    return int(not all(fork_ranks(main, Path(folder), world_size=size) for size in sizes))


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
    sys.exit(run_groups(name, path, [int(count) for count in counts]))
