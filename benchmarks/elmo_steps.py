"""A step of ELMo's LSTMs: one fused call a layer and direction, against a loop over the steps that clips.

Both sides have the same weights and read the same vectors of words. They run in one process, in turn, and the best of several
rounds counts. A step is forward and backward through both directions, without the characters and the softmax. "loop" is what the
published weights need, whose cells and projections are clipped inside the recurrence; the limits here are so wide that both sides
compute the same.

    python benchmarks/elmo_steps.py
    python benchmarks/elmo_steps.py --cell_size 4096 --hidden_size 1024 --threads 2
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

from hf_pretrain import ElmoConfig, ElmoModel
from timing import interleaved, load_of_machine, options_parser, print_table

SIDES = ("fused", "loop")


def make_models(args: argparse.Namespace) -> dict[str, ElmoModel]:
    """Return a model of each side with the same weights, without dropout."""
    sizes = {
        "hidden_size": args.hidden_size,
        "cell_size": args.cell_size,
        "filters": [[1, 8]],
        "hidden_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    models = {"fused": ElmoModel(ElmoConfig(**sizes)), "loop": ElmoModel(ElmoConfig(**sizes, cell_clip=1e9))}
    models["loop"].load_state_dict(models["fused"].state_dict())
    return models


def step(model: ElmoModel, words: torch.Tensor) -> None:
    """Run forward and backward; gradients add up on those that are there."""
    model(inputs_embeds=words).last_hidden_state.square().sum().backward()


def measure(args: argparse.Namespace, threads: int) -> list[list[object]]:
    """Return a row for each side."""
    torch.set_num_threads(threads)
    models = make_models(args)
    words = torch.randn(args.batch_size, args.sequence_length, args.hidden_size // 2)
    with torch.no_grad():
        one, other = (model(inputs_embeds=words).last_hidden_state for model in models.values())
    assert (one - other).abs().max() < 1e-5
    steps: dict[str, Callable[[], None]] = {
        name: functools.partial(step, model, words) for name, model in models.items()
    }
    seconds = interleaved(steps, args.repeats)
    return [[threads, name, f"{1e3 * seconds[name]:.0f}", f"{seconds[name] / seconds['fused']:.2f}"] for name in SIDES]


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, hidden_size=256, cell_size=1024, sequence_length=20, batch_size=32, repeats=7)
    parser.add_argument("--threads", type=int, action="append", help="threads of torch; by default 1 and 2")
    args = parser.parse_args()
    print(
        f"ELMo of {args.cell_size} cells projected to {args.hidden_size // 2}, 2 layers, {args.batch_size} x "
        f"{args.sequence_length} words, fp32, best of {args.repeats}; {load_of_machine()}\n"
    )
    rows = [row for threads in args.threads or (1, 2) for row in measure(args, threads)]
    print_table(rows, ["threads", "side", "step, ms", "of fused"])


if __name__ == "__main__":
    main()
