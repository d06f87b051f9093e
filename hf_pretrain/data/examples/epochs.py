"""Examples that know their epoch: it travels inside the index, so it reaches workers and survives resume.

So does an example's index in the order of its epoch: masking rates that change in training depend on it.

Several datasets as one, in fixed shares: languages, or kinds of examples for several objectives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_range

EPOCH_STRIDE = 1 << 40
"""Index = epoch * EPOCH_STRIDE + row: room for 2**40 rows and 2**23 epochs in a signed 64-bit integer."""

ORDER_STRIDE = 1 << 64
"""A sampler that knows the order adds (order_index + 1) * ORDER_STRIDE; Python's integers have no bound."""

FILLER = "is_filler"
"""Entry of a batch that only keeps a process in step with the others: nothing of it may count."""

_YIELD_CHUNK = 1 << 16


# Groups of a part are counted in advance at every so many groups, and in between when an index is read.
_COUNTED = 256
# The draws of so many epochs are kept, because an epoch begins before the last one is drained.
_KEPT_EPOCHS = 2


class EpochDataset(Dataset[dict[str, Any]]):
    """A map-style dataset whose examples carry ``example_id`` and ``epoch``, the keys of every random draw.

    Index ``epoch * EPOCH_STRIDE + row`` is the example of that row in that epoch. A plain index below the length is
    the row in epoch 0, so the dataset can also be used with any stock sampler. The indices of :class:`EpochSampler`
    also say the example's ``order_index``, its index in the order of the epoch; the examples have it as an entry.

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

    @property
    def in_order(self) -> bool:
        """Whether samplers must not shuffle: the windows of lanes are read in the order of time."""
        return hasattr(self.base, "num_lanes")

    def __len__(self) -> int:
        """Return the number of rows, that is the examples of one epoch."""
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``{**base[row], "example_id": row, "epoch": epoch}``, with ``order_index`` if the index has one.

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
        order, rest = divmod(operator.index(index), ORDER_STRIDE)
        epoch, row = divmod(rest, EPOCH_STRIDE)
        if order < 0 or row >= len(self.base):
            raise IndexError(
                f"index {index} (epoch {epoch}, row {row}) is out of range for a dataset of {len(self.base)} examples"
            )
        keys = {"example_id": row, "epoch": epoch}
        return keys | {"order_index": order - 1} if order else keys


class ExampleView(EpochDataset):
    """The examples of an `EpochDataset`, each changed by the `view` of the subclass."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of an index, which may carry its epoch and its index in the order."""
        return self.view(self.base[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch of indices."""
        return [self.view(example) for example in self.base.__getitems__(indices)]

    def view(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return an example as this dataset has it."""
        return example


class DrawnDataset(EpochDataset):
    """Examples that are drawn anew in every epoch: there are no rows to wrap, so a subclass reads an index by itself."""

    def __init__(self) -> None:
        self.base = self

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch of indices."""
        return [self[index] for index in indices]


class EpochSampler(Sampler[int]):
    """Yields each example of an epoch once, as indices of an `EpochDataset` that hold the epoch and the order.

    The order is ``draws.permutation(num_examples, seed=seed, epoch=epoch)``: the same on every rank and after any
    resume. accelerate's loaders reach ``set_epoch`` by themselves; a bare ``DataLoader`` needs the call before each
    epoch.

    Args:
        num_examples: Examples in the dataset.
        seed: Seed of the run.
        shuffle: Whether to permute; if not, rows come in order.

    Attributes:
        first_epoch: Number of the epoch that `set_epoch(0)` chooses; the phases of a run have different ones.

    Raises:
        InputError: If there are no examples.
    """

    def __init__(self, num_examples: int, *, seed: int, shuffle: bool = True) -> None:
        if not 0 < num_examples <= EPOCH_STRIDE:
            raise InputError(f"num_examples={num_examples} must be positive: the dataset holds no example to sample")
        self.num_examples = num_examples
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = self.first_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must not be negative")
        self.epoch = self.first_epoch + epoch

    def begin_at(self, first_epoch: int) -> None:
        """Number the epochs from another one on."""
        self.epoch = self.first_epoch = first_epoch

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
            for order, index in enumerate(indices, begin + 1):
                yield order * ORDER_STRIDE + index


class FilledSampler(Sampler[int]):
    """Yields the indices of another sampler, then marked ones until their number is a multiple of the global micro-batch.

    Processes take turns with batches, and each needs as many as the others. accelerate would fill the last turn with examples
    of the epoch's beginning, which would then be trained on twice. A marked index is ``-1 - index`` of such an example;
    :class:`FilledDataset` knows it by its sign.

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


def without_filler(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of :class:`CollatorOfFilled` without its mark."""
    return {name: value for name, value in batch.items() if name != FILLER}


def fill_of(dataset: Any) -> float | None:  # noqa: ANN401 (as of EpochDataset)
    """Return which share of the longest length that an example may have it fills on average, special tokens included.

    Args:
        dataset: Examples, or views of them.

    Returns:
        The mean over the examples of an epoch; None of datasets that do not know their lengths.
    """
    if isinstance(dataset, MixtureDataset):
        fills = {name: fill_of(part) for name, part in dataset.parts.items()}
        counts = dataset.counts
        known = [fill * counts[name] for name, fill in fills.items() if fill is not None]
        return sum(known) / sum(counts.values()) if len(known) == len(fills) else None
    fill = getattr(dataset, "fill", None)
    base = getattr(dataset, "base", dataset)
    return fill if fill is not None or base is dataset else fill_of(base)


class _Order(NamedTuple):
    """Which part each group of an epoch belongs to: parts ``[G]``; and counts ``[G / 256, P]`` of the groups before."""

    parts: np.ndarray
    counts: np.ndarray

    def find(self, group: int) -> tuple[int, int]:
        """Return the part of a group, and how many groups of that part come before it."""
        block, part = group // _COUNTED, self.parts[group]
        inside = np.count_nonzero(self.parts[block * _COUNTED : group] == part)
        return int(part), int(self.counts[block, part]) + int(inside)


class _Draw(NamedTuple):
    """The example behind an index of the mixture: the number of a part, the part's own index, and further entries."""

    part: int
    row: int
    keys: dict[str, int]


class MixtureDataset(EpochDataset):
    """Examples of several datasets, each in its share of every epoch; to be read in order, without shuffling.

    Each group of ``group_size`` examples in a row is of one part: a group of one mixes parts within a batch, a group of
    the global batch (all devices and accumulation steps) makes steps of one part, the same on all ranks. An epoch has
    the same number of groups of a part as any other, in a keyed order. A part is read in keyed orders of its own, epoch
    after epoch: none of its examples comes again before all have come, however often the part is drawn.

    An example's ``epoch`` is that of its part, so a second reading within one epoch of the mixture is drawn anew. Its
    ``example_id`` is that of its part plus an offset, so that the draws of two parts are independent. ``order_epoch`` is
    the epoch of the mixture, in whose order it has its ``order_index``.

    Args:
        parts: The datasets by name, map-style; one that is to be read in order itself, such as a mixture, is.
        shares: How often each is drawn, by the same names; the sum need not be 1.
        group_size: Examples in a row that are of one part.
        seed: Seed of the run.
        num_examples: Length of an epoch, rounded up to whole groups; by default the sum of the lengths of the parts.

    Raises:
        InputError: If names differ, a share is not positive, a part is empty, or an epoch has no group of some part.
    """

    in_order = True
    """Whether samplers must not shuffle."""

    def __init__(
        self,
        parts: Mapping[str, Any],
        *,
        shares: Mapping[str, float],
        group_size: int = 1,
        seed: int = 0,
        num_examples: int | None = None,
    ) -> None:
        _check(parts, shares, group_size, num_examples)
        self.parts = {name: EpochDataset.wrap(part) for name, part in parts.items()}
        lengths = [len(part) for part in self.parts.values()]
        num_groups = -(-(sum(lengths) if num_examples is None else num_examples) // group_size)
        weights = np.array([shares[name] for name in self.parts], dtype=np.float64)
        self._groups = apportion(num_groups, weights)
        """Groups of each part in an epoch: ``int64 [P]``."""
        if not self._groups.all():
            name = list(self.parts)[int(np.argmin(self._groups))]
            raise InputError(
                f"an epoch of {num_groups} groups of {group_size} examples has none for {name!r} with its share of "
                f"{shares[name] / weights.sum():.3g}: give more text or a greater share, or mix by examples"
            )
        self.group_size = group_size
        self.seed = seed
        spans = [num_example_ids(part) for part in self.parts.values()]
        self._id_offsets = np.cumsum([0, *spans]).tolist()
        self._drawn: dict[Hashable, dict[int, Any]] = {}
        # What an index stands for changes with the epoch, so there are no rows to wrap.
        self.base = self

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""
        return int(self._groups.sum()) * self.group_size

    @property
    def num_example_ids(self) -> int:
        """Ids that examples may have: from 0 to one less."""
        return int(self._id_offsets[-1])

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each part in an epoch."""
        return {name: int(groups) * self.group_size for name, groups in zip(self.parts, self._groups, strict=True)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of an index, which may carry its epoch."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch of indices; each part is read in one call."""
        drawn = [self._draw(index) for index in indices]
        examples: list[dict[str, Any]] = [{}] * len(drawn)
        for number, part in enumerate(self.parts.values()):
            slots = [slot for slot, draw in enumerate(drawn) if draw.part == number]
            found = part.__getitems__([drawn[slot].row for slot in slots]) if slots else []
            for slot, example in zip(slots, found, strict=True):
                own_id = {"example_id": self._id_offsets[number] + example["example_id"]}
                examples[slot] = {**example, **own_id, **drawn[slot].keys}
        return examples

    def _draw(self, index: int) -> _Draw:
        keys = self._locate(index)
        row, epoch = keys.pop("example_id"), keys.pop("epoch")
        group, inside = divmod(row, self.group_size)
        order = self._recent("", epoch, self._order)
        number, rank = order.find(group)
        # How many examples of its part are drawn before this one, over all epochs.
        drawn = (epoch * int(self._groups[number]) + rank) * self.group_size + inside
        name, part = list(self.parts.items())[number]
        part_epoch, own_row = divmod(drawn, len(part))
        if not getattr(part, "in_order", False):
            rows = self._recent(f"rows of {name}", part_epoch, lambda epoch: self._rows(name, epoch))
            own_row = int(rows[own_row])
        if keys:
            keys["order_epoch"] = epoch
        return _Draw(number, part_epoch * EPOCH_STRIDE + own_row, keys)

    def _order(self, epoch: int) -> _Order:
        num_parts = len(self.parts)
        parts = np.repeat(np.arange(num_parts, dtype=np.int16), self._groups)
        parts = parts[draws.permutation(len(parts), seed=self.seed, epoch=epoch, stream=f"mixture {list(self.parts)}")]
        blocks = np.arange(len(parts)) // _COUNTED
        counts = np.bincount(blocks * num_parts + parts, minlength=(int(blocks[-1]) + 1) * num_parts)
        counts = counts.reshape(-1, num_parts)
        return _Order(parts, np.cumsum(counts, axis=0) - counts)

    def _rows(self, name: str, epoch: int) -> np.ndarray:
        return draws.permutation(len(self.parts[name]), seed=self.seed, epoch=epoch, stream=f"rows of {name}")

    def _recent(self, kind: Hashable, epoch: int, draw: Callable[[int], Any]) -> Any:
        """Return the draws of an epoch, which are kept while it is one of the last."""
        known = self._drawn.setdefault(kind, {})
        if epoch not in known:
            if len(known) == _KEPT_EPOCHS:
                del known[next(iter(known))]
            known[epoch] = draw(epoch)
        return known[epoch]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the draws, which can be made again."""
        return self.__dict__ | {"_drawn": {}}

    def __repr__(self) -> str:
        """Show the parts and their counts."""
        counts = ", ".join(f"{name}: {count} of {len(self.parts[name])}" for name, count in self.counts.items())
        return f"{type(self).__name__}({counts}, group_size={self.group_size})"


def num_example_ids(dataset: EpochDataset) -> int:
    """Return how many ids the examples of a dataset may have; a mixture may have more ids than an epoch has examples."""
    return int(getattr(dataset, "num_example_ids", len(dataset)))


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Divide a number by weights into whole numbers, by the largest remainders.

    Args:
        total: The number to divide.
        weights: Not negative, ``[P]``.

    Returns:
        ``int64 [P]`` with the sum ``total``, each less than one away from its exact share; of equal remainders the
        first is rounded up.
    """
    quotas = total * weights / weights.sum()
    counts = np.floor(quotas).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:missing]] += 1
    return counts


def language_shares(counts: Mapping[str, int], *, alpha: float) -> dict[str, float]:
    r"""Return how often each language is sampled: proportionally to :math:`p^\alpha`, where p is its share of the text.

    Args:
        counts: How much there is of each language, in any unit.
        alpha: 1 for the shares as they are, 0 for equal ones.

    Returns:
        Shares by language, which add up to 1.

    Raises:
        InputError: If alpha is not in ``[0, 1]``.

    Source:
        Conneau and Lample, "Cross-lingual Language Model Pretraining" (2019), section 3.1.
    """
    check_range(alpha, "[0, 1]", name="language_sampling_alpha", hint="0.5 is usual")
    total = sum(counts.values())
    powers = {name: (count / total) ** alpha for name, count in counts.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def _check(parts: Mapping[str, Any], shares: Mapping[str, float], group_size: int, num_examples: int | None) -> None:
    if not parts:
        raise InputError("parts={} holds no dataset to mix: give at least one")
    if parts.keys() != shares.keys():
        raise InputError(f"parts are {', '.join(parts)}, but shares are for {', '.join(shares)}: give one for each")
    for name, part in parts.items():
        check_range(shares[name], "(0, inf)", name=f"shares[{name!r}]", hint="leave the part out for none")
        if hasattr(part, "__len__") and not len(part):
            raise InputError(f"parts[{name!r}] holds no example: leave it out")
    for option, value in (("group_size", group_size), ("num_examples", num_examples)):
        if value is not None:
            check_range(value, "[1, inf)", name=option)
