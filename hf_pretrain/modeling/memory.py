"""The memory of a recurrent model: what its layers read in the segments before."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RecurrentMemory(NamedTuple):
    """Every layer's newest inputs, as keys and values for the next segment; always detached.

    A memory starts empty and grows from its end: slots that hold nothing yet must never be attended, so a result does not
    depend on how much room the memory has left. It has the same shape at every step.

    Attributes:
        states: ``[N, B, M, D]`` the inputs of N layers; the newest token is at the end of M.
        lengths: ``[B]`` int64, number of filled slots of each lane: the last ``lengths[b]`` of M.
    """

    states: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def empty(
        cls,
        num_layers: int,
        batch: int,
        size: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RecurrentMemory:
        """Return a memory of `size` slots for each of `batch` lanes with nothing in it."""
        states = torch.zeros(num_layers, batch, size, width, dtype=dtype, device=device)
        return cls(states, torch.zeros(batch, dtype=torch.long, device=device))

    @property
    def size(self) -> int:
        """M, the number of slots of a lane."""
        return self.states.shape[2]

    def mask(self) -> torch.Tensor:
        """Return ``[B, M]`` bool, true at the filled slots."""
        slots = torch.arange(self.size, device=self.lengths.device)
        return slots >= self.size - self.lengths[:, None]

    def reset(self, lanes: torch.Tensor) -> RecurrentMemory:
        """Return the memory with some lanes emptied.

        Args:
            lanes: ``[B]`` bool, true for the lanes to empty.
        """
        # Written over, not just masked: what a document left behind is gone, infinities included.
        states = self.states.masked_fill(lanes[None, :, None, None], 0.0)
        return RecurrentMemory(states, self.lengths.masked_fill(lanes, 0))

    def append(self, new: torch.Tensor) -> RecurrentMemory:
        """Return the memory after another segment: the last M of what was there and what is new, without gradient.

        Args:
            new: ``[N, B, S, D]`` the inputs of the layers for S tokens.
        """
        size = self.size
        states = torch.cat([self.states, new.detach().to(self.states.dtype)], dim=2)
        lengths = (self.lengths + new.shape[2]).clamp(max=size)
        return RecurrentMemory(states[:, :, states.shape[2] - size :].contiguous(), lengths)
