"""Blocks made while training reads the text, for corpora that one does not want to store as documents."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents import tokenize_texts
from hf_pretrain.data.packing import BlockDataset, BlockTemplate, PackingMode, check_mode
from hf_pretrain.data.text import read_documents
from hf_pretrain.errors import InputError

_SHARD_BITS = 32
_COLUMN_TYPES: dict[str, type[np.generic]] = {"input_ids": np.int32, "word_starts": np.bool_, "sent_starts": np.bool_}
_EPOCH, _WARNED = 0, 1

Read = Callable[[str | Path], Iterable[str]]
Tokenize = Callable[[list[str]], Mapping[str, Sequence[Any]]]


class StreamingBlocks(IterableDataset[dict[str, Any]]):
    """Blocks of text that is read, tokenized and packed on the fly, a buffer of documents at a time.

    Each example has ``input_ids`` and ``word_starts`` as in :class:`BlockDataset`, ``epoch``, and ``example_id`` =
    shard number * 2**32 + number of the block in its shard: the same for any number of workers and ranks. Workers
    share the shards out among themselves. Ranks are left to accelerate, which deals each worker's examples out in
    turn. Resume replays what was seen, which gives the same examples in the same order for the same number of workers.

    Args:
        source: Paths of the files, each a shard; or a ``datasets.IterableDataset``, whose own shards are used.
        tokenizer: Tokenizer for the text; gives the special tokens around a block and the separator between documents.
        block_size: Most tokens in a block, special tokens included.
        mode: How to cut, see :func:`hf_pretrain.data.packing.block_bounds`.
        read: Returns the texts of the documents of one path; default `hf_pretrain.data.text.read_documents`. Picklable
            if workers are spawned.
        text_column: Column of the ``datasets.IterableDataset``, or of JSON and Parquet files, that holds the text.
        documents_per_buffer: Documents tokenized and packed together; no block crosses two buffers.
        shuffle_buffer_size: Examples among which a keyed shuffle draws the next one, in each worker; 0 keeps the
            order. If set, the order of the shards is drawn each epoch too.
        seed: Key of the shuffle.
        tokenize: Maps texts to columns of the document schema; default `hf_pretrain.data.documents.tokenize_texts`.

    Raises:
        InputError: If there is no shard, the column is not there, or ``block_size`` leaves no room for text.
    """

    def __init__(
        self,
        source: Sequence[str | Path] | datasets.IterableDataset,
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 128,
        mode: PackingMode = "full_sentences",
        read: Read | None = None,
        text_column: str = "text",
        documents_per_buffer: int = 1000,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
        tokenize: Tokenize | None = None,
    ) -> None:
        _check_source(source, text_column)
        if documents_per_buffer < 1:
            raise InputError(f"documents_per_buffer={documents_per_buffer} must be positive; 1000 is usual")
        check_mode(mode)
        BlockTemplate.of(tokenizer).budget(block_size)
        self.source = source
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.mode = mode
        self.read = read if read is not None else partial(read_documents, text_column=text_column)
        self.text_column = text_column
        self.documents_per_buffer = documents_per_buffer
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.tokenize = tokenize if tokenize is not None else partial(tokenize_texts, tokenizer=tokenizer)
        # In shared memory, because persistent workers keep the copy of this object that they were started with.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def num_shards(self) -> int:
        """Shards of the source: the most workers that have something to do."""
        return self.source.num_shards if isinstance(self.source, datasets.IterableDataset) else len(self.source)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration yields."""
        return int(self._shared[_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, in this process and in running workers."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must not be negative")
        self._shared[_EPOCH] = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this worker's examples of the current epoch."""
        return self.examples(self.epoch)

    def examples(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield this worker's examples of an epoch."""
        batches = (batch for shard in self._own_shards(epoch) for batch in self._packed_buffers(shard, epoch))
        if self.shuffle_buffer_size > 0:
            return self._shuffled(batches, epoch)
        return itertools.chain.from_iterable(batches)

    def _own_shards(self, epoch: int) -> list[int]:
        order = list(range(self.num_shards))
        if self.shuffle_buffer_size > 0:
            order = draws.permutation(self.num_shards, seed=self.seed, epoch=epoch, stream="shards").tolist()
        worker = get_worker_info()
        if worker is None:
            return order
        if worker.id == 0 and worker.num_workers > self.num_shards and not self._shared[_WARNED]:
            self._shared[_WARNED] = 1
            warnings.warn(
                f"dataloader_num_workers={worker.num_workers} is more than the {self.num_shards} shards of the text: "
                f"{worker.num_workers - self.num_shards} workers are idle; use fewer, or cut the text into more files",
                stacklevel=2,
            )
        return order[worker.id :: worker.num_workers]

    def _buffers(self, shard: int, epoch: int) -> Iterator[list[str]]:
        """Yield the texts of a shard, ``documents_per_buffer`` at a time."""
        if isinstance(self.source, datasets.IterableDataset):
            rows = self.source.shard(self.num_shards, shard)
            rows.set_epoch(epoch)
            # iter(batch_size), unlike plain iteration, does not share the shard out among the workers once more.
            for batch in rows.iter(batch_size=self.documents_per_buffer):
                yield [text or "" for text in batch[self.text_column]]  # a row without text is null
            return
        texts = iter(self.read(self.source[shard]))
        while buffer := list(itertools.islice(texts, self.documents_per_buffer)):
            yield buffer

    def _packed_buffers(self, shard: int, epoch: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the examples of a shard, a buffer of documents at a time."""
        first_id = shard << _SHARD_BITS
        for texts in self._buffers(shard, epoch):
            columns = self.tokenize(texts)
            if not any(len(ids) for ids in columns["input_ids"]):
                continue
            blocks = BlockDataset(
                _documents(columns), tokenizer=self.tokenizer, block_size=self.block_size, mode=self.mode
            )
            yield [
                {**block, "example_id": example_id, "epoch": epoch}
                for example_id, block in enumerate(blocks.__getitems__(range(len(blocks))), first_id)
            ]
            first_id += len(blocks)

    def _shuffled(self, batches: Iterable[list[dict[str, Any]]], epoch: int) -> Iterator[dict[str, Any]]:
        """Yield all examples; each that comes in takes the place of one drawn from the buffer, by its own key."""
        buffer: list[dict[str, Any]] = []
        for batch in batches:
            ids = np.array([example["example_id"] for example in batch], dtype=np.int64)
            keys = draws.row_keys(ids, seed=self.seed, epoch=epoch, stream="shuffle")
            places = draws.integers(keys, 1, high=self.shuffle_buffer_size)[:, 0].tolist()
            for example, place in zip(batch, places, strict=True):
                if len(buffer) < self.shuffle_buffer_size:
                    buffer.append(example)
                else:
                    yield buffer[place]
                    buffer[place] = example
        for place in draws.permutation(len(buffer), seed=self.seed, epoch=epoch, stream="shuffle rest").tolist():
            yield buffer[place]


class EndlessBlocks(IterableDataset[dict[str, Any]]):
    """A stream that goes on with the next epoch where one ends, so that training sees one epoch that never ends.

    A Trainer can not know where a stream's epoch ends: it would leave a gradient half accumulated there, and a resume would
    look for all that was seen in the first epoch.

    Args:
        stream: The stream of one epoch.
    """

    def __init__(self, stream: StreamingBlocks) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this worker's examples, epoch after epoch; nothing if it has none."""
        for epoch in itertools.count():
            examples = self.stream.examples(epoch)
            first = next(examples, None)
            if first is None:
                return
            yield from itertools.chain([first], examples)


def _documents(columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    """Put columns of rows, some of them not empty, into Arrow: many times faster than by ``Dataset.from_dict``."""
    lists: dict[str, pa.LargeListArray] = {}
    for name, dtype in _COLUMN_TYPES.items():
        rows = [np.asarray(row, dtype=dtype) for row in columns[name]]
        offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int64())
        lists[name] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(rows)))
    return datasets.Dataset(pa.table(lists))


def _check_source(source: Any, text_column: str) -> None:
    if isinstance(source, datasets.IterableDataset):
        names = source.column_names
        if names is not None and text_column not in names:
            raise InputError(f"text_column={text_column!r} is not in the dataset; its columns are {', '.join(names)}")
    elif isinstance(source, str) or not isinstance(source, Sequence) or not source:
        raise InputError(f"source={source!r} must be a list of at least one path, or a datasets.IterableDataset")
