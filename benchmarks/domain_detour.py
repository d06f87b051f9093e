"""Should an encoder that moves to a domain go on with masked tokens, or take a detour over next tokens first? Equal tokens.

    python benchmarks/domain_detour.py --data_dir data [--arm none mlm detour] [--seed 0 1] [--steps 1500]
    python benchmarks/domain_detour.py --table

    none      the encoder as it is: a masked language model of novels
    mlm       masked tokens of the domain: 30 % of them, and 15 % in the last fifth of the steps, while the rate decays
    detour    next tokens of the domain for four fifths of the steps; the last fifth is that of `mlm` (recipe clm_detour)

The domain is the docstrings of the installed Python packages. The arms of a seed begin with one encoder, a ModernBERT that is
trained on the books by `hf-pretrain mlm`, with its tokenizer. Both go on in two phases with one curve of the rate, on as many
tokens. A frozen probe then tells from the mean of an encoder's output which of eight packages a module's docstrings are from, by
250 modules of each or as many as there are: three quarters train the logistic regression. The loss is that of 15 % masked tokens
of held-out docstrings. TF-IDF with the same classifier stands beside them.

The folder `data_dir` holds books/train.txt.xz. Each run is a row of the file `results`: what is there is not run again.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from filelock import FileLock
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_pretrain import encode, probe_accuracy
from hf_pretrain.data import draws
from hf_pretrain.data.text.docstrings import docstring_documents, module_docstrings, split_held_out
from hf_pretrain.options import option
from results import (
    Column,
    ComparisonArguments,
    command_line,
    compare_arms,
    sizes_of,
    train_by_program,
)

PACKAGES = ("datasets", "matplotlib", "numpy", "pandas", "scipy", "sklearn", "torch", "transformers")
_MODULES, _CHARACTERS, _LEAST = 250, 600, 200
ARMS = ("tfidf", "none", "mlm", "detour")


@dataclass
class DetourArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("domain_detour.json", "File that each run adds a row to.")
    start_steps: int = option(3000, "Steps on the books.")
    steps: int = option(1500, "Steps on the docstrings.")
    batch_size: int = option(32, "Examples a step.")
    max_corpus_bytes: int | None = option(20_000_000, "Train on a random part of the books.")
    docstring_bytes: int = option(12_000_000, "Train on a random part of the docstrings.")
    hidden_size: int = option(128, "Width; a head for every 32.")
    num_hidden_layers: int = option(6, "Layers.")
    further_rate: float = option(5e-4, "Peak rate on the docstrings.")

    def __post_init__(self) -> None:
        """Read the books, if no other text is named."""
        if not self.train_file and not self.table:
            self.train_file = [str(Path(self.data_dir, "books", "train.txt.xz"))]
        super().__post_init__()


def start_folder(seed: int, args: DetourArguments) -> Path:
    """Return the folder of the encoder that the arms of a seed begin with; the first process trains it."""
    folder = args.runs_folder() / f"start-{seed}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "model.safetensors").exists():
            options = args.training(folder, seed, warmup_steps=0.1, eval_strategy="no")
            options |= sizes_of(args.hidden_size, args.num_hidden_layers, model_type="modernbert")
            options |= {
                "train_file": args.train_file,
                "max_corpus_bytes": args.max_corpus_bytes,
                "document_separator": args.document_separator,
                "vocab_size": args.vocab_size,
                "block_size": args.block_size,
                "mlm_probability": 0.3,
            }
            train_by_program("mlm", command_line(options), steps=args.start_steps)
    return folder


def domain_files(args: DetourArguments) -> dict[str, list[str]]:
    """Return a file with docstrings to train on, and one with some that are held out; a document is a line of JSON."""
    folder = args.runs_folder()
    paths = [folder / f"docstrings-{name}.jsonl" for name in ("train", "held-out")]
    with FileLock(folder / "docstrings.lock"):
        if not paths[0].exists():
            texts = list(docstring_documents(max_bytes=args.docstring_bytes))
            for path, rows in zip(paths, split_held_out(len(texts), 0.01), strict=True):
                lines = [json.dumps({"text": texts[row]}) for row in rows]
                path.write_text("\n".join(lines), encoding="utf-8")
    return {"train_file": [str(paths[0])], "validation_file": [str(paths[1])]}


def go_on(arm: str, seed: int, args: DetourArguments) -> tuple[Path, dict[str, Any]]:
    """Train an arm on the docstrings, in two phases; an arm of no steps is only evaluated."""
    first = {"objectives": ["clm"]} if arm == "detour" else {"objectives": ["mlm"], "mlm_probability": 0.3}
    last = {"objectives": ["mlm"], "mlm_probability": 0.15}
    phases = [
        {"name": "stable", "share": "80%", "rate": "0%:0, 5%:1", **first},
        {"name": "decay", "share": "20%", "rate": "0%:1, 100%:0", **last},
    ]
    folder = args.runs_folder() / f"{arm}-{seed}"
    recipe = args.runs_folder() / f"{arm}.yaml"
    recipe.write_text(yaml.safe_dump({"phases": phases}), encoding="utf-8")
    options = args.training(folder, seed, learning_rate=args.further_rate, save_strategy="steps", save_steps=10**6)
    options |= domain_files(args) | {
        "model_name_or_path": str(start_folder(seed, args)),
        "block_size": args.block_size,
        "block_mode": "doc_sentences",
        "eval_strategy": "no",
    }
    _, row = train_by_program("encoder", ["--config", str(recipe), *command_line(options)], steps=args.steps)
    return folder, row


def labelled_modules() -> tuple[list[str], list[int]]:
    """Return the beginnings of docstrings of modules, and the numbers of their packages."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, package
        files = sorted(Path(spec.origin).parent.rglob("*.py"))
        chosen = 0
        for number in draws.permutation(len(files), seed=0, stream=package).tolist():
            text = module_docstrings(files[number])[:_CHARACTERS]
            if len(text) >= _LEAST and chosen < _MODULES:
                texts.append(text)
                labels.append(label)
                chosen += 1
    return texts, labels


def run_arm(arm: str, seed: int, args: DetourArguments) -> dict[str, Any]:
    """Train an arm and probe it."""
    texts, labels = labelled_modules()
    order = draws.permutation(len(texts), seed=0, stream="modules")
    train, test = np.split(order, [len(order) * 3 // 4])
    targets = np.array(labels)
    if arm == "tfidf":
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=100, max_iter=1000))
        model.fit([texts[row] for row in train], targets[train])
        return {"accuracy": float(model.score([texts[row] for row in test], targets[test])), "seconds": 0}
    folder, row = (start_folder(seed, args), {"seconds": 0}) if arm == "none" else go_on(arm, seed, args)
    encoder = AutoModelForMaskedLM.from_pretrained(folder)
    features = encode(encoder, AutoTokenizer.from_pretrained(folder), texts)
    score = probe_accuracy(features[train], targets[train], features[test], targets[test], seed=seed)
    row |= {
        "accuracy": score.accuracy,
        "tokens": 0 if arm == "none" else args.steps * args.batch_size * args.block_size,
    }
    if "mlm_loss" in row.get("held_out", {}):
        row["mlm_loss"] = row["held_out"]["mlm_loss"]
    return row


COLUMNS = (
    Column("accuracy", "accuracy", 100, 1),
    Column("held-out MLM loss", "mlm_loss", 1, 3),
    Column("tokens", "tokens", 1, None),
    Column("seconds", "seconds"),
)


if __name__ == "__main__":
    compare_arms(DetourArguments, description=__doc__, run_arm=run_arm, results=COLUMNS)
