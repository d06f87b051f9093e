"""Successive halving: all arms get a little, and the better half goes on with twice as much.

[`plan_rungs`] shares a budget out before anything is run, so that no outcome can exceed it. [`successive_halving`] runs the plan.
Nothing here knows what an arm is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from hf_pretrain.errors import InputError, check_range

Cost = Callable[[int], float]
"""The cost of an arm with so many examples; it does not fall with their number."""
Arm = TypeVar("Arm", bound=Hashable)


class Rung(NamedTuple):
    """A round of the comparison.

    Attributes:
        examples: Examples that each arm learns from.
        arms: Arms that take part.
    """

    examples: int
    arms: int


def plan_rungs(costs: Sequence[Cost], *, full: int, least: int, budget: float | None, seeds: int = 1) -> list[Rung]:
    """Share a budget out.

    The first rung is the largest number of examples that the budget pays for whichever arms go on: the more costly ones are
    reckoned with. If the budget pays for all arms in full, there is one rung.

    Args:
        costs: The cost of each arm, for one seed.
        full: Examples of a full run.
        least: Examples of a step; those of the first rung are a multiple.
        budget: What all rungs may cost; None for no limit.
        seeds: Runs of each arm in each rung.

    Returns:
        The rungs: half as many arms each time, rounded up, while examples double; to a single arm, or to full runs.

    Raises:
        InputError: If the budget does not pay for the first step.

    Source: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", with the
        halves that Karnin et al. 2013 keep.
    """
    if not costs:
        raise InputError("costs is empty: give at least one arm")
    for name, value in (("full", full), ("least", least), ("seeds", seeds)):
        check_range(value, "[1, inf)", name=name)
    in_full = seeds * math.fsum(cost(full) for cost in costs)
    if budget is None or in_full <= budget:
        return [Rung(full, len(costs))]
    counts = _halves(len(costs))

    def rungs_from(first: int) -> list[Rung]:
        # A rung behind one of full runs would have nothing new.
        return [
            Rung(min(first << number, full), count)
            for number, count in enumerate(counts)
            if number == 0 or first << (number - 1) < full
        ]

    def worst(first: int) -> float:
        return seeds * math.fsum(
            math.fsum(sorted((cost(rung.examples) for cost in costs), reverse=True)[: rung.arms])
            for rung in rungs_from(first)
        )

    if worst(least) > budget:
        raise InputError(
            f"budget={budget:.3g} does not pay for a step of each arm: {len(costs)} arms with {seeds} seeds need "
            f"{min(worst(least), in_full):.3g}; raise it, or leave arms out"
        )
    low, high = 1, max(1, (full >> (len(counts) - 1)) // least)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if worst(middle * least) <= budget else (low, middle - 1)
    return rungs_from(low * least)


def _halves(count: int) -> list[int]:
    """Return the numbers of arms of the rungs, to the last one."""
    found = [count]
    while found[-1] > 1:
        found.append((found[-1] + 1) // 2)
    return found


def better_half(scores: Mapping[Arm, float], *, keep: int) -> list[Arm]:
    """Return the arms with the best scores, in their given order; of equals the first, and what is no number last."""
    arms = list(scores)
    order = sorted(
        range(len(arms)), key=lambda index: (math.isnan(scores[arms[index]]), -_or_zero(scores[arms[index]]))
    )
    return [arms[index] for index in sorted(order[:keep])]


def _or_zero(score: float) -> float:
    return 0.0 if math.isnan(score) else score


def successive_halving(
    arms: Sequence[Arm], rungs: Sequence[Rung], score: Callable[[Arm, int], float]
) -> list[dict[Arm, float]]:
    """Run a plan.

    Args:
        arms: The arms, each different.
        rungs: What [`plan_rungs`] returned for them.
        score: Runs an arm with so many examples, and returns its score, better where larger.

    Returns:
        The scores of the arms in each rung.
    """
    left, found = list(arms), list[dict[Arm, float]]()
    for rung in rungs:
        left = left if not found else better_half(found[-1], keep=rung.arms)
        found.append({arm: score(arm, rung.examples) for arm in left})
    return found
