"""Hardware and versions as the card names them."""

from __future__ import annotations

import importlib.metadata
import platform
from types import SimpleNamespace

import pytest
import torch

from hf_pretrain.hub import environment


def _pretend_devices(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    def name_of(number: int) -> str:
        return names[number]

    module = SimpleNamespace(device_count=lambda: len(names), get_device_name=name_of)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)


def test_a_cpu_is_named_with_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cpu_model", lambda: "Example CPU")
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert environment.hardware(device_type="cpu") == "Example CPU, 3 cores"
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {1}, raising=False)
    assert environment.hardware(device_type="cpu") == "Example CPU, 1 core"


def test_devices_are_counted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_devices(monkeypatch, ["A", "B", "A"])
    assert environment.hardware() == "2 × A, 1 × B"
    assert environment.hardware(num_devices=1) == "1 × A", "a run on one of three devices"


def test_ranks_of_other_machines_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_devices(monkeypatch, ["A", "A"])
    assert environment.hardware(device_type="cuda", num_devices=4) == "4 × A"


def test_a_run_on_the_cpu_of_a_machine_with_devices_is_a_cpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_devices(monkeypatch, ["A"])
    assert "A" != environment.hardware(device_type="cpu") and "×" not in environment.hardware(device_type="cpu")


def test_versions_are_those_installed_and_what_is_not_installed_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_DISTRIBUTIONS", ("torch", "no-such-distribution"))
    assert environment.versions() == {
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
