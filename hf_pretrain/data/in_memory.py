"""Datasets that a Trainer or `prepare_data` takes as objects: their splits, what their rows hold, and which column is text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow.compute as pc

from hf_pretrain.data.text.datasets import text_dataset
from hf_pretrain.errors import InputError, nearest

Rows = Literal["text", "documents", "tokens"]
"""What the rows of a dataset hold: text; documents as `tokenize_documents` makes them; or tokens of ready examples."""

DATASETS = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
_SPLITS = (datasets.DatasetDict, datasets.IterableDatasetDict)
_HELD_OUT = ("validation", "valid", "dev", "eval")
_TEXT_TYPES = ("string", "large_string", "string_view")
_DOCUMENT_COLUMNS = {"input_ids", "word_starts", "sent_starts"}


class Given(NamedTuple):
    """Text to train on and text held out, each with the one column ``text``; a stream keeps its columns."""

    train: Any
    held_out: datasets.Dataset | None
    text_column: str


def choose_splits(dataset: Any, eval_dataset: Any = None, *, split: str = "train") -> tuple[Any, Any]:
    """Return the part to train on and the part held out: of a `DatasetDict` its splits, of anything else itself.

    Args:
        dataset: A `DatasetDict`, or anything else.
        eval_dataset: The part held out; by default the split "validation" of the `DatasetDict`, if there is one.
        split: Name of the split to train on.

    Raises:
        InputError: If there is no such split.
    """
    if not isinstance(dataset, _SPLITS):
        return dataset, eval_dataset
    if split not in dataset:
        raise InputError(
            f"the dataset has the splits {', '.join(map(str, dataset))} and no {split!r}: give one of them, such as "
            f"train_dataset=dataset[{str(next(iter(dataset), 'train'))!r}]"
        )
    if eval_dataset is None:
        eval_dataset = next((dataset[name] for name in _HELD_OUT if name in dataset), None)
    return dataset[split], eval_dataset


def rows_of(dataset: Any) -> Rows:
    """Return what the rows of a `datasets.Dataset` or `IterableDataset` hold."""
    names = set(_columns(dataset))
    if names >= _DOCUMENT_COLUMNS:
        return "documents"
    return "tokens" if "input_ids" in names else "text"


def longest_row(dataset: datasets.Dataset) -> int:
    """Return the tokens of the longest row of a tokenised dataset."""
    batches = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return max((pc.max(pc.list_value_length(batch["input_ids"])).as_py() or 0 for batch in batches), default=0)


def find_text_column(dataset: Any, wanted: str = "text") -> str:
    """Return the column of text: the one that is wanted, or where that is only the default, the only one of text.

    Raises:
        InputError: If there is none, or more than one to choose from.
    """
    columns = _columns(dataset)
    if wanted in columns:
        return wanted
    found = [name for name, is_text in columns.items() if is_text]
    if wanted == "text" and len(found) == 1:
        return found[0]
    of_text = "none of them text" if not found else f"of text {', '.join(map(repr, found))}"
    hint = nearest(wanted, found, otherwise="name one of text") if wanted != "text" else "name one"
    raise InputError(
        f"text_column={wanted!r}: the dataset has the columns {', '.join(map(repr, columns))}, {of_text}: {hint} with "
        "data_args=DataArguments(text_column=...)"
    )


def given_texts(dataset: Any, eval_dataset: Any = None, *, text_column: str = "text", split: str = "train") -> Given:
    """Return the texts of datasets.

    Args:
        dataset: A `Dataset`, a `DatasetDict`, or a stream (`IterableDataset`) with a column of text; or a list of texts.
        eval_dataset: Another that is held out.
        text_column: Name of the column.
        split: Split of a `DatasetDict` to train on.

    Raises:
        InputError: If there is no such split or column, or what is held out is a stream.
    """
    dataset, eval_dataset = choose_splits(as_dataset(dataset), as_dataset(eval_dataset), split=split)
    check_held_out(eval_dataset)
    column = find_text_column(dataset, text_column)
    train = dataset if isinstance(dataset, datasets.IterableDataset) else text_dataset(dataset, text_column=column)
    if eval_dataset is None:
        return Given(train, None, column)
    held_out = text_dataset(eval_dataset, text_column=find_text_column(eval_dataset, text_column))
    return Given(train, held_out, column)


def check_held_out(dataset: Any) -> None:
    """Refuse a stream to evaluate on."""
    if isinstance(dataset, datasets.IterableDataset):
        raise InputError(
            "eval_dataset is a stream, and an evaluation has to have an end: give a datasets.Dataset, such as "
            "Dataset.from_list(list(stream.take(1000)))"
        )


def as_dataset(dataset: Any) -> Any:
    """Return a list of texts as a `datasets.Dataset`, and anything else as it is.

    Raises:
        InputError: If it is the name of a file or of a dataset.
    """
    if isinstance(dataset, str):
        raise InputError(
            f"train_dataset={dataset!r} is a name: load it first, with load_dataset('text', data_files=...) or "
            "prepare_data(DataArguments(train_file=[...]), ...)"
        )
    if isinstance(dataset, list | tuple) and dataset and all(isinstance(text, str) for text in dataset):
        return datasets.Dataset.from_dict({"text": list(dataset)})
    return dataset


def _columns(dataset: Any) -> dict[str, bool]:
    """Return the columns of a dataset, and whether each is of text; a stream without features is asked for its first row."""
    if dataset.features is not None:
        return {name: getattr(feature, "dtype", None) in _TEXT_TYPES for name, feature in dataset.features.items()}
    row: Mapping[str, Any] = next(iter(dataset.take(1)), {})
    return {name: isinstance(value, str) for name, value in row.items()}
