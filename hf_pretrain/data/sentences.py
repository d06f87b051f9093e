"""Where sentences begin: a fast splitter by regular expression, and the interface of any other.

A splitter is a callable from a text to the ascending character offsets at which its sentences start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

SentenceSplitter = Callable[[str], Sequence[int]]

_FULL_STOPS = ".!?…؟۔।॥։።"
_WIDE_STOPS = "。！？｡．"
_CLOSERS = "\"'”’»›)\\]}」』）】》〉］｝〕"
# A bound, lest a long run of stops be read to its end from each of them.
_MOST_CLOSERS = 8
_LETTERS = [chr(point) for point in range(0x2000)]
_LOWER = "".join(letter for letter in _LETTERS if letter.islower())
_UPPER = re.compile(f"[{''.join(letter for letter in _LETTERS if letter.isupper())}]")

# A full stop after these is not an end. Those that do end sentences (etc., Inc., a.m.) are left to the letter case.
_ABBREVIATIONS = (
    "mr mrs ms mme mlle dr prof st mt ft rev hon gen col capt cmdr maj lt sgt gov sen rep pres fr sra vs cf viz ca "
    "fig figs no nos vol vols pp eq eqs sec ch chap art ed eds al bzw nr bd z.b d.h u.a e.g i.e "
    "jan feb mar apr jun jul aug sept oct nov dec"
).split()
_LONGEST = max(map(len, _ABBREVIATIONS))


def _guards(initials: str) -> str:
    """Return look-behinds that refuse the full stop of an abbreviation, an initial or a number that counts a line."""
    by_length = [[re.escape(word) for word in _ABBREVIATIONS if len(word) == n] for n in range(1, _LONGEST + 1)]
    words = [rf"(?<!\b(?i:{'|'.join(group)})\.)" for group in by_length if group]
    guards = "".join([rf"(?<!\b{initials}\.)", r"(?<!\n\d\.)", r"(?<!\n\d\d\.)", *words])
    # Most sentences end in a word that is longer than any abbreviation: no need to ask.
    return rf"(?:(?<=[a-z]{{{_LONGEST + 1}}}\.)|{guards})"


def _boundary(not_before: str, initials: str) -> re.Pattern[str]:
    """Compile what lies between two sentences: a match ends where the next one starts.

    A class of characters comes first, so that the engine skips to the next candidate; the branches then look back.
    """
    wide = rf"(?<=[{_WIDE_STOPS}])[{_WIDE_STOPS}{_CLOSERS}…]*+\s*+"
    closers = rf"[{_FULL_STOPS}{_CLOSERS}]{{0,{_MOST_CLOSERS}}}+"
    narrow = rf"(?<=[{_FULL_STOPS}])(?:(?<!\.)|{_guards(initials)}){closers}\s++(?!{not_before})"
    line = rf"(?<=\n)(?:[^\S\n]*+\n\s*+|\s*+(?!{not_before}))"
    return re.compile(rf"[{_FULL_STOPS}{_WIDE_STOPS}\n](?:{wide}|{narrow}|{line})")


_CASED = _boundary(f"[{_LOWER}]", "[A-HJ-Z]")
_UNCASED = _boundary(r"(?!)", "[b-hj-z]")


def sentence_starts(text: str) -> list[int]:
    """Return where sentences start, by punctuation and lines.

    A sentence ends at one of ``. ! ? …`` and their like in other scripts, with the quotes and brackets that close
    after it, before white space; at ``。！？`` with or without white space; and at the end of a line. It goes on where
    a lower-case letter follows (unless the text has no upper-case letters at all, or the line in between is blank),
    after common abbreviations, initials and the number of a list item. So most wrapped sentences stay whole.

    Args:
        text: Any text.

    Returns:
        Ascending character offsets, the first of them 0; empty for a text of white space.
    """
    if not text or text.isspace():
        return []
    pattern = _CASED if _UPPER.search(text) else _UNCASED
    starts = [0]
    starts.extend(match.end() for match in pattern.finditer(text))
    if starts[-1] >= len(text):
        starts.pop()
    if len(starts) > 1 and not text[: starts[1]].strip():
        del starts[1]
    return starts


def one_per_line(text: str) -> list[int]:
    """Return where the lines that are not blank start, for text with one sentence a line."""
    starts, offset = [], 0
    for line in text.split("\n"):
        if line and not line.isspace():
            starts.append(offset)
        offset += len(line) + 1
    return starts
