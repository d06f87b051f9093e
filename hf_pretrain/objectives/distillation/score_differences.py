"""The squared difference of two layers' attention scores, by the cheaper of two ways, and its gradient by hand."""

from __future__ import annotations

from typing import Any, cast

import torch


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
