"""Where the tokens of a text lie, found by how they are spelled: the tokenizer's own offsets take half as long again.

`encode_batch_fast` of `tokenizers` returns ids alone. The characters of all tokens, one after the other, are those of the text
without white space, as the normalizer writes them; or, of a byte-level tokenizer, its bytes. [`Spelling`] compares both. Where
they are the same, it knows where each token begins. A text that differs anywhere is left to the tokenizer's own offsets. So are
the words of unknown tokens, one by one, where words are cut at white space.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pretrain.data.documents.words import IGNORED, SPACE, character_kinds, code_points, lengths_of

# Entries of the table of characters beside the numbers of code points.
_DROPPED, _OTHERWISE, _NOT_KNOWN = -1, -2, -3
# Of this many characters half must be found, or the rest is not tried.
_TRIED = 1 << 18
# Texts with more unknown tokens than one in so many are left to the tokenizer.
_MOST_UNKNOWN = 1 / 50
# Pre-tokenizers that cut at all white space and drop it, so that the tokens of a word follow from the word alone.
_CUT_AT_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
# SentencePiece's mark of a space.
_MARK = "▁"
_FIRST_WORD = re.compile(r"\S+")


class _Units(NamedTuple):
    """What the tokens of texts are compared with, one text after the other.

    Attributes:
        written: Code points or bytes: ``[units]``.
        characters: The number of the character of each, over all texts: ``int64 [units]``; not of bytes.
        counts: Units of each text: ``int64 [texts]``.
        are_alone: Whether each character of a text is written as one: ``bool [texts]``.
    """

    written: np.ndarray
    characters: np.ndarray | None
    counts: np.ndarray
    are_alone: np.ndarray


class Spelling:
    """How the tokens of a tokenizer are spelled.

    Nothing here has to be right for the result to be: a text counts as found only if all of its characters agree.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizer.backend_tokenizer
        parts = json.loads(backend.to_str())
        vocabulary: Mapping[str, int] = backend.get_vocab(with_added_tokens=True)
        self.is_bytes = '"type": "ByteLevel"' in json.dumps([parts["normalizer"], parts["pre_tokenizer"]])
        self._normalizer = backend.normalizer
        self._tokenizer = ref(tokenizer)
        cut = (parts["pre_tokenizer"] or {}).get("type")
        is_by_word = parts["model"].get("type") in ("WordPiece", "WordLevel") and cut in _CUT_AT_SPACES
        self._unknown_id = tokenizer.unk_token_id if is_by_word and not self.is_bytes else None
        # What a token of these ids covers is not spelled by it.
        self._never = set(tokenizer.all_special_ids)
        spelled = _bytes_of(vocabulary) if self.is_bytes else _characters_of(vocabulary, parts["model"])
        rows: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * (max(vocabulary.values(), default=-1) + 1)
        known = np.zeros(len(rows), dtype=np.bool_)
        for token, number in vocabulary.items():
            if token in spelled and number not in self._never:
                rows[number], known[number] = spelled[token], True
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._lengths = np.where(known, lengths, _NOT_KNOWN)
        self._begins = np.cumsum(lengths) - lengths
        self._flat = np.concatenate([*rows, np.zeros(1, dtype=np.int32)])
        if self.is_bytes:
            self._flat = self._flat.astype(np.uint8)
            # The bytes that go on with a character are 0b10xxxxxx.
            is_first = (self._flat & 0xC0) != 0x80
            self._characters = _sums(is_first[:-1], lengths)
            self._is_inside = (lengths > 0) & ~is_first[self._begins]
        self._table = np.full(0x110000, _NOT_KNOWN, dtype=np.int32)
        self.tried = self.found = 0

    @property
    def is_worth_it(self) -> bool:
        """Whether most of what was tried so far was found."""
        return self.tried < _TRIED or 2 * self.found > self.tried

    def find(
        self, texts: Sequence[str], ids: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where the tokens of each text begin and end. Short texts are best given together.

        Args:
            texts: The texts.
            ids: The tokens of all, one text after the other: ``int32 [tokens]``.
            counts: Number of tokens of each text: ``int64 [texts]``.

        Returns:
            Offsets in the characters of its text of each token's first visible character, or of the next one if it has none, and
            behind its last one: ``int64 [tokens]`` each; and for which texts they can be told: ``bool [texts]``. The offsets of
            others mean nothing.
        """
        sizes = lengths_of(texts)
        starts, ends, is_found = self._find(texts, sizes, ids, counts)
        self.tried += int(sizes.sum())
        self.found += int(sizes[is_found].sum())
        return starts, ends, is_found

    def _find(
        self, texts: Sequence[str], sizes: np.ndarray, ids: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        offsets, is_right = self._compare(texts, sizes, ids, counts)
        if offsets is not None:
            return *offsets, is_right
        starts, ends = np.zeros((2, len(ids)), dtype=np.int64)
        if is_right.any():
            # Where some are spelled otherwise, the others are compared anew, without them.
            of_right = np.repeat(is_right, counts)
            rest = list(itertools.compress(texts, is_right.tolist()))
            found = self._find(rest, sizes[is_right], ids[of_right], counts[is_right])
            starts[of_right], ends[of_right], is_right[is_right] = found
        return starts, ends, is_right

    def _compare(
        self, texts: Sequence[str], sizes: np.ndarray, ids: np.ndarray, counts: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray] | None, np.ndarray]:
        """Return the offsets of the tokens if all texts are spelled by theirs, and which texts may be: ``bool [texts]``."""
        lengths = self._lengths.take(ids)
        units = self._units_of("".join(texts), sizes)
        is_right = self._are_measured(texts, ids, lengths, counts, units)
        ends = np.cumsum(lengths)
        sums = _steps(ends, np.cumsum(counts))
        shift = np.zeros_like(counts)
        if self.is_bytes and (sums > units.counts).any():
            # Tokenizers with add_prefix_space put a space before a text that has none.
            shift = (sums - units.counts == 1).astype(np.int64)
            texts = [" " * more + text for text, more in zip(texts, shift.tolist(), strict=True)]
            sizes = sizes + shift
            units = self._units_of("".join(texts), sizes)
        is_right &= units.are_alone & (sums == units.counts)
        if not is_right.all():
            return None, is_right
        starts = ends - lengths
        places = np.repeat(self._begins.take(ids) - starts, lengths)
        places += np.arange(len(units.written))
        # Unknown tokens may reach over the end.
        differs = self._flat.take(places, mode="clip") != units.written
        if self._unknown_id is not None and differs.any():
            differs &= np.repeat(ids != self._unknown_id, lengths)
        if differs.any():
            return None, _sums(differs, sums) == 0
        behind = np.cumsum(sizes)
        if units.characters is None:
            characters = self._characters.take(ids)
            stops = np.cumsum(characters)
            begins = stops - characters - self._is_inside.take(ids)
        elif lengths.all():
            begins, stops = units.characters.take(starts), units.characters.take(ends - 1) + 1
        else:
            # Behind the last visible character of a text nothing follows.
            begins = np.minimum(np.append(units.characters, behind[-1]).take(starts), np.repeat(behind, counts))
            stops = np.where(lengths > 0, np.append(-1, units.characters).take(ends) + 1, begins)
        first = np.repeat(behind - sizes + shift, counts)
        begins, stops = begins - first, stops - first
        if shift.any():
            # The space that was put before a text has no character.
            begins, stops = np.maximum(begins, 0), np.maximum(stops, 0)
        return (begins, stops), is_right

    def _units_of(self, text: str, sizes: np.ndarray) -> _Units:
        """Return the bytes of joined texts for a byte-level tokenizer, else what the normalizer makes of visible characters."""
        are_alone, edges = np.ones(len(sizes), dtype=np.bool_), np.cumsum(sizes)
        if not self.is_bytes:
            spelled = self._normalized(text)
            kept = np.flatnonzero(spelled != _DROPPED)
            return _Units(spelled.take(kept), kept, np.diff(np.searchsorted(kept, edges), prepend=0), are_alone)
        if self._normalizer is not None:
            spelled = self._normalized(text)
            if len(spelled) and int(spelled.min()) < 0:
                are_alone = _sums(spelled < 0, sizes) == 0
                spelled = np.maximum(spelled, 0)
            text = spelled.astype("<u4").tobytes().decode("utf-32-le")
        encoded = np.frombuffer(text.encode(), dtype=np.uint8)
        # The bytes that go on with a character are 0b10xxxxxx; so many lie before each edge.
        more = np.flatnonzero((encoded & 0xC0) == 0x80)
        edges += np.searchsorted(more - np.arange(len(more)), edges, side="right")
        return _Units(encoded, None, np.diff(edges, prepend=0), are_alone)

    def _are_measured(
        self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray, units: _Units
    ) -> np.ndarray:
        """Return which texts have tokens of known lengths only, and set those of unknown tokens: ``bool [texts]``."""
        is_unknown = lengths < 0
        if not is_unknown.any():
            return np.ones(len(texts), dtype=np.bool_)
        lengths[is_unknown] = 0
        are_measured = _sums(is_unknown, counts) == 0
        if self._unknown_id is None or units.characters is None:
            return are_measured
        after, units_after = np.cumsum(counts).tolist(), np.cumsum(units.counts).tolist()
        characters_after = np.cumsum([0, *map(len, texts)])
        for row in np.flatnonzero(~are_measured).tolist():
            low, high = after[row] - counts[row], after[row]
            unknown = np.flatnonzero(is_unknown[low:high])
            if (ids[low:high][unknown] == self._unknown_id).all():
                kept = (
                    units.characters[units_after[row] - units.counts[row] : units_after[row]] - characters_after[row]
                )
                are_measured[row] = self._measure(unknown, lengths[low:high], texts[row], kept)
        return are_measured

    def _measure(self, unknown: np.ndarray, lengths: np.ndarray, text: str, kept: np.ndarray) -> bool:
        """Set the lengths of unknown tokens, by the tokens of the word that each begins; return whether all are found."""
        tokenizer = self._tokenizer()
        if tokenizer is None or len(unknown) > max(1, _MOST_UNKNOWN * len(lengths)):
            return False
        tokens_before, units_before = 0, 0
        for number in unknown.tolist():
            units_before += int(lengths[tokens_before:number].sum())
            if units_before >= len(kept):
                return False
            begin = int(kept[units_before])
            word = _FIRST_WORD.match(text, begin)
            ids, offsets = _with_offsets(word[0] if word else "", tokenizer)
            if not ids or ids[0] != self._unknown_id or offsets[0][0] != 0:
                return False
            end = begin + offsets[0][1]
            lengths[number] = int(np.searchsorted(kept, end)) - units_before
            units_before, tokens_before = units_before + int(lengths[number]), number + 1
        return True

    def _normalized(self, text: str) -> np.ndarray:
        """Return each character as the normalizer writes it, alone: ``int32 [len(text)]``."""
        points = code_points(text)
        spelled = self._table.take(points)
        is_new = spelled == _NOT_KNOWN
        if is_new.any():
            for point in np.unique(points[is_new]).tolist():
                self._table[point] = self._character(chr(point))
            spelled = self._table.take(points)
        return spelled

    def _character(self, character: str) -> int:
        written = character if self._normalizer is None else self._normalizer.normalize_str(character)
        if self.is_bytes:
            return ord(written) if len(written) == 1 else _OTHERWISE
        if (kind := character_kinds(character)[0]) == SPACE:
            return _DROPPED
        written = "".join(written.replace(_MARK, " ").split())
        if not written and kind == IGNORED:
            return _DROPPED
        return ord(written) if len(written) == 1 else _OTHERWISE


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the sum of so many values each, one group after the other: ``int64 [groups]``."""
    return _steps(np.cumsum(values, dtype=np.int64), np.cumsum(counts))


def _steps(sums: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return how much running sums grow from each end to the next: ``int64 [ends]``."""
    steps = np.append(0, sums)[ends]
    steps[1:] -= steps[:-1]
    return steps


def _with_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    encoding = backend.encode(text, add_special_tokens=False)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return encoding.ids, encoding.offsets


def _characters_of(vocabulary: Mapping[str, int], model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the code points of each token, without marks and white space."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    spelled = {}
    for token in vocabulary:
        text = token.removeprefix(prefix).removesuffix(suffix) if token != prefix else token
        points = code_points("".join(text.replace(_MARK, " ").split()))
        spelled[token] = points.astype(np.int32)
    return spelled


def _bytes_of(vocabulary: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the bytes of each token that is written in the alphabet of byte-level tokenizers."""
    # Printable characters of Latin-1 stand for themselves, and those behind it for the others, in order.
    alone = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(alone)]
    table = {chr(byte): byte for byte in alone} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
    return {
        token: np.array([table[character] for character in token], dtype=np.int32)
        for token in vocabulary
        if all(character in table for character in token)
    }


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Spelling]] = WeakKeyDictionary()


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling | None:
    """Return how the tokens of a tokenizer are spelled; None for a class that changes texts before they are tokenized."""
    kind: Any = type(tokenizer)
    for name in ("__call__", "_encode_plus", "_batch_encode_plus"):
        if getattr(kind, name, None) is not getattr(PreTrainedTokenizerFast, name, None):
            return None
    size, spelling = _KNOWN.get(tokenizer, (-1, None))
    if spelling is None or size != len(tokenizer):
        spelling = Spelling(tokenizer)
        _KNOWN[tokenizer] = (len(tokenizer), spelling)
    return spelling


def encode_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of texts alone, without special tokens; names of special tokens are text.

    Returns:
        The ids of all, one text after the other: ``int32 [tokens]``, and the number of each text: ``int64 [texts]``.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    rows = [encoding.ids for encoding in encodings]
    counts = lengths_of(rows)
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=counts.sum()), counts
