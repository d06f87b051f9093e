"""What a Trainer measures beside its losses: tokens and memory of a training, and the sums of an evaluation."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction

from hf_pretrain.modeling.losses import IGNORED, PretrainingOutput


class TokenCount:
    """Counts the tokens of a training over all processes, and how many there are a second.

    Args:
        trainer: The Trainer; its state keeps the number, and travels with the checkpoints.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # On the device, so that no step waits: those of this process since `add_new`.
        self.new = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
        self.begin()

    def begin(self) -> None:
        """Begin the next row of the log: what was counted before is of no row."""
        self.new.zero_()
        self._since_row = 0
        self._clock = time.perf_counter()

    def add_new(self) -> None:
        """Add the new tokens of all processes to the state."""
        tokens = int(self.trainer.accelerator.reduce(self.new, reduction="sum").item())
        self.new.zero_()
        self._since_row += tokens
        self.trainer.state.num_input_tokens_seen += tokens

    def row(self) -> dict[str, float]:
        """Return the numbers for a row of the log, and begin the next."""
        self.add_new()
        tokens, seconds = self._since_row, time.perf_counter() - self._clock
        self.begin()
        return {
            "num_tokens": self.trainer.state.num_input_tokens_seen,
            "tokens_per_second": round(tokens / seconds, 1),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something whose time is not that of the training."""
        trained = time.perf_counter() - self._clock
        yield
        self._clock = time.perf_counter() - trained


def peak_memory_mib() -> float:
    """Return the most memory held so far, in MiB: the accelerator's allocations, or the process's resident set without one."""
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        return round(torch.accelerator.max_memory_allocated() / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class EvaluationSums:
    """Takes each example's sums and counts through the stock loop of an evaluation, in place of logits.

    They are small, and free of the repeats that fill the last batch.
    """

    def __init__(self) -> None:
        self._names: list[str] = []

    def pack(self, output: PretrainingOutput) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Return the output of a model as the stock loop gathers it: no loss, predictions, and labels."""
        sums = {f"{name}_loss": loss for name, loss in output.losses.items()} | output.metrics
        self._names = sorted(sums)
        statistics = torch.stack([part for name in self._names for part in sums[name]], dim=1)
        if output.scores is None:
            return None, (statistics,), torch.zeros_like(statistics)
        return None, (statistics, output.scores), output.score_labels

    def unpack(self, prediction: EvalPrediction) -> tuple[dict[str, float], tuple[np.ndarray, ...]]:
        """Return the means of a whole evaluation, weighted by targets, and scores and labels of all real tokens if any."""
        parts = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
        totals = np.asarray(parts[0], dtype=np.float64).sum(axis=0).reshape(-1, 2)
        means = {
            name: float(total / count) for name, (total, count) in zip(self._names, totals, strict=True) if count > 0
        }
        is_real = prediction.label_ids != IGNORED
        return means, (parts[1][is_real], prediction.label_ids[is_real]) if len(parts) > 1 else ()
