"""Views of documents for one vector a text: a text with itself, with its neighbour, its context, its document, or alone.

`TextViewDataset` draws them anew in every epoch. A text is a few ranges of token positions, so no token is copied before an
example is read. `draw_partners` finds false partners for a scorer of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.examples.epochs import DrawnDataset
from hf_pretrain.data.examples.packing import BlockTemplate, block_bounds, interleaved, share_room
from hf_pretrain.data.examples.pairing import SentenceIndex
from hf_pretrain.data.examples.sentence_pairs import PairTemplate
from hf_pretrain.errors import InputError, check_choice, check_range

TextView = Literal["same", "single", "neighbours", "spans", "ict", "title", "ngram"]
TextUnit = Literal["sentence", "block"]
Scorer = Literal["bi", "cross"]
Tokens = tuple[np.ndarray, np.ndarray]
"""Ids of a text, and whether each begins a word: `[n]` both."""
_Text = list[tuple[int, int]]

# A shorter sentence, such as "Yes." or a page number, says nothing about its document: it is joined with the next.
_LEAST_SENTENCE = 4
_LONGEST_NGRAM = 10
_SHORTEST_SPAN = 32
_SEARCH_TOKENS = 64
_WINDOW_TOKENS = 1 << 22
# Views of units, and the usual unit of each; the others have units of their own.
_USUAL_UNITS: dict[str, TextUnit] = {
    "same": "sentence",
    "single": "sentence",
    "neighbours": "sentence",
    "ngram": "block",
}
_OF_ONE_TEXT = ("single", "ngram")
_NOT_FOR_CROSS = {
    "same": "a text and itself are no question",
    "single": "it has no partner",
    "ngram": "an n-gram stands in its text",
}


class _Layout(NamedTuple):
    """Which examples there are.

    Attributes:
        units: Where the units begin that the view is made of, sentences or blocks.
        firsts: Number of each document's first example and, at the end, of all examples: `int64 [D + 1]`.
        kept: Number of each example's unit, `int64 [num_examples]`, where some units give none; else None.
    """

    units: SentenceIndex
    firsts: np.ndarray
    kept: np.ndarray | None = None


class TextViewDataset(DrawnDataset):
    """Texts of documents with their partners, drawn anew in every epoch.

    A unit is a sentence or a block. Sentences of fewer than 4 tokens are joined with the next one of their document, or at
    its end with the one before. A sentence that is too long is cut at a drawn word start: so each part of it is read in
    some epoch, where a fixed cut would never show its end. Blocks are as many whole sentences of a document as fit; a
    sentence that is too long is cut into several. By `view` the texts of an example are

    - `"same"`: a unit twice; with `held_out` its two halves, because a text and its copy differ by nothing but dropout,
      which is off in evaluation;
    - `"single"`: a unit alone;
    - `"neighbours"`: a unit, and the one before or behind it, with equal chances;
    - `"spans"`: two spans of a document. Their lengths are between `shortest_span` and the room, at most half of the
      document: Beta(4, 2) for the anchor, Beta(2, 4) for its partner, which overlaps the anchor or lies next to it. A
      document of fewer than two shortest spans gives its halves;
    - `"ict"`: a sentence, and the whole sentences around it, as many as fit, without it or in a share
      `ict_keep_probability` with it. How many of them are in front is drawn. If none fits, the part of one that is next;
    - `"title"`: the first sentence of a document, short or not, and a block of the rest. The block begins at a drawn sentence
      from which the text still fills it, so that in time all of a document is read, where its beginning would be the
      same in every epoch;
    - `"ngram"`: a unit, and an n-gram of it alone. Its length is a rounded normal draw, cut to 1..10, in tokens; it begins a
      word, but may end inside one. At least one token of the unit is outside of it.

    There is an example for each unit (`"same"`, `"single"`, `"neighbours"`, `"ict"`, `"ngram"`), each document (`"title"`)
    or each `block_size` tokens of a document, at least one (`"spans"`), so that every epoch has as many. Each unit is the
    anchor of one example of an epoch. Documents and units that give no example are left out.

    With the scorer `"cross"` the texts are pairs of the anchor with a candidate: its partner, then partners of anchors of
    other documents. So true and false candidates are of one kind and say nothing by their form.

    Everything is keyed by seed, epoch and example. Memory: 8 bytes a unit and 16 a document; 8 bytes more an example where
    units are left out.

    Args:
        documents: Documents in the document schema (`input_ids`, `word_starts`, `sent_starts`).
        tokenizer: Tokenizer that made them; gives the special tokens and, of pairs, the token types.
        block_size: Most tokens in a text or pair, special tokens included.
        view: Which texts make an example.
        text_unit: The unit, for views of units; by default sentences, or blocks for `"ngram"`.
        scorer: Whether texts stand alone (`"bi"`) or in pairs (`"cross"`).
        cross_negatives: False candidates of an example, with the scorer `"cross"`.
        seed: Seed of the run.
        static_epochs: If not 0, the draws of an epoch are those of its number modulo this.
        held_out: Whether the examples measure and do not train: changes the view `"same"` only. Units of one word are
            left out then, and those that are too long are cut at their end.
        ict_keep_probability: Share of the examples of `"ict"` whose context holds the sentence.
        ngram_mean_length: Mean of the lengths of n-grams before they are rounded and cut, in tokens; their standard deviation
            is 1.
        shortest_span: Least tokens of a span; by default 32, or a quarter of the room if that is less.

    Raises:
        InputError: If an option is out of range or has no effect, `block_size` leaves no room, or the documents give no
            example, or those of one document only.

    Source:
        Same: Gao et al., "SimCSE" (2021). Spans: Giorgi et al., "DeCLUTR" (2021), section 3.1. Context: Lee et al., "Latent
        Retrieval for Weakly Supervised Open Domain Question Answering" (2019), section 4. N-grams: Kong et al., "A Mutual
        Information Maximization Perspective of Language Representation Learning" (2020).
    """

    def __init__(
        self,
        documents: datasets.Dataset,
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 128,
        view: TextView = "same",
        text_unit: TextUnit | None = None,
        scorer: Scorer = "bi",
        cross_negatives: int = 3,
        seed: int = 0,
        static_epochs: int = 0,
        held_out: bool = False,
        ict_keep_probability: float = 0.1,
        ngram_mean_length: float = 5.0,
        shortest_span: int | None = None,
    ) -> None:
        self._check_options(view, text_unit, scorer)
        check_range(cross_negatives, "[1, inf)", name="cross_negatives", hint="3 is usual")
        check_range(static_epochs, "[0, inf)", name="static_epochs", hint="0 makes new views in every epoch")
        check_range(ict_keep_probability, "[0, 1]", name="ict_keep_probability", hint="0.1 is usual")
        check_range(ngram_mean_length, f"[1, {_LONGEST_NGRAM}]", name="ngram_mean_length", hint="5 is usual")
        self.template = BlockTemplate.of(tokenizer)
        self.pair_template = PairTemplate.of(tokenizer) if scorer == "cross" else None
        self.store = TokenStore(documents)
        self.block_size = block_size
        # A pair keeps a token of each side at least.
        self.room = (
            self.template.budget(block_size)
            if self.pair_template is None
            else self.pair_template.budget(block_size) - 1
        )
        """Most tokens of text in a text, without special tokens."""
        if shortest_span is not None:
            check_range(shortest_span, f"[1, {self.room}]", name="shortest_span", hint="32 is usual")
        self.shortest_span = min(_SHORTEST_SPAN, max(self.room // 4, 1)) if shortest_span is None else shortest_span
        self.view, self.text_unit, self.scorer = view, text_unit or _USUAL_UNITS.get(view), scorer
        self.cross_negatives = cross_negatives
        self.seed = seed
        self.static_epochs = static_epochs
        self.held_out = held_out
        self.ict_keep_probability = ict_keep_probability
        lengths = NormalDist(ngram_mean_length)
        self._ngram_shares = np.array([lengths.cdf(length + 0.5) for length in range(1, _LONGEST_NGRAM)])
        self._check_documents()
        super().__init__()
        self._num_examples = int(self._layout.firsts[-1])

    @staticmethod
    def _check_options(view: TextView, text_unit: TextUnit | None, scorer: Scorer) -> None:
        """Refuse options that do not exist or do not go together."""
        check_choice(view, get_args(TextView), name="view")
        check_choice(text_unit, (None, *get_args(TextUnit)), name="text_unit")
        check_choice(scorer, get_args(Scorer), name="scorer")
        if text_unit is not None and view not in _USUAL_UNITS:
            raise InputError(
                f"text_unit={text_unit!r} has no effect on view={view!r}, whose texts are given: leave it out"
            )
        if scorer == "cross" and view in _NOT_FOR_CROSS:
            raise InputError(
                f"scorer='cross' does not go with view={view!r}: {_NOT_FOR_CROSS[view]}; use scorer='bi', or "
                "view='neighbours'"
            )

    def _check_documents(self) -> None:
        """Refuse documents that give no example, or nothing to tell apart."""
        num_documents = self.store.num_documents
        if num_documents == 0:
            raise InputError("documents hold no token; check the text they were made from")
        needs_others = self.view not in _OF_ONE_TEXT
        advice = "separate the documents of the text, or hold out more of them"
        if needs_others and num_documents == 1:
            raise InputError(
                f"view={self.view!r} tells texts of different documents apart, but there is one document only: {advice}"
            )
        num_used = int(np.count_nonzero(np.diff(self._layout.firsts)))
        if num_used == 0:
            needed = {"same": "a text of two words", "spans": "two words", "ngram": "a text of two tokens"}
            what = needed.get(self.view, f"two {self.text_unit or 'sentence'}s")
            raise InputError(
                f"view={self.view!r}: none of {num_documents} documents has {what}; check the sentence splitter, or let a "
                "document be more than that"
            )
        if needs_others and num_used == 1:
            raise InputError(
                f"view={self.view!r} tells texts of different documents apart, but only one of {num_documents} "
                f"documents gives examples: {advice}"
            )

    @cached_property
    def _layout(self) -> _Layout:
        """The units, and the examples that they give."""
        store, begins = self.store, self.store.begins
        if self.view == "spans":
            counts = np.maximum(np.diff(begins) // self.block_size, 1)
            short = np.flatnonzero(np.diff(begins) < 2 * self.shortest_span)
            halves = find_middles(store, begins[short], begins[short + 1])
            counts[short[halves < 0]] = 0
            return _Layout(SentenceIndex(begins, np.arange(len(begins))), _bounds(counts))
        sentences = SentenceIndex.of(store)
        if self.view == "title":
            return _Layout(sentences, _bounds(np.diff(sentences.documents) > 1))
        if self.text_unit == "block":
            bounds = block_bounds(store, budget=self.room, mode="doc_sentences")
            units = SentenceIndex(bounds, np.searchsorted(bounds, begins))
        else:
            units = join_short(sentences, least=_LEAST_SENTENCE)
        sizes = np.diff(units.documents)
        if self.view in ("neighbours", "ict"):
            return _Layout(units, _bounds(np.where(sizes > 1, sizes, 0)))
        is_kept = np.ones(len(units.starts) - 1, dtype=np.bool_)
        if self.view == "ngram":
            is_kept = np.diff(units.starts) > 1
        elif self.view == "same" and self.held_out:
            starts = units.starts[:-1]
            is_kept = find_middles(store, starts, np.minimum(units.starts[1:], starts + self.room)) >= 0
        if is_kept.all():
            return _Layout(units, units.documents)
        kept = np.flatnonzero(is_kept)
        return _Layout(units, np.searchsorted(kept, units.documents), kept)

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""
        return self._num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of an index, which may carry its epoch and its index in the order.

        Returns:
            `texts`, a list of dicts of `input_ids` int32 and `word_starts` bool, `[n]` each with special tokens, and of pairs
            `token_type_ids` int64: the anchor, then its partner if the view has one; or pairs, the true one first.
            `document`, the number of the anchor's document among those with tokens. With the view `"ngram"`, `ngram`: the
            columns (begin, end) of the n-gram in the first text. `example_id`, `epoch` and, if the index has one,
            `order_index`.

        Raises:
            IndexError: If there is no such example.
        """
        keys = self._locate(index)
        row = keys["example_id"]
        epoch = keys["epoch"] % self.static_epochs if self.static_epochs else keys["epoch"]
        document, ranges = self._ranges(row, epoch)
        example: dict[str, Any] = {"document": document}
        if self.pair_template is not None:
            example["texts"] = self._pairs(row, epoch, document, ranges)
        else:
            example["texts"] = [frame_text(self.template, self._read(text)) for text in ranges]
        if self.view == "ngram":
            (start, _), (begin, end) = ranges[0][0], ranges[1][0]
            shift = len(self.template.prefix) - start
            example["ngram"] = (begin + shift, end + shift)
        return example | keys

    def _pairs(self, row: int, epoch: int, document: int, ranges: list[_Text]) -> list[dict[str, np.ndarray]]:
        """Return the anchor with its partner, and with partners of anchors of other documents."""
        assert self.pair_template is not None
        anchor, partner = map(self._read, ranges)
        low, high = self._layout.firsts[document : document + 2].tolist()
        join = partial(frame_pair, self.pair_template, anchor, block_size=self.block_size)
        true = join(partner)
        others = draw_partners(
            true,
            lambda other: join(self._read(self._ranges(other, epoch)[1][1])),
            own=(low, high),
            num_examples=len(self),
            wanted=self.cross_negatives,
            key=draws.row_keys([row], seed=self.seed, epoch=epoch, stream="view_partners"),
        )
        return [true, *others]

    def _ranges(self, row: int, epoch: int) -> tuple[int, list[_Text]]:
        """Return the number of an example's document, and the positions of its texts."""
        layout = self._layout
        document = int(layout.firsts.searchsorted(row, side="right")) - 1
        offset = row - int(layout.firsts[document])
        unit = int(layout.units.documents[document]) + offset if layout.kept is None else int(layout.kept[row])
        key = draws.row_keys([row], seed=self.seed, epoch=epoch, stream=f"view_{self.view}")
        uniforms = draws.uniforms(key, 12)[0].tolist()
        if self.view == "spans":
            return document, self._spans(document, uniforms)
        if self.view == "title":
            return document, self._title(document, uniforms)
        if self.view == "ict":
            return document, self._context(document, unit, uniforms)
        if self.view == "same" and self.held_out:
            start, stop = self._unit(unit)
            return document, self._halves(start, min(stop, start + self.room))
        text = self._window(unit, uniforms[0])
        if self.view == "same":
            return document, [[text], [text]]
        if self.view == "neighbours":
            other = self._neighbour(document, unit, uniforms[1])
            return document, [[text], [self._window(other, uniforms[2])]]
        return document, [[text]] if self.view == "single" else [[text], [self._ngram(*text, uniforms)]]

    def _unit(self, unit: int) -> tuple[int, int]:
        """Return the positions of a unit."""
        start, stop = self._layout.units.starts[unit : unit + 2].tolist()
        return start, stop

    def _window(self, unit: int, uniform: float) -> tuple[int, int]:
        """Return the positions of a unit or, if it is too long, of a part that begins at a drawn word."""
        start, stop = self._unit(unit)
        if stop - start <= self.room:
            return start, stop
        begin = self._word_start(start + int(uniform * (stop - start - self.room + 1)), start)
        return begin, begin + self.room

    def _word_start(self, position: int, low: int) -> int:
        """Return where the word of a position begins; `low`, the beginning of a text, begins one."""
        stop = position + 1
        while stop > low:
            start = max(low, stop - _SEARCH_TOKENS)
            found = np.flatnonzero(self.store.read(start, stop)[1])
            if len(found):
                return start + int(found[-1])
            stop = start
        return low

    def _halves(self, start: int, stop: int) -> list[_Text]:
        """Return the two halves of a range of at least two words, each no longer than the room."""
        middle = int(find_middles(self.store, np.array([start]), np.array([stop]))[0])
        return [[(start, min(middle, start + self.room))], [(middle, min(stop, middle + self.room))]]

    def _neighbour(self, document: int, unit: int, uniform: float) -> int:
        """Return the number of the unit before or behind a unit."""
        first, end = self._layout.units.documents[document : document + 2].tolist()
        return unit + 1 if unit == first or (unit + 1 < end and uniform < 0.5) else unit - 1

    def _ngram(self, start: int, stop: int, uniforms: list[float]) -> tuple[int, int]:
        """Return the positions of an n-gram of a text of at least two tokens."""
        length = 1 + int(self._ngram_shares.searchsorted(uniforms[1], side="right"))
        length = min(length, stop - start - 1)
        words = self.store.read(start, stop - length + 1)[1]
        words[0] = True
        begins = np.flatnonzero(words)
        begin = start + int(begins[int(uniforms[2] * len(begins))])
        return begin, begin + length

    def _spans(self, document: int, uniforms: list[float]) -> list[_Text]:
        """Return two spans of a document that overlap or touch."""
        start, stop = self.store.begins[document : document + 2].tolist()
        least, length = self.shortest_span, stop - start
        if length < 2 * least:
            return self._halves(start, stop)
        # The k-th smallest of n uniform numbers is Beta(k, n + 1 - k).
        shares = sorted(uniforms[:5])[3], sorted(uniforms[5:10])[1]
        spread = min(self.room, length // 2) - least + 1
        own, others = (least + int(share * spread) for share in shares)
        anchor = self._word_start(start + int(uniforms[10] * (length - own + 1)), start)
        low, high = max(start, anchor - others), min(anchor + own, max(anchor, stop - others))
        words = self.store.read(low, high + 1)[1]
        words[anchor - low] = True
        begins = np.flatnonzero(words)
        partner = low + int(begins[int(uniforms[11] * len(begins))])
        return [[(anchor, anchor + own)], [(partner, min(partner + others, stop))]]

    def _title(self, document: int, uniforms: list[float]) -> list[_Text]:
        """Return the first sentence of a document, and a block of the rest."""
        starts, documents = self._layout.units
        first, end = documents[document : document + 2].tolist()
        full = int(starts[first + 1 : end].searchsorted(starts[end] - self.room, side="right"))
        begin = first + 1 + int(uniforms[0] * max(full, 1))
        start, stop = int(starts[begin]), int(starts[end])
        last = begin + int(starts[begin + 1 : end + 1].searchsorted(start + self.room, side="right"))
        block = start, int(starts[last]) if last > begin else min(stop, start + self.room)
        title, behind = self._unit(first)
        return [[(title, min(behind, title + self.room))], [block]]

    def _context(self, document: int, unit: int, uniforms: list[float]) -> list[_Text]:
        """Return a sentence and the text around it."""
        starts, documents = self._layout.units
        first, end = documents[document : document + 2].tolist()
        start, stop = self._unit(unit)
        anchor = [self._window(unit, uniforms[0])]
        if uniforms[1] < self.ict_keep_probability:
            low, high = self._around(unit, first, end, room=self.room - (stop - start), share=uniforms[2])
            # Alone it would be its own context, and teach nothing.
            if high - low > 1:
                return [anchor, [(int(starts[low]), int(starts[high]))]]
        low, high = self._around(unit, first, end, room=self.room, share=uniforms[2])
        if high - low == 1:
            return [anchor, [self._part_beside(document, unit, uniforms[3])]]
        parts = (int(starts[low]), start), (stop, int(starts[high]))
        return [anchor, [(begin, behind) for begin, behind in parts if begin < behind]]

    def _around(self, unit: int, first: int, end: int, *, room: int, share: float) -> tuple[int, int]:
        """Return the range of whole units around one that together, without it, fit into a room.

        Args:
            unit: Number of the unit.
            first: Number of its document's first unit.
            end: Number behind its last.
            room: Most tokens of the others; none fits into less than one.
            share: How much of the room is for those in front. What one side leaves, the other takes.
        """
        if room < 1:
            return unit, unit + 1
        starts = self._layout.units.starts
        start, stop = self._unit(unit)
        low = first + int(starts[first : unit + 1].searchsorted(start - int(share * room)))
        left = room - (start - int(starts[low]))
        high = unit + int(starts[unit + 1 : end + 1].searchsorted(stop + left, side="right"))
        left = room - (int(starts[high]) - stop)
        return first + int(starts[first : unit + 1].searchsorted(start - left)), high

    def _part_beside(self, document: int, unit: int, uniform: float) -> tuple[int, int]:
        """Return the end of the unit before, or the beginning of the one behind; that unit is longer than the room."""
        start, stop = self._unit(unit)
        if self._neighbour(document, unit, uniform) > unit:
            return stop, stop + self.room
        words = np.flatnonzero(self.store.read(start - self.room, start)[1])
        return start - self.room + (int(words[0]) if len(words) else 0), start

    def _read(self, text: _Text) -> Tokens:
        """Return the tokens of a text."""
        parts = [self.store.read(start, stop) for start, stop in text]
        for _, words in parts:
            words[0] = True
        ids, words = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return ids, words

    @property
    def num_tokens(self) -> int:
        """Tokens of text in all documents."""
        return self.store.num_tokens

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found again where the dataset arrives."""
        # `base` is this object.
        return {name: value for name, value in vars(self).items() if name != "_layout"}

    def __repr__(self) -> str:
        """Show the view and how many examples it has."""
        unit = "" if self.text_unit is None else f", text_unit={self.text_unit!r}"
        pairs = f", scorer='cross', cross_negatives={self.cross_negatives}" if self.scorer == "cross" else ""
        return (
            f"{type(self).__name__}({len(self)} examples of texts of at most {self.block_size} tokens, "
            f"view={self.view!r}{unit}{pairs}, {self.num_tokens} tokens of {self.store.num_documents} documents)"
        )


def frame_text(template: BlockTemplate, text: Tokens) -> dict[str, np.ndarray]:
    """Return a text with special tokens around it.

    Args:
        template: The special tokens.
        text: The tokens.

    Returns:
        `input_ids` int32 and `word_starts` bool, `[n]` each; the text begins with a word.
    """
    framed = interleaved((template.prefix, template.suffix), (text,))
    framed["word_starts"][len(template.prefix)] = True
    return framed


def frame_pair(template: PairTemplate, first: Tokens, second: Tokens, *, block_size: int) -> dict[str, np.ndarray]:
    """Return two texts as one; those that are too long lose their ends, the longer one first.

    Args:
        template: The special tokens.
        first: Tokens of the first text.
        second: Those of the second.
        block_size: Most tokens of the pair.

    Returns:
        `input_ids` int32, `word_starts` bool and `token_type_ids` int64, `[n]` each.
    """
    room = template.budget(block_size)
    kept = share_room(len(first[0]), len(second[0]), room=room)
    a, b = (
        (ids[:length], words[:length]) for (ids, words), length in zip((first, second), map(int, kept), strict=True)
    )
    pair = template.join(a, b)
    return {name: pair[name] for name in ("input_ids", "word_starts", "token_type_ids")}


def draw_partners(
    true: dict[str, np.ndarray],
    read: Callable[[int], dict[str, np.ndarray]],
    *,
    own: tuple[int, int],
    num_examples: int,
    wanted: int,
    key: np.ndarray,
) -> list[dict[str, np.ndarray]]:
    """Draw false pairs of an anchor, if possible none that is equal to the true one or to another.

    Args:
        true: The pair of the anchor with its partner, with the entry `input_ids`.
        read: Returns the pair of the anchor with the partner of another example.
        own: Number of the first example that may not give one, and of the one behind the last.
        num_examples: All examples; some must be outside of `own`.
        wanted: How many to return.
        key: Key of the draws, `uint64 [1]`.

    Returns:
        As many as wanted. Some are equal only if four times as many draws give no others.
    """
    low, high = own
    uniforms = draws.uniforms(key, 4 * wanted)[0]
    numbers = (uniforms * (num_examples - (high - low))).astype(np.int64)
    numbers += np.where(numbers >= low, high - low, 0)
    known = {true["input_ids"].tobytes()}
    fresh: list[dict[str, np.ndarray]] = []
    equal: list[dict[str, np.ndarray]] = []
    for number in numbers.tolist():
        pair = read(number)
        identity = pair["input_ids"].tobytes()
        (equal if identity in known else fresh).append(pair)
        known.add(identity)
        if len(fresh) == wanted:
            break
    return [*fresh, *equal][:wanted]


def join_short(sentences: SentenceIndex, *, least: int) -> SentenceIndex:
    """Join short sentences with the next ones of their document, at its end with the one before.

    Args:
        sentences: Where sentences and documents begin.
        least: Tokens from which on a sentence stands alone.

    Returns:
        Where the joined ones begin: each has `least` tokens, unless its document has fewer.
    """
    lengths = np.diff(sentences.starts)
    begins = np.ones(len(sentences.starts), dtype=np.bool_)
    ends_document = np.zeros(len(lengths), dtype=np.bool_)
    ends_document[sentences.documents[1:] - 1] = True
    short = np.flatnonzero(lengths < least)
    first, tokens, before = 0, 0, -2
    for number, length, is_last in zip(
        short.tolist(), lengths[short].tolist(), ends_document[short].tolist(), strict=True
    ):
        # A long sentence in between has taken in those before it.
        if tokens == 0 or number != before + 1:
            first, tokens = number, 0
        tokens += length
        before = number
        if tokens >= least:
            tokens = 0
        elif is_last:
            begins[first], tokens = False, 0
        else:
            begins[number + 1] = False
    begins[sentences.documents] = True
    numbers = np.concatenate([[0], np.cumsum(begins)])
    return SentenceIndex(sentences.starts[begins], numbers[sentences.documents])


def find_middles(store: TokenStore, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the word start next to the middle of each range.

    Args:
        store: The tokens.
        starts: First positions of ranges that do not overlap, ascending: `int64 [n]`.
        stops: Positions behind the last, `int64 [n]`.

    Returns:
        Positions inside of the ranges, so that both parts hold a token: `int64 [n]`, -1 where a range has one word only. Of
        two that are equally near, the second. Memory beyond the result: that of some four million tokens at a time.
    """
    found = np.full(len(starts), -1, dtype=np.int64)
    low = 0
    while low < len(starts):
        first = int(starts[low])
        high = max(low + 1, int(stops.searchsorted(first + _WINDOW_TOKENS, side="right")))
        words = np.flatnonzero(store.read(first, int(stops[high - 1]))[1]) + first
        words = np.concatenate([[-1], words, [np.iinfo(np.int64).max]])
        begin, behind = starts[low:high], stops[low:high]
        middle = (begin + behind) // 2
        number = words.searchsorted(middle)
        after, before = words[number], words[number - 1]
        # The middle of one token is its beginning.
        is_inside = (after > begin) & (after < behind)
        takes_after = is_inside & ((after - middle <= middle - before) | (before <= begin))
        found[low:high] = np.where(takes_after, after, np.where(before > begin, before, -1))
        low = high
    return found


def _bounds(counts: np.ndarray) -> np.ndarray:
    """Return the number of examples before each document and, at the end, of all: `int64 [D + 1]`."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
