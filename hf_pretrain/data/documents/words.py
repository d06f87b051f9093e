"""Where words begin, read off the text, so that every tokenizer sees the same words.

The rule is BERT's: white space separates words, a punctuation character is a word of its own, and so is an ideograph.
What BERT's normalizer deletes (control and format characters, private use) neither begins nor separates words here.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from hf_pretrain.errors import InputError, one_line

Segmenter = Callable[[str], Sequence[str]]

# Kinds of characters, as far as word boundaries go.
LETTER, SPACE, PUNCTUATION, IDEOGRAPH, KANA, MARK, IGNORED = range(7)


def _ranges(text: str) -> list[tuple[int, int]]:
    """Read ranges of code points, each from its first to its last, in hexadecimal digits."""
    return [(int(low, 16), int(high, 16)) for low, _, high in (entry.partition("-") for entry in text.split())]


# The blocks that BERT sets apart; kana is not among them. Source: google-research/bert, tokenization.py.
IDEOGRAPH_RANGES = _ranges("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B73F 2B740-2B81F 2B820-2CEAF 2F800-2FA1F")
# Hiragana, katakana, bopomofo and half-width kana, with the iteration and closing marks before them.
_KANA_RANGES = _ranges("3005-3007 3040-30FF 3100-312F 31A0-31BF 31F0-31FF FF66-FF9F")
# Scripts whose words are not separated either: Thai, Lao, Burmese, Khmer, and their small kin. Only a segmenter cuts them.
_UNSPACED_RANGES = _ranges("0E00-0EFF 1000-109F 1780-17FF 1950-19FF 1A20-1AAF A9E0-A9FF AA60-AADF")
ASCII_SYMBOLS = "$+<=>^`|~"
_NO_CHARACTERS_FROM, _TAGS, _PRIVATE_FROM = 0x33480, (0xE0000, 0xE01F0), 0xF0000


@cache
def _kind_table() -> np.ndarray:
    """Return the kind of every code point: ``uint8 [0x110000]``."""
    table = np.full(0x110000, LETTER, dtype=np.uint8)
    by_category = {"M": MARK, "P": PUNCTUATION, "Z": SPACE, "Cc": IGNORED, "Cf": IGNORED, "Co": IGNORED}
    for point in (*range(_NO_CHARACTERS_FROM), *range(*_TAGS)):
        category = unicodedata.category(chr(point))
        table[point] = by_category.get(category, by_category.get(category[0], LETTER))
    table[_PRIVATE_FROM:] = IGNORED
    table[0xFFFD] = IGNORED
    table[[ord(symbol) for symbol in ASCII_SYMBOLS]] = PUNCTUATION
    table[[ord(space) for space in "\t\n\v\f\r\x85"]] = SPACE
    for low, high in IDEOGRAPH_RANGES:
        table[low : high + 1] = IDEOGRAPH
    for low, high in _KANA_RANGES:
        block = table[low : high + 1]
        block[block == LETTER] = KANA
    return table


def encodable(text: str) -> str:
    """Return a text that has a form in UTF-8: halves of surrogate pairs are joined, or replaced by U+FFFD if they are alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encodable_texts(texts: Sequence[str]) -> Sequence[str]:
    """Return `encodable` of each text."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [encodable(text) for text in texts]
    return texts


def lengths_of(rows: Sequence[Sized]) -> np.ndarray:
    """Return the length of each: ``int64 [rows]``."""
    return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))


def clipped(texts: Iterable[str | None], num_characters: int) -> Iterator[str]:
    """Yield the first texts, and of the last of them the beginning, up to so many characters in all."""
    for text in texts:
        part = (text or "")[:num_characters]
        yield part
        num_characters -= len(part)
        if num_characters <= 0:
            return


def code_points(text: str) -> np.ndarray:
    """Return the number of each character in Unicode: ``uint32 [len(text)]``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def character_kinds(text: str) -> np.ndarray:
    """Return the kind of each character, one of this module's constants: ``uint8 [len(text)]``."""
    return _kind_table().take(code_points(text))


def word_starts(text: str, *, segmenter: Segmenter | None = None, kinds: np.ndarray | None = None) -> np.ndarray:
    """Return where words start: after white space, at and after punctuation, at and after each ideograph.

    A combining mark stays with its letter. Without a segmenter, an ideograph is a word and kana counts as letters.

    Args:
        text: Any text.
        segmenter: Cuts a run of characters that are written without spaces (ideographs, kana, letters of Thai, Lao,
            Burmese and Khmer) into words, for example ``jieba.lcut``; the pieces must join to the run.
        kinds: ``character_kinds(text)``, where the caller has it already.

    Returns:
        Ascending character offsets, ``int64 [num_words]``.

    Raises:
        InputError: If the segmenter fails, or loses or changes characters.

    Source:
        Devlin et al., "BERT" (2019), ``BasicTokenizer`` of the official code.
    """
    kinds = character_kinds(text) if kinds is None else kinds
    kept = None
    if (kinds == IGNORED).any():
        kept = np.flatnonzero(kinds != IGNORED)
        kinds = kinds[kept]
    starts = np.flatnonzero(_begins_word(kinds))
    starts = starts if kept is None else kept[starts]
    return starts if segmenter is None else _segmented(text, starts, segmenter)


def is_letters(text: str) -> bool:
    """Whether a text has nothing but letters, with the marks that belong to them (accents, vowel signs, tones)."""
    return bool(text) and all(unicodedata.category(character)[0] in "LM" for character in text)


