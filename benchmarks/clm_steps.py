"""A step of causal language modelling against stock GPT-2 with its own loss.

Both sides have the same weights and read the same packed rows without padding. They run in one process, in turn, and
the best of several rounds counts. A step is forward and backward. "stock" is `model(input_ids, labels=labels)`, what the Trainer
of transformers calls: logits of all positions, in fp32 for the loss. "ours" is the composite of `hf-pretrain clm`. Memory is the
rise of the peak in a forked child.

    python benchmarks/clm_steps.py
    python benchmarks/clm_steps.py --vocab_size 50257 --sequence_length 1024 --batch_size 4 --precision fp32
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.causal_lm import CausalLMForPreTraining
from timing import as_trained, interleaved, load_of_machine, options_parser, peak_memory, print_table

SIDES = ("stock", "ours")


def make_model(args: argparse.Namespace, **options: str) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights, without dropout, so that both sides compute the same."""
    torch.manual_seed(0)
    sizes = {"n_embd": args.hidden_size, "n_layer": args.num_hidden_layers, "n_head": args.num_attention_heads}
    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"vocab_size": args.vocab_size, "n_positions": args.sequence_length}
    return GPT2LMHeadModel(GPT2Config(**sizes, **special, **dropout, **options)).train()


def losses(args: argparse.Namespace, precision: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the mean loss of each side on one batch."""
    model = make_model(args)
    # As `hf-pretrain clm` builds it: the same function in one kernel.
    composite = CausalLMForPreTraining.from_model(make_model(args, activation_function="gelu_pytorch_tanh")).train()
    ids = torch.randint(1, args.vocab_size, (args.batch_size, args.sequence_length))
    labels = torch.cat([ids[:, 1:], torch.full((args.batch_size, 1), IGNORED)], dim=1)
    batch = {"input_ids": ids, "labels": labels}
    batch["target_positions"] = (labels.flatten() != IGNORED).nonzero().flatten()

    def stock() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            return loss

    def ours() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = composite(**batch).losses["lm"]
            return loss.sum.sum() / loss.count.sum()

    return {"stock": stock, "ours": ours}


def step(side: str, loss: Callable[[], torch.Tensor]) -> None:
    """Run forward and backward; gradients add up on those that are there, as between two micro-batches."""
    with as_trained(side):
        loss().backward()


def measure(args: argparse.Namespace, precisions: Sequence[str]) -> list[list[object]]:
    """Return a row for each side in each precision."""
    sides = {precision: losses(args, precision) for precision in precisions}
    steps = {
        key: {name: functools.partial(step, name, loss) for name, loss in found.items()}
        for key, found in sides.items()
    }
    # Before anything runs here: memory that this process has freed would hide what a step takes.
    memory = {key: {name: peak_memory(run) for name, run in runs.items()} for key, runs in steps.items()}
    rows: list[list[object]] = []
    for precision, found in sides.items():
        values = {name: float(loss().detach()) for name, loss in found.items()}
        assert abs(values["stock"] - values["ours"]) < 1e-3 * values["stock"], values
        seconds, rise = interleaved(steps[precision], args.repeats), memory[precision]
        rows += [
            [
                precision,
                name,
                f"{1e3 * seconds[name]:.0f}",
                f"{seconds['stock'] / seconds[name]:.2f}",
                f"{rise[name]:.0f}",
                f"{rise[name] / rise['stock']:.2f}",
            ]
            for name in SIDES
        ]
    return rows


def main() -> None:
    """Measure and print."""
    parser = options_parser(
        __doc__,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=30000,
        sequence_length=128,
        batch_size=32,
        repeats=5,
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append", help="by default both")
    args = parser.parse_args()
    print(
        f"GPT-2 of {args.num_hidden_layers} layers, {args.hidden_size} wide, {args.vocab_size} tokens, {args.batch_size} x "
        f"{args.sequence_length} tokens, {torch.get_num_threads()} threads, best of {args.repeats}; {load_of_machine()}\n"
    )
    rows = measure(args, args.precision or ("fp32", "bf16"))
    print_table(rows, ["precision", "side", "step, ms", "speed-up", "MiB", "memory"])


if __name__ == "__main__":
    main()
