"""Which objectives teach grammar? Encoder, decoder and encoder-decoder of equal training FLOPs, judged by BLiMP's minimal pairs.

    python benchmarks/minimal_pairs.py --data_dir data [--arm mlm causal t5] [--seed 0 1] [--flops 4e12] [--pairs 100]
    python benchmarks/minimal_pairs.py --table

    arm          architecture               learns to                        a sentence's score
    mlm          ModernBERT                 find masked tokens               pseudo-log-likelihood
    rtd          ModernBERT                 tell replaced tokens apart       log-probabilities of "original"
    causal       Transformer-XL, no memory  predict the next token           log-likelihood
    prefix_lm    T5                         go on with a text                log-likelihood
    bart         T5                         restore text, spans masked       log-likelihood of each word, masked
    t5           T5                         write spans behind sentinels     log-likelihood of each word, behind a sentinel
    mass         T5                         write a masked fragment          log-likelihood of each word, masked
    untrained    ModernBERT                 nothing                          pseudo-log-likelihood

All arms read one text with one tokenizer, in models of one width; the encoder-decoders have half of the layers on each side. They
are trained by the programs of this library for as many steps as the budget pays for: FLOPs of forward and backward, generator and
heads included, are counted once an arm, on real batches, by torch's FlopCounterMode. Recipes differ where architectures do: AdamW
at 1e-3, for T5 `adamw_rms` at 1e-2.

A score has the form that the model was trained for. Where a word is hidden, its tokens are hidden at once and the scores of those
to the left are known ("l2r" of `pseudo_log_likelihoods`), so that the end of a word does not give its beginning away. Scores of
two arms do not compare; how often the acceptable sentence has the higher one does.

The folder `data_dir` holds blimp/*.jsonl, which may be compressed, and books/train.txt.xz unless `train_file` names other text.
Each run is a row of the file `results`: what is there is not run again, and several processes may fill it, each with arms and
seeds of its own. An arm of the default budget takes a few minutes on one core.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from rtd_quality import train_for
from transformers import set_seed

from hf_pretrain.cli import load_method
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.evaluation.minimal_pairs import (
    causal_log_likelihoods,
    denoising_log_likelihoods,
    originality_scores,
    pair_accuracy,
    pseudo_log_likelihoods,
    read_minimal_pairs,
)
from hf_pretrain.options import option
from hf_pretrain.training.program import load_data
from hf_pretrain.training.trainer import PretrainingTrainer
from results import (
    Column,
    ComparisonArguments,
    compare_arms,
    flops_of_a_step,
    shared_tokenizer,
    sizes_of,
)

# As many as a block has places for a span of one token and one between.
_SENTINELS = 32
# One document in so many is enough for a vocabulary.
_TOKENIZER_STRIDE = 8


class Arm(NamedTuple):
    """The program that trains an arm, and what scores its model."""

    method: str
    score: Callable[..., np.ndarray]


_masked = partial(pseudo_log_likelihoods, within_word="l2r")
_denoising = partial(denoising_log_likelihoods, within_word="l2r")
ARMS = {
    "untrained": Arm("mlm", _masked),
    "mlm": Arm("mlm", _masked),
    "rtd": Arm("rtd", originality_scores),
    "causal": Arm("recurrent-lm", causal_log_likelihoods),
    "prefix_lm": Arm("denoise", partial(_denoising, hiding="rest")),
    "bart": Arm("denoise", partial(_denoising, hiding="mask")),
    "t5": Arm("denoise", partial(_denoising, hiding="sentinel")),
    "mass": Arm("denoise", partial(_denoising, hiding="fragment")),
}


@dataclass
class MinimalPairArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = tuple(ARMS)

    results: str = option("minimal_pairs.json", "File that each run adds a row to.")
    flops: float = option(4e12, "Training budget of a run.")
    max_corpus_bytes: int | None = option(8_000_000, "Train on a random part of the text.")
    vocab_size: int = option(4096, "Tokens of the tokenizer that is trained on the text.")
    hidden_size: int = option(128, "Width; a head for every 32.")
    num_hidden_layers: int = option(6, "Layers; of an encoder-decoder half are the encoder's and half the decoder's.")
    generator_size: float = option(0.5, "The share of the width that the generator of rtd has.")
    generator_layers: float = option(0.34, "Its share of the layers.")
    denoising_rate: float = option(1e-2, "Peak rate of the encoder-decoders, relative to the size of the weights.")
    pairs: int = option(50, "Minimal pairs of each paradigm.")

    def __post_init__(self) -> None:
        """Read the books, if no other text is named."""
        if not self.train_file and not self.table:
            self.train_file = [str(Path(self.data_dir, "books", "train.txt.xz"))]
        super().__post_init__()


def model_options(method: str, args: MinimalPairArguments) -> dict[str, Any]:
    """Return the options of a method's model; none has dropout, as the text is read once."""
    if method == "denoise":
        sizes = sizes_of(args.hidden_size, args.num_hidden_layers // 2)
        return sizes | {"model_type": "t5", "config_overrides": json.dumps({"dropout_rate": 0.0})}
    sizes = sizes_of(args.hidden_size, args.num_hidden_layers)
    if method == "recurrent-lm":
        return sizes | {"hidden_dropout_prob": 0.0}
    sizes |= {"model_type": "modernbert", "max_position_embeddings": args.block_size}
    generator = {"generator_size": args.generator_size, "generator_layers": args.generator_layers}
    return sizes | (generator if method == "rtd" else {})


def training_options(arm: str, args: MinimalPairArguments) -> dict[str, Any]:
    """Return the options of an arm's training that differ."""
    method = ARMS[arm].method
    if method == "denoise":
        return {"noise": arm, "optim": "adamw_rms", "learning_rate": args.denoising_rate}
    if method == "recurrent-lm":
        lengths = {"tgt_len": args.block_size, "mem_len": 0, "eval_mem_len": 0, "eval_same_length": False}
        return lengths | {"max_grad_norm": 1.0}
    # ELECTRA's recipe.
    return {"adam_bias_correction": False, "adam_epsilon": 1e-6, "decay_during_warmup": True}


def build_trainer(arm: str, seed: int, args: MinimalPairArguments) -> PretrainingTrainer:
    """Put an arm's data, model and Trainer together, as its program does."""
    method = load_method(ARMS[arm].method)
    data_class, model_class, args_class = method.arguments
    stride = partial(itertools.islice, read_documents(args.train_file), 0, None, _TOKENIZER_STRIDE)
    sentinels = [f"<extra_id_{index}>" for index in range(_SENTINELS)]
    tokenizer = shared_tokenizer(args, stride, added=sentinels)
    data_args = data_class(**vars(args.text_data(tokenizer_name=tokenizer)))
    model_args = model_class(**model_options(method.name, args))
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "eval_strategy": "no"}
    folder = args.runs_folder() / f"{arm}-{seed}"
    options = args_class(**args.training(folder, seed, **schedule) | training_options(arm, args))
    with FileLock(args.runs_folder() / "_lock"):
        # The first process tokenizes the text; the others find it.
        data = (method.load or load_data)(data_args, model_args, options, special_tokens=method.special_tokens)
    set_seed(seed)
    return method.build_trainer(data, model_args, options)


