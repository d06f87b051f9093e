"""Losses between the states of student and teacher: attention, hidden states, and relations of queries, keys or values.

Pure functions of the records of both models; each returns the sum by example and the number of its targets. Padding
never counts, neither as a query nor as a key. Differences and sums are in fp32, under autocast too. Shapes: B rows of
L tokens, h heads of width d, states of width D. TinyBERT's squared differences come first, then MiniLM's divergences,
then how heads are summed in chunks, and the attention scores' difference without scores. Gradients are by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import without_autocast
from hf_pretrain.modeling.losses import ExampleSum
from hf_pretrain.modeling.observing.capture import AttentionRecord

# Scores of one chunk: 4 MiB in fp32, and on accelerators 64.
_SCORES_AT_ONCE = 1 << 20
_ON_ACCELERATORS = 16
_Compare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attention_loss(
    student: AttentionRecord,
    teacher: AttentionRecord,
    attention_mask: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
) -> ExampleSum:
    """Squared difference of the attention scores, before the softmax.

    Plain products of all pairs need no scores in long rows: see [`squared_score_differences`].

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
    is_product = all(record.bias is None and record.window is None for record in (student, teacher))
    if not is_product or document_ids is not None:
        return _sum_over_pairs(_squared_score_differences, student, teacher, attention_mask, document_ids)
    check_same_heads(student.num_heads, teacher.num_heads)
    states, scalings = (*student[:2], *teacher[:2]), (student.scaling, teacher.scaling)
    with without_autocast(attention_mask.device):
        sums_B = squared_score_differences(*states, attention_mask == 0, scalings=scalings)
    return ExampleSum(sums_B, student.num_heads * attention_mask.sum(1).float().square())


def attention_probability_loss(
    student: AttentionRecord,
    teacher: AttentionRecord,
    attention_mask: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
) -> ExampleSum:
    """Squared difference of the attention probabilities, after the softmax; TinyBERT has it before the softmax.

    Arguments, returns and errors are those of [`attention_loss`].
    """
    return _sum_over_pairs(_squared_probability_differences, student, teacher, attention_mask, document_ids)


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
    """One minus the cosine of hidden states; arguments and returns are those of [`hidden_loss`].

    Source: Sanh et al. 2019, "DistilBERT", section 2.
    """
    return _sum_over_tokens(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), attention_mask)


def _sum_over_tokens(values_BL: torch.Tensor, attention_mask: torch.Tensor) -> ExampleSum:
    # Not by a product: padding may hold values that are not a number.
    values_BL = values_BL.masked_fill(attention_mask == 0, 0)
    return ExampleSum(values_BL.sum(1), attention_mask.sum(1).float())


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
        relation_heads: Number of heads that both are split into again.
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
    sums_B, _ = _sum_over_pairs(_divergences, student, teacher, attention_mask, document_ids)
    return ExampleSum(sums_B, student.num_heads * attention_mask.sum(1).float())


def _relations(states_BLD: torch.Tensor, num_heads: int) -> AttentionRecord:
    """Return states that attend to themselves."""
    heads = states_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return AttentionRecord(query=heads, key=heads, value=heads, scaling=heads.shape[-1] ** -0.5)


def check_same_heads(student_heads: int, teacher_heads: int) -> None:
    """Raise InputError unless student and teacher have as many attention heads."""
    if student_heads != teacher_heads:
        raise InputError(
            f"the student's {student_heads} attention heads cannot learn from the teacher's {teacher_heads}: give the student "
            f"num_attention_heads={teacher_heads}, or use the relation losses, which split both again (relation_heads)"
        )


def check_relation_heads(relation_heads: int, *, student_width: int, teacher_width: int) -> None:
    """Raise InputError unless the relation heads divide both widths, those of all heads side by side."""
    if relation_heads < 1 or student_width % relation_heads or teacher_width % relation_heads:
        raise InputError(
            f"relation_heads={relation_heads} has to divide the widths of the student, {student_width}, and of the teacher, "
            f"{teacher_width}: choose a divisor of {math.gcd(student_width, teacher_width)}"
        )


