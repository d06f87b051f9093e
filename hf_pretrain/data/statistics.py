"""What a corpus is like: lengths of its documents in every unit, and how they pack; counted in one pass over the text."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, get_args

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.documents import UnknownCount, tokenize_texts
from hf_pretrain.data.length_histogram import LengthHistogram
from hf_pretrain.data.numbered_documents import NumberedDocument, excerpt, in_groups
from hf_pretrain.data.packing import BlockTemplate, PackingMode
from hf_pretrain.data.packing_statistics import PackingCounter
from hf_pretrain.data.sentences import sentence_starts
from hf_pretrain.data.words import Segmenter, encodable, word_starts

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
