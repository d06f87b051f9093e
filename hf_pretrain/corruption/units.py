"""Words of a batch as flat tables.

Positions are flat here: `row * L + column`. Every row starts a word, so a batch is one sequence of words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
