"""Training steps, ours against stock transformers with the same weights and the same batch: time and peak memory.

    python benchmarks/training_steps.py [--bf16] [--batch_size 32] [--sequence_length 128] [--repeats 5]

A step is forward and backward. Stock masked language modelling is `BertForMaskedLM` with labels; stock replaced token detection
is `ElectraForMaskedLM` and `ElectraForPreTraining` called one after the other, with `torch.multinomial` between.
Both sides run in one process, in turn; the best of the repeats counts. Peak memory is how much the resident set rises during the
first step, sampled every millisecond, each side in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import torch
from transformers import AutoModelForMaskedLM, BertConfig, ElectraConfig

from hf_pretrain.data import draws
from hf_pretrain.modeling.encoder import EncoderForPreTraining
from hf_pretrain.modeling.outputs import PretrainingOutput
from hf_pretrain.objectives.replaced_token_detection import (
    ReplacedTokenDetectionConfig,
    ReplacedTokenDetectionForPreTraining,
)
from timing import interleaved, print_table

SPECIAL_TOKENS = 5
MASK_TOKEN = 4


def make_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Full sequences with 15 in 100 tokens masked; keyed, so that all runs see the same."""
    keys = draws.row_keys(range(args.batch_size), seed=0)
    length = args.sequence_length
    ids = torch.from_numpy(draws.integers(keys, length, high=args.vocab_size - SPECIAL_TOKENS)) + SPECIAL_TOKENS
    chosen = torch.from_numpy(draws.uniforms(keys ^ 1, length)).argsort(1)[:, : round(0.15 * length)].sort(1).values
    is_target = torch.zeros_like(ids, dtype=torch.bool).scatter(1, chosen, True)
    positions = is_target.flatten().nonzero().squeeze(1)
    return {
        "input_ids": ids.masked_fill(is_target, MASK_TOKEN),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~is_target, -100),
        "target_positions": positions,
        "sample_uniforms": torch.from_numpy(draws.uniforms(keys[:1] ^ 2, len(positions))[0]).float(),
    }


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """The configuration that both architectures understand."""
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": max(1, args.hidden_size // 64),
        "intermediate_size": 4 * args.hidden_size,
        "max_position_embeddings": args.sequence_length,
    }


def mean_loss(output: PretrainingOutput, weights: dict[str, float]) -> torch.Tensor:
    """The Trainer's total for one batch."""
    return sum(weights[name] * loss.sum.sum() / loss.count.sum() for name, loss in output.losses.items())


def masked_lm_sides(args: argparse.Namespace, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """Both sides share one stock model."""
    stock = AutoModelForMaskedLM.from_config(BertConfig(**sizes(args)))
    ours = EncoderForPreTraining.from_model(stock)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return {
        "stock": lambda: stock(**inputs).loss,
        "ours": lambda: mean_loss(ours(**inputs, target_positions=batch["target_positions"]), {"mlm": 1.0}),
    }


def detection_sides(args: argparse.Namespace, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """Both sides share one pair of models with tied embeddings."""
    discriminator = ElectraConfig(**sizes(args), embedding_size=128)
    small = {name: sizes(args)[name] // 4 for name in ("hidden_size", "intermediate_size")}
    generator = ElectraConfig(**(sizes(args) | small | {"num_attention_heads": 1}), embedding_size=128)
    model = ReplacedTokenDetectionForPreTraining(
        ReplacedTokenDetectionConfig(
            generator=generator, discriminator=discriminator, excluded_token_ids=[0, 1, 2, 3, 4]
        )
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def stock() -> torch.Tensor:
        proposed = model.generator(**inputs, labels=batch["labels"])
        is_target = batch["labels"] != -100
        original = torch.where(is_target, batch["labels"], batch["input_ids"])
        sampled = torch.multinomial(proposed.logits.detach()[is_target].float().softmax(-1), 1).squeeze(1)
        replaced = original.masked_scatter(is_target, sampled)
        found = model.discriminator(
            input_ids=replaced, attention_mask=inputs["attention_mask"], labels=(replaced != original).long()
        )
        return proposed.loss + 50.0 * found.loss

    return {"stock": stock, "ours": lambda: mean_loss(model(**batch), {"mlm": 1.0, "rtd": 50.0})}


def stepped(loss: Callable[[], torch.Tensor], *, bf16: bool) -> Callable[[], None]:
    """Make a step of a loss: forward in the chosen precision, then backward."""

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            total = loss()
        total.backward()

    return step


METHODS = {"MLM": masked_lm_sides, "RTD": detection_sides}


def steps(method: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Build both sides of a method."""
    torch.manual_seed(0)
    sides = METHODS[method](args, make_batch(args))
    return {name: stepped(loss, bf16=args.bf16) for name, loss in sides.items()}


def rise_of_memory(step: Callable[[], None]) -> float:
    """Return by how many MiB the resident set rises at most while a step runs."""
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return max(0, peak - before) / 2**20


def memory_of(method: str, side: str) -> float:
    """Run one step in a fresh process (a fork would inherit a dead thread pool) and return its rise of memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", method, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Print one row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("batch_size", 32), ("sequence_length", 128), ("hidden_size", 256), ("num_hidden_layers", 4),
        ("vocab_size", 30522), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on both sides")
    parser.add_argument("--memory_of", nargs=2, metavar=("METHOD", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        method, side = args.memory_of
        print(rise_of_memory(steps(method, args)[side]))
        return
    rows = []
    for method in METHODS:
        memory = {side: memory_of(method, side) for side in ("stock", "ours")}
        seconds = interleaved(steps(method, args), repeats=args.repeats)
        rows.append(
            [
                method,
                f"{1e3 * seconds['stock']:.0f}",
                f"{1e3 * seconds['ours']:.0f}",
                f"{seconds['stock'] / seconds['ours']:.2f}",
                f"{memory['stock']:.0f}",
                f"{memory['ours']:.0f}",
                f"{memory['ours'] / memory['stock']:.2f}",
            ]
        )
    precision = "bf16 autocast" if args.bf16 else "fp32"
    print(
        f"{args.num_hidden_layers} layers, {args.hidden_size} wide, {args.vocab_size} tokens, batch {args.batch_size} x "
        f"{args.sequence_length}, {precision}, {torch.get_num_threads()} threads, best of {args.repeats}"
    )
    print_table(rows, ["step", "stock ms", "ours ms", "speed-up", "stock MiB", "ours MiB", "memory"])


if __name__ == "__main__":
    main()