def run_arm(arm: str, seed: int, args: MinimalPairArguments) -> dict[str, Any]:
    """Train an arm and let it choose between the sentences of each pair."""
    pairs = read_minimal_pairs(Path(args.data_dir, "blimp"), limit=args.pairs)
    trainer = build_trainer(arm, seed, args)
    row: dict[str, Any] = {"steps": 0, "flops": 0, "seconds": 0}
    if arm != "untrained":
        row = train_for(trainer, budget=args.flops, step=flops_of_a_step(trainer))
        row["losses"] = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        trainer.save_model()
    model = getattr(trainer.model, trainer.model.export_parts[""])
    begin = time.perf_counter()
    accuracy = pair_accuracy(partial(ARMS[arm].score, model, trainer.processing_class), pairs)
    row["scoring_seconds"] = round(time.perf_counter() - begin)
    row |= {"blimp": accuracy.mean, "blimp_paradigms": accuracy.paradigms, **accuracy.fields}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return row | {"threads": torch.get_num_threads()}


COLUMNS: Sequence[Column] = (
    Column("FLOPs", "flops", 1, None),
    Column("BLiMP", "blimp", 100, 1),
    Column("morphology", "morphology", 100, 1),
    Column("syntax", "syntax", 100, 1),
    Column("semantics", "semantics", 100, 1),
    Column("syntax and semantics", "syntax_semantics", 100, 1),
    Column("parameters", "parameters", 1, None),
    Column("steps", "steps"),
    Column("seconds", "seconds"),
    Column("of scoring", "scoring_seconds"),
)


if __name__ == "__main__":
    compare_arms(MinimalPairArguments, description=__doc__, run_arm=run_arm, results=COLUMNS)
