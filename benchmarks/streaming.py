"""Streaming a corpus: memory and speed from its first per cent to its last, and how soon a resume goes on.

Run ``python benchmarks/streaming.py --gigabytes 10 --format jsonl``; no network is needed. The text is made beforehand:
words of a keyed Zipf vocabulary in documents of 20 to 2 000 words. It is then read, tokenized, packed into blocks, shuffled,
masked and stacked into batches, one epoch, with no model behind it. Text is counted when the part of a file that it is in
is begun. Memory is what is resident: of this process, and of the data loader's workers together, which share pages that
count for each of them; the peak is this process's. Speed is that of the stretch since the row before; the first has the
start of the workers and the first window in it, before which no block is given.

A row is printed as soon as it is reached. ``--tokenizer words`` takes a vocabulary of whole words, which costs less than half of
what WordPiece costs: for the passes that are long, where it is the stream that is looked at.

``--resume_at 0.5`` also reads that share of the epoch the way a training does, and times the first batch of a stream that
goes on from where this one was ("state") against that of one that begins anew and leaves out what was seen ("replay").
The two must be the same batch.
"""

import itertools
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pretrain import DataCollatorForMaskedLM
from hf_pretrain.data import draws
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.streaming.blocks import Stop, StreamingBlocks, StreamProgress, TrainingStream
from hf_pretrain.data.streaming.sources import FileShards
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError
from hf_pretrain.training.parsing import parse_arguments
from timing import print_rows, print_table

FORMATS = ("jsonl", "parquet", "txt")
TOKENIZERS = ("wordpiece", "words")
LETTERS = np.array(list("etaoinshrdlucmfwypvbgkqjxzéüß"))
ENDINGS = np.array([" ", ". ", ".\n"])
NUM_WORDS = 50_000
NUM_ENTRIES = 1 << 16
BLOCK_WORDS = 1 << 19
FILE_BYTES = 64_000_000
TOKENIZER_BYTES = 1_000_000
MARKS = (0.01, 0.1, 0.25, 0.5, 1.0)


