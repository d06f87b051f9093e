"""Predictions of student and teacher on one batch, the losses between them, and how good either is.

Logits are one row a prediction: ``[T, V]`` of tokens, ``[B, C]`` of sequences, ``[2B, L]`` of the starts and ends of
spans. The model makes [`Predictions`] of a batch; [`prediction_losses`] and, in evaluation, [`prediction_metrics`]
turn them into sums by example. Losses over a vocabulary have their gradient by hand: a few rows at a time, without a
copy of the logits.
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
from hf_pretrain.modeling.observing.outputs import TopKTargets

# Logits of one chunk: 4 MiB in fp32, which fits into a cache.
_LOGITS_AT_ONCE = 1 << 20

# The usual name of the class of tokens outside all entities.
OUTSIDE = "O"

_Losses = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Predictions:
    """The predictions of both models on a batch.

    Attributes:
        student: ``[T, V]`` logits of tokens, ``[B, C]`` of sequences, or ``[2B, L]`` of starts and ends.
        teacher: The same, None if the teacher does not predict.
        labels: One a row of logits, -100 where there is none; of a regression values, NaN where there is none; or
            None.
        rows: Location of the logits of tokens: `positions` ``[T]`` and `shape` ``(B, L)``, of starts and ends ``[2B]``
            and ``(B, 2)``; None of sequences.
        everywhere: Whether predictions are compared where there is no label too.
        top_k: The teacher's likeliest tokens from a cache; its logits are None then.
    """

    student: torch.Tensor
    teacher: torch.Tensor | None
    labels: torch.Tensor | None
    rows: dict[str, Any] | None = None
    everywhere: bool = True
    top_k: TopKTargets | None = None

    @classmethod
    def of_batch(
        cls,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        labels: torch.Tensor | None,
        *,
        head: str,
        positions: torch.Tensor | None,
        shape: Sequence[int],
        everywhere: bool = False,
        top_k: TopKTargets | None = None,
    ) -> Predictions:
        """Bring the logits of a batch and its labels into rows.

        Args:
            student: ``[T, V]`` logits at positions, of spans ``[T, 2]`` of starts and ends; or ``[B, C]`` of
                sequences.
            teacher: The same, None if the teacher does not predict.
            labels: ``[B, L]``, of spans ``[B, 2]``, of sequences ``[B]``; or None.
            head: See [`hf_pretrain.modeling.heads.head_kind`].
            positions: ``[T]`` flat positions of the logits; of spans, where they may begin and end; None of sequences.
            shape: ``(B, L)`` of the batch.
            everywhere: Whether predictions of masked tokens are compared where there is no label too; others always
                are.
            top_k: The teacher's likeliest tokens from a cache.
        """
        if positions is None:
            return cls(student, teacher, labels)
        if head == "question_answering":
            ours, theirs = (
                None if logits is None else boundary_logits(logits, positions, shape) for logits in (student, teacher)
            )
            assert ours is not None
            rows = {"positions": torch.arange(len(ours), device=ours.device), "shape": (shape[0], 2)}
            return cls(ours, theirs, None if labels is None else labels.flatten(), rows)
        at_logits = labels if labels is None else labels.flatten().index_select(0, positions)
        is_everywhere = everywhere or head != "masked_lm"
        return cls(student, teacher, at_logits, {"positions": positions, "shape": shape}, is_everywhere, top_k)

    @property
    def compared(self) -> torch.Tensor:
        """Rows of logits at which the two are compared, bool: without those that only fill up a fixed shape."""
        if self.everywhere or self.labels is None:
            return torch.ones(len(self.student), dtype=torch.bool, device=self.student.device)
        return has_label(self.labels)

    def sum(self, values: torch.Tensor, counted: torch.Tensor) -> ExampleSum:
        """Return the sums by example of one value a row of logits, and how many count."""
        return self.ratio(values.float() * counted, counted)

    def ratio(self, numerators: torch.Tensor, denominators: torch.Tensor) -> ExampleSum:
        """Return the sums by example of both parts of a ratio, given for each row of logits."""
        parts = (numerators.float(), denominators.float())
        if self.rows is None:
            return ExampleSum(*parts)
        return ExampleSum(*(sum_by_example(part, **self.rows) for part in parts))


def has_label(labels: torch.Tensor) -> torch.Tensor:
    """Return where there is a label: not -100, not NaN."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def prediction_losses(
    predictions: Predictions,
    names: Collection[str],
    *,
    temperature: float,
    is_regression: bool = False,
    averages_classes: bool = False,
) -> dict[str, ExampleSum]:
    """Return the losses of predictions.

    Args:
        predictions: Those of both models.
        names: Names of the losses: "prediction" is the divergence of the student from the teacher, times the squared
            temperature, or the squared difference of their values; "mlm" and "labels" are the cross-entropy of the
            labels, or the squared difference from their values.
        temperature: Divisor of the logits in "prediction".
        is_regression: Whether the models predict values.
        averages_classes: Average "prediction" over classes too, without the squared temperature, as TinyBERT's code
            does.
    """
    if is_regression:
        losses = {"prediction": value_difference, "labels": label_difference}
        return {name: loss(predictions) for name, loss in losses.items() if name in names}
    of_labels = [name for name in ("mlm", "labels") if name in names]
    soft, hard = soft_and_hard_losses(
        predictions.student,
        predictions.teacher if "prediction" in names else None,
        predictions.labels if of_labels else None,
        temperature=temperature,
    )
    found = {}
    if "prediction" in names:
        if predictions.top_k is not None:
            soft = top_k_divergence(predictions.student, *predictions.top_k, temperature=temperature)
        assert soft is not None, "the prediction loss needs the teacher"
        scale = 1 / (temperature**2 * predictions.student.shape[-1]) if averages_classes else 1.0
        found["prediction"] = predictions.sum(scale * soft, predictions.compared)
    for name in of_labels:
        assert hard is not None and predictions.labels is not None, f"the {name} loss needs labels"
        found[name] = predictions.sum(hard, has_label(predictions.labels))
    return found


