"""Compare strategies of transfer on tasks, with several seeds and numbers of rows, under a budget of FLOPs.

    hf-pretrain compare my-encoder --tasks sst2 rte --data_dir data --strategies full lora features --seeds 0 1 --budget 1e15
    hf-pretrain compare my-encoder other-encoder --tasks tasks.yaml --strategies full frozen --train_sizes 100 1000 all

A strategy is one of fine-tuning, or features (a classic head on features of the frozen encoder). Options follow a colon, and the
same strategy with two rates is two arms: full:learning_rate=5e-5 full:learning_rate=1e-4. An architecture on top is an option
too: full:architecture=bilstm,lstm_size=64. TF-IDF with a linear classifier is
measured first.

With a budget each task and size gets an equal share. All arms begin with a few examples, the better half goes on with twice as
many, from the start again, and so on. The scores on the validation rows decide, so that of the last arm is a little too good. The
plan is made before anything is run, and no outcome exceeds the budget. Without a budget all arms run in full.

Every run is kept in --results. The same command goes on where it was stopped, and more arms or seeds reuse what is there.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.suite import find_tasks
from hf_pretrain.modeling.loading import quiet, without_bars
from hf_pretrain.options import check_options, option
from hf_pretrain.tasks.spec import TaskSpec
from hf_pretrain.training.program import print_table
from hf_pretrain.transfer.comparison.arms import ComparisonArm
from hf_pretrain.transfer.comparison.grid import ComparisonSettings, StrategyComparison
from hf_pretrain.transfer.comparison.report import HEADER, check_plot, plot_comparison, short_names, table_rows


@dataclass
class CompareArguments:
    """Which models, tasks and strategies, and what they may cost.

    Raises:
        InputError: If an option is out of range, or a size is no number of rows.
    """

    ranges: ClassVar[dict[str, str]] = {
        "budget": "(0, inf)",
        "rate_factors": "(0, inf)",
        "batch_size": "[1, inf)",
        "num_train_epochs": "(0, inf)",
        "least_steps": "[1, inf)",
        "max_length": "[1, inf)",
        "validation_fraction": "(0, 1)",
    }

    models: list[str] = option(help="Models: folders, or names on the Hub.")
    tasks: list[str] = option(help="Names of tasks in data_dir, YAML files of tasks, or FILE.yaml:NAME.")
    data_dir: str | None = option(
        None, "Folder of the data of tasks; by default data, and for a YAML file of tasks its own folder."
    )
    strategies: list[str] = option(
        factory=lambda: ["full", "lora", "features"],
        help="Strategies of fine-tuning, or features; options follow a colon: lora:learning_rate=1e-3,lora_rank=16.",
    )
    seeds: list[int] = option(factory=lambda: [0, 1], help="Seeds; each run is done with each.")
    train_sizes: list[str] = option(factory=lambda: ["all"], help="Numbers of rows to train on, or all.")
    budget: float | None = option(
        None, "FLOPs of training that all runs may take together; by default all arms run in full."
    )
    rate_factors: list[float] = option(
        factory=list,
        help="Of an arm that names no learning rate, its own times each is tried on a fifth of the training rows, which is held "
        "out for that; the best is compared.",
    )
    batch_size: int = option(32, "Rows of a step.")
    num_train_epochs: float = option(3.0, "Passes of a full run over the rows.")
    least_steps: int = option(100, "Steps that a full run has at least, where rows are few.")
    max_length: int | None = option(None, "Most tokens of an example; by default what is usual for the task.")
    validation_fraction: float = option(
        0.1, "Share of the rows that is held out where a task has none to evaluate on."
    )
    results: str = option("comparison.json", "File that keeps every run; a stopped comparison goes on from it.")
    plot: str | None = option(None, "PNG of scores against FLOPs; by default beside results, with its name.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        self.sizes()
        if self.plot is not None and Path(self.plot).suffix != ".png":
            raise InputError(f"plot={self.plot!r} must end with .png")
        if len(set(self.models)) != len(self.models):
            raise InputError(f"models={' '.join(self.models)} has one twice: name each model once")

    def sizes(self) -> list[int | None]:
        """Return the numbers of rows, None for all.

        Raises:
            InputError: If one is no number above 0, nor all.
        """
        for size in self.train_sizes:
            if size != "all" and not (size.isdecimal() and int(size) > 0):
                raise InputError(f"train_sizes={size!r} is no number of rows: give numbers above 0, or all")
        return [None if size == "all" else int(size) for size in self.train_sizes]

    def specs(self) -> list[TaskSpec]:
        """Return the tasks.

        Raises:
            InputError: If one has no labelled examples to train on.
        """
        found = []
        for task in find_tasks(self.tasks, data_dir=self.data_dir):
            if task.spec is None:
                raise InputError(f"task {task.name!r} has {task.material}, on which nothing is trained: leave it out")
            found.append(task.spec)
        return found

    def settings(self) -> ComparisonSettings:
        """Return what all runs share."""
        return ComparisonSettings(**{entry.name: getattr(self, entry.name) for entry in fields(ComparisonSettings)})


ARGUMENTS = (CompareArguments,)


def main(argv: list[str] | None = None) -> None:
    """Run the comparison, print the table and draw the plot; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="compare", description=__doc__, first="models")
    begin, specs = time.perf_counter(), args.specs()
    arms = [ComparisonArm.parse(model, text) for model in args.models for text in args.strategies]
    names, plot = short_names(args.models), args.plot or str(Path(args.results).with_suffix(".png"))
    if args.plot is not None or not Path(args.results).exists():
        check_plot(plot)
    print(f"arms   {len(arms)}: {', '.join(f'{names[arm.model]} {arm.name}' for arm in arms)}", flush=True)
    with quiet(), without_bars():
        comparison = StrategyComparison(
            arms,
            specs,
            seeds=args.seeds,
            sizes=args.sizes(),
            settings=args.settings(),
            results=args.results,
            budget=args.budget,
            rate_factors=args.rate_factors,
            say=lambda line: print(f"       {line}", flush=True),
        )
        groups = comparison.run()
    print_table(table_rows(groups), header=HEADER)
    spent = math.fsum(group.flops for group in groups)
    of = "" if args.budget is None else f" of {args.budget:.2e}"
    print(f"       {spent:.2e}{of} FLOPs of training, {time.perf_counter() - begin:.1f} s")
    print(f"results  {args.results}")
    print(f"plot     {plot_comparison(groups, plot)}")
