"""Measure models on tasks, one table for all: probes, similarity, minimal pairs, word vectors, likelihoods, fine-tuning.

    hf-pretrain evaluate my-encoder --tasks sst2 stsb blimp wordsim --data_dir data
    hf-pretrain evaluate my-encoder other-encoder --tasks tasks.yaml --how probe similarity

A task is a name, a path or a YAML file. The name is that of a folder of --data_dir with train.* and dev.*, or with minimal pairs,
or of a file of words with scores of their similarity (wordsim), or of questions of analogy (analogies). A path is that of such a
folder or file anywhere, or of one table with a usual header. FILE.yaml:NAME takes one task.

A model is a folder or a name on the Hub: an encoder, a language model, a discriminator, an encoder-decoder, a classifier, an
adapter alone, vectors of words or of texts. It may also be a file of word vectors.

Each task is measured by what is usual for its form; --how chooses others:

    probe       a linear classifier on frozen features          classes and values of texts and pairs
    similarity  rank correlation of cosines with scores         values of pairs; the default there
    pairs       the acceptable sentence scores higher           minimal pairs; the score fits the kind of the model
    words       cosines against scores of people, analogies     words
    likelihood  the right choice is the most probable           choices
    finetune    a model fine-tuned on the task                  all labelled examples
    head        the head that the model was fine-tuned with     all labelled examples

The table has the baselines that need no model: the most frequent class, chance. With --untrained the baseline is the same
architecture with fresh weights. With --seeds probes and fine-tuning are repeated, and the table has mean and deviation.

Everything is written to --output_file, and to the card of each model that is a folder with its record. A number stands beside the
fingerprint of its weights: what earlier weights of the same name gave is left out.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from functools import lru_cache
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
    over_seeds,
    write_results,
)
from hf_pretrain.evaluation.suite.results import read_results, table_of
from hf_pretrain.hub.card import update_card
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.record import check_weights
from hf_pretrain.options import check_options, option
from hf_pretrain.training.parsing import check_changed
from hf_pretrain.training.program import print_table

# What draws by a seed.
_DRAWN = ("probe", "finetune")
_FEWEST_COLUMNS, _LONGEST_LABEL = 80, 24


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

    models: list[str] = option(
        help="Models: folders, names on the Hub, or files of word vectors. A folder may hold an adapter alone."
    )
    tasks: list[str] = option(
        help="Names of tasks in data_dir, paths of folders or tables, YAML files of tasks, or FILE.yaml:NAME."
    )
    data_dir: str | None = option(
        None, "Folder of the data of tasks; by default data, and for a YAML file of tasks its own folder."
    )
    how: list[str] | None = option(
        None,
        "Measures: probe, similarity, pairs, words, likelihood, finetune, head. By default the usual one of each "
        "task.",
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
    strategy: str | None = option(
        None,
        "Of finetune: the strategy of FineTuningArguments; by default layerwise_decay, and full where the layers of a model are "
        "not one list.",
    )
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
    seeds: list[int] | None = option(
        None, "Repeat probes and fine-tuning with each of these seeds, and give mean and deviation."
    )

    def __post_init__(self) -> None:
        """Refuse what has no effect or is missing."""
        check_options(self)
        check_changed(self)
        if len(set(self.models)) != len(self.models):
            raise InputError(f"models={' '.join(self.models)} has one twice: name each model once")
        if self.seeds is not None:
            if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
                raise InputError(f"seeds={self.seeds}: give two or more, each once; one is set by --seed")
            if self.seed:
                raise InputError(f"seed={self.seed} has no effect beside seeds={self.seeds}: leave it out")

    def measures(self) -> MeasureOptions:
        """Return what all measures share."""
        return MeasureOptions(**{name: getattr(self, name) for name in MeasureOptions.__dataclass_fields__})

    def opened(self, name: str, *, untrained: bool = False, seed: int | None = None) -> EvaluatedModel:
        """Return a model, before any part of it is opened."""
        seed = self.seed if seed is None else seed
        return EvaluatedModel(name, untrained=untrained, seed=seed, batch_size=self.batch_size)


ARGUMENTS = (EvaluateArguments,)
Plan = list[tuple[LoadedTask, How]]


def plan_of(args: EvaluateArguments) -> tuple[Plan, dict[str, EvaluatedModel]]:
    """Return the tasks with their measures, and the models, after all files were read and all models checked.

    Raises:
        InputError: If a task cannot be read or measured so, or a model lacks what one needs.
    """
    plan: Plan = []
    for task in find_tasks(args.tasks, data_dir=args.data_dir):
        loaded = LoadedTask(task, args.measures())
        plan += [(loaded, how) for how in task.chosen(args.how)]
    if args.seeds and not any(how in _DRAWN for _, how in plan):
        raise InputError(f"seeds={args.seeds} has no effect: of these measures none is a probe or fine-tuning")
    models = {name: args.opened(name) for name in args.models}
    for name, model in models.items():
        fresh = args.opened(name, untrained=True)
        if args.card and not model.has_record:
            raise InputError(f"card=True: model={name!r} is no folder with the record of a run: leave card out")
        if args.card is not False and model.has_record:
            try:
                check_weights(name)
            except InputError as error:
                raise InputError(f"{error}; --card false leaves the card as it is") from error
        for loaded, how in plan:
            model.check(how, task=loaded.task.name)
            if args.untrained:
                fresh.check(how, task=loaded.task.name)
    for loaded, _ in plan:
        loaded.read()
    for name, model in models.items():
        for loaded, how in plan:
            if how == "head":
                from hf_pretrain.transfer.tuning.heads import check_head

                check_head(name, loaded.data)
        model.open([how for _, how in plan])
        if len(models) > 1:
            # Several would not fit into memory together.
            models[name] = args.opened(name)
    return plan, models


def evaluations_of(model: EvaluatedModel, plan: Plan, args: EvaluateArguments) -> list[Evaluation]:
    """Return what is measured of one model, in the order of the plan."""
    found = []

    @lru_cache(maxsize=1)
    def fresh(seed: int) -> EvaluatedModel:
        return args.opened(model.name, untrained=True, seed=seed)

    def measured(loaded: LoadedTask, how: How) -> Evaluation:
        if how in ("finetune", "head"):
            return _of_head(model, loaded, how, args)
        evaluation = measure_task(model, loaded, how)
        if not args.untrained:
            return evaluation
        return beside_untrained(evaluation, measure_task(fresh(loaded.options.seed), loaded, how))

    for loaded, how in plan:
        print(f"       {model.label} on {loaded.task.name} by {how}", flush=True)
        if args.seeds and how in _DRAWN:
            model.remembers = True
            found.append(over_seeds([measured(_drawn(loaded, seed), how) for seed in args.seeds]))
            model.forget()
        else:
            found.append(measured(loaded, how))
    return found


def _drawn(loaded: LoadedTask, seed: int) -> LoadedTask:
    """Return a task with the draws of another seed."""
    return replace(loaded, options=replace(loaded.options, seed=seed))


def _of_head(model: EvaluatedModel, loaded: LoadedTask, how: How, args: EvaluateArguments) -> Evaluation:
    """Return the scores of a head: that which the model has, or one that is trained now."""
    if how == "head":
        from hf_pretrain.transfer.tuning.fine_tune import head_scores

        scores = head_scores(model.name, loaded.data, max_length=args.max_length, batch_size=args.batch_size)
        return loaded.of_examples(scores, method="the head that it was fine-tuned with, no training", how=how)
    from hf_pretrain.transfer.comparison import tuned_scores
    from hf_pretrain.transfer.layers import has_layers

    # The head of an encoder-decoder stands on both halves.
    is_one_stack = not getattr(model.config, "is_encoder_decoder", False) and has_layers(model.encoder)
    strategy = args.strategy or ("layerwise_decay" if is_one_stack else "full")
    options: dict[str, Any] = {"strategy": strategy, "num_train_epochs": args.num_train_epochs}
    if args.learning_rate is not None:
        options["learning_rate"] = args.learning_rate
    seed = loaded.options.seed
    scores = tuned_scores(model.name, loaded.data, max_length=args.max_length, seed=seed, **options).scores
    rows = len(loaded.data.rows("train"))
    method = f"fine-tuned ({strategy}) for {args.num_train_epochs:g} epochs on {rows:,} rows, one seed"
    return loaded.of_examples(scores, method=method, how=how)


def print_evaluations(rows: list[list[str]], header: list[str], *, width: int) -> None:
    """Print a table that fits a terminal: what does not fit beside the names of the tasks comes below them, in further tables.

    Args:
        rows: Rows of the table: task, metric, examples, then the numbers.
        header: Names of the columns.
        width: Columns of the terminal.
    """
    header = [_short(name) for name in header]
    widths = [2 + max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    names, columns = list(range(3)), list(range(3, len(header)))
    while columns:
        count = 1
        while count < len(columns) and sum(widths[column] for column in names + columns[: count + 1]) <= width:
            count += 1
        shown, columns = names + columns[:count], columns[count:]
        print_table([[row[column] for column in shown] for row in rows], header=[header[column] for column in shown])


def _short(name: str) -> str:
    """Return a name without its middle, if it is long."""
    half = _LONGEST_LABEL // 2 - 1
    return name if len(name) <= _LONGEST_LABEL else f"{name[:half]}…{name[-half:]}"


def main(argv: list[str] | None = None) -> None:
    """Measure the models, print the table, and write the results; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="evaluate", description=__doc__, first="models")
    begin, path = time.perf_counter(), Path(args.output_file)
    read_results(path)
    plan, models = plan_of(args)
    found: dict[str, list[Evaluation]] = {}
    lost: list[str] = []
    cards: list[Path] = []
    labels = {name: model.label for name, model in models.items()}
    for name in args.models:
        model = models.pop(name)
        found[name] = evaluations_of(model, plan, args)
        # The numbers of one model are kept, whatever becomes of the next one.
        lost += write_results(path, {name: found[name]}, weights={name: model.fingerprint})
        if args.card or (args.card is None and model.has_record):
            cards.append(update_card(name, evaluations=found[name]))
    rows, header = table_of(found, list(labels.values()))
    print_evaluations(
        rows, header, width=max(_FEWEST_COLUMNS, shutil.get_terminal_size((_FEWEST_COLUMNS, 24)).columns)
    )
    print(f"       in {time.perf_counter() - begin:.1f} s")
    for name in args.models:
        for evaluation in found[name]:
            print(f"method {labels[name]}, {evaluation.task}: {evaluation.method}")
    print(f"results  {path}")
    for line in lost:
        print(f"         {line}")
    for card in cards:
        print(f"model card  {card}")
