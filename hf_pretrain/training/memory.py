"""Peak memory of the process."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_mib() -> float:
    """Return the most memory held so far, in MiB: the accelerator's allocations, or the process's resident set without one."""
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        return round(torch.accelerator.max_memory_allocated() / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
