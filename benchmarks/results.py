"""The frame of the programs that compare arms: their options, and a file of measured runs, one row each.

A program derives its options from `ComparisonArguments`, calls `run_missing`, and prints tables of the rows. Several
processes may fill one file.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from hf_pretrain.data.prepare import DataArguments
from hf_pretrain.errors import InputError, check_choice

_NOT_SETTINGS = ("train_file", "validation_file", "data_dir", "results", "table", "arm", "seed")


@dataclass
class ComparisonArguments:
    """Options that the comparisons share: arms and seeds, the text, and the sizes of a run.

    A program sets `arms` to the names of its arms, and gives its own options and defaults in a derived class.
    """

    arms: ClassVar[Sequence[str]] = ()
    arms_without_text: ClassVar[Sequence[str]] = ()

    train_file: list[str] = field(default_factory=list, metadata={"help": "Text to train on, as for `hf-pretrain`."})
    validation_file: list[str] = field(
        default_factory=list, metadata={"help": "Held-out text; without it, documents of train_file are held out."}
    )
    data_dir: str = field(default="data", metadata={"help": "Folder of the tasks that the program describes."})
    results: str = field(default="", metadata={"help": "File that each run adds a row to."})
    table: bool = field(default=False, metadata={"help": "Print the tables of the file instead of running anything."})
    arm: list[str] = field(default_factory=list, metadata={"help": "Arms to run; by default all."})
    seed: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds; each arm runs with each."})
    max_corpus_bytes: int | None = field(default=None, metadata={"help": "Train on a random part of the text."})
    document_separator: str = field(default="blank_line", metadata={"help": "What ends a document of a text file."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the tokenizer that is trained on the text."})
    block_size: int = field(default=64, metadata={"help": "Most tokens in an example."})
    batch_size: int = field(default=16, metadata={"help": "Examples a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate on text."})

    def __post_init__(self) -> None:
        """Choose all arms by default, and refuse what cannot be run.

        Raises:
            InputError: If an arm is unknown, or there is nothing to train on.
        """
        self.arm = self.arm or list(self.arms)
        for name in self.arm:
            check_choice(name, self.arms, name="arm")
        if not self.table and not self.train_file and not set(self.arm) <= set(self.arms_without_text):
            raise InputError("train_file is missing: name the text to train on, or print what there is with --table")

    def settings(self) -> dict[str, Any]:
        """Return what the runs of a table have in common: all but which they are and where their files are."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_SETTINGS}
        names = {name: [Path(path).name for path in getattr(self, name)] for name in ("train_file", "validation_file")}
        return names | values

    def text_data(self, **options: Any) -> DataArguments:
        """Return the options of the text, with further ones."""
        chosen = {
            name: getattr(self, name)
            for name in ("train_file", "document_separator", "max_corpus_bytes", "block_size")
        }
        return DataArguments(**chosen | {"validation_file": self.validation_file or None} | options)

    def runs_folder(self) -> Path:
        """Return the folder of the models, beside the results; it is made if need be."""
        path = Path(self.results)
        folder = path.with_name(f"{path.stem}-runs")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def run_missing(args: ComparisonArguments, run_arm: Callable[[str, int], dict[str, Any]]) -> None:
    """Run each chosen arm with each seed, unless the file of results has its row."""
    for seed, arm in itertools.product(args.seed, args.arm):
        run_once(args, arm, seed, run_arm)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add_result(path: Path, row: dict[str, Any]) -> None:
    """Add a row; other processes may be adding theirs."""
    with FileLock(f"{path}.lock"):
        rows = [*read_results(path), row]
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        fresh.replace(path)


def run_once(args: ComparisonArguments, arm: str, seed: int, run_arm: Callable[[str, int], dict[str, Any]]) -> None:
    """Run an arm with a seed and add what was measured as a row, unless there is one with these settings."""
    path, settings = Path(args.results), args.settings()
    done = [(row["arm"], row["seed"], row["settings"]) for row in read_results(path)]
    if (arm, seed, settings) not in done:
        add_result(path, {"arm": arm, "seed": seed} | run_arm(arm, seed) | {"settings": settings})


def rows_by_settings(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each set of settings, which belong in one table.

    Raises:
        InputError: If there is no row.
    """
    tables: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_results(path):
        tables[json.dumps(row["settings"], sort_keys=True)].append(row)
    if not tables:
        raise InputError(f"results={path} has no row: run some arms first")
    return tables


def mean_and_spread(values: Sequence[float], places: int) -> str:
    """Return mean and standard deviation as a table shows them: the mean alone where all values are equal."""
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"
