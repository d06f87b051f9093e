"""Schedules: numbers that change in the course of training."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import numpy as np

from hf_pretrain.errors import InputError, Range

_FORM = (
    "give pairs STEP:VALUE with rising steps ('0:0.3, 10000:0.15') or with shares of all steps ('0%:0.3, 50%:0.15')"
)


class Schedule(float):
    """A number that is linear between given points in training, and constant before the first and after the last.

    As a number it is its last value. Evaluation uses that, so its totals can be compared over the whole training.

    Attributes:
        points: Rising; numbers of steps already done, or shares of all steps from 0 to 1.
        values: One a point.
        is_share: Whether points are shares.
        text: The option as it was written.
    """

    points: tuple[float, ...]
    values: tuple[float, ...]
    is_share: bool
    text: str

    def __new__(cls, points: tuple[float, ...], values: tuple[float, ...], is_share: bool, text: str) -> Schedule:
        """Make the number from the last value."""
        schedule = super().__new__(cls, values[-1])
        schedule.points, schedule.values, schedule.is_share, schedule.text = points, values, is_share, text
        return schedule

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle all of it."""
        return type(self), (self.points, self.values, self.is_share, self.text)

    def __bool__(self) -> bool:
        """Whether it is ever another value than 0."""
        return any(self.values)

    def __eq__(self, other: object) -> bool:
        """Compare with other schedules; no schedule equals a number."""
        return isinstance(other, Schedule) and self.__reduce__()[1][:3] == other.__reduce__()[1][:3]

    __hash__ = float.__hash__

    def __repr__(self) -> str:
        """Return the text, quoted."""
        return repr(self.text)

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    @classmethod
    def parse(cls, text: str, *, name: str, allowed: Range | None = None) -> Schedule:
        """Read a schedule such as "0:0.3, 10000:0.15" (steps) or "0%:50, 50%:25" (shares of all steps).

        Args:
            text: The value of the option.
            name: Name of the option, for messages.
            allowed: The values that it may take; by default all from 0.

        Returns:
            The schedule.

        Raises:
            InputError: If the text is no schedule, or a value is out of range.
        """
        pairs = [[part.strip() for part in pair.split(":")] for pair in str(text).split(",")]
        shares = {pair[0].endswith("%") for pair in pairs}
        try:
            points = tuple(float(point.removesuffix("%")) / (100 if True in shares else 1) for point, _ in pairs)
            values = tuple(float(value) for _, value in pairs)
        except ValueError:
            raise InputError(f"{name}={text!r} is no number and no schedule: {_FORM}") from None
        rises = all(a < b for a, b in zip(points, points[1:], strict=False))
        last = 1 if True in shares else 2**63
        if len(shares) > 1 or not rises or not 0 <= points[0] <= points[-1] <= last:
            raise InputError(f"{name}={text!r} has steps that mix, fall or lie outside of training: {_FORM}")
        allowed = allowed or Range(0.0)
        wrong = [value for value in values if not allowed.holds(value)]
        if wrong:
            raise InputError(f"{name}={text!r} goes to {wrong[0]:g}: values must be finite numbers {allowed}")
        return cls(points, values, True in shares, str(text))

    @overload
    def at(self, step: float, total: int) -> float: ...
    @overload
    def at(self, step: np.ndarray, total: int) -> np.ndarray: ...
    def at(self, step: float | np.ndarray, total: int) -> float | np.ndarray:
        """Return the value after some steps of training.

        Args:
            step: Steps already done, one number or an array.
            total: Steps of the whole training.

        Returns:
            One value a step.
        """
        point = step / max(total, 1) if self.is_share else step
        values = np.interp(point, self.points, self.values)
        return values if isinstance(step, np.ndarray) else float(values)


def weight_symbol(weight: float) -> str:
    """Return a weight as a formula shows it: the number, or w(t) if it changes in training."""
    return "w(t)" if isinstance(weight, Schedule) else f"{weight:g}"


class TrainingSteps(NamedTuple):
    """How the examples of a training are cut into steps.

    Attributes:
        examples_per_step: Examples of a step, over all micro-batches and ranks.
        per_epoch: Steps of an epoch; the last may have fewer examples.
        total: Steps of the whole training, or of its phase.
        first_epoch: Number of its first epoch.
    """

    examples_per_step: int
    per_epoch: int
    total: int
    first_epoch: int = 0

    def step_of(self, *, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Return the steps done before the one that sees each example: int64 of the shape of both arguments.

        Args:
            epochs: Epoch of each example.
            indices: Index of each example in the order of its epoch, over all ranks.
        """
        return (epochs - self.first_epoch) * self.per_epoch + indices // self.examples_per_step
