"""From text to documents: one row a document, tokens with the words and sentences of the text marked on them.

`tokenize_documents` maps a dataset of texts to an Arrow file in the document schema; `tokenize_texts` does the same in
memory, for streams. Sentences are found by a splitter: a callable from a text to the ascending character offsets at
which its sentences start. `sentence_starts` is the usual one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.documents.spelling import encode_ids, spelling_of
from hf_pretrain.data.documents.words import (
    IGNORED,
    LETTER,
    MARK,
    SPACE,
    Segmenter,
    character_kinds,
    encodable_texts,
    lengths_of,
    next_visible,
    word_starts,
)
from hf_pretrain.errors import InputError

SentenceSplitter = Callable[[str], Sequence[int]]

_FULL_STOPS = ".!?…؟۔।॥։።"
_WIDE_STOPS = "。！？｡．"
_CLOSERS = "\"'”’»›)\\]}」』）】》〉］｝〕"
# A bound: else a long run of stops would be read to its end from each of them.
_MOST_CLOSERS = 8
_LETTERS = [chr(point) for point in range(0x2000)]
_LOWER = "".join(letter for letter in _LETTERS if letter.islower())
_UPPER = re.compile(f"[{''.join(letter for letter in _LETTERS if letter.isupper())}]")

# A full stop after these is not an end. Those that do end sentences (etc., Inc., a.m.) are left to the letter case.
_ABBREVIATIONS = (
    "mr mrs ms mme mlle dr prof st mt ft rev hon gen col capt cmdr maj lt sgt gov sen rep pres fr sra vs cf viz ca "
    "fig figs no nos vol vols pp eq eqs sec ch chap art ed eds al bzw nr bd z.b d.h u.a e.g i.e "
    "jan feb mar apr jun jul aug sept oct nov dec"
).split()
_LONGEST = max(map(len, _ABBREVIATIONS))


DOCUMENT_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "word_starts": datasets.List(datasets.Value("bool")),
        "sent_starts": datasets.List(datasets.Value("bool")),
        "doc_id": datasets.Value("int64"),
    }
)
# Longer documents go through the tokenizer in pieces, cut at white space, and pieces in groups of about this size: a
# Python object a token is too much for a long book otherwise.
_PIECE_CHARACTERS = 1 << 20
_GROUP_CHARACTERS = 1 << 21
# Arrays of so many characters stay in the cache of a core, and a call of NumPy costs little beside them.
_JOINED_CHARACTERS = 1 << 15
# Part of every fingerprint: raise it when the documents of the same text change.
_VERSION = 2
# A stored document has these counts beside the columns of the schema.
_COUNTS = ("characters", "unknown_characters", "unknown_tokens")
_MOST_WEIGHT = 1000


def _guards(initials: str) -> str:
    """Return look-behinds that refuse the full stop of an abbreviation, an initial or a number that counts a line."""
    by_length = [[re.escape(word) for word in _ABBREVIATIONS if len(word) == n] for n in range(1, _LONGEST + 1)]
    words = [rf"(?<!\b(?i:{'|'.join(group)})\.)" for group in by_length if group]
    guards = "".join([rf"(?<!\b{initials}\.)", r"(?<!\n\d\.)", r"(?<!\n\d\d\.)", *words])
    # Most sentences end in a word that is longer than any abbreviation: no need to ask.
    return rf"(?:(?<=[a-z]{{{_LONGEST + 1}}}\.)|{guards})"


def _boundary(not_before: str, initials: str) -> re.Pattern[str]:
    """Compile the boundary between two sentences: a match ends where the next sentence starts.

    A class of characters comes first, so that the engine skips to the next candidate; the branches then look back.
    """
    wide = rf"(?<=[{_WIDE_STOPS}])[{_WIDE_STOPS}{_CLOSERS}…]*+\s*+"
    closers = rf"[{_FULL_STOPS}{_CLOSERS}]{{0,{_MOST_CLOSERS}}}+"
    narrow = rf"(?<=[{_FULL_STOPS}])(?:(?<!\.)|{_guards(initials)}){closers}\s++(?!{not_before})"
    line = rf"(?<=\n)(?:[^\S\n]*+\n\s*+|\s*+(?!{not_before}))"
    return re.compile(rf"[{_FULL_STOPS}{_WIDE_STOPS}\n](?:{wide}|{narrow}|{line})")


_CASED = _boundary(f"[{_LOWER}]", "[A-HJ-Z]")
_UNCASED = _boundary(r"(?!)", "[b-hj-z]")


def sentence_starts(text: str) -> list[int]:
    """Return where sentences start, by punctuation and lines.

    A sentence ends at one of ``. ! ? …`` and their like in other scripts, with the quotes and brackets that close
    after it, before white space; at ``。！？`` with or without white space; and at the end of a line. It goes on where
    a lower-case letter follows (unless the text has no upper-case letters at all, or the line in between is blank),
    after common abbreviations, initials and the number of a list item. So most wrapped sentences stay whole.

    Args:
        text: Any text.

    Returns:
        Ascending character offsets, the first of them 0; empty for a text of white space.
    """
    if not text or text.isspace():
        return []
    pattern = _CASED if _UPPER.search(text) else _UNCASED
    starts = [0]
    starts.extend(match.end() for match in pattern.finditer(text))
    if starts[-1] >= len(text):
        starts.pop()
    if len(starts) > 1 and not text[: starts[1]].strip():
        del starts[1]
    return starts


def one_per_line(text: str) -> list[int]:
    """Return where the lines that are not blank start, for text with one sentence a line."""
    starts, offset = [], 0
    for line in text.split("\n"):
        if line and not line.isspace():
            starts.append(offset)
        offset += len(line) + 1
    return starts


@dataclass
class UnknownCount:
    """How much of a text the tokenizer cannot represent.

    Attributes:
        tokens: All tokens.
        unknown_tokens: Those that are the unknown token.
        characters: Characters of the text that are seen: no white space, no control characters, no combining marks.
        unknown_characters: Those of them for which there is no token but the unknown one, or none at all.
        weight: The sum of the weights of the documents: their characters, but at most 1000 of each.
        unknown_weight: The same of the unknown characters.
    """

    tokens: int = 0
    unknown_tokens: int = 0
    characters: int = 0
    unknown_characters: int = 0
    weight: float = 0.0
    unknown_weight: float = 0.0

    @property
    def share(self) -> float:
        """Unknown share of the characters. It is not a share of the tokens: one of them may stand for a whole document.

        No document counts for more than 1000 characters, so that a huge one does not outweigh all others.
        """
        return self.unknown_weight / max(self.weight, 1.0)

    def add(
        self,
        *,
        num_tokens: int,
        unknown_tokens: Sequence[int] | np.ndarray,
        characters: Sequence[int] | np.ndarray,
        unknown_characters: Sequence[int] | np.ndarray,
    ) -> None:
        """Add texts.

        Args:
            num_tokens: Tokens of all of them.
            unknown_tokens: Unknown tokens of each.
            characters: Visible characters of each.
            unknown_characters: Those without a known token.
        """
        seen, lost = (np.asarray(numbers, dtype=np.int64) for numbers in (characters, unknown_characters))
        weights = np.minimum(seen, _MOST_WEIGHT)
        self.tokens += num_tokens
        self.unknown_tokens += int(np.sum(unknown_tokens))
        self.characters += int(seen.sum())
        self.unknown_characters += int(lost.sum())
        self.weight += float(weights.sum())
        self.unknown_weight += float((weights * (lost / np.maximum(seen, 1))).sum())


class _Tokens(NamedTuple):
    """Tokens of texts, those of one text after those of the one before.

    Attributes:
        ids: ``int32 [tokens]``.
        starts: The first character of each token in its text: ``int64 [tokens]``.
        ends: The character behind its last one: ``int64 [tokens]``.
        counts: Number of tokens of each text: ``int64 [texts]``.
        are_whole: Whether every visible character of a text is known to have a token: ``bool [texts]``.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    counts: np.ndarray
    are_whole: np.ndarray

    def part(self, texts: slice, tokens: slice) -> _Tokens:
        """Return some of the texts."""
        ids, starts, ends = (field[tokens] for field in self[:3])
        return _Tokens(ids, starts, ends, self.counts[texts], self.are_whole[texts])

    def replaced(self, rows: np.ndarray, others: _Tokens) -> _Tokens:
        """Return these, but with other tokens for the texts of some rows, which ascend."""
        counts, are_whole, is_other = self.counts.copy(), self.are_whole.copy(), np.zeros(len(self.counts), np.bool_)
        counts[rows], are_whole[rows], is_other[rows] = others.counts, others.are_whole, True
        kept, is_new = ~np.repeat(is_other, self.counts), np.repeat(is_other, counts)
        ids, starts, ends = (np.empty(len(is_new), dtype=field.dtype) for field in self[:3])
        for field, ours, theirs in zip((ids, starts, ends), self[:3], others[:3], strict=True):
            field[is_new], field[~is_new] = theirs, ours[kept]
        return _Tokens(ids, starts, ends, counts, are_whole)


