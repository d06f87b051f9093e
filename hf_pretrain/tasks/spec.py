"""Tasks as data: a row of a YAML file says which columns a task has, of what type it is and which metric counts.

[`read_tasks`] reads such a file, and [`load_task`] the examples of one task: it finds the columns, numbers the labels and
holds some rows out. What one does with the examples is [`TaskData`]'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

import datasets
import numpy as np
import yaml

from hf_pretrain.data import draws
from hf_pretrain.data.text.docstrings import split_held_out
from hf_pretrain.errors import InputError, check_choice, check_range, nearest, one_line
from hf_pretrain.tasks.examples import chosen_answer
from hf_pretrain.tasks.files import Kind, find_label, find_texts, load_split, read_files, usual_labels
from hf_pretrain.tasks.labelled import TaskData as TaskData
from hf_pretrain.tasks.metrics import METRICS_OF_TYPES

TaskType = Literal["classification", "regression", "tokens", "choice", "span"]
"""The types of tasks: a class or a value of a text or pair, classes of words, a choice among answers, a span that answers."""

_KINDS: dict[str, Kind] = {
    "classification": "sequence-classification",
    "regression": "sequence-classification",
    "tokens": "token-classification",
    "choice": "multiple-choice",
    "span": "question-answering",
}
_NUM_TEXTS = {"tokens": (1,), "span": (2,)}
# What a file writes for a label that it does not have.
_NO_LABEL = (None, "")
_UNLABELLED = -100


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task as data.

    Attributes:
        name: Name of the task.
        type: "classification" or "regression" of texts or pairs, "tokens" (a class for each word), "choice" (one of some
            answers), or "span" (a part of a text that answers a question).
        text: Columns of the text: one, or two of pairs. For "tokens" the column of words, a list or words with spaces between
            them. For "choice" the context, and perhaps the beginning that all choices continue. For "span" question and text.
            An entry with braces is a template of columns, such as "{question} {answer}". By default, but of "choice", the columns
            of usual names: sentence, text, sentence1 and sentence2, premise and hypothesis, tokens, question and context.
        label: Column of the labels; by default one of a usual name: label, labels, gold_label, is_duplicate, score of values,
            tags, answers.
        choices: Of "choice": columns of the choices, or one column of lists.
        metric: The number that counts; by default of the type: accuracy, spearman, entity_f1 of tags such as B-PER (else
            accuracy), f1 of spans.
        labels: Names of the classes in their order. Where the files have numbers, these count from 0. By default the values
            of the training rows, sorted.
        columns: Names of the columns of tables without a header.
        language: Language of the texts, by its code. Articles count for nothing in the answers of "span" if it is "en".
        train_file: Files to train on; without them and without a dataset the task can only be evaluated.
        validation_file: Files to evaluate on; by default some of the rows to train on are held out.
        dataset_name: Instead of files: a dataset of the Hub, or a folder for `load_dataset`.
        dataset_config_name: Configuration of the dataset.
        dataset_split: Split to train on; "train[:10000]" is its first rows. None trains on nothing.
        validation_split: Split to evaluate on.

    Raises:
        InputError: If the options do not fit each other.
    """

    name: str
    type: TaskType
    text: tuple[str, ...] = ()
    label: str | None = None
    choices: tuple[str, ...] = ()
    metric: str | None = None
    labels: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    language: str = "en"
    train_file: tuple[str, ...] = ()
    validation_file: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str | None = "train"
    validation_split: str | None = None

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        check_choice(self.type, get_args(TaskType), name=f"task {self.name!r}: type")
        numbers = _NUM_TEXTS.get(self.type, (1, 2))
        if len(self.text) not in (numbers if self.type == "choice" else (0, *numbers)):
            number = {"tokens": "one column of words", "span": "two columns, of the question and of the text"}
            raise InputError(self._about("text", f"name {number.get(self.type, 'one column, or two of pairs')}"))
        if bool(self.choices) != (self.type == "choice"):
            wanted = "name the columns of the choices, or one of lists" if self.type == "choice" else "leave it out"
            raise InputError(self._about("choices", f"{wanted} with type={self.type!r}"))
        if self.labels is not None and self.type not in ("classification", "tokens"):
            raise InputError(self._about("labels", f"leave it out with type={self.type!r}, which has no classes"))
        if self.labels is not None and (len(set(self.labels)) != len(self.labels) or len(self.labels) < 2):
            raise InputError(self._about("labels", "name two classes or more, each once"))
        if self.metric is not None:
            check_choice(self.metric, METRICS_OF_TYPES[self.type], name=f"task {self.name!r}: metric")
        has_files = bool(self.train_file or self.validation_file)
        if has_files == (self.dataset_name is not None):
            wanted = "give not both of files and" if has_files else "give train_file, validation_file or"
            raise InputError(f"task {self.name!r}: {wanted} dataset_name={self.dataset_name!r}")
        if self.columns is not None and not has_files:
            raise InputError(self._about("columns", "leave it out without files: it names the columns of tables"))

    def _about(self, option: str, advice: str) -> str:
        value = getattr(self, option)
        return f"task {self.name!r}: {option}={list(value) if isinstance(value, tuple) else value!r}: {advice}"


