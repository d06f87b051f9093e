"""Choosing the targets of masking: budgets, keyed orders, and the selection of tokens and words.

`WordTable` holds the words of a batch. Positions are flat there: `row * L + column`. Every row starts a word, so a batch
is one sequence of words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_POSITION_BITS = 24
_POSITIONS = np.uint64((1 << _POSITION_BITS) - 1)
_LAST = np.uint64(1 << 63)


@dataclass(frozen=True)
class WordTable:
    """The words of a batch in reading order.

    Special tokens and padding are words of their own, of one position each, and never candidates.

    Attributes:
        bounds: `[W + 1]` int64; word `w` covers the flat positions `bounds[w]` to `bounds[w + 1] - 1`.
        word_of: `[B * L]` int64, the word of each position.
        is_candidate: `[W]` bool, whether the word may be selected.
        begins: `[B, L]` bool, whether a candidate word starts here.
        borders: `[B, L]` bool, tokens to which no run of words may reach from the left; None if there are none.
    """

    bounds: np.ndarray
    word_of: np.ndarray
    is_candidate: np.ndarray
    begins: np.ndarray
    borders: np.ndarray | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Number of tokens of each word, `[W]` int64."""
        return np.diff(self.bounds)

    def first_positions(self, positions: np.ndarray) -> np.ndarray:
        """Return the flat positions at which the words of some flat positions start, of the same shape."""
        return self.bounds[self.word_of[positions]]

    def run_ends(self) -> np.ndarray:
        """Return for each word the index of the word that ends its run: `[W]` int64.

        A run is a stretch of candidate words inside one row and without a border inside. The run of candidate `w` is the
        words `w` to `run_ends[w] - 1`.
        """
        num_words = len(self.is_candidate)
        breaks = ~self.is_candidate
        breaks[self.word_of[:: self.begins.shape[1]]] = True
        if self.borders is not None:
            breaks[self.word_of[np.flatnonzero(self.borders)]] = True
        breaks = np.append(np.flatnonzero(breaks), num_words)
        # The first break at or before each word is the start of its stretch; the run ends at the next one.
        return np.repeat(breaks[1:], np.diff(breaks))


def partition_words(word_starts: np.ndarray, *, maskable: np.ndarray, borders: np.ndarray | None = None) -> WordTable:
    """Cut a batch into words.

    Args:
        word_starts: `[B, L]` bool, whether a token begins a word.
        maskable: `[B, L]` bool, False at special tokens and padding.
        borders: `[B, L]` bool, tokens at which a word begins in any case, such as the first of an isolated document.

    Returns:
        The words.
    """
    alone = ~maskable
    starts = word_starts | alone
    if borders is not None:
        starts |= borders
    starts[:, 1:] |= alone[:, :-1]
    starts[:, 0] = True
    positions = np.flatnonzero(starts)
    bounds = np.append(positions, starts.size)
    word_of = np.repeat(np.arange(len(positions)), np.diff(bounds))
    is_candidate = maskable.ravel()[positions]
    return WordTable(
        bounds=bounds, word_of=word_of, is_candidate=is_candidate, begins=starts & maskable, borders=borders
    )


@dataclass(frozen=True)
class Selection:
    """The targets of a batch.

    Attributes:
        mask: `[B, L]` bool, the selected positions.
        unit_starts: `[B, L]` bool, where a selected unit (token, word, n-gram, span) starts. Units are contiguous.
    """

    mask: np.ndarray
    unit_starts: np.ndarray

    def spans(self) -> np.ndarray:
        """Return the selected units in reading order: `[S, 3]` int64 of (row, start, end), the end exclusive."""
        is_last = self.mask.copy()
        is_last[:, :-1] &= ~self.mask[:, 1:] | self.unit_starts[:, 1:]
        rows, starts = np.nonzero(self.unit_starts)
        return np.column_stack([rows, starts, np.nonzero(is_last)[1] + 1])

    @classmethod
    def merged(cls, mask: np.ndarray) -> Selection:
        """Return the selection of `mask` where touching positions are one unit."""
        starts = mask.copy()
        starts[:, 1:] &= ~mask[:, :-1]
        return cls(mask=mask, unit_starts=starts)


