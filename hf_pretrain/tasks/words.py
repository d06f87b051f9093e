"""Other words for the words of a text: from a masked language model, or the nearest by their vectors.

[`WordProposer`] finds the words that may change. A word of one token is masked, and the model proposes its likeliest
words; a word of several tokens gets its nearest [`WordNeighbours`].
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.masking import Vocabulary
from hf_pretrain.data.documents.words import character_kinds, next_visible, word_starts
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.metrics import batches_by_length
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.losses import GatheredHead

# Words that are compared with the table at a time.
_QUERIES = 1 << 10
# Of a model and a tokenizer without a longest text, in tokens.
_UNLIMITED = 1 << 20
_APOSTROPHES = set("'\u2019")


@dataclass
class ChangeableWord:
    """A word that may change.

    Attributes:
        row: Number of its text.
        number: Its number among the words of the text.
        begin: Offset of its first character.
        text: The word itself.
        tokens: Positions of its tokens.
        candidates: Words that may replace it.
    """

    row: int
    number: int
    begin: int
    text: str
    tokens: list[int]
    candidates: list[str] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Offset behind its last character."""
        return self.begin + len(self.text)


@dataclass
class WordProposer:
    """Finds the words of texts that may change, and proposes others.

    Args:
        model: A stock masked language model, which proposes for words of one token.
        tokenizer: Its tokenizer, a fast one.
        neighbours: Proposes for words of several tokens.
        stop_words: Words, in lower case, that are left alone.
        num_candidates: Most proposals for a word.
        batch_size: Masked texts in a batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    neighbours: WordNeighbours
    stop_words: Collection[str] = ()
    num_candidates: int = 15
    batch_size: int = 128

    def __post_init__(self) -> None:
        longest = longest_sequence(self.model.base_model) or _UNLIMITED
        self._longest = min(longest, self.tokenizer.model_max_length, _UNLIMITED)
        self._whole_words = whole_words(self.tokenizer)
        self._word_ids = torch.tensor(list(self._whole_words), dtype=torch.int64)

    def __call__(self, texts: Sequence[str]) -> list[ChangeableWord]:
        """Return the words that have candidates, in the order of the texts."""
        encoding = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self._longest,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        ids = [np.array(row, dtype=np.int64) for row in encoding["input_ids"]]
        words = [
            word
            for row, text in enumerate(texts)
            for word in _words(row, text, encoding["offset_mapping"][row], encoding["special_tokens_mask"][row])
            if self._may_change(word, text)
        ]
        self._fill_masks([word for word in words if len(word.tokens) == 1], ids)
        self._find_neighbours([word for word in words if len(word.tokens) > 1])
        return [word for word in words if word.candidates]

    def _may_change(self, word: ChangeableWord, text: str) -> bool:
        """Whether a word is of letters, no stop word and no part of a contraction, such as "don't"."""
        around = text[max(word.begin - 1, 0) : word.begin] + text[word.end : word.end + 1]
        return is_word(word.text) and word.text.lower() not in self.stop_words and _APOSTROPHES.isdisjoint(around)

    def _fill_masks(self, words: list[ChangeableWord], ids: list[np.ndarray]) -> None:
        """Give words the model's likeliest ones where each of them is masked."""
        columns = np.array([word.tokens[0] for word in words], dtype=np.int64)
        originals = np.array([ids[word.row][word.tokens[0]] for word in words], dtype=np.int64)
        masked = [ids[word.row].copy() for word in words]
        for row, column in zip(masked, columns, strict=True):
            row[column] = self.tokenizer.mask_token_id
        batches = batches_by_length(
            masked,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.batch_size,
            device=self.model.device,
            name="Proposing words",
        )
        with GatheredHead(self.model) as head:
            for rows, batch in batches:
                positions = np.arange(len(rows)) * batch["input_ids"].shape[1] + columns[rows]
                logits_BV = head(self.model, torch.from_numpy(positions).to(self.model.device), **batch).float()
                for row, candidates in zip(rows, self._likeliest(logits_BV, originals[rows]), strict=True):
                    words[row].candidates = candidates

    def _likeliest(self, logits_BV: torch.Tensor, original_B: np.ndarray) -> list[list[str]]:  # noqa: N803
        """Return the likeliest whole words of each row, the original not among them, in the order of their ids."""
        device = logits_BV.device
        penalty_V = torch.full((logits_BV.shape[1],), -torch.inf, device=device)
        penalty_V[self._word_ids.to(device)] = 0.0
        allowed_BV = (logits_BV + penalty_V).scatter_(1, torch.from_numpy(original_B)[:, None].to(device), -torch.inf)
        best = allowed_BV.topk(min(self.num_candidates, logits_BV.shape[1]))
        kept = (best.values > -torch.inf).sum(dim=1).tolist()
        # Not by likelihood: where two are about equal, padding decides which comes first.
        ids = [sorted(row[:count]) for row, count in zip(best.indices.tolist(), kept, strict=True)]
        return [[self._whole_words[index] for index in row] for row in ids]

    def _find_neighbours(self, words: list[ChangeableWord]) -> None:
        names = list({word.text: None for word in words})
        near = dict(zip(names, self.neighbours.nearest(names, count=self.num_candidates), strict=True))
        for word in words:
            word.candidates = near[word.text]


