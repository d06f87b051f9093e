"""Spans of a text that are hidden, and the sentinels that stand in their place.

`sentinel_ids` finds them in a tokenizer. `span_mask` lays spans at random, `rotate_mask` rotates them, and `hide_spans` makes the
pairs of input and target.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_pretrain.corruption.selection import Selection, order_keys, sorted_positions
from hf_pretrain.corruption.texts import NoisedTexts, Texts, lay_out
from hf_pretrain.errors import InputError

SENTINEL_NAMES = ("<extra_id_{}>", "▁<extra_id_{}>")
"""What T5's and mT5's tokenizers call their sentinels, by number."""

_HALF = np.uint64(32)


def sentinel_ids(tokenizer: Any) -> np.ndarray:
    """Return the ids of a tokenizer's sentinels in order, looked up by their names, as far as there is no gap: `[S]` int64.

    Their ids follow no rule: published T5 tokenizers count down, those that transformers 5 trains too but from id 102 on, and
    those that got them as added tokens count up.

    Args:
        tokenizer: Any tokenizer; `<extra_id_0>`, `<extra_id_1>` and so on are its sentinels.
    """
    known = tokenizer.get_vocab()
    form = next((form for form in SENTINEL_NAMES if form.format(0) in known), SENTINEL_NAMES[0])
    found: list[int] = []
    while (token := form.format(len(found))) in known:
        found.append(known[token])
    return np.array(found, dtype=np.int64)


def span_mask(texts: Texts, *, num_hidden: np.ndarray, num_spans: np.ndarray) -> np.ndarray:
    """Draw spans of which no two touch; all ways to lay them are alike, and the last one ends the text.

    The hidden tokens are cut into spans and the kept ones into as many runs, each in a uniformly random way. Runs and spans
    alternate, beginning with a run: the first token of a text is never hidden, the last one always is.

    Args:
        texts: The texts.
        num_hidden: `[P]` int64, hidden tokens of each text, fewer than its tokens unless it has only one.
        num_spans: `[P]` int64, spans of each text, at most as many as hidden or kept tokens.

    Returns:
        `[P, W]` bool, the hidden tokens.
    """
    num_rows, width = texts.valid.shape
    lengths = texts.lengths
    num_kept = lengths - num_hidden
    most_cuts = max(int(num_spans.max(initial=1)) - 1, 0)
    most_hidden = max(int(num_hidden.max(initial=1)), 1)
    # Column c stands for the place behind the hidden token c, or behind the kept token c - num_hidden. Behind the last of each is
    # no place for a cut.
    bits, columns = texts.bits("span_cuts"), np.arange(width)
    is_hidden_place = columns[:most_hidden] < (num_hidden - 1)[:, None]
    is_kept_place = (columns >= num_hidden[:, None]) & (columns < (lengths - 1)[:, None])
    hidden_cuts = _first_places(bits[:, :most_hidden], is_place=is_hidden_place, count=most_cuts) + 1
    kept_cuts = _first_places(bits, is_place=is_kept_place, count=most_cuts) + 1 - num_hidden[:, None]
    unused = np.arange(most_cuts) >= (num_spans - 1)[:, None]
    hidden_ends = _run_ends(np.where(unused, num_hidden[:, None], hidden_cuts), total=num_hidden)
    kept_ends = _run_ends(np.where(unused, num_kept[:, None], kept_cuts), total=num_kept)
    # Where a span ends, all spans up to it lie behind, and as many runs of kept tokens. Spans of no tokens fill the table up.
    ends = hidden_ends + kept_ends
    starts = ends - np.diff(hidden_ends, axis=1, prepend=0)
    steps = np.zeros((num_rows, width + 1), dtype=np.int8)
    np.put_along_axis(steps, starts, 1, axis=1)
    np.put_along_axis(steps, ends, -1, axis=1)
    return np.cumsum(steps[:, :width], axis=1, dtype=np.int8) > 0


def _first_places(bits: np.ndarray, *, is_place: np.ndarray, count: int) -> np.ndarray:
    """Return the columns of the first places of each row in a random order, `[P, count]` int64; other columns come last."""
    keys = order_keys(bits, candidates=is_place)
    # A row may need fewer than `count`: its first ones are in order, too.
    return sorted_positions(np.partition(keys, max(count - 1, 0), axis=1)[:, :count])


def _run_ends(cuts: np.ndarray, *, total: np.ndarray) -> np.ndarray:
    """Return where the runs between cuts end: `[P, C + 1]`, for `cuts` of `[P, C]` in any order, those not used at `total`."""
    return np.concatenate([np.sort(cuts, axis=1), total[:, None]], axis=1)


def rotate_mask(mask: np.ndarray, *, lengths: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Rotate the mask of each text by a uniform offset.

    Args:
        mask: `[P, W]` bool, False at padding.
        lengths: `[P]` int64, tokens of each text.
        bits: `[P]` uint64 random bits.

    Returns:
        `[P, W]` bool.
    """
    columns = np.arange(mask.shape[1])
    sources = columns - below(bits, lengths)[:, None]
    sources += lengths[:, None] * (sources < 0)
    return np.take_along_axis(mask, sources, axis=1) & (columns < lengths[:, None])


