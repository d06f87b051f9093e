"""The squared difference of two layers' attention scores, by the cheaper of two ways, and its gradient by hand.

Losses between a student and its teacher, as pure functions that return sums by example, or values by target.

Padding never counts, neither as a query nor as a key. Differences and reductions are in fp32, under autocast too. Shapes: B rows
of L tokens, h heads of width d, states of width D; T targets over a vocabulary, or classes, of V.

MiniLM: which tokens a layer relates, whatever its heads and widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import ExampleSum
from hf_pretrain.modeling.observing.capture import AttentionRecord


def squared_score_differences(
    queries: torch.Tensor,
    keys: torch.Tensor,
    teacher_queries: torch.Tensor,
    teacher_keys: torch.Tensor,
    is_padding: torch.Tensor,
    *,
    scalings: tuple[float, float],
) -> torch.Tensor:
    """Return the sum of ``(s q k - s' q' k')²`` over all heads and all pairs of real tokens, ``[B]`` in fp32.

    Rows longer than a head of both models is wide never have their scores made: with Q = (s q, -s' q') and K = (k, k') the sum is
    that of the products of the entries of QᵀQ and KᵀK. Its gradient is made here, since only the student's share of it is
    wanted, and since what it is made of is at hand: no copy is kept for the backward pass.

    Where both heads are equally wide, what is summed is of the size of the differences. Else the value of long rows, not its
    gradient, is right up to about 1e-6 of the sum of the squared scores, so it is no measure of students nearer than that.

    Args:
        queries: ``[B, h, L, d]`` of the student.
        keys: ``[B, h, L, d]``.
        teacher_queries: ``[B, h, L, d']``; no gradient reaches them.
        teacher_keys: ``[B, h, L, d']``.
        is_padding: ``[B, L]`` bool.
        scalings: The student's s and the teacher's s'.
    """
    arguments = (scalings, queries, keys, teacher_queries, teacher_keys, is_padding)
    return cast(torch.Tensor, _SquaredScoreDifferences.apply(*arguments))


class _SquaredScoreDifferences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scalings: tuple[float, float], *arguments: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*arguments)
        ctx.scalings = scalings
        queries, keys, is_short = _joined(scalings, *arguments)
        if is_short:
            return (queries @ keys.mT).square().sum(dim=(1, 2, 3))
        width = arguments[0].shape[-1]
        if queries.shape[-1] == 2 * width:
            # s q k - s' q' k' = (s q - s' q') k + s' q' (k - k'): no large numbers that cancel. In place, to take no memory.
            queries[..., :width] += queries[..., width:]
            queries[..., width:].neg_()
            keys[..., width:].neg_().add_(keys[..., :width])
        # Rounding may leave less than nothing.
        return ((queries.mT @ queries) * (keys.mT @ keys)).sum(dim=(1, 2, 3)).clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arguments = ctx.saved_tensors
        queries, keys, is_short = _joined(ctx.scalings, *arguments)
        width, scale = arguments[0].shape[-1], 2 * gradient[:, None, None, None]
        ours, our_keys = queries[..., :width], keys[..., :width]
        if is_short:
            differences = queries @ keys.mT
            of_queries, of_keys = differences @ our_keys, differences.mT @ ours
        else:
            of_queries, of_keys = queries @ (keys.mT @ our_keys), keys @ (queries.mT @ ours)
        of_queries, of_keys = ctx.scalings[0] * scale * of_queries, scale * of_keys
        return None, of_queries.to(arguments[0].dtype), of_keys.to(arguments[1].dtype), None, None, None


def _joined(
    scalings: tuple[float, float],
    queries: torch.Tensor,
    keys: torch.Tensor,
    teacher_queries: torch.Tensor,
    teacher_keys: torch.Tensor,
    is_padding: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return Q and K in fp32, zero at padding, and whether their products by pairs of tokens are the cheaper ones."""
    padding = is_padding[:, None, :, None]
    signed = [scalings[0] * queries.float(), -scalings[1] * teacher_queries.float()]
    joined_queries = torch.cat(signed, dim=-1).masked_fill_(padding, 0)
    joined_keys = torch.cat([keys.float(), teacher_keys.float()], dim=-1).masked_fill_(padding, 0)
    return joined_queries, joined_keys, joined_keys.shape[2] <= joined_keys.shape[3]


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
