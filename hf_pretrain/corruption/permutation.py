"""Permutation language modelling: factorisation orders, and the tokens that are predicted.

An order says which tokens see which, as two integers a token: position `i` sees the content of `j` iff
`key_ranks[j] < thresholds[i]`; the content stream also sees itself. A row is cut into parts: two halves, of which the
first never sees the second and may therefore be kept as memory, or one whole. `sample_targets` then chooses spans with
context around them in each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from hf_pretrain.corruption.rows import ExampleRows, RowKeys
from hf_pretrain.corruption.selection import (
    WordTable,
    order_keys,
    partition_words,
    sorted_positions,
    take_smallest,
    token_budgets,
)
from hf_pretrain.corruption.spans import ngram_lengths
from hf_pretrain.errors import InputError

PADDING_RANK = 1 << 30
"""Key rank of padding: above every threshold, so that no token sees it."""


_HALF = np.uint64(32)
_LOW_HALF = np.uint64((1 << 32) - 1)


@dataclass(frozen=True)
class RowParts:
    """The parts of each row, `P` a row: two halves or one whole. Token `i` of a row lies in column `i`.

    Attributes:
        starts: `[B, P]` int64, first column of each part.
        sizes: `[B, P]` int64, tokens of each part; a part may be empty.
        width: Columns of a row, `L`.
    """

    starts: np.ndarray
    sizes: np.ndarray
    width: int

    @classmethod
    def of(cls, valid: np.ndarray, *, halves: bool, reuse_len: int | None = None) -> RowParts:
        """Cut rows into parts.

        Args:
            valid: `[B, L]` bool, the tokens of left-aligned rows.
            halves: Whether to cut at all.
            reuse_len: Tokens of the first half; None for half of each row's tokens, rounded up.
        """
        lengths = np.count_nonzero(valid, axis=1)
        if not halves:
            return cls(
                starts=np.zeros((len(lengths), 1), dtype=np.int64), sizes=lengths[:, None], width=valid.shape[1]
            )
        borders = (lengths + 1) // 2 if reuse_len is None else np.minimum(lengths, reuse_len)
        starts = np.column_stack([np.zeros_like(borders), borders])
        return cls(starts=starts, sizes=np.column_stack([borders, lengths - borders]), width=valid.shape[1])

    def __len__(self) -> int:
        """Return the number of parts of all rows, `N`."""
        return self.sizes.size

    @property
    def span(self) -> int:
        """Tokens of the longest part, `W`, at least 1."""
        return max(int(self.sizes.max()), 1)

    @property
    def filled(self) -> np.ndarray:
        """Return which offsets of each part hold a token: `[N, W]` bool."""
        return np.arange(self.span) < self.sizes.reshape(-1, 1)

    def positions(self, backward: np.ndarray | None = None) -> np.ndarray:
        """Return the flat position `row * L + column` of each offset in each part: `[N, W]` int64.

        Args:
            backward: `[B]` bool, rows stored in reverse, whose parts are to be read from their end; None for none.

        Returns:
            The positions; where an offset has no token they are in range and mean nothing.
        """
        offsets, ends = np.arange(self.span), self.sizes[..., None] - 1
        if backward is None or not backward.any():
            columns = self.starts[..., None] + offsets
        else:
            columns = self.starts[..., None] + np.where(backward[:, None, None], ends - offsets, offsets)
        columns = np.clip(columns, 0, self.width - 1)
        return (columns + np.arange(len(columns))[:, None, None] * self.width).reshape(len(self), -1)

    def of_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Return for each column the number of its part, 0 or 1, and its offset in the part: `[B, L]` int64 each."""
        columns = np.arange(self.width)
        if self.sizes.shape[1] == 1:
            return np.zeros((len(self.sizes), self.width), dtype=np.int64), np.tile(columns, (len(self.sizes), 1))
        borders = self.starts[:, 1:]
        part = (columns >= borders).astype(np.int64)
        return part, columns - borders * part


@dataclass(frozen=True)
class FactorisationOrder:
    """Ranks of the tokens of a batch.

    Attributes:
        ranks: `[B, L]` int64, from 0, distinct among the tokens of a part; the first is predicted first.
        bases: `[B, L]` int64, added to the ranks of a part to lift them above those of the part before.
    """

    ranks: np.ndarray
    bases: np.ndarray


