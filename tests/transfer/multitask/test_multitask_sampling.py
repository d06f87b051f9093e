"""The task and the rows of each step of a training on several tasks: frequencies, orders, and what a cut does not change."""

from functools import partial

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import chisquare

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.transfer.multitask.sampling import (
    MultiTaskRows,
    MultiTaskSampler,
    task_probabilities,
    tasks_of_steps,
)

SIZES = [40, 300, 7000]
N = np.array(SIZES, dtype=float)
# Sampling -> its options and what each task's probability is proportional to, as the papers write it.
RULES = {
    "proportional": ({}, N),
    "equal": ({}, np.ones(3)),
    "temperature": ({"temperature": 3.0}, N ** (1 / 3)),
    "capped": ({"cap": 100}, np.array([40.0, 100.0, 100.0])),
    "weights": ({"weights": [5, 1, 2]}, np.array([5.0, 1.0, 2.0])),
}


def p_value(tasks, expected):
    return chisquare(np.bincount(tasks, minlength=3), expected / expected.sum() * len(tasks)).pvalue


@pytest.mark.parametrize("name", RULES)
def test_draws_have_the_probabilities_of_the_rule(name):
    options, expected = RULES[name]
    found = task_probabilities(SIZES, sampling=name, **options)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)
    tasks = tasks_of_steps(SIZES, num_steps=20_000, total_steps=20_000, seed=3, sampling=name, **options)
    assert p_value(tasks, expected) > 1e-3
    # The other rules are told apart by the same number of draws.
    for other, (_, weights) in RULES.items():
        assert other == name or p_value(tasks, weights) < 1e-6, other


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_annealed_follows_its_formula(progress):
    found = task_probabilities(SIZES, sampling="annealed", progress=progress)
    expected = N ** (1 - 0.8 * progress)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)


def test_annealed_changes_with_the_step():
    steps = 40_000
    tasks = tasks_of_steps(SIZES, num_steps=steps, total_steps=steps, seed=1, sampling="annealed")
    for part in range(4):
        inside = slice(part * steps // 4, (part + 1) * steps // 4)
        shares = task_probabilities(SIZES, sampling="annealed", progress=np.linspace(0, 1, steps)[inside])
        assert p_value(tasks[inside], shares.sum(axis=0)) > 1e-3
    assert p_value(tasks[: steps // 4], N**0.2) < 1e-6


def test_draws_are_functions_of_the_seed_and_the_step():
    options = {"total_steps": 500, "sampling": "annealed"}
    whole = tasks_of_steps(SIZES, num_steps=500, seed=0, **options)
    np.testing.assert_array_equal(whole[:100], tasks_of_steps(SIZES, num_steps=100, seed=0, **options))
    assert (whole != tasks_of_steps(SIZES, num_steps=500, seed=1, **options)).any()


def test_one_task_is_all_steps():
    assert not tasks_of_steps([9], num_steps=50, total_steps=50, seed=0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "propotional"}, "sampling='propotional' must be one of"),
        ({"sampling": "temperature", "temperature": 0.0}, "temperature=0.0 must be a number above 0"),
        ({"sampling": "capped", "cap": 0}, "cap=0"),
        ({"sampling": "weights", "weights": [1, 2]}, "3 positive numbers"),
        ({"sampling": "weights", "weights": [1, 2, 0]}, "3 positive numbers"),
        ({"progress": 1.5}, "progress=1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        task_probabilities(SIZES, **options)


def test_a_task_without_examples_is_refused():
    with pytest.raises(InputError, match="sizes=\\[3, 0\\]"):
        task_probabilities([3, 0])


ROWS = [5, 12]
# 24 steps of 4 rows, of both tasks.
TASKS = np.array([0, 1, 1, 0, 1, 0, 0, 1] * 3)


def order(task, number):
    return draws.permutation(ROWS[task], seed=task, epoch=number)


def sampler(*, steps_per_epoch=8):
    orders = [partial(order, task) for task in range(2)]
    return MultiTaskSampler(ROWS, orders, tasks=TASKS, batch_size=4, steps_per_epoch=steps_per_epoch)


def rows_of(sampler, epochs):
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        found += indices
    return np.array(found).reshape(-1, 4)


def test_a_step_is_of_one_task_and_a_task_goes_through_its_rows_pass_by_pass():
    steps = rows_of(sampler(), range(3))
    np.testing.assert_array_equal(steps >= ROWS[0], np.repeat(TASKS[:, None] == 1, 4, axis=1))
    for task, offset in ((0, 0), (1, ROWS[0])):
        stream = steps[TASKS == task].ravel() - offset
        expected = np.concatenate([order(task, number) for number in range(12)])
        np.testing.assert_array_equal(stream, expected[: len(stream)])
        # Both end passes within a step.
        assert len(stream) > 2 * ROWS[task]


def test_an_epoch_by_itself_and_other_epochs_give_the_same_rows():
    whole = rows_of(sampler(), range(3))
    np.testing.assert_array_equal(rows_of(sampler(), [2]), whole[16:])
    np.testing.assert_array_equal(rows_of(sampler(), [2, 0]), whole[[*range(16, 24), *range(8)]])
    np.testing.assert_array_equal(rows_of(sampler(steps_per_epoch=6), range(4)), whole)


def test_rows_carry_the_name_of_their_task():
    rows = MultiTaskRows({"a": Dataset.from_dict({"x": [1, 2]}), "b": Dataset.from_dict({"y": [3, 4, 5]})})
    assert [rows[i] for i in range(5)] == [
        {"x": 1, "task": "a"},
        {"x": 2, "task": "a"},
        *({"y": y, "task": "b"} for y in (3, 4, 5)),
    ]
    for index in (5, -1):
        with pytest.raises(IndexError):
            rows[index]
