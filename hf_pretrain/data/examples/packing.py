"""Packing documents into blocks: only where to cut is computed, no token is copied.

`BlockDataset` reads a block, a range of token positions, from the Arrow buffers when its index is read. `block_bounds`
cuts greedily. With ``v`` the position of a sentence's first token plus the number of separators before it, and ``e``
the same for its end, the sentences ``a..b`` take ``e[b] - v[a]`` tokens of a block. ``e`` rises, so one
``searchsorted`` finds the longest block from every possible start, and following the chain from the first start gives
the greedy packing.

Where documents are isolated, the ranges are pieces, and a block is several of them: `pack_rows` puts them together,
best-fit decreasing, a whole group of equal lengths at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.errors import InputError, check_choice

# Rows are formed of pieces that lie no further apart than this, so that memory stays bounded and order local.
WINDOW_PIECES = 1 << 16


PackingMode = Literal["full_sentences", "doc_sentences", "tokens", "isolated_documents"]
_WINDOW_TOKENS = 1 << 22
_WINDOW_DOCUMENTS = 1 << 16


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
    orders, counts = [], []
    for low in range(0, len(lengths), WINDOW_PIECES):
        rows = _rows_by_first_piece(_best_fit(lengths[low : low + WINDOW_PIECES], capacity))
        orders.append(np.argsort(rows, kind="stable") + low)
        counts.append(np.bincount(rows))
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


def block_bounds(store: TokenStore, *, budget: int, mode: PackingMode = "full_sentences") -> np.ndarray:
    """Cut the tokens of a store into blocks, greedily.

    Args:
        store: The documents' tokens.
        budget: Tokens in a block, separators between documents included.
        mode: ``"full_sentences"``: as many whole sentences as fit, across documents, with room for one separator
            at each border; ``"doc_sentences"`` and ``"isolated_documents"``: the same, but a block ends with its
            document; ``"tokens"``: every block is filled, sentences are cut anywhere. A sentence longer than the
            budget is cut into parts of the budget's length, the first of which begins a block and the last of which is
            packed like a sentence.

    Returns:
        ``int64 [num_blocks + 1]``: block ``i`` is the positions ``[bounds[i], bounds[i + 1])``. Separators are no
        positions: one that would begin or end a block is left out. Memory beyond the result: the sentence starts of
        about four million tokens at a time, or with ``"tokens"`` 8 bytes a document.

    Source:
        Liu et al., "RoBERTa" (2019), section 4.2, FULL-SENTENCES and DOC-SENTENCES.
    """
    if mode == "tokens":
        cut = _cut_anywhere(store, budget)
    else:
        cut = _cut_at_sentences(store, budget, cross_documents=mode == "full_sentences")
    return np.concatenate([np.zeros(1, np.int64), *cut, np.array([store.num_tokens], np.int64)])


def _cut_at_sentences(store: TokenStore, budget: int, *, cross_documents: bool) -> Iterator[np.ndarray]:
    """Yield the inner bounds window by window; sentences of an unfinished block are carried to the next window."""
    carried = np.empty(0, np.int64)
    for low in range(0, store.num_tokens, _WINDOW_TOKENS):
        high = min(low + _WINDOW_TOKENS, store.num_tokens)
        # The last sentence of a window ends where the next window says, so it is carried; the last window closes it.
        closing = [store.num_tokens] if high == store.num_tokens else []
        starts = np.concatenate([carried, store.sentence_starts(low, high), np.array(closing, np.int64)])
        starts = _split_long(starts, budget)
        following = _longest_from_each(store, starts, budget, cross_documents)
        chain, at, num_closed = [], 0, len(starts) - 1
        while at < num_closed and (at := following.item(at)) < num_closed:
            chain.append(at)
        yield starts[chain]
        carried = starts[chain[-1] if chain else 0 :]


def _split_long(starts: np.ndarray, budget: int) -> np.ndarray:
    """Cut the sentences that are longer than the budget: add starts inside them."""
    long = np.flatnonzero(np.diff(starts) > budget)
    added = [np.arange(starts[k] + budget, starts[k + 1], budget) for k in long]
    return np.sort(np.concatenate([starts, *added])) if added else starts


def _longest_from_each(store: TokenStore, starts: np.ndarray, budget: int, cross_documents: bool) -> np.ndarray:
    """Return for each closed sentence, if a block began with it, the number of the sentence that begins the next."""
    document = store.document_of(starts[:-1])
    separators = document if cross_documents else 0
    following = np.searchsorted(starts[1:] + separators, starts[:-1] + separators + budget, side="right")
    if not cross_documents:
        following = np.minimum(following, np.searchsorted(document, document, side="right"))
    return following


def _cut_anywhere(store: TokenStore, budget: int) -> Iterator[np.ndarray]:
    """Yield the inner bounds of blocks without room left, a window of documents at a time.

    On the line of all tokens with one separator between documents, blocks are ``budget`` apart, except that a block
    does not begin with a separator: then it begins one token later.
    """
    separators = store.begins[1:-1] + np.arange(store.num_documents - 1)
    at = 0
    for low in range(0, len(separators) + 1, _WINDOW_DOCUMENTS):
        window = separators[low : low + _WINDOW_DOCUMENTS]
        is_last = low + _WINDOW_DOCUMENTS > len(separators)
        end = store.num_tokens + len(separators) if is_last else int(window[-1]) + 1
        positions, known = [], set(window.tolist())
        while at + budget < end:
            at += budget
            at += at in known
            positions.append(at)
        bounds = np.array(positions, dtype=np.int64)
        yield bounds - np.searchsorted(separators, bounds)


class BlockDataset(Dataset[dict[str, np.ndarray]]):
    """Blocks of whole sentences as views of a dataset of documents: the input of masked-token objectives.

    Args:
        documents: Documents in the document schema (``input_ids``, ``word_starts``, ``sent_starts``).
        tokenizer: Tokenizer that made them; gives the special tokens around a block and the separator between
            documents.
        block_size: Most tokens in a block, special tokens included.
        mode: How to cut, see :func:`block_bounds`. With ``"isolated_documents"`` the cuts give pieces: each has its
            own special tokens, and a block is the pieces that :func:`hf_pretrain.data.examples.packing.pack_rows` puts
            together. The entry ``document_ids`` of a block tells them apart, so that no piece need see another.
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
        mode: PackingMode = "full_sentences",
        with_sentences: bool = False,
    ) -> None:
        check_choice(mode, get_args(PackingMode), name="mode")
        self.with_sentences = with_sentences
        self.template = BlockTemplate.of(tokenizer)
        self.store = TokenStore(documents)
        self.block_size = block_size
        self.mode = mode
        budget = self.template.budget(block_size)
        if self.store.num_tokens == 0:
            raise InputError(f"documents hold no token in {len(documents)} rows; check the text they were made from")
        separates = mode in ("full_sentences", "tokens")
        if separates and self.store.num_documents > 1 and self.template.separator is None:
            raise InputError(
                f"mode={mode!r} puts several documents into a block, but the tokenizer has no sep_token and no "
                "eos_token to put between them; add one or use mode='doc_sentences'"
            )
        self._bounds = block_bounds(self.store, budget=budget, mode=mode)
        self._rows = pack_rows(self._lengths, capacity=block_size) if mode == "isolated_documents" else None

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._bounds) - 1 if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return one block.

        Returns:
            ``input_ids`` ``int32 [n]`` with special tokens and separators, a read-only view of the documents where
            the block needs neither; ``word_starts`` ``bool [n]``, True at each of them; ``sent_starts`` ``bool [n]`` if they
            are wanted, False at each of them. Where documents are isolated, also ``document_ids`` ``int32 [n]``: 0 in the
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
            return self._read_many(numbers)
        order, bounds = self._rows.order, self._rows.bounds
        members = [order[bounds[number] : bounds[number + 1]] for number in numbers.tolist()]
        pieces = iter(self._read_many(np.concatenate([numbers[:0], *members])))
        return [_join([next(pieces) for _ in group]) for group in members]

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
        return float(self.lengths.mean()) / self.block_size

    def __repr__(self) -> str:
        """Show the packing and how well it fills."""
        return (
            f"{type(self).__name__}({len(self)} blocks of at most {self.block_size} tokens, mode={self.mode!r}, "
            f"{self.num_tokens} tokens of {self.store.num_documents} documents, fill={self.fill:.3f})"
        )


def _join(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return one block of several pieces."""
    block = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    lengths = np.array([len(piece["input_ids"]) for piece in pieces])
    # No word goes on from one piece into the next, though a piece may begin inside a long sentence's word.
    block["word_starts"][np.cumsum(lengths) - lengths] = True
    block["document_ids"] = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    return block
