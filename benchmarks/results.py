"""A file of measured runs, one row each, that several processes may fill."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_pretrain.errors import InputError


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add_result(path: Path, row: dict[str, Any]) -> None:
    """Add a row; other processes may be adding theirs."""
    with FileLock(f"{path}.lock"):
        rows = [*read_results(path), row]
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        fresh.replace(path)


def run_once(path: Path, arm: str, seed: int, *, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Run an arm with a seed and add what was measured as a row, unless there is one with these settings."""
    done = [(row["arm"], row["seed"], row["settings"]) for row in read_results(path)]
    if (arm, seed, settings) not in done:
        add_result(path, {"arm": arm, "seed": seed} | run() | {"settings": settings})


def rows_by_settings(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each set of settings, which belong in one table.

    Raises:
        InputError: If there is no row.
    """
    tables: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_results(path):
        tables[json.dumps(row["settings"])].append(row)
    if not tables:
        raise InputError(f"results={path} has no row: run some arms first")
    return tables


def mean_and_spread(values: Sequence[float], places: int) -> str:
    """Return mean and standard deviation as a table shows them: the mean alone where all values are equal."""
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"
