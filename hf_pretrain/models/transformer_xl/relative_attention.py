"""The layers of Transformer-XL: attention over memory and segment by content and distance, and the feed-forward network.

In shapes: B examples, S positions of the segment, K keys (the memory's and the segment's), H heads, D the model's width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_transformer_xl import TransformerXLConfig


def distance_table(num_keys: int, config: TransformerXLConfig, like: torch.Tensor) -> torch.Tensor:
    """Return the representations ``[K, D]`` of the distances K-1, ..., 0: sines, then cosines.

    Args:
        num_keys: K.
        config: Gives the width and where distances are clamped.
        like: Tensor whose type and device the table has.
    """
    distances = torch.arange(num_keys - 1, -1, -1, device=like.device, dtype=torch.float32)
    if config.clamp_len > 0:
        distances = distances.clamp(max=config.clamp_len)
    exponents = torch.arange(0, config.hidden_size, 2, device=like.device, dtype=torch.float32) / config.hidden_size
    angles = distances[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


def visible_keys(
    num_queries: int, num_keys: int, *, window: int | None, key_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return which key each query sees, ``bool [B or 1, 1, S, K]``; the last S keys are the queries' own.

    Args:
        num_queries: S.
        num_keys: K.
        window: How many positions a query sees, its own included; None for all that precede it.
        key_mask: ``bool [B, K]``, False for padding and for unfilled memory.
        device: Where to build it.
    """
    keys = torch.arange(num_keys, device=device)
    distances = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - keys
    visible = distances >= 0
    if window is not None:
        visible = visible & (distances < window)
    visible = visible[None, None]
    if key_mask is not None:
        # Padding sees itself: no query is left without a key.
        visible = visible & key_mask[:, None, None, :] | (distances == 0)
    return visible


def distances_to_keys(scores: torch.Tensor) -> torch.Tensor:
    """Turn scores by distance into scores by key.

    Args:
        scores: ``[B, H, S, K]``; column t belongs to the distance K-1-t.

    Returns:
        ``[B, H, S, K]``; row i is shifted left by S-1-i, so that column j belongs to key j. What lies in the future is arbitrary.
    """
    num_queries = scores.shape[2]
    # One more column makes each row of the flat buffer begin one further to the right than the row before.
    return F.pad(scores, (1, 0)).flatten(2)[..., num_queries:].view(scores.shape)


class RelativeAttention(nn.Module):
    """Multi-head attention with score ``(q+u)·k + (q+v)·r``, where r represents the distance between query and key."""

    def __init__(self, config: TransformerXLConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.dropout = config.attention_probs_dropout_prob
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.r_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def _distance_scores(self, query: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return the products ``[B, H, S, K]`` of queries ``[B, H, S, head]`` with the projected table ``[K, D]``."""
        if query.shape[0] * query.shape[2] < self.head_dim and type(self.r_proj) is nn.Linear:
            # A few queries, as in generation: taking them to the table costs less than projecting the table.
            weight = self.r_proj.weight.unflatten(0, (-1, self.head_dim))
            return (query @ weight.to(query.dtype)) @ table.T
        return query @ self._heads(self.r_proj(table)).transpose(-2, -1)

    def forward(
        self,
        context: torch.Tensor,
        num_queries: int,
        table: torch.Tensor,
        visible: torch.Tensor,
        content_bias: torch.Tensor,
        position_bias: torch.Tensor,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Return what the segment reads, ``[B, S, D]``.

        Args:
            context: ``[B, memory + S, D]``; the last S positions are the segment.
            num_queries: S.
            table: ``[K, D]`` from `distance_table`.
            visible: From `visible_keys`.
            content_bias: u, ``[H, head]``.
            position_bias: v, ``[H, head]``.
            cache: Keys and values of what came before the context; gets those of the context.
        """
        query = self._heads(self.q_proj(context[:, -num_queries:]))
        key, value = self._heads(self.k_proj(context)), self._heads(self.v_proj(context))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        scale = self.head_dim**-0.5
        by_distance = self._distance_scores((query + position_bias[:, None]) * scale, table)
        by_position = distances_to_keys(by_distance).masked_fill(~visible, -torch.inf)
        query = query + content_bias[:, None]
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(
            query, key, value, attn_mask=by_position.to(query.dtype), dropout_p=dropout, scale=scale
        )
        return self.o_proj(read.transpose(1, 2).flatten(2))


class TransformerXLLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with a residual connection and a layer norm after or before it."""

    def __init__(self, config: TransformerXLConfig, layer_idx: int) -> None:
        super().__init__()
        self.pre_layer_norm = config.pre_layer_norm
        self.attention = RelativeAttention(config, layer_idx)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the feed-forward network's output, ``[B, S, D]``."""
        return self.dropout(self.down_proj(self.dropout(self.activation(self.up_proj(hidden)))))

    def forward(
        self,
        hidden: torch.Tensor,
        memory: torch.Tensor | None,
        table: torch.Tensor,
        visible: torch.Tensor,
        content_bias: torch.Tensor,
        position_bias: torch.Tensor,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Return the layer's output ``[B, S, D]`` for the segment `hidden` after the `memory` ``[B, M, D]``."""
        # As positional arguments, for reentrant checkpointing; the memory has no gradient.
        rest = (hidden.shape[1], table, visible, content_bias, position_bias, cache)
        context = hidden if memory is None else torch.cat([memory.to(hidden.dtype), hidden], dim=1)
        if self.pre_layer_norm:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(context), *rest))
            return hidden + self.feed_forward(self.feed_forward_norm(hidden))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(context, *rest)))
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))
