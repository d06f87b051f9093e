"""A stream that training takes: shared out among readers, without end, and taken up again anywhere."""

import itertools
from collections import Counter

import datasets
import pytest
from torch.utils.data import DataLoader

from helpers.sharded_text import PATHS, Source, as_list, make_stream, rows
from hf_pretrain.data.streaming import blocks as stream_progress
from hf_pretrain.data.streaming.blocks import ShardSampler, Stop, StreamProgress, TrainingStream
from hf_pretrain.data.streaming.blocks import StreamPosition as At
from hf_pretrain.errors import InputError


def key(example):
    return example["epoch"], example["example_id"], tuple(example["input_ids"].tolist())


class Run:
    """What the processes of a run get, micro-batch after micro-batch."""

    def __init__(self, stream, *, world_size=1, workers=0, batch_size=3, progress=None):
        self.streams = [
            TrainingStream(stream, rank=rank, world_size=world_size, progress=progress) for rank in range(world_size)
        ]
        self.world_size = world_size
        self.dealt = self.streams[0].dealt(workers)
        self.loaders = [
            iter(DataLoader(part, batch_size=batch_size, num_workers=workers, collate_fn=as_list))
            for part in self.streams
        ]
        self.stops, self.rounds = {}, 0

    def take(self, rounds):
        """The micro-batches of some rounds of all processes."""
        batches = []
        for _ in range(rounds):
            for loader in self.loaders:
                batch = next(loader)
                reader, stop = batch[-1]["progress"]
                assert {example["progress"][0] for example in batch} == {reader}
                self.stops[reader] = stop
                batches.append([key(example) for example in batch])
            self.rounds += 1
        return batches

    def progress(self):
        """What a checkpoint would hold, after a trip through JSON."""
        dealt = self.dealt
        progress = StreamProgress(
            dealt.num_readers,
            num_batches=dealt.num_batches + self.rounds * self.world_size,
            pending=dealt.pending,
            tail=dealt.tail,
            stops={**(dealt.stops or {}), **self.stops},
        )
        return StreamProgress.from_json(progress.to_json())


def all_examples(stream, epochs):
    found = []
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        found += [key(example) for example in stream]
    return found


@pytest.mark.parametrize("shuffle", [0, 7])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_it_goes_on_exactly_where_it_was_left(world_size, workers, shuffle):
    stream = make_stream(shuffle_buffer_size=shuffle)
    readers = {"world_size": world_size, "workers": workers}
    straight = Run(stream, **readers).take(40)
    for rounds in (5,) if workers else (1, 2, 13):
        first = Run(stream, **readers)
        seen = first.take(rounds)
        second = Run(stream, **readers, progress=first.progress())
        seen += second.take(rounds)
        third = Run(stream, **readers, progress=second.progress())
        assert seen + third.take(40 - 2 * rounds) == straight


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_every_example_comes_once_an_epoch(world_size, workers):
    """Lanes end their epochs at different times: after many rounds nothing is missing, and nothing has come twice."""
    stream = make_stream(shuffle_buffer_size=5)
    run = Run(stream, world_size=world_size, workers=workers, batch_size=2)
    seen = Counter(itertools.chain.from_iterable(run.take(60)))
    expected = all_examples(stream, 1)
    assert set(seen.values()) == {1}
    assert set(expected) <= set(seen)


@pytest.mark.parametrize("before", [(1, 0), (2, 0)])
@pytest.mark.parametrize("after", [(1, 0), (3, 0), (2, 2)])
def test_other_processes_go_on_without_a_loss_or_a_repeat(before, after):
    """Twice with other numbers of readers, from the middle of windows and shards."""
    stream = make_stream(shuffle_buffer_size=7)
    seen = Counter()
    progress = None
    for (world_size, workers), rounds in ((before, 4), (after, 3), (before, 60)):
        run = Run(stream, world_size=world_size, workers=workers, batch_size=2, progress=progress)
        seen.update(itertools.chain.from_iterable(run.take(rounds)))
        progress = run.progress()
    assert set(seen.values()) == {1}
    assert set(all_examples(stream, 1)) <= set(seen)


