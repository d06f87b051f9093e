"""Packing documents into blocks: only where to cut is computed, no token is copied.

`BlockDataset` reads a block, a range of token positions, from the Arrow buffers when its index is read. `block_bounds`
cuts greedily: a block ends at the last word, sentence or document start that its budget reaches. A window of tokens is
laid out as a line of bytes, with a byte for each separator too, and one search backwards from the end of the budget
finds each cut.

Where documents are isolated, the ranges are pieces, and a block is several of them: `isolated_rows` puts them together,
best-fit decreasing, a whole group of equal lengths at a time, and cuts further documents where rows would stay empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.errors import InputError, check_choice

# Rows are formed of pieces that lie no further apart than this, so that memory stays bounded and order local.
WINDOW_PIECES = 1 << 16


PackingMode = Literal["full_rows", "full_sentences", "doc_sentences", "tokens", "isolated_documents"]
# Of the rules below: a stream goes on by those that it began with.
VERSION = 2
_WINDOW_TOKENS = 1 << 22
# The part of a row, and the tokens of a piece, for which a document that fits into a row is cut.
_WORTH_A_CUT, _SHORTEST_PART = 1 / 16, 4


class _Rule(NamedTuple):
    """What a block begins with, and whether it goes on in the next document."""

    unit: Literal["word", "sentence", "token"]
    joins_documents: bool


_RULES: dict[PackingMode, _Rule] = {
    "full_rows": _Rule("word", joins_documents=True),
    "full_sentences": _Rule("sentence", joins_documents=True),
    "doc_sentences": _Rule("sentence", joins_documents=False),
    "tokens": _Rule("token", joins_documents=True),
    "isolated_documents": _Rule("word", joins_documents=False),
}
# Modes in which a separator stands between two documents of a block.
JOINING_MODES: tuple[PackingMode, ...] = tuple(mode for mode, rule in _RULES.items() if rule.joins_documents)


@dataclass(frozen=True)
class PackedRows:
    """Pieces put together in rows.

    Attributes:
        order: `int64 [num_pieces]`, the numbers of the pieces, row by row.
        bounds: `int64 [num_rows + 1]`; row `r` holds the pieces `order[bounds[r]:bounds[r + 1]]`, in ascending order.
    """

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.bounds) - 1

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up one value a piece over each row."""
        return np.add.reduceat(values[self.order], self.bounds[:-1])


def pack_rows(lengths: np.ndarray, *, capacity: int) -> PackedRows:
    """Put pieces into rows, each into the fullest row that still has room for it, the longest pieces first.

    Args:
        lengths: `int64 [num_pieces]`, tokens that each piece takes, from 1 to `capacity`.
        capacity: Tokens in a row.

    Returns:
        The rows, in the order of their first pieces. Memory beyond the result: that of 65 536 pieces.

    Source:
        Best-fit decreasing bin packing; for sequences that share a row without seeing each other: Krell et al.,
        "Efficient Sequence Packing without Cross-contamination" (2021).
    """
    assert len(lengths) and lengths.min() >= 1 and lengths.max() <= capacity, "every piece fits into a row"
    windows = range(0, len(lengths), WINDOW_PIECES)
    return _as_rows([_best_fit(lengths[low : low + WINDOW_PIECES], capacity) for low in windows])