def value_difference(predictions: Predictions) -> ExampleSum:
    """Squared difference of the student's values from the teacher's, of a regression, averaged over its outputs."""
    assert predictions.teacher is not None, "the prediction loss needs the teacher"
    differences = predictions.student.float() - predictions.teacher.float()
    losses_B = differences.square().reshape(len(differences), -1).mean(-1)
    return ExampleSum(losses_B, torch.ones_like(losses_B))


def label_difference(predictions: Predictions, logits: torch.Tensor | None = None) -> ExampleSum:
    """Squared difference of the student's value, or of the given one, from the label, of a regression."""
    assert predictions.labels is not None, "the labels loss needs labels"
    is_known = has_label(predictions.labels)
    known_B = torch.where(is_known, predictions.labels, 0.0)
    values = predictions.student if logits is None else logits
    return predictions.sum((values.float().squeeze(-1) - known_B) ** 2, is_known)


def prediction_metrics(predictions: Predictions, *, head: str, outside: int | None = None) -> dict[str, ExampleSum]:
    """Return how often student and teacher are right, and how often and how far they differ.

    Args:
        predictions: Those of both models.
        head: See [`hf_pretrain.modeling.heads.head_kind`].
        outside: Of classes of tokens, that of tokens outside all entities, if there is one: then the F1 of tokens of
            entities is measured too.

    Returns:
        Sums by name: of both, `agreement`, the share of equal predictions, and `kl`, the student's divergence from the
        teacher in nats; or of a regression `squared_difference`. Of each, where there are labels, `mlm_loss` and
        `mlm_accuracy`, `squared_error`, `accuracy`, `f1` and `exact_match`; those of the teacher begin with
        "teacher_".
    """
    found: dict[str, ExampleSum] = {}
    sides = {"": predictions.student}
    if predictions.teacher is not None:
        sides["teacher_"] = predictions.teacher
        found |= _differences(predictions, predictions.teacher, head=head)
    if predictions.labels is None:
        return found
    for owner, logits in sides.items():
        scores = _scores(predictions, predictions.labels, logits, head=head, outside=outside)
        found |= {f"{owner}{name}": score for name, score in scores.items()}
    return found


