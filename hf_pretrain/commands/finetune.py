"""Fine-tune an encoder on a task: classes and values of texts or pairs, classes of words, choices, spans that answer.

    hf-pretrain finetune my-encoder --tasks tasks.yaml --task sst2 --strategy full --output_dir my-classifier
    hf-pretrain finetune my-encoder --train_file train.tsv --output_dir my-classifier
    hf-pretrain finetune my-encoder --train_file train.tsv --architecture bilstm --output_dir my-bilstm

The columns of texts and of labels are found by their usual names, or named by --text_columns and --label_column.

The first rows of the table need no encoder: a constant, and for texts TF-IDF with a linear support vector machine. The folder
opens with stock transformers. It holds the predictions of the evaluation rows, the results, the recipe of the run, and the card.

The model may be fine-tuned already. Its head is kept for the same labels, and drawn anew for others.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError
from hf_pretrain.files import write_text
from hf_pretrain.hub.identifiers import check_identifiers
from hf_pretrain.hub.pushing import repository_of
from hf_pretrain.options import option, resolved_options, write_recipe
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec
from hf_pretrain.training.output_folder import OutputFolder, note_own_folders, output_directory, paths_in
from hf_pretrain.training.processes import (
    StopOnRequest,
    Stopping,
    part_at_exit,
    refused_by_libraries,
    reported_faults,
    set_timeout,
    stopping_on_sigterm,
)
from hf_pretrain.training.program import print_table
from hf_pretrain.training.progress import show_progress
from hf_pretrain.transfer.fine_tuning import FineTuningArguments
from hf_pretrain.transfer.strategies import is_adapted, strategy_report
from hf_pretrain.transfer.tuning.export import PREDICTIONS, RECIPE, RESULTS, export_fine_tuned, results_of
from hf_pretrain.transfer.tuning.fine_tune import FineTuned, TaskTrainer, fine_tune
from hf_pretrain.transfer.tuning.heads import ChosenHead
from hf_pretrain.transfer.tuning.options import (
    ARCHITECTURE_HELP,
    ARCHITECTURE_OPTIONS_HELP,
    MIX_LAYERS_HELP,
    TaskArguments,
)
from hf_pretrain.transfer.tuning.references import Reference, constant_reference, tfidf_reference

PROGRAM = "hf-pretrain finetune"


@dataclass
class FinetuneArguments(TaskArguments):
    """Which model, which task, and how its examples are read.

    Raises:
        InputError: If an option is out of range, or has no effect beside the others.
    """

    ranges: ClassVar[dict[str, str]] = {"max_length": "[1, inf)", "doc_stride": "[0, inf)"}
    needs: ClassVar[dict[str, str]] = {
        "choice_columns": "train_file",
        "architecture_options": "architecture",
        "mix_layers": "architecture",
    }

    choice_columns: list[str] | None = option(None, "With task_type choice: columns of the choices, or one of lists.")
    architecture: str | None = option(None, ARCHITECTURE_HELP)
    architecture_options: dict | None = option(None, ARCHITECTURE_OPTIONS_HELP)
    mix_layers: bool = option(False, MIX_LAYERS_HELP)
    metric: str | None = option(None, "The metric that counts; by default of the type of the task.")
    max_length: int | None = option(
        None, "Most tokens of an example; by default 128, of spans 384, or fewer if the model takes no more."
    )
    doc_stride: int | None = option(
        None, "Of spans: tokens that a window shares with the next; by default 128, at most a third of max_length."
    )
    split_seed: int = option(0, "Seed of the rows that are held out, and of those that max_examples keeps.")
    tfidf: bool = option(True, "Measure TF-IDF with a linear support vector machine beside it, for texts.")
    seeds: list[int] | None = option(
        None,
        "Train once with each of these seeds, in a folder of its own, seed-0 and so on; print mean and deviation.",
    )

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        super().__post_init__()
        if self.seeds is not None and (len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds)):
            raise InputError(f"seeds={self.seeds}: give two or more, each once; one is set by --seed")

    def spec(self) -> TaskSpec:
        """Return the task.

        Raises:
            InputError: If there is none of that name, or an option does not go with its type.
        """
        spec = self.find_task() if self.metric is None else replace(self.find_task(), metric=self.metric)
        if self.doc_stride is not None and spec.type != "span":
            raise InputError(f"doc_stride={self.doc_stride} has no effect on type={spec.type!r}: it is for spans")
        return spec

    def head(self) -> dict[str, Any]:
        """Return what stands on top of the encoder, as `fine_tune` takes it."""
        return {name: getattr(self, name) for name in ("architecture", "architecture_options", "mix_layers")}

    def spec_of_files(self) -> TaskSpec:
        """Return the task that the options of files describe."""
        choices = {"choices": tuple(self.choice_columns or ())} if self.choice_columns else {}
        if self.task_type == "choice" and not choices:
            raise InputError("task_type='choice' needs --choice_columns: the columns of the choices, or one of lists")
        if self.task_type == "choice" and not self.text_columns:
            raise InputError(
                "task_type='choice' needs --text_columns: the context, perhaps a beginning of all choices"
            )
        columns = {"text": tuple(self.text_columns or ()), "label": self.label_column}
        files = {name: tuple(getattr(self, name) or ()) for name in ("train_file", "validation_file")}
        name = Path((self.train_file or [""])[0]).stem
        return TaskSpec(name=name, type=self.task_type, **cast(Any, columns | files | choices))


@dataclass
class FinetuneTrainingArguments(FineTuningArguments):
    """Strategy, training, and what becomes of the folder and of the card."""

    overwrite_output_dir: bool = option(False, "Replace the earlier run in output_dir, once all is read and checked.")
    resume_from_checkpoint: str | None = option(
        None,
        "Go on from the last whole checkpoint in output_dir (`true`), from the checkpoint of this path, or "
        "(`auto`) from the last whole one if there is any and else from the start.",
    )
    logging_steps: float = option(0.1, "Log each so many steps; below 1, a share of all steps.")
    save_total_limit: int | None = option(1, "Keep so many checkpoints.")
    hub_strategy: str = option("end", "The model is pushed at the end, and never before.")
    language: list[str] | None = option(None, "Codes of the languages of the text, for the model card: en de.")
    license: str | None = option(None, "License of the model, for its card; the Hub's identifier: apache-2.0.")
    datasets: list[str] | None = option(None, "Ids of the training data on the Hub, for the model card.")
    tags: list[str] | None = option(None, "More tags of the model on the Hub, such as biomedical.")

    def __post_init__(self) -> None:
        """Check the card's options, then the others."""
        check_identifiers({name: getattr(self, name) for name in ("language", "license", "datasets", "tags")})
        if str(getattr(self.hub_strategy, "value", self.hub_strategy)) != "end":
            raise InputError(
                f"hub_strategy={self.hub_strategy!r}: a fine-tuned model is pushed at the end; leave it out"
            )
        super().__post_init__()
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs):
            name = "num_train_epochs" if self.max_steps else "max_steps"
            raise InputError(f"{name}=0 trains nothing: give a positive number of steps or epochs")

    def facts(self) -> dict[str, Any]:
        """Return what the card is told."""
        return {name: getattr(self, name) for name in ("language", "license", "datasets", "tags")}


