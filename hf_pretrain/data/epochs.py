"""Examples that know their epoch: it travels inside the index, so it reaches workers and survives resume.

So does an example's place in the order of its epoch, for what changes in the course of training.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError

EPOCH_STRIDE = 1 << 40
"""Index = epoch * EPOCH_STRIDE + row: room for 2**40 rows and 2**23 epochs in a signed 64-bit integer."""

PLACE_STRIDE = 1 << 64
"""A sampler that knows the order adds (place + 1) * PLACE_STRIDE; Python's integers have no bound."""

FILLER = "is_filler"
"""Entry of a batch that only keeps a process in step with the others: nothing of it may count."""

_YIELD_CHUNK = 1 << 16


class EpochDataset(Dataset[dict[str, Any]]):
    """A map-style dataset whose examples carry ``example_id`` and ``epoch``, the keys of every random draw.

    Index ``epoch * EPOCH_STRIDE + row`` is the example of that row in that epoch. A plain index below the length is
    the row in epoch 0, so the dataset can also be used with any stock sampler. The indices of :class:`EpochSampler`
    also say at which ``place`` of the epoch's order the example comes, and so do the examples read by them.

    Args:
        base: A map-style dataset of dicts: a ``datasets.Dataset`` or a torch dataset with a length.

    Raises:
        InputError: If ``base`` has no length or is read by iteration only.
    """

    def __init__(self, base: Any) -> None:  # noqa: ANN401 (torch and datasets share no map-style base class)
        if isinstance(base, IterableDataset) or not (hasattr(base, "__len__") and hasattr(base, "__getitem__")):
            raise InputError(
                f"dataset={type(base).__name__} is not map-style (it needs a length and rows by number); "
                "pass a datasets.Dataset or a torch Dataset, or use StreamingBlocks, which adds the epoch itself"
            )
        assert len(base) <= EPOCH_STRIDE, "more rows than an index has room for"
        self.base = base

    @classmethod
    def wrap(cls, dataset: Any) -> EpochDataset:  # noqa: ANN401
        """Return ``dataset`` itself if it is an ``EpochDataset`` already, else wrap it."""
        return dataset if isinstance(dataset, cls) else cls(dataset)

    def __len__(self) -> int:
        """Return the number of rows, that is the examples of one epoch."""
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``{**base[row], "example_id": row, "epoch": epoch}``, with ``place`` if the index has one.

        Raises:
            IndexError: If the index is negative or its row is not below the length.
        """
        keys = self._locate(index)
        return {**self.base[keys["example_id"]], **keys}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch of indices, read in one call where the base dataset can."""
        keys = [self._locate(index) for index in indices]
        rows = [key["example_id"] for key in keys]
        read_many = getattr(self.base, "__getitems__", None)
        examples = read_many(rows) if read_many is not None else [self.base[row] for row in rows]
        return [{**example, **key} for example, key in zip(examples, keys, strict=True)]

    def __repr__(self) -> str:
        """Show the wrapped dataset."""
        return f"{type(self).__name__}({self.base!r})"

    def _locate(self, index: int) -> dict[str, int]:
        place, rest = divmod(operator.index(index), PLACE_STRIDE)
        epoch, row = divmod(rest, EPOCH_STRIDE)
        if place < 0 or row >= len(self.base):
            raise IndexError(
                f"index {index} (epoch {epoch}, row {row}) is out of range for a dataset of {len(self.base)} examples"
            )
        keys = {"example_id": row, "epoch": epoch}
        return keys | {"place": place - 1} if place else keys


class EpochSampler(Sampler[int]):
    """Yields each example of an epoch once, as indices of an :class:`EpochDataset` that hold epoch and place.

    The order is ``draws.permutation(num_examples, seed=seed, epoch=epoch)``: the same on every rank and after any
    resume. accelerate's loaders reach ``set_epoch`` by themselves; a bare ``DataLoader`` needs the call before each
    epoch.

    Args:
        num_examples: Examples in the dataset.
        seed: Seed of the run.
        shuffle: Whether to permute; if not, rows come in order.

    Raises:
        InputError: If there are no examples.
    """

    def __init__(self, num_examples: int, *, seed: int, shuffle: bool = True) -> None:
        if not 0 < num_examples <= EPOCH_STRIDE:
            raise InputError(f"num_examples={num_examples} must be positive: the dataset holds no example to sample")
        self.num_examples = num_examples
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must not be negative")
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of indices that an epoch yields."""
        return self.num_examples

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the current epoch."""
        # The epoch is read here, not inside the loop: a loader may call set_epoch while an epoch is still being
        # drained.
        return self._indices(self.epoch)

    def _indices(self, epoch: int) -> Iterator[int]:
        if self.shuffle:
            rows = draws.permutation(self.num_examples, seed=self.seed, epoch=epoch)
        else:
            rows = np.arange(self.num_examples)
        for begin in range(0, self.num_examples, _YIELD_CHUNK):  # Python integers of one chunk at a time
            indices = (rows[begin : begin + _YIELD_CHUNK] + epoch * EPOCH_STRIDE).tolist()
            for place, index in enumerate(indices, begin + 1):
                yield place * PLACE_STRIDE + index


class FilledSampler(Sampler[int]):
    """Yields the indices of another sampler, then marked ones until their number is a multiple of the global micro-batch.

    Processes take turns with batches, and each needs as many as the others. accelerate would fill the last turn with examples
    of the epoch's beginning, which would then be trained on twice. A marked index is ``-1 - index`` of such an example;
    :class:`FilledDataset` reads it as what it is.

    Args:
        sampler: Yields the indices of an epoch, none below zero.
        multiple: Examples of a micro-batch over all processes.
    """

    def __init__(self, sampler: Sampler[int], *, multiple: int) -> None:
        self.sampler = sampler
        self.multiple = multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of indices that an epoch yields, marked ones included."""
        return -(-len(cast(Sized, self.sampler)) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the current epoch."""
        count, first = 0, 0
        for index in self.sampler:
            first = index if count == 0 else first
            count += 1
            yield index
        for _ in range(-count % self.multiple):
            yield -1 - first


class FilledDataset(Dataset[dict[str, Any]]):
    """The examples of a dataset by the indices of a :class:`FilledSampler`: marked ones are left out of their batch.

    A batch of marked indices alone becomes one example with the entry ``is_filler``, because a process cannot train on none.

    Args:
        base: The dataset, map-style.
    """

    def __init__(self, base: Any) -> None:  # noqa: ANN401 (as of EpochDataset)
        self.base = base

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.base)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch of indices, or one that does not count."""
        real = [index for index in indices if index >= 0]
        if not real:
            return [self[indices[0]]]
        read_many = getattr(self.base, "__getitems__", None)
        return [self.base[index] for index in real] if read_many is None else read_many(real)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of an index; that of a marked one has the entry ``is_filler``."""
        return self.base[index] if index >= 0 else {**self.base[-1 - index], FILLER: True}


class CollatorOfFilled:
    """Collates the examples of a :class:`FilledDataset`; a batch that does not count has the entry ``is_filler`` too.

    Args:
        collate: Makes a batch of examples.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some examples."""
        if FILLER not in examples[0]:
            return self.collate(list(examples))
        rows = [{name: value for name, value in example.items() if name != FILLER} for example in examples]
        return {**self.collate(rows), FILLER: torch.tensor(True)}
