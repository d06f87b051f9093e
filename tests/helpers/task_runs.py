"""Small tasks of every type, written to files, that a tiny encoder learns in a second."""

from pathlib import Path

import yaml
from transformers import AutoModel, BertConfig, set_seed

from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.data import draws

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}
QUICK = {"learning_rate": 5e-3, "max_steps": 60, "per_device_train_batch_size": 16, "use_cpu": True, "report_to": []}
QUICK |= {"disable_tqdm": True, "save_strategy": "no", "strategy": "full", "bf16": False}
TYPES = ("classification", "pair", "regression", "tokens", "entities", "choice", "span")


def rows(kind, count, *, seed):
    """Rows of a task: words w0 and w1 among others say all."""
    keys = draws.row_keys(range(count), seed=seed, stream=f"task runs {kind}")
    found = []
    for row in draws.integers(keys, 8, high=24).tolist():
        flag, other = row[0] % 2, [f"w{20 + number}" for number in row[1:]]
        words = [other[0], f"w{flag}", other[1]]
        text = " ".join(words)
        if kind == "classification":
            found.append({"text": text, "label": ("bad", "good")[flag]})
        elif kind == "pair":
            found.append({"text": text, "other": " ".join(other[2:4]), "label": ("bad", "good")[flag]})
        elif kind == "regression":
            found.append({"text": text, "label": 3.0 * flag + row[2] / 24})
        elif kind == "tokens":
            found.append({"text": words, "tags": ["rest", ("no", "yes")[flag], "rest"]})
        elif kind == "entities":
            found.append({"text": words, "tags": ["O", ("O", "B-PER")[flag], "O"]})
        elif kind == "choice":
            answers = ["w3", "w3 w3"]
            answers[flag] = "w1"
            found.append({"text": other[0], "first": answers[0], "second": answers[1], "label": flag})
        else:
            spot = 1 + row[2] % 3
            words = [*other[:spot], "w2", *other[spot:5]]
            start = len(" ".join(words[:spot])) + 1
            found.append(
                {"question": "w4", "context": " ".join(words), "answers": {"text": ["w2"], "answer_start": [start]}}
            )
    return found


def write_tasks(folder, *, train=128, validation=40):
    """Write files of all tasks and `tasks.yaml` into a folder; return its path."""
    folder = Path(folder)
    options = {"classification": {}, "pair": {"type": "classification", "text": ["text", "other"]}, "regression": {}}
    options |= {"tokens": {}, "entities": {"type": "tokens"}, "choice": {"choices": ["first", "second"]}}
    options |= {"span": {"text": ["question", "context"]}}
    tasks = {}
    for kind, own in options.items():
        files = {"train_file": f"{kind}_train.jsonl", "validation_file": f"{kind}_dev.jsonl"}
        for name, count, seed in (("train", train, 0), ("dev", validation, 1)):
            lines = [_json(row) for row in rows(kind, count, seed=seed)]
            (folder / f"{kind}_{name}.jsonl").write_text("\n".join(lines) + "\n")
        tasks[kind] = {"type": kind, "text": "text"} | own | files
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    return folder / "tasks.yaml"


def write_encoder(folder, **sizes):
    """Write a tiny BERT with random weights and its tokenizer into a folder."""
    set_seed(0)
    AutoModel.from_config(BertConfig(**SIZES | sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def _json(row):
    import json

    return json.dumps(row)
