"""Masked tokens, next tokens, or both with one head? One encoder, equal tokens, judged by BLiMP's minimal pairs in both readings.

    python benchmarks/hybrid_quality.py --data_dir data [--arm mlm clm hybrid] [--seed 0 1] [--steps 4000] [--pairs 50]
    python benchmarks/hybrid_quality.py --table

    mlm       masked tokens, each predicted at its own place (BERT)
    shifted   masked tokens, each predicted from the state before it
    clm       next tokens, from the tokens before them
    hybrid    half of the examples masked and shifted, half next tokens (GPT-BERT)

All arms train the same ModernBERT by `hf-pretrain encoder`: one text, one tokenizer, as many steps of as many tokens, one rate,
no dropout. Each is then scored in two ways: by pseudo-log-likelihood, where the tokens of a word to the left are known ("l2r"),
and by log-likelihood from left to right. The table has both for each arm, also the one that it was not trained for, and the
held-out losses.

The folder `data_dir` holds blimp/*.jsonl, which may be compressed, and books/train.txt.xz unless `train_file` names other text.
Each run is a row of the file `results`: what is there is not run again, and several processes may fill it, each with arms and
seeds of its own.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from hf_pretrain.data.text.files import read_documents
from hf_pretrain.evaluation.minimal_pairs import (
    causal_log_likelihoods,
    pair_accuracy,
    pseudo_log_likelihoods,
    read_minimal_pairs,
)
from hf_pretrain.options import option
from results import (
    Column,
    ComparisonArguments,
    command_line,
    compare_arms,
    held_out_file,
    shared_tokenizer,
    sizes_of,
    train_by_program,
)

ARMS: dict[str, dict[str, Any]] = {
    "mlm": {"objectives": ["mlm"]},
    "shifted": {"objectives": ["mlm"], "prediction": "shifted"},
    "clm": {"objectives": ["clm"]},
    "hybrid": {"objectives": ["mlm", "clm"]},
}
SCORES = {
    "masked": partial(pseudo_log_likelihoods, within_word="l2r"),
    "causal": partial(causal_log_likelihoods, left_to_right=True),
}
# One document in so many is enough for a vocabulary.
_TOKENIZER_STRIDE = 8
_HELD_OUT_CHARACTERS = 200_000


@dataclass
class HybridArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = tuple(ARMS)

    results: str = option("hybrid_quality.json", "File that each run adds a row to.")
    steps: int = option(4000, "Steps of a run.")
    batch_size: int = option(32, "Examples a step.")
    max_corpus_bytes: int | None = option(20_000_000, "Train on a random part of the text.")
    vocab_size: int = option(4096, "Tokens of the tokenizer that is trained on the text.")
    hidden_size: int = option(128, "Width; a head for every 32.")
    num_hidden_layers: int = option(6, "Layers.")
    mlm_probability: float = option(0.3, "Share of the tokens of a masked example that are selected.")
    pairs: int = option(50, "Minimal pairs of each paradigm.")

    def __post_init__(self) -> None:
        """Read the books, if no other text is named."""
        if not self.train_file and not self.table:
            self.train_file = [str(Path(self.data_dir, "books", "train.txt.xz"))]
            self.validation_file = self.validation_file or [str(Path(self.data_dir, "books", "valid.txt.xz"))]
        super().__post_init__()


def run_arm(arm: str, seed: int, args: HybridArguments) -> dict[str, Any]:
    """Train an arm by its program, and let it choose between the sentences of each pair in both ways."""
    pairs = read_minimal_pairs(Path(args.data_dir, "blimp"), limit=args.pairs)
    texts = partial(itertools.islice, read_documents(args.train_file), 0, None, _TOKENIZER_STRIDE)
    sizes = sizes_of(args.hidden_size, args.num_hidden_layers, model_type="modernbert")
    options = args.training(args.runs_folder() / f"{arm}-{seed}", seed, **ARMS[arm])
    options |= sizes | {
        "train_file": args.train_file,
        "validation_file": held_out_file(args, _HELD_OUT_CHARACTERS),
        "document_separator": args.document_separator,
        "max_corpus_bytes": args.max_corpus_bytes,
        "block_size": args.block_size,
        "block_mode": "doc_sentences",
        "tokenizer_name": shared_tokenizer(args, texts, added=[]),
        "max_position_embeddings": args.block_size,
        "mlm_probability": None if arm == "clm" else args.mlm_probability,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    trainer, row = train_by_program("encoder", command_line(options), steps=args.steps)
    model = getattr(trainer.model, trainer.model.export_parts[""])
    begin = time.perf_counter()
    for name, score in SCORES.items():
        accuracy = pair_accuracy(partial(score, model, trainer.processing_class), pairs)
        row |= {name: accuracy.mean, f"{name}_paradigms": accuracy.paradigms}
        row |= {f"{name}_{field}": value for field, value in accuracy.fields.items()}
    row |= {f"held_out_{name}": value for name, value in row["held_out"].items() if name.endswith("_loss")}
    row["scoring_seconds"] = round(time.perf_counter() - begin)
    return row | {"threads": torch.get_num_threads(), "tokens": args.steps * args.batch_size * args.block_size}


COLUMNS = (
    *(Column(f"BLiMP, {name}", name, 100, 1) for name in SCORES),
    *(
        Column(f"{field}, {name}", f"{name}_{field}", 100, 1)
        for field in ("morphology", "syntax", "semantics", "syntax_semantics")
        for name in SCORES
    ),
    Column("MLM loss", "held_out_mlm_loss", 1, 3),
    Column("CLM loss", "held_out_clm_loss", 1, 3),
    Column("tokens", "tokens", 1, None),
    Column("seconds", "seconds"),
    Column("of scoring", "scoring_seconds"),
)


if __name__ == "__main__":
    compare_arms(HybridArguments, description=__doc__, run_arm=run_arm, results=COLUMNS)