def _differences(predictions: Predictions, teacher: torch.Tensor, *, head: str) -> dict[str, ExampleSum]:
    if head == "regression":
        return {"squared_difference": value_difference(predictions)}
    compared = predictions.compared
    agree = predictions.student.argmax(-1) == teacher.argmax(-1)
    divergence, _ = soft_and_hard_losses(predictions.student, teacher, None, temperature=1.0)
    assert divergence is not None
    return {"agreement": predictions.sum(agree, compared), "kl": predictions.sum(divergence, compared)}


def _scores(
    predictions: Predictions, labels: torch.Tensor, logits: torch.Tensor, *, head: str, outside: int | None
) -> dict[str, ExampleSum]:
    """Return how good the predictions of one model are."""
    if head == "regression":
        return {"squared_error": label_difference(predictions, logits)}
    guesses, is_known = logits.argmax(-1), has_label(labels)
    if head == "masked_lm":
        assert predictions.rows is not None
        accuracy = masked_lm_accuracy(guesses, labels, **predictions.rows)
        return {"mlm_accuracy": accuracy, "mlm_loss": masked_lm_loss(logits, labels, **predictions.rows)}
    found = {"accuracy": predictions.sum(guesses == labels, is_known)}
    if head == "token_classification" and outside is not None:
        hits, entities = entity_counts(guesses, labels, outside=outside)
        found["f1"] = predictions.ratio(hits * is_known, entities * is_known)
    elif head == "question_answering":
        known_B = is_known.view(-1, 2).all(dim=1).float()
        scores = span_scores(guesses.view(-1, 2), labels.view(-1, 2))
        found |= {name: ExampleSum(score * known_B, known_B) for name, score in scores.items()}
    return found


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """KL divergence of the student from the teacher's softened distribution, times the squared temperature.

    Args:
        student_logits: ``[T, V]`` in any floating type.
        teacher_logits: ``[T, V]``.
        temperature: Divisor of both; its square keeps the size of the gradient.

    Returns:
        ``[T]`` in nats.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    student_TV, teacher_TV = (
        (logits.float() / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits)
    )
    return F.kl_div(student_TV, teacher_TV, log_target=True, reduction="none").sum(-1) * temperature**2


def top_k_divergence(
    student_logits: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    tail: torch.Tensor,
    *,
    temperature: float,
) -> torch.Tensor:
    """[`kl_divergence`] from the teacher's best k tokens; all others together are one class.

    Args:
        student_logits: ``[T, V]``.
        ids: ``[T, k]`` tokens.
        log_probs: ``[T, k]`` the teacher's log-probabilities of them, at the same temperature.
        tail: ``[T]`` its log-probability of all other tokens together.
        temperature: Divisor of the student's logits.

    Returns:
        ``[T]`` in nats.
    """
    logits_TV = student_logits.float() / temperature
    log_z_T = logits_TV.logsumexp(-1)
    known = torch.cat([log_probs, tail[:, None]], dim=-1).float()
    probs = known.exp()
    nll_T = (probs[:, :-1] * (log_z_T[:, None] - logits_TV.gather(-1, ids))).sum(-1)
    if ids.shape[-1] < logits_TV.shape[-1]:
        # A sum over the others. A difference from one would be lost to rounding.
        nll_T = nll_T + probs[:, -1] * (log_z_T - logits_TV.scatter(-1, ids, float("-inf")).logsumexp(-1))
    entropy_T = -(probs * known.masked_fill(probs == 0, 0)).sum(-1)
    return nll_T * temperature**2 - temperature**2 * entropy_T


@torch.compiler.disable
def soft_and_hard_losses(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    *,
    temperature: float,
) -> _Losses:
    """Return the divergence of the student from the teacher, and the negative log-likelihood of the labels.

    The backward pass makes the softmax of a row again, for both losses at once. It keeps the logits themselves, and
    makes one tensor of their size: their gradient.

    Args:
        student_logits: ``[T, V]`` in any floating type; the losses are taken in fp32.
        teacher_logits: ``[T, V]``, through which no gradient flows; None if there is no teacher to compare with.
        labels: ``[T]``, -100 where there is none, which gives zero; None if there are none at all.
        temperature: Divisor of the logits in the divergence, see [`kl_divergence`].

    Returns:
        ``[T]`` of each in nats, None for one that is not wanted.
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
