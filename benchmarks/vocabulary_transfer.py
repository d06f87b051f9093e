"""Which rows should an encoder's new tokens begin with, when it moves to another language? Masked language modelling goes on.

    python benchmarks/vocabulary_transfer.py --encoder my-encoder --train_file de.txt --validation_file de-held-out.txt
    python benchmarks/vocabulary_transfer.py --table

    focus     a new token is a mean of old ones, weighted by their nearness in vectors of the new text (FOCUS)
    mean      a new token is the mean of the old table
    random    a new token is drawn with the mean and the deviation of the old table
    scratch   a model of the same sizes with fresh weights throughout

All arms have one new tokenizer, trained on the text, and see the same batches by the program `hf-pretrain mlm`. Tokens that
both tokenizers know keep their rows in the first three arms. The vectors of focus are PPMI's, of the new tokenizer's tokens in
the text. The loss is that of held-out text, in nats a masked token, before training and as it goes.

Each run is a row of the file `results`; what is there is not run again. The models are kept in a folder beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from filelock import FileLock
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_pretrain import WordVectors, train_tokenizer, transfer_vocabulary
from hf_pretrain.commands.vectors import main as make_vectors
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.loading import from_config, from_pretrained
from hf_pretrain.options import option
from hf_pretrain.vectors.transfer import shared_tokens
from results import (
    Column,
    ComparisonArguments,
    command_line,
    compare_arms,
    print_arms,
    rows_by_settings,
    train_by_program,
)

ARMS = ("focus", "mean", "random", "scratch")
_EVALUATED = 100


@dataclass
class TransferArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("vocabulary_transfer.json", "File that each run adds a row to.")
    encoder: str = option("", "Folder of the encoder that goes on, a masked language model with its tokenizer.")
    document_separator: Literal["blank_line", "line", "file"] = option("line", "What ends a document of a text file.")
    vocab_size: int = option(4096, "Tokens of the new tokenizer.")
    steps: int = option(1000, f"Steps of training, a multiple of {_EVALUATED}.")
    learning_rate: float = option(5e-4, "Peak rate.")

    def __post_init__(self) -> None:
        """Refuse to run without an encoder or held-out text."""
        super().__post_init__()
        if not self.table and not (self.encoder and self.validation_file):
            raise InputError("encoder or validation_file is missing: name a masked language model, and held-out text")


def new_tokenizer(args: TransferArguments) -> str:
    """Return the folder of the new tokenizer; the first run trains it."""
    folder = args.runs_folder() / f"tokenizer-{args.vocab_size}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            texts = read_documents(args.train_file, document_separator=args.document_separator)
            train_tokenizer(texts, vocab_size=args.vocab_size).save_pretrained(folder)
    return str(folder)


def new_vectors(args: TransferArguments) -> WordVectors:
    """Return vectors of the new tokenizer's tokens; the first run makes them."""
    folder = args.runs_folder() / "vectors"
    if not (folder / "config.json").exists():
        options = {"train_file": args.train_file, "document_separator": args.document_separator}
        make_vectors(command_line({"output_dir": folder, "tokenizer_name": new_tokenizer(args)} | options))
    return WordVectors.open(folder)


def begin(arm: str, seed: int, args: TransferArguments) -> tuple[str, dict[str, int]]:
    """Return the folder of the model that an arm begins with, and how many tokens it shares with the old one."""
    folder = args.runs_folder() / f"begin-{arm}-{seed}"
    model = from_pretrained(AutoModelForMaskedLM, args.encoder)
    old, new = (AutoTokenizer.from_pretrained(name) for name in (args.encoder, new_tokenizer(args)))
    if arm == "focus":
        moved = transfer_vocabulary(model, old, new, new_vectors(args), seed=seed)
    elif arm == "scratch":
        moved = from_config(AutoModelForMaskedLM, transfer_vocabulary(model, old, new, method="mean").config)
    else:
        moved = transfer_vocabulary(model, old, new, method=cast(Any, arm), seed=seed)
    moved.save_pretrained(folder)
    new.save_pretrained(folder)
    return str(folder), {"tokens": len(new), "shared": len(shared_tokens(old, new))}


def run_arm(arm: str, seed: int, args: TransferArguments) -> dict[str, Any]:
    """Train an arm; return the loss of held-out text by steps."""
    folder, sizes = begin(arm, seed, args)
    options = {
        "model_name_or_path": folder,
        "train_file": args.train_file,
        "validation_file": args.validation_file,
        "max_corpus_bytes": args.max_corpus_bytes,
        "document_separator": args.document_separator,
        "block_size": args.block_size,
    }
    evaluated = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": _EVALUATED}
    out = args.runs_folder() / f"{arm}-{seed}"
    options |= args.training(out, seed, lr_scheduler_type="linear", warmup_steps=0.05) | evaluated
    trainer, row = train_by_program("mlm", command_line(options), steps=args.steps)
    losses = {entry["step"]: entry["eval_mlm_loss"] for entry in trainer.state.log_history if "eval_mlm_loss" in entry}
    return row | sizes | {f"loss_{step}": loss for step, loss in losses.items()}


def print_results(path: Path) -> None:
    """Print a table for each set of settings in the results."""
    for settings, rows in rows_by_settings(path).items():
        print(f"\n{settings}")
        steps = [step for step in (0, 100, 300, 1000) if any(f"loss_{step}" in row for row in rows)]
        columns = [Column(f"loss at {step}", f"loss_{step}", 1, 3) for step in steps]
        print_arms(
            rows,
            ARMS,
            (*columns, Column("tokens", "tokens"), Column("shared", "shared"), Column("seconds", "seconds")),
        )


if __name__ == "__main__":
    compare_arms(TransferArguments, description=__doc__, run_arm=run_arm, results=print_results)