def test_two_ranks_and_two_workers_read_the_same():
    """Micro-batch m is of reader m modulo the readers, whoever reads it."""
    stream = make_stream(shuffle_buffer_size=7)
    runs = [Run(stream, world_size=w, workers=n).take(24 // w) for w, n in ((1, 2), (2, 0))]
    assert runs[0] == runs[1]


def test_resuming_reads_no_shard_that_is_done():
    opened = []

    class Watched(Source):
        def read(self, shard, *, start=0, epoch=0):
            opened.append((shard, start))
            return super().read(shard, start=start, epoch=epoch)

    stream = make_stream(Watched(PATHS[:3]))
    run = Run(stream)
    run.take(15)
    place = run.progress().stops[0].position
    assert (place.number, place.start) > (0, 0)
    opened.clear()
    Run(stream, progress=run.progress()).take(1)
    assert opened == [(place.number, place.start)]


def test_a_streamed_dataset_goes_on_too():
    source = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": PATHS})
    stream = make_stream(source, text_column="body", shuffle_buffer_size=7)
    run = Run(stream)
    seen = run.take(9)
    assert seen + Run(stream, progress=run.progress()).take(9) == Run(stream).take(18)


def test_text_without_a_token_ends_with_an_error():
    stream = make_stream(Source(PATHS[3:]))
    with pytest.raises(InputError, match="no text in"):
        next(iter(TrainingStream(stream)))


def test_each_epoch_has_every_shard_once_in_an_order_of_its_own():
    sampler = ShardSampler(7, seed=1)
    orders = [[sampler.locate(epoch * 7 + place) for place in range(7)] for epoch in range(3)]
    for epoch, order in enumerate(orders):
        assert {e for e, _ in order} == {epoch}
        assert sorted(shard for _, shard in order) == list(range(7))
    assert len({tuple(shard for _, shard in order) for order in orders}) == 3
    assert ShardSampler(7, seed=2).order(0) != sampler.order(0) == ShardSampler(7, seed=1).order(0)
    assert ShardSampler(7, seed=1, shuffle=False).order(5) == list(range(7))


@pytest.fixture
def unturned(monkeypatch):
    """Item n is of reader n modulo the readers."""
    monkeypatch.setattr(stream_progress, "first_reader", lambda round_number, num_readers: 0)


def test_every_item_has_one_lane():
    progress = StreamProgress(3)
    dealt = {reader: [stop.item for stop in itertools.islice(progress.items(reader), 8)] for reader in range(3)}
    assert sorted(itertools.chain.from_iterable(dealt.values())) == list(range(24))
    assert all(progress.owner(item) == reader for reader, items in dealt.items() for item in items)
    assert any({item % 3 for item in items} == {0, 1, 2} for items in dealt.values()), "the rounds are not turned"


def test_what_nobody_finished_is_dealt_out_anew(unturned):
    """By hand: three readers, the second is far ahead, the third has not begun."""
    stops = {0: Stop(0, At(0, 40, 9, 2)), 1: Stop(7, At(7, 1, 1, 1))}
    progress = StreamProgress(3, num_batches=5, stops=stops)
    assert progress.among(3) is progress
    other = progress.among(2)
    # Of the items up to 7: the first is open, the second and the fifth are done.
    assert other.pending == (
        At(0, 40, 9, 2),
        At(2),
        At(3),
        At(5),
        At(6),
        At(7, 1, 1, 1),
    )
    assert (other.tail, other.num_batches, other.stops) == (8, 0, None)
    assert [stop.position for stop in itertools.islice(other.items(1), 4)] == [
        At(2),
        At(5),
        At(7, 1, 1, 1),
        At(9),
    ]


def test_places_that_are_left_over_survive_another_dealing(unturned):
    first = StreamProgress(
        2,
        pending=(At(5, 3), At(8), At(9), At(11)),
        tail=20,
        stops={0: Stop(2, At(9, 7))},
    )
    other = first.among(1)
    assert other.pending == (At(8), At(9, 7), At(11))
    assert other.tail == 20
