"""Losses between a student and its teacher, as pure functions that return sums by example, or values by target.

Padding never counts, neither as a query nor as a key. Differences and reductions are in fp32, under autocast too. Shapes: B rows
of L tokens, h heads of width d, states of width D; T targets over a vocabulary, or classes, of V.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.outputs import ExampleSum
from hf_pretrain.objectives.distillation.capture import AttentionRecord
from hf_pretrain.objectives.distillation.score_differences import squared_score_differences

# Scores that are held at once where they have to be: 64 MiB in fp32.
_SCORES_AT_ONCE = 1 << 24


def attention_loss(
    student: AttentionRecord,
    teacher: AttentionRecord,
    attention_mask: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
) -> ExampleSum:
    """Squared difference of the attention scores, before the softmax.

    Where scores are plain products of all pairs, those of long rows are never made: see [`squared_score_differences`].

    Args:
        student: Attention of a student layer.
        teacher: Attention of the teacher's layer, with as many heads, of any width.
        attention_mask: ``[B, L]``, 0 at padding.
        document_ids: ``[B, L]`` document of each token, where a row has several that do not see each other.

    Returns:
        Sum over heads and pairs of real tokens that see each other, and the number of these.

    Raises:
        InputError: If the numbers of heads differ.

    Source: Jiao et al. 2020, "TinyBERT", equation 7.
    """
    check_same_heads(student.num_heads, teacher.num_heads)
    is_product = all(record.bias is None and record.window is None for record in (student, teacher))
    if not is_product or document_ids is not None:
        visible = visible_pairs(student, teacher, attention_mask, document_ids=document_ids)
        return _sum_over_pairs(_squared_score_differences, student, teacher, visible)
    with torch.autocast(attention_mask.device.type, enabled=False):
        sums_B = squared_score_differences(
            student.query,
            student.key,
            teacher.query,
            teacher.key,
            attention_mask == 0,
            scalings=(student.scaling, teacher.scaling),
        )
    return ExampleSum(sums_B, student.num_heads * attention_mask.sum(1).float().square())


def attention_probability_loss(
    student: AttentionRecord,
    teacher: AttentionRecord,
    attention_mask: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
) -> ExampleSum:
    """Squared difference of the attention probabilities, after the softmax: another loss than TinyBERT's.

    Takes, returns and raises what [`attention_loss`] does.
    """
    check_same_heads(student.num_heads, teacher.num_heads)
    visible = visible_pairs(student, teacher, attention_mask, document_ids=document_ids)
    return _sum_over_pairs(_squared_probability_differences, student, teacher, visible)


def check_same_heads(student_heads: int, teacher_heads: int) -> None:
    """Raise InputError unless student and teacher have as many attention heads."""
    if student_heads != teacher_heads:
        raise InputError(
            f"the student's {student_heads} attention heads cannot learn from the teacher's {teacher_heads}: give the student "
            f"num_attention_heads={teacher_heads}, or use the relation losses, which cut both anew (relation_heads)"
        )


def visible_pairs(
    student: AttentionRecord,
    teacher: AttentionRecord,
    attention_mask: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which pairs of a query and a key are real and see each other in both models, ``[B, 1, L, L]`` bool."""
    is_real_BL = attention_mask.bool()
    visible = is_real_BL[:, None, :, None] & is_real_BL[:, None, None, :]
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    windows = [record.window for record in (student, teacher) if record.window is not None]
    if windows:
        places = torch.arange(is_real_BL.shape[1], device=is_real_BL.device)
        visible = visible & ((places[:, None] - places).abs() <= min(windows))
    return visible


def _sum_over_pairs(
    function: Callable[..., torch.Tensor], student: AttentionRecord, teacher: AttentionRecord, visible: torch.Tensor
) -> ExampleSum:
    counts_B = student.num_heads * visible.sum(dim=(1, 2, 3)).float()
    return ExampleSum(sum_over_heads(function, student, teacher, visible), counts_B)


