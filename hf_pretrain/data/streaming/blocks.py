"""How the shards of a stream are dealt out to those who read it, and how far each of them has come.

The text is one endless list: all shards in the order of epoch 0, all in the order of epoch 1, and so on. A reader, called a
lane, is a data loader's worker on one of the processes. The list is dealt out in rounds: of L items in a row, each of L lanes
gets one, beginning with another lane in each round, by a keyed draw.

Blocks made while training reads the text, for corpora that one does not want to store as documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import tokenize_texts
from hf_pretrain.data.examples.packing import BlockDataset, BlockTemplate, PackingMode, check_mode
from hf_pretrain.data.streaming.sources import FileShards, ShardSource, as_source
from hf_pretrain.data.text.files import DocumentSeparator, OnBadText
from hf_pretrain.errors import InputError


class Place(NamedTuple):
    """A place in the list of shards: just before a block that has not been taken.

    Attributes:
        number: Epoch * number of shards + place in the order of that epoch.
        start: Where the text of the block's window begins in the shard, as the source counts.
        first_block: Blocks of the shard before the window.
        taken: Blocks of the window that have been taken, in the window's own order.
    """

    number: int
    start: int = 0
    first_block: int = 0
    taken: int = 0


class Stop(NamedTuple):
    """How far a lane has come: the place, and the number of its item in the list that is dealt."""

    item: int
    place: Place


@dataclass(frozen=True)
class StreamProgress:
    """How far all lanes have come; plain data, to be saved with a checkpoint.

    Attributes:
        num_lanes: Number of lanes.
        num_batches: Micro-batches that all lanes have given; the next one is of lane ``num_batches % num_lanes``.
        pending: The list begins with these, left over from an earlier dealing;
        tail: then come the places from this number on.
        stops: Lane -> how far it has come; lanes that gave nothing yet are not in it.
    """

    num_lanes: int
    num_batches: int = 0
    pending: tuple[Place, ...] = ()
    tail: int = 0
    stops: Mapping[int, Stop] | None = None

    def item(self, number: int) -> Place:
        """Return an item of the list."""
        pending = self.pending
        return pending[number] if number < len(pending) else Place(self.tail + number - len(pending))

    def items(self, lane: int) -> Iterator[Stop]:
        """Yield what a lane still has to read: the rest of the item it was in, then its next ones, without end."""
        stop = (self.stops or {}).get(lane)
        if stop is not None:
            yield stop
        for dealing in itertools.count(0 if stop is None else 1 + stop.item // self.num_lanes):
            number = dealing * self.num_lanes + (lane + first_lane(dealing, self.num_lanes)) % self.num_lanes
            yield Stop(number, self.item(number))

    def owner(self, number: int) -> int:
        """Return the lane that an item is dealt to."""
        dealing, place = divmod(number, self.num_lanes)
        return (place - first_lane(dealing, self.num_lanes)) % self.num_lanes

    def among(self, num_lanes: int) -> StreamProgress:
        """Return the same progress for another number of lanes: what nobody has finished is dealt out anew."""
        if num_lanes == self.num_lanes:
            return self
        stops = {lane: next(self.items(lane)) for lane in range(self.num_lanes)}
        end = max(len(self.pending), 1 + max(stop.item for stop in stops.values()))
        pending = []
        for number in range(end):
            stop = stops[self.owner(number)]
            if number >= stop.item:
                pending.append(stop.place if number == stop.item else self.item(number))
        return StreamProgress(num_lanes, pending=tuple(pending), tail=self.tail + end - len(self.pending))

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {"stops": sorted((lane, *stop) for lane, stop in (self.stops or {}).items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamProgress:
        """Return what `to_json` made plain."""
        stops = {lane: Stop(item, Place(*place)) for lane, item, place in data["stops"]}
        return cls(**{**data, "pending": tuple(Place(*place) for place in data["pending"]), "stops": stops})


def first_lane(dealing: int, num_lanes: int) -> int:
    """Return by how many lanes a round of the dealing is turned: no lane must get the same shards in every epoch."""
    return int(draws.integers(draws.row_keys([dealing], seed=0, stream="lanes"), 1, high=num_lanes)[0, 0])


class ShardSampler:
    """Says which shard comes at a place: every epoch has each shard once, in a keyed order of its own.

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
        """Return the epoch and the shard of a place."""
        epoch, place = divmod(number, self.num_shards)
        return epoch, (self.order(epoch)[place] if self.shuffle else place)

    def order(self, epoch: int) -> list[int]:
        """Return the shards in the order of an epoch."""
        if not self.shuffle:
            return list(range(self.num_shards))
        return draws.permutation(self.num_shards, seed=self.seed, epoch=epoch, stream="shards").tolist()


_SHARD_BITS = 32
_COLUMN_TYPES: dict[str, type[np.generic]] = {"input_ids": np.int32, "word_starts": np.bool_, "sent_starts": np.bool_}
_READ_BLOCKS = 256
_MOST_EMPTY = 100

Tokenize = Callable[[list[str]], Mapping[str, Sequence[Any]]]


