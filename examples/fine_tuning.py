"""Fine-tune a checkpoint with a learning rate for each layer, and compare it with the majority class.

    python examples/fine_tuning.py --output_dir tuned
    python examples/fine_tuning.py --output_dir tuned --model_name_or_path my-electra \
        --task_train train.tsv --task_validation dev.tsv --learning_rate 1e-4 --num_train_epochs 3

A task is two files of lines "sentence<TAB>label". Without them, the task is to find the package of a docstring. Without a
checkpoint, a small ELECTRA is pre-trained first, on the docstrings of all installed packages. Neither needs a network. Stock
transformers opens the classifier in tuned/classifier. All options of `transformers.TrainingArguments` are available.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset
from domain_adaptation import Task, read_task
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    set_seed,
)

from hf_pretrain.cli import main as hf_pretrain
from hf_pretrain.cli import run_program
from hf_pretrain.data import draws
from hf_pretrain.data.text.docstrings import module_docstrings
from hf_pretrain.errors import InputError
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import print_table
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer

# Dependencies of this library, so always installed; few enough for a demonstration of a minute.
PACKAGES = ("numpy", "scipy", "sklearn", "torch", "transformers")


@dataclass
class ExampleArguments:
    """Checkpoint and task of the fine-tuning."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune; by default a small ELECTRA is pre-trained first."}
    )
    task_train: str | None = field(
        default=None, metadata={"help": 'Task to learn: lines "sentence<TAB>label"; by default a task of docstrings.'}
    )
    task_validation: str | None = field(
        default=None, metadata={"help": "Sentences for the accuracy, in the same format."}
    )
    pretraining_steps: int = field(default=2000, metadata={"help": "Steps of pre-training of the small ELECTRA."})
    pretraining_bytes: int = field(default=8_000_000, metadata={"help": "Bytes of docstrings for its pre-training."})
    docstrings: int = field(default=400, metadata={"help": "Paragraphs of each package in the task of docstrings."})

    def __post_init__(self) -> None:
        """Refuse half a task."""
        if (self.task_train is None) != (self.task_validation is None):
            raise InputError("task_train and task_validation go together: name both or neither")


def docstring_task(count: int) -> Task:
    """Return a task: from which of five packages is this paragraph of a docstring?

    Every fifth module is held out. Paragraphs that name one of the packages are left out, because they would be too easy.

    Args:
        count: Paragraphs of each package.
    """
    rows: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for label, package in enumerate(PACKAGES):
        texts = list(zip(range(count), paragraphs(package), strict=False))
        for _, (module, text) in texts:
            rows[module % 5 == 0].append((text, label))
    held_out, train = (
        Dataset.from_dict({"sentence": [text for text, _ in part], "label": [label for _, label in part]})
        for part in (rows[True], rows[False])
    )
    return Task(train, held_out, labels=list(PACKAGES), name="docstrings")


def paragraphs(package: str) -> Iterator[tuple[int, str]]:
    """Yield paragraphs of prose from a package's docstrings, at most three from a module, with the module's number."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, "it is a dependency of this library"
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    for module in draws.permutation(len(files), seed=0, stream=package).tolist():
        texts = [" ".join(text.split()) for text in module_docstrings(files[module]).split("\n\n")]
        found = [text for text in texts if is_prose(text) and not any(name in text.lower() for name in PACKAGES)]
        yield from ((module, text) for text in found[:3])


def is_prose(text: str) -> bool:
    """Whether a paragraph has a usual length and consists mostly of letters."""
    return 60 <= len(text) <= 600 and sum(c.isalpha() or c == " " for c in text) >= 0.9 * len(text)


def pretrain(folder: Path, example: ExampleArguments, args: FineTuningArguments) -> str:
    """Pre-train a small ELECTRA by the recipe of `make demo`, as on the command line."""
    options = {
        "config": "demo",
        "output_dir": folder,
        "max_steps": example.pretraining_steps,
        "max_corpus_bytes": example.pretraining_bytes,
        "warmup_steps": 0.1,
        "seed": args.seed,
        "bf16": bool(args.bf16),  # accelerate has one precision a process
    }
    status = hf_pretrain(["rtd", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    if status:
        raise SystemExit(status)
    return str(folder)


def fine_tune(checkpoint: str, task: Task, args: FineTuningArguments) -> float:
    """Fine-tune a classifier, save it and return its accuracy on the validation set."""
    from hf_pretrain.evaluation.metrics import Accuracy

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    names = {"id2label": dict(enumerate(task.labels)), "label2id": {name: i for i, name in enumerate(task.labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=len(task.labels), **names)
    train, validation = (
        part.map(lambda rows: tokenizer(rows["sentence"], truncation=True), batched=True, remove_columns="sentence")
        for part in (task.train, task.validation)
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = prediction.predictions.argmax(axis=-1)
        return Accuracy(keep_in_memory=True).compute(predictions=predicted, references=prediction.label_ids)

    trainer = FineTuningTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model()
    print("\nPeak learning rates, from the head to the embeddings:")
    print(
        "  "
        + "  ".join(f"{rate:.1e}" for rate in sorted({g["initial_lr"] for g in trainer.optimizer.param_groups})[::-1])
    )
    return trainer.evaluate()["eval_accuracy"]


def begin(
    options_class: type, argv: list[str] | None, *, program: str, description: str, **defaults: Any
) -> tuple[Any, FineTuningArguments, Path, Task]:
    """Read the options and the task of an example that fine-tunes a model.

    Args:
        options_class: Dataclass of the example's own options, among them `task_train`, `task_validation` and `docstrings`.
        argv: The arguments, without the name of the program; those of the process if None.
        program: Path of the program.
        description: Text of its help.
        **defaults: What differs from the defaults of `FineTuningArguments` for the small model of this example.

    Returns:
        The example's options, those of fine-tuning, the empty folder to write to, and the task.
    """
    example, args = parse_arguments(
        (options_class, FineTuningArguments),
        argv,
        prog=Path(program).name,
        description=description,
        # Values for a small model; for a large one, see the top of the file.
        defaults={"save_strategy": "no", "learning_rate": 1e-3, "num_train_epochs": 5.0} | defaults,
    )
    folder = Path(args.output_dir)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"output_dir={args.output_dir!r} is in use: name another")
    if example.task_train is None:
        return example, args, folder, docstring_task(example.docstrings)
    return example, args, folder, read_task(example.task_train, example.task_validation)


def main(argv: list[str] | None = None) -> None:
    """Run the example from the command line; see the top of the file."""
    example, args, folder, task = begin(ExampleArguments, argv, program=__file__, description=__doc__ or "")
    checkpoint = example.model_name_or_path or pretrain(folder / "base", example, args)
    args.output_dir = str(folder / "classifier")
    accuracy = fine_tune(checkpoint, task, args)

    train, answers = (list(part["label"]) for part in (task.train, task.validation))
    most_common = Counter(train).most_common(1)[0][0]
    print(f"\nAccuracy on {len(answers)} sentences after fine-tuning on {len(train)}:")
    rows = [("majority class", answers.count(most_common) / len(answers)), ("fine-tuned", accuracy)]
    print_table([(name, f"{value:.4f}") for name, value in rows], header=("", task.name))
    print(f"\nclassifier  {args.output_dir}")


if __name__ == "__main__":
    sys.exit(run_program(main))
