"""Several datasets as one, in fixed shares: languages, or kinds of examples for several objectives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_pretrain.data import draws
from hf_pretrain.data.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.errors import InputError

# Groups of a part are counted at every so many groups; in between they are counted when asked for.
_COUNTED = 256
# What is drawn for an epoch is kept for so many, because an epoch begins before the last one is drained.
_KEPT_EPOCHS = 2


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
    """What an index of the mixture stands for: the number of a part, the part's own index, and what it is keyed by."""

    part: int
    row: int
    keys: dict[str, int]


class MixtureDataset(EpochDataset):
    """Examples of several datasets, each in its share of every epoch; to be read in order, without shuffling.

    Each group of ``group_size`` examples in a row is of one part: a group of one mixes parts within a batch, a group of
    the global batch (all devices and accumulation steps) makes steps of one part, the same on all ranks. An epoch has
    the same number of groups of a part as any other, in a keyed order. A part is read in keyed orders of its own, epoch
    after epoch: none of its examples comes again before all have come, however often it is asked for.

    An example's ``epoch`` is that of its part, so a second reading within one epoch of the mixture is drawn anew. Its
    ``example_id`` is that of its part plus an offset, so that the draws of two parts are independent. ``order_epoch`` is
    the epoch of the mixture, in the order of which it has its ``place``.

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
            places = [place for place, draw in enumerate(drawn) if draw.part == number]
            found = part.__getitems__([drawn[place].row for place in places]) if places else []
            for place, example in zip(places, found, strict=True):
                own_id = {"example_id": self._id_offsets[number] + example["example_id"]}
                examples[place] = {**example, **own_id, **drawn[place].keys}
        return examples

    def _draw(self, index: int) -> _Draw:
        keys = self._locate(index)
        row, epoch = keys.pop("example_id"), keys.pop("epoch")
        group, inside = divmod(row, self.group_size)
        order = self._recent("", epoch, self._order)
        number, rank = order.find(group)
        # The place of this example among all that are ever drawn of its part.
        drawn = (epoch * int(self._groups[number]) + rank) * self.group_size + inside
        name, part = list(self.parts.items())[number]
        part_epoch, place = divmod(drawn, len(part))
        if not getattr(part, "in_order", False):
            rows = self._recent(f"rows of {name}", part_epoch, lambda epoch: self._rows(name, epoch))
            place = int(rows[place])
        if keys:
            keys["order_epoch"] = epoch
        return _Draw(number, part_epoch * EPOCH_STRIDE + place, keys)

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
        """Return what is drawn for an epoch, drawn once as long as it is one of the last."""
        known = self._drawn.setdefault(kind, {})
        if epoch not in known:
            if len(known) == _KEPT_EPOCHS:
                del known[next(iter(known))]
            known[epoch] = draw(epoch)
        return known[epoch]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what can be drawn again."""
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
        total: What is divided.
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
    if not 0 <= alpha <= 1:
        raise InputError(
            f"language_sampling_alpha={alpha} must be from 0 (all equal) to 1 (as they are); 0.5 is usual"
        )
    total = sum(counts.values())
    powers = {name: (count / total) ** alpha for name, count in counts.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def _check(parts: Mapping[str, Any], shares: Mapping[str, float], group_size: int, num_examples: int | None) -> None:
    if not parts:
        raise InputError("parts={} holds no dataset to mix: give at least one")
    if parts.keys() != shares.keys():
        raise InputError(f"parts are {', '.join(parts)}, but shares are for {', '.join(shares)}: give one for each")
    for name, part in parts.items():
        if not shares[name] > 0 or shares[name] == float("inf"):
            raise InputError(f"shares[{name!r}]={shares[name]} must be a positive number; leave the part out for none")
        if hasattr(part, "__len__") and not len(part):
            raise InputError(f"parts[{name!r}] holds no example: leave it out")
    for option, value in (("group_size", group_size), ("num_examples", num_examples)):
        if value is not None and value < 1:
            raise InputError(f"{option}={value} must be positive")
