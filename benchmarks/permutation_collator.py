"""Permutation collators: ours against transformers' DataCollatorForPermutationLanguageModeling, on the same examples.

Run ``python benchmarks/permutation_collator.py``; no network is needed. One thread, batches of 32 examples of 512 tokens
and of 8 of 256, arrays. The two do not make the same batch: the stock one masks the targets in the input, takes spans
without regard to words, and makes masks of every pair of tokens; ours makes two integers a token. "Ours, converted" also
makes stock masks of them, with one row a target instead of one a token.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from collators import make_examples, make_tokenizer
from transformers import DataCollatorForPermutationLanguageModeling

from hf_pretrain.objectives.permutation_lm.collator import DataCollatorForPermutationLM, PermutationArguments
from hf_pretrain.objectives.permutation_lm.modeling import stock_inputs
from timing import interleaved, load_of_machine, options_parser, print_table

SIZES = ((32, 512), (8, 256))


def make_sides(batch_size: int, length: int, vocab_size: int) -> dict[str, Callable[[], Mapping[str, torch.Tensor]]]:
    """Return what is timed, by name."""
    tokenizer = make_tokenizer(vocab_size)
    examples = make_examples(batch_size, length, vocab_size)
    ours = [example["ours"] for example in examples]
    stock = [{"input_ids": torch.from_numpy(example["stock"]["input_ids"])} for example in examples]
    official = DataCollatorForPermutationLM(tokenizer)
    words = DataCollatorForPermutationLM(tokenizer, permutation=PermutationArguments(target_unit="word"))
    return {
        "stock": functools.partial(DataCollatorForPermutationLanguageModeling(tokenizer), stock),
        "ours": functools.partial(official, ours),
        "ours, whole words": functools.partial(words, ours),
        "ours, converted": lambda: stock_inputs(official(ours)),
    }


def mebibytes(batch: Mapping[str, Any]) -> float:
    """Return the size of a batch's tensors in MiB."""
    return sum(tensor.nbytes for tensor in batch.values()) / 2**20


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, vocab_size=32000, repeats=20)
    parser.add_argument("--turn_seconds", type=float, default=0.06, help="how long each side runs in its turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Creating a tensor from a list of numpy.ndarrays")
    rows: list[list[object]] = []
    for batch_size, length in SIZES:
        sides = make_sides(batch_size, length, options.vocab_size)
        sizes = {name: mebibytes(run()) for name, run in sides.items()}
        gc.collect()
        gc.disable()
        best = interleaved(sides, options.repeats, turn_seconds=options.turn_seconds)
        gc.enable()
        rows += [
            [f"{batch_size} x {length}", name, seconds * 1e3, best["stock"] / seconds, sizes[name]]
            for name, seconds in best.items()
        ]
    print(f"1 thread, best of {options.repeats} turns, in turn; {load_of_machine()}")
    print_table(rows, ["batch", "collator", "ms", "stock / this", "MiB of the batch"])


if __name__ == "__main__":
    main()
