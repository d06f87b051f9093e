"""How the shards of a stream are dealt out to those who read it, and how far each of them has come.

The text is one endless list: all shards in the order of epoch 0, all in the order of epoch 1, and so on. A reader, called a
lane, is a data loader's worker on one of the processes. The list is dealt out in rounds: of L items in a row, each of L lanes
gets one, beginning with another lane in each round, by a keyed draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from hf_pretrain.data import draws


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