class _Columns(NamedTuple):
    """Columns of documents, one document after the other.

    Attributes:
        of_tokens: The columns of the schema that have a value a token: ``[tokens]``.
        of_texts: The numbers of `UnknownCount` of each text but that of its tokens: ``int64 [texts]``.
        counts: Number of tokens of each text: ``int64 [texts]``.
    """

    of_tokens: dict[str, np.ndarray]
    of_texts: dict[str, np.ndarray]
    counts: np.ndarray

    def rows(self) -> dict[str, list[np.ndarray]]:
        """Return the columns of tokens with one array a text."""
        edges = list(itertools.pairwise([0, *np.cumsum(self.counts).tolist()]))
        return {name: [flat[low:high] for low, high in edges] for name, flat in self.of_tokens.items()}

    def add_to(self, unknown: UnknownCount | None) -> None:
        """Add the counts of the texts."""
        if unknown is not None:
            unknown.add(num_tokens=int(self.counts.sum()), **self.of_texts)


def tokenize_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sentence_splitter: SentenceSplitter = sentence_starts,
    word_segmenter: Segmenter | None = None,
    unknown: UnknownCount | None = None,
) -> dict[str, list[np.ndarray]]:
    """Tokenize texts without special tokens and mark the tokens that begin a word or a sentence of the text.

    A token belongs to the word (sentence) of its first visible character, or of the next one if it is all white
    space. It begins the word if the token before belongs to another. The name of a special token in the text, such as
    "[SEP]", is text like any other.

    Args:
        texts: The texts.
        tokenizer: A fast tokenizer, because the words are found by character offsets.
        sentence_splitter: Returns the offsets at which the sentences of a text start.
        word_segmenter: Cuts runs of characters that are written without spaces into words, see `word_starts`.
        unknown: The counts of the texts are added to it.

    Returns:
        The columns ``input_ids`` (``int32 [n]`` a text), ``word_starts`` and ``sent_starts`` (``bool [n]``), with one
        entry a text; one without tokens is empty.

    Raises:
        InputError: If the tokenizer has no offsets.
    """
    check_offsets(tokenizer)
    columns = _counted_columns(texts, tokenizer, sentence_splitter, word_segmenter)
    columns.add_to(unknown)
    return columns.rows()


