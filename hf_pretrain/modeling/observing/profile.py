"""Where the time of a training goes: its speed as a share of the device's, and time that is no training. The memory of a call.

A [`Profile`] has a clock for each part of a run (data, evaluation, saving), the floating-point operations of one real
micro-batch, and on a GPU the operations for which the host waits for the device. It knows nothing of a Trainer.
"""

from __future__ import annotations

import json
import time
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_pretrain.files import write_text

PARTS = ("data", "evaluation", "saving")
"""What is no training: waiting for a batch, an evaluation, writing a checkpoint."""

PROFILE = "profile.json"
# Width of the square matrices whose product is timed, by type of device.
_WIDTHS = {"cuda": 8192, "cpu": 1024}
_TRIALS = 5
# The first steps of a run warm up: memory is allocated, kernels are chosen, a model is compiled.
_WARM_UP = 2


class Profile:
    """Times a training.

    Args:
        device: Where it runs.
        dtype: Number format of its products.
        peak: The most operations a second that the device's data sheet gives for them; measured if None.

    Attributes:
        rows: A dictionary for each row of the log.
    """

    def __init__(self, *, device: torch.device, dtype: torch.dtype, peak: float | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.is_measured = peak is None
        self.peak = peak_of_products(device, dtype) if peak is None else peak
        self.begin()

    def begin(self) -> None:
        """Start anew."""
        self.rows: list[dict[str, Any]] = []
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.flops = self.counted_tokens = 0
        self.waits: Counter[str] = Counter()
        self._num_steps, self._watched = 0, False
        self._clock = self._row_clock = time.perf_counter()
        self._row_seconds = dict(self.seconds)
        self._running = ""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time something that is no training; what it calls is a part of it."""
        if self._running:
            yield
            return
        self._running, begun = name, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun
            self._running = ""

    @property
    def wants_flops(self) -> bool:
        """Whether the operations of a micro-batch are still to be counted: those of the first one."""
        return not self.flops

    @contextmanager
    def counting(self, tokens: int) -> Iterator[None]:
        """Count the floating-point operations of a micro-batch, forward and backward.

        Args:
            tokens: Tokens of the micro-batch, without padding.
        """
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops, self.counted_tokens = counter.get_total_flops(), tokens

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the waits of one micro-batch in each row of the log, on a GPU and after the first steps."""
        self._num_steps += 1
        if self.device.type != "cuda" or self._watched or self._num_steps <= _WARM_UP:
            yield
            return
        self._watched = True
        with waits_counted(self.waits):
            yield

    def add_row(self, step: int, tokens_per_second: float) -> None:
        """Add a row of the log, and begin the next.

        Args:
            step: Number of the step.
            tokens_per_second: Speed of the steps since the last row, over all processes.
        """
        now = time.perf_counter()
        seconds = now - self._row_clock
        row: dict[str, Any] = {"step": step, "seconds": round(seconds, 3), "tokens_per_second": tokens_per_second}
        shares = {name: (self.seconds[name] - self._row_seconds[name]) / seconds for name in PARTS}
        row |= {f"{name}_share": round(share, 4) for name, share in shares.items()}
        self.rows.append(row | ({"waits": sum(self.waits.values())} if self.device.type == "cuda" else {}))
        self._row_clock, self._row_seconds, self._watched = now, dict(self.seconds), False

    def summary(self, *, tokens: int, num_processes: int = 1) -> dict[str, Any]:
        """Return what was found so far.

        Args:
            tokens: Tokens that were trained on since `begin`, without padding, over all processes.
            num_processes: Number of processes, each with a device of its own.

        Returns:
            `seconds` of all; `tokens_per_second` of the training alone; `flops_per_token`; `flops_per_second`, `peak_flops` and
            `share_of_peak` of all devices; `data_share`, `evaluation_share` and `saving_share` of all seconds; on a GPU `waits`
            of the micro-batches that were watched, by the line that causes them.
        """
        seconds = time.perf_counter() - self._clock
        trained = max(seconds - self.seconds["evaluation"] - self.seconds["saving"], 1e-9)
        found: dict[str, Any] = {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / trained, 1)}
        if self.flops and self.counted_tokens:
            per_token, peak = self.flops / self.counted_tokens, self.peak * num_processes
            found |= {"flops_per_token": round(per_token), "flops_per_second": per_token * tokens / trained}
            found |= {"peak_flops": peak, "peak_is_measured": self.is_measured}
            found["share_of_peak"] = round(found["flops_per_second"] / peak, 4)
        found |= {f"{name}_share": round(self.seconds[name] / seconds, 4) for name in PARTS}
        return found | ({"waits": dict(self.waits.most_common())} if self.device.type == "cuda" else {})

    def write(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Write what was found, and the rows of the log, as `profile.json`."""
        write_text(folder / PROFILE, json.dumps({**summary, "rows": self.rows}, indent=1) + "\n")


def profile_line(summary: Mapping[str, Any]) -> str:
    """Return the summary of a [`Profile`] in one line."""
    parts = [f"{summary['tokens_per_second']:,.0f} tokens/s"]
    if "share_of_peak" in summary:
        source = "measured" if summary["peak_is_measured"] else "by the data sheet"
        peak = f"{summary['peak_flops'] / 1e12:,.4g} TFLOP/s, {source}"
        parts.append(f"{summary['share_of_peak']:.1%} of the peak ({peak})")
    words = {"data": "waiting for data", "evaluation": "in evaluation", "saving": "in saving"}
    parts += [f"{summary[f'{name}_share']:.1%} {text}" for name, text in words.items()]
    if "waits" in summary:
        parts.append(f"{sum(summary['waits'].values())} waits for the device")
    return ", ".join(parts)


def peak_of_products(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a product of two square matrices: the best of some trials.

    Args:
        device: Where to multiply.
        dtype: Number format.
    """
    width = _WIDTHS.get(device.type, _WIDTHS["cpu"])
    left, right = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(1 + _TRIALS):
        _wait(device)
        begun = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * width**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def waits_counted(counts: Counter[str]) -> Iterator[None]:
    """Count the operations on a GPU for which the host waits for the device, by the line that causes them.

    Args:
        counts: Gets one for each; PyTorch warns of them.
    """

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "called a synchronizing" in str(message):
            counts[_cause()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with patch.object(warnings, "showwarning", note):
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _cause() -> str:
    of_this = (Path(__file__).name, "warnings.py", "_py_warnings.py")
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).name not in of_this]
    ours = [frame for frame in frames if "/hf_pretrain/" in frame.filename]
    theirs = [frame for frame in frames if "/transformers/" in frame.filename or "/accelerate/" in frame.filename]
    chosen = [part[-1] for part in (ours, theirs) if part]
    shown = []
    for frame in chosen or frames[-1:]:
        path = "/".join(Path(frame.filename).parts[-3:])
        shown.append(f"{path}:{frame.lineno} {frame.line}")
    return " | ".join(shown)


def peak_of_tensors(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that a call holds at a time, beyond those that were there before.

    An accelerator counts its own allocations. Elsewhere each operation's results are counted while something holds them; what an
    operation holds inside of itself is not.

    Args:
        run: Called once; what it returns is dropped.
    """
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        run()
        return int(torch.accelerator.max_memory_allocated() - before)
    with _HeldTensors() as held:
        run()
    return held.peak


class _HeldTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and something holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            # A view and what is changed in place have the storage of an argument.
            if id(storage) not in self._known and id(storage) not in given:
                self._known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
