"""Which pieces share a row: best-fit decreasing, a whole group of equal lengths at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rows are formed of pieces that lie no further apart than this, so that memory stays bounded and order local.
WINDOW_PIECES = 1 << 16


@dataclass(frozen=True)
class PackedRows:
    """Pieces put together in rows.

    Attributes:
        order: `int64 [num_pieces]`, the numbers of the pieces, row by row.
        bounds: `int64 [num_rows + 1]`; row `r` holds the pieces `order[bounds[r]:bounds[r + 1]]`, in ascending order.
    """

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.bounds) - 1

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up one value a piece over each row."""
        return np.add.reduceat(values[self.order], self.bounds[:-1])


def pack_rows(lengths: np.ndarray, *, capacity: int) -> PackedRows:
    """Put pieces into rows, each into the fullest row that still has room for it, the longest pieces first.

    Args:
        lengths: `int64 [num_pieces]`, places that each piece takes, from 1 to `capacity`.
        capacity: Places in a row.

    Returns:
        The rows, in the order of their first pieces. Memory beyond the result: that of 65 536 pieces.

    Source:
        Best-fit decreasing bin packing; for sequences that share a row without seeing each other: Krell et al.,
        "Efficient Sequence Packing without Cross-contamination" (2021).
    """
    assert len(lengths) and lengths.min() >= 1 and lengths.max() <= capacity, "every piece fits into a row"
    orders, counts = [], []
    for low in range(0, len(lengths), WINDOW_PIECES):
        rows = _rows_by_first_piece(_best_fit(lengths[low : low + WINDOW_PIECES], capacity))
        orders.append(np.argsort(rows, kind="stable") + low)
        counts.append(np.bincount(rows))
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return PackedRows(order=np.concatenate(orders), bounds=bounds)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each piece; rows are numbered as they are begun."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    groups = np.split(longest_first, np.flatnonzero(np.diff(lengths[longest_first])) + 1)
    open_rows: dict[int, np.ndarray] = {}  # room -> rows that have it
    num_rows = 0
    for pieces in groups:
        length = int(lengths[pieces[0]])
        # What a row has left once filled is less than this length, so it is not among these.
        for room in [*sorted(room for room in open_rows if room >= length), capacity]:
            if not len(pieces):
                break
            per_row = room // length
            rows = open_rows.pop(room, None)
            if rows is None:
                rows = num_rows + np.arange(-(-len(pieces) // per_row))
                num_rows += len(rows)
            num_taken = min(len(pieces), len(rows) * per_row)
            num_full, rest = divmod(num_taken, per_row)
            row_of[pieces[:num_taken]] = np.repeat(rows, per_row)[:num_taken]
            pieces = pieces[num_taken:]
            _reopen(open_rows, room - per_row * length, rows[:num_full])
            _reopen(open_rows, room - rest * length, rows[num_full : num_full + (rest > 0)])
            _reopen(open_rows, room, rows[num_full + (rest > 0) :])
    return row_of


def _reopen(open_rows: dict[int, np.ndarray], room: int, rows: np.ndarray) -> None:
    if room and len(rows):
        open_rows[room] = np.concatenate([open_rows[room], rows]) if room in open_rows else rows


def _rows_by_first_piece(row_of: np.ndarray) -> np.ndarray:
    """Number the rows anew, in the order of the first piece that each holds."""
    _, first, number = np.unique(row_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number]
