"""Which documents repeat an earlier one: equal texts by a hash, near ones by MinHash and LSH.

A text is normalized and cut into shingles, runs of a few words, each a 64-bit number that is the same on every machine
(`shingle_hashes`). `Deduplicator` compares a document with those that were kept before it, so the first of several stays. A
document that is near a removed one but not near a kept one is kept: a chain of small changes does not pull in a text that is far
from its beginning.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from hf_pretrain.data import draws
from hf_pretrain.data.documents.words import IGNORED, SPACE, character_kinds, code_points, word_starts
from hf_pretrain.errors import InputError

# Of documents as similar as the threshold, the share that is compared at all; of more similar ones it is more.
_LEAST_RECALL = 0.99
_SEED = 0
_HASH_BYTES = 8
_DIGEST_BYTES = 16
# A sketch of 4096 numbers is 16 KB a document, and its standard error below 0.008.
_MOST_PERMUTATIONS = 4096


def normalized(text: str) -> str:
    """Return a text as it is compared: letters without case, composed (NFC), one space for any white space."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def shingle_hashes(texts: Sequence[str], *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the shingles of several texts: each run of ``size`` words, as `hf_pretrain.data.documents.words` finds words.

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
    for offset, weight in enumerate(_weights(size)[: len(words)]):
        num_runs = len(words) - offset
        is_inside = text_of[offset:] == text_of[:num_runs]
        hashes[:num_runs] += words[offset:] * weight * is_inside
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
    points = code_points(text)[visible]
    firsts = np.searchsorted(visible, starts)
    lengths = np.diff(firsts, append=len(visible))
    positions = np.arange(len(visible)) - np.repeat(firsts, lengths)
    hashes = np.add.reduceat((points + np.uint64(1)) * _weights(lengths.max())[positions], firsts)
    return starts, draws.row_keys(hashes, seed=0, stream="words")


def _weights(num_positions: int) -> np.ndarray:
    """Return a factor for each position, ``uint64 [num_positions]``: a sum of products is a hash in which the order counts."""
    key = draws.row_keys([0], seed=0, stream="places")
    return draws.bits(key, num_positions)[0] | np.uint64(1)


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


class Match(NamedTuple):
    """What a document is: kept, an equal of another or near to another, and the number of that one (its own if kept)."""

    kind: Literal["kept", "exact", "near"]
    original: int


