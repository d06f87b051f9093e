"""What a run took, for its card: steps, tokens, time, memory and energy as far as they were measured, hardware and versions."""

from __future__ import annotations

import csv
import importlib.metadata
import math
import os
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_DISTRIBUTIONS = ("hf_pretrain", "transformers", "tokenizers", "datasets", "accelerate", "torch", "huggingface_hub")
# What CodeCarbon writes into the output folder of a run with `report_to codecarbon`.
_EMISSIONS = "emissions.csv"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """The energy that training took, as it was measured.

    Attributes:
        kwh: Kilowatt-hours.
        emissions_kg: Kilograms of CO2 equivalent, by the electricity of the country.
        country: Where the machine stands.
        scope: What was measured: "machine", or "process" for the share of the run.
        sessions: Starts and resumes of the run that were measured; one that was killed leaves no measurement.
        source: Who measured it.
    """

    kwh: float
    emissions_kg: float | None = None
    country: str | None = None
    scope: str | None = None
    sessions: int = 1
    source: str = "CodeCarbon"


def hardware(*, device_type: str | None = None, num_devices: int | None = None) -> str:
    """Name the processors of this machine that a run uses.

    Args:
        device_type: Type of the devices, such as `args.device.type` of a Trainer: "cpu", "cuda", "mps", ...; by
            default the accelerator that torch finds, else "cpu".
        num_devices: How many of them the run uses; by default all that it sees.

    Returns:
        For example "2 × NVIDIA H100 80GB HBM3" or "AMD EPYC 7763 64-Core Processor, 8 cores".
    """
    import torch

    if device_type is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device_type = found.type if found is not None else "cpu"
    if device_type == "cpu":
        cores = _cpu_cores()
        return f"{_cpu_model()}, {cores} core{'s' if cores > 1 else ''}"
    module = torch.get_device_module(device_type)
    total = module.device_count() if num_devices is None else num_devices
    if not hasattr(module, "get_device_name"):
        return f"{total} × {device_type}"
    visible = max(module.device_count(), 1)  # ranks on other machines are taken to have the same devices
    names = Counter(module.get_device_name(number % visible) for number in range(total))
    return ", ".join(f"{count} × {name}" for name, count in names.items())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a run; what is not installed is absent."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def measured_energy(output_dir: Path | str) -> Energy | None:
    """Return what CodeCarbon measured of the run in a folder, over all its sessions; None if it did not.

    CodeCarbon writes a row when a session ends, and, if it is set to, further rows with the total so far.
    """
    try:
        with Path(output_dir, _EMISSIONS).open(encoding="utf-8", newline="") as file:
            sessions = {row["run_id"]: row for row in csv.DictReader(file) if _number(row.get("energy_consumed"))}
    except (OSError, KeyError, ValueError, csv.Error):
        return None
    if not sessions:
        return None
    rows = list(sessions.values())
    emissions = [_number(row.get("emissions")) for row in rows]
    return Energy(
        kwh=math.fsum(_number(row["energy_consumed"]) or 0.0 for row in rows),
        emissions_kg=math.fsum(value or 0.0 for value in emissions) if all(emissions) else None,
        country=rows[-1].get("country_name") or None,
        scope=rows[-1].get("tracking_mode") or None,
        sessions=len(rows),
    )


def _number(text: str | None) -> float | None:
    """Return a positive number, None for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((model for model in models if model), platform.processor() or platform.machine() or "CPU")


def _cpu_cores() -> int:
    """Count the cores that this process may use, which a container or `taskset` can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a run took; what was not measured stays `None` and is left out of the card.

    Attributes:
        parameters: Parameters of the model at the root of the repository.
        trained_parameters: All that were trained, those of the auxiliary parts included.
        steps: Optimizer steps.
        planned_steps: Steps until the end of the run.
        examples_per_step: Examples of a step, over all devices and accumulation steps.
        tokens: Tokens seen, padding left out, over all devices.
        seconds: Wall-clock time of the training, since its last resume if it was resumed.
        resumed_at_step: Step of the last resume; `None` if there was none.
        timed_tokens: Tokens seen in `seconds`, where that is not all of them.
        hardware: See [`hf_pretrain.hub.environment.hardware`].
        processes: Processes that trained together.
        precision: "fp32", "bf16", ...
        profile: Where the time of the training went, in a line; see [`hf_pretrain.modeling.observing.profile`].
        attention: Names of the attention backends of a step: "sdpa", "flash_attention_2", ...
        peak_memory_mib: The most memory in use at a time, in MiB: of one device, or of one process on a CPU.
        energy: What was measured of it.
        flops: Floating-point operations of all tokens, at least: those of the encoders' weights, three times forward where they
            are trained.
        peak_flops: What the devices can do at most in this precision, per second, together; `None` where that is not known.
    """

    parameters: int | None = None
    trained_parameters: int | None = None
    steps: int | None = None
    planned_steps: int | None = None
    examples_per_step: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    resumed_at_step: int | None = None
    timed_tokens: int | None = None
    hardware: str | None = None
    processes: int | None = None
    precision: str | None = None
    attention: str | None = None
    profile: str | None = None
    peak_memory_mib: float | None = None
    energy: Energy | None = None
    flops: float | None = None
    peak_flops: float | None = None

    @property
    def is_partial(self) -> bool:
        """Whether the run had more steps to go."""
        return bool(self.steps and self.planned_steps and self.steps < self.planned_steps)

    @property
    def tokens_per_second(self) -> int | None:
        """Speed of the training; None where tokens or time are not known."""
        timed = self.tokens if self.timed_tokens is None else self.timed_tokens
        return round(timed / self.seconds) if timed and self.seconds else None

    @property
    def share_of_peak(self) -> float | None:
        """The operations per second as a share of what the devices can do at most; None where one of them is not known."""
        if not (self.flops and self.peak_flops and self.tokens and self.tokens_per_second):
            return None
        return self.flops / self.tokens * self.tokens_per_second / self.peak_flops


# Dense bf16 operations per second, by a part of the device's name; a longer name first. Source: NVIDIA's data sheets, the half of
# what they give with sparsity.
_PEAK_OF_BF16 = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_flops(name: str, *, precision: str) -> float | None:
    """Return how many floating-point operations per second a device can do at most; None where no data sheet was read.

    Args:
        name: Name of the device, such as "NVIDIA H100 80GB HBM3".
        precision: "bf16", "fp32", ...
    """
    if not precision.startswith("bf16"):
        return None
    return next((peak for part, peak in _PEAK_OF_BF16.items() if re.search(rf"\b{part}\b", name)), None)
