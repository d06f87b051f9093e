"""Shuffled runs: how many, where, and that nothing is lost."""

import itertools

import numpy as np
import pytest

from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.corruption.word_order import shuffle_runs


def keys_of(num_rows, *, epoch=0, first_id=0):
    return RowKeys(np.arange(first_id, first_id + num_rows), np.full(num_rows, epoch), 0)


def shuffle(input_ids, free, **options):
    defaults = {"lengths": np.full(len(free), free.shape[1]), "keys": keys_of(len(free)), "probability": 0.05}
    return shuffle_runs(input_ids, free=free, **{**defaults, **options})


def places(num_rows, width):
    """Every token is another one."""
    return np.arange(num_rows * width).reshape(num_rows, width)


@pytest.mark.parametrize("width", [32, 128, 512])
def test_share_is_right_for_rows_of_any_length(width):
    """With 15 % of the tokens taken by masks, as in training."""
    num_rows = 2**20 // width
    free = np.random.default_rng(0).random((num_rows, width)) > 0.15
    free[:, [0, -1]] = False
    shuffled = shuffle(places(num_rows, width), free)
    assert abs(shuffled.positions.size / (num_rows * width) - 0.05) < 0.0005
    counts = np.bincount(shuffled.rows, minlength=num_rows)
    assert set(np.unique(counts)) <= {np.floor(0.05 * width / 3), np.ceil(0.05 * width / 3)}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("probability", [0.05, 0.5, 1.0])
def test_runs_are_apart_and_hold_free_tokens_only(size, probability):
    rng = np.random.default_rng(1)
    free = rng.random((60, 90)) > 0.2
    ids = places(60, 90)
    shuffled = shuffle(ids, free, size=size, probability=probability)
    covered = np.bincount(shuffled.positions.ravel(), minlength=free.size)
    assert covered.max() == 1 and free.ravel()[covered > 0].all()
    assert (shuffled.positions // 90 == shuffled.rows[:, None]).all()
    assert (np.diff(shuffled.positions, axis=1) == 1).all() and (np.diff(shuffled.positions[:, 0]) > 0).all()
    flat, before = shuffled.input_ids.ravel(), ids.ravel()
    assert np.array_equal(flat[covered == 0], before[covered == 0])
    assert np.array_equal(np.sort(flat[shuffled.positions], axis=1), before[shuffled.positions])
    assert (flat[shuffled.positions] != before[shuffled.positions]).any(axis=1).all(), "no run is left as it was"
    if probability == 1:
        # Nothing is left that another run would fit into.
        rest = free & ~(covered > 0).reshape(free.shape)
        windows = np.lib.stride_tricks.sliding_window_view(rest, size, axis=1).all(axis=2)
        assert not windows.any()


@pytest.mark.parametrize("keep_identity", [False, True])
def test_every_order_is_as_likely(keep_identity):
    ids = places(4096, 60)
    shuffled = shuffle(ids, np.ones(ids.shape, dtype=bool), probability=0.4, keep_identity=keep_identity)
    runs = shuffled.input_ids.ravel()[shuffled.positions] - shuffled.positions[:, :1]
    orders, counts = np.unique(runs, axis=0, return_counts=True)
    expected = sorted(itertools.permutations(range(3)))[not keep_identity :]
    assert [tuple(order) for order in orders] == expected
    mean = counts.sum() / len(expected)
    assert ((counts - mean) ** 2 / mean).sum() < 25  # chi-square, 4 or 5 degrees of freedom


def test_every_start_is_as_likely():
    shuffled = shuffle(places(60000, 9), np.ones((60000, 9), dtype=bool), probability=1 / 3)
    counts = np.bincount(shuffled.starts, minlength=9)
    assert not counts[7:].any() and abs(counts[:7] / 60000 - 1 / 7).max() < 0.008


def test_no_run_reaches_across_a_break():
    rng = np.random.default_rng(2)
    breaks, free = rng.random((50, 80)) < 0.15, np.ones((50, 80), dtype=bool)
    shuffled = shuffle(places(50, 80), free, probability=1.0, breaks=breaks)
    inside = breaks.ravel()[shuffled.positions]
    assert inside[:, 0].any() and not inside[:, 1:].any()


def test_draws_belong_to_the_row_alone():
    rng = np.random.default_rng(3)
    free = rng.random((20, 100)) > 0.15
    whole = shuffle(places(20, 100), free, probability=0.2)
    row = shuffle(places(20, 100)[7:8], free[7:8], probability=0.2, keys=keys_of(1, first_id=7))
    assert np.array_equal(row.input_ids[0], whole.input_ids[7])
    wide_free = np.hstack([free, np.zeros((20, 28), dtype=bool)])
    wide = shuffle(
        np.hstack([places(20, 100), np.zeros((20, 28), dtype=np.int64)]),
        wide_free,
        probability=0.2,
        lengths=np.full(20, 100),
    )
    assert np.array_equal(wide.input_ids[:, :100], whole.input_ids)
    other = shuffle(places(20, 100), free, probability=0.2, keys=keys_of(20, epoch=1))
    assert not np.array_equal(other.input_ids, whole.input_ids)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_rows_that_are_too_short_stay_as_they_are(width):
    ids = places(5, width)
    shuffled = shuffle(ids, np.ones(ids.shape, dtype=bool), probability=1.0)
    assert len(shuffled.rows) == (5 if width == 3 else 0)
    nothing = shuffle(ids, np.zeros(ids.shape, dtype=bool), probability=1.0)
    assert np.array_equal(nothing.input_ids, ids) and nothing.positions.shape == (0, 3)
    assert len(shuffle(ids, np.ones(ids.shape, dtype=bool), probability=0.0).rows) == 0
