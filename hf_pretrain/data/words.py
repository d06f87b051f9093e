"""Where words begin, read off the text, so that every tokenizer sees the same words.

The rule is BERT's: white space separates words, a punctuation character is a word of its own, and so is an ideograph.
What BERT's normalizer deletes (control and format characters, private use) neither begins nor separates words here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from hf_pretrain.errors import InputError

Segmenter = Callable[[str], Sequence[str]]

# Kinds of characters, as far as word boundaries go.
LETTER, SPACE, PUNCTUATION, IDEOGRAPH, KANA, MARK, IGNORED = range(7)

# The blocks that BERT sets apart; kana is not among them. Source: google-research/bert, tokenization.py.
IDEOGRAPH_RANGES = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)
# Hiragana, katakana, bopomofo and half-width kana, with the iteration and closing marks before them.
_KANA_RANGES = (
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x3100, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0xFF66, 0xFF9F),
)
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


def character_kinds(text: str) -> np.ndarray:
    """Return the kind of each character, one of this module's constants: ``uint8 [len(text)]``."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return _kind_table()[points]


def word_starts(text: str, *, segmenter: Segmenter | None = None, kinds: np.ndarray | None = None) -> np.ndarray:
    """Return where words start: after white space, at and after punctuation, at and after each ideograph.

    A combining mark stays with its letter. Without a segmenter, an ideograph is a word and kana counts as letters.

    Args:
        text: Any text.
        segmenter: Cuts a run of Chinese or Japanese characters (ideographs and kana) into words, for example
            ``jieba.lcut``; the pieces must join to the run.
        kinds: ``character_kinds(text)``, where the caller has it already.

    Returns:
        Ascending character offsets, ``int64 [num_words]``.

    Raises:
        InputError: If the segmenter loses or changes characters.

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


def _begins_word(kinds: np.ndarray) -> np.ndarray:
    """Return whether each character begins a word: ``bool [n]``; there are no ignored ones among them."""
    is_alone = (kinds == PUNCTUATION) | (kinds == IDEOGRAPH)
    is_space = kinds == SPACE
    closes = is_alone | is_space
    is_mark = kinds == MARK
    if is_mark.any():
        # A mark is what its base is: after a space it is a letter, after a lone character it belongs to that one.
        base = np.maximum.accumulate(np.where(is_mark, -1, np.arange(len(kinds))))
        has_letter = (base >= 0) & ~is_space[base]
        closes = np.where(is_mark, has_letter & is_alone[base], closes)
    follows = np.concatenate([[True], closes[:-1]])[: len(kinds)]
    begins = is_alone | (follows & ~is_space)
    if is_mark.any():
        begins &= ~(is_mark & has_letter)
    return begins


def _segmented(text: str, starts: np.ndarray, segmenter: Segmenter) -> np.ndarray:
    """Replace the starts inside runs of ideographs and kana by the segmenter's."""
    kinds = character_kinds(text)
    in_run = np.concatenate([[False], (kinds == IDEOGRAPH) | (kinds == KANA), [False]])
    edges = np.flatnonzero(in_run[1:] != in_run[:-1])
    begins = np.zeros(len(text) + 1, dtype=np.bool_)
    begins[starts] = True
    begins[:-1] &= ~in_run[1:-1]
    for low, high in edges.reshape(-1, 2).tolist():
        pieces = list(segmenter(text[low:high]))
        if "".join(pieces) != text[low:high]:
            raise InputError(
                f"word_segmenter turned {text[low:high]!r} into {pieces!r}; its pieces must join to the run"
            )
        begins[low + np.cumsum([0, *map(len, pieces)])[:-1]] = True
        begins[high] |= high < len(text) and kinds[high] == LETTER
    return np.flatnonzero(begins[:-1])


def next_visible(kinds: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the offset of the first character at or after each offset that is neither white space nor ignored.

    Args:
        kinds: ``character_kinds`` of the text, ``uint8 [n]``.
        offsets: Character offsets, any shape.

    Returns:
        Offsets of the same shape; ``n`` where nothing visible follows.
    """
    is_visible = (kinds != SPACE) & (kinds != IGNORED)
    ends = np.flatnonzero(is_visible[1:] & ~is_visible[:-1]) + 1
    ends = np.append(ends, len(kinds))
    following = ends[np.minimum(np.searchsorted(ends, offsets, side="right"), len(ends) - 1)]
    return np.where(np.append(is_visible, False)[np.minimum(offsets, len(kinds))], offsets, following)