def _counted_columns(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sentence_splitter: SentenceSplitter,
    word_segmenter: Segmenter | None,
) -> _Columns:
    """Return the columns of the texts, worked on together where they are short."""
    texts = encodable_texts(texts)
    sizes = lengths_of(texts)
    tokens = _tokenize(texts, sizes, tokenizer)
    edges = np.append(0, np.cumsum(tokens.counts))
    parts: list[tuple[np.ndarray, ...]] = [tuple(np.empty(0, dtype=kind) for kind in "??qqq")]
    for low, high in _runs(sizes, _JOINED_CHARACTERS):
        part = tokens.part(slice(low, high), slice(edges[low], edges[high]))
        joined = _Joined.of(texts[low:high], sizes[low:high], part)
        words = joined.begins_unit(word_starts(joined.text, segmenter=word_segmenter, kinds=joined.kinds))
        sentences = joined.begins_unit(joined.sentences(sentence_splitter))
        parts.append((words, sentences, *joined.count_unknown(tokenizer.unk_token_id)))
    words, sentences, *numbers = map(np.concatenate, zip(*parts, strict=True))
    of_tokens = {"input_ids": tokens.ids, "word_starts": words, "sent_starts": sentences}
    return _Columns(of_tokens, dict(zip(_COUNTS, numbers, strict=True)), tokens.counts)


