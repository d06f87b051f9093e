"""Make a small and fast classifier from a fine-tuned one, and measure what the teacher adds to the labels.

    python examples/distillation.py --output_dir distilled
    python examples/distillation.py --output_dir distilled --model_name_or_path google-bert/bert-base-uncased \
        --task_train train.tsv --task_validation dev.tsv --student_layers 4 --distillation_rate 5e-5 --learning_rate 1e-4

A masked language model is fine-tuned on a task: this is the teacher. A student is cut from it. The student learns the teacher's
embeddings, hidden states and attention, then its predictions, on sentences in which likely words replace some words. For
comparison, the same student is trained for as many steps on the labels alone.

A task is two files of lines "sentence<TAB>label". Without them, the task is to find the package of a docstring. Without a
checkpoint, a small BERT is pre-trained first, on the docstrings of all installed packages. Neither needs a network. The options
of `transformers.TrainingArguments` apply to the teacher's fine-tuning.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from domain_adaptation import Task
from fine_tuning import begin, fine_tune
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_pretrain.cli import main as hf_pretrain
from hf_pretrain.cli import run_program
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import DataCollatorForTask
from hf_pretrain.objectives.distillation.comparison import compare
from hf_pretrain.tasks.examples import encode
from hf_pretrain.training.program import print_table
from hf_pretrain.transfer.fine_tuning import FineTuningArguments


@dataclass
class ExampleArguments:
    """Teacher, task, student and lengths of the stages."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Masked language model for the teacher; by default a small one is pre-trained first."},
    )
    task_train: str | None = field(
        default=None, metadata={"help": 'Task to learn: lines "sentence<TAB>label"; by default a task of docstrings.'}
    )
    task_validation: str | None = field(
        default=None, metadata={"help": "Sentences for the accuracy, in the same format."}
    )
    max_length: int = field(default=64, metadata={"help": "Most tokens of a sentence."})
    student_layers: int = field(
        default=2, metadata={"help": "Layers of the student, a divisor of the teacher's number."}
    )
    intermediate_steps: int = field(default=300, metadata={"help": "Steps on the teacher's states and attention."})
    prediction_steps: int = field(default=300, metadata={"help": "Steps on the teacher's predictions."})
    distillation_rate: float = field(
        default=5e-4, metadata={"help": "Peak learning rate of the student; lower for a large one."}
    )
    augmentation_rows: int = field(
        default=5, metadata={"help": "Attempts to vary a sentence; 0 trains on the original sentences."}
    )
    pretraining_steps: int = field(default=1500, metadata={"help": "Steps of pre-training of the small BERT."})
    pretraining_bytes: int = field(default=8_000_000, metadata={"help": "Bytes of docstrings for its pre-training."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the small BERT."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the small BERT."})
    docstrings: int = field(default=400, metadata={"help": "Paragraphs of each package in the task of docstrings."})

    def __post_init__(self) -> None:
        """Refuse half a task."""
        if (self.task_train is None) != (self.task_validation is None):
            raise InputError("task_train and task_validation go together: name both or neither")


