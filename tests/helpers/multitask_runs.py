"""Small trainings of several tasks: tasks of every type, an encoder on disk, and Trainers on them."""

import json

import torch
import yaml
from transformers import AutoModel, BertConfig, BertTokenizer

from hf_pretrain.tasks.spec import load_task, read_tasks
from hf_pretrain.transfer.multitask.modeling import MultiTaskModel
from hf_pretrain.transfer.multitask.trainer import MultiTaskArguments, MultiTaskTrainer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["who", "?", *(f"w{i}" for i in range(30))]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
SIZES |= {"intermediate_size": 16, "max_position_embeddings": 64}
PASSAGE = " ".join(f"w{i}" for i in range(12))


def tokenizer():
    return BertTokenizer(vocab={token: i for i, token in enumerate([*SPECIALS, *WORDS])}, model_max_length=64)


def sentence(row, *, seed=1):
    return " ".join(f"w{(7 * row + seed * j * j + 3 * j) % 30}" for j in range(2 + row % 5))


def question(row):
    answer = f"w{row % 12}"
    return {
        "question": f"who {answer} ?",
        "context": PASSAGE,
        "answers": {"text": [answer], "answer_start": [PASSAGE.index(answer)]},
    }


# Name -> options and the row of a number.
TASKS = {
    "topic": (
        {"type": "classification", "text": "text", "label": "label"},
        lambda i: {"text": f"w{i % 3} {sentence(i)}", "label": ("bad", "good", "odd")[i % 3]},
    ),
    "pair": (
        {"type": "classification", "text": ["a", "b"], "label": "label"},
        lambda i: {"a": sentence(i), "b": sentence(i if i % 2 else i + 1), "label": ("no", "yes")[i % 2]},
    ),
    "value": (
        {"type": "regression", "text": "text", "label": "score", "metric": "pearson"},
        lambda i: {"text": sentence(i, seed=2), "score": (7 * i % 30) / 10},
    ),
    "tags": (
        {"type": "tokens", "text": "words", "label": "tags"},
        lambda i: {"words": sentence(i).split(), "tags": ["AB"[int(w[1:]) % 2] for w in sentence(i).split()]},
    ),
    "choice": (
        {"type": "choice", "text": "context", "choices": ["first", "second"], "label": "answer"},
        lambda i: {"context": f"w{i % 9} ?", "first": f"w{i % 9}", "second": sentence(i + 1), "answer": i % 2},
    ),
    "span": ({"type": "span", "text": ["question", "context"]}, question),
}


def write_encoder(folder, config=None):
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig(**SIZES) if config is None else config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_tasks(folder, sizes):
    """Write the rows of tasks and their YAML; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = {}
    for name, size in sizes.items():
        options, row = TASKS[name]
        for part, numbers in (("train", range(size)), ("dev", range(100, 112))):
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
        specs[name] = options | {"train_file": f"{name}.train.jsonl", "validation_file": f"{name}.dev.jsonl"}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(specs, sort_keys=False))
    return folder / "tasks.yaml"


def load_tasks(folder, sizes):
    return {name: load_task(spec) for name, spec in read_tasks(write_tasks(folder, sizes)).items()}


DEFAULTS = {
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 0,
    "logging_steps": 1,
    "strategy": "full",
    "seed": 5,
}


def trainer(folder, encoder, tasks, *, callbacks=(), model=None, seed_of_heads=0, heads=None, **options):
    """Return a Trainer of tasks on the encoder in a folder; `heads` are options of `from_tasks`."""
    args = MultiTaskArguments(**{"output_dir": str(folder), **DEFAULTS, **options})
    if model is None:
        weights = {"loss_weights": args.loss_weights, "learns_loss_weights": args.loss_weighting == "uncertainty"}
        model = MultiTaskModel.from_tasks(str(encoder), tasks, seed=seed_of_heads, **weights, **(heads or {}))
    return MultiTaskTrainer(
        model, args, tasks=tasks, tokenizer=tokenizer(), max_length=32, doc_stride=8, callbacks=list(callbacks)
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, after):
    """Names of parameters that are not the same to the bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def losses(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]
