"""Which held-out examples an evaluation measures, and the means that it makes of their sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import EvalPrediction

from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.held_out import evaluated_tokens, held_out_part, mean_tokens
from hf_pretrain.modeling.losses import IGNORED, PretrainingOutput
from hf_pretrain.training.arguments import global_batch_size

if TYPE_CHECKING:
    from hf_pretrain.training.trainer import PretrainingTrainer


class Evaluation:
    """The evaluations of a Trainer. They neither change what training draws nor count as its time.

    The stock loop of an evaluation gathers each example's sums and counts, in place of logits. They are small, and free of the
    repeats that fill the last batch.

    Args:
        trainer: The Trainer.

    Attributes:
        is_running: Whether an evaluation runs.
        losses: Names of the losses of the last batch; a metric may be called a loss too, but is none of the total.
    """

    def __init__(self, trainer: PretrainingTrainer) -> None:
        self.trainer = trainer
        self.is_running = False
        self.losses: list[str] = []
        self._names: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave the random state and the clock of training alone."""
        trainer = self.trainer
        self.is_running = True
        try:
            # A data loader draws a seed when it is opened; training must not depend on how often it is evaluated.
            with trainer.tokens.paused(), torch.random.fork_rng(devices=[]), trainer.runner.timed("evaluation"):
                yield
        finally:
            self.is_running = False
            trainer.progress.end_evaluation()

    # Examples

    @property
    def sets(self) -> list[Any]:
        """The held-out sets of the run."""
        sets = self.trainer.eval_dataset
        return list(sets.values()) if isinstance(sets, dict) else [] if sets is None else [sets]

    def part_of(self, dataset: Any) -> Any:
        """Return the examples of one of the `sets` that each evaluation measures; see `max_eval_tokens`."""
        if not isinstance(dataset, EpochDataset):
            return dataset
        most, num_sets = self.trainer.args.max_eval_tokens, max(1, len(self.sets))
        if most is None and not self.trainer.reads_instead_of_text:
            most = self._usual_tokens(dataset)
        return held_out_part(dataset, max(1, most // num_sets) if most else None)

    def _usual_tokens(self, held_out: Any) -> int | None:
        args, course, train = self.trainer.args, self.trainer.course, self.trainer.train_dataset
        if train is None:
            return None
        is_stream, steps = isinstance(train, IterableDataset), args.max_steps if course is None else course.total
        examples = steps * global_batch_size(args) if steps > 0 else args.num_train_epochs * len(train)
        trained = examples * mean_tokens(held_out if is_stream or not len(train) else train)
        return evaluated_tokens(trained, max_minutes=args.max_minutes)

    def measured_examples(self) -> tuple[int, int]:
        """Return how many held-out examples an evaluation measures, and of how many."""
        sets = [part for part in self.sets if isinstance(part, EpochDataset)]
        return sum(len(self.part_of(part)) for part in sets), sum(map(len, sets))

    def described(self) -> dict[str, Any]:
        """Return for the model card which share of the held-out examples is measured; {} of all."""
        measured, known = self.measured_examples()
        if measured >= known:
            return {}
        share = round(measured / known, 4)
        return {"held_out_measured_examples": measured, "held_out_measured_share": share}

    # Sums

    def pack(self, output: PretrainingOutput) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Return the output of a model as the stock loop gathers it: no loss, predictions, and labels."""
        sums = {f"{name}_loss": loss for name, loss in output.losses.items()} | output.metrics
        self.losses, self._names = sorted(output.losses), sorted(sums)
        statistics = torch.stack([part for name in self._names for part in sums[name]], dim=1)
        if output.scores is None:
            return None, (statistics,), torch.zeros_like(statistics)
        return None, (statistics, output.scores), output.score_labels

    def unpack(self, prediction: EvalPrediction) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray] | None]:
        """Return the means of a whole evaluation, weighted by targets, and scores and labels of all real tokens if any."""
        parts = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
        totals = np.asarray(parts[0], dtype=np.float64).sum(axis=0).reshape(-1, 2)
        means = {
            name: float(total / count) for name, (total, count) in zip(self._names, totals, strict=True) if count > 0
        }
        losses = {name: means.get(f"{name}_loss", 0.0) for name in self.losses}
        means["loss"] = sum(self.trainer.loss_weight(name) * mean for name, mean in losses.items())
        if len(parts) == 1:
            return means, None
        is_real = prediction.label_ids != IGNORED
        return means, (parts[1][is_real], prediction.label_ids[is_real])
