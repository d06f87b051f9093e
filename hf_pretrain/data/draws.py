"""Keyed randomness: every draw is a pure function of (seed, epoch, example id, stream name, position).

A draw does not depend on the batch, the worker, the rank or earlier draws, so the same example in the same epoch
gets the same bits however the run is cut up or resumed. Seed, epoch and id are mixed in one after the other, each by itself:
neighbouring seeds share no epoch. The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) used as a counter: the key of a row is its state, the position its step.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

VERSION = 2
"""Part of the identity of everything that is kept from draws. Raise it when a key changes."""

# Of SplitMix64; what draws on a device or in compiled code has them from here.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
_TO_UNIT = 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, in place on a fresh ``uint64`` array; multiplication wraps modulo 2**64."""
    bits ^= bits >> np.uint64(30)
    bits *= MIX_1
    bits ^= bits >> np.uint64(27)
    bits *= MIX_2
    bits ^= bits >> np.uint64(31)
    return bits


@functools.lru_cache(maxsize=256)
def _run_key(seed: int, stream: str) -> np.ndarray:
    number = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    # An array, because the multiplication of NumPy's scalars warns when it wraps.
    key = np.array([number], dtype=np.uint64)
    return _mix(key + GOLDEN + np.array([seed % 2**64], dtype=np.uint64))


def row_keys(
    example_ids: np.ndarray | Sequence[int], *, seed: int, epoch: np.ndarray | int = 0, stream: str = ""
) -> np.ndarray:
    """Return one 64-bit key an example, from which its draws of one stream follow.

    Args:
        example_ids: Ids of the examples, integers of shape ``[B]``.
        seed: Seed of the run, any integer; seeds are alike modulo 2**64.
        epoch: Epoch of each example, ``[B]``, or one for all.
        stream: Name of the draw ("select", "replace", ...); streams are independent of each other.

    Returns:
        ``uint64`` keys of shape ``[B]``.
    """
    # Each part passes through the mixer before the next one is added: a sum of parts would be the same for other parts.
    keys = _run_key(int(seed), stream)
    for part in (epoch, example_ids):
        keys = _mix(keys + GOLDEN + np.asarray(part, dtype=np.int64).astype(np.uint64))
    return keys


def bits(keys: np.ndarray, length: int) -> np.ndarray:
    """Return 64 random bits a position: ``uint64`` of shape ``[*keys.shape, length]``."""
    steps = np.arange(1, length + 1, dtype=np.uint64) * GOLDEN
    return _mix(keys[..., None] + steps)


def uniforms(keys: np.ndarray, length: int) -> np.ndarray:
    """Return uniform draws in ``[0, 1)`` with 53 random bits: ``float64`` of shape ``[*keys.shape, length]``."""
    return (bits(keys, length) >> np.uint64(11)) * _TO_UNIT


def integers(keys: np.ndarray, length: int, *, high: int) -> np.ndarray:
    """Return integers uniform on ``[0, high)``: ``int64`` of shape ``[*keys.shape, length]``, for ``high < 2**32``.

    The bias of scaling 32 bits is below ``high / 2**32``.
    """
    return ((bits(keys, length) >> np.uint64(32)) * np.uint64(high) >> np.uint64(32)).astype(np.int64)


def permutation(num_items: int, *, seed: int, epoch: int = 0, stream: str = "order") -> np.ndarray:
    """Return a keyed permutation of ``range(num_items)``: ``int64`` of shape ``[num_items]``."""
    key = int(row_keys([0], seed=seed, epoch=epoch, stream=stream)[0])
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_items)


def generator_seed(number: int = 0, *, seed: int, stream: str) -> int:
    """Return a seed for a generator that draws in turn, such as torch's for dropout.

    Args:
        number: Which of several generators, such as the rank of its process.
        seed: Seed of the run.
        stream: Name of the draw.

    Returns:
        An integer in ``[0, 2**63)``; those of (seed, number) and (seed + 1, number - 1) have nothing in common.
    """
    return int(row_keys([number], seed=seed, stream=stream)[0] >> np.uint64(1))
