"""Options as fields of dataclasses: how one is declared, and how those of an instance are read and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from hf_pretrain.errors import check_choice, check_numbers, range_of, types_of
from hf_pretrain.schedules import Schedule


def option(default: Any = MISSING, help: str = "", *, factory: Callable[[], Any] | None = None) -> Any:
    """Declare an option: a dataclass field with a help text.

    Args:
        default: Value of the option where none is given.
        help: What the command line says about it.
        factory: Makes the default, where it is a list or the like.
    """
    if factory is not None:
        return field(default_factory=factory, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def number_or_text(text: str) -> float | str:
    """Return what the command line has for an option that takes a number or a schedule; `check_options` reads the rest."""
    try:
        return float(text)
    except ValueError:
        return text


def check_options(options: Any) -> None:
    """Read the schedules of a dataclass of options, and refuse unknown words and numbers that are out of range.

    An option takes a schedule if its type is `float | str`, and one of some words if its type is a `Literal`.

    Args:
        options: Instance of the dataclass; text of such options is replaced by a number or a `Schedule`.

    Raises:
        InputError: Naming the option, its value and what it takes.
    """
    for known in fields(options):
        value, kinds = getattr(options, known.name), types_of(options, known.name)
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words and not (value is None and NoneType in kinds):
            check_choice(value, words, name=known.name)
        if isinstance(value, str) and {float, str} <= kinds:
            number = number_or_text(value)
            if isinstance(number, str):
                allowed = range_of(options, known.name)
                number = Schedule.parse(number, name=known.name, allowed=allowed)
            setattr(options, known.name, number)
    check_numbers(options)


def schedules_of(options: Any) -> dict[str, Schedule]:
    """Return the schedules among the options of a dataclass, by name."""
    values = {known.name: getattr(options, known.name) for known in fields(options)}
    return {name: value for name, value in values.items() if isinstance(value, Schedule)}
