"""The exceptions whose message is all that a user needs, and the checks that most options share.

`check_choice` refuses an unknown name, `check_range` a number out of range, `nearest` names what a user may have
meant, and `one_line` takes the cause out of another library's error. `check_numbers` checks all numbers of a dataclass
of options.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

# An end from here on is no choice of the option's, but where nonsense begins.
_SENSIBLE = 4096
_hints = cache(get_type_hints)


class InputError(ValueError):
    """Raised for input that a user can mend: a file, an option, a checkpoint.

    The message is one line that names the argument, its value and the fix; the programs print it and exit with status 2.
    """


class RunError(RuntimeError):
    """Raised when a run cannot go on although its input is right: a full disk, a dead process, a loss that is not finite.

    The message is one line that says what happened, what is left of the run and how it goes on; the programs print it and
    exit with status 1.
    """


def one_line(error: BaseException, *, line: int | None = None) -> str:
    """Return an error's message as one line.

    Args:
        error: The error.
        line: Number of the line that says the cause, where the others only repeat the call: 0 is the first, -1 the last.
            By default all lines are joined, after the error's type where they are few words.

    Returns:
        The message; the name of the type if there is none.
    """
    if line is None:
        text = " ".join(str(error).split())
        return text if len(text.split()) > 3 else f"{type(error).__name__} {text}".strip()
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[line if -len(lines) <= line < len(lines) else -1].strip()


def nearest(name: object, known: Collection[str], *, otherwise: str | None = None) -> str:
    """Return the end of a message about an unknown name: the nearest known one.

    Args:
        name: The unknown name.
        known: The known names.
        otherwise: The end where no known name is near; by default it lists them all.
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose one of {', '.join(known)}" if otherwise is None else otherwise


def check_choice(value: object, known: Collection[Any], *, name: str) -> None:
    """Refuse a value that is none of the known ones.

    Args:
        value: The value.
        known: The values that the argument takes.
        name: Name of the argument.

    Raises:
        InputError: Naming the argument, its value, the known ones, and the nearest.
    """
    if value in known:
        return
    choices = [str(choice) for choice in known if choice is not None]
    near = nearest(value, choices, otherwise="")
    raise InputError(f"{name}={value!r} must be one of {', '.join(choices)}{'; ' if near else ''}{near}")


def check_range(value: float, allowed: str, *, name: str, hint: str = "") -> None:
    """Refuse a number that is out of range.

    Args:
        value: The number.
        allowed: The range, as `Range.parse` reads it, such as "[1, inf)".
        name: Name of the argument.
        hint: What to give instead, such as "0.1 is usual".

    Raises:
        InputError: Naming the argument, its value, the range and the hint.
    """
    known = Range.parse(allowed)
    if not known.holds(value):
        raise InputError(f"{name}={value!r} must be a number {known}{'; ' if hint else ''}{hint}")


