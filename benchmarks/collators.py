"""Masking collators: ours against transformers' DataCollatorForLanguageModeling, on the same examples.

Run ``python benchmarks/collators.py``; no network is needed. One thread, batches of 32 examples of 512 tokens, a
vocabulary of 30 522, words of about 1.4 tokens. "Lists" are examples of Python lists, as a dataset without a format
yields them; "arrays" are examples of NumPy arrays. The stock collator gets only the columns it needs, which is when it
is fastest: `input_ids`, and for whole words offsets that give the same words. It has no n-grams, spans or given spans, and no
further targets: "word order" and "pair" come on top of masked tokens, "span boundary" on top of masked spans.
"""

from __future__ import annotations

import argparse
import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from hf_pretrain.corruption.arguments import MaskingArguments, MaskingUnit
from hf_pretrain.data import draws
from hf_pretrain.objectives.encoder.collator import DataCollatorForEncoder
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from timing import interleaved, load_of_machine, options_parser, peak_memory, print_table

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNITS: tuple[MaskingUnit, ...] = get_args(MaskingUnit)
HEADS: dict[str, MaskingUnit] = {"word_order": "token", "span_boundary": "span", "pair": "token"}


def make_tokenizer(vocab_size: int) -> BertTokenizer:
    """Return a tokenizer of a size; its words do not matter."""
    tokens = SPECIALS + [f"w{index}" for index in range(vocab_size - len(SPECIALS))]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def make_examples(batch_size: int, length: int, vocab_size: int) -> list[dict[str, Any]]:
    """Return examples of arrays, with the columns of both sides."""
    keys = functools.partial(draws.row_keys, list(range(batch_size)), seed=0)
    input_ids = draws.integers(keys(stream="ids"), length, high=vocab_size - len(SPECIALS)) + len(SPECIALS)
    word_starts = draws.uniforms(keys(stream="words"), length) < 0.7
    input_ids[:, 0], input_ids[:, -1] = SPECIALS.index("[CLS]"), SPECIALS.index("[SEP]")
    word_starts[:, [0, 1, -1]] = True
    # Three characters a token and one between words: to the stock collator a gap in the offsets starts a word.
    ends = np.cumsum(3 + word_starts, axis=1)
    offsets = np.stack([ends - 3, ends], axis=-1)
    offsets[:, [0, -1]] = 0
    spans = [(start, start + 4) for start in range(1, length - 5, 7)]
    return [
        {
            "ours": {"input_ids": input_ids[row].astype(np.int32), "word_starts": word_starts[row], "spans": spans}
            | {"example_id": row, "epoch": 0, "pair_label": row % 2},
            "stock": {"input_ids": input_ids[row], "offset_mapping": offsets[row]},
        }
        for row in range(batch_size)
    ]


def as_lists(example: dict[str, Any]) -> dict[str, Any]:
    """Turn the arrays of an example into lists."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in example.items()}


def make_sides(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return what is timed: names are "collator, unit, kind of examples"."""
    tokenizer = make_tokenizer(options.vocab_size)
    examples = make_examples(options.batch_size, options.length, options.vocab_size)
    sides: dict[str, Callable[[], Any]] = {}
    for kind, convert in (("lists", as_lists), ("arrays", dict)):
        ours = [convert(example["ours"]) for example in examples]
        whole = [convert(example["stock"]) for example in examples]
        plain = [{"input_ids": row["input_ids"]} for row in whole]
        collator = DataCollatorForLanguageModeling(tokenizer)
        sides[f"stock, token, {kind}"] = functools.partial(collator, plain)
        collator = DataCollatorForLanguageModeling(
            tokenizer, whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0
        )
        sides[f"stock, word, {kind}"] = functools.partial(collator, whole)
        for unit in UNITS:
            masking = MaskingArguments(masking_unit=unit)
            sides[f"ours, {unit}, {kind}"] = functools.partial(
                DataCollatorForMaskedLM(tokenizer, masking=masking), ours
            )
        for head, unit in HEADS.items():
            masking = MaskingArguments(masking_unit=unit)
            joint = DataCollatorForEncoder(tokenizer, heads=("mlm", head), masking=masking)
            sides[f"ours, {head}, {kind}"] = functools.partial(joint, ours)
    return sides


def even_turns(sides: dict[str, Callable[[], Any]], turn_seconds: float) -> dict[str, tuple[Callable[[], Any], int]]:
    """Repeat each side until its turn lasts about as long as everyone's, and return the turn and its number of calls.

    On a busy machine a short call often runs undisturbed and a long one never does: the best of N would flatter the
    faster side. Turns of one length are disturbed alike.
    """
    turns: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, run in sides.items():
        run()
        seconds = interleaved({name: run}, 5)[name]
        calls = max(1, round(turn_seconds / seconds))
        turns[name] = (functools.partial(_call_often, run, calls), calls)
    return turns


def _call_often(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        run()


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, batch_size=32, length=512, vocab_size=30522, repeats=20)
    parser.add_argument("--turn_seconds", type=float, default=0.06, help="how long each side runs in its turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # The stock collator converts lists of arrays by the slow path of torch and says so.
    warnings.filterwarnings("ignore", message="Creating a tensor from a list of numpy.ndarrays")
    sides = make_sides(options)
    memory = {name: peak_memory(run) for name, run in sides.items()}
    gc.disable()
    turns = even_turns(sides, options.turn_seconds)
    best = interleaved({name: turn for name, (turn, _) in turns.items()}, options.repeats)
    seconds = {name: best[name] / calls for name, (_, calls) in turns.items()}
    print(f"{options.batch_size} x {options.length} tokens, 1 thread, best of {options.repeats} turns, in turn")
    print(f"{load_of_machine()} (times hold for an idle machine, ratios for any)")
    print("memory: rise of ru_maxrss in a forked child over one batch")
    rows: list[list[object]] = []
    for unit in (*UNITS, *HEADS):
        for kind in ("lists", "arrays"):
            ours, stock = f"ours, {unit}, {kind}", f"stock, {unit}, {kind}"
            row: list[object] = [unit, kind, seconds[ours] * 1e3, memory[ours]]
            if stock in seconds:
                row += [seconds[stock] * 1e3, memory[stock], seconds[stock] / seconds[ours]]
            else:
                row += ["-", "-", "-"]
            rows.append(row)
    print_table(rows, ["unit or head", "examples", "ours, ms", "ours, MiB", "stock, ms", "stock, MiB", "stock / ours"])


if __name__ == "__main__":
    main()