class StreamingBlocks(IterableDataset[dict[str, Any]]):
    """Blocks of text that is read, tokenized and packed on the fly, a window of documents at a time.

    Each example has ``input_ids`` and ``word_starts`` as in :class:`BlockDataset`, ``epoch``, and ``example_id`` =
    shard number * 2**32 + number of the block in its shard: the same for any number of workers and ranks. Iterating
    gives one epoch; data loader workers share the shards out among themselves. Training takes a
    :class:`TrainingStream` of it, which goes on epoch after epoch and can go on from any place.

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
        on_bad_text: What becomes of a document of a file that is no text: ``"skip"`` or ``"refuse"``, see
            `hf_pretrain.data.text.files.BadTextCount`.

    Raises:
        InputError: If there is no shard, the column is not there, or ``block_size`` leaves no room for text.
    """

    def __init__(
        self,
        source: Sequence[str | Path] | datasets.IterableDataset | ShardSource,
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 128,
        mode: PackingMode = "full_sentences",
        document_separator: DocumentSeparator = "blank_line",
        text_column: str = "text",
        documents_per_buffer: int = 1000,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
        tokenize: Tokenize | None = None,
        on_bad_text: OnBadText = "skip",
    ) -> None:
        if documents_per_buffer < 1:
            raise InputError(f"documents_per_buffer={documents_per_buffer} must be positive; 1000 is usual")
        check_mode(mode)
        room = BlockTemplate.of(tokenizer).budget(block_size)
        self.source = as_source(
            source, document_separator=document_separator, text_column=text_column, on_bad_text=on_bad_text
        )
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.mode = mode
        self.documents_per_buffer = documents_per_buffer
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.tokenize = tokenize if tokenize is not None else partial(tokenize_texts, tokenizer=tokenizer)
        self.sampler = self._sampler()
        self._window_tokens = shuffle_buffer_size * room
        # In shared memory, because persistent workers keep the copy of this object that they were started with.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

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
            for example, _ in self.read(Place(number)):
                yield example

    def read(self, place: Place) -> Iterator[tuple[dict[str, Any], Place]]:
        """Yield the examples from a place to the end of its shard, and with each the place behind it."""
        epoch, shard = self.sampler.locate(place.number)
        number, start, first_block, taken = place
        for documents, stop in self._windows(shard, epoch=epoch, start=start):
            blocks = BlockDataset(documents, tokenizer=self.tokenizer, block_size=self.block_size, mode=self.mode)
            order = self._order(len(blocks), epoch=epoch, window=f"{shard} {first_block}")
            for begin in range(taken, len(blocks), _READ_BLOCKS):
                rows = order[begin : begin + _READ_BLOCKS].tolist()
                for done, (row, block) in enumerate(zip(rows, blocks.__getitems__(rows), strict=True), begin + 1):
                    example_id = (shard << _SHARD_BITS) + first_block + row
                    example = {**block, "example_id": example_id, "epoch": epoch}
                    yield example, Place(number, start, first_block, done)
            start, first_block, taken = stop, first_block + len(blocks), 0

    def identity(self) -> str:
        """Return a digest of all that decides what comes at a place."""
        options = [self.block_size, self.mode, self.documents_per_buffer, self.shuffle_buffer_size, self.seed]
        known = [draws.VERSION, *options, len(self.tokenizer), self.source.identity()]
        return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()

    def cuts(self) -> Any:
        """Return how the files are cut, as plain data; None of a source that has no files."""
        return self.source.cuts() if isinstance(self.source, FileShards) else None

    def cut_like(self, cuts: Any) -> list[str]:
        """Cut the files as they were when a checkpoint was made, so that places in them still hold.

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
        """Yield the documents of a shard a window at a time, none of them without a token, and the place behind each."""
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

    Each example has an entry ``progress``, the number of the lane that gave it and its :class:`Stop`: where the lane goes on
    behind this example. Micro-batch m, counted over all processes, is of lane m modulo the number of lanes.

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
        """Yield the examples of this worker's lane.

        Raises:
            InputError: If no shard holds text.
        """
        worker = get_worker_info()
        own, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        progress = self.dealt(num_workers)
        lane = (progress.num_batches + own * self.world_size + self.rank) % progress.num_lanes
        num_empty = 0
        for item, place in progress.items(lane):
            num_empty += 1
            for example, behind in self.stream.read(place):
                num_empty = 0
                yield example | {"progress": (lane, Stop(item, behind))}
            if num_empty > _MOST_EMPTY * self.stream.num_shards:
                raise InputError(f"no text in {num_empty} readings of the {self.stream.num_shards} shards: give text")

    def dealt(self, num_workers: int) -> StreamProgress:
        """Return the progress with which these workers begin."""
        num_lanes = self.world_size * max(1, num_workers)
        return StreamProgress(num_lanes) if self.progress is None else self.progress.among(num_lanes)


def _documents(columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    """Put columns of rows, some of them not empty, into Arrow: many times faster than by ``Dataset.from_dict``."""
    lists: dict[str, pa.LargeListArray] = {}
    for name, dtype in _COLUMN_TYPES.items():
        rows = [np.asarray(row, dtype=dtype) for row in columns[name]]
        offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int64())
        lists[name] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(rows)))
    return datasets.Dataset(pa.table(lists))
