"""Results of a suite: one table of several models, and a file where a number stands beside the fingerprint of its weights.

[`write_results`] adds evaluations to a file, and leaves out what other weights of the same name gave. [`results_of`] returns
those that belong to the weights of a folder, for its card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import weights_digest, write_text
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
                cells.append(_number(evaluation.metrics.get(name), evaluation.deviation.get(name)))
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


def _number(value: float | None, deviation: float | None = None) -> str:
    spread = "" if deviation is None else f" ± {deviation:.3f}"
    return "" if value is None else f"{value:.3f}{spread}"


def is_results_file(content: Any) -> bool:
    """Whether the content of a JSON file is what [`write_results`] writes."""
    return isinstance(content, dict) and content.get("format") == _FORMAT


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a file of results: `models` and `weights`, both empty if there is no such file yet.

    Args:
        path: The file.

    Raises:
        InputError: If it is another file, or lies in no folder.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise InputError(f"output_file={str(path)!r} is in no folder: make it, or name another")
        return {"models": {}, "weights": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"output_file={str(path)!r} cannot be read: {one_line(error)}: name another file") from error
    if not is_results_file(content):
        raise InputError(f"output_file={str(path)!r} is no file of results: name another, nothing of it is changed")
    known = {name: content.get(name) or {} for name in ("models", "weights")}
    if not all(isinstance(part, dict) for part in known.values()):
        raise InputError(f"output_file={str(path)!r} is a damaged file of results: name another")
    return known


def write_results(
    path: Path, found: Mapping[str, Sequence[Evaluation]], *, weights: Mapping[str, str | None]
) -> list[str]:
    """Write results beside those that the file has; a result of the same model, task and split is replaced.

    Args:
        path: The file.
        found: Model -> its evaluations.
        weights: Model -> fingerprint of its weights; None if it is not known.

    Returns:
        What was left out, a line each: the results of a model whose weights are others now.

    Raises:
        InputError: If the file is no file of results.
    """
    content, lost = read_results(path), []
    models, known = content["models"], content["weights"]
    for name, evaluations in found.items():
        earlier = models.get(name, [])
        if earlier and known.get(name) != weights.get(name):
            lost.append(f"{len(earlier)} earlier results of {name} are left out: other weights gave them")
            earlier = []
        kept = {(entry["task"], entry["split"]): entry for entry in earlier}
        kept |= {(evaluation.task, evaluation.split): asdict(evaluation) for evaluation in evaluations}
        models[name], known[name] = list(kept.values()), weights.get(name)
    whole = {"format": _FORMAT, "versions": versions(), "weights": known, "models": models}
    write_text(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return lost


def results_of(content: Mapping[str, Any], folder: str | Path, *, source: str) -> list[Evaluation]:
    """Return the evaluations of a file of results that were measured on the weights of a folder.

    Args:
        content: Content of the file.
        folder: The folder.
        source: The file, for the messages.

    Raises:
        InputError: If none of the models in it has these weights, or an entry is not right.
    """
    models, weights = content.get("models"), content.get("weights")
    if not isinstance(models, dict) or not isinstance(weights, dict):
        raise InputError(
            f"evaluation={source!r} does not say which weights its numbers belong to: evaluate {folder} again"
        )
    digest = weights_digest(folder)
    names = [name for name in models if digest is not None and weights.get(name) == digest]
    if not names:
        listed = ", ".join(models) or "no model"
        raise InputError(
            f"evaluation={source!r} has no numbers of the weights in {folder} (it has {listed}): evaluate them first"
        )
    return [Evaluation.from_mapping(entry, source=source) for name in names for entry in models[name]]
