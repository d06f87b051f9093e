"""Every method trains in phases, on one rank and on two, and on streams."""

import json

import pytest
import torch

from helpers.method_matrix import data_for, tiny_model_options
from helpers.phased_runs import PROGRAMS, PhasedRun, Stopped, Text, state_of
from helpers.two_ranks import run_on_two_ranks

# The slow tests ask every method: these have a memory of lanes, two models, and a stage of their own.
QUICK = ("recurrent-lm", "rtd")
METHODS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(PROGRAMS)]
PHASES = [
    {"name": "one", "steps": 3, "rate": "0:0, 2:1"},
    {"name": "two", "steps": 3, "rate": "0%:1, 100%:0", "weight_decay": 0.5},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tmp_path_factory.mktemp("text"))


def assert_equal(run, other):
    for ours, theirs in zip(state_of(run.trainer), state_of(other.trainer), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run.log == other.log


@pytest.mark.parametrize("method", METHODS)
def test_a_resume_behind_the_border_is_equal(text, tmp_path, method):
    program = PROGRAMS[method]
    options = {"method": method, "load": lambda *args, **kwargs: data_for(program), "block_size": 24}
    sizes = tiny_model_options(program) | dict(program.tiny_options)
    options |= {name: value for name, value in sizes.items() if name != "model_type"}
    options |= {
        "model_type": getattr(program.arguments[1], "model_type", None) or "bert",
        "per_device_train_batch_size": 8,
    }
    options |= {"max_position_embeddings": 64, "max_length": 24}
    options |= {"demo_corpus": True, "train_file": None}
    whole = PhasedRun(text, tmp_path / "whole", PHASES, **options)
    assert [whole.steps[step].phase for step in range(6)] == ["one"] * 3 + ["two"] * 3
    decays = [max(whole.steps[step].decays) for step in range(6)]
    assert decays[:3] == [decays[0]] * 3 != decays[3:] and decays[3:] == [0.5] * 3
    with pytest.raises(Stopped):
        PhasedRun(text, tmp_path / "cut", PHASES, stop_at=5, **options)
    resumed = PhasedRun(text, tmp_path / "cut", PHASES, "--resume_from_checkpoint", "true", **options)
    assert list(resumed.steps) == [4, 5]
    assert_equal(whole, resumed)


def test_streams_begin_anew_in_each_phase(text, tmp_path):
    phases = [PHASES[0] | {"mlm_probability": 0.3}, PHASES[1] | {"train_file": [str(text.second)]}]
    options = {"streaming": True, "validation_fraction": None}
    whole = PhasedRun(text, tmp_path / "whole", phases, **options)
    with pytest.raises(Stopped):
        PhasedRun(text, tmp_path / "cut", phases, stop_at=5, **options)
    resumed = PhasedRun(text, tmp_path / "cut", phases, "--resume_from_checkpoint", "true", **options)
    assert_equal(whole, resumed)
    epochs = {step: recorded.batches[0]["input_ids"].shape for step, recorded in whole.steps.items()}
    assert len(epochs) == 6


@pytest.mark.slow
def test_two_ranks_resume_to_the_bit(tmp_path):
    Text(tmp_path)
    resume = ["--resume_from_checkpoint", "true"]
    orders = [
        {"name": "whole", "argv": [], "stop_at": None, "result": "whole"},
        {"name": "cut", "argv": [], "stop_at": 4, "result": "cut"},
        {"name": "cut", "argv": resume, "stop_at": None, "result": "resumed"},
    ]
    for order in orders:
        (tmp_path / "order.json").write_text(json.dumps(order))
        run_on_two_ranks("helpers.phased_ranks_worker", tmp_path)
    assert not (tmp_path / "cut-0.pt").exists()
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("whole", "resumed"))
        assert whole["log"] == resumed["log"]
        for ours, theirs in zip(whole["state"], resumed["state"], strict=True):
            assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, other = (torch.load(tmp_path / f"whole-{rank}.pt")["state"][0] for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
