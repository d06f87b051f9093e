"""From documents to pairs of segments: where to cut, which parts stay together and which are exchanged, all by keyed draws.

A document is cut into chunks of whole sentences, a chunk is split in two, and its second part stays, is swapped with
the first, or is replaced by text of another document. Replaced text is put back and begins the next chunk. So where a
chunk begins depends on the chunk before it. But keyed draws alone decide about a chunk that begins with a given
sentence. So all sentences are drawn at once, and following the chain from each document's first sentence gives the
epoch's chunks. A pair is two ranges of token positions; no token is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hf_pretrain.data import draws
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.examples.packing import share_room

PairTask = Literal["nsp", "sop", "structural", "none"]

# What happens to a chunk's two parts. The label of a pair is the index of its kind among those of the task.
_NEXT, _SWAPPED, _RANDOM = range(3)
_KINDS = {
    "nsp": (_NEXT, _RANDOM),
    "sop": (_NEXT, _SWAPPED),
    "structural": (_NEXT, _SWAPPED, _RANDOM),
    "none": (_NEXT,),
}
_WINDOW_TOKENS = 1 << 22
_WINDOW_SENTENCES = 1 << 18


class SentenceIndex(NamedTuple):
    """Where sentences and documents begin; 8 bytes a sentence.

    Attributes:
        starts: Position of each sentence's first token and, at the end, the number of tokens: `int64 [S + 1]`.
        documents: Number of each document's first sentence and, at the end, `S`: `int64 [D + 1]`.
    """

    starts: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, store: TokenStore) -> SentenceIndex:
        """Find the sentences of a store."""
        lows = range(0, store.num_tokens, _WINDOW_TOKENS)
        parts = [store.sentence_starts(low, min(low + _WINDOW_TOKENS, store.num_tokens)) for low in lows]
        starts = np.concatenate([*parts, np.array([store.num_tokens])])
        return cls(starts, np.searchsorted(starts, store.begins))

    def windows(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of documents that hold about `_WINDOW_SENTENCES` sentences."""
        low, num_documents = 0, len(self.documents) - 1
        while low < num_documents:
            stop = np.searchsorted(self.documents, self.documents[low] + _WINDOW_SENTENCES, side="right") - 1
            high = max(low + 1, int(stop))
            yield low, high
            low = high


class Chunks(NamedTuple):
    """Chunks of whole sentences, `[n]` each: part one is the sentences `first..middle-1`, part two `middle..last-1`.

    Attributes:
        first: Number of the first sentence, `int64`.
        middle: Where the second part begins, `int64`.
        last: Number of the sentence behind the last, `int64`; that of `middle` where there is no second part.
        targets: Tokens that were wanted, `int64`.
        labels: Label of the pair, `int8`.
    """

    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray
    targets: np.ndarray
    labels: np.ndarray


class PairTable(NamedTuple):
    """Pairs of an epoch as token positions: A is `starts[:, 0]..stops[:, 0] - 1`, B the same of column 1.

    Attributes:
        starts: `int64 [n, 2]`.
        stops: `int64 [n, 2]`.
        labels: `int8 [n]`.
    """

    starts: np.ndarray
    stops: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class PairRule:
    """How documents become pairs.

    Attributes:
        task: Which kinds of pairs there are, each as often as the others.
        room: Most tokens in A and B together.
        seed: Seed of the run.
        balanced: Whether no pair is random because its chunk has one sentence. See :class:`SentencePairDataset`.
        short_probability: Share of the documents whose chunks are shorter than the room.
    """

    task: PairTask
    room: int
    seed: int = 0
    balanced: bool = True
    short_probability: float = 0.1

    @property
    def kinds(self) -> tuple[int, ...]:
        """Kinds of pairs, in the order of their labels."""
        return _KINDS[self.task]

    @property
    def has_random(self) -> bool:
        """Whether some pairs take text from another document."""
        return _RANDOM in self.kinds

    @property
    def takes_lone_sentences(self) -> bool:
        """Whether a chunk of one sentence becomes a random pair."""
        return not self.balanced and self.has_random

    def keys(self, ids: np.ndarray, *, epoch: int, stream: str) -> np.ndarray:
        """Return the keys of the draws of one stream, one a number of a document or sentence."""
        return draws.row_keys(ids, seed=self.seed, epoch=epoch, stream=f"pair_{stream}")

    def targets(self, documents: np.ndarray, *, epoch: int) -> np.ndarray:
        """Return how many tokens the chunks of each document are to reach: the room, or 2 to room with equal chances."""
        uniforms = draws.uniforms(self.keys(documents, epoch=epoch, stream="target"), 2)
        short = 2 + (uniforms[:, 1] * (self.room - 1)).astype(np.int64)
        return np.where(uniforms[:, 0] < self.short_probability, short, self.room)


def draw_pairs(sentences: SentenceIndex, *, rule: PairRule, epoch: int) -> PairTable:
    """Make all pairs of an epoch.

    Args:
        sentences: Where sentences and documents begin.
        rule: How to make them.
        epoch: The epoch, which with the rule's seed decides all.

    Returns:
        The pairs, in the order of the documents. Memory beyond the result: that of some 260 000 sentences at a time.
    """
    tables = []
    for low, high in sentences.windows():
        chunks = draw_chunks(sentences, rule=rule, epoch=epoch, documents=(low, high))
        starts, stops = _segments(sentences, chunks, rule=rule, epoch=epoch)
        starts, stops = _truncated(starts, stops, chunks.first, rule=rule, epoch=epoch)
        tables.append(PairTable(starts, stops, chunks.labels))
    return PairTable(*map(np.concatenate, zip(*tables, strict=True)))


