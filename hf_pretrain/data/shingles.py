"""Shingles, the runs of so many words that two texts are compared by, as 64-bit numbers that are the same everywhere."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from hf_pretrain.data import draws
from hf_pretrain.data.words import IGNORED, SPACE, character_kinds, word_starts


def normalized(text: str) -> str:
    """Return a text as it is compared: letters without case, composed (NFC), one space for any white space."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def shingle_hashes(texts: Sequence[str], *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the shingles of several texts: each run of ``size`` words, as `hf_pretrain.data.words` finds words.

    A text of fewer words has one shingle, of all its words; one without words has none.

    Args:
        texts: Texts, normalized.
        size: Words in a shingle.

    Returns:
        Hashes of the shingles of all the texts in a row, with repetitions, ``uint64 [n]``; and where those of each
        text begin and the last ones end, ``int64 [num_texts + 1]``.
    """
    begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
    starts, words = _word_hashes("\n".join(texts))
    text_of = np.searchsorted(begins, starts, side="right") - 1
    hashes = np.zeros(len(words), dtype=np.uint64)
    for place, weight in enumerate(_weights(size)[: len(words)]):
        num_runs = len(words) - place
        is_inside = text_of[place:] == text_of[:num_runs]
        hashes[:num_runs] += words[place:] * weight * is_inside
    counts = np.bincount(text_of, minlength=len(texts))
    firsts = np.cumsum(counts) - counts
    is_whole = np.zeros(len(words), dtype=np.bool_)
    num_whole = max(len(words) - size + 1, 0)
    is_whole[:num_whole] = text_of[size - 1 :] == text_of[:num_whole]
    is_whole[firsts[(counts > 0) & (counts < size)]] = True
    num_shingles = np.bincount(text_of[is_whole], minlength=len(texts))
    return hashes[is_whole], np.concatenate([[0], np.cumsum(num_shingles)])


def _word_hashes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where words start, ``int64 [n]``, and a hash of the visible characters of each, ``uint64 [n]``."""
    kinds = character_kinds(text)
    starts = word_starts(text, kinds=kinds)
    if not len(starts):
        return starts, np.empty(0, dtype=np.uint64)
    visible = np.flatnonzero((kinds != SPACE) & (kinds != IGNORED))
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")[visible]
    firsts = np.searchsorted(visible, starts)
    lengths = np.diff(firsts, append=len(visible))
    places = np.arange(len(visible)) - np.repeat(firsts, lengths)
    hashes = np.add.reduceat((points + np.uint64(1)) * _weights(lengths.max())[places], firsts)
    return starts, draws.row_keys(hashes, seed=0, stream="words")


def _weights(num_places: int) -> np.ndarray:
    """Return a factor for each place, ``uint64 [num_places]``: a sum of products is a hash in which the order counts."""
    key = draws.row_keys([0], seed=0, stream="places")
    return draws.bits(key, num_places)[0] | np.uint64(1)


def jaccard(first: str, second: str, *, size: int) -> float:
    """Return what two texts have in common: their common shingles as a share of all their different shingles.

    Args:
        first: A text.
        second: Another.
        size: Words in a shingle.

    Returns:
        A number from 0 to 1; 0 if neither has a word.
    """
    hashes, bounds = shingle_hashes([normalized(first), normalized(second)], size=size)
    left, right = (set(hashes[low:high].tolist()) for low, high in zip(bounds[:-1], bounds[1:], strict=True))
    return len(left & right) / max(len(left | right), 1)