@dataclass
class StreamingArguments:
    """What is streamed."""

    gigabytes: float = field(default=0.2, metadata={"help": "Size of the text."})
    format: str = field(default="jsonl", metadata={"help": f"Of {', '.join(FORMATS)}."})
    folder: str | None = field(
        default=None, metadata={"help": "Folder of the text, made if it is empty; by default a temporary one."}
    )
    num_workers: int = field(default=0, metadata={"help": "Workers of the data loader."})
    batch_size: int = field(default=32, metadata={"help": "Blocks of a batch."})
    block_size: int = field(default=512, metadata={"help": "Tokens of a block."})
    shuffle_buffer_size: int = field(default=4096, metadata={"help": "Blocks that are shuffled together."})
    documents_per_buffer: int = field(default=1000, metadata={"help": "Documents that are tokenized together."})
    tokenizer: str = field(default="wordpiece", metadata={"help": f"Of {', '.join(TOKENIZERS)}."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the tokenizer, trained on the first megabyte."})
    most_gigabytes: float | None = field(default=None, metadata={"help": "Stop after so much of the text."})
    resume_at: list[float] = field(default_factory=list, metadata={"help": "Shares of the epoch to resume at."})

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            InputError: If the format or the tokenizer is unknown, or a share or the size is none.
        """
        if self.format not in FORMATS:
            raise InputError(f"format={self.format!r} is unknown; choose of {', '.join(FORMATS)}")
        if self.tokenizer not in TOKENIZERS:
            raise InputError(f"tokenizer={self.tokenizer!r} is unknown; choose of {', '.join(TOKENIZERS)}")
        if self.gigabytes <= 0:
            raise InputError(f"gigabytes={self.gigabytes} must be positive; 0.2 is a short test")
        for share in self.resume_at:
            if not 0 < share < 1:
                raise InputError(f"resume_at={share} must be between 0 and 1, such as 0.5")


def word_table() -> np.ndarray:
    """Return words with what follows them, each as often as it occurs by Zipf's law: ``object [NUM_ENTRIES]``."""
    ranks = np.arange(NUM_WORDS)
    keys = draws.row_keys(ranks, seed=0, stream="words")
    lengths = np.minimum(2 + draws.integers(keys, 1, high=9)[:, 0], 2 + np.log2(1 + ranks).astype(np.int64))
    letters = LETTERS[(len(LETTERS) * draws.uniforms(keys, 11)[:, 1:] ** 2).astype(np.int64)]
    words = ["".join(row[:length]) for row, length in zip(letters, lengths, strict=True)]
    shares = np.cumsum(1 / (ranks + 2.7))
    chosen = np.searchsorted(shares / shares[-1], (np.arange(NUM_ENTRIES) + 0.5) / NUM_ENTRIES)
    ends = draws.uniforms(draws.row_keys([0], seed=0, stream="ends"), NUM_ENTRIES)[0]
    endings = ENDINGS[np.searchsorted([0.93, 0.995], ends)]
    return np.array([words[word] + end for word, end in zip(chosen, endings, strict=True)], dtype=object)


def make_documents(number: int, table: np.ndarray) -> list[str]:
    """Return the documents of one block of the text, which its number decides."""
    entries = draws.bits(draws.row_keys([number], seed=0, stream="text"), BLOCK_WORDS // 4).view(np.uint16)[0]
    words = table[entries].tolist()
    sizes = draws.uniforms(draws.row_keys([number], seed=0, stream="lengths"), BLOCK_WORDS // 20)[0]
    ends = np.cumsum((20 * 100**sizes).astype(np.int64))
    bounds = [0, *ends[ends < BLOCK_WORDS].tolist(), BLOCK_WORDS]
    return ["".join(words[begin:end]).strip() for begin, end in itertools.pairwise(bounds)]


def make_corpus(folder: Path, *, num_bytes: float, kind: str) -> None:
    """Write files of about ``FILE_BYTES`` of text each, in blocks; a block is a row group of Parquet."""
    table = word_table()
    block_bytes = sum(len(text.encode()) + 2 for text in make_documents(0, table))
    num_blocks, in_file = max(round(num_bytes / block_bytes), 1), max(FILE_BYTES // block_bytes, 1)
    folder.mkdir(parents=True, exist_ok=True)
    progress = tqdm(range(0, num_blocks, in_file), desc="Making text", delay=2, disable=None)
    for first in progress:
        numbers = range(first, min(first + in_file, num_blocks))
        write_file(folder / f"part-{first:06d}.{kind}", (make_documents(number, table) for number in numbers))


def write_file(path: Path, blocks: Iterator[list[str]]) -> None:
    """Write documents in the format of the file's name."""
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for texts in blocks:
                writer.write_table(pa.table({"text": texts}))
        return
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for texts in blocks:
            if path.suffix == ".txt":
                file.writelines(f"{text}\n\n" for text in texts)
            else:
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def text_bytes(path: str) -> int:
    """Return the size of a file: of Parquet, what is compressed in it."""
    if not path.endswith(".parquet"):
        return Path(path).stat().st_size
    metadata = pq.read_metadata(path)
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


class Batch(NamedTuple):
    """A batch and what is counted of it."""

    inputs: dict[str, Any]
    example_ids: list[int]
    num_tokens: int
    progress: tuple[int, Stop] | None

    @property
    def shards(self) -> set[int]:
        """The shards that the examples are of."""
        return {example_id >> 32 for example_id in self.example_ids}


class Collate:
    """What makes a batch: the collator of masked language modelling."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.collator = DataCollatorForMaskedLM(tokenizer)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Return the batch of some examples."""
        progress = examples[-1].get("progress")
        rows = [{name: value for name, value in row.items() if name != "progress"} for row in examples]
        num_tokens = sum(len(row["input_ids"]) for row in rows)
        return Batch(self.collator(rows), [row["example_id"] for row in rows], num_tokens, progress)


class Corpus:
    """The files, the stream over them, and how many bytes are in each of its shards."""

    def __init__(self, folder: Path, args: StreamingArguments) -> None:
        self.args = args
        files = sorted(map(str, folder.glob(f"*.{args.format}")))
        train = train_tokenizer if args.tokenizer == "wordpiece" else train_word_tokenizer
        self.tokenizer = train(first_documents(files), vocab_size=args.vocab_size)
        self.stream = open_stream(files, self.tokenizer, args)
        # The stream is made here, of files.
        source = cast(FileShards, self.stream.source)
        paths = [shard.path for shard in source.shards]
        self.shard_bytes = [text_bytes(path) / paths.count(path) for path in paths]
        self.num_bytes = sum(self.shard_bytes)

    def loader(self, stream: IterableDataset) -> DataLoader:
        """Return a loader of batches of a stream."""
        return DataLoader(
            stream,
            batch_size=self.args.batch_size,
            num_workers=self.args.num_workers,
            persistent_workers=self.args.num_workers > 0,  # still there when the last row is measured
            collate_fn=Collate(self.tokenizer),
        )

    def begun(self, shards: set[int]) -> float:
        """Return the bytes of some shards."""
        return sum(self.shard_bytes[shard] for shard in shards)


def open_stream(files: list[str], tokenizer: PreTrainedTokenizerBase, args: StreamingArguments) -> StreamingBlocks:
    """Return the stream that is measured."""
    return StreamingBlocks(
        files,
        tokenizer=tokenizer,
        block_size=args.block_size,
        shuffle_buffer_size=args.shuffle_buffer_size,
        documents_per_buffer=args.documents_per_buffer,
    )


def train_word_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows the most frequent words, and nothing within them."""
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    backend = Tokenizer(models.WordLevel(unk_token=names["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=list(names.values()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def first_documents(files: list[str]) -> list[str]:
    """Return the first megabyte of the text."""
    texts, num_characters = [], 0
    for text in read_documents(files):
        texts.append(text)
        num_characters += len(text)
        if num_characters >= TOKENIZER_BYTES:
            break
    return texts


def resident_mib(pid: int | str = "self") -> float:
    """Return the resident memory of a process; nan where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 2**10 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def memory_columns() -> list[object]:
    """Return the memory of this process, of its workers, and the peak of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    workers = sum((resident_mib(child.pid or "self") for child in multiprocessing.active_children()), 0.0)
    return [resident_mib(), workers, peak]


def stream_epoch(corpus: Corpus) -> Iterator[list[object]]:
    """Stream one epoch, or a part of it; yield a row at each mark on the way."""
    limit = min(corpus.num_bytes, 1e9 * (corpus.args.most_gigabytes or math.inf))
    marks = [mark * limit for mark in MARKS]
    shards: set[int] = set()
    num_tokens = last_tokens = 0
    last_bytes, last_time = 0.0, time.perf_counter()

    def row() -> list[object]:
        nonlocal last_bytes, last_time, last_tokens
        now, num_bytes = time.perf_counter(), corpus.begun(shards)
        seconds, share = now - last_time, num_bytes / corpus.num_bytes
        speed = [(num_tokens - last_tokens) / seconds, (num_bytes - last_bytes) / seconds / 1e6]
        last_bytes, last_time, last_tokens = num_bytes, now, num_tokens
        return [f"{share:.0%}", num_bytes / 1e9, *memory_columns(), *speed]

    loader = corpus.loader(corpus.stream)
    for batch in loader:
        num_tokens += batch.num_tokens
        if not batch.shards <= shards:
            shards |= batch.shards
            # The last mark is the end of the epoch: its shards have to be read, not only begun.
            passed = sum(corpus.begun(shards) >= mark for mark in marks[:-1])
            if passed:
                del marks[:passed]
                yield row()
            if limit < corpus.num_bytes and corpus.begun(shards) >= limit:
                break
    yield row()


def resume(corpus: Corpus, share: float) -> list[object]:
    """Return the row of a resume: seconds to the first batch by the state, and by a replay."""
    begin = time.perf_counter()
    dataset = TrainingStream(corpus.stream)
    batches, shards = iter(corpus.loader(dataset)), set[int]()
    stops: dict[int, Stop] = {}
    num_batches = 0
    while corpus.begun(shards) < share * corpus.num_bytes:
        batch = next(batches)
        shards |= batch.shards
        assert batch.progress is not None
        lane, stops[lane] = batch.progress
        num_batches += 1
    expected = next(batches)
    by_replay = time.perf_counter() - begin
    progress = StreamProgress(dataset.dealt(corpus.args.num_workers).num_readers, num_batches=num_batches, stops=stops)
    begin = time.perf_counter()
    first = next(iter(corpus.loader(TrainingStream(corpus.stream, progress=progress))))
    by_state = time.perf_counter() - begin
    if first.example_ids != expected.example_ids:
        raise RuntimeError(f"the stream went on with {first.example_ids}, not with {expected.example_ids}")
    return [f"{share:.0%}", corpus.begun(shards) / 1e9, by_state, by_replay, by_replay / by_state]


def run(folder: Path, args: StreamingArguments) -> None:
    """Make the text if there is none, measure and print."""
    if not any(folder.glob(f"*.{args.format}")):
        begin = time.perf_counter()
        make_corpus(folder, num_bytes=args.gigabytes * 1e9, kind=args.format)
        print(f"text made in {time.perf_counter() - begin:.0f} s")
    corpus = Corpus(folder, args)
    print(f"{corpus.num_bytes / 1e9:.2f} GB of text, {corpus.stream.num_shards} shards, {args.num_workers} workers")
    headers = ["read", "GB", "process, MiB", "workers, MiB", "peak, MiB", "tokens/s", "MB/s"]
    print_rows(stream_epoch(corpus), headers)
    if args.resume_at:
        headers = ["resumed at", "GB", "state, s", "replay, s", "ratio"]
        print_table([resume(corpus, share) for share in args.resume_at], headers)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    (args,) = parse_arguments((StreamingArguments,), argv, prog=Path(__file__).name, description=__doc__ or "")
    if args.num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.folder is not None:
        run(Path(args.folder), args)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), args)


if __name__ == "__main__":
    main()
