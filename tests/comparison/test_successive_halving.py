"""Successive halving against schedules by hand, and the budget under random arms."""

import math
from fractions import Fraction

import numpy as np
import pytest

from hf_pretrain.errors import InputError
from hf_pretrain.transfer.comparison.halving import Rung, better_half, plan_rungs, successive_halving


def linear(price):
    return lambda examples: price * examples


def test_a_schedule_by_hand():
    """Five arms, then 3, 2, 1: of arms at 1 a first rung of E costs 5 E + 3 · 2 E + 2 · 4 E + 8 E = 27 E."""
    costs = [linear(1)] * 5
    assert plan_rungs(costs, full=1000, least=4, budget=27 * 12) == [
        Rung(12, 5),
        Rung(24, 3),
        Rung(48, 2),
        Rung(96, 1),
    ]
    # A little less pays for a step less.
    assert plan_rungs(costs, full=1000, least=4, budget=27 * 12 - 1)[0] == Rung(8, 5)
    assert plan_rungs(costs, full=1000, least=4, budget=27 * 12 * 2, seeds=2)[0] == Rung(12, 5)
    calls = []

    def score(arm, examples):
        calls.append((arm, examples))
        return {"a": 1, "b": 5, "c": 3, "d": 4, "e": 2}[arm] + (100 if (arm, examples) == ("c", 48) else 0)

    found = successive_halving("abcde", plan_rungs(costs, full=1000, least=4, budget=27 * 12), score)
    assert [list(scores) for scores in found] == [list("abcde"), ["b", "c", "d"], ["b", "d"], ["b"]]
    assert calls[:5] == [(arm, 12) for arm in "abcde"] and calls[-1] == ("b", 96)


def test_the_more_costly_arms_are_reckoned_with():
    """Arms at 1 and 9: 10 E in the first rung and, if the costly one goes on, 18 E in the second."""
    costs = [linear(1), linear(9)]
    assert plan_rungs(costs, full=10_000, least=1, budget=28 * 7)[0].examples == 7
    assert plan_rungs(costs, full=10_000, least=1, budget=28 * 7 - 1)[0].examples == 6


def test_what_is_affordable_in_full_is_run_in_full():
    costs = [linear(2), linear(3)]
    assert plan_rungs(costs, full=100, least=8, budget=None) == [Rung(100, 2)]
    assert plan_rungs(costs, full=100, least=8, budget=1000, seeds=2) == [Rung(100, 2)]
    # 2 (5 E + 3 · 2 E) is 22 E.
    assert plan_rungs(costs, full=100, least=8, budget=999, seeds=2) == [Rung(40, 2), Rung(80, 1)]
    assert plan_rungs(costs[:1], full=100, least=8, budget=199) == [Rung(96, 1)]
    # Rows for fewer doublings than there are rungs: no rung is longer than a full run.
    many = [linear(1)] * 8
    assert plan_rungs(many, full=36, least=8, budget=287) == [Rung(8, 8), Rung(16, 4), Rung(32, 2), Rung(36, 1)]
    # Behind a rung of full runs there is none.
    assert plan_rungs(many[:7], full=28, least=8, budget=195) == [Rung(8, 7), Rung(16, 4), Rung(28, 2)]
    # 168 for the rungs 8, 16, 20 is more than 160 for all arms in full.
    with pytest.raises(InputError, match="need 160"):
        plan_rungs(many, full=20, least=8, budget=159)


def test_a_budget_that_pays_for_nothing_is_refused_with_what_is_needed():
    with pytest.raises(InputError, match="need 112"):
        plan_rungs([linear(1), linear(9)], full=100, least=4, budget=111)
    assert plan_rungs([linear(1), linear(9)], full=100, least=4, budget=112)[0] == Rung(4, 2)
    with pytest.raises(InputError, match="at least one arm"):
        plan_rungs([], full=100, least=4, budget=1)


def test_no_outcome_exceeds_the_budget_and_most_of_it_is_planned():
    random = np.random.default_rng(0)
    for _ in range(300):
        number, seeds, least = int(random.integers(1, 12)), int(random.integers(1, 4)), int(random.integers(1, 40))
        prices = random.uniform(0.1, 10, size=number)
        most = random.integers(20, 5000, size=number)
        # An arm that stops learning after some rows, as features do.
        costs = [lambda e, p=p, m=m: float(p * min(e, m)) for p, m in zip(prices, most, strict=True)]
        full, budget = int(random.integers(least, 6000)), float(10 ** random.uniform(1, 6))
        try:
            rungs = plan_rungs(costs, full=full, least=least, budget=budget, seeds=seeds)
        except InputError:
            continue
        spent = Fraction(0)

        def score(arm, examples, costs=costs, seeds=seeds):
            nonlocal spent
            spent += seeds * Fraction(costs[arm](examples))
            # The costly arms go on, which is the worst case.
            return costs[arm](10**9)

        found = successive_halving(range(number), rungs, score)
        assert spent <= budget * (1 + 1e-12) and rungs[-1].examples <= full
        assert [len(scores) for scores in found] == [rung.arms for rung in rungs]
        for before, after in zip(rungs, rungs[1:], strict=False):
            assert after.examples in (2 * before.examples, full) and after.arms == (before.arms + 1) // 2


def test_ties_keep_the_first_and_no_number_is_last():
    assert better_half({"a": 1.0, "b": 2.0, "c": 1.0, "d": 2.0}, keep=2) == ["b", "d"]
    assert better_half({"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.0}, keep=2) == ["a", "b"]
    assert better_half({"a": math.nan, "b": -3.0, "c": math.nan}, keep=2) == ["a", "b"]
