from __future__ import annotations

import numpy as np
import pytest

from hf_pretrain.corruption.selection import (
    Selection,
    fill_budgets,
    order_keys,
    partition_words,
    select_tokens,
    select_tokens_independently,
    select_words,
    select_words_independently,
    sorted_positions,
    token_budgets,
)
from hf_pretrain.data import draws


def random_bits(num_rows: int, width: int, *, stream: str = "select") -> np.ndarray:
    return draws.bits(draws.row_keys(np.arange(num_rows), seed=3, stream=stream), width)


def random_words(num_rows: int, width: int, *, special_share: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return word starts (words of about 1.5 tokens) and maskable positions, specials at both ends and strewn in."""
    word_starts = draws.uniforms(draws.row_keys(np.arange(num_rows), seed=4, stream="words"), width) < 0.65
    maskable = draws.uniforms(draws.row_keys(np.arange(num_rows), seed=4, stream="special"), width) >= special_share
    maskable[:, 0] = maskable[:, -1] = False
    return word_starts, maskable


def naive_words(word_starts: np.ndarray, maskable: np.ndarray) -> list[list[range]]:
    """The words of each row as ranges of columns, found token by token."""
    rows = []
    for starts, may in zip(word_starts.tolist(), maskable.tolist(), strict=True):
        words: list[range] = []
        for column in range(len(may)):
            if not may[column]:
                continue
            if starts[column] or column == 0 or not may[column - 1]:
                words.append(range(column, column + 1))
            else:
                words[-1] = range(words[-1].start, column + 1)
        rows.append(words)
    return rows


def naive_order(bits: np.ndarray, columns: list[int]) -> list[int]:
    return sorted(columns, key=lambda column: (int(bits[column]) >> 25, column))


@pytest.mark.parametrize("probability", [0.15, 0.25, 0.5])
def test_budgets_are_those_of_bert_and_electra_for_every_short_length(probability):
    for length in range(2, 130):
        maskable = np.zeros((1, 130), dtype=bool)
        maskable[0, 1 : length - 1] = True
        budget = token_budgets(maskable, lengths=np.array([length]), probability=probability)[0]
        assert budget == min(length - 2, max(1, round(probability * length)))


def test_token_selection_is_exact_in_every_row_even_where_the_bits_collide():
    maskable = random_words(512, 96, special_share=0.3)[1]
    budgets = np.minimum(np.arange(512) % 50, maskable.sum(axis=1))
    for bits in (random_bits(512, 96), np.zeros((512, 96), dtype=np.uint64), np.full((512, 96), 2**64 - 1, np.uint64)):
        mask = select_tokens(bits, maskable=maskable, budgets=budgets).mask
        np.testing.assert_array_equal(mask.sum(axis=1), budgets)
        assert not (mask & ~maskable).any()


def test_token_selection_is_flat_over_positions():
    mask = select_tokens(random_bits(4096, 512), maskable=np.ones((4096, 512), bool), budgets=np.full(4096, 77)).mask
    blocks = mask.reshape(4096, 8, 64).mean(axis=(0, 2))
    assert blocks.max() / blocks.min() < 1.05
    # Pairs of neighbours must be as frequent as sampling without replacement makes them: no clumping, no spacing.
    pairs = (mask[:, 1:] & mask[:, :-1]).mean()
    assert abs(pairs - 77 / 512 * 76 / 511) < 5 * np.sqrt(0.0224 / mask.size)


def test_bernoulli_tokens_have_the_rate_and_the_spread_of_independent_draws():
    maskable = np.ones((2048, 512), dtype=bool)
    mask = select_tokens_independently(random_bits(2048, 512), maskable=maskable, probability=0.15).mask
    assert abs(mask.mean() - 0.15) < 0.002
    assert abs(mask.sum(axis=1).var() / (512 * 0.15 * 0.85) - 1) < 5 * np.sqrt(2 / 2048)


def test_order_keys_sort_candidates_first_into_a_permutation():
    candidates = random_words(64, 100, special_share=0.4)[1]
    order = sorted_positions(order_keys(random_bits(64, 100), candidates=candidates))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(100), (64, 1)))
    for row in range(64):
        count = candidates[row].sum()
        assert candidates[row, order[row, :count]].all()


def test_words_are_cut_by_special_tokens_and_padding():
    word_starts = np.array([[1, 1, 0, 0, 0, 1, 0, 0]], dtype=bool)
    maskable = np.array([[0, 1, 1, 0, 1, 1, 1, 0]], dtype=bool)
    words = partition_words(word_starts, maskable=maskable)
    np.testing.assert_array_equal(words.bounds, [0, 1, 3, 4, 5, 7, 8])
    np.testing.assert_array_equal(words.is_candidate, [False, True, False, True, True, False])
    np.testing.assert_array_equal(words.run_ends()[words.is_candidate], [2, 5, 5])


def test_a_word_never_goes_on_into_the_next_row():
    words = partition_words(np.zeros((3, 4), dtype=bool), maskable=np.ones((3, 4), dtype=bool))
    np.testing.assert_array_equal(words.bounds, [0, 4, 8, 12])
    np.testing.assert_array_equal(words.run_ends(), [1, 2, 3])


def naive_greedy(sizes: list[int], budget: int) -> set[int]:
    taken, remaining = set(), budget
    for index, size in enumerate(sizes):
        if 0 < size <= remaining:
            taken.add(index)
            remaining -= size
    real = [index for index, size in enumerate(sizes) if size]
    if not taken and budget and real:
        taken = {min(real, key=lambda index: sizes[index])}
    return taken


def test_filling_budgets_equals_the_sequential_loop():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 9, (2000, 40)) * (rng.random((2000, 1)) < 0.95)
    budgets = rng.integers(0, 60, 2000)
    taken = fill_budgets(sizes, budgets=budgets)
    for row in range(2000):
        assert set(np.flatnonzero(taken[row]).tolist()) == naive_greedy(sizes[row].tolist(), int(budgets[row]))


@pytest.mark.parametrize("special_share", [0.0, 0.2])
def test_whole_words_equal_the_sequential_loop(special_share):
    word_starts, maskable = random_words(300, 64, special_share=special_share)
    bits, words = random_bits(300, 64), partition_words(word_starts, maskable=maskable)
    budgets = token_budgets(maskable, lengths=np.full(300, 64), probability=0.15)
    selection = select_words(bits, words=words, budgets=budgets)
    spans = selection.spans()
    for row, row_words in enumerate(naive_words(word_starts, maskable)):
        by_start = {word.start: word for word in row_words}
        order = [by_start[start] for start in naive_order(bits[row], list(by_start))]
        taken = [order[index] for index in naive_greedy([len(word) for word in order], int(budgets[row]))]
        expected = sorted((word.start, word.stop) for word in taken)
        assert [tuple(span) for span in spans[spans[:, 0] == row, 1:].tolist()] == expected


def test_whole_words_have_the_token_rate_and_keep_the_budget():
    word_starts, maskable = random_words(2048, 512)
    words = partition_words(word_starts, maskable=maskable)
    budgets = token_budgets(maskable, lengths=np.full(2048, 512), probability=0.15)
    mask = select_words(random_bits(2048, 512), words=words, budgets=budgets).mask
    assert abs(mask.mean() - 0.15) < 0.003
    assert (mask.sum(axis=1) <= budgets).all()
    by_word = np.add.reduceat(mask.ravel(), words.bounds[:-1])
    assert ((by_word == 0) | (by_word == words.sizes)).all() and (by_word > 1).any()


def test_a_row_of_long_words_gets_its_shortest_word():
    word_starts = np.zeros((1, 20), dtype=bool)
    word_starts[0, [1, 9, 14]] = True
    maskable = np.ones((1, 20), dtype=bool)
    maskable[0, [0, 19]] = False
    words = partition_words(word_starts, maskable=maskable)
    for row in range(20):
        bits = random_bits(20, 20)[row : row + 1]
        spans = select_words(bits, words=words, budgets=np.array([3])).spans()
        assert spans.tolist() in ([[0, 9, 14]], [[0, 14, 19]])
    assert not select_words(bits, words=words, budgets=np.array([0])).mask.any()


def test_bernoulli_words_are_whole_and_drawn_at_the_rate():
    word_starts, maskable = random_words(2048, 512, special_share=0.01)
    words = partition_words(word_starts, maskable=maskable)
    mask = select_words_independently(random_bits(2048, 512), words=words, probability=0.15).mask
    assert abs(mask[maskable].mean() - 0.15) < 0.003 and not (mask & ~maskable).any()
    by_word = np.add.reduceat(mask.ravel(), words.bounds[:-1])
    assert ((by_word == 0) | (by_word == words.sizes)).all()


def test_span_table_separates_touching_units_and_rows():
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1]], dtype=bool)
    starts = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]], dtype=bool)
    expected = [[0, 0, 2], [0, 2, 3], [1, 1, 4], [2, 0, 1], [2, 3, 4]]
    assert Selection(mask=mask, unit_starts=starts).spans().tolist() == expected
    merged = [[0, 0, 3], [1, 1, 4], [2, 0, 1], [2, 3, 4]]
    assert Selection.merged(mask).spans().tolist() == merged


def test_rows_without_candidates_get_nothing():
    maskable = np.zeros((4, 6), dtype=bool)
    words = partition_words(np.ones((4, 6), dtype=bool), maskable=maskable)
    budgets = token_budgets(maskable, lengths=np.full(4, 6), probability=0.15)
    assert not budgets.any()
    assert not select_tokens(random_bits(4, 6), maskable=maskable, budgets=budgets).mask.any()
    assert not select_words(random_bits(4, 6), words=words, budgets=budgets).mask.any()
