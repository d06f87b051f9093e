"""Tiny teachers and students that classify tokens or answer questions, with examples of their tasks on disk."""

import json

import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, BertConfig

from helpers.method_matrix import NO_DROPOUT, QUIET, TINY, VOCAB_SIZE, RecordGradients, tiny_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.objectives.distillation import TASK_METHOD as distil_task
from hf_pretrain.objectives.distillation import (
    StudentArguments,
    TaskDataArguments,
    TaskDistillationTrainingArguments,
    load_task,
)

AUTO_CLASSES = {
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
}
TASKS = sorted(AUTO_CLASSES)
TAGS = ["O", "A", "B"]


def model(task, *, seed=0, **sizes):
    """A model that is sure of what it says; of tokens it tells three classes apart."""
    names = TAGS if task == "token-classification" else ["begin", "end"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    torch.manual_seed(seed)
    config = BertConfig(**{**TINY, "vocab_size": VOCAB_SIZE, "initializer_range": 0.2, **labels, **sizes})
    return AUTO_CLASSES[task].from_config(config).eval()


def save_teacher(task, folder, **sizes):
    """Write a teacher and return its folder."""
    teacher = model(task, **{"num_hidden_layers": 4, "hidden_size": 48, **sizes})
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def token_rows(count, *, seed=0):
    """Words with tags, which the words tell; some rows have none."""
    rows = []
    for length, *numbers in draws.integers(
        draws.row_keys(range(count), seed=seed, stream="tags"), 13, high=2**20
    ).tolist():
        words = [f"w{number % 50}" for number in numbers[: 1 + length % 12]]
        tags = [TAGS[int(word[1:]) % 3] for word in words]
        rows.append({"tokens": words, "labels": None if length % 7 == 0 else tags})
    return rows


def question_rows(count, *, seed=0):
    """The answer is the word after the one that is asked for; some have no answer, or an unknown one."""
    rows = []
    for kind, *numbers in draws.integers(
        draws.row_keys(range(count), seed=seed, stream="asked"), 12, high=2**20
    ).tolist():
        words = [f"w{number % 50}" for number in numbers[: 4 + kind % 8]]
        place = kind % (len(words) - 1)
        begin = len(" ".join(words[: place + 1])) + 1
        answers = {"text": [words[place + 1]], "answer_start": [begin]}
        if kind % 6 == 0:
            answers = {"text": [], "answer_start": []}
        rows.append(
            {"question": words[place], "context": " ".join(words), "answers": None if kind % 5 == 0 else answers}
        )
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task_files(task, folder, *, train=60, held_out=13):
    """Write the examples of a task and return the files."""
    rows = token_rows if task == "token-classification" else question_rows
    parts = {"train": rows(train, seed=1), "dev": rows(held_out, seed=2)}
    return [write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()]


def build_task(task, folder, *, data_options=None, model_options=None, **options):
    """Return a Trainer for a task on tiny data from disk: fp32, quiet, unclipped, without dropout."""
    folder.mkdir(parents=True, exist_ok=True)
    train, dev = task_files(task, folder)
    teacher = folder / "teacher"
    if not teacher.exists():
        save_teacher(task, teacher)
    defaults = QUIET | {"output_dir": str(folder / "out")}
    args = TaskDistillationTrainingArguments(**{**defaults, "task": task, **options})
    data_args = TaskDataArguments(
        **{"train_file": [train], "validation_file": [dev], "max_length": 24, "doc_stride": 4, **(data_options or {})}
    )
    sizes = TINY | {"config_overrides": NO_DROPOUT, "teacher_name_or_path": str(teacher)}
    model_args = StudentArguments(**(sizes | (model_options or {})))
    data = load_task(data_args, model_args, args)
    torch.manual_seed(args.seed)
    trainer = distil_task.build_trainer(data, model_args, args)
    trainer.recorder = RecordGradients()
    trainer.add_callback(trainer.recorder)
    return trainer