class Deduplicator:
    """Finds documents that repeat an earlier one, in one pass.

    Two texts are *equal* if they differ in nothing but letter case, white space and the composition of characters.
    They are *near* if the sets of their shingles, runs of ``shingle_size`` words, have a Jaccard similarity of at least
    ``similarity_threshold``, as estimated by MinHash: with ``n`` permutations the standard error of a similarity ``s``
    is ``sqrt(s (1 - s) / n)``. LSH finds the candidates; it misses less than 1 % of those as similar as the threshold,
    fewer of those more similar. A text of fewer words than a shingle is near to its equals only.

    Documents are numbered from 0 in the order in which they come, references too. The same documents give the same
    matches, however they are grouped into calls.

    Args:
        similarity_threshold: Least similarity of near texts, in ``(0, 1]``.
        shingle_size: Words in a shingle.
        num_permutations: Numbers in a sketch.

    Raises:
        InputError: If the package rensa is not installed, or an option is out of range.

    Source:
        Broder, "On the resemblance and containment of documents" (1997); Lee et al., "Deduplicating training data makes
        language models better" (2022), section 4.2.
    """

    def __init__(
        self, *, similarity_threshold: float = 0.8, shingle_size: int = 5, num_permutations: int = 128
    ) -> None:
        check_options(similarity_threshold, shingle_size, num_permutations)
        self._rensa = _import_rensa()
        bands = num_bands(similarity_threshold, num_permutations)
        self.options: dict[str, Any] = {
            "similarity_threshold": similarity_threshold,
            "shingle_size": shingle_size,
            "num_permutations": num_permutations,
            "num_bands": bands,
        }
        """What decides the matches."""
        self._candidates = self._rensa.RMinHashLSH(similarity_threshold, num_permutations, bands)
        self._sketches: dict[int, Any] = {}
        self._first_of_digest: dict[bytes, int] = {}
        self._original_of_near: dict[int, int] = {}
        self.num_documents = 0
        """Documents that came so far, with references."""

    def add_references(self, texts: Sequence[str]) -> None:
        """Take in texts, all of which later documents are compared with."""
        self._compare(texts, are_kept=True)

    def compare(self, texts: Sequence[str]) -> list[Match]:
        """Return what each text is, compared with all before it, in this call and in earlier ones."""
        return self._compare(texts, are_kept=False)

    def _compare(self, texts: Sequence[str], *, are_kept: bool) -> list[Match]:
        begin = self.num_documents
        self.num_documents += len(texts)
        comparable = [normalized(text) for text in texts]
        firsts = [
            self._first_of_digest.setdefault(_digest(text), number) for number, text in enumerate(comparable, begin)
        ]
        fresh = [number for number, first in enumerate(firsts, begin) if number == first]
        for number, sketch in zip(fresh, self._sketch([comparable[i - begin] for i in fresh]), strict=True):
            if sketch is None:
                continue
            near = None if are_kept else self._nearest(sketch)
            if near is None:
                self._candidates.insert(number, sketch)
                self._sketches[number] = sketch
            else:
                self._original_of_near[number] = near
        return [self._match(number, first) for number, first in enumerate(firsts, begin)]

    def _sketch(self, texts: Sequence[str]) -> Iterator[Any]:
        """Yield the MinHash sketch of each text, None for one without words."""
        hashes, bounds = shingle_hashes(texts, size=self.options["shingle_size"])
        tokens = hashes.astype("<u8").view(f"V{_HASH_BYTES}").tolist()
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if low == high:
                yield None
                continue
            sketch = self._rensa.RMinHash(self.options["num_permutations"], _SEED)
            sketch.update(tokens[low:high])
            yield sketch

    def _nearest(self, sketch: Any) -> int | None:
        """Return the first document that was kept and that a sketch is near to."""
        candidates = self._candidates.query(sketch)
        threshold = self.options["similarity_threshold"]
        near = [number for number in candidates if sketch.jaccard(self._sketches[number]) >= threshold]
        return min(near, default=None)

    def _match(self, number: int, first: int) -> Match:
        original = self._original_of_near.get(first, first)
        if number != first:
            return Match("exact", original)
        return Match("kept" if number == original else "near", original)


def check_options(similarity_threshold: float, shingle_size: int, num_permutations: int) -> None:
    """Refuse numbers that make no sense.

    Raises:
        InputError: If one is out of range.
    """
    if not 0 < similarity_threshold <= 1:
        raise InputError(f"similarity_threshold={similarity_threshold} must be in (0, 1]; 0.8 is usual")
    for name, value, usual in (("shingle_size", shingle_size, 5), ("num_permutations", num_permutations, 128)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}={value} must be positive and a whole number; {usual} is usual")
    if num_permutations > _MOST_PERMUTATIONS:
        raise InputError(f"num_permutations={num_permutations} must be at most {_MOST_PERMUTATIONS}; 128 is usual")
    num_bands(similarity_threshold, num_permutations)


def num_bands(similarity_threshold: float, num_permutations: int) -> int:
    """Return the fewest bands in which documents as similar as the threshold agree with a probability of 0.99.

    ``b`` bands of ``r`` numbers each find a pair of similarity ``s`` with the probability ``1 - (1 - s**r)**b``.

    Raises:
        InputError: If no number of bands does.
    """
    for bands in range(1, num_permutations + 1):
        if num_permutations % bands == 0:
            agrees = similarity_threshold ** (num_permutations // bands)
            if 1 - (1 - agrees) ** bands >= _LEAST_RECALL:
                return bands
    raise InputError(
        f"similarity_threshold={similarity_threshold} is too low for num_permutations={num_permutations}: use more of them"
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


def _import_rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise InputError(
            "deduplication needs the package rensa, which is not installed: pip install 'hf-pretrain[dedup]'"
        ) from error
    return rensa
