"""Draw tokens from a generator, one keyed uniform a token."""

from __future__ import annotations

import torch


@torch.no_grad()
def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float = 1.0,
    excluded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample one token a row from the softmax of the logits, by inverting its cumulative distribution.

    One uniform a row decides, so the draw is keyed like every other and needs no generator state on the device. The distribution
    is taken in fp32 whatever the logits' type: in bf16 a Gumbel draw is the argmax 99.7 times out of 100 where it should be so 50
    times.

    Args:
        logits: ``[T, V]`` in any floating type.
        uniforms: ``[T]`` in ``[0, 1)``, fp32.
        temperature: Divides the logits; towards 0 the argmax is drawn, towards infinity all tokens alike.
        excluded: ``[V]``, true for tokens that are never drawn.

    Returns:
        ``[T]`` token ids.
    """
    logits_TV = logits.float() / temperature
    if excluded is not None:
        logits_TV = logits_TV.masked_fill(excluded, float("-inf"))
    cumulative_TV = logits_TV.softmax(dim=-1).cumsum(dim=-1)
    total_T1 = cumulative_TV[:, -1:]
    # The product may round up to the total itself, which lies beyond the last token.
    threshold_T1 = torch.minimum(uniforms[:, None] * total_T1, torch.nextafter(total_T1, torch.zeros_like(total_T1)))
    # right=True: the first token whose cumulative mass exceeds the threshold, so one of mass zero is never drawn.
    sampled_T = torch.searchsorted(cumulative_TV, threshold_T1, right=True).squeeze(-1).clamp(max=logits.shape[1] - 1)
    if excluded is None:
        return sampled_T
    # A parallel prefix sum need not be monotonic, so it can step up at a token of no mass.
    return torch.where(excluded[sampled_T], logits_TV.argmax(dim=-1), sampled_T)