def to_uniforms(bits: np.ndarray) -> np.ndarray:
    """Map `uint64` bits to uniform `float64` in [0, 1), of the same shape."""
    return (bits >> np.uint64(11)) * 2.0**-53


def by_row(probability: float | np.ndarray, *, num_rows: int) -> np.ndarray:
    """Return the probability of each row, `[num_rows]` float64, given as one number for all or as one a row."""
    return np.broadcast_to(np.asarray(probability, dtype=np.float64), (num_rows,))


def token_budgets(maskable: np.ndarray, *, lengths: np.ndarray, probability: float | np.ndarray) -> np.ndarray:
    """Return how many tokens to select in each row: `round(p * n)`, at least one, at most all candidates.

    Args:
        maskable: `[B, L]` bool, the candidates.
        lengths: `[B]`, the numbers `n` of real tokens, special ones included.
        probability: `p`, one for all rows or `[B]`; 0 selects nothing.

    Returns:
        `[B]` int64.

    Source:
        `create_masked_lm_predictions` of google-research/bert and `mask` of google-research/electra, without
        their caps.
    """
    wanted = np.maximum(np.rint(probability * lengths).astype(np.int64), 1)
    return np.where(np.asarray(probability) > 0, np.minimum(wanted, np.count_nonzero(maskable, axis=1)), 0)


def order_keys(bits: np.ndarray, *, candidates: np.ndarray) -> np.ndarray:
    """Turn random bits into sort keys that carry their position.

    Keys differ even where bits collide, so that "the k smallest" are exactly k, and sorting them gives a permutation
    at the price of a plain sort (an argsort costs twice as much). Other tokens come last.

    Args:
        bits: `[B, L]` uint64.
        candidates: `[B, L]` bool.

    Returns:
        `[B, L]` uint64.
    """
    columns = np.arange(bits.shape[1], dtype=np.uint64)
    keys = bits >> np.uint64(1)
    keys &= ~_POSITIONS
    keys |= columns
    return np.where(candidates, keys, columns | _LAST)


def sorted_positions(keys: np.ndarray) -> np.ndarray:
    """Return the columns of each row in the order of its keys, candidates first: `[B, L]` int64."""
    return (np.sort(keys, axis=1) & _POSITIONS).view(np.int64)


def take_smallest(keys: np.ndarray, *, counts: np.ndarray) -> np.ndarray:
    """Mark the `counts[b]` smallest of the distinct keys of each row: `[B, L]` bool."""
    thresholds = np.sort(keys, axis=1)[np.arange(len(keys)), np.maximum(counts, 1) - 1]
    chosen = keys <= thresholds[:, None]
    chosen[counts == 0] = False
    return chosen


def select_tokens(bits: np.ndarray, *, maskable: np.ndarray, budgets: np.ndarray) -> Selection:
    """Select exactly `budgets[b]` tokens of each row, uniformly without replacement.

    Args:
        bits: `[B, L]` uint64 random bits.
        maskable: `[B, L]` bool, the candidates.
        budgets: `[B]`, at most the number of candidates.

    Returns:
        The selection; each token is a unit.
    """
    mask = take_smallest(order_keys(bits, candidates=maskable), counts=budgets)
    return Selection(mask=mask, unit_starts=mask)


