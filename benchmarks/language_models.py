"""Do the language models learn? Permutation LM and Transformer-XL on real text, against counts of words and against no memory.

    python benchmarks/language_models.py --train_file books.txt --validation_file valid.txt [--arm plm txl] [--seed 0 1]
    python benchmarks/language_models.py --table

    plm             permutation language modelling, a small XLNet; every example stands alone
    plm_memory      the same on the running text, with a memory of earlier segments
    txl             a small Transformer-XL with a memory
    txl_no_memory   the same model trained, and evaluated, without a memory

Every run is followed by what counting would have cost on the same held-out targets, in the same nats a token: a unigram with one
added to each count, and a bigram that is interpolated with it (absolute discounting, 0.75). Both are counted on the whole
training text, and the bigram knows the token to the left of each target, which a permutation LM often does not see. Of `txl`
the loss is measured again with its memory taken away. Each run is a row of the file `results`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import numpy as np
from filelock import FileLock
from transformers import set_seed

from hf_pretrain.data.examples.windows import LaneStream
from hf_pretrain.data.prepare import PreparedData, prepare_data
from hf_pretrain.errors import InputError
from hf_pretrain.hub.text import bare_name
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.permutation_lm import METHOD as plm
from hf_pretrain.objectives.recurrent_lm import METHOD as recurrent_lm
from hf_pretrain.options import option
from hf_pretrain.training.trainer import PretrainingTrainer
from results import ComparisonArguments, compare_arms, read_results, sizes_of
from timing import print_table

_DISCOUNT = 0.75
ARMS = ("plm", "plm_memory", "txl", "txl_no_memory")


@dataclass
class LanguageModelArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("language_models.json", "File that each run adds a row to.")
    seed: list[int] = option(factory=lambda: [0], help="Seeds; each arm runs with each.")
    vocab_size: int = option(4096, "Tokens of the tokenizer that is trained on the text.")
    max_steps: int = option(2500, "Steps of a run.")
    block_size: int = option(128, "Tokens of an example of plm; half of it is txl's segment.")
    mem_len: int = option(128, "Tokens that are remembered by the arms with a memory.")
    dropout: float = option(0.0, "Of all arms; one pass over much text needs none.")
    num_hidden_layers: int = option(4, "Layers.")
    hidden_size: int = option(128, "Width; a head for every 32.")


def model_options(arm: str, args: LanguageModelArguments) -> dict[str, Any]:
    """Return the options of the arm's model."""
    sizes = sizes_of(args.hidden_size, args.num_hidden_layers)
    if arm.startswith("plm"):
        return sizes | {"model_type": "xlnet", "config_overrides": json.dumps({"dropout": args.dropout})}
    # Post-norm layers need the warm-up that all arms have.
    return sizes | {"hidden_dropout_prob": args.dropout}


def training_options(arm: str, seed: int, args: LanguageModelArguments) -> dict[str, Any]:
    """Return the options of the arm's training."""
    schedule = {"max_steps": args.max_steps, "warmup_steps": 0.1, "lr_scheduler_type": "linear"}
    evaluation = {"per_device_eval_batch_size": 8, "eval_strategy": "no"}
    common = args.training(args.runs_folder() / f"{arm}-{seed}", seed, **schedule, **evaluation)
    if arm == "plm":
        return common
    if arm == "plm_memory":
        return common | {"mem_len": args.mem_len, "eval_lanes": 8}
    # Twice as many segments of half the length: as many tokens a step, and a memory has more to add.
    segment = args.block_size // 2
    mem_len = 0 if arm == "txl_no_memory" else args.mem_len
    lengths = {
        "tgt_len": segment,
        "mem_len": mem_len,
        "eval_tgt_len": segment,
        "eval_mem_len": mem_len,
        "eval_clamp_len": -1,
        "eval_same_length": False,
    }
    return common | lengths | {"per_device_train_batch_size": 2 * args.batch_size, "max_grad_norm": 1.0}


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
        found = np.minimum(np.searchsorted(self._pairs, codes), len(self._pairs) - 1)
        counts = np.where(self._pairs[found] == codes, self._counts[found], 0)
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
    folder = args.runs_folder()
    data_args = args.text_data(vocab_size=args.vocab_size, tokenizer_type="wordpiece")
    # Corpora of different runs do not share a tokenizer; the first process of a corpus trains it and the others find it.
    shared = folder / "-".join(Path(name).name for name in args.train_file)
    data = prepare_data(data_args, seed=seed, output_dir=shared, first=FileLock(f"{shared}.lock"))
    program = plm if arm.startswith("plm") else recurrent_lm
    _, model_class, args_class = program.arguments
    set_seed(seed)
    trainer = program.build_trainer(
        data, model_class(**model_options(arm, args)), args_class(**training_options(arm, seed, args))
    )
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


if __name__ == "__main__":
    compare_arms(LanguageModelArguments, description=__doc__, run_arm=run_arm, results=print_results)