ARGUMENTS = (FinetuneArguments, FinetuneTrainingArguments)


@dataclass(frozen=True)
class Run:
    """One training: its options, with a seed and a folder of its own, claims on the folders that it lies in, the one around."""

    options: FinetuneArguments
    args: FinetuneTrainingArguments
    folders: tuple[OutputFolder, ...]
    around: str | None = None


def main(argv: list[str] | None = None) -> None:
    """Read the task, train, measure, and write the folder; see the top of the file."""
    options, args = parse_command(ARGUMENTS, argv, name="finetune", description=__doc__, first="model_name_or_path")
    spec = options.spec()
    ChosenHead.of(**options.head()).check(spec, strategy=args.strategy)
    _check_seeds(options, args)
    args.enable_jit_checkpoint = False
    set_timeout(args)
    read = paths_in((options, args), sys.argv[1:] if argv is None else argv)
    with ExitStack() as stack:
        stopping = stack.enter_context(stopping_on_sigterm())
        runs = _claimed(stack, options, args, read)
        stack.enter_context(reported_faults(args.output_dir))
        if args.push_to_hub and args.process_index == 0:
            # Missing rights must show before anything is trained.
            repository_of(args)
        data = options.load(spec, seed=options.split_seed)
        program = _Program(data, stopping)
        for run in runs:
            program.train(run)
        if args.process_index == 0:
            program.report(options, args)
        part_at_exit()