class Range(NamedTuple):
    """The numbers that an option takes.

    Attributes:
        least: Smallest.
        most: Greatest.
        above: Whether `least` itself is out of range.
        below: Whether `most` itself is out of range.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read a range such as "[0, 1)"; a bracket includes its end, a parenthesis does not."""
        least, most = text[1:-1].split(",")
        return cls(float(least), float(most), above=text[0] == "(", below=text[-1] == ")")

    def holds(self, value: float) -> bool:
        """Whether a number is finite and in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = self.least < value if self.above else self.least <= value
        return above and (value < self.most if self.below else value <= self.most)

    def bound(self, value: float) -> str | None:
        """Return in words the end that a number is beyond; None where the message should name the whole range."""
        if self.most < _SENSIBLE or not math.isfinite(value):
            return None
        if value <= self.least:
            return f"{'above' if self.above else 'at least'} {self.least:g}"
        return f"at most {self.most:.0f}"

    def __str__(self) -> str:
        """Return the range in words, to follow "a number"."""
        if self.least <= _ANY.least:
            return "that is finite" if self.least == -math.inf else "of at most 63 bits"
        least, most = (f"{int(end)}" if math.isfinite(end) and end == int(end) else f"{end:g}" for end in self[:2])
        if self.most == math.inf:
            return f"{'above' if self.above else 'of at least'} {least}"
        if not self.above:
            return f"from {least} to {'below ' if self.below else ''}{most}"
        return f"above {least} and {'below' if self.below else 'at most'} {most}"


_ANY = Range(-(2.0**63), 2.0**63, below=True)
# The ranges of options by their names, which mean the same in every dataclass.
_RANGES_OF_NAMES = {
    re.compile(pattern): Range.parse(text)
    for pattern, text in {
        r"(\w+_)?(weight|decay)": "[0, inf)",
        r"\w+_(probability|share|fraction)": "[0, 1]",
        r"\w+_dropout(_prob)?": "[0, 1)",
        r"temperature": "(0, inf)",
        r"(\w+_)?learning_rate": "[0, inf)",
        # What NumPy takes.
        r"(data_)?seed": "[0, 4294967295]",
        r"hidden_size|embedding_size|num_attention_heads|(eval_)?lanes": "[1, 65536]",
        r"num_hidden_layers": "[1, 4096]",
        r"intermediate_size": "[1, 1048576]",
        r"max_position_embeddings|block_size": "[1, 16777216]",
        r"(eval_)?mem_len": "[0, 65536]",
        r"(eval_)?tgt_len": "[1, 65536]",
    }.items()
}


def declared(options: Any, name: str) -> dict[str, str]:
    """Return a class variable that maps options to text, such as `ranges`, joined over a dataclass and its bases."""
    return {
        option: text for cls in reversed(type(options).__mro__) for option, text in vars(cls).get(name, {}).items()
    }


def range_of(options: Any, name: str) -> Range | None:
    """Return the range of an option: as the class variable `ranges` of its dataclass says, or that of its name, if any."""
    text = declared(options, "ranges").get(name)
    if text is not None:
        return Range.parse(text)
    return next((found for pattern, found in _RANGES_OF_NAMES.items() if pattern.fullmatch(name)), None)


def check_numbers(options: Any) -> None:
    """Refuse numbers that are out of their option's range, not finite, or no numbers.

    Args:
        options: Instance of a dataclass of options. Its classes may say ranges, as `Range.parse` reads them, by option in the
            class variable `ranges`.

    Raises:
        InputError: Naming the option, its value and what it takes.
    """
    for field in fields(options):
        value, kinds = getattr(options, field.name), types_of(options, field.name)
        if str in kinds and float not in kinds:  # the value may be a flag or a word too
            kinds = set()
        if isinstance(value, bool) or not (kinds & {int, float} or isinstance(value, (int, float, list, dict))):
            continue
        allowed = range_of(options, field.name) or (Range() if float in kinds else _ANY)
        if kinds & {int, float}:
            is_number = isinstance(value, Real) and (float in kinds or isinstance(value, Integral))
            if not (is_number and allowed.holds(value)) and not (value is None and NoneType in kinds):
                kind = "a number" if float in kinds else "a whole number"
                beyond = allowed.bound(value) if is_number else None
                usual = "" if field.default in (MISSING, None, value) else f"; the default is {field.default}"
                raise InputError(f"{field.name}={value!r} must be {beyond or f'{kind} {allowed}'}{usual}")
        elif not all(allowed.holds(number) for number in _numbers_in(value)):
            raise InputError(f"{field.name}={value!r}: each number in it must be one {allowed}")


def types_of(options: Any, name: str) -> set[Any]:
    """Return the types that an option may have; `options` is a dataclass or an instance of one."""
    # Not the field's own annotation: a parser of transformers takes None and str out of that.
    hint = _hints(options if isinstance(options, type) else type(options))[name]
    return set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}


def _numbers_in(value: Any) -> Iterator[float]:
    """Yield the numbers of nested lists and mappings."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, Real) and not isinstance(item, bool):
            yield float(item)


class Terminated(KeyboardInterrupt):
    """Raised where a program is to end at once because of SIGTERM; open files are closed, as after an interrupt."""


class StoppedError(RunError):
    """Raised when training has stopped early because of SIGTERM, with a whole checkpoint; the programs exit with status 143."""
