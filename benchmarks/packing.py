"""Packing into blocks: BlockDataset against the textbook ``group_texts`` map, on the same tokenized documents.

Run ``python benchmarks/packing.py``; no network is needed. Both sides read the same memory-mapped documents. The
textbook side concatenates the lists of 1 000 documents and cuts them into blocks (``datasets.map`` with
``batched=True``), once with ``input_ids`` alone and once with ``word_starts`` as well, which is what a block of ours
holds. "Read" reads every block once, in batches of 32: ours by ``__getitems__``, the textbook's as NumPy arrays, its
fastest format. Ours packs whole words and puts special tokens and separators in while reading; the textbook cuts
anywhere and adds nothing. The other sides of ours are the other modes. "Fill" is the share of a batch's positions that hold
tokens, if every row is padded to the block size; for each of ``--fill_sizes`` there is a table of it by mode.

``--part step`` times forward and backward of a small BERT on masked rows of whole sentences and on full rows, in turn, and
prints tokens of text a second: with a file, ``python benchmarks/packing.py --part step --train_file corpus.txt``.

``--part tokenize`` and ``--part train`` compare CPU seconds with those of the library tokenizers, on a file of text: making
documents with ``encode_batch_fast``, which gives ids alone, for texts of 28 000 characters and for lines; and training a
tokenizer with the library's trainer. Set TOKENIZERS_PARALLELISM=false for one thread.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import datasets
import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pretrain import (
    DataCollatorForMaskedLM,
    EncoderForPreTraining,
    EpochDataset,
    tokenize_documents,
    train_tokenizer,
)
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import document_rows
from hf_pretrain.data.documents.tokenizers import TokenizerKind
from hf_pretrain.data.examples.packing import BlockDataset, PackingMode
from hf_pretrain.data.text.datasets import random_subset, text_dataset
from timing import interleaved, options_parser, peak_memory, print_table

READ_BATCH = 32
MAP_BATCH = 1000
MODES: tuple[PackingMode, ...] = get_args(PackingMode)
OURS = f"BlockDataset, {MODES[0]}"

Build = Callable[[], BlockDataset | datasets.Dataset]


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer that only knows its special tokens: the documents are tokenized already."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {f"w{n}": n for n in range(5, 30_005)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


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


def documents_of_file(options: argparse.Namespace) -> tuple[datasets.Dataset, PreTrainedTokenizerBase]:
    """Return the documents of a file of text, in tokens of a WordPiece tokenizer that is trained on them."""
    texts = text_dataset([options.train_file])
    if options.max_corpus_bytes:
        texts = random_subset(texts, max_bytes=options.max_corpus_bytes, seed=0)
    tokenizer = train_tokenizer(texts["text"], kind="wordpiece", vocab_size=options.vocab_size, lowercase=True)
    return tokenize_documents(texts, tokenizer), tokenizer


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


def make_sides(folder: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict[str, Build]:
    """Return by name what builds the blocks of each side."""

    def ours(mode: PackingMode) -> BlockDataset:
        return BlockDataset(datasets.load_from_disk(folder), tokenizer=tokenizer, block_size=block_size, mode=mode)

    def theirs(columns: list[str]) -> datasets.Dataset:
        return textbook(datasets.load_from_disk(folder), columns, block_size).with_format("numpy")

    return {f"BlockDataset, {mode}": partial(ours, mode) for mode in MODES} | {
        "group_texts, input_ids": lambda: theirs(["input_ids"]),
        "group_texts, input_ids + word_starts": lambda: theirs(["input_ids", "word_starts"]),
    }


def fill_of(blocks: BlockDataset | datasets.Dataset) -> float:
    """Return the share of positions that hold tokens; the textbook's rows are all full."""
    return blocks.fill if isinstance(blocks, BlockDataset) else 1.0


def print_fills(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, sizes: list[int]) -> None:
    """Print the fill of each mode at some block sizes."""
    rows = [
        [mode, *(BlockDataset(documents, tokenizer=tokenizer, block_size=size, mode=mode).fill for size in sizes)]
        for mode in MODES
    ]
    print_table(rows, ["fill", *map(str, sizes)])