def _words(
    row: int, text: str, offsets: Sequence[tuple[int, int]], is_special: Sequence[int]
) -> Iterator[ChangeableWord]:
    """Yield the words of a text that are whole among its tokens, of which the last may have been cut off."""
    kinds = character_kinds(text)
    starts = word_starts(text, kinds=kinds)
    begins = next_visible(kinds, np.array([begin for begin, _ in offsets], dtype=np.int64))
    numbers = np.searchsorted(starts, begins, side="right") - 1
    tokens: dict[int, list[int]] = {}
    for column, number in enumerate(numbers.tolist()):
        if not is_special[column]:
            tokens.setdefault(number, []).append(column)
    bounds = [*starts.tolist(), len(text)]
    for number, columns in tokens.items():
        begin, word = bounds[number], text[bounds[number] : bounds[number + 1]].rstrip()
        if offsets[columns[-1]][1] >= begin + len(word):
            yield ChangeableWord(row, number, begin, word, columns)


class WordNeighbours:
    """The nearest words, by the cosine of their vectors.

    Args:
        words: The words to choose from; those that are not made of letters are left out.
        vectors: ``[len(words), D]``.
        find_vector: Returns the vector of a word, ``[D]``, or None if it has none; by default that in the table, of
            the word as it is or in lower case.
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: np.ndarray | torch.Tensor,
        *,
        find_vector: Callable[[str], torch.Tensor | None] | None = None,
    ) -> None:
        if len(words) != len(vectors):
            raise InputError(
                f"words has {len(words)} entries and vectors {len(vectors)} rows: give a row for each word"
            )
        rows = [row for row, word in enumerate(words) if is_word(word)]
        self.words = [words[row] for row in rows]
        self.vectors = F.normalize(torch.as_tensor(vectors)[rows].float(), dim=1)
        self._rows = {word: row for row, word in reversed(list(enumerate(self.words)))}
        self._find_vector = find_vector or self._vector_of

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> WordNeighbours:
        """Choose from the tokens that are whole words, by a model's embeddings; another word is the mean of its tokens."""
        table = model.get_input_embeddings().weight.detach().float().cpu()
        whole = whole_words(tokenizer)

        def mean_vector(word: str) -> torch.Tensor | None:
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            return table[ids].mean(0) if ids else None

        return cls(list(whole.values()), table[list(whole)], find_vector=mean_vector)

    @classmethod
    def from_file(cls, path: str | Path, *, limit: int = 100_000) -> WordNeighbours:
        """Read vectors in the text format of GloVe or word2vec: a word and its numbers a line.

        Args:
            path: The file.
            limit: At most so many lines, the first.

        Raises:
            InputError: If there is no such file, or a line has other numbers than the first.
        """
        if not Path(path).is_file():
            raise InputError(f"augmentation_vectors={str(path)!r} is no file: name one of word vectors")
        words: list[str] = []
        rows: list[np.ndarray] = []
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(itertools.islice(lines, limit)):
                word, *values = line.rstrip().split(" ")
                if number == 0 and len(values) == 1:
                    continue  # word2vec's count and size
                try:
                    rows.append(np.array(values, dtype=np.float32))
                except ValueError:
                    rows.append(np.empty(0))
                words.append(word)
                if not rows[-1].size or rows[-1].size != rows[0].size:
                    raise InputError(f"{path}, line {number + 1} is no word with as many numbers as the line before")
        return cls(words, np.array(rows))

    def key(self) -> tuple[Any, ...]:
        """Return all that decides the neighbours, for a fingerprint."""
        return self.words, self.vectors.numpy()

    def nearest(self, words: Sequence[str], *, count: int) -> list[list[str]]:
        """Return up to `count` neighbours of each word, the nearest first, itself not among them; none if it has no vector."""
        found: list[list[str]] = [[] for _ in words]
        vectors = {row: vector for row, word in enumerate(words) if (vector := self._find_vector(word)) is not None}
        for begin in range(0, len(vectors), _QUERIES):
            rows = list(vectors)[begin : begin + _QUERIES]
            queries = F.normalize(torch.stack([vectors[row] for row in rows]).float(), dim=1)
            # A few more: the word itself may be among them, in lower and in upper case.
            best = (queries @ self.vectors.T).topk(min(count + 3, len(self.words)), dim=1).indices.tolist()
            for row, columns in zip(rows, best, strict=True):
                names = [self.words[column] for column in columns]
                found[row] = [name for name in names if name.lower() != words[row].lower()][:count]
        return found

    def _vector_of(self, word: str) -> torch.Tensor | None:
        row = self._rows.get(word, self._rows.get(word.lower()))
        return None if row is None else self.vectors[row]


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that are a word of letters on their own, behind a space: id -> word."""
    ids = Vocabulary.from_tokenizer(tokenizer).ordinary_ids.tolist()
    words = {index: text.strip() for index, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True)}
    words = {index: word for index, word in words.items() if is_word(word)}
    again = tokenizer([f" {word}" for word in words.values()], add_special_tokens=False)["input_ids"]
    return {index: word for (index, word), ids in zip(words.items(), again, strict=True) if ids == [index]}


def is_word(text: str) -> bool:
    """Whether a text is made of letters, with their marks."""
    return bool(text) and all(unicodedata.category(character)[0] in "LM" for character in text)
