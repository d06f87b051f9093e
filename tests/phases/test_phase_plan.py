"""The list of phases in a recipe: lengths, rates, and what is refused before any text is read."""

import math

import pytest
import yaml

from helpers.phased_runs import PROGRAMS, PhasedRun, Text
from hf_pretrain.errors import InputError
from hf_pretrain.schedules import Schedule
from hf_pretrain.training import program
from hf_pretrain.training.parsing import parse_run
from hf_pretrain.training.phases.branch import Branch
from hf_pretrain.training.phases.course import EPOCHS_OF_A_PHASE, Course, Phase
from hf_pretrain.training.phases.plan import check_run, plan

ONE = {"name": "one", "share": "50%"}
TWO = {"name": "two", "share": "50%"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tmp_path_factory.mktemp("text"))


def planned(tmp_path, phases, *argv, method="mlm", branch=None, **options):
    """The phases of a recipe."""
    given = {"output_dir": str(tmp_path / "out"), "demo_corpus": True, "bf16": False, "max_steps": 100} | options
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({name: value for name, value in given.items() if value is not None} | {"phases": phases})
    )
    arguments = PROGRAMS[method].arguments
    parsed = parse_run(arguments, ["--config", str(recipe), *argv], prog=f"hf-pretrain {method}", description="")
    check_run(parsed.options[2], parsed.phases)
    return plan(parsed.options[2], parsed.phases, branch=branch)


def borders(phases):
    return [phases[0].course.phases[0].start, *(phase.end for phase in phases[0].course.phases)]


class TestLengths:
    @pytest.mark.parametrize(
        ("lengths", "ends"),
        [
            ([{"share": "70%"}, {"share": "20%"}, {"share": "10%"}], [0, 70, 90, 100]),
            ([{"share": 0.333}, {"share": 0.333}, {"share": 0.334}], [0, 33, 67, 100]),
            ([{"steps": 30}, {"share": "70%"}], [0, 30, 100]),
            ([{"steps": 30}, {"steps": 70}], [0, 30, 100]),
        ],
    )
    def test_they_make_up_the_run(self, tmp_path, lengths, ends):
        assert borders(planned(tmp_path, lengths)) == ends

    def test_steps_alone_say_how_long_the_run_is(self, tmp_path):
        phases = planned(tmp_path, [{"steps": 3}, {"steps": 4}], max_steps=None)
        assert borders(phases) == [0, 3, 7] and all(phase.options[2].max_steps == 7 for phase in phases)

    def test_a_branch_shares_what_is_left(self, tmp_path):
        branch = Branch("x", "trunk", 60, "stable", 2)
        phases = planned(tmp_path, [ONE, TWO], "--branch_from", "x", branch=branch)
        assert borders(phases) == [60, 80, 100]
        assert [phase.course.first_epoch for phase in phases] == [2 * EPOCHS_OF_A_PHASE, 3 * EPOCHS_OF_A_PHASE]

    @pytest.mark.parametrize(
        ("phases", "options", "message"),
        [
            ([ONE], {}, "make up 0.5 of the run"),
            ([ONE, TWO, {"share": "1%"}], {}, "make up 1.01 of the run"),
            ([{"steps": 30}, {"steps": 30}], {}, "make up 60 of 100 steps"),
            ([ONE, TWO], {"max_steps": None}, "max_steps=-1: 'one' has a share of all steps"),
            ([{"share": "0.1%"}, {"share": "99.9%"}], {}, "'phase 1' has no step of 100"),
            ([ONE, {"name": "two"}], {}, "'two' needs either a share"),
            ([ONE, TWO | {"steps": 50}], {}, "'two' needs either a share"),
            ([ONE, TWO | {"name": "one"}], {}, "'one' is the name of two phases"),
            ([ONE, TWO | {"share": "150%"}], {}, "more than the whole run"),
            ([ONE, TWO | {"share": "much"}], {}, "must be a share such as 70%"),
            ([ONE, {"steps": 2.5}], {}, "must be a whole number"),
            ([ONE, {"steps": 0}], {}, "must be a whole number of steps"),
        ],
    )
    def test_what_does_not(self, tmp_path, phases, options, message):
        with pytest.raises(InputError, match=message):
            planned(tmp_path, phases, **options)


