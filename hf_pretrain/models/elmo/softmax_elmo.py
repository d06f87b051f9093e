"""The words that come next: a full, a sampled or an adaptive softmax, which both directions share.

In the shapes: T states with a target, P their width, V words, S samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .configuration_elmo import ElmoConfig

IGNORED = -100
"""Label of a position without a target."""
# Logits that exist at a time outside of training: 32 MiB in fp32.
_CHUNK_LOGITS = 1 << 23


class Negatives(NamedTuple):
    """Words that a step of a sampled softmax compares with the right ones.

    Attributes:
        ids: ``[S]`` distinct ids. The vocabulary has to be sorted from frequent to rare.
        num_tries: ``[]`` draws that it took to find them.
    """

    ids: torch.Tensor
    num_tries: torch.Tensor


def log_expected_counts(ids: torch.Tensor, num_tries: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the logarithm of the probability that a word is among the samples, of the shape of the ids.

    The word with id i is drawn with probability ``ln((i + 2) / (i + 1)) / ln(V + 1)``.
    """
    probabilities = (1 / (ids.float() + 1)).log1p() / math.log(vocab_size + 1)
    # Of infinitely many draws every word is among them.
    return torch.expm1(num_tries * torch.log1p(-probabilities)).neg().log()


def find_target_rows(targets: torch.Tensor, config: ElmoConfig) -> list[torch.Tensor]:
    """Return where the targets are; on a device, this waits for it.

    Args:
        targets: Ids of any shape, -100 for none.
        config: Gives the clusters.

    Returns:
        The flat positions ``[T]`` of the targets; then, for each cluster after the first, which of the T are in it.
    """
    rows = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    found = targets.flatten().index_select(0, rows)
    ends = [*(config.cutoffs or [])[1:], config.vocab_size]
    tails = zip(config.cutoffs or [], ends, strict=False)
    return [rows, *(((found >= low) & (found < high)).nonzero().squeeze(1) for low, high in tails)]


class WordSoftmax(nn.Linear):
    """A linear layer over all words, which can be trained on a sample of them.

    Source: Jean et al., "On using very large target vocabulary for neural machine translation" (2015); TensorFlow's
    `sampled_softmax_loss`.
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config.projection_size, config.vocab_size)

    def log_prob(self, states: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of every word, ``float32 [..., V]``."""
        return self(states).float().log_softmax(-1)

    def nll(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        tails: list[torch.Tensor],
        negatives: Negatives | None = None,
    ) -> torch.Tensor:
        """Return minus the log-probability of each target.

        Args:
            states: ``[T, P]``.
            targets: ``[T]`` ids.
            tails: Not read.
            negatives: Compare the targets with these words alone.

        Returns:
            ``float32 [T]`` in nats.
        """
        if negatives is not None:
            return self._sampled_nll(states, targets, negatives)
        if torch.is_grad_enabled():
            return F.cross_entropy(self(states).float(), targets, reduction="none")
        parts = zip(
            *(values.split(max(1, _CHUNK_LOGITS // self.out_features)) for values in (states, targets)), strict=True
        )
        return torch.cat([F.cross_entropy(self(part).float(), ids, reduction="none") for part, ids in parts])

    def _sampled_nll(self, states: torch.Tensor, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
        ids_S, num_tries = negatives
        weight, bias = F.embedding(ids_S, self.weight), self.bias[ids_S]
        wrong_TS = F.linear(states, weight.to(states.dtype), bias.to(states.dtype)).float()
        wrong_TS = wrong_TS - log_expected_counts(ids_S, num_tries, self.out_features)
        # A target that was drawn too counts once, as the target.
        wrong_TS = wrong_TS.masked_fill(targets[:, None] == ids_S, -torch.inf)
        right_T = (states * F.embedding(targets, self.weight)).sum(-1).float() + self.bias[targets].float()
        right_T = right_T - log_expected_counts(targets, num_tries, self.out_features)
        return torch.cat([right_T[:, None], wrong_TS], dim=1).logsumexp(1) - right_T


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's adaptive softmax, with the targets of each cluster found beforehand.

    Source: Grave et al., "Efficient softmax approximation for GPUs" (2017).
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(
            config.projection_size, config.vocab_size, config.cutoffs or [], div_value=config.div_value, head_bias=True
        )

    def nll(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        tails: list[torch.Tensor],
        negatives: Negatives | None = None,
    ) -> torch.Tensor:
        """Return minus the log-probability of each target; see [`WordSoftmax`].

        Args:
            states: ``[T, P]``.
            targets: ``[T]`` ids.
            tails: For each cluster after the first, which of the T are in it.
            negatives: Not read.
        """
        entries = targets
        for cluster, (low, high) in enumerate(zip(self.cutoffs[:-1], self.cutoffs[1:], strict=True)):
            entries = torch.where((targets >= low) & (targets < high), self.shortlist_size + cluster, entries)
        nll = F.cross_entropy(self.head(states).float(), entries, reduction="none")
        for low, tail, rows in zip(self.cutoffs, self.tail, tails, strict=False):
            # An empty cluster goes the same way, so that its weights get a gradient of zeros on every rank.
            logits = tail(states.index_select(0, rows)).float()
            nll = nll.index_add(0, rows, F.cross_entropy(logits, targets[rows] - low, reduction="none"))
        return nll
