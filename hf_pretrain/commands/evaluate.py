"""Measure models on tasks, one table for all: probes, similarity, minimal pairs, word vectors, likelihoods, fine-tuning.

    hf-pretrain evaluate my-encoder --tasks sst2 stsb blimp wordsim --data_dir data
    hf-pretrain evaluate my-encoder other-encoder --tasks tasks.yaml --how probe similarity

A task is a name or a YAML file. The name is that of a folder of --data_dir with train.* and dev.*, or with minimal pairs, or of a
file of words with scores of their similarity (wordsim), or of questions of analogy (analogies). FILE.yaml:NAME takes one task.

Each task is measured by what is usual for its form; --how chooses others:

    probe       a linear classifier on frozen features          classes and values of texts and pairs
    similarity  rank correlation of cosines with scores         values of pairs; the default there
    pairs       the acceptable sentence scores higher           minimal pairs; the score fits the kind of the model
    words       cosines against scores of people, analogies     words
    likelihood  the right choice is the most probable           choices
    finetune    a model fine-tuned on the task                  all labelled examples

The table has the baselines that need no model: the most frequent class, chance. With --untrained the baseline is the same
architecture with fresh weights. Everything is written to --output_file, and to the card of each model that is a folder with its
record.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.suite import (
    EvaluatedModel,
    How,
    LoadedTask,
    MeasureOptions,
    beside_untrained,
    find_tasks,
    measure_task,
)
from hf_pretrain.evaluation.suite.results import read_results, table_of, write_results
from hf_pretrain.hub.card import update_card
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.options import check_options, option
from hf_pretrain.training.parsing import check_changed
from hf_pretrain.training.program import print_table


@dataclass
class EvaluateArguments:
    """Which models, which tasks, and how they are measured.

    Raises:
        InputError: If an option is out of range, or has no effect beside the others.
    """

    ranges: ClassVar[dict[str, str]] = {
        "max_train_examples": "[5, inf)",
        "max_examples": "[1, inf)",
        "max_length": "[1, inf)",
        "batch_size": "[1, inf)",
        "validation_fraction": "(0, 1)",
        "num_train_epochs": "(0, inf)",
        "learning_rate": "(0, inf)",
    }
    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("strategy", "num_train_epochs", "learning_rate"), "how~finetune"),
    }

    models: list[str] = option(help="Models: folders, names on the Hub, or files of word vectors.")
    tasks: list[str] = option(help="Names of tasks in data_dir, YAML files of tasks, or FILE.yaml:NAME.")
    data_dir: str | None = option(
        None, "Folder of the data of tasks; by default data, and for a YAML file of tasks its own folder."
    )
    how: list[str] | None = option(
        None, "Measures: probe, similarity, pairs, words, likelihood, finetune. By default the usual one of each task."
    )
    max_train_examples: int | None = option(None, "Rows that probes and fine-tuning learn from, at most.")
    max_examples: int | None = option(
        None, "Rows that are scored, at most: the first ones; of minimal pairs those of each paradigm."
    )
    max_length: int | None = option(None, "Most tokens of a text; by default as many as the model takes.")
    validation_fraction: float = option(
        0.1, "Share of the rows that is held out where a task has none to evaluate on."
    )
    batch_size: int = option(64, "Texts in a batch.")
    strategy: str = option("layerwise_decay", "Of finetune: the strategy of FineTuningArguments.")
    num_train_epochs: float = option(3.0, "Of finetune: passes over the rows.")
    learning_rate: float | None = option(
        None, "Of finetune: peak learning rate; by default 1e-3 where few weights move, else 1e-4."
    )
    untrained: bool = option(False, "Also measure the same architecture with fresh weights, as the baseline.")
    card: bool | None = option(
        None, "Write the results into the models' cards; by default into those of folders with the record of a run."
    )
    output_file: str = option("evaluation.json", "File of the results; results of other models and tasks in it stay.")
    seed: int = option(0, "Seed of probes, of held-out rows, of fresh weights and of fine-tuning.")

    def __post_init__(self) -> None:
        """Refuse what has no effect or is missing."""
        check_options(self)
        check_changed(self)
        if len(set(self.models)) != len(self.models):
            raise InputError(f"models={' '.join(self.models)} has one twice: name each model once")

    def measures(self) -> MeasureOptions:
        """Return what all measures share."""
        return MeasureOptions(**{name: getattr(self, name) for name in MeasureOptions.__dataclass_fields__})

    def opened(self, name: str, *, untrained: bool = False) -> EvaluatedModel:
        """Return a model, before any part of it is opened."""
        return EvaluatedModel(name, untrained=untrained, seed=self.seed, batch_size=self.batch_size)


ARGUMENTS = (EvaluateArguments,)
Plan = list[tuple[LoadedTask, How]]


def plan_of(args: EvaluateArguments) -> Plan:
    """Return the tasks with their measures, after their files were read and the models checked.

    Raises:
        InputError: If a task cannot be read or measured so, or a model lacks what one needs.
    """
    plan: Plan = []
    for task in find_tasks(args.tasks, data_dir=args.data_dir):
        loaded = LoadedTask(task, args.measures())
        plan += [(loaded, how) for how in task.chosen(args.how)]
    for name in args.models:
        model, fresh = args.opened(name), args.opened(name, untrained=True)
        if args.card and not model.has_record:
            raise InputError(f"card=True: model={name!r} is no folder with the record of a run: leave card out")
        for loaded, how in plan:
            model.check(how, task=loaded.task.name)
            if args.untrained:
                fresh.check(how, task=loaded.task.name)
    for loaded, _ in plan:
        loaded.read()
    return plan


def evaluate_models(args: EvaluateArguments) -> dict[str, list[Evaluation]]:
    """Measure each model on each task.

    Args:
        args: The options.

    Returns:
        Model -> its evaluations, in the order of the tasks.

    Raises:
        InputError: If a task cannot be read or measured so, or a model lacks what one needs.
    """
    plan, found = plan_of(args), {}
    for name in args.models:
        model = args.opened(name)
        evaluations = [_measured(model, loaded, how, args) for loaded, how in plan]
        if args.untrained:
            fresh = args.opened(name, untrained=True)
            evaluations = [
                beside_untrained(evaluation, measure_task(fresh, loaded, how))
                for evaluation, (loaded, how) in zip(evaluations, plan, strict=True)
            ]
        found[name] = evaluations
    return found


def _measured(model: EvaluatedModel, loaded: LoadedTask, how: How, args: EvaluateArguments) -> Evaluation:
    print(f"       {model.label} on {loaded.task.name} by {how}", flush=True)
    if how != "finetune":
        return measure_task(model, loaded, how)
    from hf_pretrain.transfer.comparison import tuned_scores

    options: dict[str, Any] = {name: getattr(args, name) for name in ("strategy", "num_train_epochs", "seed")}
    if args.learning_rate is not None:
        options["learning_rate"] = args.learning_rate
    scores = tuned_scores(model.name, loaded.data, max_length=args.max_length, **options).scores
    rows = len(loaded.data.rows("train"))
    method = f"fine-tuned ({args.strategy}) for {args.num_train_epochs:g} epochs on {rows:,} rows, one seed"
    return loaded.of_examples(scores, method=method, how=how)


def main(argv: list[str] | None = None) -> None:
    """Measure the models, print the table, and write the results; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="evaluate", description=__doc__, first="models")
    begin, path = time.perf_counter(), Path(args.output_file)
    read_results(path)
    found = evaluate_models(args)
    models = [args.opened(name) for name in found]
    rows, header = table_of(found, [model.label for model in models])
    print_table(rows, header=header)
    print(f"       in {time.perf_counter() - begin:.1f} s")
    for model in models:
        for evaluation in found[model.name]:
            print(f"method {model.label}, {evaluation.task}: {evaluation.method}")
    print(f"results  {write_results(path, found)}")
    for model in models:
        if args.card or (args.card is None and model.has_record):
            print(f"model card  {update_card(model.name, evaluations=found[model.name])}")