def draw_chunks(sentences: SentenceIndex, *, rule: PairRule, epoch: int, documents: tuple[int, int]) -> Chunks:
    """Cut a range of documents into chunks, split these and draw their kinds.

    Args:
        sentences: Where sentences and documents begin.
        rule: How to make them.
        epoch: The epoch.
        documents: Number of the first document, and of the one behind the last.

    Returns:
        The chunks of which pairs are made.
    """
    low, high = documents
    begins = sentences.documents[low : high + 1]
    counts, base = np.diff(begins), int(begins[0])
    numbers = np.arange(base, begins[-1])
    closing = np.repeat(begins[1:], counts)
    targets = np.repeat(rule.targets(np.arange(low, high), epoch=epoch), counts)
    starts = sentences.starts[base : int(begins[-1]) + 1]
    last = base + np.searchsorted(starts, starts[:-1] + targets)
    if not rule.takes_lone_sentences:
        # The second sentence of a chunk and the last one of a document come along, too long or not.
        last = np.maximum(last, numbers + 2)
        last += last == closing - 1
    last = np.minimum(last, closing)
    sizes = last - numbers
    uniforms = draws.uniforms(rule.keys(numbers, epoch=epoch, stream="chunk"), 2)
    middle = numbers + 1 + (uniforms[:, 0] * (sizes - 1)).astype(np.int64)
    labels = (uniforms[:, 1] * len(rule.kinds)).astype(np.int8)
    following = last
    if rule.has_random:
        random_label = rule.kinds.index(_RANDOM)
        if rule.takes_lone_sentences:
            labels[sizes == 1] = random_label
        following = np.where(labels == random_label, middle, last)
    chain = _chain(following - base)
    if not rule.takes_lone_sentences:
        chain = chain[sizes[chain] > 1]
    return Chunks(*(values[chain] for values in (numbers, middle, last, targets, labels)))


def _chain(following: np.ndarray) -> np.ndarray:
    """Return the numbers on the way from 0 to the end, going from each to the one that follows it."""
    chain, at, steps = [], 0, following.tolist()
    while at < len(steps):
        chain.append(at)
        at = steps[at]
    return np.array(chain, dtype=np.int64)


def _segments(
    sentences: SentenceIndex, chunks: Chunks, *, rule: PairRule, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return first positions of A and B, and those behind their last, of each chunk: `int64 [n, 2]` each."""
    kinds = np.array(rule.kinds)[chunks.labels]
    first = np.column_stack([chunks.first, chunks.middle])
    last = np.column_stack([chunks.middle, chunks.last])
    swapped, random = kinds == _SWAPPED, np.flatnonzero(kinds == _RANDOM)
    first[swapped], last[swapped] = first[swapped, ::-1], last[swapped, ::-1]
    starts, stops = sentences.starts[first], sentences.starts[last]
    if random.size:
        wanted = chunks.targets[random] - (stops[random, 0] - starts[random, 0])
        keys = rule.keys(chunks.first[random], epoch=epoch, stream="random")
        others = _elsewhere(sentences, chunks.first[random], wanted, uniforms=draws.uniforms(keys, 2))
        starts[random, 1], stops[random, 1] = others
    return starts, stops


def _elsewhere(
    sentences: SentenceIndex, own: np.ndarray, wanted: np.ndarray, *, uniforms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of text of another document, from a random sentence on until there is enough of it."""
    begins = sentences.documents
    own_document = np.searchsorted(begins, own, side="right") - 1
    document = (uniforms[:, 0] * (len(begins) - 2)).astype(np.int64)
    document += document >= own_document
    first = begins[document] + (uniforms[:, 1] * (begins[document + 1] - begins[document])).astype(np.int64)
    last = np.searchsorted(sentences.starts, sentences.starts[first] + wanted)
    last = np.clip(last, first + 1, begins[document + 1])
    return sentences.starts[first], sentences.starts[last]


def _truncated(
    starts: np.ndarray, stops: np.ndarray, ids: np.ndarray, *, rule: PairRule, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take tokens off the longer segment, one at a time from front or back, until both together fit the room.

    Of equal segments, B loses the first. So in the end a segment that was not longer than half the room is whole, and two
    longer ones are equal. How many of its tokens a segment loses in front is a number of heads of fair coins.
    """
    lengths = stops - starts
    kept = np.column_stack(share_room(*lengths.T, room=rule.room))
    lost = lengths - kept
    for column, stream in enumerate(("cut_a", "cut_b")):
        rows = np.flatnonzero(lost[:, column])
        keys = rule.keys(ids[rows], epoch=epoch, stream=stream)
        starts[rows, column] += _heads(keys, lost[rows, column])
    return starts, starts + kept


def _heads(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return how many of the first `counts` random bits of each key are set: `int64 [n]`, for counts above 0."""
    heads = np.zeros(len(keys), dtype=np.int64)
    words = -(-counts // 64)
    for length in np.unique(words).tolist():
        rows = np.flatnonzero(words == length)
        drawn = draws.bits(keys[rows], length)
        drawn[:, -1] >>= (64 * length - counts[rows]).astype(np.uint64)
        heads[rows] = np.bitwise_count(drawn).sum(axis=1)
    return heads
