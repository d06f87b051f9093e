"""Does distillation pay? Students of one size, judged on a task and on text.

    python benchmarks/distillation_quality.py --train_file books.txt --data_dir data [--arm labels distilled] [--seed 0 1]
    python benchmarks/distillation_quality.py --table

A masked language model is pre-trained on the text, once (or --teacher_model names one); it is the teacher of general
distillation, proposes words for augmentation, and is fine-tuned on SST-2 to be the teacher of the task. All students have four
layers and half of its width. The task, with as many steps of the student in every arm:

    labels      a new student, the labels alone
    distilled   a new student; TinyBERT's stages: embeddings, hidden states and attention, then predictions, without labels
    augmented   the same on augmented sentences
    general     as distilled, from a student that learned from the teacher's hidden states and attention on text
    both        as augmented, from that student
    pretrained  the labels alone, from a student that was pre-trained on text (the arm mlm)

Text, for as many FLOPs in every arm:

    mlm              masked language modelling
    distilbert       DistilBERT's losses; the FLOPs of the teacher's forward pass count
    distilbert_free  the same; they do not count, as if another had paid for them
    tinybert         the teacher's hidden states and attention; they count. There is no head, and so no loss on held-out text

FLOPs are counted once an arm on a real batch by torch's FlopCounterMode. Students on text are judged by their loss on held-out
text and by a logistic regression that reads SST-2 and CoLA off the frozen encoder; those of the task by their accuracy on its
held-out sentences, dev and test, and by how close they come to the teacher there.

The folder `data_dir` holds sst2/train.tsv, dev.tsv and test.tsv (sentence, label) and cola/train.tsv and dev.tsv (source, label,
mark, sentence). Each run is a row of the file `results`: what is there is not run again. Models are kept in a folder beside it.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from filelock import FileLock
from rtd_quality import TASKS, flops_of_a_step, read_task, train_for
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_pretrain.data.prepare import PreparedData, prepare_data
from hf_pretrain.evaluation.probes import encode, probe_accuracy
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import TASK_METHOD as distil_task
from hf_pretrain.objectives.distillation import (
    DataCollatorForTask,
    DistillationTrainer,
    DistillationTrainingArguments,
    StudentArguments,
    TaskDataArguments,
    TaskDistillationTrainingArguments,
    load_task,
    load_text,
)
from hf_pretrain.objectives.distillation.comparison import compare
from hf_pretrain.objectives.encoder import MASKED_LM as mlm
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM, MaskedLMTrainingArguments
from hf_pretrain.options import option
from hf_pretrain.tasks.data import prepare_task
from hf_pretrain.training.arguments import bf16_is_fast
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer
from results import Column, ComparisonArguments, compare_arms, print_arms, rows_by_settings, run_once, sizes_of

TEXT_ARMS: dict[str, dict[str, Any]] = {
    "mlm": {"prediction_weight": 0.0, "cosine_weight": 0.0, "mlm_weight": 1.0},
    "distilbert": {"distillation_method": "distilbert"},
    "distilbert_free": {"distillation_method": "distilbert"},
    "tinybert": {"distillation_method": "tinybert"},
}


class TaskArm(NamedTuple):
    """Whether the labels teach, whether sentences are augmented, and the arm whose student is gone on with."""

    by_labels: bool = False
    is_augmented: bool = False
    origin: str | None = None


TASK_ARMS = {
    "labels": TaskArm(by_labels=True),
    "distilled": TaskArm(),
    "augmented": TaskArm(is_augmented=True),
    "general": TaskArm(origin="tinybert"),
    "both": TaskArm(is_augmented=True, origin="tinybert"),
    "pretrained": TaskArm(by_labels=True, origin="mlm"),
}
ARMS = (*TASK_ARMS, *TEXT_ARMS)


@dataclass
class QualityArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("distillation_quality.json", "File that each run adds a row to.")
    teacher_model: str | None = option(
        None, "A masked language model that this library pre-trained, instead of a new one."
    )
    teacher_flops: float = option(6e13, "Training budget of a new teacher.")
    model_type: str = option("modernbert", "Architecture of a new teacher and of the students.")
    teacher_layers: int = option(4, "Its layers.")
    teacher_size: int = option(256, "Its width; a head for every 32.")
    student_layers: int = option(4, "Layers of the students.")
    flops: float = option(6e12, "Training budget of a student on text.")
    teacher_rate: float = option(1e-3, "Its peak rate on the task.")
    teacher_epochs: float = option(3.0, "Passes of the teacher over the task.")
    intermediate_steps: int = option(800, "Steps of TinyBERT's first stage on the task.")
    intermediate_rate: float = option(5e-4, "Their peak rate.")
    prediction_steps: int = option(400, "Steps of its second stage; of labels alone, as many as of both.")
    prediction_rate: float = option(3e-4, "Their peak rate.")
    augmentation_rows: int = option(8, "Tries a sentence.")
    probe_rows: int = option(10_000, "Most sentences that a probe is trained on.")

    def folder(self, name: str = "") -> Path:
        """Return the folder of a model of these settings."""
        digest = hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=4).hexdigest()
        return self.runs_folder() / digest / name


@contextmanager
def unfinished(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process; yield whether its model has still to be made."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "_lock"):
        yield not (folder / "config.json").exists()


def language_model(args: QualityArguments) -> str:
    """Return the folder of the teacher on text, and pre-train it if it is not there."""
    if args.teacher_model is not None:
        return args.teacher_model
    folder = args.folder("teacher")
    with unfinished(folder) as is_missing:
        if is_missing:
            options = MaskedLMTrainingArguments(**args.training(folder, 0))
            data = prepare_data(args.text_data(vocab_size=args.vocab_size), seed=0, output_dir=folder)
            sizes = ModelArguments(
                model_type=args.model_type,
                max_position_embeddings=args.block_size,
                **sizes_of(args.teacher_size, args.teacher_layers),
            )
            set_seed(0)
            trainer = mlm.build_trainer(data, sizes, options)
            train_for(trainer, budget=args.teacher_flops)
            trainer.save_model()
    return str(folder)


def task_files(args: QualityArguments) -> dict[str, str]:
    """Write the task's examples with names of their columns, and return the files: to train on, and held out."""
    files = {}
    for name, splits in (("train", ("train",)), ("held_out", ("dev", "test"))):
        path = args.folder() / f"sst2-{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = [pair for split in splits for pair in zip(*read_task(args.data_dir, "sst2", split), strict=True)]
        text = "".join(json.dumps({"sentence": sentence, "label": label}) + "\n" for sentence, label in pairs)
        # As it was, so that what was made of it is found again.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        files[name] = str(path)
    return files


