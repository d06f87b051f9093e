"""Side-by-side measurement: every side in one process, in turn, best of several rounds; memory in a forked child."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from typing import Any


def as_trained(side: str) -> AbstractContextManager[None]:
    """Return the context in which our Trainers compute a step, where the name of a side says that it is ours."""
    if not side.startswith("ours"):
        return nullcontext()
    # Few benchmarks compute steps.
    import torch  # noqa: PLC0415

    from hf_pretrain.modeling.kernels import fast_dropout  # noqa: PLC0415

    return fast_dropout(torch.device("cpu"), is_compiled="compile" in side)


def interleaved(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    turn_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time several functions in turn, so that what slows the machine for a while slows all of them.

    Args:
        sides: Functions by name.
        repeats: Rounds; in each, every side has one turn, and the order is reversed from round to round.
        turn_seconds: How long a turn lasts at least: a side is called until then, once if 0. On a busy machine a short
            call often runs undisturbed and a long one never does; turns of one length are disturbed alike.
        clock: Tells the seconds; `time.process_time` those of the processor.

    Returns:
        The seconds a call of each side took in its best turn.
    """
    best = dict.fromkeys(sides, float("inf"))
    for number in range(repeats):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            best[name] = min(best[name], _turn(sides[name], turn_seconds, clock))
    return best


def _turn(run: Callable[[], Any], turn_seconds: float, clock: Callable[[], float]) -> float:
    begin, calls, elapsed = clock(), 0, 0.0
    while calls == 0 or elapsed < turn_seconds:
        run()
        calls += 1
        elapsed = clock() - begin
    return elapsed / calls


def print_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> None:
    """Print a table in Markdown: floats with three significant digits, columns padded to one width."""
    cells = [list(headers), *([_show(value) for value in row] for row in rows)]
    _print_cells(cells, [max(len(row[column]) for row in cells) for column in range(len(headers))])


def print_rows(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> None:
    """Print such a table row by row, each as soon as it is there; columns are as wide as their headers."""
    cells = itertools.chain([list(headers)], ([_show(value) for value in row] for row in rows))
    _print_cells(cells, [max(len(header), 6) for header in headers])


def _print_cells(cells: Iterable[Sequence[str]], widths: Sequence[int]) -> None:
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|", flush=True)


def options_parser(description: str | None, **numbers: float) -> argparse.ArgumentParser:
    """Return the parser of a program that measures.

    Args:
        description: What the program does, for its help.
        **numbers: Options by name that are numbers, with their defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def load_of_machine() -> str:
    """Return how busy the machine is, in words."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"load of the machine: {load} on {os.cpu_count()} cores"


def peak_memory(fn: Callable[[], Any]) -> float:
    """Run a function in a forked child and return by how much it raised the child's peak resident memory.

    Pages of memory-mapped files that were touched count. Call it before the function has run in this process: memory
    that this process has freed would be reused by the child unseen.

    Args:
        fn: The function; its result is dropped.

    Returns:
        The rise of ``ru_maxrss`` in MiB.

    Raises:
        RuntimeError: If the function failed in the child.
    """
    return float(in_child(lambda: _rise_of_resident(fn)))


def in_child(fn: Callable[[], Any]) -> Any:
    """Run a function in a forked child and return what it returns.

    Raises:
        RuntimeError: If the function failed in the child.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_and_send, args=(fn, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"{fn} failed in the child process; its error is printed above") from error
    finally:
        child.join()


def _run_and_send(fn: Callable[[], Any], sender: Connection) -> None:
    sender.send(fn())


def _rise_of_resident(fn: Callable[[], Any]) -> float:
    before = _max_resident_mib()
    fn()
    return _max_resident_mib() - before


def _max_resident_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _show(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