def sum_over_heads(
    function: Callable[[AttentionRecord, AttentionRecord, torch.Tensor], torch.Tensor],
    student: AttentionRecord,
    teacher: AttentionRecord,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Add up a function of two layers over some heads at a time, whose scores are made again in the backward pass.

    Args:
        function: Takes the student's and the teacher's attention of some heads, and the visible pairs, to ``[B]`` sums.
        student: Attention of all heads.
        teacher: Attention of as many.
        visible: ``[B, 1, L, L]`` bool.

    Returns:
        ``[B]``.
    """
    num_heads = max(1, _SCORES_AT_ONCE // visible.numel())
    chunks = (slice(first, first + num_heads) for first in range(0, student.num_heads, num_heads))
    sums = [
        checkpoint(
            function,
            student.of_heads(heads),
            teacher.of_heads(heads),
            visible,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for heads in chunks
    ]
    return torch.stack(sums).sum(0)


def _squared_score_differences(
    student: AttentionRecord, teacher: AttentionRecord, visible: torch.Tensor
) -> torch.Tensor:
    return ((student.scores() - teacher.scores()) * visible).square().sum(dim=(1, 2, 3))


def _squared_probability_differences(
    student: AttentionRecord, teacher: AttentionRecord, visible: torch.Tensor
) -> torch.Tensor:
    student_probs, teacher_probs = (masked_scores(record, visible).softmax(-1) for record in (student, teacher))
    return ((student_probs - teacher_probs) * visible).square().sum(dim=(1, 2, 3))


def masked_scores(record: AttentionRecord, visible: torch.Tensor) -> torch.Tensor:
    """Return the scores, so low where a pair is not visible that its probability is zero; finite, for rows that see nothing."""
    return record.scores().masked_fill(~visible, torch.finfo(torch.float32).min)


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, attention_mask: torch.Tensor) -> ExampleSum:
    """Squared difference of hidden states, averaged over the width.

    Args:
        student: ``[B, L, D]``, projected to the teacher's width.
        teacher: ``[B, L, D]``.
        attention_mask: ``[B, L]``, 0 at padding.

    Returns:
        Sum over real tokens, and their number.

    Source: Jiao et al. 2020, "TinyBERT", equations 8 and 9.
    """
    return _sum_over_tokens((student.float() - teacher.float()).square().mean(-1), attention_mask)


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor, attention_mask: torch.Tensor) -> ExampleSum:
    """One minus the cosine of hidden states; takes and returns what [`hidden_loss`] does.

    Source: Sanh et al. 2019, "DistilBERT", section 2.
    """
    return _sum_over_tokens(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), attention_mask)


def _sum_over_tokens(values_BL: torch.Tensor, attention_mask: torch.Tensor) -> ExampleSum:
    # Whatever stands at padding, even what is not a number, has to go.
    values_BL = values_BL.masked_fill(attention_mask == 0, 0)
    return ExampleSum(values_BL.sum(1), attention_mask.sum(1).float())


def soft_cross_entropy(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Cross-entropy of the student under the teacher's softened distribution, times the squared temperature.

    Args:
        student_logits: ``[T, V]`` in any floating type.
        teacher_logits: ``[T, V]``.
        temperature: What both are divided by; the factor keeps the size of the gradient.

    Returns:
        ``[T]`` in nats.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    probs_TV = (teacher_logits.float() / temperature).softmax(-1)
    return F.cross_entropy(student_logits.float() / temperature, probs_TV, reduction="none") * temperature**2


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """KL divergence of the teacher from the student: [`soft_cross_entropy`] less the teacher's entropy, with the same gradient.

    Takes and returns what [`soft_cross_entropy`] does.
    """
    student_TV, teacher_TV = (
        (logits.float() / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits)
    )
    return F.kl_div(student_TV, teacher_TV, log_target=True, reduction="none").sum(-1) * temperature**2


def top_k_cross_entropy(
    student_logits: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    tail: torch.Tensor | None = None,
    *,
    temperature: float,
) -> torch.Tensor:
    """[`soft_cross_entropy`] where only the teacher's best k tokens are known; all others together are one class.

    Args:
        student_logits: ``[T, V]``.
        ids: ``[T, k]`` tokens.
        log_probs: ``[T, k]`` the teacher's log-probabilities of them, at the same temperature.
        tail: ``[T]`` its log-probability of all other tokens together; what is left over if not given.
        temperature: What the student's logits are divided by.

    Returns:
        ``[T]`` in nats.
    """
    logits_TV = student_logits.float() / temperature
    log_z_T = logits_TV.logsumexp(-1)
    probs_TK = log_probs.float().exp()
    tail_T = (1 - probs_TK.sum(-1)).clamp(min=0) if tail is None else tail.float().exp()
    nll_T = (probs_TK * (log_z_T[:, None] - logits_TV.gather(-1, ids))).sum(-1)
    if ids.shape[-1] < logits_TV.shape[-1]:
        # What is left of the student's mass is added up, not subtracted: it may be far below one.
        nll_T = nll_T + tail_T * (log_z_T - logits_TV.scatter(-1, ids, float("-inf")).logsumexp(-1))
    return nll_T * temperature**2


def top_k_divergence(
    student_logits: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    tail: torch.Tensor,
    *,
    temperature: float,
) -> torch.Tensor:
    """[`kl_divergence`] where only the teacher's best k tokens are known: [`top_k_cross_entropy`] less the teacher's entropy.

    Takes and returns what [`top_k_cross_entropy`] does.
    """
    known = torch.cat([log_probs, tail[:, None]], dim=-1).float()
    probs = known.exp()
    entropy_T = -(probs * known.masked_fill(probs == 0, 0)).sum(-1)
    nll_T = top_k_cross_entropy(student_logits, ids, log_probs, tail, temperature=temperature)
    return nll_T - temperature**2 * entropy_T


def regression_loss(student: torch.Tensor, teacher: torch.Tensor) -> ExampleSum:
    """Squared difference of predicted values, averaged over the outputs of an example.

    Args:
        student: ``[B]`` or ``[B, outputs]``.
        teacher: The same shape.

    Returns:
        The loss of each example, and a count of one.
    """
    losses_B = (student.float() - teacher.float()).square().reshape(len(student), -1).mean(-1)
    return ExampleSum(losses_B, torch.ones_like(losses_B))
