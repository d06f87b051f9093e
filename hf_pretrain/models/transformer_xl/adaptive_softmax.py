"""Adaptive input embeddings and adaptive softmax: the rarer the tokens of a cluster, the narrower their vectors.

Both sides have the same tables and projections. With `div_val` 1 one table holds all tokens and a cluster is a block of its
rows; otherwise each cluster has a table of its own width. A projection `[hidden, width]` leads from a table to the model and,
transposed, back; there is none where the one table is as wide as the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .configuration_transformer_xl import TransformerXLConfig


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

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return minus the log-probability of each target; a tail is computed for its own targets alone.

        Args:
            hidden: ``[T, hidden]``.
            targets: ``[T]`` ids.

        Returns:
            ``float32 [T]`` in nats, in the order of the targets.
        """
        bounds = self.config.cluster_bounds
        shortlist = bounds[0][1]
        clusters = sum(((targets >= first).long() for first, _ in bounds[1:]), torch.zeros_like(targets))
        entries = torch.where(clusters == 0, targets, shortlist + clusters - 1)
        nll = F.cross_entropy(self.cluster_logits(hidden, 0).float(), entries, reduction="none")
        for cluster, (first, _) in enumerate(bounds[1:], start=1):
            # An empty cluster goes the same way, so that its weights get a gradient of zeros on every rank.
            rows = (clusters == cluster).nonzero().squeeze(1)
            logits = self.cluster_logits(hidden.index_select(0, rows), cluster).float()
            nll = nll.index_add(0, rows, F.cross_entropy(logits, targets[rows] - first, reduction="none"))
        return nll
