"""What logits over a vocabulary are compared by, with the gradient by hand: a few rows at a time, and no copy of them is kept.

Losses and metrics of what student and teacher predict: of tokens, of whole sequences, or where spans begin and end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

from hf_pretrain.modeling.heads import boundary_logits, entity_counts, span_scores
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, masked_lm_accuracy, masked_lm_loss, sum_by_example
from hf_pretrain.modeling.observing.observation import TopKTargets
from hf_pretrain.objectives.distillation.losses import kl_divergence, regression_loss, top_k_divergence

# Logits that are worked on at once: 4 MiB in fp32, which a cache holds.
_LOGITS_AT_ONCE = 1 << 20

_Losses = tuple[torch.Tensor | None, torch.Tensor | None]


@torch.compiler.disable
def soft_and_hard_losses(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    *,
    temperature: float,
) -> _Losses:
    """Return the divergence of the student from the teacher, and the negative log-likelihood of the labels.

    The softmax of a row is made again in the backward pass, of both losses at once: what is kept for it are the logits
    themselves, and all that is as large as they are is their gradient.

    Args:
        student_logits: ``[T, V]`` in any floating type; the losses are taken in fp32.
        teacher_logits: ``[T, V]``, through which no gradient flows; None if there is no teacher to compare with.
        labels: ``[T]``, -100 where there is none, which gives zero; None if there are none at all.
        temperature: What logits are divided by in the divergence, see [`kl_divergence`].

    Returns:
        ``[T]`` of each in nats, None for what is not asked for.
    """
    arguments = (student_logits, teacher_logits, labels, temperature)
    return cast(_Losses, _SoftAndHardLosses.apply(*arguments))


class _SoftAndHardLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        labels: torch.Tensor | None,
        temperature: float,
    ) -> _Losses:
        ctx.save_for_backward(student, teacher, labels)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        soft, hard = (
            None if one is None else student.new_empty(len(student), dtype=torch.float32) for one in (teacher, labels)
        )
        for rows in _chunks(student):
            logits = student[rows].float()
            if soft is not None and teacher is not None:
                soft[rows] = kl_divergence(logits, teacher[rows], temperature=temperature)
            if hard is not None and labels is not None:
                hard[rows] = F.cross_entropy(logits, labels[rows], ignore_index=IGNORED, reduction="none")
        return soft, hard

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_soft: torch.Tensor | None, of_hard: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None]:
        student, teacher, labels = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for rows in _chunks(student):
            parts = []
            if of_soft is not None:
                scale = ctx.temperature * of_soft[rows]
                parts.append(_soft_gradient(student[rows], teacher[rows], scale, temperature=ctx.temperature))
            if of_hard is not None:
                parts.append(_hard_gradient(student[rows], labels[rows], of_hard[rows]))
            gradient[rows] = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        return gradient, None, None, None


def _soft_gradient(
    student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    ours, theirs = ((logits.float() / temperature).softmax(-1) for logits in (student, teacher))
    return ours.sub_(theirs).mul_(scale[:, None])


def _hard_gradient(student: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    is_known = labels != IGNORED
    probs = student.softmax(-1, dtype=torch.float32)
    probs[torch.arange(len(probs), device=probs.device), labels.where(is_known, 0)] -= 1
    return probs.mul_((scale * is_known)[:, None])


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    size = max(1, _LOGITS_AT_ONCE // logits.shape[1])
    return (slice(first, first + size) for first in range(0, len(logits), size))


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
        head: See [`hf_pretrain.modeling.heads.head_kind`].
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