def run(method: str, args: FineTuningArguments, **options: Any) -> str:
    """Run a method as on the command line, and return the folder of its result."""
    # accelerate has one precision a process.
    options |= {"seed": args.seed, "bf16": bool(args.bf16), "save_strategy": "no", "report_to": "none"}
    status = hf_pretrain([method, *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    if status:
        raise SystemExit(status)
    return str(options["output_dir"])


def pretrain(folder: Path, example: ExampleArguments, args: FineTuningArguments) -> str:
    """Pre-train a small BERT on docstrings."""
    return run(
        "mlm",
        args,
        output_dir=folder,
        max_corpus_bytes=example.pretraining_bytes,
        vocab_size=4096,
        block_size=example.max_length,
        hidden_size=example.hidden_size,
        num_hidden_layers=example.num_hidden_layers,
        num_attention_heads=max(1, example.hidden_size // 32),
        intermediate_size=4 * example.hidden_size,
        max_position_embeddings=example.max_length,
        per_device_train_batch_size=16,
        max_steps=example.pretraining_steps,
        learning_rate=1e-3,
        warmup_steps=0.1,
    )


def write_task(folder: Path, task: Task) -> dict[str, Path]:
    """Write the examples as files for `hf-pretrain distil-task`, and return the files by option."""
    files = {}
    for option, part in (("train_file", task.train), ("validation_file", task.validation)):
        files[option] = folder / f"{option}.jsonl"
        rows = ({"sentence": row["sentence"], "label": task.labels[row["label"]]} for row in part)
        files[option].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def train_students(
    folder: Path,
    teacher: str,
    language_model: str,
    files: dict[str, Path],
    example: ExampleArguments,
    args: FineTuningArguments,
) -> dict[str, str]:
    """Train the student in both ways; return the folder of each way."""
    common = {
        **files,
        "teacher_name_or_path": teacher,
        "max_length": example.max_length,
        "learning_rate": example.distillation_rate,
        "warmup_steps": 0.1,
    }
    cut = {"student_layers": "uniform", "num_hidden_layers": example.student_layers}
    by_labels = {"prediction_weight": 0.0, "labels_weight": 1.0}
    steps = example.intermediate_steps + example.prediction_steps
    labels = run("distil-task", args, **common, **cut, **by_labels, output_dir=folder / "labels", max_steps=steps)
    if example.augmentation_rows:
        common |= {"augmentation_model": language_model, "augmentation_rows": example.augmentation_rows}
    stage = {"training_stage": "intermediate", "max_steps": example.intermediate_steps}
    first = run("distil-task", args, **common, **cut, **stage, output_dir=folder / "intermediate")
    stage = {"training_stage": "prediction", "max_steps": example.prediction_steps}
    student = run("distil-task", args, **common, **stage, model_name_or_path=first, output_dir=folder / "student")
    return {"the labels alone": labels, "the teacher": student}


def evaluate(folder: str, teacher: str, held_out: Dataset, example: ExampleArguments) -> dict[str, float]:
    """Compare a student with its teacher on all held-out sentences."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    models = [AutoModelForSequenceClassification.from_pretrained(name) for name in (folder, teacher)]
    rows = encode(
        held_out,
        tokenizer,
        columns=["sentence"],
        labels="label",
        config=models[1].config,
        max_length=example.max_length,
    )
    return compare(*models, rows, collator=DataCollatorForTask(tokenizer), max_examples=len(rows))


def print_students(found: dict[str, dict[str, float]]) -> None:
    """Print the students below their teacher."""
    measured = next(iter(found.values()))
    rows = [("teacher", f"{measured['teacher_accuracy']:.4f}", "", f"{measured['teacher_parameters']:,}", "1")]
    rows += [
        (
            f"student of {source}",
            f"{row['student_accuracy']:.4f}",
            f"{row['agreement']:.4f}",
            f"{row['student_parameters']:,}",
            f"{row['speed_up_batch_32']:.1f}",
        )
        for source, row in found.items()
    ]
    print_table(rows, header=("", "accuracy", "as the teacher", "parameters", "times as fast"))


def main(argv: list[str] | None = None) -> None:
    """Run the example from the command line; see the top of the file."""
    # As many steps as the students, and one rate for all layers: a small BERT has not learned much before.
    own: dict[str, Any] = {"num_train_epochs": 12.0, "layerwise_learning_rate_decay": 1.0}
    example, args, folder, task = begin(ExampleArguments, argv, program=__file__, description=__doc__ or "", **own)
    language_model = example.model_name_or_path or pretrain(folder / "base", example, args)
    args.output_dir = str(folder / "teacher")
    fine_tune(language_model, task, args)
    students = train_students(folder, args.output_dir, language_model, write_task(folder, task), example, args)
    found = {source: evaluate(path, args.output_dir, task.validation, example) for source, path in students.items()}
    print(f"\nOn {len(task.validation)} sentences of {task.name}:")
    print_students(found)
    print(f"\nstudent  {students['the teacher']}")


if __name__ == "__main__":
    sys.exit(run_program(main))
