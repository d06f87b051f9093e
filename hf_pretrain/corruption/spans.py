"""Choosing units of several words: n-grams (ALBERT), spans (SpanBERT) and spans that the data gives.

These are sequential rules: a unit depends on the units taken before. They run one unit at a time, but on all rows of
the batch at once. `span_boundary_targets` then lists what the boundaries of masked spans predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_pretrain.corruption.rows import ExampleRows
from hf_pretrain.corruption.selection import (
    Selection,
    WordTable,
    by_row,
    order_keys,
    sorted_positions,
    to_uniforms,
)

# How many steps are prepared at once; a step needs some ten small array operations beyond that.
_SPANS_AHEAD = 16
_RUNS_AHEAD = 8
# How many runs of a row are tried at once while all fit the budget, and how many that must have been to try it again.
_RUNS_AT_ONCE = 24
_WORTH_ANOTHER_ROUND = 12


def geometric_lengths(probability: float, *, longest: int, mode: str = "renormalise") -> np.ndarray:
    """Return the cumulative distribution of span lengths 1 to `longest`: `[longest]` float64.

    Args:
        probability: Parameter of the geometric distribution.
        longest: Greatest length.
        mode: "renormalise" drops longer spans (mean 3.797 at .2 and 10), "clip" makes them `longest` (mean 4.463).

    Returns:
        The distribution; its last entry is 1.

    Source:
        SpanBERT (Joshi et al. 2020, section 3.1).
    """
    cumulative = 1 - (1 - probability) ** np.arange(1, longest + 1, dtype=np.float64)
    if mode == "clip":
        cumulative[-1] = 1
    return cumulative / cumulative[-1]


def draw_lengths(uniforms: np.ndarray, *, cumulative: np.ndarray) -> np.ndarray:
    """Map uniforms in [0, 1) to lengths from 1 of a cumulative distribution; int64 of the same shape."""
    return np.searchsorted(cumulative, uniforms, side="right") + 1


def ngram_lengths(
    uniforms: np.ndarray, *, available: np.ndarray, max_ngram: int, shares: Sequence[float] | None = None
) -> np.ndarray:
    """Draw n with probability proportional to 1/n, or to given shares, among 1 to `min(max_ngram, available)`.

    Args:
        uniforms: In [0, 1), of any shape.
        available: Words available, from 1, of the same shape.
        max_ngram: Greatest n.
        shares: Weights of 1 to `max_ngram`; 1/n if not given.

    Returns:
        int64 of the same shape.

    Source:
        ALBERT (Lan et al. 2020, section 4.1).
    """
    most = np.minimum(available, max_ngram)
    cumulative = np.cumsum(1 / np.arange(1, max_ngram + 1) if shares is None else shares)
    scaled = uniforms * cumulative[most - 1]
    lengths = np.ones(uniforms.shape, dtype=np.int64)
    for bound in cumulative[:-1]:
        lengths += scaled >= bound
    return np.minimum(lengths, most)


def select_spans(
    bits: np.ndarray,
    length_bits: np.ndarray,
    *,
    words: WordTable,
    maskable: np.ndarray,
    probability: float | np.ndarray,
    lengths: np.ndarray,
) -> Selection:
    """Select spans of words until exactly `ceil(p * n)` of the `n` candidate tokens of each row are covered.

    Each span starts at the word of a token drawn uniformly from those not yet covered, covers a drawn number of words,
    ends before a special token, and is cut, inside a word if need be, where the budget is met. Walking through the
    tokens in one random order and passing over the covered ones is the same draw: among the tokens not yet covered
    every order is still equally likely.

    Args:
        bits: `[B, L]` uint64 random bits for the order.
        length_bits: `[B, L]` uint64 random bits for the length of a span drawn at a token.
        words: The words of the batch.
        maskable: `[B, L]` bool, the candidates.
        probability: `p`, one for all rows or `[B]`.
        lengths: Cumulative distribution of the number of words, from `geometric_lengths`.

    Returns:
        The selection; overlapping or touching spans are one unit.

    Source:
        SpanBERT (Joshi et al. 2020, section 3.1).
    """
    num_rows, width = maskable.shape
    row_starts = np.arange(num_rows) * width
    remaining = np.ceil(probability * np.count_nonzero(maskable, axis=1) - 1e-9).astype(np.int64)
    anchors = sorted_positions(order_keys(bits, candidates=maskable)).T + row_starts
    run_ends, flat_length_bits = words.run_ends(), length_bits.ravel()
    covered = np.zeros(num_rows * width + width, dtype=np.bool_)
    for block in range(0, width, _SPANS_AHEAD):
        anchor = anchors[block : block + _SPANS_AHEAD]
        word = words.word_of[anchor]
        num_words = draw_lengths(to_uniforms(flat_length_bits[anchor]), cumulative=lengths)
        start = words.bounds[word]
        size = words.bounds[np.minimum(word + num_words, run_ends[word])] - start
        offsets = np.arange(size.max())
        reach, inside = start[..., None] + offsets, offsets < size[..., None]
        for step in range(len(anchor)):
            live = (remaining > 0) & ~covered[anchor[step]]
            new = inside[step] & ~covered[reach[step]] & live[:, None]
            new &= np.cumsum(new, axis=1) <= remaining[:, None]
            covered[reach[step][new]] = True
            remaining -= np.count_nonzero(new, axis=1)
        if not remaining.any():
            break
    return Selection.merged(covered[: num_rows * width].reshape(num_rows, width))


def take_runs(
    firsts: np.ndarray, sizes: np.ndarray, *, bounds: np.ndarray, budgets: np.ndarray, shorten: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Take runs of slots in the given order while the budget lasts; a run that overlaps a taken one is skipped.

    Slots are words or tokens. A run over the rest of the budget is skipped, or, with `shorten`, first tried with
    fewer slots. A row with a budget in which no run fits takes its smallest run.

    Args:
        firsts: `[B, C]` int64, first slot of each run, in the order of trial.
        sizes: `[B, C]` int64, slots of each run, 0 where there is none.
        bounds: `[S + 1]` int64, token at which each slot starts.
        budgets: `[B]`, tokens.
        shorten: Whether a run may be shortened to fit.

    Returns:
        `[S]` bool, the slots taken, and `[S]` bool, the slots at which a taken run starts.
    """
    num_slots, longest = len(bounds) - 1, int(sizes.max(initial=1))
    taken = np.zeros(num_slots + longest, dtype=np.bool_)
    begun = np.zeros(num_slots, dtype=np.bool_)
    bounds = np.append(bounds, np.full(longest, bounds[-1]))
    remaining, offsets = budgets.copy(), np.arange(longest)
    width = firsts.shape[1]
    tried = _take_while_all_fit(firsts, sizes, bounds=bounds, remaining=remaining, taken=taken, begun=begun)
    rows = np.flatnonzero((remaining > 0) & (tried < width))
    while rows.size:
        columns = tried[rows] + np.arange(_RUNS_AHEAD)[:, None]
        chosen = rows, np.minimum(columns, width - 1)
        first, size = firsts[chosen], np.where(columns < width, sizes[chosen], 0)
        budget = remaining[rows]
        reach, inside = first[..., None] + offsets, offsets < size[..., None]
        tokens = bounds[reach + 1] - bounds[reach]
        totals = np.cumsum(tokens * inside, axis=2)
        totals = np.where(inside, totals if shorten else totals[..., -1:], bounds[-1] + 1)
        for step in range(len(first)):
            fits = totals[step] <= budget[:, None]
            fits &= ~(fits & taken[reach[step]]).any(axis=1, keepdims=True)
            taken[reach[step][fits]] = True
            begun[first[step][fits[:, 0]]] = True
            budget -= (tokens[step] * fits).sum(axis=1)
        remaining[rows] = budget
        tried += _RUNS_AHEAD
        rows = rows[(budget > 0) & (tried[rows] < width)]
        # Only rows in which a run may still fit go on.
        rows = rows[remaining[rows] >= _cheapest(firsts[rows], sizes[rows], bounds=bounds, shorten=shorten)[1]]
    rows = np.flatnonzero((remaining == budgets) & (budgets > 0) & sizes.any(axis=1))
    if rows.size:
        cheapest, _ = _cheapest(firsts[rows], sizes[rows], bounds=bounds, shorten=shorten)
        for first, size in zip(firsts[rows, cheapest], sizes[rows, cheapest], strict=True):
            begun[first] = taken[first : first + (1 if shorten else size)] = True
    return taken[:num_slots], begun


