"""Steps of permutation language modelling, ours against the stock XLNet with the same weights and order: time and peak memory.

    python benchmarks/permutation_steps.py [--bf16] [--batch_size 8] [--sequence_length 256] [--repeats 5]

A step is forward and backward. The stock model gets what the stock collator makes, a query for every token
(`target_mapping` is an identity), and in a second row a query for each target alone, as `stock_inputs` makes it. Of all
sides the loss is the same, which is checked first, without dropout. They run in one process, in turn; the best of the
repeats counts. Peak memory is how much the resident set rises during the first step, each side in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from training_steps import mean_loss, print_setting, rise_of_memory, stepped
from transformers import XLNetConfig, XLNetLMHeadModel

from hf_pretrain.data import draws
from hf_pretrain.objectives.permutation_lm import PermutationLMForPreTraining, stock_inputs
from timing import interleaved, options_parser, print_table

SIDES = ("stock", "stock, compact", "ours")


def make_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Full rows with one target in six and an order for each half; keyed, so that all runs see the same."""
    keys, length = draws.row_keys(range(args.batch_size), seed=0), args.sequence_length
    ids = torch.from_numpy(draws.integers(keys, length, high=args.vocab_size - 10)) + 10
    half = torch.arange(length).expand_as(ids) >= length // 2
    columns = torch.from_numpy(draws.uniforms(keys ^ 1, length)).argsort(1)[:, : length // 6].sort(1).values
    is_target = torch.zeros_like(half).scatter(1, columns, True)
    order = torch.from_numpy(draws.uniforms(keys ^ 2, length)).argsort(1) + 1
    base = half * (length + 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (torch.arange(length) >= length * 3 // 4).long().expand_as(ids),
        "key_ranks": base + order * is_target,
        "thresholds": base + torch.where(is_target, order, 1),
        "target_columns": columns,
        "labels": ids.gather(1, columns),
    }


def with_all_queries(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the stock collator would make of the order: a query for every token, labels at the targets."""
    inputs, ids = stock_inputs(batch), batch["input_ids"]
    labels = torch.full_like(ids, -100).scatter(1, batch["target_columns"], batch["labels"])
    mapping = torch.eye(ids.shape[1]).expand(len(ids), -1, -1).contiguous()
    return inputs | {"target_mapping": mapping, "labels": labels}


def make_sides(args: argparse.Namespace, *, dropout: float) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the loss of each side; all share one stock model."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=args.vocab_size,
        d_model=args.hidden_size,
        n_layer=args.num_hidden_layers,
        n_head=max(1, args.hidden_size // 64),
        d_inner=4 * args.hidden_size,
        dropout=dropout,
    )
    stock = XLNetLMHeadModel(config).train()
    ours, batch = PermutationLMForPreTraining.from_model(stock).train(), make_batch(args)
    dense, compact = with_all_queries(batch), stock_inputs(batch)
    losses = (
        lambda: stock(**dense).loss,
        lambda: stock(**compact).loss,
        lambda: mean_loss(ours(**batch), {"plm": 1.0}),
    )
    return dict(zip(SIDES, losses, strict=True))


def memory_of(side: str) -> float:
    """Run one step in a fresh process and return its rise of memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Print one row a side."""
    parser = options_parser(
        __doc__, batch_size=8, sequence_length=256, hidden_size=256, num_hidden_layers=4, vocab_size=32000, repeats=5
    )
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on all sides")
    parser.add_argument("--memory_of", metavar="SIDE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        step = stepped(make_sides(args, dropout=0.1)[args.memory_of], bf16=args.bf16, side=args.memory_of)
        print(rise_of_memory(step))
        return
    with torch.no_grad():
        losses = [float(loss()) for loss in make_sides(args, dropout=0.0).values()]
    assert max(losses) - min(losses) < 1e-4, losses
    memory = {side: memory_of(side) for side in SIDES}
    steps = {side: stepped(loss, bf16=args.bf16, side=side) for side, loss in make_sides(args, dropout=0.1).items()}
    seconds = interleaved(steps, repeats=args.repeats)
    print_setting(args)
    rows = [
        [
            side,
            f"{1e3 * seconds[side]:.0f}",
            f"{seconds['stock'] / seconds[side]:.2f}",
            f"{memory[side]:.0f}",
            f"{memory[side] / memory['stock']:.2f}",
        ]
        for side in SIDES
    ]
    print_table(rows, ["step", "ms", "speed-up", "MiB", "memory"])


if __name__ == "__main__":
    main()
