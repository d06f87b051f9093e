"""Results of a suite: one table of several models, and a file of results that more can be added to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import write_text
from hf_pretrain.hub.environment import versions
from hf_pretrain.hub.evaluation import Evaluation

_FORMAT = "hf_pretrain evaluation"


def table_of(found: Mapping[str, Sequence[Evaluation]], labels: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table of all models, a metric a row, and its header.

    Args:
        found: Model -> evaluations of the same tasks.
        labels: Name of each model in the table.
    """
    rows: list[list[str]] = []
    for evaluations in zip(*found.values(), strict=True):
        names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
        for name in names:
            first = evaluations[0]
            counts = {evaluation.num_examples for evaluation in evaluations}
            cells = [first.task if name == names[0] else "", name]
            cells.append(" / ".join(f"{count:,}" for count in sorted(counts)) if name == names[0] else "")
            for evaluation in evaluations:
                cells.append(_number(evaluation.metrics.get(name)))
                cells.append(_number(evaluation.baseline.get(name)))
            rows.append(cells)
    columns = [column for label in labels for column in (label, "baseline")]
    return _without_repeats(rows, ["task", "metric", "examples", *columns])


def _without_repeats(rows: list[list[str]], header: list[str]) -> tuple[list[list[str]], list[str]]:
    """Leave out columns of baselines that are empty, and those that are all the same but the last."""
    drop, seen = set(), set()
    for column in reversed(range(4, len(header), 2)):
        content = tuple(row[column] for row in rows)
        if content in seen or not any(content):
            drop.add(column)
        seen.add(content)
    return [[cell for i, cell in enumerate(row) if i not in drop] for row in rows], [
        cell for i, cell in enumerate(header) if i not in drop
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def write_results(path: Path, found: Mapping[str, Sequence[Evaluation]]) -> Path:
    """Write results beside those that the file has; a result of the same model, task and split is replaced.

    Raises:
        InputError: If the file is no file of results.
    """
    models = read_results(path)
    for name, evaluations in found.items():
        kept = {(entry["task"], entry["split"]): entry for entry in models.get(name, [])}
        kept |= {(evaluation.task, evaluation.split): asdict(evaluation) for evaluation in evaluations}
        models[name] = list(kept.values())
    content = {"format": _FORMAT, "versions": versions(), "models": models}
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_results(path: Path) -> dict[str, list[Any]]:
    """Return the results that a file has, by model; {} where there is no file yet.

    Raises:
        InputError: If the file is no file of results, or lies in no folder.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise InputError(f"output_file={str(path)!r} is in no folder: make it, or name another")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"output_file={str(path)!r} cannot be read: {one_line(error)}: name another file") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"output_file={str(path)!r} is no file of results: name another, nothing of it is changed")
    models: dict[str, list[Any]] = content["models"]
    return models
