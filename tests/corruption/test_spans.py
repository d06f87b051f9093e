from __future__ import annotations

import math

import numpy as np
import pytest

from hf_pretrain.corruption.selection import Selection, partition_words, token_budgets
from hf_pretrain.corruption.spans import (
    draw_lengths,
    geometric_lengths,
    ngram_lengths,
    select_given,
    select_given_independently,
    select_ngrams,
    select_spans,
    take_runs,
)
from hf_pretrain.data import draws


def random_bits(num_rows: int, width: int, *, stream: str) -> np.ndarray:
    return draws.bits(draws.row_keys(np.arange(num_rows), seed=5, stream=stream), width)


def random_rows(num_rows: int, width: int, *, special_share: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    word_starts = draws.uniforms(draws.row_keys(np.arange(num_rows), seed=6, stream="words"), width) < 0.65
    maskable = draws.uniforms(draws.row_keys(np.arange(num_rows), seed=6, stream="special"), width) >= special_share
    maskable[:, 0] = maskable[:, -1] = False
    return word_starts, maskable


def walk_order(bits: np.ndarray, columns: list[int]) -> list[int]:
    return sorted(columns, key=lambda column: (int(bits[column]) >> 25, column))


def unit_of(bits: np.uint64) -> float:
    return (int(bits) >> 11) * 2.0**-53


def words_of_row(word_starts: np.ndarray, maskable: np.ndarray) -> list[tuple[int, int]]:
    """Candidate words as (start, end)."""
    words: list[tuple[int, int]] = []
    for column in np.flatnonzero(maskable).tolist():
        if word_starts[column] or column == 0 or not maskable[column - 1]:
            words.append((column, column + 1))
        else:
            words[-1] = (words[-1][0], column + 1)
    return words


def run_length(words: list[tuple[int, int]], index: int) -> int:
    """Words from `index` on that follow each other without a special token between them."""
    end = index + 1
    while end < len(words) and words[end][0] == words[end - 1][1]:
        end += 1
    return end - index


def naive_spans(bits, length_bits, word_starts, maskable, probability, cumulative) -> np.ndarray:
    """SpanBERT's rule for one row, a token at a time."""
    words = words_of_row(word_starts, maskable)
    word_of = {column: index for index, (start, end) in enumerate(words) for column in range(start, end)}
    covered = np.zeros(len(maskable), dtype=bool)
    budget = math.ceil(probability * len(word_of) - 1e-9)
    for anchor in walk_order(bits, list(word_of)):
        if covered[anchor]:
            continue
        wanted = 1 + sum(bound <= unit_of(length_bits[anchor]) for bound in cumulative.tolist())
        first = word_of[anchor]
        last = first + min(wanted, run_length(words, first)) - 1
        for column in range(words[first][0], words[last][1]):
            if covered.sum() < budget:
                covered[column] = True
    return covered


def naive_ngrams(bits, length_bits, word_starts, maskable, budget, max_ngram) -> list[tuple[int, int]]:
    """ALBERT's rule for one row, a start at a time."""
    words = words_of_row(word_starts, maskable)
    index_of = {start: index for index, (start, _) in enumerate(words)}
    order = [index_of[start] for start in walk_order(bits, list(index_of))]
    used: set[int] = set()
    taken, remaining = [], budget

    def attempt(first: int, size: int) -> None:
        nonlocal remaining
        while size and words[first + size - 1][1] - words[first][0] > remaining:
            size -= 1
        if size and not used & set(range(first, first + size)):
            used.update(range(first, first + size))
            taken.append((words[first][0], words[first + size - 1][1]))
            remaining -= taken[-1][1] - taken[-1][0]

    for first in order:
        most = min(max_ngram, run_length(words, first))
        weights = [1 / n for n in range(1, most + 1)]
        draw, size = unit_of(length_bits[words[first][0]]) * sum(weights), 1
        while size < most and draw >= sum(weights[:size]):
            size += 1
        attempt(first, size)
    for first in order:
        attempt(first, 1)
    if not taken and budget and words:
        first = min(order, key=lambda index: words[index][1] - words[index][0])
        taken.append(words[first])
    return sorted(taken)


@pytest.mark.parametrize(("mode", "mean"), [("renormalise", 3.797), ("clip", 4.463)])
def test_span_lengths_have_the_published_mean(mode, mean):
    cumulative = geometric_lengths(0.2, longest=10, mode=mode)
    uniforms = draws.uniforms(draws.row_keys([1], seed=0, stream="lengths"), 1_000_000)[0]
    lengths = draw_lengths(uniforms, cumulative=cumulative)
    assert abs(lengths.mean() - mean) < 0.02
    assert lengths.min() == 1 and lengths.max() == 10
    # Neighbouring lengths below the longest stand in the ratio of the geometric distribution.
    counts = np.bincount(lengths)
    np.testing.assert_allclose(counts[2:9] / counts[1:8], 0.8, atol=0.02)
    assert draw_lengths(np.array([0.0, np.nextafter(1.0, 0.0)]), cumulative=cumulative).tolist() == [1, 10]
    assert draw_lengths(cumulative[:1], cumulative=cumulative).tolist() == [2]


def test_ngram_lengths_are_drawn_by_one_over_n():
    uniforms = draws.uniforms(draws.row_keys([2], seed=0, stream="lengths"), 1_000_000)[0]
    for available, expected in ((9, [6 / 11, 3 / 11, 2 / 11]), (2, [2 / 3, 1 / 3]), (1, [1.0])):
        lengths = ngram_lengths(uniforms, available=np.full(uniforms.shape, available), max_ngram=3)
        np.testing.assert_allclose(np.bincount(lengths)[1:] / lengths.size, expected, atol=0.0025)


@pytest.mark.parametrize("special_share", [0.0, 0.1])
@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_spans_equal_the_sequential_loop(special_share, probability):
    word_starts, maskable = random_rows(150, 80, special_share=special_share)
    bits, length_bits = random_bits(150, 80, stream="select"), random_bits(150, 80, stream="length")
    cumulative = geometric_lengths(0.2, longest=10)
    words = partition_words(word_starts, maskable=maskable)
    mask = select_spans(
        bits, length_bits, words=words, maskable=maskable, probability=probability, lengths=cumulative
    ).mask
    for row in range(150):
        expected = naive_spans(bits[row], length_bits[row], word_starts[row], maskable[row], probability, cumulative)
        np.testing.assert_array_equal(mask[row], expected, err_msg=f"row {row}")


@pytest.fixture(scope="module")
def many_spans() -> tuple[Selection, np.ndarray, np.ndarray]:
    word_starts, maskable = random_rows(2048, 512, special_share=0.01)
    words = partition_words(word_starts, maskable=maskable)
    selection = select_spans(
        random_bits(2048, 512, stream="select"),
        random_bits(2048, 512, stream="length"),
        words=words,
        maskable=maskable,
        probability=0.15,
        lengths=geometric_lengths(0.2, longest=10),
    )
    is_start = np.zeros(maskable.size + 1, dtype=bool)
    is_start[words.bounds] = True
    return selection, maskable, is_start


def test_spans_cover_the_budget_exactly_in_every_row(many_spans):
    selection, maskable, _ = many_spans
    expected = [math.ceil(0.15 * count) for count in maskable.sum(axis=1).tolist()]
    assert selection.mask.sum(axis=1).tolist() == expected
    assert not (selection.mask & ~maskable).any()


def test_spans_start_at_words_and_only_the_last_may_be_cut(many_spans):
    selection, maskable, is_start = many_spans
    spans = selection.spans()
    width = maskable.shape[1]
    assert is_start[spans[:, 0] * width + spans[:, 1]].all()
    cut = ~is_start[spans[:, 0] * width + spans[:, 2]]
    assert 0 < np.bincount(spans[cut, 0]).max() <= 1
    same_row = spans[1:, 0] == spans[:-1, 0]
    assert (spans[1:, 1] > spans[:-1, 2])[same_row].all(), "touching spans must have been merged"


def test_spans_are_long(many_spans):
    # Words of 1.54 tokens and spans of 3.8 words: some 5.8 tokens; a masker of single words has runs of under 2.
    spans = many_spans[0].spans()
    assert 5 < (spans[:, 2] - spans[:, 1]).mean() < 7


@pytest.mark.parametrize("special_share", [0.0, 0.1])
@pytest.mark.parametrize("probability", [0.02, 0.15, 0.6])
def test_ngrams_equal_the_sequential_loop(special_share, probability):
    word_starts, maskable = random_rows(150, 72, special_share=special_share)
    bits, length_bits = random_bits(150, 72, stream="select"), random_bits(150, 72, stream="length")
    budgets = token_budgets(maskable, lengths=np.full(150, 72), probability=probability)
    words = partition_words(word_starts, maskable=maskable)
    spans = select_ngrams(bits, length_bits, words=words, budgets=budgets, max_ngram=3).spans()
    for row in range(150):
        expected = naive_ngrams(bits[row], length_bits[row], word_starts[row], maskable[row], int(budgets[row]), 3)
        assert [tuple(span) for span in spans[spans[:, 0] == row, 1:].tolist()] == expected, f"row {row}"


def test_ngrams_keep_the_budget_and_fill_it():
    word_starts, maskable = random_rows(2048, 512)
    budgets = token_budgets(maskable, lengths=np.full(2048, 512), probability=0.15)
    selection = select_ngrams(
        random_bits(2048, 512, stream="select"),
        random_bits(2048, 512, stream="length"),
        words=partition_words(word_starts, maskable=maskable),
        budgets=budgets,
        max_ngram=3,
    )
    counts = selection.mask.sum(axis=1)
    assert (counts <= budgets).all() and counts.mean() > budgets.mean() - 0.05
    # Accepted n-grams are a little shorter than drawn ones, as long ones overlap more often; a sampler of single words
    # has a mean of 1 and one that ignores 1/n a mean of 2.
    begins = partition_words(word_starts, maskable=maskable).begins
    assert 1.5 < (selection.mask & begins).sum() / selection.unit_starts.sum() < 1.65


@pytest.mark.parametrize("select", ["ngram", "span"])
def test_probability_zero_selects_nothing_and_one_everything(select):
    word_starts, maskable = random_rows(50, 60, special_share=0.1)
    words = partition_words(word_starts, maskable=maskable)
    for probability, expected in ((0.0, np.zeros_like(maskable)), (1.0, maskable)):
        bits, length_bits = random_bits(50, 60, stream="a"), random_bits(50, 60, stream="b")
        if select == "ngram":
            budgets = token_budgets(maskable, lengths=np.full(50, 60), probability=probability)
            mask = select_ngrams(bits, length_bits, words=words, budgets=budgets, max_ngram=3).mask
        else:
            lengths = geometric_lengths(0.2, longest=10)
            mask = select_spans(
                bits, length_bits, words=words, maskable=maskable, probability=probability, lengths=lengths
            ).mask
        np.testing.assert_array_equal(mask, expected)


def test_given_spans_are_taken_whole_in_random_order_within_the_budget():
    maskable = np.ones((200, 40), dtype=bool)
    spans = np.array([(row, start, start + size) for row in range(200) for start, size in ((2, 3), (9, 5), (20, 9))])
    budgets = np.full(200, 9)
    table = select_given(random_bits(200, 3, stream="select"), spans=spans, maskable=maskable, budgets=budgets).spans()
    given = {tuple(span) for span in spans.tolist()}
    assert {tuple(span) for span in table.tolist()} <= given
    totals = np.bincount(table[:, 0], weights=table[:, 2] - table[:, 1], minlength=200)
    # The long one first fills the budget alone; otherwise both others fit and the long one is skipped.
    assert set(totals.tolist()) == {8.0, 9.0}
    assert abs((totals == 9).mean() - 1 / 3) < 5 * np.sqrt(2 / 9 / 200)


def test_given_spans_take_the_shortest_where_none_fits_and_never_a_special_token():
    maskable = np.ones((1, 40), dtype=bool)
    maskable[0, 30] = False
    spans = np.array([(0, 1, 9), (0, 10, 16), (0, 29, 32)])
    selection = select_given(random_bits(1, 3, stream="select"), spans=spans, maskable=maskable, budgets=np.array([2]))
    assert selection.spans().tolist() == [[0, 10, 16]]
    barred = select_given(
        random_bits(1, 1, stream="select"), spans=spans[2:], maskable=maskable, budgets=np.array([2])
    )
    assert not barred.mask.any()


def test_of_overlapping_given_spans_one_is_taken():
    maskable = np.ones((300, 10), dtype=bool)
    spans = np.array([(row, start, start + 4) for row in range(300) for start in (1, 3)])
    table = select_given(
        random_bits(300, 2, stream="select"), spans=spans, maskable=maskable, budgets=np.full(300, 9)
    ).spans()
    assert len(table) == 300 and (table[:, 2] - table[:, 1] == 4).all()
    assert set(table[:, 1].tolist()) == {1, 3}


def test_given_spans_drawn_independently_have_the_rate():
    maskable = np.ones((5000, 50), dtype=bool)
    spans = np.array([(row, start, start + 3) for row in range(5000) for start in range(0, 50, 5)])
    selection = select_given_independently(
        random_bits(5000, 10, stream="select"), spans=spans, maskable=maskable, probability=0.3
    )
    table = selection.spans()
    assert abs(len(table) / len(spans) - 0.3) < 5 * np.sqrt(0.21 / 50_000)
    assert (table[:, 2] - table[:, 1] == 3).all() and (table[:, 1] % 5 == 0).all()


def test_rows_without_given_spans_or_words_get_nothing():
    maskable = np.ones((2, 8), dtype=bool)
    none = np.zeros((0, 3), dtype=np.int64)
    bits = np.zeros((2, 0), dtype=np.uint64)
    assert not select_given(bits, spans=none, maskable=maskable, budgets=np.array([1, 1])).mask.any()
    empty = partition_words(np.ones((2, 8), dtype=bool), maskable=~maskable)
    bits = random_bits(2, 8, stream="select")
    assert not select_ngrams(bits, bits, words=empty, budgets=np.array([0, 0]), max_ngram=3).mask.any()


def naive_runs(firsts, sizes, bounds, budget, *, shorten):
    """The rule of `take_runs` for a row, one run after the other: the slots taken, and the slots at which a run starts."""
    used, starts, remaining = set(), set(), budget
    for first, size in zip(firsts, sizes, strict=True):
        while shorten and size and bounds[first + size] - bounds[first] > remaining:
            size -= 1
        slots = set(range(first, first + size))
        if size and bounds[first + size] - bounds[first] <= remaining and not used & slots:
            used |= slots
            starts.add(first)
            remaining -= bounds[first + size] - bounds[first]
    least = [
        (bounds[f + (1 if shorten else s)] - bounds[f], f, 1 if shorten else s)
        for f, s in zip(firsts, sizes, strict=True)
        if s
    ]
    if budget and not used and least:
        _, first, size = min(least, key=lambda cost: cost[0])
        used, starts = set(range(first, first + size)), {first}
    return used, starts


@pytest.mark.parametrize("shorten", [False, True])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.95])
def test_runs_equal_the_sequential_loop(shorten, budget):
    """Rows with few and many runs, rows whose runs all fit, none fits, or that have none."""
    generator = np.random.default_rng(0)
    for num_runs in (1, 5, 30, 90):
        num_rows, num_slots = 12, 40
        bounds = np.append(0, np.cumsum(generator.integers(1, 5, num_rows * num_slots)))
        firsts = generator.integers(0, num_slots, (num_rows, num_runs))
        sizes = np.minimum(generator.integers(0, 6, (num_rows, num_runs)), num_slots - firsts)
        sizes[0] = 0
        firsts += np.arange(num_rows)[:, None] * num_slots
        tokens = np.diff(bounds[::num_slots])
        budgets = np.rint(generator.uniform(0, 1, num_rows) * budget * tokens).astype(np.int64)
        budgets[1] = tokens[1]
        taken, begun = take_runs(firsts, sizes, bounds=bounds, budgets=budgets, shorten=shorten)
        for row in range(num_rows):
            expected = naive_runs(
                firsts[row].tolist(), sizes[row].tolist(), bounds.tolist(), int(budgets[row]), shorten=shorten
            )
            low, high = row * num_slots, (row + 1) * num_slots
            found = tuple(set((np.flatnonzero(part[low:high]) + low).tolist()) for part in (taken, begun))
            assert found == expected, f"row {row} of {num_runs} runs"