def fill_budgets(sizes: np.ndarray, *, budgets: np.ndarray) -> np.ndarray:
    """Take units in the given order, skipping each that would overflow the rest of the budget.

    Equal to going through the units one by one. A row with a budget in which no unit fits takes its smallest unit.

    Args:
        sizes: `[B, C]` int64, tokens of each unit in the order of trial; 0 where there is none.
        budgets: `[B]`, tokens.

    Returns:
        `[B, C]` bool, the units taken.
    """
    taken = np.zeros(sizes.shape, dtype=np.bool_)
    rows, open_sizes, remaining = np.arange(len(sizes)), sizes.copy(), budgets.copy()
    while rows.size:
        # A unit that does not fit now never will. Of the rest, all up to the first overflow are taken: that many fit in turn.
        open_sizes *= open_sizes <= remaining[:, None]
        fits = np.cumsum(open_sizes, axis=1) <= remaining[:, None]
        fits &= open_sizes > 0
        taken[rows] |= fits
        remaining -= (open_sizes * fits).sum(axis=1)
        open_sizes *= ~fits
        going = (remaining > 0) & open_sizes.any(axis=1)
        rows, open_sizes, remaining = rows[going], open_sizes[going], remaining[going]
    return take_smallest_unit(taken, sizes=sizes, budgets=budgets)


def take_smallest_unit(taken: np.ndarray, *, sizes: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """In rows that have a budget and units but took none, take the smallest unit (the first of equals), in place."""
    missed = np.flatnonzero((budgets > 0) & ~taken.any(axis=1) & sizes.any(axis=1))
    if missed.size:
        candidates = sizes[missed]
        taken[missed, np.where(candidates > 0, candidates, candidates.max() + 1).argmin(axis=1)] = True
    return taken


def select_words(bits: np.ndarray, *, words: WordTable, budgets: np.ndarray) -> Selection:
    """Select whole words in random order; a word that would overflow the budget is skipped, not cut.

    A row in which no word fits its budget gets its shortest word: every row with candidates has a target.

    Args:
        bits: `[B, L]` uint64 random bits.
        words: The words of the batch.
        budgets: `[B]`, tokens.

    Returns:
        The selection; each word is a unit.

    Source:
        `create_masked_lm_predictions` with `do_whole_word_mask` of google-research/bert.
    """
    width = bits.shape[1]
    num_candidates = np.count_nonzero(words.begins, axis=1)
    order = sorted_positions(order_keys(bits, candidates=words.begins))[:, : num_candidates.max()]
    order += np.arange(len(order))[:, None] * width
    index = words.word_of[order]
    sizes = np.where(np.arange(order.shape[1]) < num_candidates[:, None], words.sizes[index], 0)
    chosen = np.zeros(len(words.is_candidate), dtype=np.bool_)
    chosen[index[fill_budgets(sizes, budgets=budgets)]] = True
    return words_to_selection(chosen, words=words)


def words_to_selection(chosen: np.ndarray, *, words: WordTable) -> Selection:
    """Return the selection of the `chosen` words (`[W]` bool), each a unit."""
    shape = words.begins.shape
    mask = np.repeat(chosen, words.sizes).reshape(shape)
    return Selection(mask=mask, unit_starts=mask & words.begins)


def select_tokens_independently(
    bits: np.ndarray, *, maskable: np.ndarray, probability: float | np.ndarray
) -> Selection:
    """Select each candidate token with the probability of its row; a row may get none.

    Args:
        bits: `[B, L]` uint64 random bits.
        maskable: `[B, L]` bool, the candidates.
        probability: Of each token, one for all rows or `[B]`.

    Returns:
        The selection; each token is a unit.
    """
    mask = (to_uniforms(bits) < by_row(probability, num_rows=len(bits))[:, None]) & maskable
    return Selection(mask=mask, unit_starts=mask)


def select_words_independently(bits: np.ndarray, *, words: WordTable, probability: float | np.ndarray) -> Selection:
    """Select each candidate word with the probability of its row; a row may get none.

    Args:
        bits: `[B, L]` uint64 random bits, of which those at the first token of a word count.
        words: The words of the batch.
        probability: Of each word, one for all rows or `[B]`.

    Returns:
        The selection; each word is a unit.
    """
    first = words.bounds[:-1]
    limits = by_row(probability, num_rows=len(bits))[first // bits.shape[1]]
    chosen = (to_uniforms(bits.ravel()[first]) < limits) & words.is_candidate
    return words_to_selection(chosen, words=words)
