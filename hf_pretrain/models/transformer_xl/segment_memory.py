"""The memory of Transformer-XL from segment to segment, and which of it there is to see.

In shapes: N layers, B examples, M positions of the memory, S of the segment, K keys.
"""

from __future__ import annotations

import torch
from transformers import Cache


def check_past(cache: Cache | None, mems: torch.Tensor | None, *, num_layers: int) -> None:
    """Raise ValueError where the past is given twice, or in a form that does not fit."""
    if cache is not None and mems is not None:
        raise ValueError("cache, mems: give one of the two, the cache in generation and mems in a stream")
    if cache is not None and cache.is_compileable:
        raise ValueError("cache: a static cache does not fit; use the default cache_implementation")
    if mems is not None and (mems.dim() != 4 or len(mems) != num_layers):
        raise ValueError(f"mems has shape {tuple(mems.shape)}: give [{num_layers}, batch, length, hidden]")


def filled_lengths(mems: torch.Tensor, mem_lengths: torch.Tensor | None) -> torch.Tensor:
    """Return how many positions of each example's memory are filled, ``[B]``."""
    return torch.full((mems.shape[1],), mems.shape[2], device=mems.device) if mem_lengths is None else mem_lengths


def key_mask(
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    mems: torch.Tensor | None,
    mem_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor | None, int]:
    """Return which keys there are to see, ``bool [B, K]`` or None for all, and K."""
    batch, num_queries, _ = hidden.shape
    if mems is not None:
        # Padding of the segment has been moved to its end, where no token sees it.
        length = mems.shape[2]
        slots = torch.arange(length, device=hidden.device)
        filled = slots >= length - filled_lengths(mems, mem_lengths)[:, None]
        return torch.cat([filled, filled.new_ones(batch, num_queries)], dim=1), length + num_queries
    seen, num_keys = 0, num_queries
    if cache is not None:
        seen, num_keys = cache.get_seq_length(), cache.get_mask_sizes(num_queries, 0)[0]
    if attention_mask is None:
        return None, num_keys
    if attention_mask.shape != (batch, seen + num_queries):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give {(batch, seen + num_queries)}, all that was "
            "read before included"
        )
    return attention_mask[:, -num_keys:].bool(), num_keys


def append_segment(
    mems: torch.Tensor, lengths: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the memory after a segment, ``[layers, B, M, hidden]``, and how much of it is filled, ``[B]``.

    Args:
        mems: The memory before it.
        lengths: How much of that is filled.
        states: ``[layers, B, S, hidden]``, padding last.
        attention_mask: ``[B, S]``, or None where nothing is padding.
    """
    length, segment = mems.shape[2], states.shape[2]
    joined = torch.cat([mems, states.to(mems.dtype)], dim=2).detach()
    if attention_mask is None:
        return joined[:, :, segment:], (lengths + segment).clamp(max=length)
    read = (attention_mask != 0).sum(1)
    kept = read[:, None] + torch.arange(length, device=mems.device)
    return joined.take_along_dim(kept[None, :, :, None], dim=2), (lengths + read).clamp(max=length)
