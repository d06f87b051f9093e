from __future__ import annotations

import numpy as np
import pytest

from hf_pretrain.corruption.permutation import (
    PADDING_RANK,
    RowParts,
    given_order,
    given_ranks,
    given_targets,
    part_budgets,
    random_order,
    sample_targets,
    visibility,
)
from hf_pretrain.corruption.rows import ExampleRows, RowKeys
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError

SEP, CLS = 1, 2


def make_rows(lengths: list[int], *, width: int | None = None, special_share: float = 0.04, start_share: float = 0.6):
    """Rows of random tokens, SEP and CLS among them and at the end: the rows, the candidates, the functional tokens."""
    width = max(lengths) if width is None else width
    ids = np.arange(len(lengths)) + 100
    keys = RowKeys(ids, np.zeros_like(ids), 5)

    def uniform(stream: str) -> np.ndarray:
        return draws.uniforms(draws.row_keys(ids, seed=3, stream=stream), width)

    valid = np.arange(width) < np.array(lengths)[:, None]
    input_ids = 10 + (uniform("ids") * 50).astype(np.int64)
    input_ids[uniform("special") < special_share] = SEP
    for row, length in enumerate(lengths):
        if length:
            input_ids[row, length - 1] = CLS
    input_ids[~valid] = 0
    functional = ((input_ids == SEP) | (input_ids == CLS)) & valid
    rows = ExampleRows(input_ids, valid, keys, word_starts=uniform("words") < start_share)
    return rows, valid & ~functional, functional


def halves_of(length: int, *, halves: bool = True, reuse: int | None = None) -> list[range]:
    if not halves:
        return [range(length)]
    border = (length + 1) // 2 if reuse is None else min(reuse, length)
    return [range(border), range(border, length)]


def stream_bits(rows: ExampleRows, stream: str, row: int, length: int) -> list[int]:
    return rows.keys.bits(stream, length=length)[row].tolist()


def naive_windows(bits: list[int], size: int, budget: int, *, factor: int = 6, longest: int = 5, starts: list[bool]):
    """The official loop over one half, in reading order: the spans as (start, n, n before the budget cut it)."""
    weights = [1 / n for n in range(1, longest + 1)]
    current, left_over, spans = 0, budget, []
    for draw in bits:
        if not left_over or current >= size:
            break
        u, n = (draw >> 32) / 2**32 * sum(weights), 1
        while n < longest and u >= sum(weights[:n]):
            n += 1
        drawn, n = n, min(n, left_over)
        context = n * factor
        left = ((draw & 0xFFFFFFFF) * context) >> 32
        start = current + left
        while start < size and not starts[start]:
            start += 1
        if start >= size:
            break
        spans.append((start, n, drawn))
        left_over -= n
        current = start + n + context - left
    return spans


def naive_official(rows: ExampleRows, candidates: np.ndarray, row: int, budgets: list[int], *, backward: bool = False):
    """One row's targets, its uncut span lengths, and how many targets were filled in."""
    length, width = int(rows.valid[row].sum()), rows.valid.shape[1]
    span_bits, fill_bits = (stream_bits(rows, f"permutation_{name}", row, 2 * width + 2) for name in ("spans", "fill"))
    targets, lengths, filled = np.zeros(width, dtype=bool), [], 0
    for part, (columns, budget) in enumerate(zip(halves_of(length), budgets, strict=True)):
        places = list(columns)[::-1] if backward else list(columns)
        starts = [bool(rows.word_starts[row, c]) or not candidates[row, c] for c in places]
        for start, n, drawn in naive_windows(span_bits[part::2], len(places), budget, starts=starts):
            if start + n >= len(places):
                break
            assert starts[start]
            lengths.append(drawn)
            for c in places[start : start + n]:
                targets[c] = candidates[row, c]
        free = sorted(
            (c for c in places if candidates[row, c] and not targets[c]),
            key=lambda c: ((fill_bits[c] >> 25), places.index(c)),
        )
        missing = budget - int(targets[places].sum())
        filled += missing
        targets[free[:missing]] = True
    return targets, lengths, filled


