"""Runs commands on the ranks of a group, and writes how each has ended on each rank, with what it has printed.

`commands.json` of the folder has, for each number of ranks, a list of runs. A run is a name, the words of its command line, and
perhaps a fault: on a rank, at a step of fine-tuning, SIGTERM comes or the rank fails. Of a pre-training that is `late` the
first rank reports for so many seconds, while the others have ended.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from hf_pretrain.cli import main as run_command
from hf_pretrain.errors import RunError
from hf_pretrain.training import program
from hf_pretrain.transfer.fine_tuning import FineTuningTrainer

SECONDS = 200


def faulty(rank, at_step, kind):
    """Return a step of training that ends as a fault has it."""
    step = FineTuningTrainer.training_step

    def wrapped(trainer, *args, **kwargs):
        if int(os.environ.get("RANK", "0")) == rank and trainer.state.global_step == at_step:
            if kind == "fail":
                raise RunError("this rank has failed")
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    return wrapped


def run(argv, fault=None, late=0):
    if late:
        with mock.patch.object(program, "print_report", lambda trainer: time.sleep(late)):
            return run_command(argv)
    if fault is None:
        return run_command(argv)
    with mock.patch.object(FineTuningTrainer, "training_step", faulty(*fault)):
        return run_command(argv)


def main(folder):
    # Ranks that wait for each other for ever end too, and say where they wait.
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.stderr)
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    for entry in json.loads((Path(folder) / "commands.json").read_text())[size]:
        log = Path(folder) / f"{entry['name']}-{size}-{rank}"
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            with redirect_stdout(out), redirect_stderr(err):
                status = run(entry["argv"], entry.get("fault"), entry.get("late", 0))
        log.with_suffix(".json").write_text(json.dumps(status))


if __name__ == "__main__":
    # A rank of `accelerate launch`: the fault and the words of one command line.
    sys.exit(run(sys.argv[2:], json.loads(sys.argv[1])))