def measure_steps(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> None:
    """Time forward and backward on batches of both packings, and print tokens of text a second."""
    sizes = {"hidden_size": options.hidden_size, "intermediate_size": 4 * options.hidden_size}
    heads = {"num_attention_heads": max(options.hidden_size // 32, 1), "num_hidden_layers": 4}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=options.block_size, **sizes, **heads)
    model = EncoderForPreTraining.from_model(BertForMaskedLM(config))
    collate, sides, num_tokens = DataCollatorForMaskedLM(tokenizer), {}, {}

    def step(batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            model.zero_grad()
            loss = model(**batch).losses["mlm"]
            (loss.sum.sum() / loss.count.sum()).backward()

    for mode in ("full_sentences", "full_rows", "tokens"):
        blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=options.block_size, mode=mode)
        order = draws.permutation(len(blocks), seed=0)[: options.batches * READ_BATCH].tolist()
        examples = EpochDataset(blocks).__getitems__(order)
        rows = [collate(examples[k : k + READ_BATCH]) for k in range(0, len(examples), READ_BATCH)]
        sides[mode] = partial(step, [{**row, **model.host_inputs(row, model.config)} for row in rows])
        special = list(tokenizer.all_special_ids)
        num_tokens[mode] = sum(int((~np.isin(example["input_ids"], special)).sum()) for example in examples)
        sides[mode]()
    seconds = interleaved(sides, options.repeats)
    speeds = {mode: num_tokens[mode] / seconds[mode] for mode in sides}
    first = next(iter(speeds.values()))
    table = [[mode, num_tokens[mode], seconds[mode], speed, speed / first] for mode, speed in speeds.items()]
    print_table(table, ["rows", "tokens of text", "s", "tokens/s", "ratio"])


def measure_packing(folder: str, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> None:
    """Time the building and the reading of all sides, and print them."""
    sides = make_sides(folder, tokenizer, options.block_size)
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


def lines_of_file(options: argparse.Namespace) -> list[str]:
    """Return the lines of the file that are not blank."""
    texts = text_dataset([options.train_file])
    if options.max_corpus_bytes:
        texts = random_subset(texts, max_bytes=options.max_corpus_bytes, seed=0)
    return [line for text in texts["text"] for line in text.split("\n") if line.strip()]


def measure_tokenizing(lines: list[str], options: argparse.Namespace) -> None:
    """Compare the CPU seconds of documents with those of ids alone, and print them."""
    text = "\n".join(lines)
    sizes = {"28 000 characters": [text[k : k + 28_000] for k in range(0, len(text), 28_000)], "lines": lines}
    rows = []
    for kind in options.kinds:
        learned = itertools.islice(lines, 0, None, max(1, len(text) // 5_000_000))
        tokenizer = train_tokenizer(learned, kind=kind, vocab_size=options.vocab_size)
        for name, texts in sizes.items():
            batches = [texts[k : k + 256] for k in range(0, len(texts), 256)]
            best = dict.fromkeys(("library", "ours"), 0.0)
            for batch in batches:
                sides: dict[str, Callable[[], object]] = {
                    "library": partial(tokenizer.backend_tokenizer.encode_batch_fast, batch, add_special_tokens=False),
                    "ours": partial(document_rows, batch, tokenizer),
                }
                for side, seconds in interleaved(sides, options.repeats, clock=time.process_time).items():
                    best[side] += seconds
            rows.append([kind, name, best["library"], best["ours"], best["library"] / best["ours"]])
    print_table(rows, ["tokenizer", "texts", "encode_batch_fast, CPU s", "ours, CPU s", "rate"])


def library_training(lines: list[str], kind: TokenizerKind, options: argparse.Namespace) -> Callable[[], None]:
    """Return what trains a tokenizer of a kind by the library alone, with the normalizer and the pre-tokenizer of ours."""
    pipeline = train_tokenizer(lines[:10_000], kind=kind, vocab_size=options.vocab_size).backend_tokenizer
    parts: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "wordpiece": (models.WordPiece, trainers.WordPieceTrainer, {"min_frequency": 2}),
        "bpe": (
            models.BPE,
            trainers.BpeTrainer,
            {"min_frequency": 2, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()},
        ),
        "unigram": (models.Unigram, trainers.UnigramTrainer, {"unk_token": "[UNK]"}),
    }
    model, trainer, more = parts[kind]

    def train() -> None:
        backend = Tokenizer(model())
        backend.normalizer, backend.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
        backend.train_from_iterator(
            lines,
            trainer(vocab_size=options.vocab_size, special_tokens=["[UNK]"], show_progress=False, **more),
        )

    return train


def measure_training(lines: list[str], options: argparse.Namespace) -> None:
    """Compare the CPU seconds of training a tokenizer with the library's trainer, and print them."""
    rows = []
    for kind in options.kinds:
        sides: dict[str, Callable[[], object]] = {
            "library": library_training(lines, kind, options),
            "ours": partial(train_tokenizer, lines, kind=kind, vocab_size=options.vocab_size),
        }
        best = interleaved(sides, options.repeats, clock=time.process_time)
        rows.append([kind, best["library"], best["ours"], best["library"] / best["ours"]])
    print_table(rows, ["tokenizer", "library's trainer, CPU s", "ours, CPU s", "rate"])


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, block_size=512, repeats=3, vocab_size=8192, hidden_size=128, batches=4)
    parser.add_argument(
        "--part", choices=("build", "fill", "step", "tokenize", "train"), nargs="+", default=["build", "fill"]
    )
    parser.add_argument("--train_file", help="text; synthetic documents if not given")
    parser.add_argument("--max_corpus_bytes", type=int, help="take a part of the documents of the file")
    parser.add_argument("--num_tokens", type=int, default=6_000_000, help="tokens of the synthetic documents")
    parser.add_argument("--turn_seconds", type=float, default=2.0, help="least time of a turn")
    parser.add_argument("--fill_sizes", type=int, nargs="+", default=[64, 128, 512], help="block sizes of the fills")
    parser.add_argument("--kinds", nargs="+", default=["wordpiece", "bpe", "unigram"], help="kinds of tokenizers")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    for part, measure in (("tokenize", measure_tokenizing), ("train", measure_training)):
        if part in options.part:
            measure(lines_of_file(options), options)
    if not {"build", "fill", "step"} & {*options.part}:
        return
    if options.train_file:
        documents, tokenizer = documents_of_file(options)
    else:
        documents, tokenizer = synthetic_documents(options.num_tokens), make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        documents.save_to_disk(folder)
        if "build" in options.part:
            measure_packing(folder, tokenizer, options)
        if "fill" in options.part:
            print_fills(documents, tokenizer, options.fill_sizes)
        if "step" in options.part:
            measure_steps(documents, tokenizer, options)


if __name__ == "__main__":
    main()