def letter_share(text: str) -> float:
    """Return the share of a text's characters that are letters, their marks, or spaces."""
    kinds = [unicodedata.category(character)[0] for character in text]
    return sum(kind in "LMZ" for kind in kinds) / max(1, len(kinds))


def letter_words(text: str) -> list[tuple[int, int]]:
    """Return where the words of letters begin and end, in characters; words are those of [`word_starts`]."""
    starts = [*word_starts(text).tolist(), len(text)]
    spans = [(begin, begin + len(text[begin:end].rstrip())) for begin, end in pairwise(starts)]
    return [(begin, end) for begin, end in spans if is_letters(text[begin:end])]


def _begins_word(kinds: np.ndarray) -> np.ndarray:
    """Return whether each character begins a word: ``bool [n]``; there are no ignored ones among them."""
    is_alone = (kinds == PUNCTUATION) | (kinds == IDEOGRAPH)
    is_space = kinds == SPACE
    closes = is_alone | is_space
    is_mark = kinds == MARK
    if is_mark.any():
        # A mark is of the kind of its base: after a space it is a letter, after a lone character it belongs to that one.
        base = np.maximum.accumulate(np.where(is_mark, -1, np.arange(len(kinds))))
        has_letter = (base >= 0) & ~is_space[base]
        closes = np.where(is_mark, has_letter & is_alone[base], closes)
    follows = np.concatenate([[True], closes[:-1]])[: len(kinds)]
    begins = is_alone | (follows & ~is_space)
    if is_mark.any():
        begins &= ~(is_mark & has_letter)
    return begins


def _segmented(text: str, starts: np.ndarray, segmenter: Segmenter) -> np.ndarray:
    """Replace the starts inside runs that are written without spaces by the segmenter's."""
    kinds = character_kinds(text)
    in_run = (kinds == IDEOGRAPH) | (kinds == KANA)
    if not text.isascii():
        points = code_points(text)
        is_letter = (kinds == LETTER) | (kinds == MARK)
        for low, high in _UNSPACED_RANGES:
            in_run |= (points >= low) & (points <= high) & is_letter
    in_run = np.concatenate([[False], in_run, [False]])
    edges = np.flatnonzero(in_run[1:] != in_run[:-1])
    begins = np.zeros(len(text) + 1, dtype=np.bool_)
    begins[starts] = True
    begins[:-1] &= ~in_run[1:-1]
    for low, high in edges.reshape(-1, 2).tolist():
        lengths = [len(piece) for piece in _pieces(text[low:high], segmenter) if piece]
        begins[low + np.cumsum([0, *lengths])[:-1]] = True
        begins[high] |= high < len(text) and kinds[high] == LETTER
    return np.flatnonzero(begins[:-1])


def _pieces(run: str, segmenter: Segmenter) -> list[str]:
    name = getattr(segmenter, "name", None) or getattr(segmenter, "__qualname__", type(segmenter).__name__)
    try:
        pieces = list(segmenter(run))
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (somebody else's code)
        raise InputError(f"word_segmenter={name!r} fails for {run[:40]!r}: {one_line(error)}") from error
    if not all(isinstance(piece, str) for piece in pieces) or "".join(pieces) != run:
        shown = str(pieces[:20])[:80]
        raise InputError(
            f"word_segmenter={name!r} turned {run[:40]!r} into {shown}; it must return strings that join to the run"
        )
    return pieces


@dataclass(frozen=True)
class NamedSegmenter:
    """A segmenter by its name, so that other processes and caches know it: ``jieba``, or ``package.module:function``.

    Args:
        name: A known name, or where the function is.

    Raises:
        InputError: If it cannot be imported.
    """

    name: str

    def __post_init__(self) -> None:
        """Import it now: a mistake must show before the text is read."""
        _segmenter(self.name)

    def __call__(self, run: str) -> Sequence[str]:
        """Return the words of a run of characters."""
        return _segmenter(self.name)(run)


@cache
def _segmenter(name: str) -> Segmenter:
    if name == "jieba":
        try:
            jieba = importlib.import_module("jieba")
        except ImportError as error:
            raise InputError(
                "word_segmenter='jieba' needs the package jieba: pip install 'hf-pretrain[chinese]'"
            ) from error
        jieba.setLogLevel(logging.WARNING)
        return jieba.lcut
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(
            f"word_segmenter={name!r} is unknown: name 'jieba', or a function that returns the words of a text as "
            "package.module:function"
        )
    if os.getcwd() not in sys.path:
        # As `python -m` does: a file of the user lies in the folder where the program was started.
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # noqa: BLE001 (importing somebody else's code)
        raise InputError(f"word_segmenter={name!r} cannot be imported: {one_line(error)}") from error
    if not callable(found):
        raise InputError(f"word_segmenter={name!r} is a {type(found).__name__}, not a function")
    return found


def next_visible(kinds: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the offset of the first character at or after each offset that is neither white space nor ignored.

    Args:
        kinds: ``character_kinds`` of the text, ``uint8 [n]``.
        offsets: Character offsets, any shape.

    Returns:
        Offsets of the same shape; ``n`` where nothing visible follows.
    """
    is_visible = (kinds != SPACE) & (kinds != IGNORED)
    is_hidden = np.append(~is_visible, True)
    # What is hidden is most often one space.
    found = offsets + is_hidden.take(offsets, mode="clip")
    rest = is_hidden.take(found, mode="clip")
    if rest.any():
        ends = np.append(np.flatnonzero(is_visible[1:] & ~is_visible[:-1]) + 1, len(kinds))
        found[rest] = ends[np.minimum(np.searchsorted(ends, found[rest]), len(ends) - 1)]
    return found
