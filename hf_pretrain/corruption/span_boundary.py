"""What is predicted of a hidden span from the two tokens around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_pretrain.corruption.rows import ExampleRows
from hf_pretrain.corruption.selection import Selection


@dataclass(frozen=True)
class SpanBoundaryTargets:
    """Hidden tokens that are predicted from the boundaries of their span.

    Attributes:
        rows: `[S]` int64, the example that a token is in.
        left: `[S]` int64, column of the last token before its span.
        right: `[S]` int64, column of the first token after it.
        offsets: `[S]` int64, place of the token in the span, from 0.
        labels: `[S]` int64, the original token.
    """

    rows: np.ndarray
    left: np.ndarray
    right: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray


def span_boundary_targets(
    rows: ExampleRows, *, mask: np.ndarray, ordinary: np.ndarray, span_positions: int
) -> SpanBoundaryTargets:
    """Return what the boundaries of the hidden spans of a batch are asked for.

    Spans that touch are one. A span beside a special token or padding, at the start or the end of a row, or with a neighbour in
    another isolated document has no two boundaries, and is left out. Tokens of a span beyond the last place are left out too.

    Args:
        rows: The examples, before anything was hidden.
        mask: `[B, L]` bool, the hidden tokens.
        ordinary: `[B, L]` bool, the tokens that are neither special nor padding.
        span_positions: Places in a span that there are.

    Returns:
        The targets in reading order.

    Source:
        SpanBERT (Joshi et al. 2020, section 3.2).
    """
    row, start, end = Selection.merged(mask).spans().T
    last = mask.shape[1] - 1
    inside = (start > 0) & (end <= last)
    left, right = np.maximum(start - 1, 0), np.minimum(end, last)
    inside &= ordinary[row, left] & ordinary[row, right]
    if rows.document_ids is not None:
        inside &= rows.document_ids[row, left] == rows.document_ids[row, right]
    row, start, left, right = row[inside], start[inside], left[inside], right[inside]
    sizes = np.minimum(end[inside] - start, span_positions)
    begins = np.cumsum(sizes) - sizes
    offsets = np.arange(sizes.sum()) - np.repeat(begins, sizes)
    rows_of_tokens = np.repeat(row, sizes)
    return SpanBoundaryTargets(
        rows=rows_of_tokens,
        left=np.repeat(left, sizes),
        right=np.repeat(right, sizes),
        offsets=offsets,
        labels=rows.input_ids[rows_of_tokens, np.repeat(start, sizes) + offsets],
    )
