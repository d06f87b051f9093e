"""Rows of a task as they lie in files, or in a dataset that has a name.

The examples of a task: sentences, pairs, words or questions, with or without labels, from files or a dataset.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.data.prepare import PreparedData, RepeatableTexts, check_unknown, count_unknown
from hf_pretrain.data.text.docstrings import split_held_out
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import from_pretrained
from hf_pretrain.options import option
from hf_pretrain.tasks.augmentation import TEXT, AugmentationArguments, augment
from hf_pretrain.tasks.examples import encode, encode_tokens
from hf_pretrain.tasks.questions import encode_questions, read_squad
from hf_pretrain.tasks.words import WordNeighbours

Task = Literal["sequence-classification", "token-classification", "question-answering"]


_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Nothing is a missing value: "null" and "NA" are words.
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_HEADERS = {2: ["sentence", "label"], 3: ["sentence1", "sentence2", "label"]}
# Enough to see a class come again.
_ROWS_TO_LOOK_AT = 1000


def read_files(paths: Sequence[str], task: Task, *, option: str, names: Sequence[str] = ()) -> datasets.Dataset:
    """Read the rows of files of one kind.

    A table begins with a header. One of sentences, or of pairs, with a class behind them may do without: then its columns are
    called `sentence`, or `sentence1` and `sentence2`, and `label`, which is printed.

    Args:
        paths: Tables, JSON lines, JSON arrays or Parquet, also compressed by gzip, bzip2 or xz; of questions also files of
            SQuAD's form.
        task: What the rows are examples of.
        option: The option that names them, for messages.
        names: Columns that may be asked for; a first line with one of these is a header.

    Raises:
        InputError: If one is missing, or they cannot be read.
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
    if reader == "csv" and task == "sequence-classification":
        options = options | _names_of_columns(paths, option=option, names=names, **options)
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


