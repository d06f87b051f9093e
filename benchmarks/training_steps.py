"""Training steps, ours against stock transformers with the same weights and the same batch: time and peak memory.

    python benchmarks/training_steps.py [--method RTD] [--electra_small] [--bf16] [--batch_size 32] [--repeats 5]

A step is forward and backward. Stock masked language modelling is `BertForMaskedLM` with labels; stock replaced token detection
is `ElectraForMaskedLM` and `ElectraForPreTraining` called one after the other, with `torch.multinomial` between. The step of
electra_pytorch (https://github.com/richarddwang/electra_pytorch, its "fp32_gumbel", read and written anew) takes the masked
positions out of the logits of all positions and adds Gumbel noise to them. The last side is ours under `torch.compile`, compiled
before the clock starts; every batch has the same shapes, as `target_slots` gives them. All sides run in one process, in turn; the
best of the repeats counts. Peak memory is how much the resident set rises during the first step, sampled every millisecond, each
side in a process of its own; compiling is no step, so that side has none.

"Of peak" is how much of what this machine can do a step uses: the floating-point operations of its matrix products, counted as
it runs, per second, over those of one large matrix product in the same precision, measured in the same process, in turn with the
steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, BertConfig, ElectraConfig, PreTrainedModel

from hf_pretrain.data import draws
from hf_pretrain.modeling.losses import PretrainingOutput
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.replaced_token_detection import (
    ReplacedTokenDetectionConfig,
    ReplacedTokenDetectionForPreTraining,
)
from timing import as_trained, interleaved, options_parser, print_table

SPECIAL_TOKENS = 5
PAD_TOKEN = 0
MASK_TOKEN = 4
EMBEDDING_SIZE = 128
ELECTRA_SMALL = {"num_hidden_layers": 12, "hidden_size": 256, "sequence_length": 128, "vocab_size": 30522}
ELECTRA_PYTORCH = "electra_pytorch"
COMPILED = "ours, torch.compile"
GEMM_SIZE = 2048

Losses = dict[str, Callable[[], torch.Tensor]]


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
    terms = [weights[name] * loss.sum.sum() / loss.count.sum() for name, loss in output.losses.items()]
    return torch.stack(terms).sum()


def masked_lm_sides(args: argparse.Namespace, batch: dict[str, torch.Tensor]) -> Losses:
    """All sides share one stock model."""
    stock = AutoModelForMaskedLM.from_config(BertConfig(**sizes(args)))
    ours = EncoderForPreTraining.from_model(stock)
    compiled = torch.compile(ours)
    stock_inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    inputs = stock_inputs | {"target_positions": batch["target_positions"]}
    return {
        "stock": lambda: stock(**stock_inputs).loss,
        "ours": lambda: mean_loss(ours(**inputs), {"mlm": 1.0}),
        COMPILED: lambda: mean_loss(compiled(**inputs), {"mlm": 1.0}),
    }


def detection_sides(args: argparse.Namespace, batch: dict[str, torch.Tensor]) -> Losses:
    """All sides share one pair of models with tied embeddings; the generator has a quarter of the width."""
    discriminator = ElectraConfig(**sizes(args), embedding_size=EMBEDDING_SIZE)
    narrow = sizes(args) | {name: sizes(args)[name] // 4 for name in ("hidden_size", "intermediate_size")}
    narrow["num_attention_heads"] = max(1, narrow["hidden_size"] // 64)
    generator = ElectraConfig(**narrow, embedding_size=EMBEDDING_SIZE)
    model = ReplacedTokenDetectionForPreTraining(
        ReplacedTokenDetectionConfig(
            generator=generator, discriminator=discriminator, excluded_token_ids=[0, 1, 2, 3, 4]
        )
    )
    model.try_out()  # as a program does: it sees there that the loss needs no logits of all targets
    compiled, weights = torch.compile(model), {"mlm": 1.0, "rtd": 50.0}
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

    return {
        "stock": stock,
        ELECTRA_PYTORCH: electra_pytorch_step(model.generator, model.discriminator, batch),
        "ours": lambda: mean_loss(model(**batch), weights),
        COMPILED: lambda: mean_loss(compiled(**batch), weights),
    }


def electra_pytorch_step(
    generator: PreTrainedModel, discriminator: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """Return the loss of electra_pytorch: losses in fp32, and the padding left out of that of the discriminator by a mask."""
    ids, labels, lengths = batch["input_ids"], batch["labels"], batch["attention_mask"].sum(1)
    is_target, gumbel = labels != -100, torch.distributions.Gumbel(0.0, 1.0)

    def loss() -> torch.Tensor:
        attention_mask = ids != PAD_TOKEN
        # The segment of a token, from the length of the first one of each row.
        types = torch.tensor([[0] * size + [1] * (ids.shape[1] - size) for size in lengths.tolist()])
        inputs = {"attention_mask": attention_mask, "token_type_ids": types}
        logits = generator(ids, **inputs).logits[is_target, :]
        with torch.no_grad():
            sampled = (logits.float() + gumbel.sample(logits.shape)).argmax(-1)
            replaced, is_replaced = ids.clone(), is_target.clone()
            replaced[is_target] = sampled
            is_replaced[is_target] = sampled != labels[is_target]
        found = discriminator(replaced, **inputs).logits.masked_select(attention_mask)
        wanted = is_replaced.masked_select(attention_mask).float()
        mlm = F.cross_entropy(logits.float(), labels[is_target])
        return mlm + 50.0 * F.binary_cross_entropy_with_logits(found.float(), wanted)

    return loss


def stepped(loss: Callable[[], torch.Tensor], *, bf16: bool, side: str) -> Callable[[], None]:
    """Make a step of the loss of a side: forward in the chosen precision, then backward."""

    def step() -> None:
        with as_trained(side):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                total = loss()
            total.backward()

    return step


METHODS = {"MLM": masked_lm_sides, "RTD": detection_sides}


def steps(method: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Build all sides of a method."""
    torch.manual_seed(0)
    sides = METHODS[method](args, make_batch(args))
    return {name: stepped(loss, bf16=args.bf16, side=name) for name, loss in sides.items()}


