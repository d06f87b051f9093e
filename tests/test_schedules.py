"""Values that change in training, as they are written and as they are read."""

import math

import numpy as np
import pytest

from hf_pretrain.errors import InputError, Range
from hf_pretrain.objectives.encoder.arguments import describe
from hf_pretrain.objectives.encoder.trainer import EncoderTrainer
from hf_pretrain.schedules import Schedule, TrainingSteps


def parse(text, **limits):
    return Schedule.parse(text, name="rate_schedule", **limits)


class TestValues:
    def test_steps(self):
        schedule = parse("100:0.3, 1100:0.1,2100:0.5")
        assert not schedule.is_share
        expected = {0: 0.3, 100: 0.3, 350: 0.25, 1100: 0.1, 1600: 0.3, 2100: 0.5, 10**9: 0.5}
        assert {step: schedule.at(step, 10**6) for step in expected} == pytest.approx(expected)
        assert schedule.at(350, 7) == schedule.at(350, 10**6), "the length of the training does not matter"

    def test_shares_of_all_steps(self):
        schedule = parse(" 0%:50 , 50% : 25 ")
        assert schedule.is_share
        for total in (10, 1000):
            assert [schedule.at(total * share // 10, total) for share in (0, 2, 5, 9)] == pytest.approx(
                [50, 40, 25, 25]
            )

    def test_one_point_is_a_constant(self):
        assert [parse("5:0.2").at(step, 10) for step in (0, 5, 9)] == [0.2] * 3

    def test_many_steps_at_once(self):
        schedule, steps = parse("0:1, 4:3"), np.array([[0, 1], [2, 9]])
        np.testing.assert_allclose(schedule.at(steps, 10), [[1, 1.5], [2, 3]])
        assert type(schedule.at(1, 10)) is float
        assert [schedule.at(int(step), 10) for step in steps.flat] == schedule.at(steps, 10).ravel().tolist()

    def test_before_a_training_its_first_value_counts(self):
        assert parse("0%:2, 100%:1").at(0, 0) == 2


class TestRefusals:
    @pytest.mark.parametrize("text", ["", "0.3", "0:", ":1", "0:a", "0:1:2", "0:1;5:2", "0:1,", "0: 1 2"])
    def test_what_is_no_list_of_pairs(self, text):
        with pytest.raises(InputError, match="rate_schedule='.*' is no number and no schedule: give pairs STEP:VALUE"):
            parse(text)

    @pytest.mark.parametrize(
        "text", ["0%:1, 10:2", "10:1, 5:2", "5:1, 5:2", "-1:1, 5:2", "0%:1, 101%:2", "nan:1", "0:1, inf%:1"]
    )
    def test_steps_that_are_none(self, text):
        with pytest.raises(InputError, match="rate_schedule='.*' has steps that mix, fall or lie outside"):
            parse(text)

    @pytest.mark.parametrize("value", ["1.01", "-0.1", "nan", "inf"])
    def test_values(self, value):
        with pytest.raises(InputError, match=rf"goes to {value}: values must be finite numbers from 0 to 1"):
            parse(f"0:0.5, 9:{value}", allowed=Range(0.0, 1.0))
        assert parse("0:1, 1:0", allowed=Range(0.0, 1.0)).at(1, 2) == 0

    def test_values_without_an_upper_bound(self):
        with pytest.raises(InputError, match="goes to inf: values must be finite numbers of at least 0"):
            parse("0:inf")
        assert math.isfinite(parse("0:1e9").at(0, 1))


def test_the_step_of_an_example_counts_short_steps_at_the_end_of_an_epoch():
    """10 examples in steps of 4 are 3 steps an epoch: the first example of epoch 1 is in step 3, not 2."""
    steps = TrainingSteps(examples_per_step=4, per_epoch=3, total=9)
    epochs, indices = np.repeat([0, 1, 2], 10), np.tile(np.arange(10), 3)
    expected = [epoch * 3 + index // 4 for epoch in range(3) for index in range(10)]
    assert steps.step_of(epochs=epochs, indices=indices).tolist() == expected


def test_the_formula_of_a_card_says_that_a_weight_changes():
    weights = {"mlm": parse("0%:1, 100%:0"), "word_order": 0.5, "pair": parse("0:0, 9:0")}
    formula = describe(EncoderTrainer.objective, ["mlm", "word_order", "sop"], weights).formula
    assert formula.count(r"w(t) \cdot") == 1 and formula.count(r"0.5 \cdot") == 1, (
        "a weight of 0 throughout has no term"
    )