@dataclass
class _Joined:
    """Texts with a vertical tab behind each, so that arrays of many short ones are worked on at once.

    Attributes:
        text: All of them.
        texts: Each of them.
        kinds: `character_kinds` of the joined text.
        begins: Where each text begins: ``int64 [texts]``.
        tokens: The tokens of all.
        visible: The first visible character of each token, or of the next one of its text: ``int64 [tokens]``.
    """

    text: str
    texts: Sequence[str]
    kinds: np.ndarray
    begins: np.ndarray
    tokens: _Tokens
    visible: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], sizes: np.ndarray, tokens: _Tokens) -> _Joined:
        """Join texts of such sizes."""
        joined = _join(texts)
        kinds, behind = character_kinds(joined), np.cumsum(sizes + 1)
        begins = behind - sizes - 1
        bounded = kinds.copy()
        # The white space at the end of a text has nothing to do with the next one.
        bounded[behind - 1] = LETTER
        visible = next_visible(bounded, tokens.starts + np.repeat(begins, tokens.counts))
        return cls(joined, texts, kinds, begins, tokens, visible)

    def sentences(self, splitter: SentenceSplitter) -> np.ndarray:
        """Return where the sentences of all texts start: ascending offsets in the joined text."""
        if splitter is not sentence_starts:
            offsets = [np.asarray(splitter(text), dtype=np.int64) for text in self.texts]
            return np.concatenate(offsets) + np.repeat(self.begins, [len(row) for row in offsets])
        # One pass finds what a pass over each text does. No match goes on behind the white space at the front of the next
        # text, and no token tells a sentence that starts there from one that starts with its text. Nothing looks back over
        # a vertical tab, as it would over a line feed.
        is_cased = np.fromiter(map(bool, map(_UPPER.search, self.texts)), dtype=np.bool_, count=len(self.texts))
        starts = []
        for pattern, rows in ((_CASED, np.flatnonzero(is_cased)), (_UNCASED, np.flatnonzero(~is_cased))):
            if len(rows) == len(self.texts):
                return np.array([match.end() for match in pattern.finditer(self.text)], dtype=np.int64)
            texts = [self.texts[row] for row in rows.tolist()]
            ends = np.array([match.end() for match in pattern.finditer(_join(texts))], dtype=np.int64)
            sizes = lengths_of(texts) + 1
            shift = np.append(self.begins[rows], len(self.text)) - np.append(0, np.cumsum(sizes))
            starts.append(ends + shift[np.searchsorted(np.cumsum(sizes), ends, side="right")])
        return np.sort(np.concatenate(starts))

    def begins_unit(self, unit_starts: np.ndarray) -> np.ndarray:
        """Return whether tokens are the first of their units, as those that begin a text are: ``bool [tokens]``."""
        units = np.searchsorted(unit_starts, self.visible, side="right")
        begins = np.append(True, units[1:] != units[:-1])[: len(units)]
        first = np.cumsum(self.tokens.counts) - self.tokens.counts
        begins[first[self.tokens.counts > 0]] = True
        return begins

    def count_unknown(self, unknown_id: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of each text the numbers of visible characters, of those without a known token, and of unknown tokens."""
        ids, starts, ends, counts, are_whole = self.tokens
        is_visible = (self.kinds != SPACE) & (self.kinds != IGNORED) & (self.kinds != MARK)
        num_visible = np.add.reduceat(is_visible, self.begins, dtype=np.int64)
        is_unknown = ids == (-1 if unknown_id is None else unknown_id)
        num_lost, num_unknown = np.zeros((2, len(counts)), dtype=np.int64)
        if is_unknown.any():
            num_unknown = np.bincount(np.repeat(np.arange(len(counts)), counts)[is_unknown], minlength=len(counts))
        elif are_whole.all():
            return num_visible, num_lost, num_unknown
        # Tokens of bytes lie on one another where a character has several.
        shift, size = np.repeat(self.begins, counts)[~is_unknown], len(self.kinds) + 1
        starts, ends = starts[~is_unknown] + shift, ends[~is_unknown] + shift
        depth = np.bincount(starts, minlength=size) - np.bincount(ends, minlength=size)
        lost = is_visible & (np.cumsum(depth)[:-1] == 0)
        return num_visible, np.add.reduceat(lost, self.begins, dtype=np.int64), num_unknown


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the tokenizer does not tell where in the text its tokens are."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} gives no character offsets, without which words are not known: "
            "use a fast tokenizer, one with a tokenizer.json"
        )


def _join(texts: Sequence[str]) -> str:
    return "\v".join([*texts, ""])


def _runs(sizes: np.ndarray, num_characters: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of neighbours that reach so many characters together."""
    after = np.cumsum(sizes)
    low = before = 0
    while low < len(sizes):
        high = min(int(np.searchsorted(after, before + num_characters)) + 1, len(sizes))
        yield low, high
        low, before = high, int(after[high - 1])


def _tokenize(texts: Sequence[str], sizes: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    """Return the tokens of the texts, none of them special but the unknown token."""
    special = sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id})
    # The ids behind the last special one share an entry.
    is_special = np.zeros(max(special, default=0) + 2, dtype=np.bool_)
    is_special[special] = True
    cuts = {row: _cuts(texts[row]) for row in np.flatnonzero(sizes > _PIECE_CHARACTERS).tolist()}
    tokens = _tokenize_pieces(texts, cuts, tokenizer)
    # split_special_tokens keeps most names of special tokens apart; some models find them in their vocabulary all the
    # same, unless the name is cut behind its first character.
    while len(names := np.flatnonzero(is_special.take(tokens.ids, mode="clip"))):
        names = names[tokens.ends[names] - tokens.starts[names] > 1]
        if not len(names):
            break
        owners = np.searchsorted(np.cumsum(tokens.counts), names, side="right")
        for row, start in zip(owners.tolist(), tokens.starts[names].tolist(), strict=True):
            cuts[row] = sorted({*cuts.get(row, [0]), start + 1})
        rows = np.unique(owners)
        cut_again = {number: cuts[row] for number, row in enumerate(rows.tolist())}
        tokens = tokens.replaced(rows, _tokenize_pieces([texts[row] for row in rows.tolist()], cut_again, tokenizer))
    return tokens


