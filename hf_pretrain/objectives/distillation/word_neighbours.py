"""Words near others: by the vectors of a table, or by a model's own embeddings."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.vocabulary import Vocabulary
from hf_pretrain.errors import InputError

_QUERIES = 1 << 10


class WordNeighbours:
    """The nearest words, by the cosine of their vectors.

    Args:
        words: The words to choose from; those that are not made of letters are left out.
        vectors: ``[len(words), D]``.
        find_vector: Returns the vector of a word, ``[D]``, or None if it has none; by default that in the table, of the word as
            it is or in lower case.
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
        """Return what decides the neighbours, for a fingerprint."""
        return self.words, self.vectors.numpy()

    def nearest(self, words: Sequence[str], *, count: int) -> list[list[str]]:
        """Return up to `count` neighbours of each word, the nearest first, itself not among them; none if it has no vector."""
        found: list[list[str]] = [[] for _ in words]
        vectors = {row: vector for row, word in enumerate(words) if (vector := self._find_vector(word)) is not None}
        for begin in range(0, len(vectors), _QUERIES):
            rows = list(vectors)[begin : begin + _QUERIES]
            queries = F.normalize(torch.stack([vectors[row] for row in rows]).float(), dim=1)
            # More than asked for: the word itself may be there, in lower and in upper case.
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
    if not words:
        return words
    again = tokenizer([f" {word}" for word in words.values()], add_special_tokens=False)["input_ids"]
    return {index: word for (index, word), ids in zip(words.items(), again, strict=True) if ids == [index]}


def is_word(text: str) -> bool:
    """Whether a text is made of letters, with their marks."""
    return bool(text) and all(unicodedata.category(character)[0] in "LM" for character in text)