def below(bits: np.ndarray, limits: int | np.ndarray) -> np.ndarray:
    """Return integers uniform on `[0, limits)`, int64, drawn from the upper halves of the bits; 0 where the limit is 0."""
    return (((bits >> _HALF) * np.asarray(limits).astype(np.uint64)) >> _HALF).astype(np.int64)


def hide_spans(texts: Texts, *, mask: np.ndarray, sentinels: np.ndarray) -> NoisedTexts:
    """Put a sentinel in the place of each run of hidden tokens, and the hidden tokens into the target.

    Args:
        texts: The texts.
        mask: `[P, W]` bool, the hidden tokens, False at padding.
        sentinels: `[S]` int64, their ids in order; no text has more runs.

    Returns:
        The pairs, all of kind 0. A target is sentinel 0, the first run, sentinel 1, the second run, and so on. The sentinels
        are not hidden: the input shows them.
    """
    num_rows = len(mask)
    begins = Selection.merged(mask).unit_starts
    num_spans = np.count_nonzero(begins, axis=1)
    before = np.repeat(np.cumsum(num_spans) - num_spans, num_spans)
    marks = sentinels[np.arange(len(before)) - before]
    shown = texts.input_ids.copy()
    shown[begins] = marks
    stays = (texts.valid & ~mask) | begins
    input_ids, input_valid = take_where(shown, stays)
    # Each hidden token moves back by one for each sentinel in front of it.
    is_first = begins[mask]
    places = np.arange(len(is_first)) + np.cumsum(is_first)
    mark_places = places[is_first] - 1
    values = np.empty(len(places) + len(marks), dtype=np.int64)
    values[places], values[mark_places] = texts.input_ids[mask], marks
    hidden = np.ones(len(values), dtype=np.bool_)
    hidden[mark_places] = False
    rows = np.repeat(np.arange(num_rows), np.count_nonzero(mask, axis=1) + num_spans)
    targets, target_valid = lay_out(rows, values, num_rows=num_rows)
    is_hidden = np.zeros(targets.shape, dtype=np.bool_)
    is_hidden[target_valid] = hidden
    kinds = np.zeros(num_rows, dtype=np.int64)
    return NoisedTexts(input_ids, input_valid, targets, target_valid, is_hidden, kinds)


def take_where(values: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values `[P, W]` at which `where` is True, left-aligned, and where they are then, each `[P, V]`."""
    lengths = np.count_nonzero(where, axis=1)
    valid = np.arange(max(int(lengths.max(initial=0)), 1)) < lengths[:, None]
    laid = np.zeros(valid.shape, dtype=values.dtype)
    laid[valid] = values[where]
    return laid, valid


def check_sentinels(num_sentinels: int, needed: int, *, length: int, spans: str) -> None:
    """Refuse texts that need more sentinels than there are.

    Args:
        num_sentinels: Sentinels that there are.
        needed: Sentinels that a text needs.
        length: Tokens of that text.
        spans: How the spans are drawn, in the words of the options.

    Raises:
        InputError: Naming both numbers, the length, the options, and what to do.
    """
    if needed > num_sentinels:
        raise InputError(
            f"sentinels holds {num_sentinels} ids, but a text of {length} tokens needs {needed} with {spans}: "
            "use shorter texts, longer spans, or a tokenizer with more sentinel tokens"
        )