def _cuts(text: str) -> list[int]:
    """Return where the pieces of a text start: after every so many characters, before white space."""
    cuts = [0]
    while len(text) - cuts[-1] > _PIECE_CHARACTERS:
        low, high = cuts[-1] + 1, cuts[-1] + _PIECE_CHARACTERS
        cut = max(text.rfind("\n", low, high), text.rfind(" ", low, high))
        cuts.append(cut if cut > 0 else high)
    return cuts


def _tokenize_pieces(
    texts: Sequence[str], cuts: Mapping[int, list[int]], tokenizer: PreTrainedTokenizerBase
) -> _Tokens:
    """Tokenize texts, some of them in the pieces that begin at their cuts."""
    begins = [cuts.get(row, [0]) for row in range(len(texts))] if cuts else []
    pieces = texts
    if cuts:
        pieces = [
            text[low:high]
            for text, starts in zip(texts, begins, strict=True)
            for low, high in itertools.pairwise([*starts, len(text)])
        ]
    sizes = lengths_of(pieces)
    groups = [_encode(pieces[low:high], sizes[low:high], tokenizer) for low, high in _runs(sizes, _GROUP_CHARACTERS)]
    tokens = _Tokens(*map(np.concatenate, zip(*groups, strict=True))) if groups else _with_offsets([], tokenizer)
    if not cuts:
        return tokens
    shift = np.repeat(list(itertools.chain.from_iterable(begins)), tokens.counts)
    first = np.cumsum([0, *map(len, begins[:-1])])
    return _Tokens(
        tokens.ids,
        tokens.starts + shift,
        tokens.ends + shift,
        np.add.reduceat(tokens.counts, first),
        np.logical_and.reduceat(tokens.are_whole, first),
    )


