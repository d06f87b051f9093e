"""The examples of a task: sentences, or pairs of them, with or without labels, from files or a dataset."""

import csv
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.data.corpus import split_held_out
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import from_pretrained
from hf_pretrain.objectives.distillation.augmentation import AugmentationArguments, augment
from hf_pretrain.objectives.distillation.task_examples import encode
from hf_pretrain.objectives.distillation.word_neighbours import WordNeighbours

_KNOWN_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
_KNOWN_LABELS = ("label", "labels")
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Nothing is a missing value: "null" and "NA" are words.
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}


@dataclass
class TaskDataArguments(AugmentationArguments):
    """Which examples are learned from, and how they are multiplied."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Examples to train on: .tsv or .csv with a header, .jsonl or .parquet."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Examples to evaluate on; without them, some are held out from training."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of train_file: a dataset of the Hub, or a folder for load_dataset."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset: 'sst2'."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split of the dataset to evaluate on."})
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column of the text, or two of pairs; by default those of the usual names (sentence, text, ...)."
        },
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels, which are optional; by default label, if there is one."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the examples held out if nothing else is; 0 holds none."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the choice of examples to hold out."})
    max_length: int = field(default=128, metadata={"help": "Most tokens of an example; what goes beyond is cut off."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer of the Hub or a folder; by default the student's, or the teacher's."},
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.train_file is not None and self.dataset_name is not None:
            raise InputError(
                f"train_file={self.train_file} and dataset_name={self.dataset_name!r}: give one of the two"
            )
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise InputError(f"text_columns={self.text_columns} must be one column, or two of pairs")
        if self.max_length < 3:
            raise InputError(f"max_length={self.max_length} must be at least 3")
        super().__post_init__()


def prepare_task(
    args: TaskDataArguments,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    seed: int,
    first: AbstractContextManager[Any] | None = None,
) -> PreparedData:
    """Read the examples, multiply those to train on if asked for, and tokenize them; each step is done once and cached.

    Args:
        args: What to read.
        tokenizer: The tokenizer of both models.
        config: The teacher's configuration, which says what the labels mean.
        seed: Seed of the run.
        first: Entered while files are written: ``training_args.main_process_first()``.

    Returns:
        Examples with `input_ids`, `token_type_ids` if the tokenizer makes them, and `labels` if the data has them: numbers of
        classes, -100 where there is none; or, of a teacher with one output, values, NaN where there is none.

    Raises:
        InputError: If the examples cannot be read, or a column or a label is not what it has to be.
    """
    with nullcontext() if first is None else first:
        train, held_out = _read(args)
        columns = _text_columns(train, args)
        labels = _label_column(train, args)
        description = {"source": _source(args), "examples": len(train), "text_columns": list(columns)}
        if args.augmentation_model is not None:
            train = _multiply(train, args, columns=columns, seed=seed)
            description["augmented_examples"] = len(train)
        parts = [
            None
            if part is None
            else encode(part, tokenizer, columns=columns, labels=labels, config=config, max_length=args.max_length)
            for part in (train, held_out)
        ]
    description |= {
        "held_out_examples": None if held_out is None else len(held_out),
        "labels": "none" if labels is None else labels,
        "tokenizer": type(tokenizer.backend_tokenizer.model).__name__,
        "vocab_size": len(tokenizer),
        "max_length": args.max_length,
    }
    return PreparedData(tokenizer, parts[0], parts[1], description, args.max_length, train_documents=parts[0])


# Reading


def _read(args: TaskDataArguments) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the examples to train on and those held out."""
    if args.train_file is None and args.dataset_name is None:
        raise InputError("train_file and dataset_name are both missing: name the examples of the task")
    if args.train_file is not None:
        train = _read_files(args.train_file, option="train_file")
    else:
        train = _load(args, args.dataset_split)
    if args.validation_file is not None:
        return train, _read_files(args.validation_file, option="validation_file")
    if args.validation_split is not None and args.dataset_name is not None:
        return train, _load(args, args.validation_split)
    train_rows, held_out_rows = split_held_out(len(train), args.validation_fraction, seed=args.split_seed)
    return train.select(train_rows), train.select(held_out_rows) if len(held_out_rows) else None


def _read_files(paths: Sequence[str], *, option: str) -> datasets.Dataset:
    missing = next((path for path in paths if not Path(path).is_file()), None)
    if missing is not None:
        raise InputError(f"{option}={missing!r} is no file")
    kinds = {Path(path).suffix.lower() for path in paths}
    if len(kinds) != 1 or not kinds <= _READERS.keys():
        raise InputError(f"{option}={list(paths)} must be files of one kind: {', '.join(_READERS)}")
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


def _load(args: TaskDataArguments, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"dataset_name={args.dataset_name!r} ({split=}) cannot be loaded: {reason}") from error


def _source(args: TaskDataArguments) -> str:
    """Return names without folders, because the card goes to the Hub."""
    if args.train_file is not None:
        return ", ".join(Path(path).name for path in args.train_file)
    return " ".join(filter(None, (args.dataset_name, args.dataset_config_name, args.dataset_split)))


def _text_columns(examples: datasets.Dataset, args: TaskDataArguments) -> tuple[str, ...]:
    wanted = [tuple(args.text_columns)] if args.text_columns is not None else _KNOWN_TEXTS
    found = next((names for names in wanted if set(names) <= set(examples.column_names)), None)
    if found is None:
        asked = f"text_columns={args.text_columns}" if args.text_columns is not None else "no column of a usual name"
        raise InputError(f"{asked}: the examples have {', '.join(examples.column_names)}; choose with --text_columns")
    return found


def _label_column(examples: datasets.Dataset, args: TaskDataArguments) -> str | None:
    if args.label_column is not None and args.label_column not in examples.column_names:
        raise InputError(
            f"label_column={args.label_column!r}: the examples have {', '.join(examples.column_names)}; choose one of these"
        )
    return args.label_column or next((name for name in _KNOWN_LABELS if name in examples.column_names), None)


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