def _as_rows(row_of_windows: Sequence[np.ndarray]) -> PackedRows:
    """Return the rows of windows that follow each other, given the row of each piece of each."""
    orders, counts, low = [], [], 0
    for row_of in row_of_windows:
        rows = _rows_by_first_piece(row_of)
        orders.append(np.argsort(rows, kind="stable") + low)
        counts.append(np.bincount(rows))
        low += len(row_of)
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return PackedRows(order=np.concatenate(orders), bounds=bounds)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each piece; rows are numbered as they are begun."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    groups = np.split(longest_first, np.flatnonzero(np.diff(lengths[longest_first])) + 1)
    open_rows: dict[int, np.ndarray] = {}  # room -> rows that have it
    num_rows = 0
    for pieces in groups:
        length = int(lengths[pieces[0]])
        # A row that this length has filled has less room than the length, so it is not among these.
        for room in [*sorted(room for room in open_rows if room >= length), capacity]:
            if not len(pieces):
                break
            per_row = room // length
            rows = open_rows.pop(room, None)
            if rows is None:
                rows = num_rows + np.arange(-(-len(pieces) // per_row))
                num_rows += len(rows)
            num_taken = min(len(pieces), len(rows) * per_row)
            num_full, rest = divmod(num_taken, per_row)
            row_of[pieces[:num_taken]] = np.repeat(rows, per_row)[:num_taken]
            pieces = pieces[num_taken:]
            _reopen(open_rows, room - per_row * length, rows[:num_full])
            _reopen(open_rows, room - rest * length, rows[num_full : num_full + (rest > 0)])
            _reopen(open_rows, room, rows[num_full + (rest > 0) :])
    return row_of


def _reopen(open_rows: dict[int, np.ndarray], room: int, rows: np.ndarray) -> None:
    if room and len(rows):
        open_rows[room] = np.concatenate([open_rows[room], rows]) if room in open_rows else rows


def _rows_by_first_piece(row_of: np.ndarray) -> np.ndarray:
    """Number the rows anew, in the order of the first piece that each holds."""
    _, first, number = np.unique(row_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number]


@dataclass(frozen=True)
class BlockTemplate:
    """The special tokens around a single sequence, and the separator of two documents inside one."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> BlockTemplate:
        """Read the template off a tokenizer: by its own method where it has one, else by encoding a short text.

        Args:
            tokenizer: Any transformers tokenizer, Rust-backed or Python.

        Returns:
            The template; empty around the sequence for a tokenizer that adds nothing. The separator is ``sep_token``,
            or ``eos_token`` where there is none.

        Raises:
            InputError: If the tokenizer adds special tokens, but around no text of its own vocabulary.
        """
        separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        expected = tokenizer.num_special_tokens_to_add(pair=False)
        if expected == 0:
            return cls((), (), separator)
        for ids, is_special in _probes(tokenizer):
            if 0 in is_special:
                first, last = is_special.index(0), len(is_special) - is_special[::-1].index(0)
                if first + len(ids) - last == expected:
                    return cls(tuple(ids[:first]), tuple(ids[last:]), separator)
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} adds {expected} special tokens, but none around any token of its "
            "vocabulary; give it a post-processor whose template holds the sequence"
        )

    @property
    def num_special_tokens(self) -> int:
        """Tokens around the sequence."""
        return len(self.prefix) + len(self.suffix)

    def budget(self, block_size: int) -> int:
        """Return how many tokens of text and separators fit into a block.

        Raises:
            InputError: If nothing fits.
        """
        return text_room(block_size, self.num_special_tokens)


def text_room(block_size: int, num_special: int, *, least: int = 1, what: str = "text") -> int:
    """Return how many tokens of a block are not special.

    Raises:
        InputError: If they are fewer than `least`; the message says `what` they are for.
    """
    if block_size < num_special + least:
        raise InputError(
            f"block_size={block_size} leaves no room for {what}: the tokenizer adds {num_special} special tokens; "
            f"use at least {num_special + least}, usually 128 or 512"
        )
    return block_size - num_special


def share_room(first: Any, second: Any, *, room: int) -> tuple[Any, Any]:
    """Return how much of two lengths is kept, so that both fit: the longer one is cut first, then both evenly.

    Args:
        first: A length, or an array of lengths.
        second: The same of the second text.
        room: Most tokens of both.
    """
    kept = np.minimum(first, np.maximum(room - second, room - room // 2))
    return kept, np.minimum(second, room - kept)


def interleaved(
    special: Sequence[Sequence[int]], texts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return texts with special tokens around them.

    Args:
        special: Ids before the first text, between two texts each, and behind the last.
        texts: Of each text its ids, and whether each begins a word: `[n]` both.

    Returns:
        `input_ids` int32 and `word_starts` bool of one length. A special token is a word of its own.
    """
    ids, words = [np.asarray(special[0])], [np.ones(len(special[0]), dtype=np.bool_)]
    for (text_ids, text_words), behind in zip(texts, special[1:], strict=True):
        ids += [text_ids, np.asarray(behind)]
        words += [text_words, np.ones(len(behind), dtype=np.bool_)]
    return {
        "input_ids": np.concatenate(ids, dtype=np.int32, casting="unsafe"),
        "word_starts": np.concatenate(words),
    }


def probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return texts by which to see what a tokenizer adds: a letter, and each token of the vocabulary that is not special."""
    special = set(tokenizer.all_special_tokens)
    return ["a", *(token for token in tokenizer.get_vocab() if token not in special)]


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int]]]:
    """Yield encodings of short texts as (ids, special-token mask), likely ones first."""
    if hasattr(tokenizer, "build_inputs_with_special_tokens"):
        ids = tokenizer.build_inputs_with_special_tokens([-1])
        yield ids, [int(token != -1) for token in ids]
    for text in probe_texts(tokenizer):
        encoding = tokenizer(text, return_special_tokens_mask=True)
        yield encoding["input_ids"], encoding["special_tokens_mask"]


def block_bounds(store: TokenStore, *, budget: int, mode: PackingMode = "full_rows") -> np.ndarray:
    """Cut the tokens of a store into blocks, greedily.

    Args:
        store: The documents' tokens.
        budget: Tokens in a block, separators between documents included.
        mode: ``"full_rows"``: as many whole words as fit, across documents, with room for one separator at each border;
            ``"full_sentences"``: the same with whole sentences; ``"doc_sentences"``: whole sentences, and a block ends
            with its document; ``"isolated_documents"``: the same with whole words; ``"tokens"``: every block is filled,
            words are cut anywhere. A sentence longer than the budget is cut where a word begins, and a word longer than
            the budget at the budget. The first part begins a block, and the rest is packed like a sentence or a word.

    Returns:
        ``int64 [num_blocks + 1]``: block ``i`` is the positions ``[bounds[i], bounds[i + 1])``. Separators are no
        positions: one that would begin or end a block is left out. Memory beyond the result: a few bytes for each of
        about four million tokens.

    Source:
        Liu et al., "RoBERTa" (2019), section 4.2, FULL-SENTENCES and DOC-SENTENCES.
    """
    size = max(_WINDOW_TOKENS, 2 * budget)
    parts, low = [np.zeros(1, np.int64)], 0
    while low < store.num_tokens:
        bounds, low = _Line(store, low, min(low + size, store.num_tokens), _RULES[mode]).cut(budget)
        parts.append(bounds)
    return np.concatenate(parts)


class _Line:
    """The tokens of a window, with a place for the separator before each document, and marks where a block may begin.

    Args:
        store: The documents' tokens.
        low: First position of the window, where a block begins.
        high: Position behind the last.
        rule: What a block begins with.
    """

    def __init__(self, store: TokenStore, low: int, high: int, rule: _Rule) -> None:
        self.store, self.low, self.high, self.rule = store, low, high, rule
        self.is_last = high == store.num_tokens
        first, last = store.begins.searchsorted([low + 1, high])
        self.borders = borders = store.begins[first:last] - low
        self.separators = borders + np.arange(len(borders)) if rule.joins_documents else borders[:0]
        # The end of the text ends a block too.
        self.closing = closing = b"\1" * self.is_last
        self.length = high - low + len(self.separators) + len(closing)
        self.starts = self.ends = b""
        if rule.unit == "token":
            return
        self.starts = self._marks(store.word_starts if rule.unit == "word" else store.sent_starts)
        if not rule.joins_documents:
            ends = np.zeros(high - low, dtype=np.bool_)
            ends[borders] = True
            self.ends = ends.tobytes() + closing

    def _marks(self, read: Callable[[int, int], np.ndarray]) -> bytes:
        """Return whether a unit begins at each place: with a document, and with a separator, one always does."""
        starts = read(self.low, self.high)
        starts[self.borders] = True
        if self.rule.joins_documents:
            starts = np.insert(starts, self.borders, True)
        return starts.tobytes() + self.closing

    def cut(self, budget: int) -> tuple[np.ndarray, int]:
        """Return where blocks end, and where the next window begins; in a window that is not the last, up to its last block."""
        # From the last of these, all starts that a block can reach are known.
        last = self.length - 1 - (1 if self.is_last else budget)
        ends, at = (self._anywhere if self.rule.unit == "token" else self._at_starts)(budget, last)
        return self._positions(np.array(ends, dtype=np.int64)), int(self._positions(np.array([at]))[0])

    def _anywhere(self, budget: int, last: int) -> tuple[list[int], int]:
        """Return where blocks end that have no room left, and where the next begins."""
        separators, ends, at = set(self.separators.tolist()), [], 0
        while at <= last:
            at += budget
            ends.append(at)
            if at in separators:
                at += 1
        if self.is_last:
            ends[-1] = self.length - 1
        return ends, at

    def _at_starts(self, budget: int, last: int) -> tuple[list[int], int]:
        """Return where blocks end that end with a unit, or with a document, and where the next begins."""
        separators, is_joined = set(self.separators.tolist()), self.rule.joins_documents
        first_in, last_in = self.ends.find, self.starts.rfind
        ends, at = [], 0
        while at <= last:
            behind = at + budget + 1
            if is_joined or (end := first_in(1, at + 1, behind)) < 0:
                end = last_in(1, at + 1, behind)
                if end < 0:
                    # A unit that is longer than the budget: whole words of a sentence, if there are any.
                    end = self._words.rfind(1, at + 1, behind) if self.rule.unit == "sentence" else end
                    end = at + budget if end < 0 else end
            ends.append(end)
            at = end + (end in separators)
        return ends, at

    @cached_property
    def _words(self) -> bytes:
        """Where words begin."""
        return self._marks(self.store.word_starts)

    def _positions(self, places: np.ndarray) -> np.ndarray:
        """Return the positions in the store of places in the line; that of a separator is the one of the token behind it."""
        return places - self.separators.searchsorted(places) + self.low


def pack_documents(
    store: TokenStore, *, block_size: int, num_special: int, mode: PackingMode = "full_rows"
) -> tuple[np.ndarray, PackedRows | None]:
    """Cut the tokens of a store into the pieces of blocks, and put isolated pieces together.

    Args:
        store: The documents' tokens.
        block_size: Most tokens in a block.
        num_special: Special tokens around each piece.
        mode: How to cut, see [`block_bounds`].

    Returns:
        The bounds of the pieces, ``int64 [num_pieces + 1]``; and with ``"isolated_documents"`` which of them a block
        holds, else None: each is a block.
    """
    bounds = block_bounds(store, budget=block_size - num_special, mode=mode)
    if mode != "isolated_documents":
        return bounds, None
    return isolated_rows(store, bounds, block_size=block_size, num_special=num_special)


def isolated_rows(
    store: TokenStore, bounds: np.ndarray, *, block_size: int, num_special: int
) -> tuple[np.ndarray, PackedRows]:
    """Put pieces into rows, best-fit decreasing, and cut more of them where rows stay empty.

    Documents whose lengths do not add up, such as abstracts a little longer than half a row, leave much of every row
    empty. Then the emptiest rows are given up, and their pieces fill the others, cut where a word begins.

    Args:
        store: The documents' tokens.
        bounds: ``int64 [num_pieces + 1]``, of pieces that fit into a row.
        block_size: Tokens in a row.
        num_special: Special tokens around each piece.

    Returns:
        The bounds with those of the cuts, and the rows.

    Source:
        Ding et al., "Fewer Truncations Improve Language Modeling" (2024): only documents longer than a row are cut, and
        the rest is packed by best-fit decreasing. The further cuts are ours.
    """
    inner, row_of_windows = [], []
    for low in range(0, len(bounds) - 1, WINDOW_PIECES):
        window = bounds[low : low + WINDOW_PIECES + 1]
        row_of = _best_fit(np.diff(window) + num_special, block_size)
        starts, row_of = _fill_rows(store, window, row_of, block_size=block_size, num_special=num_special)
        inner.append(starts)
        row_of_windows.append(row_of)
    return np.concatenate([*inner, bounds[-1:]]), _as_rows(row_of_windows)


def _fill_rows(
    store: TokenStore, bounds: np.ndarray, row_of: np.ndarray, *, block_size: int, num_special: int
) -> tuple[np.ndarray, np.ndarray]:
    """Give up the emptiest rows, and fill the others with their pieces; return the starts of all pieces and their rows."""
    starts, stops = bounds[:-1], bounds[1:]
    rooms = block_size - np.bincount(row_of, weights=stops - starts + num_special).astype(np.int64)
    least = max(int(block_size * _WORTH_A_CUT), num_special + _SHORTEST_PART)
    if np.count_nonzero(rooms > least) < 2:
        return starts, row_of
    by_room = np.argsort(rooms, kind="stable")
    rest = by_room[rooms[by_room] > least].tolist()
    order, ends = np.argsort(row_of, kind="stable"), np.cumsum(np.bincount(row_of))
    row_of, cuts = row_of.copy(), []
    # The row that is given up, those of its pieces that are left, and where the first of these goes on.
    pieces: list[int] = []
    taken, start = -1, 0
    for number, row in enumerate(rest):
        room = int(rooms[row])
        while room > least:
            if not pieces:
                if number >= len(rest) - 1:
                    break
                taken = rest.pop()
                pieces = order[ends[taken - 1] if taken else 0 : ends[taken]].tolist()
                start = int(starts[pieces[0]])
            stop = int(stops[pieces[0]])
            end = (
                stop
                if stop - start + num_special <= room
                else store.last_word_start(start, start + room - num_special)
            )
            if end == start:
                break
            if start == starts[pieces[0]]:
                row_of[pieces[0]] = row
            else:
                cuts.append((start, row))
            room -= end - start + num_special
            start = end
            if end == stop:
                pieces.pop(0)
                start = int(starts[pieces[0]]) if pieces else 0
    if pieces and start > starts[pieces[0]]:
        cuts.append((start, taken))
    added, added_rows = np.array(cuts, dtype=np.int64).reshape(-1, 2).T
    starts, row_of = np.concatenate([starts, added]), np.concatenate([row_of, added_rows])
    order = np.argsort(starts)
    return starts[order], row_of[order]


class BlockDataset(Dataset[dict[str, np.ndarray]]):
    """Blocks as views of a dataset of documents: the input of masked-token objectives.

    Args:
        documents: Documents in the document schema (``input_ids``, ``word_starts``, ``sent_starts``).
        tokenizer: Tokenizer that made them; gives the special tokens around a block and the separator between
            documents.
        block_size: Most tokens in a block, special tokens included.
        mode: How to cut, see :func:`block_bounds`. With ``"isolated_documents"`` the cuts give pieces: each has its
            own special tokens, and a block is the pieces that :func:`hf_pretrain.data.examples.packing.isolated_rows`
            puts together. The entry ``document_ids`` of a block tells them apart, so that no piece need see another.
        with_sentences: Whether a block has the entry ``sent_starts`` too.

    Raises:
        InputError: If the documents are empty or not of the schema, ``block_size`` leaves no room for text, ``mode``
            is unknown, or documents are to share blocks and the tokenizer has no separator.
    """

    def __init__(
        self,
        documents: datasets.Dataset,
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 128,
        mode: PackingMode = "full_rows",
        with_sentences: bool = False,
    ) -> None:
        check_choice(mode, get_args(PackingMode), name="mode")
        self.with_sentences = with_sentences
        self.template = BlockTemplate.of(tokenizer)
        self.store = TokenStore(documents)
        self.block_size = block_size
        self.mode = mode
        self.template.budget(block_size)
        if self.store.num_tokens == 0:
            raise InputError(f"documents hold no token in {len(documents)} rows; check the text they were made from")
        if mode in JOINING_MODES and self.store.num_documents > 1 and self.template.separator is None:
            raise InputError(
                f"mode={mode!r} puts several documents into a block, but the tokenizer has no sep_token and no "
                "eos_token to put between them; add one or use mode='doc_sentences'"
            )
        # Views of these cost less than an array a block.
        self._flags = np.zeros(block_size, dtype=np.bool_), np.ones(block_size, dtype=np.bool_)
        for flags in self._flags:
            flags.flags.writeable = False
        self._bounds, self._rows = pack_documents(
            self.store, block_size=block_size, num_special=self.template.num_special_tokens, mode=mode
        )

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._bounds) - 1 if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return one block.

        Returns:
            ``input_ids`` ``int32 [n]`` with special tokens and separators, a read-only view of the documents where
            the block needs neither; ``word_starts`` ``bool [n]``, True at each of them; ``sent_starts`` ``bool [n]`` if they
            are wanted, False at each of them; and ``goes_on`` ``bool [n]``, True throughout if the document at the block's
            end goes on in another block, so that the text does not end there. Where documents are isolated, ``goes_on`` is
            True in the pieces whose document goes on in another piece, and there is ``document_ids`` ``int32 [n]``: 0 in the
            first piece of the block, 1 in the second, and so on.

        Raises:
            IndexError: If there is no such block.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Return several blocks."""
        numbers = np.asarray(indices, dtype=np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"block {numbers.min()} or {numbers.max()} is out of range for {len(self)} blocks")
        if self._rows is None:
            blocks = self._read_many(numbers)
            for block, goes_on in zip(blocks, self._goes_on(numbers), strict=True):
                block["goes_on"] = self._flags[goes_on][: len(block["input_ids"])]
            return blocks
        order, bounds = self._rows.order, self._rows.bounds
        members = [order[bounds[number] : bounds[number + 1]] for number in numbers.tolist()]
        read = np.concatenate([numbers[:0], *members])
        pieces = iter(zip(self._read_many(read), self._goes_on(read), strict=True))
        return [_join([next(pieces) for _ in group]) for group in members]

    def _goes_on(self, numbers: np.ndarray) -> list[bool]:
        """Return whether the document at the end of the stretch between each of the given bounds and the next goes on."""
        ends = self._bounds[numbers + 1]
        goes_on: list[bool] = (self.store.begins[self.store.begins.searchsorted(ends)] != ends).tolist()
        return goes_on

    def _read_many(self, numbers: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Return the tokens between each of the given bounds and the next."""
        starts, stops = self._bounds[numbers], self._bounds[numbers + 1]
        firsts, lasts = self.store.document_of(starts), self.store.document_of(stops - 1)
        return [
            self._read(*span)
            for span in zip(starts.tolist(), stops.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
        ]

    def _read(self, start: int, stop: int, first_document: int, last_document: int) -> dict[str, np.ndarray]:
        ids, words = self.store.read(start, stop)
        columns = {"input_ids": ids, "word_starts": words}
        if self.with_sentences:
            columns["sent_starts"] = self.store.sent_starts(start, stop)
        prefix, suffix = self.template.prefix, self.template.suffix
        num_separators = last_document - first_document
        if not (prefix or suffix or num_separators):
            return columns
        end = len(prefix) + len(ids) + num_separators
        input_ids = np.empty(end + len(suffix), dtype=np.int32)
        word_starts = np.ones(len(input_ids), dtype=np.bool_)
        input_ids[: len(prefix)] = prefix
        input_ids[end:] = suffix
        is_text: slice | np.ndarray = slice(len(prefix), end)
        if num_separators:
            assert self.template.separator is not None
            borders = self.store.begins[first_document + 1 : last_document + 1] - start
            at_border = len(prefix) + borders + np.arange(num_separators)
            input_ids[at_border] = self.template.separator
            is_text = np.zeros(len(input_ids), dtype=np.bool_)
            is_text[len(prefix) : end] = True
            is_text[at_border] = False
        input_ids[is_text] = ids
        word_starts[is_text] = words
        block = {"input_ids": input_ids, "word_starts": word_starts}
        if self.with_sentences:
            block["sent_starts"] = np.zeros(len(input_ids), dtype=np.bool_)
            block["sent_starts"][is_text] = columns["sent_starts"]
        return block

    @property
    def num_tokens(self) -> int:
        """Tokens of text in all blocks, without special tokens and separators."""
        return self.store.num_tokens

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each block, special tokens and separators included: ``int64 [num_blocks]``."""
        return self._lengths if self._rows is None else self._rows.sums(self._lengths)

    @property
    def _lengths(self) -> np.ndarray:
        """Tokens that the stretch between two bounds takes in a block, special tokens included."""
        starts, stops = self._bounds[:-1], self._bounds[1:]
        separators = self.store.document_of(stops - 1) - self.store.document_of(starts)
        return stops - starts + separators + self.template.num_special_tokens

    @property
    def fill(self) -> float:
        """Mean length of a block as a share of ``block_size``."""
        return int(self._lengths.sum()) / (len(self) * self.block_size)

    def __repr__(self) -> str:
        """Show the packing and how well it fills."""
        return (
            f"{type(self).__name__}({len(self)} blocks of at most {self.block_size} tokens, mode={self.mode!r}, "
            f"{self.num_tokens} tokens of {self.store.num_documents} documents, fill={self.fill:.3f})"
        )


def _join(given: Sequence[tuple[dict[str, np.ndarray], bool]]) -> dict[str, np.ndarray]:
    """Return one block of several pieces, each with whether its document goes on."""
    pieces, goes_on = zip(*given, strict=True)
    block = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    lengths = np.array([len(piece["input_ids"]) for piece in pieces])
    # No word goes on from one piece into the next, though a piece may begin inside a long sentence's word.
    block["word_starts"][np.cumsum(lengths) - lengths] = True
    block["document_ids"] = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    block["goes_on"] = np.repeat(np.array(goes_on), lengths)
    return block