def pairs_in_both(
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
        positions = torch.arange(is_real_BL.shape[1], device=is_real_BL.device)
        visible = visible & ((positions[:, None] - positions).abs() <= min(windows))
    return visible


def _sum_over_pairs(
    compare: _Compare,
    student: AttentionRecord,
    teacher: AttentionRecord,
    attention_mask: torch.Tensor,
    document_ids: torch.Tensor | None,
) -> ExampleSum:
    check_same_heads(student.num_heads, teacher.num_heads)
    visible = pairs_in_both(student, teacher, attention_mask, document_ids=document_ids)
    counts_B = student.num_heads * visible.sum(dim=(1, 2, 3)).float()
    return ExampleSum(sum_over_heads(compare, student, teacher, visible), counts_B)


def sum_over_heads(
    compare: _Compare, student: AttentionRecord, teacher: AttentionRecord, visible: torch.Tensor
) -> torch.Tensor:
    """Add up what compares two layers, some heads at a time; their scores are made once, and none are kept.

    Args:
        compare: Takes the student's and the teacher's scores of some heads, which it may overwrite, and the visible pairs, to
            ``[B]`` sums and their gradients by the student's scores.
        student: Attention of all heads.
        teacher: Attention of as many; no gradient reaches it.
        visible: ``[B, 1, L, L]`` bool.

    Returns:
        ``[B]``.
    """
    bias = student.bias
    if bias is not None and bias.requires_grad:
        # The gradients of the sums may differ between examples.
        bias = bias.expand(len(visible), -1, -1, -1)
    wanted = torch.is_grad_enabled()
    found: torch.Tensor = _SumOverHeads.apply(
        student.query, student.key, bias, student.scaling, teacher, visible, compare, wanted
    )
    return found


class _SumOverHeads(torch.autograd.Function):
    """Computes the gradients together with the sums, while the scores are there."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        teacher: AttentionRecord,
        visible: torch.Tensor,
        compare: _Compare,
        wanted: bool,
    ) -> torch.Tensor:
        """Return the sums, ``[B]`` in fp32."""
        student = AttentionRecord(query, key, key, scaling, bias)
        inputs = (query, key, bias)
        of_query, of_key, of_bias = (
            _empty_sum(each) if each is not None and wanted and need else None
            for each, need in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        )
        sums_B = torch.zeros(len(query), dtype=torch.float32, device=query.device)
        at_once = _SCORES_AT_ONCE * (1 if query.device.type == "cpu" else _ON_ACCELERATORS)
        num_heads = max(1, at_once // visible.numel())
        with without_autocast(query.device):
            for first in range(0, student.num_heads, num_heads):
                part = slice(first, first + num_heads)
                ours = student.of_heads(part)
                sums, errors = compare(ours.scores(), teacher.of_heads(part).scores(), visible)
                sums_B += sums
                if of_query is not None:
                    of_query[:, part] = scaling * (errors @ ours.key.float())
                if of_key is not None:
                    of_key[:, part] = scaling * (errors.mT @ ours.query.float())
                if of_bias is not None:
                    shared = of_bias if of_bias.shape[1] == 1 else of_bias[:, part]
                    shared += errors.sum_to_size(shared.shape)
        ctx.dtypes = [None if each is None else each.dtype for each in inputs]
        ctx.save_for_backward(of_query, of_key, of_bias)
        return sums_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of queries, keys and bias."""
        found = (
            None if each is None else (each * gradient[:, None, None, None]).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *found, None, None, None, None, None


def _empty_sum(of: torch.Tensor) -> torch.Tensor:
    """Return zeros for a gradient. In half precision with few exponents it would vanish before it is multiplied."""
    return torch.zeros_like(of, dtype=torch.float32 if of.dtype == torch.float16 else None)


def _masked(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Give pairs that are not visible probability 0; they stay finite for rows that see nothing."""
    return scores.masked_fill_(~visible, torch.finfo(torch.float32).min)


def _squared_score_differences(
    ours: torch.Tensor, theirs: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    differences = ours.sub_(theirs).mul_(visible)
    return differences.square().sum(dim=(1, 2, 3)), differences.mul_(2)


def _squared_probability_differences(
    ours: torch.Tensor, theirs: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs = (_masked(scores, visible).softmax(-1) for scores in (ours, theirs))
    # Hidden pairs are 0 in both, and rows that see nothing are alike.
    differences = theirs.neg_().add_(ours)
    sums_B = differences.square().sum(dim=(1, 2, 3))
    return sums_B, torch._softmax_backward_data(differences.mul_(2), ours, -1, ours.dtype)


def _divergences(ours: torch.Tensor, theirs: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs = (_masked(scores, visible).log_softmax(-1) for scores in (ours, theirs))
    # The softmax of a row of padding has no visible pair.
    wanted = theirs.exp().mul_(visible)
    sums_B = (wanted * theirs.sub_(ours)).sum(dim=(1, 2, 3))
    return sums_B, ours.exp_().mul_(wanted.sum(-1, keepdim=True)).sub_(wanted)


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

    With Q = (s q, -s' q') and K = (k, k') the sum is that of the products of the entries of QᵀQ and KᵀK. Rows longer
    than the width of both heads together use this form, and no scores are made. The gradient is by hand: only the
    student needs one, and the backward pass needs no copy.

    If both heads are equally wide, the terms of the sum are as small as the differences. If not, the value of long
    rows has an error of about 1e-6 of the sum of the squared scores; its gradient has none.

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
            # s q k - s' q' k' = (s q - s' q') k + s' q' (k - k'): no large numbers cancel. In place, to save memory.
            queries[..., :width] += queries[..., width:]
            queries[..., width:].neg_()
            keys[..., width:].neg_().add_(keys[..., :width])
        # Rounding may leave a negative sum.
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
    """Return Q and K in fp32, zero at padding, and whether products over pairs of tokens are cheaper."""
    padding = is_padding[:, None, :, None]
    signed = [scalings[0] * queries.float(), -scalings[1] * teacher_queries.float()]
    joined_queries = torch.cat(signed, dim=-1).masked_fill_(padding, 0)
    joined_keys = torch.cat([keys.float(), teacher_keys.float()], dim=-1).masked_fill_(padding, 0)
    return joined_queries, joined_keys, joined_keys.shape[2] <= joined_keys.shape[3]
