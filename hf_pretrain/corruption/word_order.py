"""Shuffling short runs of visible tokens, which the model puts in order again (StructBERT)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.corruption.selection import order_keys, sorted_positions, to_uniforms

_HALF = np.uint64(32)


@dataclass(frozen=True)
class ShuffledRows:
    """Rows in which some runs of tokens are out of order.

    Attributes:
        input_ids: `[B, L]` int64.
        rows: `[R]` int64, the example that a run is in; ascending.
        starts: `[R]` int64, column of its first token; ascending in a row.
        positions: `[R, K]` int64, flat positions `row * L + column` of its tokens.
    """

    input_ids: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    positions: np.ndarray


def shuffle_runs(
    input_ids: np.ndarray,
    *,
    free: np.ndarray,
    lengths: np.ndarray,
    keys: RowKeys,
    probability: float,
    size: int = 3,
    keep_identity: bool = False,
    breaks: np.ndarray | None = None,
) -> ShuffledRows:
    """Shuffle runs of tokens that masking left as they are.

    The runs of a row do not overlap. They are taken at starts in random order, until they cover the share `probability` of its
    tokens. A fraction of a run is rounded up or down at random, so that the share is right on average for rows of any length.

    Args:
        input_ids: `[B, L]` int64, masked; left as it is.
        free: `[B, L]` bool, the tokens that may be moved.
        lengths: `[B]`, tokens of each row, special ones included.
        keys: Keys of the draws.
        probability: Share of the tokens of a row that lie in shuffled runs.
        size: Tokens of a run, K.
        keep_identity: Whether a shuffle may leave a run as it is.
        breaks: `[B, L]` bool, tokens that no run may reach across to from the left, such as the first of a sentence.

    Returns:
        The shuffled rows.

    Source:
        StructBERT (Wang et al. 2020, section 2.2); which runs, and whether the identity counts, is not said there.
    """
    fits = _starts_of_runs(free, size=size, breaks=breaks)
    share = probability * lengths / size
    budgets = np.floor(share + to_uniforms(keys.bits("word_order_count", length=1)[:, 0])).astype(np.int64)
    rows, starts = _take_apart(keys.bits("word_order", length=free.shape[1]), fits=fits, budgets=budgets, size=size)
    positions = (rows * free.shape[1] + starts)[:, None] + np.arange(size)
    orders = np.array(list(itertools.permutations(range(size))))[0 if keep_identity else 1 :]  # the identity is first
    bits = keys.bits("word_order_shuffle", length=free.shape[1])[rows, starts]
    drawn = ((bits >> _HALF) * np.uint64(len(orders))) >> _HALF
    shuffled = input_ids.copy()
    sources = np.take_along_axis(positions, orders[drawn.astype(np.int64)], axis=1)
    shuffled.ravel()[positions] = input_ids.ravel()[sources]
    return ShuffledRows(input_ids=shuffled, rows=rows, starts=starts, positions=positions)


def _starts_of_runs(free: np.ndarray, *, size: int, breaks: np.ndarray | None) -> np.ndarray:
    """Return where a run of free tokens without a break inside could start: `[B, L]` bool."""
    fits, width = free.copy(), free.shape[1]
    for step in range(1, size):
        follows = free[:, step:] if breaks is None else free[:, step:] & ~breaks[:, step:]
        end = max(width - step, 0)
        fits[:, :end] &= follows
        fits[:, end:] = False
    return fits


def _take_apart(
    bits: np.ndarray, *, fits: np.ndarray, budgets: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take starts in random order, `budgets[b]` in each row, passing over those of runs that overlap a taken one.

    Returns:
        Rows and columns of the starts taken, in reading order.
    """
    num_rows, width = fits.shape
    order = sorted_positions(order_keys(bits, candidates=fits)) + (np.arange(num_rows) * (width + 2 * size))[:, None]
    # Room on both sides of a row, so that the positions barred by a run never reach into the next row.
    is_open = np.zeros((num_rows, width + 2 * size), dtype=np.bool_)
    is_open[:, size : size + width] = fits
    is_open, left = is_open.ravel(), np.minimum(budgets, np.count_nonzero(fits, axis=1))
    barred = np.arange(1, 2 * size)  # Behind the room: from size - 1 before the start to size - 1 after it.
    taken = []
    for start in order.T:
        if not left.any():
            break
        live = np.flatnonzero((left > 0) & is_open[start + size])
        left[live] -= 1
        is_open[start[live][:, None] + barred] = False
        taken.append(start[live])
    chosen = np.sort(np.concatenate(taken)) if taken else np.zeros(0, dtype=np.int64)
    rows, columns = np.divmod(chosen, width + 2 * size)
    return rows, columns
