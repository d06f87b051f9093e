"""Skip-gram and CBOW on the CPU: the functions are plain Python, and numba compiles them when the backend is made.

`learn_centres` goes over the centre words in order. For each it gathers the rows that are predicted (the word and its noise, or
the nodes of its path), and `_step` takes one step of gradient descent on the loss of one or several input vectors together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_pretrain.data.draws import GOLDEN, MIX_1, MIX_2

if TYPE_CHECKING:
    from hf_pretrain.vectors.word2vec.tables import AliasTable, HuffmanCodes
    from hf_pretrain.vectors.word2vec.training import Stretch, Word2VecOptions

_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))
_LOW = np.uint64(0xFFFFFFFF)

# The sigmoid is interpolated between entries of a table, with an error below 1e-6; beyond, it is computed.
_LIMIT = np.float32(8)
_PER_UNIT = np.float32(128)
_ONE = np.float32(1)
# Least probability in the loss that is shown; a product of many stays above the smallest number of float64.
_FLOOR = 1e-7
_SMALL = 1e-200
# Sums may be reordered, but numbers that are not finite stay what they are.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def sigmoid_table() -> np.ndarray:
    """Return the sigmoid at -8, -8 + 1 / 128, ..., 8 and one entry more: ``float32``."""
    steps = np.arange(int(2 * _LIMIT * _PER_UNIT) + 2) / float(_PER_UNIT) - float(_LIMIT)
    return (1 / (1 + np.exp(-steps))).astype(np.float32)


def _sigmoid(score: np.float32, table: np.ndarray) -> np.float32:
    if -_LIMIT < score and score < _LIMIT:
        place = (score + _LIMIT) * _PER_UNIT
        index = int(place)
        return table[index] + (place - np.float32(index)) * (table[index + 1] - table[index])
    if score > 0:
        return np.float32(1 / (1 + math.exp(-score)))
    power = math.exp(score)
    return np.float32(power / (1 + power))


def _draw(key: np.uint64, number: int, thresholds: np.ndarray, aliases: np.ndarray) -> int:
    """Return a word of noise, that of a number from the key of a centre."""
    bits = key + np.uint64(number + 1) * GOLDEN
    bits = (bits ^ (bits >> _30)) * MIX_1
    bits = (bits ^ (bits >> _27)) * MIX_2
    bits = bits ^ (bits >> _31)
    column = int(((bits >> _32) * np.uint64(len(thresholds))) >> _32)
    if int(bits & _LOW) < thresholds[column]:
        return column
    return int(aliases[column])


def _noise(
    key: np.uint64, first: int, target: int, count: int, thresholds: np.ndarray, aliases: np.ndarray, rows: np.ndarray
) -> int:
    """Write a target and its noise to `rows`, and return how many they are: noise equal to the target is left out."""
    rows[0], size = target, 1
    for number in range(first, first + count):
        word = _draw(key, number, thresholds, aliases)
        if word != target:
            rows[size] = word
            size += 1
    return size


def _step(
    hidden: np.ndarray,
    changes: np.ndarray,
    num_hidden: int,
    outputs: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    num_rows: int,
    rate: np.float32,
    table: np.ndarray,
    old: np.ndarray,
    steps: np.ndarray,
) -> float:
    """Move the output rows, write to `changes` how each input moves, and return the loss; all gradients are of the old values."""
    dimensions = hidden.shape[1]
    for row in range(num_rows):
        target = rows[row]
        for d in range(dimensions):
            old[row, d] = outputs[target, d]
        for d in range(dimensions):
            steps[row, d] = 0
    loss = 0.0
    for number in range(num_hidden):
        likelihood: Any = 1.0
        for d in range(dimensions):
            changes[number, d] = 0
        for row in range(num_rows):
            score = np.float32(0)
            for d in range(dimensions):
                score += hidden[number, d] * old[row, d]
            sign = _ONE if labels[row] else -_ONE
            probability = _sigmoid(sign * score, table)
            slope = rate * sign * (_ONE - probability)
            for d in range(dimensions):
                changes[number, d] += slope * old[row, d]
            for d in range(dimensions):
                steps[row, d] += slope * hidden[number, d]
            likelihood *= _FLOOR if probability < _FLOOR else probability
            if likelihood < _SMALL:
                loss -= math.log(likelihood)
                likelihood = 1.0
        loss -= math.log(likelihood)
    for row in range(num_rows):
        target = rows[row]
        for d in range(dimensions):
            outputs[target, d] += steps[row, d]
    return loss


def _copy(target: np.ndarray, number: int, source: np.ndarray, row: int) -> None:
    for d in range(target.shape[1]):
        target[number, d] = source[row, d]


def _add(target: np.ndarray, row: int, source: np.ndarray, number: int, share: np.float32) -> None:
    for d in range(target.shape[1]):
        target[row, d] += share * source[number, d]


def learn_centres(
    inputs: np.ndarray,
    outputs: np.ndarray,
    words: np.ndarray,
    first: int,
    before: np.ndarray,
    after: np.ndarray,
    keys: np.ndarray,
    rates: np.ndarray,
    table: np.ndarray,
    noise: tuple[np.ndarray, np.ndarray],
    tree: tuple[np.ndarray, np.ndarray, np.ndarray],
    shape: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool],
) -> tuple[float, int]:
    """Learn from centre words in order, in place; numba compiles this.

    Args:
        inputs: ``float32 [V, D]``.
        outputs: ``float32 [V or V - 1, D]``.
        words: ``int32 [M]``, with the neighbours.
        first: Where the centres begin in `words`.
        before: ``int32 [C]``, words in the window before each centre.
        after: ``int32 [C]``, words in it after the centre.
        keys: ``uint64 [C]`` of the draws of noise.
        rates: ``float32 [C]``, learning rates.
        table: That of `sigmoid_table`.
        noise: Thresholds and aliases, of `AliasTable`.
        tree: Offsets, nodes and bits, of `HuffmanCodes`.
        shape: Window, negatives, and most rows that are predicted together.
        flags: Whether it is skip-gram, whether the softmax is hierarchical, whether the pairs of a centre learn in one step, and
            whether CBOW's gradient is divided.

    Returns:
        Sum of the losses and number of pairs.
    """
    window, negatives, most_rows = shape
    is_skipgram, is_hierarchical, is_shared, is_divided = flags
    dimensions, most = inputs.shape[1], 2 * window
    hidden, changes = np.empty((most, dimensions), np.float32), np.empty((most, dimensions), np.float32)
    old, steps = np.empty((most_rows, dimensions), np.float32), np.empty((most_rows, dimensions), np.float32)
    rows, labels = np.empty(most_rows, np.int64), np.zeros(most_rows, np.bool_)
    labels[0] = True
    loss, pairs, num_rows = 0.0, 0, 0
    for centre in range(len(keys)):
        place, rate, key = first + centre, rates[centre], keys[centre]
        low, high, target = place - before[centre], place + after[centre], words[place]
        size = high - low
        if size == 0:
            continue
        if is_hierarchical:
            begin = tree[0][target]
            num_rows = tree[0][target + 1] - begin
            for row in range(num_rows):
                rows[row], labels[row] = tree[1][begin + row], tree[2][begin + row] == 0
        elif is_shared:
            num_rows = _noise(key, 0, target, negatives, noise[0], noise[1], rows)
        if is_skipgram and is_shared:
            for number in range(size):
                neighbour = low + number
                _copy(hidden, number, inputs, words[neighbour + (neighbour >= place)])
            loss += _step(hidden, changes, size, outputs, rows, labels, num_rows, rate, table, old, steps)
            for number in range(size):
                neighbour = low + number
                _add(inputs, words[neighbour + (neighbour >= place)], changes, number, _ONE)
            pairs += size
        elif is_skipgram:
            for number in range(size):
                neighbour = low + number
                # The first draws are those of the outermost place before the centre, whether the window has it or not.
                draw = (neighbour - place + window) * negatives
                neighbour += neighbour >= place
                if not is_hierarchical:
                    num_rows = _noise(key, draw, target, negatives, noise[0], noise[1], rows)
                _copy(hidden, 0, inputs, words[neighbour])
                loss += _step(hidden, changes, 1, outputs, rows, labels, num_rows, rate, table, old, steps)
                _add(inputs, words[neighbour], changes, 0, _ONE)
            pairs += size
        else:
            share = _ONE / np.float32(size)
            hidden[0, :] = 0
            for neighbour in range(low, high + 1):
                if neighbour != place:
                    _add(hidden, 0, inputs, words[neighbour], share)
            loss += _step(hidden, changes, 1, outputs, rows, labels, num_rows, rate, table, old, steps)
            for neighbour in range(low, high + 1):
                if neighbour != place:
                    _add(inputs, words[neighbour], changes, 0, share if is_divided else _ONE)
            pairs += 1
    return loss, pairs


@functools.cache
def compiled() -> Callable[..., tuple[float, int]]:
    """Return `learn_centres`, compiled by numba; it runs without Python's lock."""
    import numba
    from numba.extending import register_jitable

    for function in (_sigmoid, _draw, _noise, _step, _copy, _add):
        register_jitable(fastmath=_FAST)(function)
    return numba.njit(nogil=True, fastmath=_FAST)(learn_centres)


