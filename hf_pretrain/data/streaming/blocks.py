"""Blocks made while training reads the text, for corpora that one does not want to store as documents.

`StreamingBlocks` reads, tokenizes and packs. `TrainingStream` goes on epoch after epoch and deals the shards out to
readers. A reader is one worker of one process' data loader.

The text is one endless list: all shards in the order of epoch 0, all in the order of epoch 1, and so on. The list is
dealt out in rounds. Of R items in a row, each of R readers gets one. A keyed draw says which reader begins.
`StreamProgress` says how far each reader has come.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import tokenize_texts
from hf_pretrain.data.examples import packing
from hf_pretrain.data.examples.packing import BlockDataset, BlockTemplate, PackingMode
from hf_pretrain.data.streaming.sources import FileShards, ShardSource, as_source
from hf_pretrain.data.text.files import DocumentSeparator, OnBadText
from hf_pretrain.errors import InputError, check_choice, check_range

_SHARD_BITS = 32
_COLUMN_TYPES: dict[str, type[np.generic]] = {"input_ids": np.int32, "word_starts": np.bool_, "sent_starts": np.bool_}
_READ_BLOCKS = 256
_MOST_EMPTY = 100
Tokenize = Callable[[list[str]], Mapping[str, Sequence[Any]]]


class StreamPosition(NamedTuple):
    """A position in the endless list of shards: just before a block that nobody has taken.

    Attributes:
        number: Epoch * number of shards + position in the order of that epoch.
        start: Where the text of the block's window begins in the shard, as the source counts.
        first_block: Blocks of the shard before the window.
        taken: Blocks of the window that have been taken, in the window's own order.
    """

    number: int
    start: int = 0
    first_block: int = 0
    taken: int = 0


class Stop(NamedTuple):
    """How far a reader has come: the position, and the number of its item in the list that is dealt."""

    item: int
    position: StreamPosition


@dataclass(frozen=True)
class StreamProgress:
    """How far all readers have come, to be saved with a checkpoint.

    Attributes:
        num_readers: Number of readers.
        num_batches: Micro-batches that all readers have given; the next one is of reader ``num_batches % num_readers``.
        pending: The list begins with these, which an earlier number of readers left over.
        tail: Then come the shards from this number of the list on.
        stops: How far each reader has come, by its number, without readers that gave nothing yet.
    """

    num_readers: int
    num_batches: int = 0
    pending: tuple[StreamPosition, ...] = ()
    tail: int = 0
    stops: Mapping[int, Stop] | None = None

    def item(self, number: int) -> StreamPosition:
        """Return an item of the list."""
        pending = self.pending
        return pending[number] if number < len(pending) else StreamPosition(self.tail + number - len(pending))

    def items(self, reader: int) -> Iterator[Stop]:
        """Yield the rest of a reader's items: first the one that it was in, then its next ones, without end."""
        stop = (self.stops or {}).get(reader)
        if stop is not None:
            yield stop
        for round_number in itertools.count(0 if stop is None else 1 + stop.item // self.num_readers):
            turned = (reader + first_reader(round_number, self.num_readers)) % self.num_readers
            number = round_number * self.num_readers + turned
            yield Stop(number, self.item(number))

    def owner(self, number: int) -> int:
        """Return the reader that an item is dealt to."""
        round_number, position = divmod(number, self.num_readers)
        return (position - first_reader(round_number, self.num_readers)) % self.num_readers

    def among(self, num_readers: int) -> StreamProgress:
        """Return the same progress for another number of readers: unfinished items are dealt out anew."""
        if num_readers == self.num_readers:
            return self
        stops = {reader: next(self.items(reader)) for reader in range(self.num_readers)}
        end = max(len(self.pending), 1 + max(stop.item for stop in stops.values()))
        pending = []
        for number in range(end):
            stop = stops[self.owner(number)]
            if number >= stop.item:
                pending.append(stop.position if number == stop.item else self.item(number))
        return StreamProgress(num_readers, pending=tuple(pending), tail=self.tail + end - len(self.pending))

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = asdict(self)
        # The name of the number in checkpoints of earlier versions.
        data["num_lanes"] = data.pop("num_readers")
        return data | {"stops": sorted((reader, *stop) for reader, stop in (self.stops or {}).items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamProgress:
        """Return what `to_json` made plain."""
        stops = {reader: Stop(item, StreamPosition(*position)) for reader, item, position in data["stops"]}
        pending = tuple(StreamPosition(*position) for position in data["pending"])
        return cls(data["num_lanes"], data["num_batches"], pending, data["tail"], stops)


def first_reader(round_number: int, num_readers: int) -> int:
    """Return which reader a round begins with: no reader must get the same shards in every epoch."""
    return int(draws.integers(draws.row_keys([round_number], seed=0, stream="lanes"), 1, high=num_readers)[0, 0])


class ShardSampler:
    """Says which shard comes at a position: every epoch has each shard once, in a keyed order of its own.

    Args:
        num_shards: Shards of the text.
        seed: Key of the order.
        shuffle: Whether shards are shuffled; if not, each epoch has them as they are.
    """

    def __init__(self, num_shards: int, *, seed: int, shuffle: bool = True) -> None:
        self.num_shards = num_shards
        self.seed = seed
        self.shuffle = shuffle

    def locate(self, number: int) -> tuple[int, int]:
        """Return the epoch and the shard of a position."""
        epoch, position = divmod(number, self.num_shards)
        return epoch, (self.order(epoch)[position] if self.shuffle else position)

    def order(self, epoch: int) -> list[int]:
        """Return the shards in the order of an epoch."""
        if not self.shuffle:
            return list(range(self.num_shards))
        return draws.permutation(self.num_shards, seed=self.seed, epoch=epoch, stream="shards").tolist()


class StreamingBlocks(IterableDataset[dict[str, Any]]):
    """Blocks of text that is read, tokenized and packed on the fly, a window of documents at a time.

    Each example has ``input_ids``, ``word_starts`` and ``goes_on`` as in :class:`BlockDataset`, ``epoch``, and ``example_id`` =
    shard number * 2**32 + number of the block in its shard: the same for any number of workers and ranks. Iterating
    gives one epoch; data loader workers share the shards out among themselves. Training takes a
    :class:`TrainingStream` of it, which goes on epoch after epoch and can go on from any position.

    Args:
        source: Paths of files; or a ``datasets.IterableDataset``; or a :class:`ShardSource`. Large files are cut into
            parts, so that many can read one.
        tokenizer: Tokenizer for the text; gives the special tokens around a block and the separator between documents.
        block_size: Most tokens in a block, special tokens included.
        mode: How to cut, see :func:`hf_pretrain.data.examples.packing.block_bounds`.
        document_separator: What ends a document of a text file.
        text_column: Column of the ``datasets.IterableDataset``, or of JSON and Parquet files, that holds the text.
        documents_per_buffer: Documents tokenized together.
        shuffle_buffer_size: Blocks that are shuffled together, by a keyed permutation: the window. If set, the order of
            the shards is drawn each epoch too. 0 keeps the order, and a window is a buffer of documents.
        seed: Key of the shuffle.
        tokenize: Maps texts to columns of the document schema; default `hf_pretrain.data.documents.documents.tokenize_texts`.
        on_bad_text: Whether to ``"skip"`` or ``"refuse"`` a document of a file that is no text, see
            `hf_pretrain.data.text.files.BadTextCount`.
        with_sentences: Whether an example has ``sent_starts`` too.

    Raises:
        InputError: If there is no shard, the column is not there, or ``block_size`` leaves no room for text.
    """

    def __init__(
        self,
        source: Sequence[str | Path] | datasets.IterableDataset | ShardSource,
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 128,
        mode: PackingMode = "full_rows",
        document_separator: DocumentSeparator = "blank_line",
        text_column: str = "text",
        documents_per_buffer: int = 1000,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
        tokenize: Tokenize | None = None,
        on_bad_text: OnBadText = "skip",
        with_sentences: bool = False,
    ) -> None:
        check_range(documents_per_buffer, "[1, inf)", name="documents_per_buffer", hint="1000 is usual")
        check_choice(mode, get_args(PackingMode), name="mode")
        room = BlockTemplate.of(tokenizer).budget(block_size)
        self.source = as_source(
            source, document_separator=document_separator, text_column=text_column, on_bad_text=on_bad_text
        )
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.mode = mode
        self.with_sentences = with_sentences
        self.documents_per_buffer = documents_per_buffer
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.tokenize = tokenize if tokenize is not None else partial(tokenize_texts, tokenizer=tokenizer)
        self.sampler = self._sampler()
        self._window_tokens = shuffle_buffer_size * room
        # In shared memory, because persistent workers keep the copy of this object that they were started with.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        # The phases of a run draw as different epochs.
        self.first_epoch = 0

    @property
    def num_shards(self) -> int:
        """Parts of the text that can be read side by side."""
        return self.source.num_shards

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration yields."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, in this process and in running workers."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must not be negative")
        self._epoch[0] = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this worker's examples of the current epoch."""
        worker = get_worker_info()
        own, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        begin = self.epoch * self.num_shards
        for number in range(begin + own, begin + self.num_shards, num_workers):
            for example, _ in self.read(StreamPosition(number)):
                yield example

    def read(self, position: StreamPosition) -> Iterator[tuple[dict[str, Any], StreamPosition]]:
        """Yield the examples from a position to the end of its shard, and with each the position behind it."""
        epoch, shard = self.sampler.locate(position.number)
        epoch += self.first_epoch
        number, start, first_block, taken = position
        for documents, stop in self._windows(shard, epoch=epoch, start=start):
            blocks = BlockDataset(
                documents,
                tokenizer=self.tokenizer,
                block_size=self.block_size,
                mode=self.mode,
                with_sentences=self.with_sentences,
            )
            order = self._order(len(blocks), epoch=epoch, window=f"{shard} {first_block}")
            for begin in range(taken, len(blocks), _READ_BLOCKS):
                rows = order[begin : begin + _READ_BLOCKS].tolist()
                for done, (row, block) in enumerate(zip(rows, blocks.__getitems__(rows), strict=True), begin + 1):
                    example_id = (shard << _SHARD_BITS) + first_block + row
                    example = {**block, "example_id": example_id, "epoch": epoch}
                    yield example, StreamPosition(number, start, first_block, done)
            start, first_block, taken = stop, first_block + len(blocks), 0

    def identity(self) -> str:
        """Return a digest of the text and of all options that decide its examples."""
        options = [self.block_size, self.mode, self.documents_per_buffer, self.shuffle_buffer_size, self.seed]
        known = [draws.VERSION, packing.VERSION, *options, len(self.tokenizer), self.source.identity()]
        return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()

    def cuts(self) -> Any:
        """Return how the files are cut, as plain data; None of a source that has no files."""
        return self.source.cuts() if isinstance(self.source, FileShards) else None

    def cut_like(self, cuts: Any) -> list[str]:
        """Cut the files as they were when a checkpoint was made, so that positions in them still hold.

        Args:
            cuts: What `cuts` returned then; the stream must have the same `identity`.

        Returns:
            The names of the files that are longer or shorter now.
        """
        if cuts is None or not isinstance(self.source, FileShards):
            return []
        changed = self.source.cut_like(cuts)
        self.sampler = self._sampler()
        return changed

    def _sampler(self) -> ShardSampler:
        return ShardSampler(self.source.num_shards, seed=self.seed, shuffle=self.shuffle_buffer_size > 0)

    def _order(self, num_blocks: int, *, epoch: int, window: str) -> np.ndarray:
        if self.shuffle_buffer_size == 0:
            return np.arange(num_blocks)
        return draws.permutation(num_blocks, seed=self.seed, epoch=epoch, stream=f"window {window}")

    def _windows(self, shard: int, *, epoch: int, start: int) -> Iterator[tuple[datasets.Dataset, int]]:
        """Yield the documents of a shard a window at a time, without empty ones, and with each where the source goes on."""
        texts = self.source.read(shard, start=start, epoch=epoch)
        gathered: dict[str, list[Any]] = {name: [] for name in _COLUMN_TYPES}
        num_tokens = stop = 0
        while buffer := list(itertools.islice(texts, self.documents_per_buffer)):
            stop = buffer[-1][1]
            columns = self.tokenize([text for text, _ in buffer])
            for name, rows in gathered.items():
                rows.extend(columns[name])
            num_tokens += sum(map(len, columns["input_ids"]))
            if num_tokens > self._window_tokens:
                yield _documents(gathered), stop
                gathered = {name: [] for name in _COLUMN_TYPES}
                num_tokens = 0
        if num_tokens:
            yield _documents(gathered), stop


class TrainingStream(IterableDataset[dict[str, Any]]):
    """A stream for training: epoch after epoch without end, shared out among all workers of all processes.

    Each example has an entry ``progress``: the number of its reader, and a `Stop`, which says where the reader goes on after it.
    Micro-batch m, counted over all processes, is of reader m modulo the number of readers.

    Args:
        stream: The text.
        rank: Number of this process.
        world_size: Number of processes.
        progress: Where to go on; None for the beginning.
    """

    def __init__(
        self,
        stream: StreamingBlocks,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: StreamProgress | None = None,
    ) -> None:
        self.stream = stream
        self.rank = rank
        self.world_size = world_size
        self.progress = progress

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the examples of this worker's reader.

        Raises:
            InputError: If no shard holds text.
        """
        worker = get_worker_info()
        own, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        progress = self.dealt(num_workers)
        reader = (progress.num_batches + own * self.world_size + self.rank) % progress.num_readers
        num_empty = 0
        for item, position in progress.items(reader):
            num_empty += 1
            for example, behind in self.stream.read(position):
                num_empty = 0
                yield example | {"progress": (reader, Stop(item, behind))}
            if num_empty > _MOST_EMPTY * self.stream.num_shards:
                raise InputError(f"no text in {num_empty} readings of the {self.stream.num_shards} shards: give text")

    def dealt(self, num_workers: int) -> StreamProgress:
        """Return the progress with which these workers begin."""
        num_readers = self.world_size * max(1, num_workers)
        return StreamProgress(num_readers) if self.progress is None else self.progress.among(num_readers)


def _documents(columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    """Put columns of rows, some of them not empty, into Arrow: many times faster than by ``Dataset.from_dict``."""
    lists: dict[str, pa.LargeListArray] = {}
    for name, dtype in _COLUMN_TYPES.items():
        rows = [np.asarray(row, dtype=dtype) for row in columns[name]]
        offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int64())
        lists[name] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(rows)))
    return datasets.Dataset(pa.table(lists))
