"""Lengths counted in memory that does not grow with their number.

What packing makes of documents, counted while they stream by: the numbers of `BlockDataset`, without the documents.

What a corpus is like: lengths of its documents in every unit, and how they pack; counted in one pass over the text.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, get_args

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.documents.documents import UnknownCount, sentence_starts, tokenize_texts
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.words import Segmenter, encodable, word_starts
from hf_pretrain.data.examples.packing import WINDOW_PIECES, BlockTemplate, PackingMode, block_bounds, pack_rows
from hf_pretrain.data.text.files import NumberedDocument, excerpt, in_groups

# Longer lengths lose what is beyond these bits; so there are at most a few ten thousand different ones.
_EXACT_BITS = 12
_QUANTILES = (5, 25, 50, 75, 95, 99)


class LengthHistogram:
    """Counts of lengths: exact below 4 096, and of at least 12 bits above, a relative error of less than 0.03 %.

    Number, sum, least and greatest are exact.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.num_lengths = 0
        self.total = 0
        self.least = 0
        self.greatest = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count lengths, non-negative integers of shape ``[n]``."""
        if not len(lengths):
            return
        self.least = min(int(lengths.min()), self.least) if self.num_lengths else int(lengths.min())
        self.greatest = max(int(lengths.max()), self.greatest)
        self.num_lengths += len(lengths)
        self.total += int(lengths.sum())
        shift = np.maximum(np.frexp(lengths)[1] - _EXACT_BITS, 0).astype(np.int64)
        # The middle of all the lengths that fall together.
        rounded = (lengths >> shift << shift) + (1 << shift >> 1)
        for length, count in zip(*np.unique_counts(rounded), strict=True):
            self._counts[int(length)] = self._counts.get(int(length), 0) + int(count)

    @property
    def mean(self) -> float:
        """Mean length; 0 of none."""
        return self.total / max(self.num_lengths, 1)

    def quantile(self, percent: float) -> int:
        """Return the least length that so many per cent of the lengths do not exceed; 0 of none."""
        lengths, counts = self._sorted()
        if not len(lengths):
            return 0
        rank = max(math.ceil(percent / 100 * self.num_lengths), 1)
        length = int(lengths[np.searchsorted(np.cumsum(counts), rank)])
        return min(max(length, self.least), self.greatest)

    def summary(self) -> dict[str, float]:
        """Return sum, mean, quantiles, least and greatest by name."""
        quantiles = {f"p{percent}": self.quantile(percent) for percent in _QUANTILES}
        return {"total": self.total, "mean": self.mean, "min": self.least, **quantiles, "max": self.greatest}

    def doublings(self) -> list[tuple[int, int, int]]:
        """Return how many lengths are 0, 1, 2 to 3, 4 to 7, and so on: first and last length and count of each range."""
        lengths, counts = self._sorted()
        ranges = np.frexp(lengths)[1]
        return [
            (1 << k >> 1, max((1 << k) - 1, 0), int(counts[ranges == k].sum()))
            for k in range(int(ranges.min(initial=64)), int(ranges.max(initial=0)) + 1)
        ]

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array(sorted(self._counts), dtype=np.int64)
        return lengths, np.array([self._counts[length] for length in lengths.tolist()], dtype=np.int64)


@dataclass
class PackingCounts:
    """Blocks, and what their places hold.

    Attributes:
        blocks: Number of blocks.
        tokens: Tokens of text.
        separators: Separators between documents.
        special_tokens: Special tokens around what the tokenizer takes for one sequence.
        sentences_cut: Sentences that lie in more than one block.
    """

    blocks: int = 0
    tokens: int = 0
    separators: int = 0
    special_tokens: int = 0
    sentences_cut: int = 0


class PackingCounter:
    """Counts the blocks of one packing mode, exactly, with the last block's documents as its only memory.

    Args:
        template: What the tokenizer puts around a sequence.
        block_size: Most tokens in a block, special tokens included.
        mode: How to cut, as in `BlockDataset`.

    Raises:
        InputError: If `block_size` leaves no room for text.
    """

    def __init__(self, template: BlockTemplate, *, block_size: int, mode: PackingMode) -> None:
        self._template = template
        self._block_size = block_size
        self._budget = template.budget(block_size)
        self._mode: PackingMode = mode
        self._crosses_documents = mode in ("full_sentences", "tokens")
        self._lengths = np.empty(0, np.int64)
        self._sent_starts = np.empty(0, np.bool_)
        self._pieces = np.empty(0, np.int64)
        self._counts = PackingCounts()

    def add(self, lengths: np.ndarray, sent_starts: np.ndarray) -> None:
        """Count documents.

        Args:
            lengths: Tokens of each, ``int64 [num_documents]``.
            sent_starts: Whether each of all their tokens begins a sentence, ``bool [num_tokens]``.
        """
        self._lengths = np.concatenate([self._lengths, lengths[lengths > 0]])
        self._sent_starts = np.concatenate([self._sent_starts, sent_starts])
        self._cut(is_end=not self._crosses_documents)

    def finish(self) -> dict[str, Any]:
        """Count what is left and return the counts with the shares of the places that each of them takes.

        Returns:
            The fields of `PackingCounts`; ``fill``, the share of places that hold anything; and the shares of text,
            separators, special tokens and padding, which add up to 1.
        """
        self._cut(is_end=True)
        self._pack(len(self._pieces))
        counts = self._counts
        places = max(counts.blocks * self._block_size, 1)
        used = counts.tokens + counts.separators + counts.special_tokens
        return asdict(counts) | {
            "fill": used / places,
            "text_share": counts.tokens / places,
            "separator_share": counts.separators / places,
            "special_token_share": counts.special_tokens / places,
            "padding_share": 1 - used / places,
        }

    def _cut(self, *, is_end: bool) -> None:
        """Count the blocks of the documents at hand; the last one, which may go on, is kept unless this is the end."""
        if not len(self._sent_starts):
            return
        store = _token_store(self._lengths, self._sent_starts)
        bounds = block_bounds(store, budget=self._budget, mode=self._mode)
        sentences = store.sentence_starts(0, store.num_tokens)
        holders = np.searchsorted(sentences, bounds[1:-1], side="right") - 1
        self._counts.sentences_cut += len(np.unique(holders[sentences[holders] != bounds[1:-1]]))
        rest = store.num_tokens if is_end else int(bounds[-2])
        self._count(store, bounds if is_end else bounds[:-1])
        first = np.searchsorted(store.begins, rest, side="right") - 1
        ends = store.begins[first + 1 :]
        self._lengths = np.diff(np.concatenate([[rest], ends])) if len(ends) else self._lengths[:0]
        self._sent_starts = self._sent_starts[rest:]

    def _count(self, store: TokenStore, bounds: np.ndarray) -> None:
        starts, stops = bounds[:-1], bounds[1:]
        separators = store.document_of(stops - 1) - store.document_of(starts) if self._crosses_documents else 0
        num_special = self._template.num_special_tokens
        self._counts.tokens += int(bounds[-1])
        self._counts.separators += int(np.sum(separators))
        self._counts.special_tokens += num_special * len(starts)
        if self._mode == "isolated_documents":
            self._pieces = np.concatenate([self._pieces, stops - starts + num_special])
            self._pack(len(self._pieces) // WINDOW_PIECES * WINDOW_PIECES)
        else:
            self._counts.blocks += len(starts)

    def _pack(self, num_pieces: int) -> None:
        if num_pieces:
            self._counts.blocks += len(pack_rows(self._pieces[:num_pieces], capacity=self._block_size))
            self._pieces = self._pieces[num_pieces:]


def _token_store(lengths: np.ndarray, sent_starts: np.ndarray) -> TokenStore:
    """Return documents of such lengths and sentences; which tokens they have does not matter for packing."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    flags = pa.array(sent_starts)
    columns = {"input_ids": pa.array(np.zeros(len(sent_starts), np.int32)), "word_starts": flags, "sent_starts": flags}
    lists = {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}
    return TokenStore(datasets.Dataset(pa.table(lists)))


