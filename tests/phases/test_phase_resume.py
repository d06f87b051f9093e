"""A run with phases that is cut off anywhere and resumed is equal to the bit to one that was not."""

import pytest
import torch

from helpers.phased_runs import PhasedRun, Stopped, Text, state_of

PHASES = [
    {"name": "warm", "share": "40%", "mlm_probability": 0.4, "rate": "0%:0, 50%:1"},
    {"name": "stable", "share": "30%", "mlm_probability": "0%:0.3, 100%:0.1", "rate": 1, "weight_decay": 0.2},
    {"name": "decay", "steps": 3, "rate": "0%:1, 100%:0", "block_size": 12, "per_device_train_batch_size": 8},
]
OPTIONS = {"max_steps": 10, "config_overrides": "{}"}  # With dropout, whose random states go on too.


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    phases = [*PHASES[:2], PHASES[2] | {"train_file": [str(text.second)]}]
    run = PhasedRun(text, tmp_path_factory.mktemp("whole") / "run", phases, **OPTIONS)
    run.phases = phases
    return run


def assert_equal(run, other):
    """Weights, moments, rates, and the rows of the log are the same to the bit."""
    for ours, theirs in zip(state_of(run.trainer), state_of(other.trainer), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert run.log == other.log
    assert run.trainer.state.num_input_tokens_seen == other.trainer.state.num_input_tokens_seen
    for step, recorded in other.steps.items():
        assert recorded.rates == run.steps[step].rates
        assert recorded.phase == run.steps[step].phase


@pytest.mark.parametrize(
    "stop",
    [
        # Within the first phase as before its border, and behind a border as at it: two of each kind are slow.
        pytest.param({"stop_at": 3}, marks=pytest.mark.slow),
        {"stop_before_checkpoint": 4},
        {"stop_at_phase": "stable"},
        pytest.param({"stop_at": 5}, marks=pytest.mark.slow),
        {"stop_at": 9},
    ],
    ids=lambda stop: " ".join(f"{name}={value}" for name, value in stop.items()),
)
def test_a_resume_changes_no_bit(text, whole, tmp_path, stop):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        PhasedRun(text, folder, whole.phases, **stop, **OPTIONS)
    resumed = PhasedRun(text, folder, whole.phases, "--resume_from_checkpoint", "true", **OPTIONS)
    assert len(resumed.trainers) <= len(whole.trainers)
    assert_equal(whole, resumed)
    evaluated = [row["step"] for row in resumed.log if "eval_loss" in row]
    assert evaluated == [0, 4, 7, 10]


def test_a_finished_run_is_exported_once_more_and_trains_nothing(text, whole, tmp_path, capsys):
    before = state_of(whole.trainer)
    again = PhasedRun(text, whole.folder, whole.phases, "--resume_from_checkpoint", "true", **OPTIONS)
    assert not again.steps and "all 10 steps are done already" in capsys.readouterr().out
    for name, value in state_of(again.trainer)[0].items():
        assert torch.equal(value, before[0][name])


def test_the_checkpoints_at_the_borders_stay(whole):
    steps = {int(path.name.partition("-")[2]) for path in whole.folder.glob("checkpoint-*")}
    assert {4, 7, 10} <= steps


def test_they_stay_beyond_the_limit_and_where_none_else_is_saved(text, tmp_path):
    limited = PhasedRun(text, tmp_path / "limited", PHASES[:2] + PHASES[2:], save_total_limit=1, **OPTIONS)
    kept = {int(path.name.partition("-")[2]) for path in limited.folder.glob("checkpoint-*")}
    assert kept == {4, 7, 10}
    bare = PhasedRun(text, tmp_path / "bare", PHASES, **OPTIONS | {"save_strategy": "no", "save_steps": None})
    assert {path.name for path in bare.folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-7"}


class TestBorder:
    def test_the_moments_of_the_optimizer_go_on(self, whole):
        for border, name in ((4, "stable"), (7, "decay")):
            weights, moments = whole.starts[name]
            saved = torch.load(whole.folder / f"checkpoint-{border}" / "optimizer.pt", weights_only=True)["state"]
            assert moments and saved
            assert any(value.abs().sum() > 0 for (_, kind), value in moments.items() if kind == "exp_avg")
            for (number, kind), value in moments.items():
                assert torch.equal(value, list(saved.values())[number][kind])

    def test_weight_decay_is_the_phases_own(self, whole):
        decays = {step: max(recorded.decays) for step, recorded in whole.steps.items()}
        assert decays == dict.fromkeys(range(4), 0.01) | dict.fromkeys(range(4, 7), 0.2) | dict.fromkeys(
            range(7, 10), 0.01
        )

    def test_a_resume_with_other_borders_is_refused(self, text, whole, tmp_path):
        from hf_pretrain.errors import InputError

        folder = tmp_path / "run"
        with pytest.raises(Stopped):
            PhasedRun(text, folder, whole.phases, stop_before_checkpoint=7, **OPTIONS)
        others = [whole.phases[0] | {"share": "30%"}, whole.phases[1] | {"share": "40%"}, whole.phases[2]]
        with pytest.raises(InputError, match="begins at step 4, and this run has no such phase"):
            PhasedRun(text, folder, others, "--resume_from_checkpoint", "true", **OPTIONS)
