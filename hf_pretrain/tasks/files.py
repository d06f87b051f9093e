"""Rows of a task from files or from a dataset with a name; nothing here knows a tokenizer.

[`read_files`] reads tables, JSON and Parquet through `datasets`, tables without a header and files of SQuAD's form
too; [`load_split`] loads a split of the Hub or of a folder. [`find_texts`] and [`find_label`] know the usual names of
columns. Each failure is one line that names the option and the cause.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets.exceptions import DatasetGenerationError

from hf_pretrain.data.text.lines import open_bytes, readable
from hf_pretrain.errors import InputError, one_line
from hf_pretrain.modeling.loading import without_bars
from hf_pretrain.options import number_or_text

Task = Literal["sequence-classification", "token-classification", "question-answering"]
Kind = Task | Literal["multiple-choice"]

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # No text is a missing value: "null" and "NA" are words.
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_HEADERS = {2: ["sentence", "label"], 3: ["sentence1", "sentence2", "label"]}
# CoLA's files: where a sentence is from, 0 or 1, a star or nothing, the sentence.
_COLA = ["source", "label", "star", "sentence"]
# Columns of texts by their usual names, in tiers: a name of the first tier makes the second one unimportant.
_USUAL_TEXTS: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "sequence-classification": (
        (
            ("sentence1", "sentence2"),
            ("premise", "hypothesis"),
            ("question1", "question2"),
            ("question", "sentence"),
            ("question", "context"),
            ("question", "passage"),
            ("text1", "text2"),
            ("#1 String", "#2 String"),
            ("sentence",),
            ("text",),
            ("review",),
        ),
    ),
    "token-classification": ((("tokens",), ("words",)), (("sentence",), ("text",))),
    "question-answering": ((("question", "context"),),),
    "multiple-choice": (),
}
_USUAL_LABELS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("label", "labels", "gold_label", "is_duplicate", "Quality", "sentiment"),
    "token-classification": ("labels", "tags", "ner_tags", "pos_tags"),
    "question-answering": ("answers",),
    "multiple-choice": ("label", "labels"),
}
_USUAL_VALUES = ("score", "label", "labels")
# Rows in which a class of the first line comes again.
_ROWS_TO_LOOK_AT = 1000


@cache
def _say(line: str) -> None:
    """Print a line once, though the files are read again."""
    print(line, flush=True)


def read_files(
    paths: Sequence[str],
    task: Kind,
    *,
    option: str,
    names: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Read the rows of files of one kind.

    A table begins with a header. A table of sentences or pairs, each with a class in the last column, needs none. Its
    columns are then called `sentence`, or `sentence1` and `sentence2`, and `label`; this is printed. CoLA's files need none
    either.

    Args:
        paths: Tables, JSON lines, JSON arrays or Parquet, also compressed by gzip, bzip2 or xz; of questions also
            files of SQuAD's form.
        task: The task of the rows.
        option: The option that names them, for messages.
        names: Names of columns beside the usual ones; a first line with any of these is a header.
        columns: Names of all columns of tables without a header.

    Raises:
        InputError: If one is missing, or they cannot be read, or `columns` does not fit.
    """
    missing = next((path for path in paths if not Path(path).is_file()), None)
    if missing is not None:
        raise InputError(f"{option}={missing!r} is no file")
    kinds = {kind_of(path) for path in paths}
    if len(kinds) != 1 or not kinds <= _READERS.keys():
        raise InputError(
            f"{option}={list(paths)} must be files of one kind: {', '.join(_READERS)}, also with .gz, .bz2, .xz"
        )
    if task == "question-answering" and kinds == {".json"}:
        parts = [part for path in paths if (part := read_squad(path)) is not None]
        if len(parts) == len(paths):
            return datasets.concatenate_datasets(parts)
    reader, options = _READERS[kinds.pop()]
    if columns is not None:
        _check_names(paths, columns, option=option, **options)
        options = options | {"names": list(columns)}
    elif reader == "csv" and task == "sequence-classification":
        options = options | _names_of_columns(paths, option=option, names=[*names, *usual_names(task)], **options)
    try:
        with without_bars():
            return datasets.load_dataset(reader, data_files=list(paths), split="train", **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = one_line(cause, line=0)
        reason = "there is no example in it" if "corresponds to no data" in reason else reason
        raise InputError(f"{option}={list(paths)} cannot be read as {reader}: {reason}") from error


def kind_of(path: str) -> str:
    """Return the suffix of a file's format, without that of a compression."""
    name = Path(path.lower())
    return name.with_suffix("").suffix if name.suffix in _COMPRESSED else name.suffix


def _names_of_columns(paths: Sequence[str], *, option: str, names: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return names for the columns of tables without a header, nothing for tables with one.

    Raises:
        InputError: If some have a header and others not.
    """
    headers = [_header_of(path, names, **options) for path in paths]
    if all(header is None for header in headers):
        return {}
    for path, header in zip(paths, headers, strict=True):
        if header != headers[0]:
            raise InputError(
                f"{option}={list(paths)}: {path} has another header than {paths[0]}; give all the same one"
            )
    if os.environ.get("RANK", "0") == "0":
        _say(f"{option}: {', '.join(paths)} without a header, taken for {', '.join(headers[0] or [])}")
    return {"names": headers[0]}


def _check_names(paths: Sequence[str], columns: Sequence[str], *, option: str, **options: Any) -> None:
    """Refuse names of columns for files that are no tables, have another number of columns, or begin with these names."""
    for path in paths:
        rows = _first_rows(path, **options) if kind_of(path) in (".tsv", ".csv") else None
        if rows is None:
            continue
        if len(rows[0]) != len(columns):
            raise InputError(
                f"{option}={path!r} has {len(rows[0])} columns, but columns={list(columns)} names {len(columns)}: name them all"
            )
        if rows[0] == list(columns):
            raise InputError(f"{option}={path!r} has a header, so leave columns={list(columns)} out")
    if kind_of(paths[0]) not in (".tsv", ".csv"):
        raise InputError(
            f"columns={list(columns)}: {paths[0]!r} is no table, and has names already: leave columns out"
        )


def _first_rows(path: str, *, delimiter: str = ",", **options: Any) -> list[list[str]] | None:
    """Return the first rows of a table, None if it has none or cannot be read."""
    begin = _COMPRESSED.get(Path(path).suffix.lower(), open)
    quoting = options.get("quoting", csv.QUOTE_MINIMAL)
    try:
        with begin(path, "rt", encoding="utf-8-sig", newline="") as stream:
            rows = list(itertools.islice(csv.reader(stream, delimiter=delimiter, quoting=quoting), _ROWS_TO_LOOK_AT))
    except (OSError, ValueError, EOFError, lzma.LZMAError, csv.Error):
        return None  # The reader says what is wrong.
    return [row for row in rows if row] or None


def _header_of(path: str, names: Sequence[str], **options: Any) -> list[str] | None:
    """Return the header that a table of sentences lacks, None if it has one or cannot be read."""
    rows = _first_rows(path, **options)
    known = {name.lower() for name in names}
    if rows is None or {cell.lower() for cell in rows[0]} & known or any(len(row) != len(rows[0]) for row in rows):
        return None
    if len(rows[0]) == len(_COLA) and all(row[1] in ("0", "1") and row[2] in ("", "*") for row in rows):
        return _COLA
    *texts, label = rows[0]
    has_text = all(any(character.isalpha() for character in text) for text in texts)
    is_label = isinstance(number_or_text(label), float) or label in (row[-1] for row in rows[1:])
    return _HEADERS.get(len(rows[0])) if has_text and is_label else None


def usual_names(task: Kind) -> list[str]:
    """Return all usual names of columns of a task: by one of them the first line of a table is seen to be a header."""
    texts = [name for tier in _USUAL_TEXTS[task] for names in tier for name in names]
    values = _USUAL_VALUES if task == "sequence-classification" else ()
    return list(dict.fromkeys([*texts, *_USUAL_LABELS[task], *values]))


def find_texts(task: Kind, columns: Iterable[str], *, advice: str) -> tuple[str, ...] | None:
    """Return the columns of texts that have usual names, whichever letters are capitals; None if there are none.

    Args:
        task: The task.
        columns: The columns that there are.
        advice: How to choose, for the message: "choose with --text_columns".

    Raises:
        InputError: If several could be meant, such as `sentence` and `text`. Of names in a pair, the pair is meant.
    """
    known = _by_small_letters(columns)
    for tier in _USUAL_TEXTS[task]:
        found = [names for names in tier if all(name.lower() in known for name in names)]
        found = [names for names in found if not any(set(names) < set(other) for other in found)]
        if len(found) > 1:
            shown = ", or ".join(" and ".join(known[name.lower()] for name in names) for names in found)
            raise InputError(f"several columns have usual names of texts, {shown}: {advice}")
        if found:
            return tuple(known[name.lower()] for name in found[0])
    return None


def find_label(task: Kind, columns: Iterable[str], *, advice: str, is_value: bool = False) -> str | None:
    """Return the column of labels that has a usual name, whichever letters are capitals; None if there is none.

    Args:
        task: The task.
        columns: The columns that there are.
        advice: How to choose, for the message.
        is_value: Whether texts have values instead of classes.

    Raises:
        InputError: If several could be meant, such as `ner_tags` and `pos_tags`.
    """
    known = _by_small_letters(columns)
    usual = usual_labels(task, is_value=is_value)
    found = list(dict.fromkeys(known[name.lower()] for name in usual if name.lower() in known))
    if len(found) > 1:
        raise InputError(f"several columns have usual names of labels, {', or '.join(found)}: {advice}")
    return found[0] if found else None


def usual_labels(task: Kind, *, is_value: bool = False) -> tuple[str, ...]:
    """Return the usual names of the column of labels, or of values."""
    return _USUAL_VALUES if is_value else _USUAL_LABELS[task]


def _by_small_letters(columns: Iterable[str]) -> dict[str, str]:
    """Return names by what they are in small letters; the first one of those that are the same then."""
    return {name.lower(): name for name in reversed(list(columns))}


def column_names(path: str | Path, *, names: Sequence[str] = ()) -> list[str]:
    """Return the names of the columns of a file of texts with classes or values, as [`read_files`] gives them, at once.

    Args:
        path: A table, JSON lines or a Parquet file; of any other file there are none.
        names: Names of columns beside the usual ones; a first line with any of these is a header.
    """
    kind = kind_of(str(path))
    reader, options = _READERS.get(kind, ("", {}))
    if reader == "parquet":
        import pyarrow.parquet

        with readable(path):
            return list(pyarrow.parquet.read_schema(path).names)
    if reader == "json":
        with readable(path), open_bytes(str(path)) as file:
            line = file.readline().decode("utf-8-sig", errors="replace")
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        return list(row) if isinstance(row, dict) else []
    rows = _first_rows(str(path), **options) if reader == "csv" else None
    known = [*names, *usual_names("sequence-classification")]
    return [] if rows is None else _header_of(str(path), known, **options) or rows[0]


def load_split(name: str, config_name: str | None, *, split: str) -> datasets.Dataset:
    """Load a split of a dataset of the Hub, or of a folder; raise InputError if that fails."""
    try:
        return datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError) as error:
        raise InputError(f"dataset_name={name!r} ({split=}) cannot be loaded: {one_line(error, line=0)}") from error


def read_squad(path: str) -> datasets.Dataset | None:
    """Read a file of SQuAD's form, articles of paragraphs of questions; None if it has another form.

    Returns:
        Rows of `question`, `context`, the `title` of the article, and, unless no question has any, `answers`: `text` and
        `answer_start`.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = list(_questions(whole["data"])) if isinstance(whole, dict) else []
    except (ValueError, KeyError, TypeError):
        return None
    if rows and not any(row["answers"] is not None for row in rows):
        rows = [{name: value for name, value in row.items() if name != "answers"} for row in rows]
    return datasets.Dataset.from_list(rows) if rows else None


def _questions(articles: list[Any]) -> Iterator[dict[str, Any]]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                answers = entry.get("answers")
                if answers is not None:
                    answers = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
                found = {"question": entry["question"], "context": paragraph["context"], "answers": answers}
                yield found | {"title": article.get("title")}
