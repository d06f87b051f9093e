"""Hardware and versions as the card names them."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
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


EMISSIONS = """\
timestamp,run_id,duration,emissions,energy_consumed,country_name,longitude,latitude,tracking_mode
2026-01-01T00:00:00,a,10.0,0.1,0.25,Iceland,-21.9,64.1,machine
2026-01-01T00:01:00,a,20.0,0.2,0.5,Iceland,-21.9,64.1,machine
2026-01-02T00:00:00,b,30.0,0.4,1.0,Iceland,-21.9,64.1,machine
"""


def test_energy_is_the_sum_over_sessions_of_their_last_total(tmp_path: Path) -> None:
    (tmp_path / "emissions.csv").write_text(EMISSIONS, encoding="utf-8")
    energy = environment.measured_energy(tmp_path)
    assert energy is not None
    assert (energy.kwh, energy.sessions) == (1.5, 2)
    assert energy.emissions_kg == pytest.approx(0.6)
    assert (energy.country, energy.scope, energy.source) == ("Iceland", "machine", "CodeCarbon")


@pytest.mark.parametrize(
    "text", [None, "", "run_id\na\n", EMISSIONS.replace("0.25", "nan").replace("0.5,", "0,").replace("1.0,", "x,")]
)
def test_without_a_measurement_there_is_no_energy(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "emissions.csv").write_text(text, encoding="utf-8")
    assert environment.measured_energy(tmp_path) is None