def _check_seeds(options: FinetuneArguments, args: FinetuneTrainingArguments) -> None:
    if options.seeds is None:
        return
    if args.push_to_hub:
        raise InputError("push_to_hub=True: a repository has one model, and seeds trains several: push one folder")
    wanted = args.resume_from_checkpoint
    if wanted is not None and wanted.lower() not in ("true", "auto"):
        raise InputError(f"resume_from_checkpoint={wanted!r} is of one seed: give auto, which finds that of each")


def _claimed(
    stack: ExitStack, options: FinetuneArguments, args: FinetuneTrainingArguments, read: Sequence[str]
) -> list[Run]:
    """Claim the folder of each run before the first one begins."""
    if options.seeds is None:
        return [Run(options, args, (stack.enter_context(output_directory(cast(Any, args), inputs=read)),))]
    is_resumed = args.resume_from_checkpoint is not None
    # Of runs that go on, the folder around them holds no checkpoint.
    around = () if is_resumed else (stack.enter_context(output_directory(cast(Any, args), inputs=read)),)
    runs = []
    for seed in options.seeds:
        own = copy.copy(args)
        own.seed, own.output_dir = seed, str(Path(args.output_dir, f"seed-{seed}"))
        own.resume_from_checkpoint, own.overwrite_output_dir = ("auto" if is_resumed else None), False
        folder = stack.enter_context(output_directory(cast(Any, own), inputs=read))
        runs.append(Run(replace(options, seeds=None), own, (*around, folder), args.output_dir))
    return runs


