"""benchmarks/gpu.py at toy sizes on a CPU: each part makes its numbers, and a failure in one leaves the others alone."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu

DistilBERT, ModernBERT = "DistilBERT, 512", "ModernBERT-base, 1024"


def bench(tmp_path, monkeypatch, *options):
    out = tmp_path / "gpu"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *args, **options: None)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--size", "tiny", "--steps", "4", "--output", str(out), *options]
    )
    gpu.main()
    torch._dynamo.reset()
    return json.loads((out / "gpu.json").read_text())


def test_anchors_have_a_speed_and_a_share_of_the_peak(tmp_path, monkeypatch, capsys):
    guarded = gpu.Bench.guarded
    # The compiled runs are slow to make.
    plain = lambda self, what, *args: None if "compile" in what else guarded(self, what, *args)  # noqa: E731
    monkeypatch.setattr(gpu.Bench, "guarded", plain)
    found = bench(tmp_path, monkeypatch, "--parts", "anchors", "--anchors", ModernBERT)["anchors"][ModernBERT]
    assert found.keys() == {"bf16"}
    for run in found.values():
        assert run["tokens_per_second"] > 0 and 0 < run["share_of_peak"] < 1 and run["attention"] == "sdpa"
    shown = capsys.readouterr().out
    assert shown.startswith("machine: ") and "305" not in shown, "a tiny model is not compared with a published one"


def test_a_failure_leaves_the_other_parts_alone(tmp_path, monkeypatch, capsys):
    anchors = gpu.ANCHORS | {DistilBERT: gpu.Anchor("distil", {"no_such_option": 1}, block=8, batch=2)}
    monkeypatch.setattr(gpu, "ANCHORS", anchors)
    options = ("--parts", "anchors", "checks", "--anchors", DistilBERT, "--methods", "mlm")
    found = bench(tmp_path, monkeypatch, *options)
    assert "no_such_option" in str(found["anchors"][DistilBERT]["bf16"]["error"])
    checks = found["checks"]["mlm"]
    # On a CPU both sides are one.
    assert checks["cpu"] == checks["gradient"] == 0 and checks["resume"] < 1e-6 and checks["export"] < 1e-6
    assert "failed" in capsys.readouterr().out


def test_a_part_without_time_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Bench, "guarded", lambda self, what, *args: self.results["left_out"].append(what))
    monkeypatch.setattr(gpu.Bench, "print", lambda self: self.path.write_text(json.dumps(self.results, default=str)))
    found = bench(tmp_path, monkeypatch, "--methods", "mlm", "--parts", "training")
    assert found["left_out"] == [f"mlm, {kind}" for kind in (*gpu.PRECISIONS, *gpu.EXTRAS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.ANCHORS)
def test_every_anchor_runs(name, tmp_path, monkeypatch):
    found = bench(tmp_path, monkeypatch, "--parts", "anchors", "--anchors", name)["anchors"][name]
    assert found.keys() == {"bf16", "bf16, torch.compile"}
    assert not [run for run in found.values() if gpu.is_error(run)]
