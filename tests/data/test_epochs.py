import pickle

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from hf_pretrain.data import draws
from hf_pretrain.data.examples.epochs import (
    EPOCH_STRIDE,
    FILLER,
    ORDER_STRIDE,
    CollatorOfFilled,
    EpochDataset,
    EpochSampler,
    FilledDataset,
    FilledSampler,
)
from hf_pretrain.errors import InputError

NUM_ROWS = 23
SEED = 7


class Rows(torch.utils.data.Dataset):
    """A torch dataset without ``__getitems__``."""

    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, row):
        return {"value": 10 * row}


class CountingRows(Rows):
    """A torch dataset with ``__getitems__`` that records how it is read."""

    def __init__(self):
        self.calls = []

    def __getitems__(self, rows):
        self.calls.append(list(rows))
        return [{"value": 10 * row} for row in rows]


def as_list(examples):
    return examples


def order_of(epoch, num_rows=NUM_ROWS):
    return draws.permutation(num_rows, seed=SEED, epoch=epoch).tolist()


def loader_for(base, *, workers=0, batch_size=4, persistent=False):
    sampler = EpochSampler(len(base), seed=SEED)
    return DataLoader(
        EpochDataset.wrap(base),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=as_list,
        num_workers=workers,
        persistent_workers=persistent,
    )


def keys(batches):
    return [(example["epoch"], example["example_id"]) for batch in batches for example in batch]


def index_of(place, row, *, epoch=0):
    return (place + 1) * ORDER_STRIDE + epoch * EPOCH_STRIDE + row


@pytest.mark.parametrize("base", [Rows(), CountingRows(), Dataset.from_dict({"value": list(range(0, 230, 10))})])
def test_example_carries_row_and_epoch(base):
    dataset = EpochDataset(base)
    assert len(dataset) == NUM_ROWS
    assert dataset[3] == {"value": 30, "example_id": 3, "epoch": 0}
    assert dataset[np.int64(5 * EPOCH_STRIDE + 22)] == {"value": 220, "example_id": 22, "epoch": 5}
    mixed = dataset.__getitems__([4, EPOCH_STRIDE + 4, 2 * EPOCH_STRIDE])
    assert mixed == [
        {"value": 40, "example_id": 4, "epoch": 0},
        {"value": 40, "example_id": 4, "epoch": 1},
        {"value": 0, "example_id": 0, "epoch": 2},
    ]


def test_batches_are_read_in_one_call_with_plain_rows():
    base = CountingRows()
    EpochDataset(base).__getitems__([9 * EPOCH_STRIDE + 1, 9 * EPOCH_STRIDE + 8])
    assert base.calls == [[1, 8]]


@pytest.mark.parametrize("index", [-1, NUM_ROWS, EPOCH_STRIDE + NUM_ROWS, EPOCH_STRIDE - 1, -EPOCH_STRIDE])
def test_index_out_of_range(index):
    dataset = EpochDataset(Rows())
    with pytest.raises(IndexError, match=str(index)):
        dataset[index]
    with pytest.raises(IndexError):
        dataset.__getitems__([0, index])


def test_plain_iteration_is_epoch_zero_and_ends():
    assert [example["example_id"] for example in EpochDataset(Rows())] == list(range(NUM_ROWS))


def test_base_example_is_not_changed():
    row = {"value": 1}
    EpochDataset([row])[EPOCH_STRIDE]
    assert row == {"value": 1}


def test_wrap_does_not_wrap_twice():
    dataset = EpochDataset.wrap(Rows())
    assert EpochDataset.wrap(dataset) is dataset


class Stream(IterableDataset):
    def __iter__(self):
        yield {"value": 1}


@pytest.mark.parametrize("base", [Stream(), iter([1]), Dataset.from_dict({"a": [1]}).to_iterable_dataset()])
def test_streams_are_refused(base):
    with pytest.raises(InputError, match="StreamingBlocks"):
        EpochDataset(base)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_epoch_reaches_workers(workers, persistent):
    if persistent and not workers:
        persistent = False
    loader = loader_for(Rows(), workers=workers, persistent=persistent)
    for epoch in (0, 1, 6):
        loader.sampler.set_epoch(epoch)
        assert keys(loader) == [(epoch, row) for row in order_of(epoch)]
    assert order_of(0) != order_of(1)


def test_sampler_order_is_keyed_and_not_shuffled_on_request():
    assert list(EpochSampler(5, seed=0, shuffle=False)) == [index_of(row, row) for row in range(5)]
    sampler = EpochSampler(5, seed=0, shuffle=False)
    sampler.set_epoch(2)
    assert list(sampler) == [index_of(row, row, epoch=2) for row in range(5)]
    assert len(sampler) == 5
    assert list(EpochSampler(50, seed=0)) == list(EpochSampler(50, seed=0))
    assert list(EpochSampler(50, seed=0)) != list(EpochSampler(50, seed=1))


def test_sampler_yields_every_row_once_beyond_one_chunk():
    sampler = EpochSampler((1 << 16) + 3, seed=SEED)
    sampler.set_epoch(1)
    indices = list(sampler)
    assert all(type(index) is int for index in indices)
    order = order_of(1, (1 << 16) + 3)
    assert indices == [index_of(place, row, epoch=1) for place, row in enumerate(order)]


