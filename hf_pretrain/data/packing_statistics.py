"""What packing makes of documents, counted while they stream by: the numbers of `BlockDataset`, without the documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hf_pretrain.data.bin_packing import WINDOW_PIECES, pack_rows
from hf_pretrain.data.packing import BlockTemplate, PackingMode, block_bounds
from hf_pretrain.data.token_store import TokenStore


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
