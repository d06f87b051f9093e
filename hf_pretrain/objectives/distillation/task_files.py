"""Rows of a task as they lie in files, or in a dataset that has a name."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation.arguments import Task
from hf_pretrain.objectives.distillation.question_examples import read_squad

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Nothing is a missing value: "null" and "NA" are words.
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}


def read_files(paths: Sequence[str], task: Task, *, option: str) -> datasets.Dataset:
    """Read the rows of files of one kind.

    Args:
        paths: Tables with a header, JSON lines or Parquet; of questions also files of SQuAD's form.
        task: What the rows are examples of.
        option: The option that names them, for messages.

    Raises:
        InputError: If one is missing, or they cannot be read.
    """
    missing = next((path for path in paths if not Path(path).is_file()), None)
    if missing is not None:
        raise InputError(f"{option}={missing!r} is no file")
    kinds = {Path(path).suffix.lower() for path in paths}
    if len(kinds) != 1 or not kinds <= _READERS.keys():
        raise InputError(f"{option}={list(paths)} must be files of one kind: {', '.join(_READERS)}")
    if task == "question-answering" and kinds == {".json"}:
        parts = [part for path in paths if (part := read_squad(path)) is not None]
        if len(parts) == len(paths):
            return datasets.concatenate_datasets(parts)
    reader, options = _READERS[kinds.pop()]
    try:
        return datasets.load_dataset(reader, data_files=list(paths), split="train", **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        if "corresponds to no data" in reason:
            reason = "there is no example in it"
        raise InputError(f"{option}={list(paths)} cannot be read as {reader}: {reason}") from error


def load_split(name: str, config_name: str | None, *, split: str) -> datasets.Dataset:
    """Load a split of a dataset of the Hub, or of a folder; raise InputError if that fails."""
    try:
        return datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"dataset_name={name!r} ({split=}) cannot be loaded: {reason}") from error