class KernelBackend:
    """The numba backend: the vectors, and what learns them.

    Args:
        state: `inputs` and `outputs` to begin with.
        table: Distribution of the noise, or paths of the tree.
        options: The options.
        is_compiled: Whether numba compiles; without it all is computed by Python, which is for tests.
    """

    positions = 1 << 18

    def __init__(
        self,
        state: Mapping[str, np.ndarray],
        table: HuffmanCodes | AliasTable,
        options: Word2VecOptions,
        *,
        is_compiled: bool = True,
    ) -> None:
        self.inputs, self.outputs = (np.ascontiguousarray(state[name], np.float32) for name in ("inputs", "outputs"))
        self.threads = options.threads
        self.learn_centres = compiled() if is_compiled else learn_centres
        is_tree = options.hierarchical
        empty = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int8)
        noise, tree = (empty[:2], tuple(table)) if is_tree else (tuple(table), empty)
        most_rows = int(np.diff(tree[0]).max()) if is_tree else options.negatives + 1
        is_skipgram = options.mode == "skipgram"
        is_shared = options.shared_negatives or not is_skipgram
        flags = (is_skipgram, is_tree, is_shared, options.cbow_gradient == "mean")
        self.rest: tuple[Any, ...] = (
            sigmoid_table(),
            noise,
            tree,
            (options.window, options.negatives, most_rows),
            flags,
        )

    def learn(self, stretch: Stretch) -> tuple[float, int]:
        """Learn from a stretch in order, or from as many parts of it as there are threads at the same time."""
        size = len(stretch.keys)
        threads = min(self.threads, max(1, size))
        if threads == 1:
            return self._learn_part(stretch, 0, size)
        bounds = [size * thread // threads for thread in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            parts = [pool.submit(self._learn_part, stretch, *bounds[thread : thread + 2]) for thread in range(threads)]
            losses, pairs = zip(*(part.result() for part in parts), strict=True)
        return sum(losses), sum(pairs)

    def _learn_part(self, stretch: Stretch, begin: int, end: int) -> tuple[float, int]:
        part = slice(begin, end)
        columns: list[Any] = [stretch.before, stretch.after, stretch.keys, stretch.rates]
        columns = [column[part] for column in columns]
        loss, pairs = self.learn_centres(
            self.inputs, self.outputs, stretch.words, stretch.first + begin, *columns, *self.rest
        )
        return float(loss), int(pairs)

    def state(self) -> dict[str, np.ndarray]:
        """Return the vectors themselves."""
        return {"inputs": self.inputs, "outputs": self.outputs}
