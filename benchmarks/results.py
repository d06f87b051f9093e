"""The frame of the programs that compare arms: their options, and a file of measured runs, one row each.

A program derives its options from `ComparisonArguments` and calls `compare_arms`, which runs what is missing and prints tables of
the rows. Several processes may fill one file.
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar

import pandas as pd
from filelock import FileLock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from hf_pretrain import train_tokenizer
from hf_pretrain.cli import load_method, run_program
from hf_pretrain.data.prepare import DataArguments
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.hub.text import bare_name
from hf_pretrain.options import option
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import load_data, train_method
from hf_pretrain.training.trainer import PretrainingTrainer
from timing import print_table

RunArm = Callable[[str, int], dict[str, Any]]
"""Runs an arm with a seed and returns what was measured."""
Chosen = TypeVar("Chosen", bound="ComparisonArguments")

_COUNTED_BATCHES = 8
_NOT_SETTINGS = ("train_file", "validation_file", "data_dir", "results", "table", "arm", "seed")


@dataclass
class ComparisonArguments:
    """Options that the comparisons share: arms and seeds, the text, and the sizes of a run.

    A program sets `arms` to the names of its arms, and gives its own options and defaults in a derived class.
    """

    arms: ClassVar[Sequence[str]] = ()
    arms_without_text: ClassVar[Sequence[str]] = ()

    train_file: list[str] = option(factory=list, help="Text to train on, as for `hf-pretrain`.")
    validation_file: list[str] = option(
        factory=list, help="Held-out text; without it, documents of train_file are held out."
    )
    data_dir: str = option("data", "Folder of the tasks that the program describes.")
    results: str = option("", "File that each run adds a row to.")
    table: bool = option(False, "Print the tables of the file instead of running anything.")
    arm: list[str] = option(factory=list, help="Arms to run; by default all.")
    seed: list[int] = option(factory=lambda: [0, 1], help="Seeds; each arm runs with each.")
    max_corpus_bytes: int | None = option(None, "Train on a random part of the text.")
    document_separator: Literal["blank_line", "line", "file"] = option(
        "blank_line", "What ends a document of a text file."
    )
    vocab_size: int = option(8192, "Tokens of the tokenizer that is trained on the text.")
    block_size: int = option(64, "Most tokens in an example.")
    batch_size: int = option(16, "Examples a step.")
    learning_rate: float = option(1e-3, "Peak rate on text.")

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
        chosen["demo_corpus"] = not self.train_file
        return DataArguments(**chosen | {"validation_file": self.validation_file or None} | options)

    def training(self, folder: Path, seed: int, **options: Any) -> dict[str, Any]:
        """Return the options of training that all runs share, with further ones."""
        return {
            "output_dir": str(folder),
            "overwrite_output_dir": True,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": 64,
            "learning_rate": self.learning_rate,
            "eval_on_start": False,
            "save_strategy": "no",
            "logging_steps": 100,
            "report_to": "none",
            "seed": seed,
        } | options

    def runs_folder(self) -> Path:
        """Return the folder of the models, beside the results; it is made if need be."""
        path = Path(self.results)
        folder = path.with_name(f"{path.stem}-runs")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def sizes_of(width: int, layers: int, **options: Any) -> dict[str, Any]:
    """Return the options of an encoder's sizes, with a head for every 32 of its width, and further ones."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(1, width // 32)}
    return sizes | {"intermediate_size": 4 * width} | options


def shared_tokenizer(args: ComparisonArguments, texts: Callable[[], Iterable[str]], *, added: Sequence[str]) -> str:
    """Return the folder of a tokenizer that all arms share, byte pairs with further special tokens; the first process trains it.

    Args:
        args: The options, with the size of the vocabulary.
        texts: Gives the texts to train it on.
        added: Special tokens beside those of a masked language model.
    """
    folder = args.runs_folder() / f"tokenizer-{args.vocab_size}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            tokenizer = train_tokenizer(texts(), kind="bpe", vocab_size=args.vocab_size, lowercase=False)
            tokenizer.add_tokens(list(added), special_tokens=True)
            tokenizer.save_pretrained(folder)
    return str(folder)


def flops_of_a_step(trainer: PretrainingTrainer) -> float:
    """Count the floating-point operations of forward and backward: the mean of some batches, whose targets differ in number."""
    size, model = trainer.args.per_device_train_batch_size, trainer.model.train()
    # The counter knows the products that attention is made of, not the fused kernel of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for first in range(0, _COUNTED_BATCHES * size, size):
            batch = trainer._prepare_inputs(
                trainer.data_collator(trainer.train_dataset.__getitems__(range(first, first + size)))
            )
            # A memory costs the same whatever is in it.
            batch.pop("lanes", None)
            sum(loss.sum.sum() for loss in model(**batch).losses.values()).backward()
            model.zero_grad()
    return counter.get_total_flops() / _COUNTED_BATCHES


def held_out_file(args: ComparisonArguments, characters: int) -> list[str]:
    """Return a file with the first documents of the held-out text, as an evaluation of all of it would take half of a run.

    Args:
        args: The options; without a `validation_file` there is none.
        characters: So many of them, or one document.
    """
    if not args.validation_file:
        return []
    path = args.runs_folder() / f"held-out-{characters}.txt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            write_first_documents(args.validation_file, path, characters)
    return [str(path)]


