"""What logits over a vocabulary are compared by, with the gradient by hand: a few rows at a time, and no copy of them is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.distillation.losses import kl_divergence

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
