"""Train one encoder on several tasks at once, each with a head of its own.

    hf-pretrain multitask my-encoder --tasks tasks.yaml --output_dir my-multitask
    hf-pretrain multitask my-encoder --tasks tasks.yaml --task mnli qqp --sampling annealed --output_dir my-multitask

A step is of one task, drawn by --sampling. The folder is the encoder, which opens with `AutoModel.from_pretrained`; the folder of
a task in it, such as my-multitask/mnli, opens with the Auto class of its head. Either may be the model of a next training.
--architecture puts an architecture on the encoder for each task, with weights of its own; --task_architectures chooses another
one for some tasks, such as pair_encoder for pairs of texts. A folder with an architecture is a model for finetune, and not for
multitask.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hf_pretrain.commands import parse_command
from hf_pretrain.commands.finetune import FinetuneTrainingArguments
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.hub.pushing import repository_of
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.options import check_options, option, resolved_options, write_recipe
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec, load_task, read_tasks
from hf_pretrain.training.output_folder import output_directory, paths_in
from hf_pretrain.training.parsing import check_changed
from hf_pretrain.training.processes import (
    StopOnRequest,
    first_process_first,
    nothing_trained,
    part_at_exit,
    refused_by_libraries,
    reported_faults,
    set_timeout,
    stopped,
    stopping_on_sigterm,
)
from hf_pretrain.training.program import print_table
from hf_pretrain.training.progress import show_progress
from hf_pretrain.transfer.multitask.modeling import MultiTaskModel, check_heads
from hf_pretrain.transfer.multitask.trainer import MultiTaskArguments, MultiTaskTrainer
from hf_pretrain.transfer.tuning.heads import chosen_head
from hf_pretrain.transfer.tuning.options import ARCHITECTURE_HELP, ARCHITECTURE_OPTIONS_HELP, MIX_LAYERS_HELP

PROGRAM = "hf-pretrain multitask"


@dataclass
class TasksArguments:
    """Which encoder, which tasks, and how their examples are read.

    Raises:
        InputError: If an option is out of range.
    """

    ranges: ClassVar[dict[str, str]] = {
        "max_length": "[1, inf)",
        "doc_stride": "[0, inf)",
        "max_examples": "[2, inf)",
        "validation_fraction": "(0, 1)",
    }
    needs: ClassVar[dict[str, str]] = {"architecture_options": "architecture", "mix_layers": "architecture"}

    model_name_or_path: str = option(help="The encoder: a folder, or a name on the Hub.")
    tasks: str = option(help="YAML file of tasks.")
    task: list[str] | None = option(None, "Names of those tasks in it that are trained; by default all.")
    data_dir: str | None = option(
        None, "Folder that the files of the tasks are relative to; by default the YAML's own."
    )
    architecture: str | None = option(None, ARCHITECTURE_HELP)
    architecture_options: dict | None = option(None, ARCHITECTURE_OPTIONS_HELP)
    mix_layers: bool = option(False, MIX_LAYERS_HELP)
    task_architectures: dict | None = option(
        None,
        'Other architectures of some tasks, as JSON: {"rte": "pair_encoder"}, with options {"rte": {"architecture": "bilstm", '
        '"architecture_options": {"lstm_size": 64}, "mix_layers": true}}, or null for the stock head.',
    )
    max_length: int = option(128, "Most tokens of an example, of two texts that are read apart of each.")
    doc_stride: int = option(32, "Of questions: tokens that a window of a long text shares with the next.")
    validation_fraction: float = option(0.1, "Share of a task's examples that is held out if it has no others.")
    max_examples: int | None = option(None, "Train on so many examples of each task at most.")
    split_seed: int = option(0, "Seed of the rows that are held out, and of those that max_examples keeps.")

    def __post_init__(self) -> None:
        """Check the numbers, and refuse options without effect."""
        check_options(self)
        check_changed(self)

    def specs(self) -> dict[str, TaskSpec]:
        """Return the tasks to train on by name, in the order of the file.

        Raises:
            InputError: If there is none of a name, or it has nothing to train on.
        """
        known = read_tasks(self.tasks, data_dir=self.data_dir)
        for name in self.task or ():
            check_choice(name, known, name="task")
        found = {name: spec for name, spec in known.items() if self.task is None or name in self.task}
        for name, spec in found.items():
            if not (spec.train_file or (spec.dataset_name and spec.dataset_split)):
                raise InputError(
                    f"task {name!r} has no rows to train on: name train_file, or leave it out by --task with the others"
                )
        return found

    def head(self) -> dict[str, Any]:
        """Return what stands on top of the encoder for each task, as `MultiTaskModel.from_tasks` takes it."""
        names = ("architecture", "architecture_options", "mix_layers", "task_architectures")
        return {name: getattr(self, name) for name in names}

    def load(self, specs: Mapping[str, TaskSpec], tokenizer: PreTrainedTokenizerBase) -> dict[str, TaskData]:
        """Return the tasks by name, with their examples tokenized in the cache."""
        shares = {"validation_fraction": self.validation_fraction, "max_examples": self.max_examples}
        tasks = {name: load_task(spec, seed=self.split_seed, **cast(Any, shares)) for name, spec in specs.items()}
        # Of columns that were found by their names, how many texts there are is known only now.
        heads = check_heads({name: data.spec for name, data in tasks.items()}, **self.head())
        lengths: dict[str, Any] = {"max_length": self.max_length, "doc_stride": self.doc_stride}
        for name, data in tasks.items():
            for split in ("train", "validation"):
                data.encoded(split, tokenizer, apart=heads[name].reads_apart, **lengths)
        return tasks


@dataclass
class MultiTaskProgramArguments(FinetuneTrainingArguments, MultiTaskArguments):
    """How the tasks are trained, and what becomes of the folder and of the card."""


ARGUMENTS = (TasksArguments, MultiTaskProgramArguments)


def main(argv: list[str] | None = None) -> None:
    """Read the tasks, train, measure and write the models; see the top of the file."""
    options, args = parse_command(ARGUMENTS, argv, name="multitask", description=__doc__, first="model_name_or_path")
    specs = options.specs()
    check_heads(specs, strategy=args.strategy, **options.head())
    args.sampling_options(specs)
    args.enable_jit_checkpoint = False
    set_timeout(args)
    read = paths_in((options, args), sys.argv[1:] if argv is None else argv)
    with (
        stopping_on_sigterm() as stopping,
        output_directory(args, inputs=read) as folder,
        reported_faults(args.output_dir),
    ):
        if args.push_to_hub and args.process_index == 0:
            # Missing rights must show before anything is trained.
            repository_of(args)
        has_begun = False
        with refused_by_libraries(unless=lambda: has_begun):
            trainer = _trainer(options, args, specs, callbacks=[StopOnRequest(stopping)])
            baselines = {name: data.baseline() for name, data in trainer.tasks.items()}
            if args.process_index == 0:
                _print_plan(trainer)
            has_begun = True
            folder.training_begins()
            with closing(show_progress(trainer)):
                trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        _finish(trainer, options, baselines)
        part_at_exit()


def _trainer(
    options: TasksArguments, args: MultiTaskProgramArguments, specs: dict[str, TaskSpec], *, callbacks: list[Any]
) -> MultiTaskTrainer:
    """Read and tokenize the tasks, open the encoder, and return the Trainer."""
    tokenizer = cast(PreTrainedTokenizerBase, from_pretrained(AutoTokenizer, options.model_name_or_path))
    # The first process tokenizes, and the others find the cache.
    with first_process_first(args):
        tasks = options.load(specs, tokenizer)
    set_seed(args.seed)
    model = MultiTaskModel.from_tasks(
        options.model_name_or_path,
        tasks,
        seed=args.seed,
        loss_weights=args.loss_weights,
        learns_loss_weights=args.loss_weighting == "uncertainty",
        **options.head(),
    )
    lengths = {"max_length": options.max_length, "doc_stride": options.doc_stride}
    return MultiTaskTrainer(
        model, args, tasks=tasks, tokenizer=tokenizer, facts=args.facts(), callbacks=callbacks, **lengths
    )


def _finish(trainer: MultiTaskTrainer, options: TasksArguments, baselines: dict[str, dict[str, float]]) -> None:
    """Measure, write and push the models, unless the run was stopped."""
    args = cast(MultiTaskProgramArguments, trainer.args)
    folder = str(args.output_dir)
    if any(isinstance(each, StopOnRequest) and each.has_stopped for each in trainer.callback_handler.callbacks):
        raise stopped(folder, trainer.state.global_step)
    if not trainer.state.global_step:
        raise nothing_trained(len(cast(Any, trainer.train_dataset)))
    scores = trainer.evaluate()
    trainer.save_state()
    trainer.save_model()
    if args.process_index == 0:
        write_recipe(resolved_options([options, args]), Path(folder, "recipe.yaml"), program=PROGRAM)
        _print_scores(trainer, baselines, mean=scores["eval_mean"])
    if args.push_to_hub:
        trainer.push_to_hub()


def _print_plan(trainer: MultiTaskTrainer) -> None:
    """Print the tasks and how many steps each has."""
    drawn = Counter(trainer.drawn_tasks()[: trainer.total_steps].tolist())
    total = trainer.total_steps
    rows = [
        (
            name,
            data.spec.type,
            str(chosen_head(trainer.plan.inner.task_model(name)).architecture or "stock"),
            f"{len(data.rows('train')):,}",
            f"{len(data.validation):,}",
            f"{drawn[number]:,} ({drawn[number] / total:.1%})",
        )
        for number, (name, data) in enumerate(trainer.tasks.items())
    ]
    print_table(rows, header=("task", "type", "head", "examples", "to measure on", "steps"))


def _print_scores(trainer: MultiTaskTrainer, baselines: dict[str, dict[str, float]], *, mean: float) -> None:
    """Print the metric that counts of each task, beside that of a constant."""
    rows = []
    for name, data in trainer.tasks.items():
        metric = data.main_metric
        rows.append((name, metric, f"{trainer.scores[name][metric]:.3f}", f"{baselines[name].get(metric, 0.0):.3f}"))
    print_table([*rows, ("mean", "", f"{mean:.3f}", "")], header=("task", "metric", "model", "a constant"))
    print(f"model  {trainer.args.output_dir}  (AutoModel; of a task {trainer.args.output_dir}/{rows[0][0]})")
