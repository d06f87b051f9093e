"""Values that change in the course of training, as an option writes them down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from hf_pretrain.errors import InputError, Range

_FORM = "give pairs PLACE:VALUE with rising places, all steps ('0:0.3, 10000:0.15') or all shares ('0%:0.3, 50%:0.15')"


@dataclass(frozen=True)
class Schedule:
    """A value that is linear between given places in training, and constant before the first and after the last.

    Attributes:
        places: Rising; numbers of steps already done, or shares of all steps from 0 to 1.
        values: One a place.
        is_share: Whether places are shares.
    """

    places: tuple[float, ...]
    values: tuple[float, ...]
    is_share: bool

    @classmethod
    def parse(
        cls, text: str, *, name: str, least: float = 0.0, most: float = math.inf, allowed: Range | None = None
    ) -> Schedule:
        """Read a schedule such as "0:0.3, 10000:0.15" (steps) or "0%:50, 50%:25" (shares of all steps).

        Args:
            text: The value of the option.
            name: Name of the option, for messages.
            least: Smallest value that the schedule may take.
            most: Greatest.
            allowed: Instead of both, the range of the option that the schedule changes.

        Returns:
            The schedule.

        Raises:
            InputError: If the text is no schedule, or a value is out of range.
        """
        pairs = [[part.strip() for part in pair.split(":")] for pair in str(text).split(",")]
        shares = {pair[0].endswith("%") for pair in pairs}
        try:
            places = tuple(float(place.removesuffix("%")) / (100 if True in shares else 1) for place, _ in pairs)
            values = tuple(float(value) for _, value in pairs)
        except ValueError:
            raise InputError(f"{name}={text!r} is no schedule: {_FORM}") from None
        rises = all(a < b for a, b in zip(places, places[1:], strict=False))
        last = 1 if True in shares else 2**63
        if len(shares) > 1 or not rises or not 0 <= places[0] <= places[-1] <= last:
            raise InputError(f"{name}={text!r} has places that mix, fall or lie outside of training: {_FORM}")
        allowed = Range(least, most) if allowed is None else allowed
        wrong = [value for value in values if not allowed.holds(value)]
        if wrong:
            raise InputError(f"{name}={text!r} goes to {wrong[0]:g}: values must be finite numbers {allowed}")
        return cls(places=places, values=values, is_share=True in shares)

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
        place = step / max(total, 1) if self.is_share else step
        values = np.interp(place, self.places, self.values)
        return values if isinstance(step, np.ndarray) else float(values)


class TrainingSteps(NamedTuple):
    """How the examples of a training are cut into steps.

    Attributes:
        examples_per_step: Examples of a step, over all micro-batches and ranks.
        per_epoch: Steps of an epoch; the last may have fewer examples.
        total: Steps of the whole training.
    """

    examples_per_step: int
    per_epoch: int
    total: int

    def step_of(self, *, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the steps done before the one that sees each example: int64 of the shape of both arguments.

        Args:
            epochs: Epoch of each example.
            places: Place of each example in the order of its epoch, over all ranks.
        """
        return epochs * self.per_epoch + places // self.examples_per_step