def kind_of(path: str) -> str:
    """Return the suffix that says what a file holds, without that of a compression."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


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
        print(f"{option}: {', '.join(paths)} without a header, taken for {', '.join(headers[0] or [])}", flush=True)
    return {"names": headers[0]}


def _header_of(path: str, names: Sequence[str], *, delimiter: str = ",", **options: Any) -> list[str] | None:
    """Return the header that a table of sentences lacks, None if it has one or cannot be read."""
    begin = _COMPRESSED.get(Path(path).suffix.lower(), open)
    quoting = options.get("quoting", csv.QUOTE_MINIMAL)
    try:
        with begin(path, "rt", encoding="utf-8-sig", newline="") as stream:
            rows = list(itertools.islice(csv.reader(stream, delimiter=delimiter, quoting=quoting), _ROWS_TO_LOOK_AT))
    except (OSError, ValueError, EOFError, lzma.LZMAError, csv.Error):
        return None  # The reader says what is wrong.
    rows = [row for row in rows if row]
    if not rows or set(rows[0]) & set(names) or any(len(row) != len(rows[0]) for row in rows):
        return None
    *texts, label = rows[0]
    has_text = all(any(character.isalpha() for character in text) for text in texts)
    is_label = _is_number(label) or label in (row[-1] for row in rows[1:])
    return _HEADERS.get(len(rows[0])) if has_text and is_label else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def load_split(name: str, config_name: str | None, *, split: str) -> datasets.Dataset:
    """Load a split of a dataset of the Hub, or of a folder; raise InputError if that fails."""
    try:
        return datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"dataset_name={name!r} ({split=}) cannot be loaded: {reason}") from error


_KNOWN_TEXTS: dict[Task, tuple[tuple[str, ...], ...]] = {
    "sequence-classification": (
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("sentence",),
        ("text",),
    ),
    "token-classification": (("tokens",), ("words",), ("sentence",), ("text",)),
    "question-answering": (("question", "context"),),
}
_KNOWN_LABELS: dict[Task, tuple[str, ...]] = {
    "sequence-classification": ("label", "labels"),
    "token-classification": ("labels", "tags", "ner_tags", "pos_tags"),
    "question-answering": ("answers",),
}
_NUM_TEXTS: dict[Task, tuple[int, ...]] = {
    "sequence-classification": (1, 2),
    "token-classification": (1,),
    "question-answering": (2,),
}


@dataclass
class TaskDataArguments(AugmentationArguments):
    """Which examples are learned from, and how they are multiplied."""

    ranges: ClassVar[dict[str, str]] = {"max_length": "[3, 16777216]", "doc_stride": "[0, 16777216]"}
    needs: ClassVar[dict[str, str]] = {"doc_stride": "task=question-answering"}

    train_file: list[str] | None = option(
        None,
        "Examples to train on: .tsv, .csv, .jsonl, .json, .parquet (.gz, .bz2, .xz too), or .json as of SQuAD. A "
        "table of sentences and classes, sentence<TAB>label, needs no header.",
    )
    validation_file: list[str] | None = option(
        None, "Examples to evaluate on; without them, some are held out from training."
    )
    dataset_name: str | None = option(
        None, "Instead of train_file: a dataset of the Hub, or a folder for load_dataset."
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset: 'sst2'.")
    dataset_split: str = option("train", "Split of the dataset to train on.")
    validation_split: str | None = option(None, "Split of the dataset to evaluate on.")
    text_columns: list[str] | None = option(
        None,
        "Column of the text, or two of pairs; for token-classification of the lists of words, or of the text; for "
        "question-answering of question and text; by default those of the usual names (sentence, text, tokens, ...).",
    )
    label_column: str | None = option(
        None, "Column of the labels, which are optional; by default label, tags or answers, if there is one."
    )
    validation_fraction: float = option(0.05, "Share of the examples held out if nothing else is; 0 holds none.")
    split_seed: int = option(0, "Seed of the choice of examples to hold out.")
    max_length: int = option(
        128, "Most tokens of an example; what goes beyond is cut off, or of a question's text, another example."
    )
    doc_stride: int = option(32, "Of a text too long for a question: tokens that a part shares with the next.")
    tokenizer_name: str | None = option(
        None, "Tokenizer of the Hub or a folder; by default the student's, or the teacher's."
    )
    max_unknown_share: float = option(
        0.5, "Refuse examples of which the tokenizer does not know a greater share of the characters."
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.train_file is not None and self.dataset_name is not None:
            raise InputError(
                f"train_file={self.train_file} and dataset_name={self.dataset_name!r}: give one of the two"
            )
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise InputError(f"text_columns={self.text_columns} must be one column, or two of pairs")
        super().__post_init__()


def prepare_task(
    args: TaskDataArguments,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    seed: int,
    task: Task = "sequence-classification",
    first: AbstractContextManager[Any] | None = None,
) -> PreparedData:
    """Read the examples, multiply those to train on if asked for, and tokenize them; each step is done once and cached.

    Args:
        args: What to read.
        tokenizer: The tokenizer of both models.
        config: The teacher's configuration, which says what the labels mean.
        seed: Seed of the run.
        task: What kind of examples they are.
        first: Entered while files are written: ``training_args.main_process_first()``.

    Returns:
        Examples with `input_ids`, `token_type_ids` if the tokenizer makes them, and `labels` if the data has them: numbers of
        classes, -100 where there is none; or, of a teacher with one output, values, NaN where there is none. Of classes of words
        and answers to questions, see [`encode_tokens`] and [`encode_questions`].

    Raises:
        InputError: If the examples cannot be read, or a column or a label is not what it has to be.
    """
    with nullcontext() if first is None else first:
        train, held_out = _read(args, task)
        columns = _text_columns(train, args, task)
        labels = _label_column(train, args, task)
        _check_held_out(held_out, [*columns, *filter(None, [labels])])
        description = {"source": _source(args), "examples": len(train), "text_columns": list(columns)}
        texts = RepeatableTexts(partial(_texts_of, train, columns))
        unknown = count_unknown(texts, tokenizer)
        check_unknown(args, tokenizer, unknown, texts, "the examples to train on")
        if args.augmentation_model is not None:
            _check_augmentable(train, task, columns=columns)
            train = _multiply(train, args, columns=columns, seed=seed)
            description["augmented_examples"] = len(train)
        encode_part = partial(
            _encode, tokenizer=tokenizer, args=args, task=task, columns=columns, labels=labels, config=config
        )
        examples = encode_part(train)
        held_out_examples = None if held_out is None else encode_part(held_out)
        if task == "question-answering":
            description["windows"] = len(examples)
    description |= {
        "held_out_examples": None if held_out is None else len(held_out),
        "labels": "none" if labels is None else labels,
        "tokenizer": type(tokenizer.backend_tokenizer.model).__name__,
        "vocab_size": len(tokenizer),
        "max_length": args.max_length,
        "unknown_share": round(unknown.share, 6),
    }
    return PreparedData(tokenizer, examples, held_out_examples, description, args.max_length, train_documents=examples)


def _texts_of(examples: datasets.Dataset, columns: Sequence[str]) -> Iterator[str]:
    """Yield the texts of examples; lists of words are joined by spaces."""
    for row in examples.select_columns(list(columns)):
        for text in row.values():
            yield " ".join(map(str, text)) if isinstance(text, list) else str(text or "")


def _encode(
    examples: datasets.Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    args: TaskDataArguments,
    task: Task,
    columns: tuple[str, ...],
    labels: str | None,
    config: PreTrainedConfig,
) -> datasets.Dataset:
    longest = args.max_length
    if task == "question-answering":
        return encode_questions(
            examples, tokenizer, columns=columns, answers=labels, max_length=longest, doc_stride=args.doc_stride
        )
    if task == "token-classification":
        (column,) = columns
        return encode_tokens(examples, tokenizer, column=column, labels=labels, config=config, max_length=longest)
    return encode(examples, tokenizer, columns=columns, labels=labels, config=config, max_length=longest)


# Reading


def _read(args: TaskDataArguments, task: Task) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the examples to train on and those held out."""
    if args.train_file is None and args.dataset_name is None:
        raise InputError("train_file and dataset_name are both missing: name the examples of the task")
    if args.train_file is not None:
        train = read_files(args.train_file, task, option="train_file", names=_known_names(args, task))
    else:
        train = load_split(str(args.dataset_name), args.dataset_config_name, split=args.dataset_split)
    if args.validation_file is not None:
        names = _known_names(args, task)
        return train, read_files(args.validation_file, task, option="validation_file", names=names)
    if args.validation_split is not None and args.dataset_name is not None:
        return train, load_split(args.dataset_name, args.dataset_config_name, split=args.validation_split)
    train_rows, held_out_rows = split_held_out(len(train), args.validation_fraction, seed=args.split_seed)
    return train.select(train_rows), train.select(held_out_rows) if len(held_out_rows) else None


