"""A step of ELMo's LSTMs: one fused call a layer and direction, against a loop over the steps that clips.

Both sides have the same weights and read the same vectors of words. They run in one process, in turn, and the best of several
rounds counts. A step is forward and backward through both directions, without the characters and the softmax. "loop" is what the
published weights need, whose cells and projections are clipped inside the recurrence; the limits here are so wide that all sides
compute the same. It multiplies the inputs of all steps at once. "plain loop" does all of a step's work in the step, as loops of
this kind usually do.

    python benchmarks/elmo_steps.py
    python benchmarks/elmo_steps.py --cell_size 4096 --hidden_size 1024 --threads 2
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

from hf_pretrain import ElmoConfig, ElmoModel
from hf_pretrain.models.elmo.layers_elmo import ElmoLSTM
from timing import interleaved, load_of_machine, options_parser, print_table

SIDES = ("fused", "loop", "plain loop")


def make_models(args: argparse.Namespace) -> dict[str, ElmoModel]:
    """Return a model of each side with the same weights, without dropout."""
    sizes = {
        "hidden_size": args.hidden_size,
        "cell_size": args.cell_size,
        "filters": [[1, 8]],
        "hidden_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    clipped = ElmoConfig(**sizes, cell_clip=1e9, projection_clip=1e9)
    models = {"fused": ElmoModel(ElmoConfig(**sizes)), "loop": ElmoModel(clipped), "plain loop": ElmoModel(clipped)}
    for name in SIDES[1:]:
        models[name].load_state_dict(models["fused"].state_dict())
    for layers in (models["plain loop"].forward_layers, models["plain loop"].backward_layers):
        for layer in layers:
            layer.__class__ = PlainLayer
    return models


class PlainLayer(ElmoLSTM):
    """A layer that computes one step after the other, from its inputs on."""

    def _read_in_steps(
        self, inputs_BTP: torch.Tensor, state_BS: torch.Tensor, lengths_B: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = []
        for words_B1P in inputs_BTP.split(1, dim=1):
            output_B1P, state_BS = super()._read_in_steps(words_B1P, state_BS, None)
            outputs.append(output_B1P)
        return torch.cat(outputs, dim=1), state_BS


def step(model: ElmoModel, words: torch.Tensor) -> None:
    """Run forward and backward; gradients add up on those that are there."""
    model(inputs_embeds=words).last_hidden_state.square().sum().backward()


def measure(args: argparse.Namespace, threads: int) -> list[list[object]]:
    """Return a row for each side."""
    torch.set_num_threads(threads)
    models = make_models(args)
    words = torch.randn(args.batch_size, args.sequence_length, args.hidden_size // 2)
    with torch.no_grad():
        fused, *others = (model(inputs_embeds=words).last_hidden_state for model in models.values())
    assert all((fused - other).abs().max() < 1e-5 for other in others)
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
