"""Programs in processes that have imported neither this library nor transformers, but much of what those import.

A process of its own takes ten seconds to import transformers. These are forked from one that has the packages below.
"""

import multiprocessing
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.tensor",
        "accelerate",
        "scipy.optimize",
        "sklearn.metrics",
        "tokenizers",
    ]
)
WITHOUT_LIBRARY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_pretrain":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
"""
"""Begins a program for which this library is not installed."""

# Neither the caller's modules nor its standard streams reach a program.
_PROGRAM = """
import contextlib, os, sys, traceback
import torch
# A child has the path of its parent, where transformers adds the folder of the remote code that it has loaded.
sys.path[:] = [folder for folder in sys.path if not os.path.isdir(os.path.join(folder, "transformers_modules"))]
# As in the tests: another number of threads adds numbers up in another order.
torch.set_num_threads(1)
already = [name for name in sys.modules if name.partition(".")[0] in ("hf_pretrain", "transformers", "transformers_modules")]
assert not already, already
with open({log!r}, "w") as log, contextlib.redirect_stdout(log):
    try:
        exec({program!r}, {{"__name__": "__main__"}})
    except BaseException:
        traceback.print_exc(file=log)
"""


def run_fresh(programs: dict[str, str], folder: Path) -> dict[str, str]:
    """Run programs side by side and return what each has printed, with its traceback if it failed."""
    logs = {name: folder / f"{name}.log" for name in programs}
    processes = [
        _CONTEXT.Process(target=exec, args=(_PROGRAM.format(log=str(logs[name]), program=program), {}))
        for name, program in programs.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return {name: log.read_text() for name, log in logs.items()}
