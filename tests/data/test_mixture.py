"""Several datasets in fixed shares."""

import pickle
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset

from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.data.examples.epochs import (
    EPOCH_STRIDE,
    EpochDataset,
    EpochSampler,
    MixtureDataset,
    apportion,
    fill_of,
    language_shares,
)
from hf_pretrain.errors import InputError

SEED = 7


class Rows(Dataset):
    """Rows that say where they are from."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return {"part": self.name, "row": row}


def mixture(lengths=None, shares=None, **options):
    lengths = lengths or {"a": 50, "b": 20, "c": 10}
    shares = shares or {"a": 0.5, "b": 0.3, "c": 0.2}
    return MixtureDataset(
        {name: Rows(name, count) for name, count in lengths.items()}, shares=shares, seed=SEED, **options
    )


def epoch_of(dataset, epoch):
    return dataset.__getitems__([epoch * EPOCH_STRIDE + row for row in range(len(dataset))])


def as_list(examples):
    return examples


@pytest.mark.parametrize("group_size", [1, 4])
def test_every_epoch_has_the_exact_shares_in_groups_of_one_part(group_size):
    dataset = mixture(group_size=group_size)
    assert len(dataset) == 80
    orders = []
    for epoch in range(3):
        names = [example["part"] for example in epoch_of(dataset, epoch)]
        assert Counter(names) == {"a": 40, "b": 24, "c": 16} == dataset.counts
        groups = np.array(names).reshape(-1, group_size)
        assert (groups == groups[:, :1]).all()
        orders.append(names)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_of_the_parts_is_random():
    dataset = mixture({"a": 3000, "b": 3000}, {"a": 1, "b": 1})
    names = np.array([dataset[row]["part"] for row in range(len(dataset))])
    share = (names[1:] == names[:-1]).mean()
    assert share == pytest.approx(0.5, abs=0.035)
    assert (names[:3000] == "a").mean() == pytest.approx(0.5, abs=0.05)


def test_nothing_comes_again_before_all_has_come():
    dataset = mixture()
    examples = [example for epoch in range(4) for example in epoch_of(dataset, epoch)]
    for name, length in (("a", 50), ("b", 20), ("c", 10)):
        rows = [example["row"] for example in examples if example["part"] == name]
        passes = [rows[begin : begin + length] for begin in range(0, len(rows), length)]
        assert all(sorted(one) == list(range(length)) for one in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        assert passes[0] != passes[1], "each pass has an order of its own"


def test_examples_are_keyed_by_part_row_and_pass():
    dataset = mixture()
    examples = [example for epoch in range(4) for example in epoch_of(dataset, epoch)]
    assert len({(example["example_id"], example["epoch"]) for example in examples}) == len(examples)
    offsets = {"a": 0, "b": 50, "c": 70}
    assert all(example["example_id"] == offsets[example["part"]] + example["row"] for example in examples)
    # 16 of the 10 rows of "c" are read in an epoch.
    passes = [example["epoch"] for example in epoch_of(dataset, 0) if example["part"] == "c"]
    assert passes == [0] * 10 + [1] * 6


def test_draws_of_two_parts_are_independent():
    """The same rows in two parts, as in two views of the same text."""
    rows = Rows("same", 500)
    dataset = MixtureDataset({"x": rows, "y": rows}, shares={"x": 1, "y": 1}, seed=SEED)
    examples = sorted(epoch_of(dataset, 0), key=lambda example: example["example_id"])
    bits = RowKeys.from_examples(examples, seed=SEED).bits("select", length=64) < np.uint64(2**63)
    assert (bits[:500] == bits[500:]).mean() == pytest.approx(0.5, abs=0.015)
    order = [
        [example["row"] for example in epoch_of(dataset, 0) if example["example_id"] // 500 == part] for part in (0, 1)
    ]
    assert order[0] != order[1]


def test_place_is_the_samplers_and_travels_with_the_mixtures_epoch():
    dataset = mixture()
    sampler = EpochSampler(len(dataset), seed=SEED, shuffle=False)
    sampler.set_epoch(2)
    examples = dataset.__getitems__(list(sampler))
    assert [example["order_index"] for example in examples] == list(range(80))
    assert {example["order_epoch"] for example in examples} == {2}
    assert "order_index" not in dataset[3] and "order_epoch" not in dataset[3]
    plain = epoch_of(dataset, 2)
    assert [example["row"] for example in examples] == [example["row"] for example in plain]


def test_one_by_one_is_the_same_as_in_batches():
    dataset = mixture(group_size=2)
    indices = [EPOCH_STRIDE * epoch + row for epoch, row in ((0, 3), (1, 79), (0, 78), (1, 0), (0, 3))]
    assert dataset.__getitems__(indices) == [dataset[index] for index in indices]
    with pytest.raises(IndexError):
        dataset[80]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_pickling_change_nothing(workers):
    dataset = pickle.loads(pickle.dumps(mixture(group_size=4)))
    sampler = EpochSampler(len(dataset), seed=SEED, shuffle=False)
    loader = DataLoader(dataset, batch_size=5, sampler=sampler, collate_fn=as_list, num_workers=workers)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        found = [example for batch in loader for example in batch]
        expected = epoch_of(mixture(group_size=4), epoch)
        keys = ("part", "row", "example_id", "epoch")
        assert [[e[k] for k in keys] for e in found] == [[e[k] for k in keys] for e in expected]


def test_each_step_is_of_one_part_on_all_ranks_and_after_a_resume():
    dataset = mixture(group_size=8)
    sampler = EpochSampler(len(dataset), seed=SEED, shuffle=False)

    def steps(rank, skipped=0):
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=as_list)
        loader = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        batches = list(skip_first_batches(loader, skipped) if skipped else loader)
        # Two micro-batches of two examples on each of two ranks.
        return [sum(batches[at : at + 2], []) for at in range(0, len(batches), 2)]

    ranks = [steps(0), steps(1)]
    assert len(ranks[0]) == 10
    for step in zip(*ranks, strict=True):
        assert len({example["part"] for rank in step for example in rank}) == 1
    seen = [(e["part"], e["row"], e["epoch"]) for rank in ranks for step in rank for e in step]
    assert sorted(seen) == sorted((e["part"], e["row"], e["epoch"]) for e in epoch_of(dataset, 0))
    assert steps(1, skipped=6) == ranks[1][3:]


def test_a_mixture_of_mixtures_keeps_the_inner_order_and_its_ids_apart():
    inner = mixture({"a": 5, "b": 200}, {"a": 1, "b": 1}, num_examples=20, group_size=2)
    outer = MixtureDataset(
        {"inner": inner, "other": Rows("other", 30)}, shares={"inner": 1, "other": 1}, group_size=2, seed=1
    )
    examples = [example for epoch in range(6) for example in epoch_of(outer, epoch)]
    assert len({(example["example_id"], example["epoch"]) for example in examples}) == len(examples)
    mixed = [(e["part"], e["row"], e["example_id"], e["epoch"]) for e in examples if e["part"] != "other"]
    alone = [(e["part"], e["row"], e["example_id"], e["epoch"]) for epoch in range(9) for e in epoch_of(inner, epoch)]
    assert mixed == alone[: len(mixed)]
    assert outer.num_example_ids == 235


def test_shares_by_length_read_everything_once():
    lengths = {"a": 17, "b": 5, "c": 1}
    examples = epoch_of(mixture(lengths, lengths), 0)
    assert sorted((example["part"], example["row"]) for example in examples) == [
        (name, row) for name, length in lengths.items() for row in range(length)
    ]
    assert {example["epoch"] for example in examples} == {0}


def test_seeds_differ():
    parts = {"a": Rows("a", 50), "b": Rows("b", 50)}
    first, second = (MixtureDataset(parts, shares={"a": 1, "b": 1}, seed=seed) for seed in (1, 2))
    assert epoch_of(first, 0) != epoch_of(second, 0)


def test_what_is_drawn_is_kept_for_two_epochs():
    dataset = mixture()
    for epoch in range(6):
        dataset[epoch * EPOCH_STRIDE]
    assert max(map(len, dataset._drawn.values())) == 2
    assert not pickle.loads(pickle.dumps(dataset))._drawn


def test_apportion_is_exact():
    assert apportion(10, np.array([1.0, 1.0, 1.0])).tolist() == [4, 3, 3]
    for total in (1, 97, 1000):
        weights = np.array([0.523, 0.279, 0.198])
        counts = apportion(total, weights)
        assert counts.sum() == total
        assert np.abs(counts - total * weights / weights.sum()).max() < 1


def test_language_shares_are_those_of_xlm():
    counts = {"en": 70, "de": 20, "fr": 10}
    shares = language_shares(counts, alpha=0.5)
    assert shares == {
        "en": pytest.approx(0.523, abs=1e-3),
        "de": pytest.approx(0.279, abs=1e-3),
        "fr": pytest.approx(0.198, abs=1e-3),
    }
    assert language_shares(counts, alpha=1) == pytest.approx({"en": 0.7, "de": 0.2, "fr": 0.1})
    assert language_shares(counts, alpha=0) == pytest.approx(dict.fromkeys(counts, 1 / 3))
    lengths = {name: 100 * count for name, count in counts.items()}
    names = Counter(example["part"] for example in epoch_of(mixture(lengths, shares), 0))
    for name, share in shares.items():
        assert names[name] / 10_000 == pytest.approx(share, abs=1e-4)
    with pytest.raises(InputError, match="language_sampling_alpha=2"):
        language_shares(counts, alpha=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {}}, "no dataset"),
        ({"shares": {"a": 1}}, "parts are a, b, but shares are for a"),
        ({"shares": {"a": 1, "b": 0}}, r"shares\['b'\]=0"),
        ({"shares": {"a": 1, "b": float("nan")}}, r"shares\['b'\]=nan"),
        ({"parts": {"a": Rows("a", 5), "b": Rows("b", 0)}}, r"parts\['b'\] holds no example"),
        ({"parts": {"a": Rows("a", 5), "b": iter(())}}, "map-style"),
        ({"group_size": 0}, "group_size=0"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"group_size": 8}, "has none for 'b'"),
    ],
)
def test_bad_input_is_refused(changes, message):
    options = {"parts": {"a": Rows("a", 10), "b": Rows("b", 10)}, "shares": {"a": 9, "b": 1}} | changes
    with pytest.raises(InputError, match=message):
        MixtureDataset(options.pop("parts"), **options)


def test_wrapped_parts_are_not_wrapped_again():
    part = EpochDataset(Rows("a", 5))
    assert MixtureDataset({"a": part}, shares={"a": 1}).parts["a"] is part
    assert "a: 5 of 5" in repr(MixtureDataset({"a": part}, shares={"a": 1}))


def test_the_fill_of_a_mixture_is_that_of_what_is_drawn():
    """A small part that is drawn as often as a large one counts as much; a part of unknown lengths leaves all unknown."""
    small, large, unknown = Rows("small", 4), Rows("large", 40), Rows("unknown", 4)
    small.fill, large.fill = 0.5, 1.0
    assert fill_of(EpochDataset(EpochDataset(small))) == 0.5 and fill_of(unknown) is fill_of(None) is None
    shares = {"small": 1, "large": 1}
    mixed = MixtureDataset({"small": small, "large": large}, shares=shares, seed=SEED)
    counts = mixed.counts
    assert counts["small"] == counts["large"] and fill_of(mixed) == pytest.approx(0.75)
    assert fill_of(MixtureDataset({"small": small, "large": unknown}, shares=shares, seed=SEED)) is None
