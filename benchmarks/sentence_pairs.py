"""Sentence pairs: making the pairs of an epoch anew, against tokenizing the same text again.

    python benchmarks/sentence_pairs.py [--train_file corpus.txt] [--block_size 128] [--max_megabytes 8]

No network is needed: without a file, the text is the docstrings of the installed packages. The tokenizer is trained on the
text, or `--tokenizer_name`. "Tokenizer" is the stock call in batches, "documents" the same with words and sentences, which
is done once. A call of the other sides makes all pairs of the next epoch, for each task; "and read" also reads every example
of an epoch, in batches of 32. One thread, sides in turn, best of the repeats.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_pretrain.data.documents.documents import tokenize_documents, tokenize_texts
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE
from hf_pretrain.data.examples.pairing import PairTask
from hf_pretrain.data.examples.sentence_pairs import SentencePairDataset
from hf_pretrain.data.text.datasets import random_subset, text_dataset
from hf_pretrain.data.text.docstrings import docstring_dataset
from timing import interleaved, options_parser, print_table

BATCH = 256
READ_BATCH = 32
TOKENIZER, DOCUMENTS = "tokenizer", "documents"


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in batches."""
    for begin in range(0, len(texts), BATCH):
        yield texts[begin : begin + BATCH]


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenize with the stock call."""
    for batch in batches(texts):
        tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)


def make_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenize, and mark words and sentences."""
    for batch in batches(texts):
        tokenize_texts(batch, tokenizer)


def make_pairs(pairs: SentencePairDataset, epochs: Iterator[int]) -> None:
    """Make the pairs of the next epoch."""
    pairs.pairs(next(epochs))


def make_and_read(pairs: SentencePairDataset, epochs: Iterator[int]) -> None:
    """Make the pairs of the next epoch and read every one."""
    base = next(epochs) * EPOCH_STRIDE
    for begin in range(0, len(pairs), READ_BATCH):
        pairs.__getitems__(range(base + begin, base + min(begin + READ_BATCH, len(pairs))))


def read_text(options: argparse.Namespace) -> datasets.Dataset:
    """Return the text as a dataset with the column `text`."""
    max_bytes = int(options.max_megabytes * 1e6)
    if not options.train_file:
        return docstring_dataset(max_bytes=max_bytes)
    texts = text_dataset(options.train_file, document_separator=options.document_separator)
    return random_subset(texts, max_bytes=max_bytes, seed=0)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = options_parser(__doc__, vocab_size=30522, block_size=128, repeats=3)
    parser.add_argument("--train_file", help="UTF-8 text; docstrings of the installed packages if not given")
    parser.add_argument("--document_separator", default="blank_line", choices=("blank_line", "line", "file"))
    parser.add_argument("--max_megabytes", type=float, default=8.0, help="use a random part of the documents")
    parser.add_argument("--tokenizer_name", help="a tokenizer to take; trained on the text if not given")
    parser.add_argument("--turn_seconds", type=float, default=1.0, help="least time of a turn")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse_options()
    datasets.disable_progress_bars()
    texts = read_text(options)
    column: list[str] = list(texts["text"])
    if options.tokenizer_name:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_name)
    else:
        tokenizer = train_tokenizer(column, vocab_size=options.vocab_size)
    documents = tokenize_documents(texts, tokenizer)
    make = partial(SentencePairDataset, documents, tokenizer=tokenizer, block_size=options.block_size)
    datasets_by_task: dict[PairTask, SentencePairDataset] = {task: make(task=task) for task in get_args(PairTask)}
    epochs = itertools.count(1)
    sides: dict[str, Callable[[], Any]] = {
        TOKENIZER: partial(tokenize, column, tokenizer),
        DOCUMENTS: partial(make_documents, column, tokenizer),
        **{f"pairs, {task}": partial(make_pairs, pairs, epochs) for task, pairs in datasets_by_task.items()},
        "pairs, nsp, and read": partial(make_and_read, datasets_by_task["nsp"], epochs),
    }
    best = interleaved(sides, options.repeats, turn_seconds=options.turn_seconds)
    nsp = datasets_by_task["nsp"]
    print(f"{nsp.store.num_tokens} tokens, {len(nsp.sentences.starts) - 1} sentences; one thread")
    print("\n".join(map(repr, datasets_by_task.values())))
    rows = [
        [name, seconds, nsp.store.num_tokens / seconds / 1e6, f"{100 * seconds / best[TOKENIZER]:.2f} %"]
        for name, seconds in best.items()
    ]
    print_table(rows, ["side", "seconds", "M tokens/s", "of the tokenizer's time"])


if __name__ == "__main__":
    main()