def task_data(args: QualityArguments, **options: Any) -> TaskDataArguments:
    """Return the options of the task's examples."""
    files = task_files(args)
    return TaskDataArguments(
        train_file=[files["train"]], validation_file=[files["held_out"]], max_length=args.block_size, **options
    )


def classifier(args: QualityArguments) -> str:
    """Return the folder of the teacher of the task, and fine-tune it if it is not there."""
    origin, folder = language_model(args), args.folder("classifier")
    with unfinished(folder) as is_missing:
        if is_missing:
            set_seed(0)
            tokenizer = AutoTokenizer.from_pretrained(origin)
            model = AutoModelForSequenceClassification.from_pretrained(origin, num_labels=2)
            data = prepare_task(task_data(args), tokenizer=tokenizer, config=model.config, seed=0)
            rate = {"learning_rate": args.teacher_rate, "num_train_epochs": args.teacher_epochs}
            options = args.training(folder, 0, bf16=bf16_is_fast(), **rate)
            del options["overwrite_output_dir"], options["eval_on_start"]
            use_cpu = not torch.accelerator.is_available()
            trainer = FineTuningTrainer(
                model,
                FineTuningArguments(**options, use_cpu=use_cpu),
                train_dataset=data.train_dataset,
                data_collator=DataCollatorForTask(tokenizer),
                processing_class=tokenizer,
            )
            trainer.train()
            trainer.save_model()
    return str(folder)


def student_options(args: QualityArguments, teacher: str, origin: str | None = None) -> StudentArguments:
    """Return the options of a student: a new one, or a checkpoint."""
    if origin is not None:
        return StudentArguments(teacher_name_or_path=teacher, model_name_or_path=origin)
    width = AutoConfig.from_pretrained(language_model(args)).hidden_size // 2
    # As many heads as the teacher, so that their attention can be compared.
    return StudentArguments(
        teacher_name_or_path=teacher,
        num_hidden_layers=args.student_layers,
        hidden_size=width,
        intermediate_size=4 * width,
    )


# On text


def run_on_text(arm: str, seed: int, args: QualityArguments) -> dict[str, Any]:
    """Train a student on text and judge it."""
    teacher, folder = language_model(args), args.folder(f"{arm}-{seed}")
    options = DistillationTrainingArguments(**args.training(folder, seed), **TEXT_ARMS[arm])
    chosen = student_options(args, teacher)
    data = load_text(args.text_data(), chosen, options)
    set_seed(seed)
    trainer = distil.build_trainer(data, chosen, options)
    step = flops_of_a_step(trainer)
    row = train_for(
        trainer, budget=args.flops, step=step - (flops_of_teacher(trainer) if arm.endswith("_free") else 0)
    )
    trainer.save_model()
    return row | judge_on_text(trainer, data, args)


def flops_of_teacher(trainer: DistillationTrainer) -> int:
    """Count the floating-point operations of the teacher on a batch of the text."""
    examples = trainer.train_dataset.__getitems__(range(trainer.args.per_device_train_batch_size))
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert trainer.model.teacher is not None, "distillation on text has a teacher"
    with FlopCounterMode(display=False) as counter:
        trainer.model.teacher(inputs, batch["target_positions"])
    return int(counter.get_total_flops())