def random_order(keys: RowKeys, *, parts: RowParts, perm_size: int | None = None) -> FactorisationOrder:
    """Draw an order for each part.

    Args:
        keys: Keys of the draws.
        parts: The parts of the rows.
        perm_size: If given, a part is cut into blocks of so many tokens, which come one after the other from left to
            right; inside them one permutation is repeated. None for one block.

    Returns:
        The order.

    Source:
        XLNet (Yang et al. 2019, section 2.2); `_local_perm` of the official `data_utils.py`.
    """
    blocks = np.maximum(parts.sizes if perm_size is None else np.minimum(parts.sizes, perm_size), 1)
    longest = int(blocks.max())
    bits = keys.bits("permutation_order", length=parts.width).ravel()[parts.positions()[:, :longest]]
    permutations = sorted_positions(order_keys(bits, candidates=np.arange(longest) < blocks.reshape(-1, 1)))
    part, offsets = parts.of_columns()
    index = part + np.arange(len(part))[:, None] * parts.sizes.shape[1]
    inside = offsets if perm_size is None else offsets % blocks.ravel()[index]
    # Columns of padding look up any value, which is not read.
    ranks = permutations.take(index * longest + inside, mode="clip")
    ranks += offsets - inside
    capacities = -(-parts.sizes[:, :1] // blocks[:, :1]) * blocks[:, :1]
    return FactorisationOrder(ranks=ranks, bases=part * (capacities + 1))


def given_order(ranks: np.ndarray, *, parts: RowParts) -> FactorisationOrder:
    """Order each part by given ranks.

    Args:
        ranks: `[B, L]` int64, a permutation of the columns of each row's tokens.
        parts: The parts of the rows.

    Returns:
        The order; between parts their order comes first.
    """
    part, _ = parts.of_columns()
    return FactorisationOrder(ranks=ranks, bases=part * (parts.sizes.sum(axis=1, keepdims=True) + 1))


def visibility(
    order: FactorisationOrder, *, targets: np.ndarray, functional: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return key ranks and thresholds: which tokens see which in an order.

    In a part, ordinary tokens see each other. A target sees them and the targets and functional tokens before it in the
    order, not itself; a functional token also sees itself. No ordinary token sees a target or a functional token, which
    would pass on what it has seen. The second half sees all of the first, the first nothing of the second.

    Args:
        order: The factorisation order.
        targets: `[B, L]` bool, the tokens to predict, none of them functional.
        functional: `[B, L]` bool, the separator and classification tokens.
        valid: `[B, L]` bool, False at padding.

    Returns:
        `key_ranks` and `thresholds`, `[B, L]` int64 each; at padding `PADDING_RANK`, which no token sees, and 0.

    Source:
        `_local_perm` and `_convert_example` of the official `data_utils.py`.
    """
    own = order.bases + order.ranks
    own += 1
    ranked = targets | functional
    key_ranks = np.where(ranked, own, order.bases)
    thresholds = np.where(ranked, own + functional, order.bases + 1)
    key_ranks[~valid] = PADDING_RANK
    thresholds[~valid] = 0
    return key_ranks, thresholds


def part_budgets(candidates: np.ndarray, *, parts: RowParts, context_factor: float) -> np.ndarray:
    """Return how many targets each part gets.

    A row has the share `1 / context_factor` of its own length, at least one; the parts share it by their sizes, the
    first gets the half target that is left over. Where a part has too few candidates, the other takes the rest.

    Args:
        candidates: `[B, L]` bool, the tokens that may be predicted.
        parts: The parts of the rows.
        context_factor: Tokens a target.

    Returns:
        `[B, P]` int64.
    """
    lengths = parts.sizes.sum(axis=1)
    totals = token_budgets(candidates, lengths=lengths, probability=1 / context_factor)
    if parts.sizes.shape[1] == 1:
        return totals[:, None]
    in_first = np.arange(parts.width) < parts.sizes[:, :1]
    available = np.count_nonzero(candidates & in_first, axis=1)
    available_second = np.count_nonzero(candidates, axis=1) - available
    first = (2 * totals * parts.sizes[:, 0] + lengths) // np.maximum(2 * lengths, 1)
    first = np.minimum(np.maximum(first, totals - available_second), available)
    return np.column_stack([first, totals - first])


def sample_targets(
    rows: ExampleRows,
    *,
    candidates: np.ndarray,
    parts: RowParts,
    unit: Literal["official", "word"] = "official",
    context_factor: float = 6.0,
    max_span_length: int = 5,
    backward: np.ndarray | None = None,
) -> np.ndarray:
    """Choose the targets of each part: spans, then tokens (words) at random until the budget is met exactly.

    A span of `n` tokens, `P(n)` proportional to `1 / n`, gets `floor(context_factor * n)` tokens of context, a random
    share of it on its left; its start then moves right to the next word start, and the window of the next span begins
    where this one ends. Where less is left of the budget than `n`, the span is shorter.

    "official" is the official code's rule: a span is `n` sub-word tokens, whatever words they belong to, and one that
    would touch the end of its part is left out. "word" does the same with words instead of tokens, also when it
    fills up; one word a part may be cut, where the budget is met.

    Args:
        rows: The examples, with `word_starts`.
        candidates: `[B, L]` bool, the tokens that may be predicted.
        parts: The parts of the rows.
        unit: What spans are made of.
        context_factor: `K`: of a row, `1 / K` are targets.
        max_span_length: Most tokens (words) of a span.
        backward: `[B]` bool, rows stored in reverse, in whose parts spans are laid from the end; None for none.

    Returns:
        `[B, L]` bool.

    Source:
        XLNet (Yang et al. 2019, section 3.1); `_sample_mask` of the official `data_utils.py`.
    """
    assert rows.word_starts is not None, "the rows were stacked without words"
    positions = parts.positions(backward)
    is_open = candidates.ravel()[positions] & parts.filled
    starts = rows.word_starts.ravel()[positions] | ~is_open
    fill_bits = rows.bits("permutation_fill").ravel()[positions]
    budgets = part_budgets(candidates, parts=parts, context_factor=context_factor).ravel()
    windows = _draw_windows(
        rows, budgets=budgets, parts=parts, context_factor=context_factor, max_span_length=max_span_length
    )
    if unit == "official":
        chosen = _lay_spans(windows, starts=starts, ends=parts.sizes.ravel() - 1) & is_open
    else:
        words = partition_words(starts, maskable=is_open)
        chosen = _lay_word_spans(windows, words=words, filled=parts.filled) & is_open
        chosen &= np.cumsum(chosen, axis=1) <= budgets[:, None]
        # The tokens of a word share one draw, so that they come one after the other in the order of filling.
        fill_bits = fill_bits.ravel()[words.first_positions(np.arange(fill_bits.size))].reshape(fill_bits.shape)
    missing = budgets - np.count_nonzero(chosen, axis=1)
    chosen |= take_smallest(order_keys(fill_bits, candidates=is_open & ~chosen), counts=missing)
    targets = np.zeros(rows.valid.size, dtype=np.bool_)
    targets[positions[chosen]] = True
    return targets.reshape(rows.valid.shape)


class _Windows(NamedTuple):
    """Spans with their context, `[S, N]` int64 each: the `S` windows of each part, one after the other.

    `lengths` is what the span covers, `lefts` the context before it, `advances` how far the window ends behind its start.
    """

    lengths: np.ndarray
    lefts: np.ndarray
    advances: np.ndarray


def _draw_windows(
    rows: ExampleRows, *, budgets: np.ndarray, parts: RowParts, context_factor: float, max_span_length: int
) -> _Windows:
    """Draw as many windows as can fit into a part; their spans together cover no more than the budget."""
    num_rows, num_parts = parts.sizes.shape
    num_windows = parts.span // (1 + int(context_factor)) + 1
    bits = rows.keys.bits("permutation_spans", length=num_windows * num_parts)
    bits = bits.reshape(num_rows, num_windows, num_parts).transpose(1, 0, 2).reshape(num_windows, -1)
    available = np.full(bits.shape, max_span_length)
    lengths = ngram_lengths((bits >> _HALF) * 2.0**-32, available=available, max_ngram=max_span_length)
    lengths = np.clip(budgets - (np.cumsum(lengths, axis=0) - lengths), 0, lengths)
    contexts = (context_factor * lengths).astype(np.int64)
    lefts = ((bits & _LOW_HALF) * contexts.view(np.uint64) >> _HALF).view(np.int64)
    return _Windows(lengths=lengths, lefts=lefts, advances=lengths + contexts - lefts)


def _lay_spans(windows: _Windows, *, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Lay the spans of windows into parts.

    Args:
        windows: The windows.
        starts: `[N, W]` bool, where a span may start.
        ends: `[N]`, the offset at which a part ends; a span that goes beyond is left out.

    Returns:
        `[N, W]` bool, what the spans cover.
    """
    num_parts, width = starts.shape
    lengths, lefts, advances = windows
    # A part's stretch of the table is wider than the part: entries behind its end lead back to the end.
    stretch = width + int(lefts.max() + advances.max()) + 1
    table = np.full((num_parts, stretch), width)
    firsts = np.where(starts, np.arange(width), width)
    table[:, :width] = np.minimum.accumulate(firsts[:, ::-1], axis=1)[:, ::-1]
    origins = np.arange(num_parts) * stretch
    table += origins[:, None]
    begins, current = np.empty_like(lengths), origins
    for step in range(len(lengths)):
        table.take(current + lefts[step], out=begins[step], mode="clip")
        current = begins[step] + advances[step]
    begins -= origins
    lengths = np.where(begins + lengths <= ends, lengths, 0)
    begins += np.arange(num_parts) * width
    covered = np.zeros(starts.size, dtype=np.bool_)
    for offset in range(int(lengths.max())):
        covered[begins[lengths > offset] + offset] = True
    return covered.reshape(starts.shape)


def _lay_word_spans(windows: _Windows, *, words: WordTable, filled: np.ndarray) -> np.ndarray:
    """Lay spans of words, as `_lay_spans` lays spans of tokens. `filled` is `[N, W]` bool: which offsets hold a token."""
    width = filled.shape[1]
    word_of = words.word_of.reshape(filled.shape) - words.word_of[::width, None]
    ends = np.where(filled, word_of + 1, 0).max(axis=1)
    covered = _lay_spans(windows, starts=np.ones(filled.shape, dtype=np.bool_), ends=ends)
    return np.take_along_axis(covered, word_of, axis=1)


def given_targets(columns: Sequence[Any], *, valid: np.ndarray) -> np.ndarray:
    """Mark the targets that the data gives.

    Args:
        columns: For each example, the positions of the tokens to predict.
        valid: `[B, L]` bool, the tokens of the examples, left-aligned.

    Returns:
        `[B, L]` bool.

    Raises:
        InputError: If a position is not in its example.
    """
    rows = np.repeat(np.arange(len(columns)), [len(column) for column in columns])
    positions = np.concatenate([np.asarray(column, dtype=np.int64) for column in columns])
    lengths = np.count_nonzero(valid, axis=1)[rows]
    wrong = np.flatnonzero((positions < 0) | (positions >= lengths))
    if wrong.size:
        position, length = positions[wrong[0]], lengths[wrong[0]]
        raise InputError(
            f"targets holds {position} in an example of {length} tokens: give positions from 0 to {length - 1}"
        )
    targets = np.zeros(valid.shape, dtype=np.bool_)
    targets[rows, positions] = True
    return targets


def given_ranks(columns: Sequence[Any], *, valid: np.ndarray) -> np.ndarray:
    """Return the rank of each token in the order that the data gives.

    Args:
        columns: For each example, the positions of all its tokens, in the order of prediction.
        valid: `[B, L]` bool, the tokens of the examples, left-aligned.

    Returns:
        `[B, L]` int64, 0 at padding.

    Raises:
        InputError: If an order does not name each token once.
    """
    ranks = np.zeros(valid.shape, dtype=np.int64)
    for row, (column, length) in enumerate(zip(columns, np.count_nonzero(valid, axis=1).tolist(), strict=True)):
        order = np.asarray(column, dtype=np.int64)
        if not np.array_equal(np.sort(order), np.arange(length)):
            raise InputError(
                f"order={order.tolist()} is no order of an example of {length} tokens: name each position from 0 to "
                f"{length - 1} once"
            )
        ranks[row, order] = np.arange(length)
    return ranks
