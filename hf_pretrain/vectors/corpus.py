"""A corpus as ids of words on disk, with the bounds of its lines and documents.

The text is read once. Every piece between white space is cut into words by the tokenizer the first time it occurs; later it is
looked up. All words have a provisional id, which goes to a file as the text comes. The vocabulary is chosen when all is counted,
and the file is then written again with the ids of the vocabulary. Memory holds the distinct words and one document, not the text.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm.auto import tqdm

from hf_pretrain.data.documents.words import code_points, encodable
from hf_pretrain.errors import InputError, check_range, one_line
from hf_pretrain.files import MARKER, PART, begin_folder, first_difference, read_marker, write_marker

SPECIAL_WORDS = ("[PAD]", "[UNK]")
"""The first words of the tokenizer, which have no vector; word w of the vocabulary has the tokenizer's id w + 2."""

_FORMAT = 1
_ARRAYS = {
    "tokens": np.int32,
    "lines": np.int64,
    "documents": np.int64,
    "counts": np.int64,
    "document_counts": np.int64,
}
_TOKENIZER = "tokenizer.json"
_RAW = ("words", "lines", "documents")
# Characters of text that are looked up together; most distinct pieces that are kept, about 200 bytes each; and pieces that are
# cut in one call.
_CHARACTERS, _KNOWN_PIECES, _CUT = 1 << 23, 1 << 21, 500
# Ids that are translated together; a longer document is one part.
_IDS = 1 << 22
# Arrow splits at these, the tokenizer does not.
_SEPARATORS = "\x1c\x1d\x1e\x1f"
_WITHOUT_SEPARATORS = str.maketrans("", "", _SEPARATORS)
# Control and format characters, but for white space and the joiners of letters; U+FFFD; selectors of glyphs.
_INVISIBLE = r"[[\p{Cc}\p{Cf}\x{fffd}\x{fe00}-\x{fe0f}\x{e0100}-\x{e01ef}]&&[^\s\x{200c}\x{200d}]]"


