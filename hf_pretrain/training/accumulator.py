"""Running sums of named quantities, kept on the device between two log lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hf_pretrain.modeling.outputs import ExampleSum


class SumAccumulator:
    """Adds up sums and counts by name; nothing is copied to the host before [`SumAccumulator.means`]."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, sums: Mapping[str, ExampleSum]) -> None:
        """Add one micro-batch."""
        for name, value in sums.items():
            total = torch.stack([value.sum.detach().sum(), value.count.detach().sum()]).double()
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the mean of each quantity since the last call, over all ranks.

        Args:
            reduce: Sums a tensor over the ranks; called once, on every rank.
        """
        if not self._totals:
            return {}
        names = sorted(self._totals)
        sums, counts = reduce(torch.stack([self._totals[name] for name in names])).T.tolist()
        self._totals.clear()
        return {name: s / c for name, s, c in zip(names, sums, counts, strict=True) if c > 0}
