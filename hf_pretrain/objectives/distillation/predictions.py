"""Losses and metrics of what student and teacher predict: of tokens, of whole sequences, or where spans begin and end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_pretrain.modeling.head_kinds import boundary_logits, entity_counts, span_scores
from hf_pretrain.modeling.losses import IGNORED, masked_lm_accuracy, masked_lm_loss
from hf_pretrain.modeling.outputs import ExampleSum, sum_by_example
from hf_pretrain.objectives.distillation.losses import regression_loss, top_k_divergence
from hf_pretrain.objectives.distillation.observation import TopKTargets
from hf_pretrain.objectives.distillation.token_losses import soft_and_hard_losses


@dataclass(frozen=True)
class Answers:
    """What both models predict of a batch.

    Attributes:
        student: ``[T, V]`` logits of tokens, ``[B, C]`` of sequences, or ``[2B, L]`` of starts and ends.
        teacher: The same, None if it is not asked.
        labels: One a row of logits, -100 where there is none; of a regression values, NaN where there is none; or None.
        rows: Where the logits of tokens lie: `positions` ``[T]`` and `shape` ``(B, L)``, of starts and ends ``[2B]`` and
            ``(B, 2)``; None of sequences.
        everywhere: Whether predictions are compared where there is no label too.
        top_k: The teacher's likeliest tokens, where it was asked for these before; its logits are None then.
    """

    student: torch.Tensor
    teacher: torch.Tensor | None
    labels: torch.Tensor | None
    rows: dict[str, Any] | None
    everywhere: bool = True
    top_k: TopKTargets | None = None

    @property
    def compared(self) -> torch.Tensor:
        """Which rows of logits the two are compared at, bool: not those that only fill up a fixed shape."""
        if self.everywhere or self.labels is None:
            return torch.ones(len(self.student), dtype=torch.bool, device=self.student.device)
        return has_label(self.labels)

    def sum(self, values: torch.Tensor, counted: torch.Tensor) -> ExampleSum:
        """Return the sums by example of one value a row of logits, and how many count."""
        return ExampleSum(self._by_example(values.float() * counted), self._by_example(counted.float()))

    def _by_example(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.rows is None else sum_by_example(values, **self.rows)

    def ratio(self, numerators: torch.Tensor, denominators: torch.Tensor) -> ExampleSum:
        """Return the sums by example of both parts of a ratio, given for each row of logits."""
        return ExampleSum(self._by_example(numerators.float()), self._by_example(denominators.float()))


def span_answers(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    shape: Sequence[int],
) -> Answers:
    """Return what both models predict of where spans begin and end: a choice of one place each.

    Args:
        student: ``[T, 2]`` logits of starts and ends.
        teacher: The same, None if it is not asked.
        labels: ``[B, 2]`` true starts and ends, -100 where they are not known; or None.
        positions: ``[T]`` flat positions where a span may begin and end.
        shape: ``(B, L)`` of the batch.
    """
    ours, theirs = (
        None if logits is None else boundary_logits(logits, positions, shape) for logits in (student, teacher)
    )
    assert ours is not None
    rows = {"positions": torch.arange(len(ours), device=ours.device), "shape": (shape[0], 2)}
    return Answers(ours, theirs, None if labels is None else labels.flatten(), rows)


def prediction_losses(
    answers: Answers,
    names: Collection[str],
    *,
    temperature: float,
    is_regression: bool = False,
    official: bool = False,
) -> dict[str, ExampleSum]:
    """Return the losses of what both predict.

    Args:
        answers: What both predict.
        names: Which losses: "prediction" is the divergence of the student from the teacher, times the squared temperature, or the
            squared difference of their values; "mlm" and "labels" are the cross-entropy of the labels, or the squared difference
            from their values.
        temperature: What logits are divided by in "prediction".
        is_regression: Whether values are predicted.
        official: Average "prediction" over classes too, and leave the squared temperature out, as TinyBERT's code does.
    """
    if is_regression:
        of_values = {"prediction": value_loss, "labels": label_loss}
        return {name: loss(answers) for name, loss in of_values.items() if name in names}
    of_labels = [name for name in ("mlm", "labels") if name in names]
    soft, hard = soft_and_hard_losses(
        answers.student,
        answers.teacher if "prediction" in names else None,
        answers.labels if of_labels else None,
        temperature=temperature,
    )
    found = {}
    if "prediction" in names:
        if answers.top_k is not None:
            soft = top_k_divergence(answers.student, *answers.top_k, temperature=temperature)
        assert soft is not None, "the prediction loss asks the teacher"
        scale = 1 / (temperature**2 * answers.student.shape[-1]) if official else 1.0
        found["prediction"] = answers.sum(scale * soft, answers.compared)
    for name in of_labels:
        assert hard is not None and answers.labels is not None, f"the {name} loss needs labels"
        found[name] = answers.sum(hard, has_label(answers.labels))
    return found


def value_loss(answers: Answers) -> ExampleSum:
    """Squared difference of the student's value from the teacher's, of a regression."""
    assert answers.teacher is not None, "the prediction loss asks the teacher"
    return regression_loss(answers.student, answers.teacher)


def label_loss(answers: Answers) -> ExampleSum:
    """Squared difference of the student's value from that of the label, of a regression."""
    assert answers.labels is not None, "the labels loss needs labels"
    is_known = has_label(answers.labels)
    known_B = torch.where(is_known, answers.labels, 0.0)
    return answers.sum((answers.student.float().squeeze(-1) - known_B) ** 2, is_known)


def has_label(labels: torch.Tensor) -> torch.Tensor:
    """Return where there is a label: not -100, not NaN."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def quality(answers: Answers, *, head: str, outside: int | None = None) -> dict[str, ExampleSum]:
    """Return how often student and teacher are right, and how often they agree; of masked tokens also their losses.

    Args:
        answers: What both predict.
        head: See [`hf_pretrain.modeling.head_kinds.head_kind`].
        outside: Of classes of tokens, that of what belongs to no entity, if there is one: then the F1 of tokens of entities is
            measured too.

    Returns:
        Sums by name. Those of the teacher begin with "teacher_".
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
        if head == "masked_lm":
            assert answers.rows is not None
            found[f"{owner}mlm_accuracy"] = masked_lm_accuracy(guesses, answers.labels, **answers.rows)
            found[f"{owner}mlm_loss"] = masked_lm_loss(logits, answers.labels, **answers.rows)
            continue
        is_known = has_label(answers.labels)
        found[f"{owner}accuracy"] = answers.sum(guesses == answers.labels, is_known)
        if head == "token_classification" and outside is not None:
            hits, entities = entity_counts(guesses, answers.labels, outside=outside)
            found[f"{owner}f1"] = answers.ratio(hits * is_known, entities * is_known)
        elif head == "question_answering":
            known_B = is_known.view(-1, 2).all(dim=1).float()
            scores = span_scores(guesses.view(-1, 2), answers.labels.view(-1, 2))
            found |= {f"{owner}{name}": ExampleSum(score * known_B, known_B) for name, score in scores.items()}
    return found
