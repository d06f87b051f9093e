"""A branch starts from the checkpoint of another run, to the bit, and goes on in phases of its own."""

import pytest
import torch
from safetensors.torch import load_file

from helpers.phased_runs import PhasedRun, Stopped, Text, state_of
from hf_pretrain.errors import InputError
from hf_pretrain.hub.record import read_record

TRUNK = [
    {"name": "warm", "steps": 2, "rate": "0%:0, 100%:1"},
    {"name": "stable", "steps": 4, "rate": 1},
    {"name": "decay", "steps": 2, "rate": "0%:1, 100%:0"},
]
BRANCH = [{"name": "other decay", "steps": 3, "rate": "0%:1, 100%:0"}, {"name": "tail", "steps": 1, "rate": 0.1}]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trunk(text, tmp_path_factory):
    return PhasedRun(text, tmp_path_factory.mktemp("trunk") / "trunk", TRUNK)


@pytest.fixture(scope="module")
def branch(text, trunk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("branch") / "branch"
    options = {"branch_from": str(trunk.folder), "learning_rate": 5e-3, "tokenizer_name": None}
    return PhasedRun(text, folder, BRANCH, **options, train_file=[str(text.second)])


def assert_starts_from(run, name, checkpoint):
    weights, moments = run.starts[name]
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() <= weights.keys()
    for key, value in saved.items():
        assert torch.equal(weights[key], value), key
    state = list(torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values())
    assert moments
    for (number, kind), value in moments.items():
        assert torch.equal(value, state[number][kind])


class TestBranch:
    def test_it_starts_at_the_end_of_the_stable_phase(self, trunk, branch):
        assert_starts_from(branch, "other decay", trunk.folder / "checkpoint-6")

    def test_steps_and_the_log_go_on_and_the_rate_is_its_own(self, branch):
        assert list(branch.steps) == [6, 7, 8, 9] and branch.trainer.state.global_step == 10
        rates = [branch.steps[step].rates[0] for step in range(6, 10)]
        assert rates == pytest.approx([5e-3, 5e-3 * 2 / 3, 5e-3 / 3, 5e-4])
        assert [row["step"] for row in branch.log if "loss" in row] == list(range(1, 11))

    def test_it_has_the_tokenizer_of_the_trunk(self, trunk, branch):
        ours, theirs = (run.trainer.processing_class.get_vocab() for run in (branch, trunk))
        assert ours == theirs

    def test_the_card_says_what_it_is_a_branch_of(self, branch):
        card = (branch.folder / "README.md").read_text()
        assert (
            "The run is a branch: it began with weights, optimizer and tokenizer of `trunk` at step 6, in its phase stable"
            in card
        )
        assert read_record(branch.folder).branch_of["name"] == "trunk"

    def test_cut_off_and_resumed_it_is_equal_without_its_trunk(self, text, trunk, branch, tmp_path):
        options = {"branch_from": str(trunk.folder), "learning_rate": 5e-3, "train_file": [str(text.second)]}
        options["tokenizer_name"] = None
        with pytest.raises(Stopped):
            PhasedRun(text, tmp_path / "branch", BRANCH, stop_at=9, **options)
        options["branch_from"] = str(tmp_path / "gone")
        resumed = PhasedRun(text, tmp_path / "branch", BRANCH, "--resume_from_checkpoint", "true", **options)
        for ours, theirs in zip(state_of(branch.trainer), state_of(resumed.trainer), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert resumed.log == branch.log

    def test_one_checkpoint_can_be_named(self, text, trunk, tmp_path):
        checkpoint = trunk.folder / "checkpoint-4"
        run = PhasedRun(text, tmp_path / "run", [{"name": "tail", "steps": 1, "rate": 1}], branch_from=str(checkpoint))
        assert_starts_from(run, "tail", checkpoint)
        assert list(run.steps) == [4]

    def test_of_a_run_without_phases_the_last_one_is_taken_and_said_so(self, text, tmp_path, capsys):
        plain = PhasedRun(text, tmp_path / "plain", None, max_steps=3)
        run = PhasedRun(
            text, tmp_path / "run", [{"name": "tail", "share": "100%"}], branch_from=str(plain.folder), max_steps=5
        )
        assert "taking its last one, whose rate may have decayed" in capsys.readouterr().out
        assert list(run.steps) == [3, 4]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"branch_from": "nowhere"}, "branch_from='nowhere' is no folder"),
            ({"branch_from": "."}, "holds no whole checkpoint"),
            ({"seed": 3}, "was made with the seed 42"),
            ({"max_steps": 6}, "it begins at step 6: give more"),
            ({"hidden_size": 32}, "does not fit"),
        ],
    )
    def test_what_cannot_be_a_branch(self, text, trunk, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=message):
            PhasedRun(text, tmp_path / "run", BRANCH, **{"branch_from": str(trunk.folder)} | options)
