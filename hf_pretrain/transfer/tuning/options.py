"""The options by which commands name a model and a task: a row of a YAML file of tasks, or files and their columns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.options import check_options, option
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec, TaskType, load_task, read_tasks
from hf_pretrain.training.parsing import check_changed

_OF_FILES = ("validation_file", "text_columns", "label_column", "task_type")
# Of finetune and of multitask.
ARCHITECTURE_HELP = (
    "What stands on top of the encoder instead of the stock head: mean, max, cls, last, attention_pooling, scalar_mix, "
    "bilstm, cnn or pair_encoder of texts; linear, scalar_mix, bilstm or cnn of tokens; or one that a package registers."
)
ARCHITECTURE_OPTIONS_HELP = 'Options of the architecture, as JSON: {"lstm_size": 64}.'
MIX_LAYERS_HELP = "The architecture reads a learned mean of all layers."


@dataclass
class TaskArguments:
    """Which model, and which task.

    Raises:
        InputError: If an option is out of range, or has no effect beside the others.
    """

    ranges: ClassVar[dict[str, str]] = {"max_examples": "[2, inf)", "validation_fraction": "(0, 1)"}
    needs: ClassVar[dict[str, str]] = {"task": "tasks", "data_dir": "tasks", **dict.fromkeys(_OF_FILES, "train_file")}

    model_name_or_path: str = option(help="The encoder: a folder, or a name on the Hub.")
    tasks: str | None = option(None, "YAML file of tasks.")
    task: str | None = option(None, "Name of the task in it; not needed if there is one.")
    data_dir: str | None = option(
        None, "Folder that the files of the tasks are relative to; by default the YAML's own."
    )
    train_file: list[str] | None = option(
        None, "Instead of tasks: examples to train on, as .tsv, .csv, .jsonl, .json or .parquet."
    )
    validation_file: list[str] | None = option(None, "Examples to measure on; by default some of those to train on.")
    text_columns: list[str] | None = option(
        None,
        "Column of the text, or two of pairs; by default those of the usual names (sentence, text, sentence1 and sentence2, "
        "premise and hypothesis, tokens, question and context, ...).",
    )
    label_column: str | None = option(
        None, "Column of the labels; by default one of a usual name (label, score of values, tags, answers, ...)."
    )
    task_type: TaskType = option(
        "classification", "Of train_file: classification, regression, tokens (classes of words), choice, or span."
    )
    validation_fraction: float = option(0.1, "Share of the examples that is held out if nothing else is.")
    max_examples: int | None = option(None, "Train on so many examples at most.")

    def __post_init__(self) -> None:
        """Refuse what has no effect or is missing."""
        check_options(self)
        check_changed(self)
        if (self.tasks is None) == (self.train_file is None):
            raise InputError("give the examples by --tasks (a YAML file), or by --train_file")

    def find_task(self, types: Collection[str] = (), *, what: str = "") -> TaskSpec:
        """Return the task.

        Args:
            types: The types that the command takes; () for all.
            what: What takes no others, for the message: "classic heads are".

        Raises:
            InputError: If there is none of that name, or it is of another type.
        """
        if self.tasks is None:
            return self.spec_of_files()
        known = read_tasks(self.tasks, data_dir=self.data_dir)
        if self.task is None and len(known) > 1:
            raise InputError(f"tasks={self.tasks!r} has {len(known)} tasks: name one by --task, of {', '.join(known)}")
        name = next(iter(known)) if self.task is None else self.task
        check_choice(name, known, name="task")
        if types and known[name].type not in types:
            raise InputError(f"task={name!r} has type={known[name].type!r}: {what} for {' and '.join(types)}")
        return known[name]

    def spec_of_files(self) -> TaskSpec:
        """Return the task that the options of files describe."""
        return TaskSpec(
            name=Path((self.train_file or [""])[0]).stem,
            type=self.task_type,
            text=tuple(self.text_columns or ()),
            label=self.label_column,
            train_file=tuple(self.train_file or ()),
            validation_file=tuple(self.validation_file or ()),
        )

    def load(self, spec: TaskSpec, *, seed: int) -> TaskData:
        """Return the examples of a task; which rows are held out and which are kept follows from the seed."""
        return load_task(spec, seed=seed, validation_fraction=self.validation_fraction, max_examples=self.max_examples)
