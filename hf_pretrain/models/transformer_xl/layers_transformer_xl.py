"""The parts of Transformer-XL: adaptive embeddings and softmax, and layers of attention by content and distance.

The rarer the tokens of a cluster, the narrower their vectors. Embeddings and softmax have the same tables and projections. With
`div_val` 1 one table holds all tokens and a cluster is a block of its rows; otherwise each cluster has a table of its own width.
A projection `[hidden, width]` leads from a table to the model and, transposed, back; there is none where the one table is as
wide as the model.

In the shapes of the layers: B examples, S positions of the segment, K keys (the memory's and the segment's), H heads, D the
model's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_transformer_xl import TransformerXLConfig

IGNORED = -100
"""Label of a position without a target."""


def table_sizes(config: TransformerXLConfig) -> list[tuple[int, int]]:
    """Return rows and width of each table."""
    widths = config.cluster_sizes
    if config.div_val == 1:
        return [(config.vocab_size, widths[0])]
    return [(end - first, width) for (first, end), width in zip(config.cluster_bounds, widths, strict=True)]


def new_projections(config: TransformerXLConfig, widths: list[int]) -> nn.ParameterList:
    """Return a projection for each of the widths, not yet initialized, or none where none is needed."""
    if config.div_val == 1 and config.embedding_size == config.hidden_size:
        return nn.ParameterList()
    return nn.ParameterList([nn.Parameter(torch.empty(config.hidden_size, width)) for width in widths])


def tied_weights(config: TransformerXLConfig) -> dict[str, str]:
    """Return which weights of the softmax are which of the embeddings, as patterns of their names in each."""
    tables = range(len(table_sizes(config)))
    tied = {f"tables.{table}.weight": f"tables.{table}.weight" for table in tables}
    if config.tie_tail_projections and (config.div_val > 1 or config.embedding_size != config.hidden_size):
        # The first cluster's projections, in and out, are always two.
        for cluster in range(1, len(config.cluster_bounds)):
            tied[f"projections.{cluster}$"] = f"projections.{cluster if config.div_val > 1 else 0}$"
    return tied


def clusters_of(targets: torch.Tensor, config: TransformerXLConfig) -> torch.Tensor:
    """Return the number of the cluster that each id is in."""
    bounds = config.cluster_bounds[1:]
    return sum(((targets >= first).long() for first, _ in bounds), torch.zeros_like(targets))


def find_target_rows(targets: torch.Tensor, config: TransformerXLConfig) -> list[torch.Tensor]:
    """Return where the targets are; on a device, this waits for it.

    Args:
        targets: Ids of any shape, -100 for none.
        config: Gives the clusters.

    Returns:
        The flat positions ``[T]`` of the targets; then, for each cluster after the first, which of the T are in it.
    """
    rows = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    clusters = clusters_of(targets.flatten().index_select(0, rows), config)
    tails = range(1, len(config.cluster_bounds))
    return [rows, *((clusters == cluster).nonzero().squeeze(1) for cluster in tails)]


class AdaptiveEmbedding(nn.Module):
    """Token embeddings at the model's width, unscaled."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        sizes = table_sizes(config)
        self.tables = nn.ModuleList([nn.Embedding(rows, width) for rows, width in sizes])
        self.projections = new_projections(config, [width for _, width in sizes])

    @property
    def num_embeddings(self) -> int:
        """Number of tokens."""
        return self.config.vocab_size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings ``[..., hidden]`` of ids ``[...]``.

        Every table is looked up for every token, at some row of its own where the token is another's, and the result is masked:
        so the shapes are fixed and nothing waits for the device.
        """
        if len(self.tables) == 1:
            vectors = self.tables[0](input_ids)
            return F.linear(vectors, self.projections[0]) if len(self.projections) else vectors
        bounds = self.config.cluster_bounds
        embedded = None
        for cluster, ((first, end), table) in enumerate(zip(bounds, self.tables, strict=True)):
            is_last = cluster == len(bounds) - 1
            # The outermost bounds are left to the tables, which refuse an id that is none.
            rows = (input_ids - first).clamp(min=0 if cluster else None, max=None if is_last else end - first - 1)
            inside = (input_ids >= first) & (input_ids < end)
            part = F.linear(table(rows) * inside.unsqueeze(-1), self.projections[cluster])
            embedded = part if embedded is None else embedded + part
        assert embedded is not None
        return embedded


class AdaptiveLogSoftmax(nn.Module):
    """Distribution over the vocabulary in two steps: a token of the first cluster or another cluster, then a token of that.

    The first softmax has the first cluster's tokens and then one entry for each further cluster (a "tail"), in their order.
    Without cutoffs it is all there is: a plain softmax.

    Source:
        Grave et al., "Efficient softmax approximation for GPUs" (2017).
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        self.tables = nn.ModuleList([nn.Linear(width, rows) for rows, width in table_sizes(config)])
        self.projections = new_projections(config, config.cluster_sizes)
        self.num_tails = len(config.cluster_bounds) - 1
        if self.num_tails:
            self.cluster_weight = nn.Parameter(torch.empty(self.num_tails, config.cluster_sizes[0]))
            self.cluster_bias = nn.Parameter(torch.empty(self.num_tails))

    def cluster_logits(self, hidden: torch.Tensor, cluster: int) -> torch.Tensor:
        """Return the logits ``[..., entries]`` of one softmax: the first cluster's with the others' entries, or a tail's."""
        table: Any = self.tables[cluster if len(self.tables) > 1 else 0]
        weight, bias = table.weight, table.bias
        if len(self.tables) == 1:
            first, end = self.config.cluster_bounds[cluster]
            weight, bias = weight[first:end], bias[first:end]
        if cluster == 0 and self.num_tails:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        if len(self.projections):
            hidden = hidden @ self.projections[cluster]
        return F.linear(hidden, weight, bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores ``[..., vocabulary]`` whose softmax is the distribution: logits, or log-probabilities where adaptive."""
        return self.log_prob(hidden) if self.num_tails else self.cluster_logits(hidden, 0)

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of every token, ``float32 [..., vocabulary]`` in the order of the ids."""
        head = self.cluster_logits(hidden, 0).float().log_softmax(-1)
        shortlist = head.shape[-1] - self.num_tails
        parts = [head[..., :shortlist]]
        for cluster in range(1, self.num_tails + 1):
            within = self.cluster_logits(hidden, cluster).float().log_softmax(-1)
            parts.append(head[..., shortlist + cluster - 1, None] + within)
        return torch.cat(parts, dim=-1)

    def nll(
        self, hidden: torch.Tensor, targets: torch.Tensor, tails: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return minus the log-probability of each target; a tail is computed for its own targets alone.

        Args:
            hidden: ``[T, hidden]``.
            targets: ``[T]`` ids.
            tails: For each cluster after the first, which of the T are in it; found here, which waits for the device, if not
                given.

        Returns:
            ``float32 [T]`` in nats, in the order of the targets.
        """
        bounds = self.config.cluster_bounds
        shortlist = bounds[0][1]
        clusters = clusters_of(targets, self.config)
        tails = find_target_rows(targets, self.config)[1:] if tails is None else tails
        entries = torch.where(clusters == 0, targets, shortlist + clusters - 1)
        nll = F.cross_entropy(self.cluster_logits(hidden, 0).float(), entries, reduction="none")
        for cluster, ((first, _), rows) in enumerate(zip(bounds[1:], tails, strict=True), start=1):
            # An empty cluster goes the same way, so that its weights get a gradient of zeros on every rank.
            logits = self.cluster_logits(hidden.index_select(0, rows), cluster).float()
            nll = nll.index_add(0, rows, F.cross_entropy(logits, targets[rows] - first, reduction="none"))
        return nll


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

    def forward(self, hidden: torch.Tensor, memory: torch.Tensor | None, *terms: Any) -> torch.Tensor:
        """Return the layer's output ``[B, S, D]`` for the segment `hidden` after the `memory` ``[B, M, D]``.

        The `terms` are the other arguments of the attention, from `table` on: positional, for reentrant checkpointing.
        """
        rest = (hidden.shape[1], *terms)
        context = hidden if memory is None else torch.cat([memory.to(hidden.dtype), hidden], dim=1)
        if self.pre_layer_norm:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(context), *rest))
            return hidden + self.feed_forward(self.feed_forward_norm(hidden))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(context, *rest)))
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))
