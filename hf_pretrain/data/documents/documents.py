"""From text to documents: one row a document, tokens with the words and sentences of the text marked on them.

`tokenize_documents` maps a dataset of texts to an Arrow file in the document schema; `tokenize_texts` does the same in
memory, for streams. Sentences are found by a splitter: a callable from a text to the ascending character offsets at
which its sentences start. `sentence_starts` is the usual one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
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
    MARK,
    SPACE,
    Segmenter,
    character_kinds,
    encodable,
    next_visible,
    word_starts,
)
from hf_pretrain.data.text.files import in_groups
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
    """Tokens of a text: ids ``int32 [n]``, and the offsets of their first and behind their last character, ``[n]``."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


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
    if unknown is not None:
        num_tokens = sum(map(len, columns["input_ids"]))
        unknown.add(num_tokens=num_tokens, **{name: columns[name] for name in _COUNTS})
    return {name: rows for name, rows in columns.items() if name not in _COUNTS}


def _counted_columns(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sentence_splitter: SentenceSplitter,
    word_segmenter: Segmenter | None,
) -> dict[str, list[Any]]:
    """Return the columns of the texts, and the numbers of `UnknownCount` of each but that of its tokens."""
    texts = [encodable(text) for text in texts]
    columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "word_starts", "sent_starts", *_COUNTS)}
    rows = zip(texts, _tokenize(texts, tokenizer), strict=True)
    for group in in_groups(rows, num_characters=_JOINED_CHARACTERS, text=itemgetter(0)):
        joined = _Joined.of(*zip(*group, strict=True))
        sentences = [np.asarray(sentence_splitter(text), dtype=np.int64) for text, _ in group]
        words = word_starts(joined.text, segmenter=word_segmenter, kinds=joined.kinds)
        columns["input_ids"] += [tokens.ids for _, tokens in group]
        columns["word_starts"] += joined.begins_unit(words)
        columns["sent_starts"] += joined.begins_unit(joined.shifted(sentences))
        for name, counts in zip(_COUNTS, joined.count_unknown(tokenizer.unk_token_id), strict=True):
            columns[name] += counts.tolist()
    return columns