def can_compile() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))


def count_flops(step: Callable[[], None]) -> int:
    """Return the floating-point operations of a step's matrix products, a multiplication and an addition being two."""
    # The counter knows the products that attention is made of, not the fused kernel of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matmul_step(*, bf16: bool) -> Callable[[], torch.Tensor]:
    """Make one large matrix product, whose speed is what the machine can do."""
    matrices = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16 if bf16 else torch.float32)
    return lambda: matrices[0] @ matrices[1]


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
    try:
        step()
    finally:
        # Otherwise the process would never end after a step that fails.
        done.set()
        watcher.join()
    return max(0, peak - before) / 2**20


def memory_of(method: str, side: str) -> float:
    """Run one step in a fresh process (a fork would inherit a dead thread pool) and return its rise of memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", method, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def rows_of(method: str, args: argparse.Namespace) -> list[list[str]]:
    """Measure all sides of a method: one row a side."""
    sides = steps(method, args)
    memory = {side: memory_of(method, side) for side in sides if side != COMPILED}
    flops = {side: count_flops(sides[side]) for side in memory}
    flops[COMPILED] = flops["ours"]
    if args.no_compile:
        del sides[COMPILED]
    missing = [] if args.no_compile or can_compile() else [[method, COMPILED, "no C++ compiler", *[""] * 5]]
    if missing:
        del sides[COMPILED]
    elif COMPILED in sides:
        sides[COMPILED]()
    seconds = interleaved({**sides, "matmul": matmul_step(bf16=args.bf16)}, repeats=args.repeats)
    peak = 2 * GEMM_SIZE**3 / seconds["matmul"]
    rows = []
    for side in sides:
        has_memory = side in memory
        rows.append(
            [
                method,
                side,
                f"{1e3 * seconds[side]:.0f}",
                f"{seconds['stock'] / seconds[side]:.2f}",
                f"{flops[side] / 1e9:.1f}",
                f"{100 * flops[side] / seconds[side] / peak:.0f} % of {peak / 1e9:.0f} GFLOP/s",
                f"{memory[side]:.0f}" if has_memory else "",
                f"{memory[side] / memory['stock']:.2f}" if has_memory else "",
            ]
        )
    return rows + missing


def print_setting(args: argparse.Namespace) -> None:
    """Print the sizes of the models, and how they are measured."""
    precision = "bf16 autocast" if args.bf16 else "fp32"
    print(
        f"{args.num_hidden_layers} layers, {args.hidden_size} wide, {args.vocab_size} tokens, batch {args.batch_size} x "
        f"{args.sequence_length}, {precision}, {torch.get_num_threads()} threads, best of {args.repeats}"
    )


def main() -> None:
    """Print one row a method and side."""
    parser = options_parser(
        __doc__, batch_size=32, sequence_length=128, hidden_size=256, num_hidden_layers=4, vocab_size=30522, repeats=5
    )
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on all sides")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS), help="what to measure")
    parser.add_argument("--no_compile", action="store_true", help="leave the compiled side out")
    parser.add_argument(
        "--electra_small", action="store_true", help="the sizes of ELECTRA-Small, in place of the defaults"
    )
    parser.add_argument("--memory_of", nargs=2, metavar=("METHOD", "SIDE"), help=argparse.SUPPRESS)
    if parser.parse_known_args()[0].electra_small:
        parser.set_defaults(**ELECTRA_SMALL)
    args = parser.parse_args()
    if args.memory_of:
        method, side = args.memory_of
        print(rise_of_memory(steps(method, args)[side]))
        return
    rows = [row for method in args.method for row in rows_of(method, args)]
    print_setting(args)
    print_table(rows, ["step", "side", "ms", "speed-up", "GFLOP", "of peak", "MiB", "memory"])


if __name__ == "__main__":
    main()