@pytest.mark.parametrize("backward", [False, True])
def test_official_targets_are_those_of_the_official_loop(backward):
    rows, candidates, _ = make_rows([512, 511, 128, 77, 40, 15, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    flags = np.arange(len(candidates)) % 2 == 0 if backward else None
    parts = RowParts.of(rows.valid, halves=True)
    budgets = part_budgets(candidates, parts=parts, context_factor=6)
    targets = sample_targets(rows, candidates=candidates, parts=parts, backward=flags)
    for row in range(len(candidates)):
        is_backward = flags is not None and bool(flags[row])
        wanted, _, _ = naive_official(rows, candidates, row, budgets[row].tolist(), backward=is_backward)
        assert np.array_equal(targets[row], wanted), row


def test_official_targets_have_the_statistics_of_the_paper_and_the_code():
    rows, candidates, _ = make_rows([512] * 150, special_share=0.0, start_share=0.75)
    candidates[:] = rows.valid  # as if there were no functional token at all
    budgets = part_budgets(candidates, parts=RowParts.of(rows.valid, halves=True), context_factor=6)
    assert (budgets == [43, 42]).all()
    lengths, filled = [], 0
    for row in range(150):
        targets, drawn, missing = naive_official(rows, candidates, row, [43, 42])
        lengths += drawn
        filled += missing
        assert targets[:256].sum() == 43 and targets[256:].sum() == 42
    shares = np.bincount(lengths)[1:] / len(lengths)
    np.testing.assert_allclose(shares, np.array([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]) / 2.2833, atol=0.02)
    assert 0.15 <= filled / (150 * 85) <= 0.18


@pytest.mark.parametrize("unit", ["official", "word"])
@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("factor", [1.0, 2.5, 6.0])
def test_budgets_are_met_exactly_and_nothing_functional_is_a_target(unit, halves, factor):
    lengths = [*range(130), 512]
    rows, candidates, functional = make_rows(lengths, special_share=0.1)
    parts = RowParts.of(rows.valid, halves=halves)
    targets = sample_targets(rows, candidates=candidates, parts=parts, unit=unit, context_factor=factor)
    assert not (targets & functional).any() and not (targets & ~rows.valid).any()
    for row, length in enumerate(lengths):
        available = int(candidates[row].sum())
        total = min(max(round(length / factor), 1), available)
        assert targets[row].sum() == total, length
        if halves:
            first, second = (list(columns) for columns in halves_of(length))
            wanted = int(np.floor(total * len(first) / max(length, 1) + 0.5))
            wanted = min(max(wanted, total - int(candidates[row, second].sum())), int(candidates[row, first].sum()))
            assert targets[row, first].sum() == wanted


def test_a_part_without_candidates_gives_its_budget_to_the_other():
    rows, candidates, _ = make_rows([12, 12], special_share=0.0)
    candidates[0, :6] = False
    candidates[1, 6:] = False
    parts = RowParts.of(rows.valid, halves=True)
    assert part_budgets(candidates, parts=parts, context_factor=3).tolist() == [[0, 4], [4, 0]]
    targets = sample_targets(rows, candidates=candidates, parts=parts, context_factor=3)
    assert targets.sum(axis=1).tolist() == [4, 4]


def words_in(rows: ExampleRows, candidates: np.ndarray, row: int, columns: range) -> list[list[int]]:
    words: list[list[int]] = []
    for column in columns:
        if not candidates[row, column]:
            continue
        if words and not rows.word_starts[row, column] and words[-1][-1] == column - 1:
            words[-1].append(column)
        else:
            words.append([column])
    return words


@pytest.mark.parametrize("backward", [None, True])
def test_whole_words_are_cut_at_most_once_a_half(backward):
    lengths = [512] * 30 + list(range(3, 60))
    rows, candidates, _ = make_rows(lengths)
    if backward:  # Words of a row stored in reverse begin at their last token: flag those that end them here.
        backward = np.ones(len(lengths), dtype=bool)
        rows.word_starts[:, :-1] = rows.word_starts[:, 1:].copy()
    targets = sample_targets(
        rows, candidates=candidates, parts=RowParts.of(rows.valid, halves=True), unit="word", backward=backward
    )
    num_cut = num_whole = 0
    for row, length in enumerate(lengths):
        for columns in halves_of(length):
            if backward is None:
                words = words_in(rows, candidates, row, columns)
            else:
                flipped = ExampleRows(rows.input_ids, rows.valid, rows.keys, word_starts=rows.word_starts[:, ::-1])
                width = rows.valid.shape[1]
                mirror = range(width - columns.stop, width - columns.start)
                words = [[width - 1 - c for c in word] for word in words_in(flipped, candidates[:, ::-1], row, mirror)]
            counts = [(int(targets[row, word].sum()), len(word)) for word in words]
            cut = [word for word, (taken, size) in zip(words, counts, strict=True) if 0 < taken < size]
            assert len(cut) <= 1
            for word in cut:  # what is left of a word is its beginning
                assert np.diff(targets[row, word].astype(int)).max() <= 0
            num_cut += len(cut)
            num_whole += sum(taken == size > 1 for taken, size in counts)
    assert 0 < num_cut < num_whole / 5


def test_word_spans_hold_runs_of_words():
    rows, candidates, _ = make_rows([512] * 100, special_share=0.0)
    targets = sample_targets(rows, candidates=candidates, parts=RowParts.of(rows.valid, halves=True), unit="word")
    runs = 0
    for row in range(100):
        words = words_in(rows, candidates, row, range(511))
        hit = np.array([targets[row, word].any() for word in words])
        runs += (hit[1:] & hit[:-1]).sum() / hit.sum()
    # Of words drawn one by one a sixth would be followed by another; of spans, mean 2.19, more than half are.
    assert 0.35 < runs / 100 < 0.65


@pytest.mark.parametrize("perm_size", [None, 1, 4, 7, 64])
@pytest.mark.parametrize("halves", [True, False])
def test_blocks_follow_each_other_and_repeat_one_permutation(perm_size, halves):
    lengths = [64, 63, 28, 11, 5, 2, 1, 0]
    rows, _, _ = make_rows(lengths)
    order = random_order(rows.keys, parts=RowParts.of(rows.valid, halves=halves), perm_size=perm_size)
    for row, length in enumerate(lengths):
        ends = []
        for columns in halves_of(length, halves=halves):
            ranks, bases = order.ranks[row, columns], order.bases[row, columns]
            if not len(columns):
                continue
            assert len(set(bases.tolist())) == 1 and (not ends or bases[0] > ends[0])
            ends.append(int((bases + ranks).max()))
            size = len(columns) if perm_size is None else min(perm_size, len(columns))
            assert sorted(ranks[:size]) == list(range(size))
            for place, rank in enumerate(ranks.tolist()):
                assert rank == place // size * size + ranks[place % size]
    if perm_size is None:
        assert not np.array_equal(order.ranks[0, :32], order.ranks[0, 32:])


def official_table(i: int, j: int, *, ranks, targets, functional, border: int) -> bool:
    """Whether the query at `i` sees the content of `j`, cell by cell of the official table."""
    if (i < border) != (j < border):
        return i >= border
    if not (targets[j] or functional[j]):
        return True
    if targets[i]:
        return ranks[j] < ranks[i]
    return bool(functional[i]) and ranks[j] <= ranks[i]


@pytest.mark.parametrize("perm_size", [None, 4])
@pytest.mark.parametrize("halves", [True, False])
def test_ranks_give_the_official_mask(perm_size, halves):
    lengths = [40, 33, 16, 7, 3]
    rows, candidates, functional = make_rows(lengths, special_share=0.15, width=44)
    parts = RowParts.of(rows.valid, halves=halves)
    targets = sample_targets(rows, candidates=candidates, parts=parts, context_factor=3)
    order = random_order(rows.keys, parts=parts, perm_size=perm_size)
    key_ranks, thresholds = visibility(order, targets=targets, functional=functional, valid=rows.valid)
    assert (key_ranks[~rows.valid] == PADDING_RANK).all()
    sees = key_ranks[:, None, :] < thresholds[:, :, None]
    for row, length in enumerate(lengths):
        assert not sees[row, :, length:].any() and not sees[row, length:].any()
        table = {"ranks": order.ranks[row], "targets": targets[row], "functional": functional[row]}
        border = (length + 1) // 2 if halves else 0
        wanted = [[official_table(i, j, border=border, **table) for j in range(length)] for i in range(length)]
        assert np.array_equal(sees[row, :length, :length], wanted)


def closure(content: np.ndarray) -> np.ndarray:
    """What each content position depends on through any number of layers."""
    reach = content
    for _ in range(8):
        reach = (reach.astype(np.int64) @ reach.astype(np.int64)) > 0
    return reach


@pytest.mark.parametrize("unit", ["official", "word"])
@pytest.mark.parametrize("perm_size", [None, 5])
def test_no_target_depends_on_itself_or_on_later_ones_and_no_first_half_on_a_second(unit, perm_size):
    lengths = [61, 40, 12, 5]
    rows, candidates, functional = make_rows(lengths, special_share=0.15)
    parts = RowParts.of(rows.valid, halves=True)
    targets = sample_targets(rows, candidates=candidates, parts=parts, unit=unit, context_factor=3)
    order = random_order(rows.keys, parts=parts, perm_size=perm_size)
    key_ranks, thresholds = visibility(order, targets=targets, functional=functional, valid=rows.valid)
    for row, length in enumerate(lengths):
        query = key_ranks[row, None, :length] < thresholds[row, :length, None]
        reach = closure(query | np.eye(length, dtype=bool))
        depends = (query.astype(int) @ reach.astype(int)) > 0  # a query at i, through the contents that it sees
        border = (length + 1) // 2
        assert not reach[:border, border:].any()
        if length > 5:
            assert reach[border:, :border].all()
        for i in np.flatnonzero(targets[row]):
            for j in np.flatnonzero(targets[row]):
                if (i < border) == (j < border):
                    assert depends[i, j] == (order.ranks[row, j] < order.ranks[row, i])
                else:
                    assert depends[i, j] == (j < border)


def test_draws_depend_on_the_row_alone():
    lengths = [50, 33, 9, 4]
    together, candidates, functional = make_rows(lengths)
    wide, wide_candidates, _ = make_rows(lengths, width=90)
    for unit in ("official", "word"):
        for halves in (True, False):
            parts, wide_parts = (RowParts.of(rows.valid, halves=halves) for rows in (together, wide))
            targets = sample_targets(together, candidates=candidates, parts=parts, unit=unit)
            wide_targets = sample_targets(wide, candidates=wide_candidates, parts=wide_parts, unit=unit)
            assert np.array_equal(wide_targets[:, :50], targets) and not wide_targets[:, 50:].any()
            for size in (None, 4):
                order, wide_order = (
                    random_order(together.keys, parts=some, perm_size=size) for some in (parts, wide_parts)
                )
                for name in ("ranks", "bases"):
                    mine, other = getattr(order, name), getattr(wide_order, name)
                    assert np.array_equal(mine[together.valid], other[:, :50][together.valid])


def test_reuse_len_is_the_border():
    rows, candidates, functional = make_rows([30, 8, 5])
    parts = RowParts.of(rows.valid, halves=True, reuse_len=8)
    assert parts.sizes.tolist() == [[8, 22], [8, 0], [5, 0]]
    targets = sample_targets(rows, candidates=candidates, parts=parts)
    assert targets[0, :8].sum() == 1 and targets[0, 8:].sum() == 4  # 5 targets, shared by size
    order = random_order(rows.keys, parts=parts)
    key_ranks, thresholds = visibility(order, targets=targets, functional=functional, valid=rows.valid)
    sees = key_ranks[0, None, :] < thresholds[0, :, None]
    assert not sees[:8, 8:].any() and sees[8:, :8].all()


def test_given_targets_and_order():
    valid = np.arange(6) < np.array([6, 4, 0])[:, None]
    targets = given_targets([[5, 0], [], []], valid=valid)
    assert [np.flatnonzero(row).tolist() for row in targets] == [[0, 5], [], []]
    ranks = given_ranks([[2, 0, 1, 5, 4, 3], np.array([3, 2, 1, 0]), []], valid=valid)
    assert ranks.tolist() == [[1, 2, 0, 5, 4, 3], [3, 2, 1, 0, 0, 0], [0] * 6]
    for halves in (True, False):
        order = given_order(ranks, parts=RowParts.of(valid, halves=halves))
        assert np.array_equal(order.ranks, ranks)
        assert (order.bases[0] == ([0, 0, 0, 7, 7, 7] if halves else 0)).all()
    for wrong in ([6], [-1]):
        with pytest.raises(InputError, match=rf"targets holds {wrong[0]} in an example of 6 tokens"):
            given_targets([wrong, [], []], valid=valid)
    for wrong in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5, 6]):
        with pytest.raises(InputError, match="order=.* is no order of an example of 6 tokens"):
            given_ranks([wrong, [0, 1, 2, 3], []], valid=valid)
