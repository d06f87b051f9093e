"""Packing into blocks: BlockDataset against the textbook ``group_texts`` map, on the same tokenized documents.

Run ``python benchmarks/packing.py``; no network is needed. Both sides read the same memory-mapped documents. The
textbook side concatenates the lists of 1 000 documents and cuts them into blocks (``datasets.map`` with
``batched=True``), once with ``input_ids`` alone and once with ``word_starts`` as well, which is what a block of ours
holds. "Read" reads every block once, in batches of 32: ours by ``__getitems__``, the textbook's as NumPy arrays, its
fastest format. Ours packs whole sentences and puts special tokens and separators in while reading; the textbook cuts
anywhere and adds nothing. Two more sides of ours: one document a row, and several that do not see each other. "Fill" is
the share of a batch's positions that hold tokens, if every row is padded to the block size.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pretrain.data import draws
from hf_pretrain.data.examples.packing import BlockDataset, PackingMode
from timing import interleaved, options_parser, peak_memory, print_table

READ_BATCH = 32
MAP_BATCH = 1000
OURS = "BlockDataset"
ONE_DOCUMENT = "BlockDataset, doc_sentences"
ISOLATED = "BlockDataset, isolated_documents"

Build = Callable[[], BlockDataset | datasets.Dataset]


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer that only knows its special tokens: the documents are tokenized already."""
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]"))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def synthetic_documents(num_tokens: int) -> datasets.Dataset:
    """Return keyed documents of 1 to 1 199 tokens in sentences of 1 to 39."""
    keys = draws.row_keys(np.arange(4), seed=0, stream="synthetic documents")
    lengths = 1 + draws.integers(keys[0], max(num_tokens // 600, 1), high=1199)
    total = int(lengths.sum())
    sent_starts = np.zeros(total, dtype=np.bool_)
    ends = np.cumsum(1 + draws.integers(keys[1], total // 10 + 1, high=39))
    sent_starts[ends[ends < total]] = True
    sent_starts[np.cumsum(lengths) - lengths] = True
    word_starts = sent_starts | (draws.uniforms(keys[2], total) < 0.7)
    return _from_flat(draws.integers(keys[3], total, high=30_000) + 5, word_starts, sent_starts, lengths)


def documents_of_file(path: str) -> datasets.Dataset:
    """Return the paragraphs of a text file as documents: words between spaces, sentences up to ``.?!``."""
    paragraphs = [text.split() for text in Path(path).read_text(encoding="utf-8").split("\n\n")]
    paragraphs = [words for words in paragraphs if words]
    words = list(itertools.chain.from_iterable(paragraphs))
    lengths = np.array([len(paragraph) for paragraph in paragraphs])
    _, ids = np.unique(words, return_inverse=True)
    sent_starts = np.array([False, *(word.endswith((".", "?", "!")) for word in words[:-1])])
    sent_starts[np.cumsum(lengths) - lengths] = True
    return _from_flat(ids + 5, np.ones(len(words), dtype=np.bool_), sent_starts, lengths)


def _from_flat(
    ids: np.ndarray, word_starts: np.ndarray, sent_starts: np.ndarray, lengths: np.ndarray
) -> datasets.Dataset:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns = {"input_ids": ids.astype(np.int32), "word_starts": word_starts, "sent_starts": sent_starts}
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
    return datasets.Dataset(pa.table({**lists, "doc_id": np.arange(len(lengths))}))


def textbook(documents: datasets.Dataset, columns: list[str], block_size: int) -> datasets.Dataset:
    """Pack with the textbook recipe: concatenate the lists of a batch, cut, drop the rest."""

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(itertools.chain(*lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // block_size * block_size
        return {name: [flat[k : k + block_size] for k in range(0, end, block_size)] for name, flat in joined.items()}

    return documents.select_columns(columns).map(
        group_texts, batched=True, batch_size=MAP_BATCH, load_from_cache_file=False
    )


def build_and_read(build: Build) -> int:
    """Build the blocks and read every one once, in batches; return how many tokens were seen."""
    blocks, seen = build(), 0
    for begin in range(0, len(blocks), READ_BATCH):
        rows = range(begin, min(begin + READ_BATCH, len(blocks)))
        if isinstance(blocks, BlockDataset):
            seen += sum(len(block["input_ids"]) for block in blocks.__getitems__(rows))
        else:
            seen += sum(len(ids) for ids in blocks[rows]["input_ids"])
    return seen


def make_sides(folder: str, block_size: int) -> dict[str, Build]:
    """Return by name what builds the blocks of each side."""
    tokenizer = make_tokenizer()

    def ours(mode: PackingMode = "full_sentences") -> BlockDataset:
        return BlockDataset(datasets.load_from_disk(folder), tokenizer=tokenizer, block_size=block_size, mode=mode)

    def theirs(columns: list[str]) -> datasets.Dataset:
        return textbook(datasets.load_from_disk(folder), columns, block_size).with_format("numpy")

    return {
        OURS: ours,
        ONE_DOCUMENT: partial(ours, "doc_sentences"),
        ISOLATED: partial(ours, "isolated_documents"),
        "group_texts, input_ids": lambda: theirs(["input_ids"]),
        "group_texts, input_ids + word_starts": lambda: theirs(["input_ids", "word_starts"]),
    }


def fill_of(blocks: BlockDataset | datasets.Dataset) -> float:
    """Return the share of positions that hold tokens; the textbook's rows are all full."""
    return blocks.fill if isinstance(blocks, BlockDataset) else 1.0


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, block_size=512, repeats=3)
    parser.add_argument("--train_file", help="UTF-8 text; synthetic documents if not given")
    parser.add_argument("--num_tokens", type=int, default=6_000_000, help="tokens of the synthetic documents")
    parser.add_argument("--turn_seconds", type=float, default=2.0, help="least time of a turn")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        if options.train_file:
            documents_of_file(options.train_file).save_to_disk(folder)
        else:
            synthetic_documents(options.num_tokens).save_to_disk(folder)
        sides = make_sides(folder, options.block_size)
        memory = {name: peak_memory(build) for name, build in sides.items()}
        build_seconds = interleaved(sides, options.repeats, turn_seconds=options.turn_seconds)
        and_read = {name: partial(build_and_read, build) for name, build in sides.items()}
        read_seconds = interleaved(and_read, options.repeats, turn_seconds=options.turn_seconds)
        blocks = {name: build() for name, build in sides.items()}
    ours = blocks[OURS]
    assert isinstance(ours, BlockDataset)
    print(f"{ours!r}\nbest of {options.repeats}, in turn; memory: rise of ru_maxrss in a forked child while building")
    headers = ["side", "fill", "build, s", "M tokens/s", "ratio", "build + read, s", "ratio", "memory, MiB"]
    rows = [
        [
            name,
            fill_of(blocks[name]),
            build_seconds[name],
            ours.num_tokens / build_seconds[name] / 1e6,
            build_seconds[name] / build_seconds[OURS],
            read_seconds[name],
            read_seconds[name] / read_seconds[OURS],
            memory[name],
        ]
        for name in sides
    ]
    print_table(rows, headers)


if __name__ == "__main__":
    main()
