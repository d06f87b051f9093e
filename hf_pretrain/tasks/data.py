"""The options of a task's data, and the way from rows to tokenized examples.

[`prepare_task`] reads rows (`files.py`), finds the columns of texts and labels, holds some rows out, multiplies the
others if wanted (`augmentation.py`), and tokenizes all (`examples.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.data.run_tokenizer import RepeatableTexts, check_unknown, count_unknown
from hf_pretrain.data.text.docstrings import split_held_out
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.options import option
from hf_pretrain.tasks.augmentation import TEXT, AugmentationArguments, augment
from hf_pretrain.tasks.examples import encode, encode_tokens
from hf_pretrain.tasks.files import Task, find_label, find_texts, kind_of, load_split, read_files
from hf_pretrain.tasks.questions import encode_questions
from hf_pretrain.tasks.words import WordNeighbours

_NUM_TEXTS: dict[Task, tuple[int, ...]] = {
    "sequence-classification": (1, 2),
    "token-classification": (1,),
    "question-answering": (2,),
}


@dataclass
class TaskDataArguments(AugmentationArguments):
    """The examples of a task, and how they are multiplied."""

    ranges: ClassVar[dict[str, str]] = {"max_length": "[3, 16777216]", "doc_stride": "[0, 16777216]"}
    needs: ClassVar[dict[str, str]] = {"doc_stride": "task=question-answering"}

    train_file: list[str] | None = option(
        None,
        "Examples to train on: .tsv, .csv, .jsonl, .json, .parquet (.gz, .bz2, .xz too), or .json as of SQuAD. A "
        "table of sentences and classes, sentence<TAB>label, needs no header.",
    )
    validation_file: list[str] | None = option(None, "Examples to evaluate on; by default some of those to train on.")
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
    label_column: str | None = option(None, "Column of the labels, if any; by default label, tags or answers.")
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
    """Read the examples of a task, multiply those to train on if wanted, and tokenize them; each step is cached.

    Args:
        args: The options.
        tokenizer: The tokenizer of both models.
        config: The teacher's configuration, with its labels.
        seed: Seed of the run.
        task: The task of the examples.
        first: Entered while files are written: ``training_args.main_process_first()``.

    Returns:
        Examples with `input_ids`, `token_type_ids` if the tokenizer makes them, and `labels` if the data has them:
        numbers of classes, -100 where there is none; or, of a teacher with one output, values, NaN where there is
        none. Of classes of words and answers to questions, see [`encode_tokens`] and [`encode_questions`].

    Raises:
        InputError: If the examples cannot be read, or a column or a label does not fit the task.
    """
    with nullcontext() if first is None else first:
        train, held_out = _read(args, task)
        columns = _text_columns(train, args, task)
        is_value = task == "sequence-classification" and config.num_labels == 1
        labels = _label_column(train, args, task, is_value=is_value)
        _check_held_out(held_out, [*columns, *filter(None, [labels])])
        description = {"source": _source(args), "examples": len(train), "text_columns": list(columns)}
        texts = RepeatableTexts(partial(_texts_of, train, columns))
        unknown = count_unknown(texts, tokenizer)
        check_unknown(args, tokenizer, unknown, texts, "the examples to train on")
        if args.augmentation_model is not None:
            _check_augmentable(train, task, columns=columns)
            train = _multiply(train, args, columns=columns, seed=seed)
            description["augmented_examples"] = len(train)
        encoded = partial(
            _encode, tokenizer=tokenizer, args=args, task=task, columns=columns, labels=labels, config=config
        )
        examples, held_out_examples = encoded(train), None if held_out is None else encoded(held_out)
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
    options: dict[str, Any] = {"labels": labels, "max_length": args.max_length}
    if task == "question-answering":
        return encode_questions(examples, tokenizer, columns=columns, doc_stride=args.doc_stride, **options)
    if task == "token-classification":
        return encode_tokens(examples, tokenizer, column=columns[0], config=config, **options)
    return encode(examples, tokenizer, columns=columns, config=config, **options)


def _read(args: TaskDataArguments, task: Task) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the examples to train on and those held out."""
    if args.train_file is None and args.dataset_name is None:
        raise InputError("train_file and dataset_name are both missing: name the examples of the task")
    names = [*(args.text_columns or []), *filter(None, [args.label_column])]
    if args.train_file is not None:
        train = read_files(args.train_file, task, option="train_file", names=names)
    else:
        train = load_split(str(args.dataset_name), args.dataset_config_name, split=args.dataset_split)
    if args.validation_file is not None:
        return train, read_files(args.validation_file, task, option="validation_file", names=names)
    if args.validation_split is not None and args.dataset_name is not None:
        return train, load_split(args.dataset_name, args.dataset_config_name, split=args.validation_split)
    train_rows, held_out_rows = split_held_out(len(train), args.validation_fraction, seed=args.split_seed)
    return train.select(train_rows), train.select(held_out_rows) if len(held_out_rows) else None


def _source(args: TaskDataArguments) -> str:
    """Return names without folders, because the card goes to the Hub."""
    if args.train_file is not None:
        return ", ".join(Path(path).name for path in args.train_file)
    return " ".join(filter(None, (args.dataset_name, args.dataset_config_name, args.dataset_split)))


def _text_columns(examples: datasets.Dataset, args: TaskDataArguments, task: Task) -> tuple[str, ...]:
    advice, named = "choose with --text_columns", args.text_columns
    if named is not None and len(named) not in _NUM_TEXTS[task]:
        number = "two columns, of the question and of the text" if task == "question-answering" else "one column"
        raise InputError(f"text_columns={named}: {task} needs {number}")
    if named is None:
        found = find_texts(task, examples.column_names, advice=advice)
    else:
        found = tuple(named) if set(named) <= set(examples.column_names) else None
    if found is None:
        what = "no column of a usual name" if named is None else f"text_columns={named}"
        is_table = args.train_file is not None and kind_of(args.train_file[0]) in (".tsv", ".csv")
        which = "the first line was taken as the header, and names" if is_table else "the examples have"
        if is_table:
            advice += ", or if that line is an example, put a header above it, such as sentence<TAB>label"
        raise InputError(f"{what}: {which} {', '.join(examples.column_names)}; {advice}")
    return found


def _label_column(
    examples: datasets.Dataset, args: TaskDataArguments, task: Task, *, is_value: bool = False
) -> str | None:
    names = examples.column_names
    if args.label_column is not None and args.label_column not in names:
        raise InputError(
            f"label_column={args.label_column!r}: the examples have {', '.join(names)}; choose one of these"
        )
    return args.label_column or find_label(task, names, is_value=is_value, advice="choose with --label_column")


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
    model, tokenizer = (
        from_pretrained(auto_class, str(args.augmentation_model))
        for auto_class in (AutoModelForMaskedLM, AutoTokenizer)
    )
    neighbours = None if args.augmentation_vectors is None else WordNeighbours.from_file(args.augmentation_vectors)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return augment(
        examples, model=model, tokenizer=tokenizer, text_columns=columns, neighbours=neighbours, args=args, seed=seed
    )
