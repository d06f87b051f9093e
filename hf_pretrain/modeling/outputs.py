"""What a model returns in pre-training: named sums with their counts, never a mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from hf_pretrain.modeling.memory import RecurrentMemory


class ExampleSum(NamedTuple):
    """A quantity summed over each example's targets, beside the number of those targets.

    Means are the Trainer's business: only it knows how many targets the whole step has, over accumulation and ranks. Sums are
    kept by example because distributed evaluation repeats examples to fill the last batch and has to drop them again.

    Attributes:
        sum: ``[B]``, in fp32.
        count: ``[B]``, number of targets of each example, in fp32.
    """

    sum: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]


@dataclass
class PretrainingOutput(ModelOutput):
    """Output of every [`PretrainingModel`].

    Attributes:
        losses: Differentiable loss sums by name.
        metrics: Further sums by name (such as numbers of right answers); in training only those that cost nothing.
        scores: ``[B, L]`` logits of a binary decision a token; only in evaluation.
        score_labels: ``[B, L]`` its labels, -100 where there is none.
        memory: What a recurrent model reads in the next segment, detached.
    """

    # Give both: a ModelOutput takes a lone dictionary for its own fields.
    losses: dict[str, ExampleSum] = None  # type: ignore[assignment]
    metrics: dict[str, ExampleSum] = None  # type: ignore[assignment]
    scores: torch.Tensor | None = None
    score_labels: torch.Tensor | None = None
    memory: RecurrentMemory | None = None


def sum_by_example(values: torch.Tensor, positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Add up values that belong to flat positions of a ``[B, L]`` batch.

    Args:
        values: ``[T]``.
        positions: ``[T]`` flat row-major positions.
        shape: ``(B, L)``.

    Returns:
        ``[B]`` sums in fp32.
    """
    rows = torch.div(positions, shape[1], rounding_mode="floor")
    return torch.zeros(shape[0], device=values.device).index_add(0, rows, values.float())