class TestOptions:
    def test_a_phase_wins_over_the_command_line_and_that_over_the_run(self, tmp_path):
        phases = [ONE | {"block_size": 64}, TWO]
        first, second = planned(tmp_path, phases, "--block_size", "32", "--mlm_probability", "0.4", block_size=16)
        assert (first.options[0].block_size, second.options[0].block_size) == (64, 32)
        assert first.options[2].mlm_probability == second.options[2].mlm_probability == 0.4

    def test_values_are_read_as_on_the_command_line(self, tmp_path):
        entry = {"mlm_probability": "0%:0.3, 100%:0.1", "dataloader_drop_last": True, "adam_epsilon": 1e-6}
        first, second = planned(tmp_path, [ONE | entry, TWO])
        args = first.options[2]
        assert isinstance(args.mlm_probability, Schedule) and args.dataloader_drop_last is True
        assert args.adam_epsilon == 1e-6 and second.options[2].dataloader_drop_last is False

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"learning_rate": 1e-3}, "learning_rate cannot change with a phase: .*give rate"),
            ({"warmup_steps": 3}, "give rate"),
            ({"seed": 3}, "seed cannot change with a phase: it is of the whole run"),
            ({"output_dir": "x"}, "it is of the whole run"),
            ({"bf16": True}, "it is of the whole run"),
            ({"save_steps": 4}, "it is of the whole run"),
            ({"optim": "sgd"}, "it is of the whole run"),
            ({"push_to_hub": True}, "it is of the whole run"),
            ({"max_steps": 4}, "length of a phase is its share or its steps"),
            ({"vocab_size": 400}, "one tokenizer"),
            ({"tokenizer_name": "x"}, "one tokenizer"),
            ({"hidden_size": 64}, "the model is the same in all phases"),
            ({"model_name_or_path": "x"}, "the model is the same in all phases"),
            ({"mlm_probabilty": 0.3}, "phase two: unknown option 'mlm_probabilty': did you mean 'mlm_probability'"),
            ({"rat": 1}, "unknown option 'rat': did you mean 'rate'"),
            ({"mlm_probability": 3}, "phase two: mlm_probability=3"),
            ({"mlm_probability": "much"}, "phase two: mlm_probability"),
            ({"block_size": [1]}, "this option takes a single value"),
            ({"rope_theta": -1}, "must be a positive number"),
        ],
    )
    def test_what_a_phase_cannot_have(self, tmp_path, entry, message):
        with pytest.raises(InputError, match=message) as refused:
            planned(tmp_path, [ONE, TWO | entry])
        assert "recipe.yaml" in str(refused.value)

    def test_an_option_that_every_phase_replaces_has_no_effect_on_the_command_line(self, tmp_path):
        with pytest.raises(InputError, match="block_size=32 has no effect: every phase"):
            planned(tmp_path, [ONE | {"block_size": 64}, TWO | {"block_size": 48}], "--block_size", "32")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_minutes": 3}, "max_minutes=3.0 does not go with phases"),
            ({"num_train_epochs": 4}, "num_train_epochs"),
            ({"save_strategy": "epoch"}, "count in steps"),
            ({"eval_strategy": "epoch"}, "count in steps"),
            ({"save_only_model": True}, "goes on from the optimizer"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size"),
            ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "cannot be compared"),
        ],
    )
    def test_options_of_a_run_that_do_not_go_with_phases(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            planned(tmp_path, [ONE, TWO], **options)

    @pytest.mark.parametrize("phases", [[], "warm", ["warm"], [3], {"name": "x"}])
    def test_a_list_of_mappings_is_needed(self, tmp_path, phases):
        with pytest.raises(InputError, match="phases is no list of mappings"):
            planned(tmp_path, phases)

    def test_a_key_given_twice(self, tmp_path):
        recipe = tmp_path / "twice.yaml"
        recipe.write_text("phases:\n  - {name: a, steps: 3, steps: 4}\n")
        with pytest.raises(InputError, match="steps is given twice"):
            parse_run(PROGRAMS["mlm"].arguments, ["--config", str(recipe)], prog="x", description="")

    def test_they_are_not_typed(self, tmp_path):
        with pytest.raises(InputError, match="write them in a recipe"):
            planned(tmp_path, [ONE, TWO], "--phases", "warm")

    def test_a_branch_needs_phases(self):
        with pytest.raises(InputError, match="branch_from='x' has no effect without phases"):
            argv = ["--branch_from", "x", "--output_dir", "y", "--demo_corpus", "true"]
            parse_run(PROGRAMS["mlm"].arguments, argv, prog="x", description="")

    def test_a_trainer_in_python_says_that_programs_make_them(self, tmp_path):
        from helpers.method_matrix import build

        with pytest.raises(InputError, match="phases is for programs"):
            build(PROGRAMS["mlm"], tmp_path, phases=[ONE, TWO])


class TestRate:
    @pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
    def test_the_shapes(self, shape, half):
        phase = Phase("decay", 10, 20, Schedule.parse("0%:1, 100%:0", name="rate"), shape)
        assert (
            phase.factor(10) == 1 and phase.factor(20) == pytest.approx(0) and phase.factor(15) == pytest.approx(half)
        )
        quarter = {"linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2, "1-sqrt": 0.5}
        assert Phase("decay", 0, 4, phase.rate, shape).factor(1) == pytest.approx(quarter[shape])

    def test_points_in_steps_count_from_the_begin_of_the_phase(self):
        phase = Phase("up", 100, 200, Schedule.parse("0:0, 50:1", name="rate"))
        assert [phase.factor(step) for step in (100, 125, 150, 199)] == [0, 0.5, 1, 1]

    def test_whether_a_rate_has_decayed(self):
        rates = ["0%:0, 100%:1", "0:1", "0%:1, 100%:0.5", "0:0.5"]
        phases = [
            Phase(str(i), i * 10, i * 10 + 10, Schedule.parse(rate, name="rate")) for i, rate in enumerate(rates)
        ]
        assert [Course(tuple(phases), i).is_decayed for i in range(4)] == [False, False, True, True]

    @pytest.mark.parametrize(
        ("phases", "options", "message"),
        [
            ([ONE | {"rate": 1}, TWO], {}, "'one' has a rate and 'two' has none"),
            ([ONE | {"rate": "x"}, TWO], {}, "is no number and no schedule"),
            ([ONE | {"rate": -1}, TWO], {}, "must be a number"),
            ([ONE | {"rate": 1, "shape": "cosine"}, TWO | {"rate": 1}], {}, "no rate that changes"),
            ([ONE | {"shape": "round"}, TWO], {}, "shape"),
            ([{"steps": 50, "rate": "0:0, 60:1"}, TWO | {"rate": 1}], {}, "ends after its 50 steps"),
            (
                [ONE | {"rate": 1}, TWO | {"rate": 1}],
                {"warmup_steps": 10},
                "warmup_steps=10.0 has no effect: the phases give",
            ),
            ([ONE | {"rate": 1}, TWO | {"rate": 1}], {"lr_scheduler_type": "cosine"}, "the phases give the rate"),
            ([ONE | {"rate": 1}, TWO | {"rate": 1}], {"decay_during_warmup": True}, "the phases give the rate"),
        ],
    )
    def test_refusals(self, tmp_path, phases, options, message):
        with pytest.raises(InputError, match=message):
            planned(tmp_path, phases, **options)


class TestPositions:
    def test_a_later_phase_keeps_them(self, tmp_path):
        phases = [ONE | {"rope_theta": 1e4}, TWO | {"max_position_embeddings": 64}]
        run = planned(tmp_path, phases)[0].course.phases
        assert [(phase.rope_theta, phase.max_position_embeddings) for phase in run] == [(1e4, None), (1e4, 64)]

    def test_a_branch_keeps_those_of_its_trunk(self, tmp_path):
        branch = Branch("x", "trunk", 60, positions={"rope_theta": 5e4})
        (phase, _) = planned(tmp_path, [ONE, TWO], "--branch_from", "x", branch=branch)[0].course.phases
        assert phase.rope_theta == 5e4


class TestRehearsal:
    """Nothing is read of a run with a phase that cannot be trained."""

    @pytest.mark.parametrize(
        ("method", "entry", "message"),
        [
            ("mlm", {"rope_theta": 1e5}, "BertForMaskedLM has no rotary positions"),
            ("mlm", {"max_position_embeddings": 128}, "has no rotary positions"),
            ("mlm", {"block_size": 128}, "128"),
            ("mlm", {"train_file": ["nowhere.txt"]}, "nowhere.txt is no file"),
            ("encoder", {"objectives": ["mlm", "nsp"]}, "'two' has other parameters than 'one'"),
            ("mlm", {"train_file": ["-"]}, "is a pipe"),
        ],
    )
    def test_every_phase_is_tried_before_text_is_read(self, text, tmp_path, monkeypatch, method, entry, message):
        monkeypatch.setattr(program, "_build", lambda *args: pytest.fail("text is read"))
        with pytest.raises(InputError, match=message):
            PhasedRun(text, tmp_path / "run", [ONE, TWO | entry], method=method, max_steps=4)
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoint-*"))