UNITS = ("bytes", "characters", "words", "sentences", "tokens")

_GROUP_CHARACTERS = 1 << 20
_NUM_LONGEST = 5


def corpus_statistics(
    documents: Iterable[NumberedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int = 128,
    word_segmenter: Segmenter | None = None,
) -> dict[str, Any]:
    """Count documents and what they hold, in memory that does not grow with their number.

    Args:
        documents: The documents.
        tokenizer: A fast tokenizer.
        block_size: Most tokens in a block, special tokens included.
        word_segmenter: Finds words in text without spaces, see `word_starts`.

    Returns:
        - ``documents``, and ``documents_without_tokens``;
        - ``lengths``: of the documents in each of `UNITS`, as `LengthHistogram.summary`;
        - ``histogram``: first and last length in tokens and number of documents, for lengths that double;
        - ``tokens_per_word``; ``unknown_share`` of the tokens, ``unknown_character_share`` of the visible characters;
          ``longer_than_block_share`` of the documents, those that
          do not fit into one block;
        - ``longest``: the documents with the most tokens;
        - ``packing``: by mode, what `PackingCounter` counts, with the same numbers as `BlockDataset`; None for a mode
          that needs a separator where the tokenizer has none.

    Raises:
        InputError: If the tokenizer gives no offsets, or ``block_size`` leaves no room for text.
    """
    counter = _Counter(tokenizer, block_size, word_segmenter)
    progress = tqdm(documents, desc="Counting", unit=" documents", delay=2, disable=None)
    for group in in_groups(progress, num_characters=_GROUP_CHARACTERS):
        counter.add(group)
    return counter.result()


class _Counter:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int, word_segmenter: Segmenter | None) -> None:
        template = BlockTemplate.of(tokenizer)
        self._tokenizer = tokenizer
        self._word_segmenter = word_segmenter
        self._unknown = UnknownCount()
        self._budget = template.budget(block_size)
        self._lengths = {unit: LengthHistogram() for unit in UNITS}
        self._packing: dict[str, PackingCounter | None] = {}
        for mode in get_args(PackingMode):
            has_separator = template.separator is not None or mode not in ("full_sentences", "tokens")
            counter = PackingCounter(template, block_size=block_size, mode=mode) if has_separator else None
            self._packing[mode] = counter
        self._num_documents = self._num_long = self._num_empty = 0
        # (tokens, minus its number, document): of equally long ones the first is the greater.
        self._longest: list[tuple[int, int, dict[str, Any]]] = []

    def add(self, documents: list[NumberedDocument]) -> None:
        texts = [encodable(document.text) for document in documents]
        segmenter = self._word_segmenter
        columns = tokenize_texts(texts, self._tokenizer, word_segmenter=segmenter, unknown=self._unknown)
        lengths = {
            "bytes": [len(text.encode()) for text in texts],
            "characters": [len(text) for text in texts],
            "words": [len(word_starts(text, segmenter=segmenter)) for text in texts],
            "sentences": [len(sentence_starts(text)) for text in texts],
            "tokens": [len(ids) for ids in columns["input_ids"]],
        }
        for unit, values in lengths.items():
            self._lengths[unit].add(np.array(values, dtype=np.int64))
        tokens = np.array(lengths["tokens"], dtype=np.int64)
        for counter in self._packing.values():
            if counter is not None:
                counter.add(tokens, np.concatenate(columns["sent_starts"]))
        self._num_long += int((tokens > self._budget).sum())
        self._num_empty += int((tokens == 0).sum())
        for document, length in zip(documents, lengths["tokens"], strict=True):
            self._note_length(document, length)

    def _note_length(self, document: NumberedDocument, length: int) -> None:
        self._num_documents += 1
        if len(self._longest) < _NUM_LONGEST or length > self._longest[0][0]:
            place = {"source": document.source, "number": document.number, "tokens": length}
            entry = (length, -self._num_documents, place | {"excerpt": excerpt(document.text)})
            (heapq.heappush if len(self._longest) < _NUM_LONGEST else heapq.heapreplace)(self._longest, entry)

    def result(self) -> dict[str, Any]:
        tokens = self._lengths["tokens"]
        return {
            "documents": self._num_documents,
            "documents_without_tokens": self._num_empty,
            "lengths": {unit: histogram.summary() for unit, histogram in self._lengths.items()},
            "histogram": tokens.doublings(),
            "tokens_per_word": tokens.total / max(self._lengths["words"].total, 1),
            "unknown_share": self._unknown.unknown_tokens / max(tokens.total, 1),
            "unknown_character_share": self._unknown.share,
            "longer_than_block_share": self._num_long / max(self._num_documents, 1),
            "longest": [place for _, _, place in sorted(self._longest, reverse=True)],
            "packing": {mode: counter and counter.finish() for mode, counter in self._packing.items()},
        }