def _known_names(args: TaskDataArguments, task: Task) -> list[str]:
    """Return the names of columns by which the first line of a table is seen to be a header."""
    usual = [name for names in _KNOWN_TEXTS[task] for name in names] + list(_KNOWN_LABELS[task])
    return [*usual, *(args.text_columns or []), *filter(None, [args.label_column])]


def _source(args: TaskDataArguments) -> str:
    """Return names without folders, because the card goes to the Hub."""
    if args.train_file is not None:
        return ", ".join(Path(path).name for path in args.train_file)
    return " ".join(filter(None, (args.dataset_name, args.dataset_config_name, args.dataset_split)))


def _text_columns(examples: datasets.Dataset, args: TaskDataArguments, task: Task) -> tuple[str, ...]:
    wanted = [tuple(args.text_columns)] if args.text_columns is not None else _KNOWN_TEXTS[task]
    if len(wanted[0]) not in _NUM_TEXTS[task]:
        number = "two columns, of the question and of the text" if task == "question-answering" else "one column"
        raise InputError(f"text_columns={args.text_columns}: {task} needs {number}")
    found = next((names for names in wanted if set(names) <= set(examples.column_names)), None)
    if found is None:
        asked = f"text_columns={args.text_columns}" if args.text_columns is not None else "no column of a usual name"
        is_table = args.train_file is not None and kind_of(args.train_file[0]) in (".tsv", ".csv")
        which = "the first line names" if is_table else "the examples have"
        advice = "choose with --text_columns"
        if is_table:
            advice += ", or if that line is an example, put a header above it, such as sentence<TAB>label"
        raise InputError(f"{asked}: {which} {', '.join(examples.column_names)}; {advice}")
    return found


def _label_column(examples: datasets.Dataset, args: TaskDataArguments, task: Task) -> str | None:
    if args.label_column is not None and args.label_column not in examples.column_names:
        raise InputError(
            f"label_column={args.label_column!r}: the examples have {', '.join(examples.column_names)}; choose one of these"
        )
    return args.label_column or next((name for name in _KNOWN_LABELS[task] if name in examples.column_names), None)


def _check_held_out(examples: datasets.Dataset | None, columns: Sequence[str]) -> None:
    missing = [name for name in columns if examples is not None and name not in examples.column_names]
    if missing:
        raise InputError(f"validation_file and validation_split: they have no {missing[0]!r}, which is trained on")


def _check_augmentable(examples: datasets.Dataset, task: Task, *, columns: Sequence[str]) -> None:
    has_words = task == "token-classification" and getattr(examples.features[columns[0]], "dtype", None) not in TEXT
    if has_words or task == "question-answering":
        raise InputError(
            f"augmentation_model: with task={task!r}, other words would not have the labels of the old ones; leave it out"
        )


def _multiply(
    examples: datasets.Dataset, args: TaskDataArguments, *, columns: Sequence[str], seed: int
) -> datasets.Dataset:
    model = from_pretrained(AutoModelForMaskedLM, str(args.augmentation_model))
    tokenizer = from_pretrained(AutoTokenizer, str(args.augmentation_model))
    vectors = args.augmentation_vectors
    neighbours = None if vectors is None else WordNeighbours.from_file(vectors)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return augment(
        examples, model=model, tokenizer=tokenizer, text_columns=columns, neighbours=neighbours, args=args, seed=seed
    )
