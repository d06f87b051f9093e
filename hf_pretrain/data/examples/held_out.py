"""The part of a held-out set that an evaluation measures: spread over the whole set, and always the same examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_pretrain.data import draws
from hf_pretrain.data.examples.epochs import DrawnDataset, EpochDataset

LEAST_TOKENS = 16_384
"""Tokens that an evaluation measures at least, if there are as many: fewer would leave its numbers to chance."""

EVALUATED_SHARE = 0.025
"""Tokens that an evaluation measures, as a share of those that a run trains on. Without gradients they take about a third of the
time, so that the evaluations before and after a run take less than a twentieth of it."""

_SAMPLED = 64


class HeldOutPart(DrawnDataset):
    """Some examples of a dataset. Each keeps its `example_id`, and so its masks, whatever else is chosen.

    Args:
        dataset: All examples; lanes of text stay lanes.
        rows: Ascending row of each example: ``int64 [N]``.
    """

    def __init__(self, dataset: Any, rows: np.ndarray) -> None:
        super().__init__()
        self.whole = EpochDataset.wrap(dataset)
        self.rows = rows
        if (num_lanes := getattr(self.whole.base, "num_lanes", None)) is not None:
            self.num_lanes = num_lanes

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of an index, which may carry its epoch and its index in the order."""
        return self.whole[self._index(index)]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch of indices, read in one call."""
        return self.whole.__getitems__([self._index(index) for index in indices])

    def __repr__(self) -> str:
        """Show how many examples of what they are."""
        return f"{type(self).__name__}({len(self)} of {self.whole!r})"

    def _index(self, index: int) -> int:
        row = self._locate(index)["example_id"]
        return index - row + int(self.rows[row])


def evaluated_tokens(trained_tokens: float | None, *, max_minutes: float | None = None) -> int | None:
    """Return how many held-out tokens an evaluation measures where no option says it.

    Args:
        trained_tokens: Tokens that the run trains on, at most; None if that is not known.
        max_minutes: Minutes that the run has, if it is cut off: then the tokens are for a machine that trains on 10,900 a second.

    Returns:
        The number; None for all.
    """
    bounds = [] if trained_tokens is None else [math.ceil(EVALUATED_SHARE * trained_tokens)]
    bounds += [] if max_minutes is None else [math.ceil(LEAST_TOKENS * max_minutes)]
    return max(LEAST_TOKENS, min(bounds)) if bounds else None


def held_out_part(dataset: Any, num_tokens: int | None) -> Any:
    """Return as many examples of a dataset as hold so many tokens, at least one; the dataset itself if it has no more.

    Of each of N stretches of the dataset, about alike in length, one example is drawn. The draw depends on nothing but N and the
    length, so that runs with other seeds measure the same text. Lanes are read in the order of time: each gives its beginning.

    Args:
        dataset: Held-out examples, map-style.
        num_tokens: Tokens to measure, special tokens included; None for all.
    """
    if num_tokens is None or not len(dataset):
        return dataset
    whole, total = EpochDataset.wrap(dataset), len(dataset)
    # Examples that belong together: the windows of one time, or a group of one kind.
    unit: int = getattr(whole.base, "num_lanes", getattr(whole, "group_size", 1))
    units, wanted = total // unit, num_tokens / mean_tokens(whole)
    chosen = max(1, math.ceil(wanted / unit))
    if chosen >= units:
        return dataset
    firsts = np.arange(chosen) if hasattr(whole.base, "num_lanes") else spread(units, chosen)
    return HeldOutPart(whole, (firsts[:, None] * unit + np.arange(unit)).ravel())


def spread(total: int, count: int) -> np.ndarray:
    """Return ascending numbers below `total`, a drawn one of each of `count` stretches alike in length: ``int64 [count]``."""
    bounds = np.arange(count + 1, dtype=np.int64) * total // count
    keys = draws.row_keys(np.arange(count), seed=0, stream="held-out part")
    return bounds[:-1] + (draws.uniforms(keys, 1)[:, 0] * np.diff(bounds)).astype(np.int64)


def mean_tokens(dataset: Any) -> float:
    """Return how many tokens an example has on average, special tokens included, by some that are spread over the dataset."""
    rows = spread(len(dataset), min(len(dataset), _SAMPLED)).tolist()
    return max(1.0, sum(_num_tokens(dataset[row]) for row in rows) / len(rows))


def _num_tokens(example: Any) -> int:
    """Return the tokens of an example; one of several texts has lists and mappings of them."""
    if isinstance(example, Mapping):
        if "input_ids" in example:
            return len(example["input_ids"])
        return sum(map(_num_tokens, example.values()))
    return sum(map(_num_tokens, example)) if isinstance(example, list | tuple) else 0
