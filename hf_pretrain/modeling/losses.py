"""Losses as pure functions of logits, targets and positions, returning sums by example."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from hf_pretrain.modeling.outputs import ExampleSum, sum_by_example

IGNORED = -100


def masked_lm_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, positions: torch.Tensor, shape: torch.Size
) -> ExampleSum:
    """Cross-entropy at the target positions.

    Args:
        logits: ``[T, V]`` in any floating type; the loss is taken in fp32.
        targets: ``[T]`` token ids, -100 for a slot that only fills up a fixed shape.
        positions: ``[T]`` flat positions of the targets in the batch.
        shape: ``(B, L)`` of the batch.

    Returns:
        Negative log-likelihood in nats and number of targets, by example.
    """
    nll_T = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
    is_target = targets != IGNORED
    return ExampleSum(sum_by_example(nll_T, positions, shape), sum_by_example(is_target, positions, shape))


def masked_lm_accuracy(
    predictions: torch.Tensor, targets: torch.Tensor, *, positions: torch.Tensor, shape: torch.Size
) -> ExampleSum:
    """Count right predictions: ``[T]`` ids against ``[T]`` targets; see [`masked_lm_loss`] for the other arguments."""
    is_target = targets != IGNORED
    return ExampleSum(
        sum_by_example(predictions == targets, positions, shape), sum_by_example(is_target, positions, shape)
    )


def binary_token_loss(logits: torch.Tensor, labels: torch.Tensor, *, mask: torch.Tensor) -> ExampleSum:
    """Binary cross-entropy over the real tokens.

    Args:
        logits: ``[B, L]`` in any floating type; the loss is taken in fp32.
        labels: ``[B, L]`` zeros and ones; what stands under a zero of the mask does not matter.
        mask: ``[B, L]``, one where a token counts.

    Returns:
        Negative log-likelihood in nats and number of tokens, by example.
    """
    mask_BL = mask.to(torch.float32)
    nll_BL = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return ExampleSum((nll_BL * mask_BL).sum(dim=1), mask_BL.sum(dim=1))
