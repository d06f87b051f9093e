"""Draw tokens from a generator, one keyed uniform a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Vocabularies are searched in two steps: for the block, then for the token in it. Near the root of their size costs least.
_BLOCK = 256
# What a CPU's cache holds of the logits while they are gone through several times.
_CACHED_LOGITS = 1 << 20
_LARGEST_BELOW_ONE = 1 - 2**-24


@torch.no_grad()
def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    excluded: torch.Tensor | None = None,
    disallowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample one token a row from the softmax of the logits, by inverting its cumulative distribution.

    One uniform a row decides, so the draw is keyed like every other and needs no generator state on the device. The distribution
    is taken in fp32 whatever the logits' type: in bf16 a Gumbel draw is the argmax 99.7 times out of 100 where it should be so 50
    times.

    Args:
        logits: ``[T, V]`` in any floating type.
        uniforms: ``[T]`` in ``[0, 1)``, fp32.
        temperature: Divides the logits; towards 0 the argmax is drawn, towards infinity all tokens alike. A tensor ``[]`` where
            it changes in training: a compiled model would be compiled anew for each number.
        excluded: ``[V]``, true for tokens that are never drawn.
        disallowed: ``[T]`` ids of a token of each row that is not drawn there; its mass goes to the others. With the true tokens
            it is `disallow_correct` of the official ELECTRA.

    Returns:
        ``[T]`` token ids.
    """
    rows = max(1, _CACHED_LOGITS // logits.shape[1])
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or len(logits) <= rows:
        return _sample(logits, uniforms, temperature, excluded, disallowed)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        barred = None if disallowed is None else disallowed[part]
        tokens[part] = _sample(logits[part], uniforms[part], temperature, excluded, barred)
    return tokens


def _sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float | torch.Tensor,
    excluded: torch.Tensor | None,
    disallowed: torch.Tensor | None,
) -> torch.Tensor:
    scaled_TV = logits.float() / temperature
    if excluded is not None:
        scaled_TV.masked_fill_(excluded, float("-inf"))
    if disallowed is not None:
        scaled_TV.scatter_(1, disallowed[:, None], float("-inf"))
    masses_TV = F.pad(scaled_TV.softmax(dim=-1), (0, -logits.shape[1] % _BLOCK))
    masses_TNK = masses_TV.unflatten(1, (-1, _BLOCK))
    block_T1, inside_T1 = _locate(masses_TNK.sum(dim=-1), uniforms[:, None])
    masses_TK = masses_TNK.take_along_dim(block_T1[..., None], dim=1).squeeze(1)
    return (block_T1 * _BLOCK + _locate(masses_TK, inside_T1)[0]).squeeze(1)


def _locate(masses: torch.Tensor, fraction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the entry at which the running sum of the masses first exceeds a fraction of their total.

    Args:
        masses: ``[T, N]``, not negative.
        fraction: ``[T, 1]`` fp32, at most 1 - 2**-24, whose product with a total is always below it.

    Returns:
        The entry, ``[T, 1]``, never one without mass; and at which fraction of its own mass the sum is met, ``[T, 1]``.
    """
    sums = masses.cumsum(dim=-1)
    wanted = fraction * sums[:, -1:]
    entry = (sums <= wanted).sum(dim=-1, keepdim=True).clamp(max=masses.shape[1] - 1)
    # A parallel prefix sum need not be monotonic, so it can step up at an entry without mass.
    entry = torch.where(masses.gather(-1, entry) > 0, entry, masses.argmax(dim=-1, keepdim=True))
    mass = masses.gather(-1, entry)
    return entry, ((wanted - sums.gather(-1, entry) + mass) / mass).clamp(0, _LARGEST_BELOW_ONE)
