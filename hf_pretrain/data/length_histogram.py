"""Lengths counted in memory that does not grow with their number."""

from __future__ import annotations

import math

import numpy as np

# Longer lengths lose what is beyond these bits; so there are at most a few ten thousand different ones.
_EXACT_BITS = 12
_QUANTILES = (5, 25, 50, 75, 95, 99)


class LengthHistogram:
    """Counts of lengths: exact below 4 096, and of at least 12 bits above, a relative error of less than 0.03 %.

    Number, sum, least and greatest are exact.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.num_lengths = 0
        self.total = 0
        self.least = 0
        self.greatest = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count lengths, non-negative integers of shape ``[n]``."""
        if not len(lengths):
            return
        self.least = min(int(lengths.min()), self.least) if self.num_lengths else int(lengths.min())
        self.greatest = max(int(lengths.max()), self.greatest)
        self.num_lengths += len(lengths)
        self.total += int(lengths.sum())
        shift = np.maximum(np.frexp(lengths)[1] - _EXACT_BITS, 0).astype(np.int64)
        # The middle of all the lengths that fall together.
        rounded = (lengths >> shift << shift) + (1 << shift >> 1)
        for length, count in zip(*np.unique_counts(rounded), strict=True):
            self._counts[int(length)] = self._counts.get(int(length), 0) + int(count)

    @property
    def mean(self) -> float:
        """Mean length; 0 of none."""
        return self.total / max(self.num_lengths, 1)

    def quantile(self, percent: float) -> int:
        """Return the least length that so many per cent of the lengths do not exceed; 0 of none."""
        lengths, counts = self._sorted()
        if not len(lengths):
            return 0
        rank = max(math.ceil(percent / 100 * self.num_lengths), 1)
        length = int(lengths[np.searchsorted(np.cumsum(counts), rank)])
        return min(max(length, self.least), self.greatest)

    def summary(self) -> dict[str, float]:
        """Return sum, mean, quantiles, least and greatest by name."""
        quantiles = {f"p{percent}": self.quantile(percent) for percent in _QUANTILES}
        return {"total": self.total, "mean": self.mean, "min": self.least, **quantiles, "max": self.greatest}

    def doublings(self) -> list[tuple[int, int, int]]:
        """Return how many lengths are 0, 1, 2 to 3, 4 to 7, and so on: first and last length and count of each range."""
        lengths, counts = self._sorted()
        ranges = np.frexp(lengths)[1]
        return [
            (1 << k >> 1, max((1 << k) - 1, 0), int(counts[ranges == k].sum()))
            for k in range(int(ranges.min(initial=64)), int(ranges.max(initial=0)) + 1)
        ]

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array(sorted(self._counts), dtype=np.int64)
        return lengths, np.array([self._counts[length] for length in lengths.tolist()], dtype=np.int64)
