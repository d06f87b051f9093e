"""Do the language models learn? Permutation LM and Transformer-XL on real text, against counts of words and against no memory.

    python benchmarks/language_models.py --train_file books.txt --validation_file valid.txt [--arm plm txl] [--seed 0 1]
    python benchmarks/language_models.py --table

    plm             permutation language modelling, a small XLNet; every example stands alone
    plm_memory      the same on the running text, with a memory of earlier segments
    txl             a small Transformer-XL with a memory
    txl_no_memory   the same model trained, and evaluated, without a memory

Every run is followed by what counting would have cost on the same held-out targets, in the same nats a token: a unigram with one
added to each count, and a bigram that is interpolated with it (absolute discounting, 0.75). Both are counted on the whole
training text, and the bigram is told the token to the left of each target, which a permutation LM often does not see. Of `txl`
the loss is measured again with its memory taken away. Each run is a row of the file `results`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import set_seed

from hf_pretrain.cli import run_program
from hf_pretrain.data.examples.windows import LaneStream
from hf_pretrain.data.prepare import DataArguments, PreparedData, prepare_data
from hf_pretrain.errors import InputError
from hf_pretrain.hub.text import bare_name
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.permutation_lm import METHOD as plm
from hf_pretrain.objectives.recurrent_lm import METHOD as recurrent_lm
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.trainer import PretrainingTrainer
from language_model_options import NOT_SETTINGS, LanguageModelArguments, model_options, training_options
from results import read_results, run_once
from timing import print_table

_DISCOUNT = 0.75


class CountedModel:
    """Unigram and bigram of a stream of tokens.

    Args:
        ids: ``[N]`` training tokens in order.
        vocab_size: Number of tokens there are.
    """

    def __init__(self, ids: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigram = (np.bincount(ids, minlength=vocab_size) + 1) / (len(ids) + vocab_size)
        self._pairs, self._counts = np.unique(self._codes(ids[:-1], ids[1:]), return_counts=True)
        self._totals = np.bincount(ids[:-1], minlength=vocab_size)
        self._followers = np.bincount(self._pairs // vocab_size, minlength=vocab_size)

    def _codes(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return before.astype(np.int64) * self.vocab_size + ids

    def nats(self, before: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
        """Return the mean negative log-likelihood of tokens, by unigram and by bigram.

        Args:
            before: ``[T]`` the token to the left of each.
            ids: ``[T]`` the tokens.
        """
        codes = self._codes(before, ids)
        places = np.minimum(np.searchsorted(self._pairs, codes), len(self._pairs) - 1)
        counts = np.where(self._pairs[places] == codes, self._counts[places], 0)
        totals = np.maximum(self._totals[before], 1)
        # What discounting takes from the pairs that were seen goes to the unigram; all of it after an unseen token.
        spare = np.where(self._totals[before] > 0, _DISCOUNT * self._followers[before] / totals, 1.0)
        bigram = np.maximum(counts - _DISCOUNT, 0) / totals + spare * self.unigram[ids]
        return float(-np.log(self.unigram[ids]).mean()), float(-np.log(bigram).mean())


def held_out_targets(trainer: PretrainingTrainer, data: PreparedData) -> tuple[np.ndarray, np.ndarray]:
    """Return the token to the left of each target that an evaluation scores, and the target."""
    if trainer.objective.name == "recurrent-lm":
        ids = _whole_stream(data.eval_documents, data)
        return ids[:-1], ids[1:]
    before, targets = [], []
    for batch in trainer.get_eval_dataloader():
        is_target = batch["labels"] != IGNORED
        left = batch["input_ids"].gather(1, (batch["target_columns"] - 1).clamp_min(0))
        before.append(left[is_target].cpu().numpy())
        targets.append(batch["labels"][is_target].cpu().numpy())
    return np.concatenate(before), np.concatenate(targets)


def _whole_stream(documents: Any, data: PreparedData) -> np.ndarray:
    """All documents with separators between them, and one before the first."""
    stream = LaneStream(documents, tokenizer=data.tokenizer, num_lanes=1, complete=True)
    return stream.read_range(-1, stream.num_tokens)[0]


def evaluate(trainer: PretrainingTrainer) -> float:
    """Return the held-out loss in nats a target."""
    losses = {bare_name(name): value for name, value in trainer.evaluate().items()}
    return losses["plm_loss" if "plm_loss" in losses else "lm_loss"]


def run_arm(arm: str, seed: int, args: LanguageModelArguments) -> dict[str, Any]:
    """Train an arm, evaluate it and what counts alone say."""
    path = Path(args.results)
    folder = path.with_name(f"{path.stem}-runs")
    folder.mkdir(parents=True, exist_ok=True)
    data_args = DataArguments(
        train_file=args.train_file,
        validation_file=args.validation_file or None,
        document_separator=args.document_separator,
        max_corpus_bytes=args.max_corpus_bytes,
        vocab_size=args.vocab_size,
        tokenizer_type="wordpiece",
        block_size=args.block_size,
    )
    # Corpora of different runs do not share a tokenizer; the first process of a corpus trains it and the others find it.
    shared = folder / "-".join(Path(name).name for name in args.train_file)
    data = prepare_data(data_args, seed=seed, output_dir=shared, first=FileLock(f"{shared}.lock"))
    program = plm if arm.startswith("plm") else recurrent_lm
    _, model_class, args_class = program.arguments
    training = training_options(arm, args) | {"output_dir": str(folder / f"{arm}-{seed}"), "seed": seed}
    set_seed(seed)
    trainer = program.build_trainer(data, model_class(**model_options(arm, args)), args_class(**training))
    begin = time.perf_counter()
    trainer.train()
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - begin)}
    row["tokens"] = args.max_steps * args.batch_size * args.block_size
    row["loss"] = evaluate(trainer)
    if arm == "txl":
        trainer.args.eval_mem_len, trainer.args.eval_same_length = 0, False
        row["without_memory"] = evaluate(trainer)
    counted = CountedModel(_whole_stream(data.train_documents, data), len(data.tokenizer))
    row["unigram"], row["bigram"] = counted.nats(*held_out_targets(trainer, data))
    row["parameters"] = sum(parameter.numel() for parameter in trainer.model.parameters())
    return row


def settings(args: LanguageModelArguments) -> dict[str, Any]:
    """Return what the runs of a table have in common."""
    values = {name: value for name, value in asdict(args).items() if name not in NOT_SETTINGS}
    names = {name: [Path(path).name for path in getattr(args, name)] for name in ("train_file", "validation_file")}
    return names | values


def print_results(path: Path) -> None:
    """Print one table: a row for each corpus and arm, with the mean over its seeds."""
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in read_results(path):
        groups[" ".join(row["settings"]["train_file"]), row["arm"]].append(row)
    if not groups:
        raise InputError(f"results={path} has no row: run some arms first")
    columns = ("loss", "without_memory", "unigram", "bigram", "tokens", "seconds")
    rows = []
    for (corpus, arm), runs in sorted(groups.items()):
        means = [mean(run[name] for run in runs) if name in runs[0] else "" for name in columns]
        rows.append([corpus, arm, len(runs), *means])
    print_table(rows, ["text", "arm", "seeds", *(name.replace("_", " ") for name in columns)])


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    (args,) = parse_arguments((LanguageModelArguments,), argv, prog=Path(__file__).name, description=__doc__ or "")
    path = Path(args.results)
    if not args.table:
        for seed, arm in itertools.product(args.seed, args.arm):
            run_once(path, arm, seed, settings=settings(args), run=partial(run_arm, arm, seed, args))
    print_results(path)


if __name__ == "__main__":
    sys.exit(run_program(main))