def _cheapest(
    firsts: np.ndarray, sizes: np.ndarray, *, bounds: np.ndarray, shorten: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return which run of each row takes the fewest tokens, shortened if it may be, and how many: int64 `[B]` both."""
    costs = bounds[firsts + (np.minimum(sizes, 1) if shorten else sizes)] - bounds[firsts]
    costs[costs == 0] = bounds[-1] + 1
    cheapest = costs.argmin(axis=1)
    return cheapest, costs[np.arange(len(costs)), cheapest]


def _take_while_all_fit(
    firsts: np.ndarray,
    sizes: np.ndarray,
    *,
    bounds: np.ndarray,
    remaining: np.ndarray,
    taken: np.ndarray,
    begun: np.ndarray,
) -> np.ndarray:
    """Take runs from the first on, many at once, as long as each would fit the budget; write into the last three arguments.

    There only overlaps decide, and the earlier of two runs wins: in turn, all runs are taken that come first at each of their
    slots, and those that overlap them drop out.

    Returns:
        `[B]` int64, how many runs of each row have been tried.
    """
    width, longest = firsts.shape[1], len(taken) - len(begun)
    rows, tried = np.arange(len(firsts))[:, None], np.zeros(len(firsts), dtype=np.int64)
    owner = np.empty(len(taken), dtype=np.int64)
    while (tried < width).any():
        columns = tried[:, None] + np.arange(min(_RUNS_AT_ONCE, width))
        chosen = rows, np.minimum(columns, width - 1)
        first, size = firsts[chosen], np.where(columns < width, sizes[chosen], 0)
        # Behind its end, a run has its first slot again.
        reach = first[..., None] + np.arange(longest) * (np.arange(longest) < size[..., None])
        costs = bounds[first + size] - bounds[first]
        is_open = (size > 0) & ~taken[reach].any(axis=2)
        before = np.cumsum(costs * is_open, axis=1) - costs * is_open
        fits = np.logical_and.accumulate(before + costs <= remaining[:, None], axis=1)
        # Backwards, as of several writers the last one stays.
        row, column = (index[::-1] for index in np.nonzero(is_open & fits))
        reach, costs, num_open = reach[row, column], costs[row, column], len(row)
        while len(row):
            number = np.arange(len(row))
            owner[reach.ravel()] = np.repeat(number, longest)
            wins = (owner[reach] == number[:, None]).all(axis=1)
            taken[reach[wins]] = begun[reach[wins, 0]] = True
            remaining -= np.bincount(row[wins], weights=costs[wins], minlength=len(firsts)).astype(np.int64)
            left = np.flatnonzero(~wins & ~taken[reach].any(axis=1))
            row, reach, costs = row[left], reach[left], costs[left]
        tried += np.count_nonzero(fits, axis=1)
        if num_open < _WORTH_ANOTHER_ROUND * len(firsts):
            break
    return tried


def select_ngrams(
    bits: np.ndarray,
    length_bits: np.ndarray,
    *,
    words: WordTable,
    budgets: np.ndarray,
    max_ngram: int,
    shares: Sequence[float] | None = None,
) -> Selection:
    """Select n-grams of words, n drawn with probability proportional to 1/n or by shares; the budget is never exceeded.

    The words are tried in random order as starts. An n-gram over budget is tried with fewer words; one that overlaps a
    taken one is skipped. Words left over once all starts were tried are then tried alone. A row in which no word fits
    its budget gets its shortest word.

    Args:
        bits: `[B, L]` uint64 random bits for the order.
        length_bits: `[B, L]` uint64 random bits for n at a start.
        words: The words of the batch.
        budgets: `[B]`, tokens.
        max_ngram: Greatest n.
        shares: Probabilities of 1 to `max_ngram`; in proportion to 1/n if not given.

    Returns:
        The selection; each n-gram is a unit.

    Source:
        ALBERT (Lan et al. 2020, section 4.1); the treatment of budget and overlap follows its repository.
    """
    num_rows, width = bits.shape
    num_candidates = np.count_nonzero(words.begins, axis=1)
    order = sorted_positions(order_keys(bits, candidates=words.begins))[:, : num_candidates.max()]
    order += np.arange(num_rows)[:, None] * width
    firsts = words.word_of[order]
    draws = to_uniforms(length_bits.ravel()[order])
    lengths = ngram_lengths(draws, available=words.run_ends()[firsts] - firsts, max_ngram=max_ngram, shares=shares)
    exists = np.arange(order.shape[1]) < num_candidates[:, None]
    lengths[~exists] = 0
    chosen, begun = take_runs(
        np.hstack([firsts, firsts]),
        np.hstack([lengths, exists.astype(np.int64)]),
        bounds=words.bounds,
        budgets=budgets,
        shorten=True,
    )
    starts = np.zeros(num_rows * width, dtype=np.bool_)
    starts[words.bounds[:-1][begun]] = True
    mask = np.repeat(chosen, words.sizes).reshape(num_rows, width)
    return Selection(mask=mask, unit_starts=starts.reshape(num_rows, width))


def select_given(bits: np.ndarray, *, spans: np.ndarray, maskable: np.ndarray, budgets: np.ndarray) -> Selection:
    """Select whole given spans in random order; one that overflows the budget or overlaps a taken one is skipped.

    Spans that hold a special token are no candidates. A row in which no span fits its budget gets its shortest one.

    Args:
        bits: `[B, C]` uint64 random bits, one a span of a row, `C` at least the most spans of a row.
        spans: `[S, 3]` int64 of (row, start, end), rows ascending.
        maskable: `[B, L]` bool, the positions that may be selected.
        budgets: `[B]`, tokens.

    Returns:
        The selection; each span is a unit.
    """
    rows, first, size, numbers = _given_table(spans, maskable=maskable)
    firsts, sizes = (np.zeros(bits.shape, dtype=np.int64) for _ in range(2))
    firsts[rows, numbers], sizes[rows, numbers] = first, size
    order = sorted_positions(order_keys(bits, candidates=sizes > 0))
    chosen, begun = take_runs(
        np.take_along_axis(firsts, order, axis=1),
        np.take_along_axis(sizes, order, axis=1),
        bounds=np.arange(maskable.size + 1),
        budgets=budgets,
        shorten=False,
    )
    return Selection(mask=chosen.reshape(maskable.shape), unit_starts=begun.reshape(maskable.shape))


def select_given_independently(
    bits: np.ndarray, *, spans: np.ndarray, maskable: np.ndarray, probability: float | np.ndarray
) -> Selection:
    """Select each given span with the probability of its row; a row may get none.

    Args:
        bits: `[B, C]` uint64 random bits, one a span of a row, `C` at least the most spans of a row.
        spans: `[S, 3]` int64 of (row, start, end), rows ascending.
        maskable: `[B, L]` bool, the positions that may be selected.
        probability: Of each span, one for all rows or `[B]`.

    Returns:
        The selection; each span is a unit, cut where another selected one starts inside it.
    """
    rows, first, size, numbers = _given_table(spans, maskable=maskable)
    chosen = (to_uniforms(bits[rows, numbers]) < by_row(probability, num_rows=len(bits))[rows]) & (size > 0)
    starts = np.zeros(maskable.size, dtype=np.bool_)
    starts[first[chosen]] = True
    depth = np.bincount(first[chosen], minlength=maskable.size + 1)
    depth -= np.bincount((first + size)[chosen], minlength=maskable.size + 1)
    mask = np.cumsum(depth)[:-1] > 0
    return Selection(mask=mask.reshape(maskable.shape), unit_starts=starts.reshape(maskable.shape))


def _given_table(spans: np.ndarray, *, maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return each given span's row, flat start, size (0 if it holds a special token) and number in the row."""
    rows, starts, ends = spans.T
    barred = np.append(0, np.cumsum(~maskable.ravel()))
    first, end = rows * maskable.shape[1] + starts, rows * maskable.shape[1] + ends
    size = np.where(barred[end] == barred[first], end - first, 0)
    return rows, first, size, np.arange(len(rows)) - np.searchsorted(rows, rows)


@dataclass(frozen=True)
class SpanBoundaryTargets:
    """Masked tokens that are predicted from the boundaries of their span.

    Attributes:
        rows: `[S]` int64, the example that a token is in.
        left: `[S]` int64, column of the last token before its span.
        right: `[S]` int64, column of the first token after it.
        offsets: `[S]` int64, index of the token in its span, from 0.
        labels: `[S]` int64, the original token.
    """

    rows: np.ndarray
    left: np.ndarray
    right: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray


def span_boundary_targets(
    rows: ExampleRows, *, mask: np.ndarray, ordinary: np.ndarray, span_positions: int
) -> SpanBoundaryTargets:
    """Return the tokens that the boundaries of masked spans predict.

    Spans that touch are one. A span beside a special token or padding, at the start or the end of a row, or with a neighbour in
    another isolated document has no two boundaries, and is left out. Tokens of a span beyond the last index are left out too.

    Args:
        rows: The examples, before masking.
        mask: `[B, L]` bool, the masked tokens.
        ordinary: `[B, L]` bool, the tokens that are neither special nor padding.
        span_positions: Most tokens of a span that are predicted.

    Returns:
        The targets in reading order.

    Source:
        SpanBERT (Joshi et al. 2020, section 3.2).
    """
    row, start, end = Selection.merged(mask).spans().T
    last = mask.shape[1] - 1
    inside = (start > 0) & (end <= last)
    left, right = np.maximum(start - 1, 0), np.minimum(end, last)
    inside &= ordinary[row, left] & ordinary[row, right]
    if rows.document_ids is not None:
        inside &= rows.document_ids[row, left] == rows.document_ids[row, right]
    row, start, left, right = row[inside], start[inside], left[inside], right[inside]
    sizes = np.minimum(end[inside] - start, span_positions)
    begins = np.cumsum(sizes) - sizes
    offsets = np.arange(sizes.sum()) - np.repeat(begins, sizes)
    rows_of_tokens = np.repeat(row, sizes)
    return SpanBoundaryTargets(
        rows=rows_of_tokens,
        left=np.repeat(left, sizes),
        right=np.repeat(right, sizes),
        offsets=offsets,
        labels=rows.input_ids[rows_of_tokens, np.repeat(start, sizes) + offsets],
    )
