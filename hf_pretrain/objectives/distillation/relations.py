"""MiniLM: which tokens a layer relates, whatever its heads and widths."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.outputs import ExampleSum
from hf_pretrain.objectives.distillation.capture import AttentionRecord
from hf_pretrain.objectives.distillation.losses import (
    check_same_heads,
    masked_scores,
    sum_over_heads,
    visible_pairs,
)


def relation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    relation_heads: int,
    document_ids: torch.Tensor | None = None,
) -> ExampleSum:
    """KL divergence between self-relations of queries, of keys or of values: ``softmax(x @ x.T / sqrt(d_r))``.

    With the values and as many relation heads as attention heads, this is the value relation of the first MiniLM.

    Args:
        student: ``[B, L, h * d]`` the heads of a student layer side by side, see [`AttentionRecord.concatenated`].
        teacher: ``[B, L, h' * d']`` those of a teacher layer.
        attention_mask: ``[B, L]``, 0 at padding.
        relation_heads: Number of heads that both are cut into anew.
        document_ids: ``[B, L]`` document of each token, where a row has several that do not see each other.

    Returns:
        Sum over real queries and relation heads, and the number of these.

    Raises:
        InputError: If `relation_heads` does not divide both widths.

    Source: Wang et al. 2021, "MiniLMv2", section 3.1; Wang et al. 2020, "MiniLM", section 3.2.
    """
    check_relation_heads(relation_heads, student_width=student.shape[-1], teacher_width=teacher.shape[-1])
    student_record, teacher_record = (_relations(states, relation_heads) for states in (student, teacher))
    return attention_distribution_loss(student_record, teacher_record, attention_mask, document_ids=document_ids)


def attention_distribution_loss(
    student: AttentionRecord,
    teacher: AttentionRecord,
    attention_mask: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
) -> ExampleSum:
    """KL divergence between attention distributions.

    Args:
        student: Attention of the student's last layer.
        teacher: Attention of the teacher's, with as many heads.
        attention_mask: ``[B, L]``, 0 at padding.
        document_ids: ``[B, L]`` document of each token, where a row has several that do not see each other.

    Returns:
        Sum over real queries and heads, and the number of these.

    Raises:
        InputError: If the numbers of heads differ.

    Source: Wang et al. 2020, "MiniLM", section 3.1.
    """
    check_same_heads(student.num_heads, teacher.num_heads)
    visible = visible_pairs(student, teacher, attention_mask, document_ids=document_ids)
    sums_B = sum_over_heads(_divergences, student, teacher, visible)
    return ExampleSum(sums_B, student.num_heads * attention_mask.sum(1).float())


def check_relation_heads(relation_heads: int, *, student_width: int, teacher_width: int) -> None:
    """Raise InputError unless the relation heads divide both widths, those of all heads side by side."""
    if relation_heads < 1 or student_width % relation_heads or teacher_width % relation_heads:
        raise InputError(
            f"relation_heads={relation_heads} has to divide the widths of the student, {student_width}, and of the teacher, "
            f"{teacher_width}: choose a divisor of {math.gcd(student_width, teacher_width)}"
        )


def _relations(states_BLD: torch.Tensor, num_heads: int) -> AttentionRecord:
    """Return states that attend to themselves."""
    heads = states_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return AttentionRecord(query=heads, key=heads, value=heads, scaling=heads.shape[-1] ** -0.5)


def _divergences(student: AttentionRecord, teacher: AttentionRecord, visible: torch.Tensor) -> torch.Tensor:
    student_BHLL, teacher_BHLL = (masked_scores(record, visible).log_softmax(-1) for record in (student, teacher))
    divergences = F.kl_div(student_BHLL, teacher_BHLL, log_target=True, reduction="none")
    # A row of padding sees nothing.
    return (divergences * visible).sum(dim=(1, 2, 3))
