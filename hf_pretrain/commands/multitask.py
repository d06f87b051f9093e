"""Train one encoder on several tasks at once, each with a head of its own.

    hf-pretrain multitask my-encoder --tasks tasks.yaml --output_dir my-multitask
    hf-pretrain multitask my-encoder --tasks tasks.yaml --task mnli qqp --sampling annealed --output_dir my-multitask

A step is of one task, drawn by --sampling. The folder is the encoder, which opens with `AutoModel.from_pretrained`; the folder of
a task in it, such as my-multitask/mnli, opens with the Auto class of its head. Either may be the model of a next training.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.options import option, resolved_options, write_recipe
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec, load_task, read_tasks
from hf_pretrain.training.program import print_table
from hf_pretrain.transfer.multitask.modeling import MultiTaskModel
from hf_pretrain.transfer.multitask.trainer import MultiTaskArguments, MultiTaskTrainer


@dataclass(kw_only=True)
class MultiTaskProgramArguments(MultiTaskArguments):
    """Which encoder and which tasks, beside the options of the training.

    Raises:
        InputError: If an option is out of range, or has no effect beside the others.
    """

    ranges: ClassVar[dict[str, str]] = MultiTaskArguments.ranges | {
        "max_length": "[1, inf)",
        "doc_stride": "[0, inf)",
        "max_examples": "[2, inf)",
        "validation_fraction": "(0, 1)",
    }

    model_name_or_path: str = option(help="The encoder: a folder, or a name on the Hub.")
    tasks: str = option(help="YAML file of tasks.")
    task: list[str] | None = option(None, "Names of those tasks in it that are trained; by default all.")
    max_length: int = option(128, "Most tokens of an example.")
    doc_stride: int = option(32, "Of questions: tokens that a window of a long text shares with the next.")
    validation_fraction: float = option(0.1, "Share of a task's examples that is held out if it has no others.")
    max_examples: int | None = option(None, "Train on so many examples of each task at most.")

    def specs(self) -> dict[str, TaskSpec]:
        """Return the tasks to train on by name.

        Raises:
            InputError: If there is none of a name, or it has nothing to train on.
        """
        known = read_tasks(self.tasks)
        for name in self.task or ():
            check_choice(name, known, name="task")
        found = {name: spec for name, spec in known.items() if self.task is None or name in self.task}
        for name, spec in found.items():
            if not (spec.train_file or (spec.dataset_name and spec.dataset_split)):
                raise InputError(
                    f"task {name!r} has no rows to train on: name train_file, or leave it out by --task with the others"
                )
        return found


ARGUMENTS = (MultiTaskProgramArguments,)


def main(argv: list[str] | None = None) -> None:
    """Read the tasks, train, measure and write the models; see the top of the file."""
    args: Any = parse_command(ARGUMENTS, argv, name="multitask", description=__doc__, first="model_name_or_path")
    specs, checkpoint = args.specs(), _checkpoint(args)
    args.sampling_options(specs)
    tokenizer = cast(PreTrainedTokenizerBase, from_pretrained(AutoTokenizer, args.model_name_or_path))
    # The first process tokenizes, and the others find the cache.
    with args.main_process_first(desc="tokenizing"):
        tasks = {name: _read(args, spec, tokenizer) for name, spec in specs.items()}
    baselines = {name: data.baseline() for name, data in tasks.items()}
    set_seed(args.seed)
    model = MultiTaskModel.from_tasks(
        args.model_name_or_path,
        tasks,
        seed=args.seed,
        loss_weights=args.loss_weights,
        learns_loss_weights=args.loss_weighting == "uncertainty",
    )
    lengths = {"max_length": args.max_length, "doc_stride": args.doc_stride}
    trainer = MultiTaskTrainer(model, args, tasks=tasks, tokenizer=tokenizer, **lengths)
    if args.process_index == 0:
        _print_plan(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    scores = trainer.evaluate()
    trainer.save_model()
    if args.process_index == 0:
        write_recipe(resolved_options([args]), Path(args.output_dir, "recipe.yaml"), program="multitask")
        _print_scores(trainer, baselines, mean=scores["eval_mean"])
    if args.push_to_hub:
        trainer.push_to_hub()


def _read(args: MultiTaskProgramArguments, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Return a task whose examples are tokenized in the cache."""
    data = load_task(
        spec, seed=args.seed, validation_fraction=args.validation_fraction, max_examples=args.max_examples
    )
    for split in ("train", "validation"):
        data.encoded(split, tokenizer, max_length=args.max_length, doc_stride=args.doc_stride)
    return data


def _checkpoint(args: MultiTaskArguments) -> str | None:
    """Return the checkpoint to go on from, None to begin.

    Raises:
        InputError: If the folder is in use, or has no checkpoint to go on from.
    """
    folder, wanted = Path(str(args.output_dir)), args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"output_dir={str(folder)!r} is in use: name a folder that is empty or does not exist, or go on with "
                "--resume_from_checkpoint true"
            )
        return None
    found = wanted
    if str(wanted).lower() == "true":
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None or not Path(found, "trainer_state.json").is_file():
        raise InputError(f"resume_from_checkpoint={wanted!r}: there is no checkpoint of a run in {found or folder}")
    return str(found)


def _print_plan(trainer: MultiTaskTrainer) -> None:
    """Print the tasks and how many steps each has."""
    drawn = Counter(trainer.drawn_tasks().tolist())
    total = sum(drawn.values())
    rows = [
        (
            name,
            data.spec.type,
            f"{len(data.rows('train')):,}",
            f"{len(data.validation):,}",
            f"{drawn[number]:,} ({drawn[number] / total:.1%})",
        )
        for number, (name, data) in enumerate(trainer.tasks.items())
    ]
    print_table(rows, header=("task", "type", "examples", "to measure on", "steps"))


def _print_scores(trainer: MultiTaskTrainer, baselines: dict[str, dict[str, float]], *, mean: float) -> None:
    """Print the metric that counts of each task, beside that of a constant."""
    rows = []
    for name, data in trainer.tasks.items():
        metric = data.main_metric
        rows.append((name, metric, f"{trainer.scores[name][metric]:.3f}", f"{baselines[name].get(metric, 0.0):.3f}"))
    print_table([*rows, ("mean", "", f"{mean:.3f}", "")], header=("task", "metric", "model", "a constant"))
    print(f"model  {trainer.args.output_dir}  (AutoModel; of a task {trainer.args.output_dir}/{rows[0][0]})")
