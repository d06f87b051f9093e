"""A file of measured runs, one row each, that several processes may fill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock


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