def judge_on_text(trainer: DistillationTrainer, data: PreparedData, args: QualityArguments) -> dict[str, Any]:
    """Measure a student on held-out text and by probes."""
    student = trainer.model.student
    teacher = type(student).from_pretrained(language_model(args)).to(student.device)
    collator = DataCollatorForMaskedLM(data.tokenizer)
    row: dict[str, Any] = compare(student, teacher, data.eval_dataset, collator=collator, max_examples=2000)
    for task in TASKS:
        (texts, labels), (others, answers) = (read_task(args.data_dir, task, split) for split in ("train", "dev"))
        texts, labels = texts[: args.probe_rows], labels[: args.probe_rows]
        features = [encode(student, data.tokenizer, sentences) for sentences in (texts, others)]
        score = probe_accuracy(features[0], labels, features[1], answers)
        row |= {f"{task}_accuracy": score.accuracy, f"{task}_matthews": score.matthews_correlation}
    return row


# On the task


def stages(arm: str, args: QualityArguments) -> dict[str, dict[str, Any]]:
    """Return what is particular to each stage of an arm, by the stage's name."""
    first, second = args.intermediate_steps, args.prediction_steps
    if TASK_ARMS[arm].by_labels:
        losses = {"training_stage": "prediction", "prediction_weight": 0.0, "labels_weight": 1.0}
        return {"labels": losses | {"max_steps": first + second, "learning_rate": args.prediction_rate}}
    return {
        "intermediate": {
            "training_stage": "intermediate", "max_steps": first, "learning_rate": args.intermediate_rate
        },
        "prediction": {"training_stage": "prediction", "max_steps": second, "learning_rate": args.prediction_rate},
    }  # fmt: skip


def run_on_task(arm: str, seed: int, args: QualityArguments) -> dict[str, Any]:
    """Train a student on the task and judge it."""
    teacher, how, start = classifier(args), TASK_ARMS[arm], None
    if how.origin is not None:
        run_once(args, how.origin, seed, lambda arm, seed: run_arm(arm, seed, args))
        start = str(args.folder(f"{how.origin}-{seed}"))
    extra = {"augmentation_model": language_model(args), "augmentation_rows": args.augmentation_rows}
    data_args = task_data(args, **(extra if how.is_augmented else {}))
    row: dict[str, Any] = {"steps": 0, "seconds": 0.0}
    for stage, options in stages(arm, args).items():
        folder = args.folder(f"{arm}-{seed}-{stage}")
        training = TaskDistillationTrainingArguments(
            **args.training(folder, seed, train_sampling_strategy="group_by_length", **options),
            # Asking for all answers takes longer where a run does not come to all of them.
            cache_teacher=not how.is_augmented,
        )
        chosen = student_options(args, teacher, start)
        data = load_task(data_args, chosen, training)
        set_seed(seed)
        begin = time.perf_counter()
        trainer = distil_task.build_trainer(data, chosen, training)
        trainer.train()
        row["steps"] += training.max_steps
        row["seconds"] += time.perf_counter() - begin
        trainer.save_model()
        start = str(folder)
    student, count = trainer.model.student, len(data.eval_dataset)
    model = AutoModelForSequenceClassification.from_pretrained(teacher).to(student.device)
    collator = DataCollatorForTask(data.tokenizer)
    row["examples"] = len(data.train_dataset)
    return row | compare(student, model, data.eval_dataset, collator=collator, max_examples=count)


def run_arm(arm: str, seed: int, args: QualityArguments) -> dict[str, Any]:
    """Run an arm."""
    row = (run_on_task if arm in TASK_ARMS else run_on_text)(arm, seed, args)
    return row | {"threads": torch.get_num_threads()}


COLUMNS = {
    "task": (
        Column("accuracy", "student_accuracy", 100, 1),
        Column("teacher's", "teacher_accuracy", 100, 1),
        Column("agreement", "agreement", 100, 1),
        Column("KL", "kl", 1, 3),
        Column("examples", "examples"),
    ),
    "text": (
        Column("MLM loss", "student_mlm_loss", 1, 3),
        Column("teacher's", "teacher_mlm_loss", 1, 3),
        Column("KL", "kl", 1, 3),
        Column("agreement", "agreement", 100, 1),
        Column("SST-2 probe", "sst2_accuracy", 100, 1),
        Column("CoLA MCC", "cola_matthews", 100, 1),
    ),
}
COSTS = (Column("steps", "steps"), Column("seconds", "seconds"), Column("speed-up at 32", "speed_up_batch_32", 1, 1))


def print_results(path: Path) -> None:
    """Print two tables for each set of settings in the results."""
    for settings, rows in rows_by_settings(path).items():
        print(f"\n{settings}")
        for part, arms in (("task", TASK_ARMS), ("text", TEXT_ARMS)):
            print_arms(rows, arms, (*COLUMNS[part], *COSTS))


if __name__ == "__main__":
    compare_arms(QualityArguments, description=__doc__, run_arm=run_arm, results=print_results)