def read_tasks(path: str | Path, *, data_dir: str | Path | None = None) -> dict[str, TaskSpec]:
    """Read tasks from a YAML file: a mapping of names to the options of [`TaskSpec`].

    Args:
        path: The file.
        data_dir: Folder that the files of the tasks are relative to; by default that of the YAML file.

    Returns:
        The tasks by name, in the file's order.

    Raises:
        InputError: If it cannot be read, or is no mapping of this form, or has unknown options.
    """
    folder = Path(path).parent if data_dir is None else Path(data_dir)
    if data_dir is not None and not folder.is_dir():
        raise InputError(f"data_dir={str(data_dir)!r} is no folder")
    try:
        tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"tasks file {str(path)!r} cannot be read: {one_line(error)}") from error
    example = "write NAME: {type: classification, text: sentence, label: label, train_file: train.tsv}"
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(f"tasks file {str(path)!r} is no mapping of names to tasks: {example}")
    for name, options in tasks.items():
        if not isinstance(options, dict):
            raise InputError(f"{path}: task {name!r} is {options!r}, no mapping: {example}")
    return {str(name): _spec_of(str(name), options, folder, path) for name, options in tasks.items()}


def _spec_of(name: str, options: Mapping[Any, Any], folder: Path, path: str | Path) -> TaskSpec:
    known = {field.name: str(field.type) for field in fields(TaskSpec) if field.name != "name"}
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            raise InputError(f"{path}: task {name!r} has the unknown option {option!r}: {nearest(option, known)}")
        items = value if isinstance(value, list) else [value]
        is_list = known[option].startswith("tuple")
        if any(isinstance(item, (dict, list)) for item in items) or (isinstance(value, list) and not is_list):
            raise InputError(
                f"{path}: task {name!r}: {option}={value!r} must be {'a list of words' if is_list else 'one word'}"
            )
        if value is None:
            continue
        values[option] = tuple(map(str, items)) if is_list else str(value)
        if option.endswith("_file"):
            values[option] = tuple(str(folder / item) for item in values[option])
    if "dataset_split" in options and options["dataset_split"] is None:
        values["dataset_split"] = None
    if "type" not in values:
        raise InputError(f"{path}: task {name!r} has no type: add it")
    return TaskSpec(name=name, **values)


