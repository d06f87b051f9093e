"""Runs of tokens read straight from the Arrow buffers of a dataset of documents, without copying the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from hf_pretrain.errors import InputError

_COLUMNS = ("input_ids", "word_starts", "sent_starts")


class _Chunk(NamedTuple):
    """One Arrow record batch: the flat tokens of its rows, and the two flags of each token."""

    input_ids: np.ndarray
    word_starts: pa.BooleanArray
    sent_starts: pa.BooleanArray


class TokenStore:
    """All tokens of a dataset of documents as one sequence of positions ``0..num_tokens-1``, read in ranges.

    Positions follow the order of the rows, through an indices mapping (``select``, ``shuffle``, ``train_test_split``)
    where there is one. Nothing is copied at construction; a range that is contiguous in Arrow memory is returned as a
    view. Memory: 8 bytes a document, and 20 bytes a physically contiguous run of documents (one a record batch; with
    an indices mapping up to one a document).

    Args:
        documents: Dataset with the columns ``input_ids``, ``word_starts`` and ``sent_starts``, one row a document.

    Raises:
        InputError: If a column is missing, of another type, holds nulls, or if the three differ in length in any row.
    """

    def __init__(self, documents: datasets.Dataset) -> None:
        self._documents = documents
        table = _checked_table(documents)
        offsets, chunk_of_row, lengths = self._read_chunks(table)
        # The only way to the indices mapping without flatten_indices(), which would copy the corpus.
        if (mapping := documents._indices) is not None:
            order = mapping.column(0).to_numpy()
            offsets, chunk_of_row, lengths = offsets[order], chunk_of_row[order], lengths[order]
        filled = lengths > 0
        offsets, chunk_of_row, lengths = offsets[filled], chunk_of_row[filled], lengths[filled]
        self.begins = np.concatenate([[0], np.cumsum(lengths)])
        """First position of each non-empty document and, at the end, ``num_tokens``: ``int64 [num_documents + 1]``."""
        is_run = np.ones(len(lengths), dtype=np.bool_)
        is_run[1:] = (chunk_of_row[1:] != chunk_of_row[:-1]) | (offsets[1:] != offsets[:-1] + lengths[:-1])
        self._run_begins = np.append(self.begins[:-1][is_run], self.begins[-1])
        self._run_chunks = chunk_of_row[is_run]
        self._run_offsets = offsets[is_run]

    def _read_chunks(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Open every record batch; return token offset (in its chunk), chunk number and length of each row."""
        self._chunks: list[_Chunk] = []
        offsets, numbers, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for batch in table.to_batches():  # cuts columns that are chunked differently at common rows
            ids, words, sents = (batch.column(name).flatten() for name in _COLUMNS)
            if ids.null_count or words.null_count or sents.null_count:
                raise InputError("documents hold null tokens or null flags; prepare them again")
            own, *others = (batch.column(name).value_lengths().to_numpy().astype(np.int64) for name in _COLUMNS)
            for name, other in zip(_COLUMNS[1:], others, strict=True):
                if not np.array_equal(own, other):
                    raise InputError(f"documents: {name} and input_ids differ in length in a row; prepare them again")
            offsets.append(np.cumsum(own) - own)
            numbers.append(np.full(len(batch), len(self._chunks), dtype=np.int32))
            lengths.append(own)
            self._chunks.append(_Chunk(ids.to_numpy(zero_copy_only=True), words, sents))
        return np.concatenate(offsets), np.concatenate(numbers), np.concatenate(lengths)

    @property
    def documents(self) -> datasets.Dataset:
        """The dataset that the tokens are of."""
        return self._documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.begins[-1])

    @property
    def num_documents(self) -> int:
        """Documents that have at least one token."""
        return len(self.begins) - 1

    def document_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the number of the non-empty document that holds each position."""
        return np.searchsorted(self.begins, positions, side="right") - 1

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of positions ``[start, stop)`` and whether each begins a word.

        Args:
            start: First position.
            stop: Position after the last, greater than ``start``.

        Returns:
            ``int32 [stop - start]``, a read-only view where the tokens are contiguous in memory, and ``bool`` of the
            same shape, always fresh.
        """
        parts = [
            (chunk.input_ids[low:high], _flags(chunk.word_starts, low, high))
            for chunk, low, high in self._ranges(start, stop)
        ]
        ids, words = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return ids.astype(np.int32, copy=False), words

    def sent_starts(self, start: int, stop: int) -> np.ndarray:
        """Return for positions ``[start, stop)`` whether each begins a sentence, as a fresh ``bool`` array."""
        return self._starts("sent_starts", start, stop)

    def word_starts(self, start: int, stop: int) -> np.ndarray:
        """Return for positions ``[start, stop)`` whether each begins a word, as a fresh ``bool`` array."""
        return self._starts("word_starts", start, stop)

    def _starts(self, name: str, start: int, stop: int) -> np.ndarray:
        parts = [_flags(getattr(chunk, name), low, high) for chunk, low, high in self._ranges(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def last_word_start(self, start: int, stop: int) -> int:
        """Return the last position in ``(start, stop]`` that begins a word; ``start`` if there is none."""
        high = min(stop + 1, self.num_tokens)
        return start + max(self.word_starts(start, high).tobytes().rfind(1, 1), 0)

    def sentence_starts(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in ``[start, stop)`` that begin a sentence; the first token of a document always does."""
        flags = self.sent_starts(start, stop)
        first, last = np.searchsorted(self.begins, [start, stop])
        flags[self.begins[first:last] - start] = True
        return np.flatnonzero(flags) + start

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[_Chunk, int, int]]:
        run = self._run_begins.searchsorted(start, side="right") - 1
        while start < stop:
            low = int(self._run_offsets[run]) + start - int(self._run_begins[run])
            length = min(stop, int(self._run_begins[run + 1])) - start
            yield self._chunks[self._run_chunks[run]], low, low + length
            start, run = start + length, run + 1

    def __getstate__(self) -> dict[str, datasets.Dataset]:
        """Pickle the dataset only (a memory-mapped one goes by path): buffers are opened again where it arrives."""
        return {"documents": self._documents}

    def __setstate__(self, state: dict[str, datasets.Dataset]) -> None:
        """Open the buffers again."""
        self.__init__(state["documents"])  # type: ignore[misc]


def _checked_table(documents: datasets.Dataset) -> pa.Table:
    if not isinstance(documents, datasets.Dataset):
        raise InputError(f"documents={type(documents).__name__} must be a datasets.Dataset, one row a document")
    missing = [name for name in _COLUMNS if name not in documents.column_names]
    if missing:
        raise InputError(
            f"documents lack the column {missing[0]!r}: they have {documents.column_names}; prepare them again"
        )
    table = documents.data.table.select(list(_COLUMNS))
    for name in _COLUMNS:
        kind = table.schema.field(name).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        is_item = pa.types.is_integer if name == "input_ids" else pa.types.is_boolean
        if not (is_list and is_item(kind.value_type)):
            raise InputError(f"documents: column {name!r} is {kind}, not of the document schema; prepare them again")
        if table.column(name).null_count:
            raise InputError(f"documents: column {name!r} has empty (null) rows; drop them with documents.filter")
    return table


def _flags(values: pa.BooleanArray, start: int, stop: int) -> np.ndarray:
    return values[start:stop].to_numpy(zero_copy_only=False)