@dataclass
class _Joined:
    """Texts with a line feed behind each, so that arrays of many short ones are worked on at once.

    Attributes:
        text: All of them.
        kinds: `character_kinds` of it.
        begins: Where each text begins: ``int64 [texts]``.
        tokens: The tokens of all, at the offsets of the joined text.
        counts: Number of tokens of each: ``int64 [texts]``.
        visible: The first visible character of each token, or of the next one of its text: ``int64 [tokens]``.
    """

    text: str
    kinds: np.ndarray
    begins: np.ndarray
    tokens: _Tokens
    counts: np.ndarray
    visible: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], tokens: Sequence[_Tokens]) -> _Joined:
        """Join texts."""
        joined = "\n".join([*texts, ""])
        sizes = np.array([len(text) + 1 for text in texts])
        ends = np.cumsum(sizes)
        counts = np.array([len(row.ids) for row in tokens])
        ids, starts, stops = map(np.concatenate, zip(*tokens, strict=True))
        shift = np.repeat(ends - sizes, counts)
        starts, stops, kinds = starts + shift, stops + shift, character_kinds(joined)
        visible = np.minimum(next_visible(kinds, starts), np.repeat(ends - 1, counts))
        return cls(joined, kinds, ends - sizes, _Tokens(ids, starts, stops), counts, visible)

    def shifted(self, offsets: Sequence[np.ndarray]) -> np.ndarray:
        """Return the offsets of each text as those of the joined text, all in one."""
        return np.concatenate(offsets) + np.repeat(self.begins, [len(row) for row in offsets])

    def begins_unit(self, unit_starts: np.ndarray) -> list[np.ndarray]:
        """Return of each text whether its tokens are the first of their units: ``bool [n]``, the first always."""
        is_start = np.zeros(len(self.text), dtype=np.bool_)
        is_start[unit_starts] = True
        units = np.cumsum(is_start, dtype=np.int32)[self.visible]
        begins = np.ones(len(units), dtype=np.bool_)
        begins[1:] = units[1:] != units[:-1]
        edges = [0, *np.cumsum(self.counts).tolist()]
        begins[[edge for edge in edges if edge < len(begins)]] = True
        return [begins[low:high] for low, high in itertools.pairwise(edges)]

    def count_unknown(self, unknown_id: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of each text the numbers of visible characters, of those without a known token, and of unknown tokens."""
        ids, starts, ends = self.tokens
        is_unknown = ids == (-1 if unknown_id is None else unknown_id)
        num_unknown = np.zeros_like(self.counts)
        if is_unknown.any():
            num_unknown = np.bincount(
                np.repeat(np.arange(len(self.counts)), self.counts)[is_unknown], minlength=len(self.counts)
            )
            starts, ends = starts[~is_unknown], ends[~is_unknown]
        # Tokens of bytes lie on one another where a character has several.
        size = len(self.kinds) + 1
        depth = np.bincount(starts, minlength=size) - np.bincount(ends, minlength=size)
        is_visible = (self.kinds != SPACE) & (self.kinds != IGNORED) & (self.kinds != MARK)
        lost = is_visible & (np.cumsum(depth)[:-1] == 0)
        num_visible, num_lost = (np.add.reduceat(each, self.begins, dtype=np.int64) for each in (is_visible, lost))
        return num_visible, num_lost, num_unknown


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the tokenizer does not tell where in the text its tokens are."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} gives no character offsets, without which words are not known: "
            "use a fast tokenizer, one with a tokenizer.json"
        )


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Tokens]:
    """Return the tokens of each text, none of them special but the unknown token."""
    special = sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id})
    cuts = [_cuts(text) for text in texts]
    tokens = _tokenize_pieces(texts, cuts, tokenizer)
    # split_special_tokens keeps most names of special tokens apart; some models find them in their vocabulary all the
    # same, unless the name is cut.
    while unsettled := [i for i in _rows_with(tokens, special) if _cut_names(tokens[i], cuts[i], special)]:
        again = _tokenize_pieces([texts[i] for i in unsettled], [cuts[i] for i in unsettled], tokenizer)
        for i, fresh in zip(unsettled, again, strict=True):
            tokens[i] = fresh
    return tokens


def _rows_with(tokens: Sequence[_Tokens], wanted: list[int]) -> list[int]:
    """Return the numbers of the rows that have one of these tokens."""
    found = np.isin(np.concatenate([row.ids for row in tokens]), wanted) if tokens else np.empty(0, dtype=np.bool_)
    if not found.any():
        return []
    return np.unique(np.repeat(np.arange(len(tokens)), [len(row.ids) for row in tokens])[found]).tolist()


def _cuts(text: str) -> list[int]:
    """Return where the pieces of a text start: after every so many characters, before white space."""
    cuts = [0]
    while len(text) - cuts[-1] > _PIECE_CHARACTERS:
        low, high = cuts[-1] + 1, cuts[-1] + _PIECE_CHARACTERS
        cut = max(text.rfind("\n", low, high), text.rfind(" ", low, high))
        cuts.append(cut if cut > 0 else high)
    return cuts


def _cut_names(tokens: _Tokens, cuts: list[int], special: list[int]) -> bool:
    """Add a cut behind the first character of each special token; return whether there were any."""
    names = np.isin(tokens.ids, special) & (tokens.ends - tokens.starts > 1)
    if names.any():
        cuts[:] = sorted({*cuts, *(tokens.starts[names] + 1).tolist()})
    return bool(names.any())


def _tokenize_pieces(
    texts: Sequence[str], cuts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[_Tokens]:
    """Tokenize each text in the pieces that begin at its cuts."""
    pieces = [
        (text[low:high], low)
        for text, starts in zip(texts, cuts, strict=True)
        for low, high in itertools.pairwise([*starts, len(text)])
    ]
    groups = in_groups(pieces, num_characters=_GROUP_CHARACTERS, text=itemgetter(0))
    encoded = (tokens for group in groups for tokens in _encode(group, tokenizer))
    tokens = []
    for starts in cuts:
        parts = list(itertools.islice(encoded, len(starts)))
        tokens.append(parts[0] if len(parts) == 1 else _Tokens(*map(np.concatenate, zip(*parts, strict=True))))
    return tokens


def _encode(pieces: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    """Yield the tokens of each piece, at the offsets of the whole text."""
    texts = [piece for piece, _ in pieces]
    found: list[_Tokens | None] = [None] * len(texts)
    spelling = spelling_of(tokenizer)
    if spelling is not None and spelling.is_worth_it:
        rows = enumerate(zip(texts, encode_ids(tokenizer, texts), strict=True))
        for group in in_groups(rows, num_characters=_JOINED_CHARACTERS, text=lambda row: row[1][0]):
            numbers, spelled = zip(*group, strict=True)
            for number, (_, ids), offsets in zip(
                numbers, spelled, spelling.find(*zip(*spelled, strict=True)), strict=True
            ):
                found[number] = None if offsets is None else _Tokens(ids, *offsets)
    others = _with_offsets([text for text, tokens in zip(texts, found, strict=True) if tokens is None], tokenizer)
    for tokens, (_, shift) in zip(found, pieces, strict=True):
        tokens = next(others) if tokens is None else tokens
        yield _Tokens(tokens.ids, tokens.starts + shift, tokens.ends + shift) if shift else tokens


def _with_offsets(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    """Yield the tokens of each text at the offsets that the tokenizer gives."""
    if not texts:
        return
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    # The call leaves the backend in that state.
    tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens
    for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        flat = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids))
        yield _Tokens(np.array(ids, dtype=np.int32), flat[::2], flat[1::2])


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
    worker = _Worker(tokenizer, sentence_starts, word_segmenter, keep_empty=False)
    table = worker(pa.table({"text": pa.array(texts, pa.string())}), list(range(len(texts))))
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    if unknown is not None:
        unknown.add(num_tokens=int(lengths.sum()), **{name: table[name].to_numpy() for name in _COUNTS})
    rows = table.select([name for name in DOCUMENT_FEATURES if name != "doc_id"])
    return rows if lengths.all() else rows.filter(pa.array(lengths > 0))


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
        has_tokens = np.array([len(ids) > 0 for ids in columns["input_ids"]], dtype=np.bool_)
        # A text of which nothing is known stays until it has been counted.
        kept = has_tokens | (np.array(columns["unknown_characters"]) > 0) | self.keep_empty
        types = {"input_ids": pa.int32(), "word_starts": pa.bool_(), "sent_starts": pa.bool_()}
        arrays: dict[str, Any] = {name: _list_array(columns[name], kept, kind) for name, kind in types.items()}
        arrays["doc_id"] = pa.array(np.asarray(indices, dtype=np.int64)[kept])
        arrays |= {name: pa.array(np.asarray(columns[name], dtype=np.int64)[kept]) for name in _COUNTS}
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


def _list_array(rows: list[np.ndarray], kept: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)[kept]
    values = np.concatenate(rows) if rows else np.empty(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind))