def load_task(
    spec: TaskSpec, *, seed: int = 0, validation_fraction: float = 0.1, max_examples: int | None = None
) -> TaskData:
    """Read the examples of a task, check them and number their labels.

    Args:
        spec: The task.
        seed: Key of the rows that are held out, and of those that are kept of `max_examples`.
        validation_fraction: Share of the rows to train on that is held out where the task has none to evaluate on.
        max_examples: At most so many rows to train on: the first of a keyed order, so that fewer are a part of more.

    Returns:
        The examples. Labels are numbers of classes, values, numbers of choices, or answers; None where a row to evaluate on
        has none. Rows to train on need one.

    Raises:
        InputError: If files or columns are missing, or a label does not fit.
    """
    if max_examples is not None:
        check_range(max_examples, "[1, inf)", name="max_examples")
    train, validation = _read(spec)
    if train is None and validation is None:
        raise InputError(f"task {spec.name!r}: there are no examples: name dataset_split or validation_split")
    if validation is None:
        assert train is not None
        advice = "or give validation_file or validation_split"
        check_range(validation_fraction, "(0, 1)", name="validation_fraction", hint=f"0.1 is usual; {advice}")
    parts = {name: rows for name, rows in (("train", train), ("validation", validation)) if rows is not None}
    first = next(iter(parts.values()))
    spec = replace(spec, text=_text_columns(spec, first))
    for part, rows in parts.items():
        _check_columns(spec, rows, part)
    spec = replace(spec, label=_label_column(spec, first))
    parts = {part: _with_templates(spec, rows) for part, rows in parts.items()}
    if spec.type == "tokens":
        parts = {part: _with_lists(spec, rows) for part, rows in parts.items()}
    classes = _classes(spec, parts) if spec.type in ("classification", "tokens") else None
    parts = {part: _with_numbers(spec, rows, classes, part) for part, rows in parts.items()}
    if "validation" not in parts:
        parts = hold_out(spec, parts["train"], fraction=validation_fraction, seed=seed)
    if "train" in parts and max_examples is not None and max_examples < len(parts["train"]):
        order = draws.permutation(len(parts["train"]), seed=seed, stream="task examples")
        parts["train"] = parts["train"].select(np.sort(order[:max_examples]))
    return TaskData(spec=spec, train=parts.get("train"), validation=parts["validation"], labels=classes)


def with_text_columns(spec: TaskSpec) -> TaskSpec:
    """Return a task with its columns of texts: those that it names, or those of its rows that have usual names.

    Raises:
        InputError: If it names none, and its rows cannot be read or have none of a usual name.
    """
    if spec.text:
        return spec
    rows = next((part for part in _read(spec) if part is not None), None)
    return spec if rows is None else replace(spec, text=_text_columns(spec, rows))


def hold_out(spec: TaskSpec, rows: datasets.Dataset, *, fraction: float, seed: int) -> dict[str, datasets.Dataset]:
    """Hold some rows to train on out, to evaluate on.

    Questions of one article stay together, by the column `title`, or else those of one text: a text that was trained on would
    make its other questions easier. Only questions about a single text are held out one by one.

    Args:
        spec: The task.
        rows: The rows.
        fraction: Share that is held out: of the articles, of the texts, or of the rows.
        seed: Key of the choice.

    Returns:
        The rows of "train" and of "validation", in their order.

    Raises:
        InputError: If there are too few rows to hold one out.
    """
    units = np.arange(len(rows))
    for column in ("title", spec.text[-1]) if spec.type == "span" else ():
        names = rows[column][:] if column in rows.column_names else []
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        if len(numbers) > 1:
            units = np.array([numbers[name] for name in names])
            break
    _, held_out = split_held_out(int(units.max()) + 1, fraction, seed=seed)
    is_held_out = np.isin(units, held_out)
    return {"train": rows.select(np.flatnonzero(~is_held_out)), "validation": rows.select(np.flatnonzero(is_held_out))}


def _read(spec: TaskSpec) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
    """Return the rows to train on and those to evaluate on, None where the task names none."""
    if spec.dataset_name is not None:
        splits = (spec.dataset_split, spec.validation_split)
        train, validation = (
            None if split is None else load_split(spec.dataset_name, spec.dataset_config_name, split=split)
            for split in splits
        )
        return train, validation
    for option in ("train_file", "validation_file"):
        missing = next((path for path in getattr(spec, option) if not Path(path).is_file()), None)
        if missing is not None:
            raise InputError(
                f"task {spec.name!r}: {option}={missing!r} is no file: correct it, or name the folder that files are relative to "
                "(data_dir)"
            )
    names = [*spec.text, *spec.choices, *filter(None, [spec.label])]
    options: dict[str, Any] = {"names": names, "columns": spec.columns}
    train, validation = (
        read_files(files, _KINDS[spec.type], option=f"task {spec.name!r}: {option}", **options) if files else None
        for option, files in (("train_file", spec.train_file), ("validation_file", spec.validation_file))
    )
    return train, validation