class _Program:
    """Trains the runs of a task, and reports."""

    def __init__(self, data: TaskData, stopping: Stopping) -> None:
        self.data, self.stopping = data, stopping
        self.references: list[Reference] = []
        self.has_begun = False
        self.found: list[tuple[FineTuned, Run]] = []

    def train(self, run: Run) -> None:
        """Train, and write the folder."""
        options, args = run.options, run.args

        def begins(trainer: TaskTrainer, note: str) -> None:
            shown.enter_context(closing(show_progress(trainer)))
            for folder in run.folders:
                folder.training_begins()
            if args.process_index == 0:
                if run.around is not None:
                    note_own_folders(run.around, [Path(args.output_dir).name])
                self._measure_references(options)
                self._announce(trainer, note, is_first=not self.found)
            # On every process: what a library raises in training is no refusal, such as that another process is gone.
            self.has_begun = True

        with refused_by_libraries(unless=lambda: self.has_begun), ExitStack() as shown:
            found = fine_tune(
                options.model_name_or_path,
                self.data,
                args,
                **options.head(),
                max_length=options.max_length,
                doc_stride=options.doc_stride,
                begins=begins,
                callbacks=[StopOnRequest(self.stopping)],
            )
        export_fine_tuned(
            found,
            model_name=options.model_name_or_path,
            options=(options, args),
            program=PROGRAM,
            references=self.references,
            facts=args.facts(),
        )
        self.found.append((found, run))

    def _measure_references(self, options: FinetuneArguments) -> None:
        if self.references:
            return
        self.references.append(constant_reference(self.data))
        tfidf = tfidf_reference(self.data, seed=options.split_seed) if options.tfidf else None
        self.references += [] if tfidf is None else [tfidf]

    def _announce(self, trainer: TaskTrainer, note: str, *, is_first: bool) -> None:
        args, data = trainer.args, self.data
        if is_first:
            print(f"task   {data.spec.name}: {len(data.rows('train')):,} examples to train on, ", end="")
            print(f"{len(data.validation):,} to measure on; at most {trainer.max_length} tokens each")
            print(f"       columns: {data.columns}")
            print(f"model  {note}")
            print(f"strategy {args.strategy}:")
            rows = [
                (row.part, f"{row.learning_rate:.3g}" if row.learning_rate else "", row.begins, f"{row.parameters:,}")
                for row in strategy_report(trainer.model, args)
            ]
            print_table(rows, header=("part", "rate", "moves", "parameters"))
        if len(self.found) or args.seed != 42:
            print(f"seed   {args.seed}")
        sys.stdout.flush()

    def report(self, options: FinetuneArguments, args: FinetuneTrainingArguments) -> None:
        """Print the scores, and where everything is; of several seeds their mean and deviation too."""
        names = list(self.found[0][0].scores)
        names.insert(0, names.pop(names.index(self.data.main_metric)))
        rows = [(known.name, *(_number(known.scores.get(name)) for name in names)) for known in self.references]
        for found, run in self.found:
            title = f"fine-tuned ({run.args.strategy})" + (f", seed {run.args.seed}" if options.seeds else "")
            rows.append((title, *(_number(found.scores.get(name)) for name in names)))
        if options.seeds:
            table = np.array([[found.scores[name] for name in names] for found, _ in self.found])
            spread = zip(table.mean(axis=0), table.std(axis=0, ddof=1), strict=True)
            rows.append(("mean ± deviation", *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in spread)))
            self._write_summary(options, args, names, table)
        print(f"\n{'Held-out rows' if not self.data.spec.validation_file else 'Validation rows'}:")
        print_table(rows, header=("", *names))
        seconds = sum(found.seconds for found, _ in self.found)
        print(f"       {seconds:.1f} s of training")
        for found, run in self.found:
            _print_folder(found, run, self.data)
        if options.seeds:
            print(
                f"results {Path(args.output_dir, RESULTS)}  (each seed's model is whole in its folder; none is at the top)"
            )

    def _write_summary(
        self, options: FinetuneArguments, args: FinetuneTrainingArguments, names: Sequence[str], table: np.ndarray
    ) -> None:
        content = {
            "metric": self.data.main_metric,
            "mean": dict(zip(names, table.mean(axis=0).tolist(), strict=True)),
            "deviation": dict(zip(names, table.std(axis=0, ddof=1).tolist(), strict=True)),
            "runs": [results_of(found, self.references) for found, _ in self.found],
        }
        write_text(Path(args.output_dir, RESULTS), json.dumps(content, indent=2) + "\n")
        write_recipe(resolved_options((options, args)), Path(args.output_dir, RECIPE), program=PROGRAM)


def _print_folder(found: FineTuned, run: Run, data: TaskData) -> None:
    folder, last = Path(run.args.output_dir), found.trainer.state.global_step
    which = "the last weights" if found.step == last else f"the best weights, of step {found.step:,} of {last:,}"
    trust = "" if type(found.trainer.plan.inner).__module__.startswith("transformers.") else ", trust_remote_code=True"
    opens = f'{data.auto_class.__name__}.from_pretrained("{folder}"{trust})'
    if run.args.export == "adapter" and is_adapted(found.trainer.model):
        opens = "an adapter alone; the card has the code that opens it"
    print(f"model  {folder}  ({which}; {opens})")
    print(f"card   {folder / 'README.md'}, beside {PREDICTIONS}, {RESULTS} and {RECIPE}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