def test_set_epoch_while_iterating_does_not_mix_epochs():
    sampler = EpochSampler(10, seed=SEED)
    indices = iter(sampler)
    sampler.set_epoch(3)
    assert [index % ORDER_STRIDE // EPOCH_STRIDE for index in indices] == [0] * 10


def test_sampler_refuses_nothing_to_sample():
    with pytest.raises(InputError, match="num_examples=0"):
        EpochSampler(0, seed=SEED)
    with pytest.raises(ValueError, match="epoch=-1"):
        EpochSampler(1, seed=SEED).set_epoch(-1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_place_in_the_epochs_order_reaches_every_rank_and_worker(workers, num_processes):
    places = {}
    for rank in range(num_processes):
        loader = prepare_data_loader(
            loader_for(CountingRows(), workers=workers), num_processes=num_processes, process_index=rank
        )
        loader.set_epoch(3)
        for batch in skip_first_batches(loader, 1):
            places |= {example["example_id"]: example["order_index"] for example in batch}
    order = order_of(3)
    seen = order[4 * num_processes :]
    assert {row: places[row] for row in seen} == {row: order.index(row) for row in seen}
    # What fills the last step are examples of the epoch's start, with the places that they have there.
    assert all(place == order.index(row) for row, place in places.items())


def test_an_example_read_by_its_row_has_no_place():
    dataset = EpochDataset(Rows())
    assert "order_index" not in dataset[EPOCH_STRIDE + 3]
    assert dataset[index_of(9, 3, epoch=1)] == {"value": 30, "example_id": 3, "epoch": 1, "order_index": 9}
    first, second = dataset.__getitems__([index_of(0, 4), 4])
    assert first == {**second, "order_index": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate_ranks_share_an_epoch(workers):
    """Two ranks: set_epoch reaches the sampler, the ranks together see every row, in the order of one process."""
    num_rows, batch_size = 24, 4
    ranks = []
    for rank in range(2):
        base = Dataset.from_dict({"value": list(range(num_rows))})
        loader = prepare_data_loader(loader_for(base, workers=workers), num_processes=2, process_index=rank)
        loader.set_epoch(2)
        ranks.append([keys([batch]) for batch in loader])
    merged = [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch]
    assert all(len(batch) == batch_size for batch in ranks[0])
    assert merged == [(2, row) for row in order_of(2, num_rows)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_accelerate_advances_the_epoch_by_itself(num_processes):
    loader = prepare_data_loader(loader_for(Rows()), num_processes=num_processes, process_index=0)
    epochs = [{epoch for epoch, _ in keys(loader)} for _ in range(3)]
    assert epochs == [{0}, {1}, {2}]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_skipping_batches_leaves_the_rest_of_the_same_epoch(num_processes):
    loader = prepare_data_loader(loader_for(Rows()), num_processes=num_processes, process_index=num_processes - 1)
    loader.set_epoch(3)
    whole = list(loader)
    again = prepare_data_loader(loader_for(Rows()), num_processes=num_processes, process_index=num_processes - 1)
    again.set_epoch(3)
    rest = list(skip_first_batches(again, 1))
    assert rest == whole[1:]
    assert {epoch for epoch, _ in keys(rest)} == {3}


def test_batch_sampler_and_pickle():
    sampler = pickle.loads(pickle.dumps(EpochSampler(6, seed=SEED)))
    assert [len(batch) for batch in BatchSampler(sampler, 4, drop_last=False)] == [4, 2]
    assert pickle.loads(pickle.dumps(EpochDataset(Rows())))[EPOCH_STRIDE]["epoch"] == 1


class TestFilled:
    """Several processes: each example once, equally many batches, in the order of one process."""

    def shards(self, *, ranks, batch_size, num_rows=NUM_ROWS):
        base = EpochDataset(Dataset.from_dict({"value": list(range(num_rows))}))
        sampler = FilledSampler(EpochSampler(num_rows, seed=SEED), multiple=ranks * batch_size)
        collate = CollatorOfFilled(lambda examples: {"examples": examples})
        loader = DataLoader(FilledDataset(base), batch_size=batch_size, sampler=sampler, collate_fn=collate)
        for rank in range(ranks):
            shard = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
            yield len(shard), list(shard)

    @pytest.mark.parametrize(
        ("ranks", "batch_size", "num_rows"), [(2, 4, 23), (2, 4, 24), (3, 2, 1), (4, 3, 5), (2, 1, 7), (5, 2, 23)]
    )
    def test_each_example_counts_once(self, ranks, batch_size, num_rows):
        lengths, batches = zip(*self.shards(ranks=ranks, batch_size=batch_size, num_rows=num_rows), strict=True)
        assert {*lengths, *map(len, batches)} == {-(-num_rows // (ranks * batch_size))}
        turns = [batch for turn in zip(*batches, strict=True) for batch in turn]
        rows = [row["example_id"] for batch in turns if FILLER not in batch for row in batch["examples"]]
        assert rows == order_of(0, num_rows)
        assert all(len(batch["examples"]) == 1 for batch in turns if FILLER in batch)
        assert not any(FILLER in row for batch in turns for row in batch["examples"])

    def test_a_dataset_without_many_reads(self):
        dataset = FilledDataset(Rows())
        assert dataset.__getitems__([3, -1 - 5]) == [{"value": 30}]
        assert dataset.__getitems__([-1 - 5]) == [{"value": 50, FILLER: True}]
