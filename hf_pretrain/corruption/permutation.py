"""Factorisation orders of permutation language modelling: who sees whom, as two integers a token.

Position `i` sees the content of `j` iff `key_ranks[j] < thresholds[i]`; the content stream also sees itself. A row is cut
into parts: two halves, of which the first never sees the second and may therefore be kept as memory, or one whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.corruption.selection import order_keys, sorted_positions

PADDING_RANK = 1 << 30
"""Key rank of padding: above every threshold, so that nobody sees it."""


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
        """Places of the longest part, `W`, at least 1."""
        return max(int(self.sizes.max()), 1)

    @property
    def filled(self) -> np.ndarray:
        """Return the places that hold a token: `[N, W]` bool."""
        return np.arange(self.span) < self.sizes.reshape(-1, 1)

    def positions(self, backward: np.ndarray | None = None) -> np.ndarray:
        """Return the flat position `row * L + column` of each place of each part: `[N, W]` int64.

        Args:
            backward: `[B]` bool, rows stored in reverse, whose parts are to be read from their end; None for none.

        Returns:
            The positions; those of places without a token are in range and mean nothing.
        """
        places, ends = np.arange(self.span), self.sizes[..., None] - 1
        if backward is None or not backward.any():
            columns = self.starts[..., None] + places
        else:
            columns = self.starts[..., None] + np.where(backward[:, None, None], ends - places, places)
        columns = np.clip(columns, 0, self.width - 1)
        return (columns + np.arange(len(columns))[:, None, None] * self.width).reshape(len(self), -1)

    def of_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Return for each column the number of its part, 0 or 1, and its place in it: `[B, L]` int64 each."""
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
        bases: `[B, L]` int64, what lifts the ranks of a part above those of the part before.
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
    num_places = int(blocks.max())
    bits = keys.bits("permutation_order", length=parts.width).ravel()[parts.positions()[:, :num_places]]
    permutations = sorted_positions(order_keys(bits, candidates=np.arange(num_places) < blocks.reshape(-1, 1)))
    part, places = parts.of_columns()
    index = part + np.arange(len(part))[:, None] * parts.sizes.shape[1]
    inside = places if perm_size is None else places % blocks.ravel()[index]
    # Columns of padding look up what comes out; nobody reads it.
    ranks = permutations.take(index * num_places + inside, mode="clip")
    ranks += places - inside
    capacities = -(-parts.sizes[:, :1] // blocks[:, :1]) * blocks[:, :1]
    return FactorisationOrder(ranks=ranks, bases=part * (capacities + 1))


def given_order(ranks: np.ndarray, *, parts: RowParts) -> FactorisationOrder:
    """Order each part by given ranks.

    Args:
        ranks: `[B, L]` int64, a permutation of the places of each row's tokens.
        parts: The parts of the rows.

    Returns:
        The order; between parts their order comes first.
    """
    part, _ = parts.of_columns()
    return FactorisationOrder(ranks=ranks, bases=part * (parts.sizes.sum(axis=1, keepdims=True) + 1))


def visibility(
    order: FactorisationOrder, *, targets: np.ndarray, functional: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Turn an order into what each position shows and what it sees.

    In a part, ordinary tokens see each other. A target sees them and the targets and functional tokens before it in the
    order, not itself; a functional token also sees itself. Nobody ordinary sees a target or a functional token, which
    would pass on what it has seen. The second half sees all of the first, the first nothing of the second.

    Args:
        order: The factorisation order.
        targets: `[B, L]` bool, the tokens to predict, none of them functional.
        functional: `[B, L]` bool, the separator and classification tokens.
        valid: `[B, L]` bool, False at padding.

    Returns:
        `key_ranks` and `thresholds`, `[B, L]` int64 each; at padding `PADDING_RANK`, which nobody sees, and 0.

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