def write_first_documents(files: Sequence[str], path: Path, characters: int) -> None:
    """Write the first documents of files into one file: so many characters of them, or one document."""
    taken: list[str] = []
    for text in read_documents(files):
        if taken and sum(map(len, taken)) + len(text) > characters:
            break
        taken.append(text)
    path.write_text("\n\n".join(taken), encoding="utf-8")


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Return options as the words of a command line; those that are None or empty are left out."""
    given = {name: value for name, value in options.items() if value is not None and value != []}
    words = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return [part for name, values in words.items() for part in (f"--{name}", *map(str, values))]


def trainer_of_program(name: str, argv: Sequence[str], args: ComparisonArguments) -> PretrainingTrainer:
    """Put the Trainer of a command together, as the program of its method does; the first process tokenizes the text."""
    method = load_method(name)
    data_args, model_args, options = parse_arguments(method.arguments, argv, prog=name, description="")
    with FileLock(args.runs_folder() / "_lock"):
        data = (method.load or load_data)(data_args, model_args, options, special_tokens=method.special_tokens)
        set_seed(options.seed)
        return method.build_trainer(data, model_args, options)


def train_by_program(name: str, argv: Sequence[str], *, steps: int) -> tuple[PretrainingTrainer, dict[str, Any]]:
    """Run a command for some steps; return its Trainer, and the held-out metrics of its last evaluation with the seconds."""
    kept: list[PretrainingTrainer] = []
    method = load_method(name)

    def build(*inputs: Any) -> PretrainingTrainer:
        # The rehearsal builds too, before the text is read.
        kept[:] = [method.build_trainer(*inputs)]
        return kept[0]

    begin = time.perf_counter()
    train_method(replace(method, build_trainer=build), [*argv, "--max_steps", str(steps)])
    seconds = round(time.perf_counter() - begin)
    evaluations = [row for row in kept[0].state.log_history if any(key.startswith("eval_") for key in row)]
    held_out = {bare_name(key): value for key, value in evaluations[-1].items() if key.startswith("eval_")}
    return kept[0], {"seconds": seconds, "held_out": held_out}


def compare_arms(
    arguments: type[Chosen],
    *,
    description: str | None,
    run_arm: Callable[..., dict[str, Any]],
    results: Callable[[Path], None] | Sequence[Column],
) -> NoReturn:
    """Be the program of a comparison: run what is missing, then print the tables.

    Args:
        arguments: Dataclass of the program's options.
        description: What the program does, for its help.
        run_arm: Runs an arm with a seed and the options, which it calls `args`, and returns what was measured.
        results: The columns of the table of each set of settings, or what prints the tables of a file of results.
    """

    def main(argv: list[str] | None) -> None:
        (args,) = parse_arguments((arguments,), argv, prog=Path(sys.argv[0]).name, description=description or "")
        if not args.table:
            run_missing(args, partial(run_arm, args=args))
        if callable(results):
            results(Path(args.results))
        else:
            print_settings(Path(args.results), arguments.arms, results)

    sys.exit(run_program(main))


def run_missing(args: ComparisonArguments, run_arm: RunArm) -> None:
    """Run each chosen arm with each seed, unless the file of results has its row."""
    for seed, arm in itertools.product(args.seed, args.arm):
        run_once(args, arm, seed, run_arm)


def read_rows(data_dir: str, task: str, split: str) -> pd.DataFrame:
    """Return the rows of a file of a task.

    Raises:
        InputError: If there is no such file.
    """
    path = Path(data_dir, task, f"{split}.tsv")
    if not path.is_file():
        raise InputError(f"data_dir={data_dir} has no {task}/{split}.tsv: see --help for what it must hold")
    return pd.read_csv(path, sep="\t", header=None, quoting=csv.QUOTE_NONE, keep_default_na=False)


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


def run_once(args: ComparisonArguments, arm: str, seed: int, run_arm: RunArm) -> None:
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


class Column(NamedTuple):
    """A column of a table: title, name in the rows, factor, and decimal digits; None for a power of ten."""

    title: str
    name: str
    factor: float = 1
    digits: int | None = 0


def print_settings(path: Path, arms: Iterable[str], columns: Sequence[Column]) -> None:
    """Print a table of the arms for each set of settings in the results."""
    for settings, rows in rows_by_settings(path).items():
        print(f"\n{settings}")
        print_arms(rows, arms, columns)


def print_arms(rows: Sequence[dict[str, Any]], arms: Iterable[str], columns: Sequence[Column]) -> None:
    """Print mean and standard deviation over the seeds of each arm that was run."""
    cells = [
        [arm, str(len(runs)), *(_cell(runs, column) for column in columns)]
        for arm in arms
        if (runs := [row for row in rows if row["arm"] == arm])
    ]
    if cells:
        print()
        print_table(cells, ["arm", "seeds", *(column.title for column in columns)])


def _cell(rows: Sequence[dict[str, Any]], column: Column) -> str:
    values = [column.factor * row[column.name] for row in rows if column.name in row]
    if column.digits is None or not values:
        return f"{statistics.mean(values):.2e}" if values else ""
    spread = f" ± {statistics.stdev(values):.{column.digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{column.digits}f}{spread}"