def word_tokenizer(words: Sequence[str], *, lowercase: bool = True) -> Tokenizer:
    """Return a tokenizer that cuts a text into words and gives each its id.

    White space and zero-width spaces separate words. A punctuation character is a word, and so is an ideograph; other scripts
    that are written without spaces, such as Thai, stay uncut. A combining mark stays with its letter (NFC). Control and format
    characters are deleted, joiners of letters are not.

    Args:
        words: The words in the order of their ids; the ids begin behind those of `SPECIAL_WORDS`.
        lowercase: Lower the case.

    Returns:
        A `WordLevel` tokenizer. The text "[UNK]" is three words for it, not a special token.

    Source:
        Devlin et al., "BERT" (2019), `BasicTokenizer` of the official code, for the words.
    """
    ids = {word: number for number, word in enumerate((*SPECIAL_WORDS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL_WORDS[1]))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\x{200b}"), " "),
            normalizers.Replace(Regex(_INVISIBLE), ""),
            normalizers.NFC(),
            normalizers.BertNormalizer(
                clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=lowercase
            ),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


@dataclass(frozen=True, eq=False)
class WordVocabulary:
    """The words of a corpus that have vectors, and how often they occur.

    Attributes:
        words: The words, from frequent to rare; those of equal counts in the order of their code points.
        counts: How often each word occurs in the corpus, `int64 [V]`.
        total: Words of the corpus, those outside of the vocabulary too.
        documents: Documents of the corpus, empty ones too.
        document_counts: Documents that hold each word, `int64 [V]`.
    """

    words: tuple[str, ...]
    counts: np.ndarray
    total: int
    documents: int
    document_counts: np.ndarray

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each word."""
        return {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True, eq=False)
class WordCorpus:
    """The known words of a corpus in their order, and where its lines and documents begin.

    Unknown words are left out: they take up no distance between their neighbours, as in word2vec and GloVe.

    Attributes:
        vocabulary: The words.
        tokens: Ids of the known words, `int32 [n]`; memory-mapped if the corpus is in a folder.
        lines: Bounds of the lines in `tokens`, `int64 [L + 1]`, ascending from 0 to n; a line without a known word is left out.
        documents: Bounds of the documents in `tokens`, `int64 [D + 1]`; a document without a known word is an empty one.
        tokenizer: Cuts texts into the same words; see [`word_tokenizer`].
    """

    vocabulary: WordVocabulary
    tokens: np.ndarray
    lines: np.ndarray
    documents: np.ndarray
    tokenizer: Tokenizer

    @classmethod
    def build(
        cls,
        texts: Callable[[], Iterable[str]],
        *,
        folder: Path,
        min_count: int = 5,
        max_words: int | None = None,
        lowercase: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> WordCorpus:
        """Count the words of texts and write their ids to a folder.

        Args:
            texts: Returns the documents, which may be more than fit in memory; called once. A newline ends a line.
            folder: Where the corpus is kept: a new or an empty folder, or one that an interrupted call left. While it is
                written, it takes 4 bytes a word twice.
            min_count: How often a word of the vocabulary occurs at least.
            max_words: Most words in the vocabulary, the most frequent ones; by default there is no limit.
            lowercase: Lower the case.
            tokenizer: Cuts each stretch between white space into tokens, which take the place of words; special tokens are left
                out. By default words are those of [`word_tokenizer`].

        Returns:
            The corpus, its arrays memory-mapped. Of tokens its own tokenizer has the spelling alone: it cuts no text into them.

        Raises:
            InputError: If there is no word, none occurs `min_count` times, or the folder holds something else.
        """
        check_range(min_count, "[1, inf)", name="min_count", hint="5 is usual")
        if max_words is not None:
            check_range(max_words, "[1, inf)", name="max_words")
        folder = Path(folder)
        _check_free(folder)
        begin_folder(folder)
        try:
            cutter = word_tokenizer((), lowercase=lowercase) if tokenizer is None else tokenizer
            numbered = _number(texts(), folder, _Pieces(cutter, into_tokens=tokenizer is not None))
            words, new_ids = _choose(numbered.words, numbered.counts, min_count=min_count, max_words=max_words)
            counts = np.sort(numbered.counts[new_ids >= 0])[::-1]
            np.save(folder / "counts.npy", counts)
            _renumber(folder, new_ids, counts)
        finally:
            for name in _RAW:
                _raw(folder, name).unlink(missing_ok=True)
        word_tokenizer(words, lowercase=lowercase).save(str(folder / _TOKENIZER))
        facts: dict[str, Any] = {"min_count": min_count, "max_words": max_words, "lowercase": lowercase}
        write_marker(folder, format=_FORMAT, total=int(numbered.counts.sum()), **facts)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> WordCorpus:
        """Open the corpus of a folder without reading it into memory.

        Args:
            folder: Where [`WordCorpus.build`] wrote it.

        Raises:
            InputError: If the folder holds no whole corpus.
        """
        folder = Path(folder)
        facts = read_marker(folder)
        if facts is None or facts.get("format") != _FORMAT or "total" not in facts:
            raise InputError(f"folder={str(folder)!r} holds no whole corpus of words: WordCorpus.build writes one")
        wrong = first_difference(folder, facts["files"])
        try:
            if wrong is None:
                return cls._read(folder, total=int(facts["total"]))
        except Exception as error:  # noqa: BLE001 (tokenizers raises bare ones)
            wrong = one_line(error)
        raise InputError(
            f"folder={str(folder)!r} holds a damaged corpus: {wrong}; remove it and build the corpus again"
        )

    @classmethod
    def _read(cls, folder: Path, *, total: int) -> WordCorpus:
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "tokens" else None) for name in _ARRAYS
        }
        tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        ids = tokenizer.get_vocab()
        words = tuple(sorted(ids, key=ids.__getitem__)[len(SPECIAL_WORDS) :])
        num_documents = len(arrays["documents"]) - 1
        vocabulary = WordVocabulary(words, arrays["counts"], total, num_documents, arrays["document_counts"])
        corpus = cls(vocabulary, arrays["tokens"], arrays["lines"], arrays["documents"], tokenizer)
        for name, kind in _ARRAYS.items():
            if arrays[name].dtype != kind or arrays[name].ndim != 1:
                raise ValueError(f"{name}.npy is no list of {np.dtype(kind).name}")
        corpus._check()
        return corpus

    def _check(self) -> None:
        """Raise if arrays contradict each other: an id out of range would be read beyond the end of a matrix."""
        size = len(self.vocabulary)
        for name, bounds in (("lines", self.lines), ("documents", self.documents)):
            if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(self.tokens) or (np.diff(bounds) < 0).any():
                raise ValueError(f"{name}.npy holds no bounds of {len(self.tokens)} words")
        if len(self.vocabulary.counts) != size or len(self.vocabulary.document_counts) != size:
            raise ValueError(f"counts.npy, document_counts.npy and {_TOKENIZER} differ in their number of words")
        if self.vocabulary.counts.sum() != len(self.tokens) or self.tokens.min() < 0 or self.tokens.max() >= size:
            raise ValueError("tokens.npy does not fit counts.npy")

    @classmethod
    def from_words(cls, documents: Sequence[Sequence[Sequence[str]]], *, min_count: int = 1) -> WordCorpus:
        """Return a corpus in memory.

        Args:
            documents: The words of each line of each document, as they are to be counted.
            min_count: How often a word of the vocabulary occurs at least.

        Raises:
            InputError: If there is no word, or none occurs `min_count` times.
        """
        check_range(min_count, "[1, inf)", name="min_count")
        numbers: dict[str, int] = defaultdict(itertools.count().__next__)
        ids = np.array([numbers[word] for lines in documents for line in lines for word in line], dtype=np.int32)
        taken = next((word for word in SPECIAL_WORDS if word in numbers), None)
        if taken is not None:
            raise InputError(f"documents hold the word {taken!r}, which is the tokenizer's own: leave it out")
        counts = np.bincount(ids, minlength=len(numbers))
        words, new_ids = _choose(list(numbers), counts, min_count=min_count)
        known = new_ids[ids]
        before = np.concatenate([[0], np.cumsum(known >= 0)])
        line_ends = np.cumsum([0, *(len(line) for lines in documents for line in lines)])
        document_ends = np.cumsum([0, *(sum(map(len, lines)) for lines in documents)])
        tokens, bounds = known[known >= 0].astype(np.int32), before[document_ends]
        vocabulary = WordVocabulary(
            tuple(words),
            np.bincount(tokens, minlength=len(words)),
            len(ids),
            len(documents),
            _documents_of_words(tokens, bounds, len(words)),
        )
        return cls(vocabulary, tokens, _distinct(before[line_ends]), bounds, word_tokenizer(words, lowercase=False))


def _check_free(folder: Path) -> None:
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        if MARKER in names:
            raise InputError(f"folder={str(folder)!r} holds another corpus or result: name a new folder, or remove it")
        if names and MARKER + PART not in names:
            raise InputError(f"folder={str(folder)!r} holds {names[0]!r}: name a new or an empty folder")
    elif folder.exists():
        raise InputError(f"folder={str(folder)!r} is a file: name a new folder")


class _Numbered(NamedTuple):
    """The distinct words in the order of their provisional ids, and their counts."""

    words: list[str]
    counts: np.ndarray


class _Pieces:
    """Words of the pieces of text between white space, each cut once.

    Provisional ids of words follow the order in which the words occur first.
    """

    def __init__(self, tokenizer: Tokenizer, *, into_tokens: bool = False) -> None:
        self._tokenizer, self._into_tokens = tokenizer, into_tokens
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._special |= set(SPECIAL_WORDS)
        self.words: dict[str, int] = defaultdict(itertools.count().__next__)
        self._forget()

    def _forget(self) -> None:
        self._pieces: dict[str, int] = defaultdict(itertools.count().__next__)
        self._flat = np.empty(0, dtype=np.int32)
        self._begins = np.zeros(1, dtype=np.int64)

    def ids(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all words of lines, `int32 [n]`, and how many words each line has, `int64 [L]`."""
        pieces = pc.utf8_split_whitespace(pa.array(lines, type=pa.large_string()))
        distinct = pieces.flatten().dictionary_encode()
        names = distinct.dictionary.to_pylist()
        numbers = np.fromiter(map(self._pieces.__getitem__, names), dtype=np.int64, count=len(names))
        num_new = len(self._pieces) - (len(self._begins) - 1)
        lengths, flat = self._cut(list(itertools.islice(reversed(self._pieces), num_new))[::-1])
        self._begins = np.concatenate([self._begins, self._begins[-1] + np.cumsum(lengths)])
        self._flat = np.concatenate([self._flat, flat])
        numbers = numbers[distinct.indices.to_numpy(zero_copy_only=False)] if names else numbers
        first, lengths = self._begins[numbers], np.diff(self._begins)[numbers]
        # The words of piece p are at first[p], first[p] + 1, ...
        before = np.concatenate([[0], np.cumsum(lengths)])
        ids = self._flat[np.arange(before[-1]) + np.repeat(first - before[:-1], lengths)]
        if len(self._pieces) > _KNOWN_PIECES:
            self._forget()
        return ids, np.diff(before[pieces.offsets.to_numpy()])

    def _cut(self, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return how many words each piece has, and the ids of all."""
        lengths, flat = [np.empty(0, dtype=np.int64)], list[int]()
        for begin in range(0, len(pieces), _CUT):
            group = pieces[begin : begin + _CUT]
            if self._into_tokens:
                # Behind a space, as in a text.
                encodings = self._tokenizer.encode_batch([f" {piece}" for piece in group], add_special_tokens=False)
                tokens = [[token for token in each.tokens if token not in self._special] for each in encodings]
                lengths.append(np.array([len(each) for each in tokens], dtype=np.int64))
                flat += [self.words[token] for each in tokens for token in each]
                continue
            text = self._tokenizer.normalizer.normalize_str("\n".join(group))
            cut = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
            ends = np.flatnonzero(code_points(text) == ord("\n"))
            owners = np.searchsorted(ends, np.array([start for _, (start, _) in cut], dtype=np.int64))
            lengths.append(np.bincount(owners, minlength=len(group)))
            flat += [self.words[word] for word, _ in cut]
        return np.concatenate(lengths), np.array(flat, dtype=np.int32)


def _number(texts: Iterable[str], folder: Path, pieces: _Pieces) -> _Numbered:
    """Write the provisional ids of all words, and the lengths of lines and documents in words, to files."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    with ExitStack() as stack:
        files = {name: stack.enter_context(_raw(folder, name).open("wb")) for name in _RAW}
        for lines, document_ends in _batches(texts):
            ids, lengths = pieces.ids(lines)
            before = np.concatenate([[0], np.cumsum(lengths)])
            ids.tofile(files["words"])
            lengths.tofile(files["lines"])
            np.diff(before[[0, *document_ends]]).tofile(files["documents"])
            if len(pieces.words) > len(counts):
                counts = np.concatenate([counts, np.zeros(2 * len(pieces.words) - len(counts), dtype=np.int64)])
            counts += np.bincount(ids, minlength=len(counts))
    return _Numbered(list(pieces.words), counts[: len(pieces.words)])


def _batches(texts: Iterable[str]) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the lines of whole documents, and at which of them documents end."""
    lines: list[str] = []
    document_ends: list[int] = []
    num_characters = 0
    for text in tqdm(texts, desc="Counting words", unit=" documents", delay=2, disable=None):
        if not isinstance(text, str):
            raise InputError(
                f"texts hold {type(text).__name__} {str(text)[:40]!r}: each must be the text of a document"
            )
        text = encodable(text)
        if not text.isprintable() and any(separator in text for separator in _SEPARATORS):
            text = text.translate(_WITHOUT_SEPARATORS)
        lines += text.split("\n")
        document_ends.append(len(lines))
        num_characters += len(text)
        if num_characters >= _CHARACTERS:
            yield lines, document_ends
            lines, document_ends, num_characters = [], [], 0
    yield lines, document_ends


def _choose(
    words: list[str], counts: np.ndarray, *, min_count: int, max_words: int | None = None
) -> tuple[list[str], np.ndarray]:
    """Return the words of the vocabulary, and for each provisional id the final one, -1 if it is not in there."""
    if not words:
        raise InputError("texts hold no word: there is nothing but white space in them")
    kept = np.flatnonzero(counts >= min_count).tolist()
    if not kept:
        most = int(counts.max())
        raise InputError(f"min_count={min_count}: no word occurs so often; at most min_count={most} leaves a word")
    kept.sort(key=lambda number: (-counts[number], words[number]))
    new_ids = np.full(len(words), -1, dtype=np.int32)
    new_ids[kept[:max_words]] = np.arange(len(kept[:max_words]), dtype=np.int32)
    return [words[number] for number in kept[:max_words]], new_ids


def _renumber(folder: Path, new_ids: np.ndarray, counts: np.ndarray) -> None:
    """Write the tokens and bounds of the known words, and count the documents of each."""
    old = np.memmap(_raw(folder, "words"), dtype=np.int32, mode="r")
    lines, documents = (np.fromfile(_raw(folder, name), dtype=np.int64) for name in ("lines", "documents"))
    line_ends, document_ends = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in (lines, documents))
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.int32, shape=(int(counts.sum()),))
    document_counts = np.zeros(len(counts), dtype=np.int64)
    new_line_ends, new_document_ends = np.zeros_like(line_ends), np.zeros_like(document_ends)
    num_known = 0
    for low, high in _parts(document_ends):
        first, last = document_ends[low], document_ends[high]
        known = new_ids[old[first:last]]
        before = num_known + np.concatenate([[0], np.cumsum(known >= 0)])
        for ends, new_ends in ((line_ends, new_line_ends), (document_ends, new_document_ends)):
            part = slice(*np.searchsorted(ends, [first, last], side="right"))
            new_ends[part] = before[ends[part] - first]
        known = known[known >= 0]
        tokens[num_known : num_known + len(known)] = known
        num_known += len(known)
        document_counts += _documents_of_words(known, new_document_ends[low : high + 1], len(counts))
    tokens.flush()
    np.save(folder / "lines.npy", _distinct(new_line_ends))
    np.save(folder / "documents.npy", new_document_ends)
    np.save(folder / "document_counts.npy", document_counts)


def _parts(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the first document and the one after the last of parts that have about `_IDS` words."""
    low = 0
    while low < len(ends) - 1:
        high = max(low + 1, int(np.searchsorted(ends, ends[low] + _IDS, side="right")) - 1)
        yield low, high
        low = high


def _documents_of_words(tokens: np.ndarray, bounds: np.ndarray, num_words: int) -> np.ndarray:
    """Return how many documents hold each word; the bounds of the documents begin at the first token."""
    number = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    # Faster than `np.unique`, which hashes.
    keys = np.sort(number * num_words + tokens)
    is_first = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
    return np.bincount(keys[is_first] % num_words, minlength=num_words)


def _distinct(bounds: np.ndarray) -> np.ndarray:
    """Leave out bounds that equal the one before."""
    return bounds[np.concatenate([[True], np.diff(bounds) > 0])]


def _raw(folder: Path, name: str) -> Path:
    return folder / f"{name}.raw"
