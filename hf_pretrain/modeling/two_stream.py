"""Two-stream attention: every token as content and, where it is to be predicted, once more as a query that hides it.

Both streams are rows of one sequence with the same weights: S content rows, then P query rows, one a target. Only content
rows are keys and values. Who sees whom follows from two integers a token, so no mask leaves the collator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from hf_pretrain.modeling.memory import RecurrentMemory


class PermutedBatch(NamedTuple):
    """A batch with an order of prediction.

    Attributes:
        input_ids: ``[B, S]`` tokens, never corrupted.
        attention_mask: ``[B, S]``, zero at padding.
        key_ranks: ``[B, S]``; row i sees the content of j iff ``key_ranks[j] < thresholds[i]``.
        thresholds: ``[B, S]``; the query of a token has the threshold of the token.
        target_columns: ``[B, P]`` columns of the targets.
        token_type_ids: ``[B, S]`` segments; one segment if not given.
        backward: ``[B]`` bool, rows whose text runs from right to left; none if not given.
        positions: ``[B, S]`` place of each token in its row, below S; if not given, their order with padding left out.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    key_ranks: torch.Tensor
    thresholds: torch.Tensor
    target_columns: torch.Tensor
    token_type_ids: torch.Tensor | None = None
    backward: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def visible(self) -> torch.Tensor:
        """Return ``[B, S + P, S]`` bool: which content each row sees. A content row also sees itself, a query row does not."""
        ranks_BS, length = self.key_ranks.masked_fill(self.attention_mask == 0, _NEVER), self.input_ids.shape[1]
        visible_BTS = ranks_BS[:, None, :] < self.of_rows(self.thresholds)[:, :, None]
        # Padding sees itself too: a row without any key is a special case for the kernels.
        own_S = torch.arange(length, device=ranks_BS.device)
        visible_BTS[:, own_S, own_S] = True
        return visible_BTS

    def places(self) -> torch.Tensor:
        """Return ``[B, S]`` the place of each token in its row, however the row is padded."""
        if self.positions is not None:
            return self.positions
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Extend values of the tokens, ``[B, S]``, to those of all rows, ``[B, S + P]``: a query has its token's."""
        return torch.cat([values, values.gather(1, self.target_columns)], dim=1)


# Above every threshold.
_NEVER = 1 << 30


class TwoStreams(Protocol):
    """A stock model with its two streams."""

    supports_memory: bool

    def __call__(
        self,
        batch: PermutedBatch,
        slots: torch.Tensor,
        *,
        memory: RecurrentMemory | None = None,
        num_kept: int = 0,
        checkpoint: Callable[..., torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict targets.

        Args:
            batch: Tokens and their order.
            slots: ``[T]`` flat indices ``row * P + target`` of the targets to predict.
            memory: Content of the segments before, seen by every row.
            num_kept: How many of the first positions the memory is to keep.
            checkpoint: Calls a function with arguments so that its activations are recomputed in the backward pass.

        Returns:
            ``[T, V]`` logits and, with a memory, ``[N, B, num_kept, D]`` what each layer has read there.
        """
        ...
