"""Where the time of a training goes."""

import json
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers.method_matrix import build, log_of, programs
from hf_pretrain.modeling.observing import profile
from hf_pretrain.modeling.observing.profile import Profile, peak_of_products, profile_line

PROGRAMS = programs()


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


@pytest.fixture
def timed(clock):
    return Profile(device=torch.device("cpu"), dtype=torch.float32, peak=1e6)


def test_shares_of_the_time(clock, timed):
    clock(5)
    for name, seconds in (("data", 1), ("evaluation", 2), ("saving", 1), ("data", 1)):
        with timed.part(name):
            clock(seconds)
    found = timed.summary(tokens=700)
    assert found["seconds"] == 10 and [found[f"{name}_share"] for name in profile.PARTS] == [0.2, 0.2, 0.1]
    # Waiting for data is a part of the training's time; evaluation and saving are not.
    assert found["tokens_per_second"] == 100


def test_a_part_of_a_part_counts_once(clock, timed):
    with timed.part("evaluation"):
        clock(2)
        with timed.part("data"):
            clock(3)
    assert timed.seconds == {"data": 0.0, "evaluation": 5.0, "saving": 0.0}


def test_rows_have_the_shares_since_the_row_before(clock, timed):
    for step, waited in ((10, 1), (20, 3)):
        with timed.part("data"):
            clock(waited)
        clock(4 - waited)
        timed.add_row(step, 50.0)
    assert [row["data_share"] for row in timed.rows] == [0.25, 0.75] and [row["seconds"] for row in timed.rows] == [
        4,
        4,
    ]


def test_operations_forward_and_backward_as_a_share_of_the_peak(clock, timed):
    layer = nn.Linear(20, 30, bias=False)
    states = torch.ones(8, 20, requires_grad=True)
    with timed.counting(tokens=8):
        layer(states).sum().backward()
    assert timed.flops == 3 * 2 * 8 * 20 * 30 and not timed.wants_flops
    clock(10)
    found = timed.summary(tokens=800, num_processes=2)
    assert found["flops_per_token"] == 3600 and found["flops_per_second"] == 3600 * 80
    assert found["peak_flops"] == 2e6 and found["share_of_peak"] == pytest.approx(0.144)
    assert "14.4% of the peak" in profile_line(found) and "by the data sheet" in profile_line(found)


def test_a_peak_that_no_data_sheet_gives_is_measured():
    assert peak_of_products(torch.device("cpu"), torch.float32) > 1e8
    own = Profile(device=torch.device("cpu"), dtype=torch.float32)
    assert own.is_measured and own.peak > 1e8


@pytest.mark.parametrize("method", ["mlm", "rtd"])
def test_a_profiled_run_is_the_plain_run(method, tmp_path, capsys):
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    runs = [build(PROGRAMS[method], tmp_path / str(on), profile=on, **options) for on in (False, True)]
    for trainer in runs:
        trainer.train()
    rows, others = (log_of(trainer) for trainer in runs)
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-6)
    plain, trainer = runs
    assert plain.runner.profiled is None and not (tmp_path / "False" / "profile.json").exists()
    found = json.loads((tmp_path / "True" / "profile.json").read_text())
    assert [row["step"] for row in found.pop("rows")] == [1, 2, 3]
    assert found == trainer.runner.profiled
    for name in ("data_share", "evaluation_share", "saving_share", "share_of_peak"):
        assert 0 < found[name] < 1, name
    # As the card counts them: the products of the weights of the bodies alone.
    card = trainer.describe().compute
    assert card.flops / card.tokens < found["flops_per_token"] < 10 * card.flops / card.tokens
    assert card.profile == profile_line(found)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile ")]
    assert lines == [f"profile {profile_line(found)}"]


def test_a_compiled_run_has_a_share_too(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    found = {}
    for name, extra in (("plain", {}), ("compiled", options)):
        trainer = build(PROGRAMS["mlm"], tmp_path / name, profile=True, max_steps=1, **extra)
        trainer.train()
        found[name] = trainer.runner.profile.flops
    assert found["compiled"] == pytest.approx(found["plain"], rel=0.5)
    torch._dynamo.reset()


def test_a_slow_loader_shows(tmp_path, monkeypatch):
    trainer = build(PROGRAMS["mlm"], tmp_path, profile=True, max_steps=2)
    collate = type(trainer.data_collator).__call__

    def slowly(self, examples):
        time.sleep(0.1)
        return collate(self, examples)

    monkeypatch.setattr(type(trainer.data_collator), "__call__", slowly)
    trainer.train()
    assert trainer.runner.profiled["data_share"] * trainer.runner.profiled["seconds"] > 0.19


def test_waits_are_counted_in_one_step_of_each_row_on_a_gpu(monkeypatch):
    watched = []
    monkeypatch.setattr(profile, "waits_counted", lambda counts: watched.append(1) or nullcontext())
    timed = Profile(device=torch.device("cuda"), dtype=torch.bfloat16, peak=1e15)
    for step in range(1, 13):
        with timed.watching():
            pass
        if step % 4 == 0:
            timed.add_row(step, 1.0)
    assert len(watched) == 3 and all(row["waits"] == 0 for row in timed.rows)