def _encode(texts: Sequence[str], sizes: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    """Return the tokens of texts of such sizes."""
    spelling = spelling_of(tokenizer)
    if spelling is None or not spelling.is_worth_it:
        return _with_offsets(texts, tokenizer)
    ids, counts = encode_ids(tokenizer, texts)
    edges = np.append(0, np.cumsum(counts))
    found = [
        spelling.find(texts[low:high], ids[edges[low] : edges[high]], counts[low:high])
        for low, high in _runs(sizes, _JOINED_CHARACTERS)
    ]
    starts, ends, are_found = map(np.concatenate, zip(*found, strict=True))
    tokens = _Tokens(ids, starts, ends, counts, are_found)
    if are_found.all():
        return tokens
    others = np.flatnonzero(~are_found)
    return tokens.replaced(others, _with_offsets([texts[row] for row in others.tolist()], tokenizer))


def _with_offsets(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    """Return the tokens of texts at the offsets that the tokenizer gives."""
    rows, offsets = [], []
    if texts:
        encoding = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        # The call leaves the backend in that state.
        tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens
        rows, offsets = encoding["input_ids"], encoding["offset_mapping"]
    counts = lengths_of(rows)
    ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=counts.sum())
    pairs = itertools.chain.from_iterable(itertools.chain.from_iterable(offsets))
    flat = np.fromiter(pairs, dtype=np.int64, count=2 * len(ids))
    return _Tokens(ids, flat[::2], flat[1::2], counts, np.zeros(len(counts), dtype=np.bool_))


def tokenize_documents(
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sentence_splitter: SentenceSplitter = sentence_starts,
    word_segmenter: Segmenter | None = None,
    num_proc: int | None = None,
    batch_size: int = 256,
    keep_empty: bool = False,
    unknown: UnknownCount | None = None,
) -> datasets.Dataset:
    """Tokenize a dataset of texts into the document schema, once: the result is an Arrow file that is found again.

    Args:
        texts: Dataset with a column ``text``, and perhaps ``lang``.
        tokenizer: A fast tokenizer.
        sentence_splitter: Returns the offsets at which the sentences of a text start.
        word_segmenter: Cuts runs of characters that are written without spaces into words, see `word_starts`.
        num_proc: Processes to work in; the tokenizer uses threads anyway where there is one process.
        batch_size: Texts in one call of the tokenizer.
        keep_empty: Whether texts without tokens stay, so that there is one document for each text.
        unknown: The counts of the texts are added to it, also where the documents were made before.

    Returns:
        Dataset with ``input_ids``, ``word_starts``, ``sent_starts``, ``doc_id`` and, if given, ``lang``, in the order
        of the texts. Unless kept, texts without tokens are left out; ``doc_id`` counts the rest from 0.

    Raises:
        InputError: If the tokenizer has no offsets, there is no column ``text``, or no text has a token.
    """
    check_offsets(tokenizer)
    if "text" not in texts.column_names:
        raise InputError(f"texts has the columns {texts.column_names}, but none named 'text'; make it by text_dataset")
    features = datasets.Features(DOCUMENT_FEATURES | dict.fromkeys(_COUNTS, datasets.Value("int64")))
    if "lang" in texts.column_names:
        features["lang"] = datasets.Value("string")
    worker = _Worker(tokenizer, sentence_splitter, word_segmenter, keep_empty)
    fingerprint = Hasher.hash((_VERSION, texts._fingerprint, worker.key()))
    documents = texts.with_format("arrow").map(
        worker,
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc,
        features=features,
        remove_columns=texts.column_names,
        new_fingerprint=fingerprint,
        desc="Tokenizing",
    )
    table = documents.data.table
    if unknown is not None:
        num_tokens = pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
        unknown.add(num_tokens=num_tokens, **{name: table[name].to_numpy() for name in _COUNTS})
    documents = documents.with_format(None).select_columns([name for name in features if name not in _COUNTS])
    if not keep_empty:
        filled = np.flatnonzero(pc.list_value_length(table["input_ids"]).to_numpy())
        documents = documents if len(filled) == len(documents) else documents.select(filled)
    if not len(documents):
        raise InputError(f"texts have no tokens in {len(texts)} rows; check the text and the tokenizer")
    return documents if len(documents) == len(texts) else _renumbered(documents)


def document_rows(
    texts: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    word_segmenter: Segmenter | None = None,
    unknown: UnknownCount | None = None,
) -> pa.Table:
    """Return the rows that `tokenize_documents` stores of some texts, without ``doc_id``: one for each text that has a token.

    Args:
        texts: The texts.
        tokenizer: A fast tokenizer.
        word_segmenter: Cuts runs of characters that are written without spaces into words, see `word_starts`.
        unknown: The counts of the texts are added to it.
    """
    columns = _counted_columns([text or "" for text in texts], tokenizer, sentence_starts, word_segmenter)
    columns.add_to(unknown)
    return pa.table(_list_arrays(columns, columns.counts > 0))


def _renumbered(documents: datasets.Dataset) -> datasets.Dataset:
    """Count the documents anew, after some texts were left out."""
    features = documents.features.copy()
    documents = documents.remove_columns("doc_id").add_column("doc_id", np.arange(len(documents)))
    return documents.select_columns(list(features))


@dataclass
class _Worker:
    """What `datasets.map` calls: a table of texts in, a table of documents out."""

    tokenizer: PreTrainedTokenizerBase
    sentence_splitter: SentenceSplitter
    word_segmenter: Segmenter | None
    keep_empty: bool

    def __call__(self, table: pa.Table, indices: list[int]) -> pa.Table:
        """Return the documents of the texts that are kept or counted; ``doc_id`` is the number of the text."""
        texts = [text or "" for text in table["text"].to_pylist()]
        columns = _counted_columns(texts, self.tokenizer, self.sentence_splitter, self.word_segmenter)
        # A text of which nothing is known stays until it has been counted.
        kept = (columns.counts > 0) | (columns.of_texts["unknown_characters"] > 0) | self.keep_empty
        arrays = _list_arrays(columns, kept)
        arrays["doc_id"] = pa.array(np.asarray(indices, dtype=np.int64)[kept])
        arrays |= {name: pa.array(numbers[kept]) for name, numbers in columns.of_texts.items()}
        if "lang" in table.column_names:
            arrays["lang"] = table["lang"].cast(pa.string()).filter(pa.array(kept))
        return pa.table(arrays)

    def key(self) -> tuple[Any, ...]:
        """Return what decides the documents of a text."""
        settings = (self.sentence_splitter, self.word_segmenter, self.keep_empty)
        return *tokenizer_key(self.tokenizer), *settings


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[list[int], int | None]]:
    """Return what of a tokenizer decides the documents of a text: not how it was last called."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    return json.dumps(backend, sort_keys=True), (sorted(tokenizer.all_special_ids), tokenizer.unk_token_id)


def _list_arrays(columns: _Columns, kept: np.ndarray) -> dict[str, pa.Array]:
    """Return the columns of tokens as lists of Arrow, without some texts that have no tokens."""
    offsets = pa.array(np.append(0, np.cumsum(columns.counts[kept])).astype(np.int32))
    return {name: pa.ListArray.from_arrays(offsets, pa.array(flat)) for name, flat in columns.of_tokens.items()}
