"""What word2vec makes of the counts of words: which are kept, what is drawn as noise, and the tree of hierarchical softmax."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hf_pretrain.errors import InputError


class HuffmanCodes(NamedTuple):
    """The path of each word from the root of a binary tree; those of word w are at ``offsets[w]`` to ``offsets[w + 1]``.

    Attributes:
        offsets: ``int64 [V + 1]``.
        nodes: ``int32 [N]``, inner nodes from the root on, numbers from 0 to V - 2.
        bits: ``int8 [N]``, which child of the node comes next, 0 or 1.
    """

    offsets: np.ndarray
    nodes: np.ndarray
    bits: np.ndarray


class AliasTable(NamedTuple):
    """A distribution to draw from in constant time: a column is drawn uniformly, then it or its alias.

    Attributes:
        thresholds: ``int64 [V]``, probability of the column itself in units of 2**-32.
        aliases: ``int32 [V]``, the other outcome of the column.
    """

    thresholds: np.ndarray
    aliases: np.ndarray


def huffman_codes(counts: np.ndarray) -> HuffmanCodes:
    """Return binary codes of least expected length.

    Args:
        counts: ``int64 [V]``, at least two.

    Raises:
        InputError: If there are fewer than two words.

    Source: Huffman 1952, "A Method for the Construction of Minimum-Redundancy Codes"; van Leeuwen 1976, "On the construction of
        Huffman trees" (two queues).
    """
    size = len(counts)
    if size < 2:
        raise InputError(f"counts has {size} words: a tree needs at least two")
    order = np.argsort(counts, kind="stable")
    weights = counts[order].tolist() + [0] * (size - 1)
    parents = np.zeros(2 * size - 1, dtype=np.int64)
    sides = np.zeros(2 * size - 1, dtype=np.int8)
    # Inner nodes are made in ascending order of their weights, so both queues are sorted.
    leaf, inner = 0, size
    for node in range(size, 2 * size - 1):
        for side in (0, 1):
            if leaf < size and (inner >= node or weights[leaf] <= weights[inner]):
                child, leaf = leaf, leaf + 1
            else:
                child, inner = inner, inner + 1
            weights[node] += weights[child]
            parents[child], sides[child] = node, side
    return _paths(parents, sides, order)


def _paths(parents: np.ndarray, sides: np.ndarray, order: np.ndarray) -> HuffmanCodes:
    """Follow all words up to the root at once."""
    size, root = len(order), len(parents) - 1
    at = np.empty(size, dtype=np.int64)
    at[order] = np.arange(size)
    words, levels = np.arange(size), []
    while len(words):
        levels.append((words, parents[at] - size, sides[at]))
        at = parents[at]
        words, at = words[at != root], at[at != root]
    lengths = np.zeros(size, dtype=np.int64)
    for level, _, _ in levels:
        lengths[level] += 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    nodes, bits = np.empty(offsets[-1], dtype=np.int32), np.empty(offsets[-1], dtype=np.int8)
    for height, (level, node, side) in enumerate(levels, start=1):
        nodes[offsets[level + 1] - height] = node
        bits[offsets[level + 1] - height] = side
    return HuffmanCodes(offsets, nodes, bits)


def keep_probabilities(counts: np.ndarray, total: int, sample: float) -> np.ndarray:
    """Return the probability that an occurrence of each word is kept: sqrt(t / f) + t / f of its relative frequency f.

    Args:
        counts: ``int64 [V]``.
        total: Number of words of which these are the counts.
        sample: The threshold t; 0 keeps all.

    Returns:
        ``float64 [V]``, at most 1.

    Source: word2vec.c, `TrainModelThread`. The paper ("Distributed Representations", section 2.3) has sqrt(t / f) alone.
    """
    if sample <= 0:
        return np.ones(len(counts))
    ratio = sample * total / np.maximum(counts, 1)
    return np.minimum(1.0, np.sqrt(ratio) + ratio)


def noise_distribution(counts: np.ndarray, power: float) -> np.ndarray:
    """Return the distribution of the noise, in proportion to powers of the counts: ``float64 [V]``.

    Source: Mikolov et al. 2013, "Distributed Representations of Words and Phrases and their Compositionality", section 2.2.
    """
    weights = np.asarray(counts, dtype=np.float64) ** power
    return weights / weights.sum()


def alias_table(probabilities: np.ndarray) -> AliasTable:
    """Return a table from which a distribution is drawn with one look-up; its probabilities are exact to 2**-32 / V.

    Args:
        probabilities: ``float64 [V]``, of sum 1.

    Source: Vose 1991, "A Linear Algorithm For Generating Random Numbers With a Given Distribution".
    """
    size = len(probabilities)
    shares = (np.asarray(probabilities, dtype=np.float64) * size).tolist()
    aliases = list(range(size))
    small = [column for column in range(size) if shares[column] < 1]
    large = [column for column in range(size) if shares[column] >= 1]
    while small and large:
        column, other = small.pop(), large[-1]
        aliases[column] = other
        shares[other] -= 1 - shares[column]
        if shares[other] < 1:
            small.append(large.pop())
    # Columns that are left have a share of 1 but for rounding.
    for column in small + large:
        shares[column] = 1.0
    thresholds = np.rint(np.array(shares) * 2**32).astype(np.int64)
    return AliasTable(thresholds, np.array(aliases, dtype=np.int32))
