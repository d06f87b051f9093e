"""Where a run took place: its hardware and the versions of what it ran on, as plain text for the card."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import Counter
from pathlib import Path

_DISTRIBUTIONS = ("hf_pretrain", "transformers", "tokenizers", "datasets", "accelerate", "torch", "huggingface_hub")


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


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((model for model in models if model), platform.processor() or platform.machine() or "CPU")


def _cpu_cores() -> int:
    """Count the cores that this process may use, which a container or `taskset` can make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
