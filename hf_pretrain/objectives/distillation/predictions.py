"""Losses and metrics of what student and teacher predict: of tokens, or of whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from hf_pretrain.modeling.losses import IGNORED, masked_lm_accuracy, masked_lm_loss
from hf_pretrain.modeling.outputs import ExampleSum, sum_by_example
from hf_pretrain.objectives.distillation.losses import kl_divergence, regression_loss


@dataclass(frozen=True)
class Answers:
    """What both models predict of a batch.

    Attributes:
        student: ``[T, V]`` logits of tokens, or ``[B, C]`` of sequences.
        teacher: The same, None if it is not asked.
        labels: ``[T]`` or ``[B]``, -100 where there is none; of a regression ``[B]`` values, NaN where there is none; or None.
        rows: Where the logits of tokens lie: `positions` ``[T]`` and `shape` ``(B, L)``; None of sequences.
        everywhere: Whether predictions are compared where there is no label too.
    """

    student: torch.Tensor
    teacher: torch.Tensor | None
    labels: torch.Tensor | None
    rows: dict[str, Any] | None
    everywhere: bool = True

    @property
    def compared(self) -> torch.Tensor:
        """Which rows of logits the two are compared at, bool: not those that only fill up a fixed shape."""
        if self.everywhere or self.labels is None:
            return torch.ones(len(self.student), dtype=torch.bool, device=self.student.device)
        return has_label(self.labels)

    def sum(self, values: torch.Tensor, counted: torch.Tensor) -> ExampleSum:
        """Return the sums by example of one value a row of logits, and how many count."""
        values, counted = values.float() * counted, counted.float()
        if self.rows is None:
            return ExampleSum(values, counted)
        return ExampleSum(sum_by_example(values, **self.rows), sum_by_example(counted, **self.rows))


def prediction_loss(answers: Answers, *, temperature: float, official: bool = False) -> ExampleSum:
    """Divergence of the student from the teacher, times the squared temperature.

    Args:
        answers: What both predict.
        temperature: What logits are divided by.
        official: Average over classes too, and leave the squared temperature out, as TinyBERT's code does.
    """
    assert answers.teacher is not None, "the prediction loss asks the teacher"
    kl_T = kl_divergence(answers.student, answers.teacher, temperature=temperature)
    if official:
        kl_T = kl_T / (temperature**2 * answers.student.shape[-1])
    return answers.sum(kl_T, answers.compared)


def value_loss(answers: Answers) -> ExampleSum:
    """Squared difference of the student's value from the teacher's, of a regression."""
    assert answers.teacher is not None, "the prediction loss asks the teacher"
    return regression_loss(answers.student, answers.teacher)


def token_loss(answers: Answers) -> ExampleSum:
    """Cross-entropy of the original tokens: masked language modelling."""
    assert answers.rows is not None and answers.labels is not None
    return masked_lm_loss(answers.student, answers.labels, **answers.rows)


def label_loss(answers: Answers, *, is_regression: bool) -> ExampleSum:
    """Cross-entropy of the labels of sequences, or the squared difference from their values."""
    assert answers.labels is not None, "the labels loss needs labels"
    if not is_regression:
        nll_B = F.cross_entropy(answers.student.float(), answers.labels, ignore_index=IGNORED, reduction="none")
        return ExampleSum(nll_B, has_label(answers.labels).float())
    is_known = has_label(answers.labels)
    known_B = torch.where(is_known, answers.labels, 0.0)
    return answers.sum((answers.student.float().squeeze(-1) - known_B) ** 2, is_known)


def has_label(labels: torch.Tensor) -> torch.Tensor:
    """Return where there is a label: not -100, not NaN."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def quality(answers: Answers) -> dict[str, ExampleSum]:
    """Return how often student and teacher are right, and how often they agree; of tokens also their losses.

    A key of the teacher's begins with "teacher_".
    """
    found: dict[str, ExampleSum] = {}
    sides = {"": answers.student}
    if answers.teacher is not None:
        sides["teacher_"] = answers.teacher
        agree = answers.student.argmax(-1) == answers.teacher.argmax(-1)
        found["agreement"] = answers.sum(agree, answers.compared)
    if answers.labels is None:
        return found
    for owner, logits in sides.items():
        guesses = logits.argmax(-1)
        if answers.rows is None:
            found[f"{owner}accuracy"] = answers.sum(guesses == answers.labels, has_label(answers.labels))
        else:
            found[f"{owner}mlm_accuracy"] = masked_lm_accuracy(guesses, answers.labels, **answers.rows)
            found[f"{owner}mlm_loss"] = masked_lm_loss(logits, answers.labels, **answers.rows)
    return found