def _columns_of(text: str) -> list[str]:
    """Return the columns of an entry of `text`: itself, or those of a template."""
    if "{" not in text:
        return [text]
    try:
        return [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise InputError(
            f"text={text!r} is no template of columns, such as '{{question}} {{answer}}': {error}"
        ) from error


def _check_columns(spec: TaskSpec, rows: datasets.Dataset, part: str) -> None:
    # Rows to evaluate on may have no labels, those to train on need them.
    label = [spec.label] if spec.label is not None and part == "train" else []
    for option, names in (("text", spec.text), ("choices", spec.choices), ("label", label)):
        for name in (column for text in names for column in _columns_of(text)):
            if name not in rows.column_names:
                raise InputError(
                    f"task {spec.name!r}: {option} names {name!r}, which the {part} rows do not have: "
                    f"{nearest(name, rows.column_names)}"
                )
    if not len(rows):
        raise InputError(f"task {spec.name!r}: there are no {part} rows")


def _text_columns(spec: TaskSpec, rows: datasets.Dataset) -> tuple[str, ...]:
    if spec.text:
        return spec.text
    found = _found(spec, "text", find_texts, rows)
    if found is None:
        raise InputError(
            f"task {spec.name!r}: no column of texts has a usual name (such as sentence, text, or sentence1 and sentence2): the "
            f"rows have {', '.join(rows.column_names)}; {_choosing('text')}"
        )
    return found


def _label_column(spec: TaskSpec, rows: datasets.Dataset) -> str:
    if spec.label is not None:
        return spec.label
    kind, is_value = _KINDS[spec.type], spec.type == "regression"
    found = _found(spec, "label", find_label, rows, is_value=is_value)
    if found is None:
        usual = usual_labels(kind, is_value=is_value)
        is_scored = spec.type == "classification" and "score" in rows.column_names
        hint = "; score is a usual name of values: say type: regression (--task_type regression)" if is_scored else ""
        raise InputError(
            f"task {spec.name!r}: no column has a usual name of labels ({', '.join(usual)}): the rows have "
            f"{', '.join(rows.column_names)}; {_choosing('label')}{hint}"
        )
    return found


def _found(spec: TaskSpec, option: str, find: Callable[..., Any], rows: datasets.Dataset, **options: Any) -> Any:
    try:
        return find(_KINDS[spec.type], rows.column_names, advice=_choosing(option), **options)
    except InputError as error:
        raise InputError(f"task {spec.name!r}: {error}") from error


def _choosing(option: str) -> str:
    return f"name it by {option} (on a command line --{'text_columns' if option == 'text' else 'label_column'})"


def _with_templates(spec: TaskSpec, rows: datasets.Dataset) -> datasets.Dataset:
    """Add a column for each template in `text`, under the template's name."""
    for text in spec.text:
        if "{" in text:
            columns = _columns_of(text)
            values = zip(*(rows[name][:] for name in columns), strict=True)
            filled = [text.format_map(dict(zip(columns, row, strict=True))) for row in values]
            rows = rows.add_column(text, filled)
    return rows


def _with_lists(spec: TaskSpec, rows: datasets.Dataset) -> datasets.Dataset:
    """Split words and their labels at spaces where a table has them as text."""
    for name in filter(None, (*spec.text, spec.label)):
        if name in rows.column_names and getattr(rows.features[name], "dtype", None) in ("string", "large_string"):
            lists = [None if value in _NO_LABEL else value.split() for value in rows[name][:]]
            rows = rows.remove_columns(name).add_column(name, lists, feature=datasets.List(datasets.Value("string")))
    return rows


def _class_name(value: Any) -> str:
    """Return the name of a class: of a number without its point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _flat(spec: TaskSpec, rows: datasets.Dataset) -> Iterable[Any]:
    """Return the labels of rows, of words one after the other."""
    if spec.label not in rows.column_names:
        return []
    column = rows[spec.label][:]
    return (tag for tags in column if tags is not None for tag in tags) if spec.type == "tokens" else column


def _classes(spec: TaskSpec, parts: Mapping[str, datasets.Dataset]) -> list[str]:
    """Return the names of the classes in their order."""
    if spec.labels is not None:
        return list(spec.labels)
    part, rows = next(iter(parts.items()))
    feature = rows.features.get(spec.label)
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names is None and part != "train":
        raise InputError(
            f"task {spec.name!r}: there are no rows to train on, so labels must name the classes in their order"
        )
    if names is None:
        values = {value for value in _flat(spec, rows) if not _is_missing(value)}
        are_numbers = all(isinstance(value, (int, float)) for value in values)
        names = [_class_name(value) for value in sorted(values, key=None if are_numbers else str)]
    if len(names) < 2:
        raise InputError(
            f"task {spec.name!r}: label={spec.label!r} has {len(names)} classes in the {part} rows ({', '.join(names)}): a task "
            "needs two"
        )
    return list(names)


def _is_missing(value: Any, names: Sequence[str] = ()) -> bool:
    """Whether a row has no label; GLUE writes -1 for that."""
    return value in _NO_LABEL or (value in (-1, "-1", _UNLABELLED) and _class_name(value) not in names)


def _with_numbers(spec: TaskSpec, rows: datasets.Dataset, classes: list[str] | None, part: str) -> datasets.Dataset:
    """Replace labels by numbers, None where there is none, and check them."""
    assert spec.label is not None
    if spec.label not in rows.column_names:
        return rows
    column = rows[spec.label][:]
    numbers: list[Any]
    feature: Any
    if spec.type == "span":
        numbers, feature = column, None
    elif spec.type == "regression":
        numbers, feature = (
            [_value(spec, value, row, part) for row, value in enumerate(column)],
            datasets.Value("float32"),
        )
    elif spec.type == "choice":
        numbers, feature = _chosen(spec, rows), datasets.Value("int64")
    else:
        number = _Numbers(spec, rows.features[spec.label], classes or [], part)
        if spec.type == "tokens":
            numbers, feature = _tags(spec, column, number), datasets.List(datasets.Value("int64"))
        else:
            numbers, feature = [number[value] for value in column], datasets.ClassLabel(names=classes)
    missing = next((row for row, value in enumerate(numbers) if value is None), None)
    if part == "train" and missing is not None:
        value = column[missing]
        hint = "; if that is a class, name all of them by labels" if value in (-1, "-1") else ""
        raise InputError(
            f"task {spec.name!r}: train row {missing} has no label ({spec.label}={value!r}): leave such rows out{hint}"
        )
    return (
        rows if feature is None else rows.remove_columns(spec.label).add_column(spec.label, numbers, feature=feature)
    )


class _Numbers(dict[Any, int | None]):
    """The number of each label: by its name, or, where the files have numbers, itself; None where there is none."""

    def __init__(self, spec: TaskSpec, feature: Any, classes: list[str], part: str) -> None:
        self.spec, self.part = spec, part
        self.by_name = {name: number for number, name in enumerate(classes)}
        self.names: Sequence[str] | None = getattr(getattr(feature, "feature", feature), "names", None)

    def __missing__(self, value: Any) -> int | None:
        if _is_missing(value, list(self.by_name)):
            number = None
        else:
            name = self.names[value] if self.names is not None and isinstance(value, int) else _class_name(value)
            index = int(name) if self.spec.labels is not None and name.isdecimal() else len(self.by_name)
            number = self.by_name.get(name, index)
            if number >= len(self.by_name):
                order = "labels" if self.spec.labels is not None else "the classes of the training rows"
                raise InputError(
                    f"task {self.spec.name!r}: the {self.part} rows have {self.spec.label}={value!r}, which is none of {order}: "
                    f"{nearest(name, list(self.by_name))}"
                )
        self[value] = number
        return number


def _tags(spec: TaskSpec, column: Sequence[Any], number: _Numbers) -> list[list[int] | None]:
    return [
        None if tags is None else [_UNLABELLED if (found := number[tag]) is None else found for tag in tags]
        for tags in column
    ]


def _value(spec: TaskSpec, value: Any, row: int, part: str) -> float | None:
    if value in _NO_LABEL:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"task {spec.name!r}: {part} row {row} has {spec.label}={value!r}, no number: correct it, or say type: classification"
        )
    return number


def _chosen(spec: TaskSpec, rows: datasets.Dataset) -> list[int | None]:
    columns = rows.select_columns([*spec.choices, str(spec.label)])
    return [
        chosen_answer(row[str(spec.label)], row, columns=spec.choices, where=f"task {spec.name!r}: row {index}")
        for index, row in enumerate(columns)
    ]
