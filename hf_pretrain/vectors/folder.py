"""Word vectors in memory, and as a folder that three libraries open.

[`WordVectors.save`] writes a folder for `AutoModel.from_pretrained`, `SentenceTransformer` and `model2vec.StaticModel`. All
three give a text of known words the same vector. Unknown words count as zero vectors in the first two, and model2vec leaves
them out: the vectors then have the same direction and differ in length, unless the folder normalizes.

[`WordVectors.open`] opens such a folder, or a file of [`hf_pretrain.vectors.formats`]. [`WordVectors.most_similar`],
[`WordVectors.analogy`] and [`WordVectors.doesnt_match`] answer for words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from hf_pretrain.errors import InputError, check_choice, check_range, one_line
from hf_pretrain.files import plain
from hf_pretrain.models.static_embedding.configuration_static_embedding import StaticEmbeddingConfig
from hf_pretrain.models.static_embedding.modeling_static_embedding import StaticEmbeddingModel
from hf_pretrain.vectors.corpus import SPECIAL_WORDS, word_tokenizer
from hf_pretrain.vectors.formats import read_vectors

AnalogyMethod = Literal["add", "multiply"]
"""3CosAdd and 3CosMul."""

STATISTICS = "pretraining/words.safetensors"
"""Counts and weights of the words in a folder, in the order of their ids; no model needs them."""

_PADDINGS = (SPECIAL_WORDS[0], "<pad>")
_UNKNOWNS = (SPECIAL_WORDS[1], "<unk>")
_EPSILON = 1e-3
_WEIGHTS, _TOKENIZER, _CONFIG = "model.safetensors", "tokenizer.json", "config.json"


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Words and their vectors, from frequent to rare where the order is known.

    Attributes:
        words: ``[V]``, each different.
        vectors: ``float32 [V, D]``.
        counts: ``int64 [V]``, how often each word occurs in the corpus; None if it is not known.
        weights: ``float32 [V]`` above 0, the weight of each word in the mean of a text; None for equal ones.
        tokenizer: Its ids are those of the folder. By default words are split as BERT splits them, and [PAD] is 0, [UNK] is 1.

    Raises:
        InputError: If shapes differ, a word comes twice, or a number is not finite.
    """

    words: tuple[str, ...]
    vectors: np.ndarray
    counts: np.ndarray | None = None
    weights: np.ndarray | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "vectors", np.ascontiguousarray(self.vectors, dtype=np.float32))
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.words) or not self.vectors.size:
            raise InputError(
                f"vectors has the shape {self.vectors.shape} for {len(self.words)} words: give a row of numbers a word"
            )
        if not np.isfinite(self.vectors).all():
            raise InputError("vectors has numbers that are not finite: did the training diverge?")
        if len(self.ids) < len(self.words):
            again = next(word for row, word in enumerate(self.words) if self.ids[word] != row)
            raise InputError(f"words has {again!r} twice: give each word once")
        for name in ("counts", "weights"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, np.asarray(given, dtype=np.int64 if name == "counts" else np.float32))
                if getattr(self, name).shape != (len(self.words),):
                    raise InputError(
                        f"{name} has the shape {np.shape(given)}: give a number for each of the {len(self)} words"
                    )
        if self.weights is not None and not (np.isfinite(self.weights) & (self.weights > 0)).all():
            raise InputError("weights must be finite numbers above 0: a word of no weight would lose its vector")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and self.find(word) is not None

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Number of each word."""
        return {word: row for row, word in enumerate(self.words)}

    @cached_property
    def is_lowercase(self) -> bool:
        """Whether no word has a capital letter; other words are lower-cased then, before they are looked up."""
        return all(word == word.lower() for word in self.words if not word.startswith(("<", "[")))

    @cached_property
    def unit(self) -> np.ndarray:
        """Vectors of length one, ``float32 [V, D]``; a vector of zeros stays one."""
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return self.vectors / np.where(lengths > 0, lengths, 1)

    def find(self, word: str) -> int | None:
        """Return the number of a word, in its own case or as the vocabulary writes it; None if it is unknown."""
        found = self.ids.get(word)
        return self.ids.get(word.lower()) if found is None and self.is_lowercase else found

    def vector(self, word: str) -> np.ndarray:
        """Return the vector of a word, ``float32 [D]``.

        Raises:
            InputError: If the word is unknown.
        """
        return self.vectors[self._row(word)]

    def _row(self, word: str) -> int:
        row = self.find(word)
        if row is None:
            hint = "" if self.is_lowercase or word.lower() not in self.ids else f"; did you mean {word.lower()!r}?"
            raise InputError(f"word={word!r} is none of the {len(self)} words that have a vector{hint}")
        return row

    def most_similar(
        self, word_or_vector: str | np.ndarray, *, top: int = 10, restrict: int | None = None
    ) -> list[tuple[str, float]]:
        """Return the nearest words by cosine.

        Args:
            word_or_vector: A word, which is not its own neighbour, or ``[D]`` numbers.
            top: How many words.
            restrict: Only the first so many words are candidates: the most frequent ones.

        Returns:
            Words and cosines, the nearest first; equal ones in the order of the words.

        Raises:
            InputError: If the word is unknown, or the vector has another width.
        """
        if isinstance(word_or_vector, str):
            row = self._row(word_or_vector)
            return self._best(self.unit[: self._limit(restrict)] @ self.unit[row], without=[row], top=top)
        query = np.asarray(word_or_vector, dtype=np.float32)
        if query.shape != self.vectors.shape[1:] or not np.isfinite(query).all():
            raise InputError(
                f"word_or_vector has the shape {query.shape}: give {self.vectors.shape[1]} finite numbers"
            )
        return self._best(self.unit[: self._limit(restrict)] @ (query / (np.linalg.norm(query) or 1)), top=top)

    def analogy(
        self,
        a: str,
        b: str,
        c: str,
        *,
        method: AnalogyMethod = "add",
        top: int = 10,
        restrict: int | None = None,
    ) -> list[tuple[str, float]]:
        """Return the words that are to `c` as `b` is to `a`: with man, king and woman, queen.

        Args:
            a: A word.
            b: What belongs to it.
            c: Another word. The three are no answers.
            method: "add" for 3CosAdd, "multiply" for 3CosMul.
            top: How many answers.
            restrict: Only the first so many words are candidates.

        Returns:
            Words and scores, the best first.

        Raises:
            InputError: If a word is unknown, or there is no such method.

        Source: Mikolov et al. 2013, "Linguistic Regularities in Continuous Space Word Representations"; Levy and Goldberg 2014,
            "Linguistic Regularities in Sparse and Explicit Word Representations", sections 3 and 6.
        """
        rows = [self._row(word) for word in (a, b, c)]
        cosines = self.unit[rows] @ self.unit[: self._limit(restrict)].T
        return self._best(analogy_scores(*cosines, method=method), without=rows, top=top)

    def doesnt_match(self, words: Sequence[str]) -> str:
        """Return the word that is farthest from the mean of all.

        Args:
            words: Three words or more.

        Raises:
            InputError: If there are fewer, or a word is unknown.
        """
        check_range(len(words), "[3, inf)", name="number of words")
        unit = self.unit[[self._row(word) for word in words]]
        return words[int(np.argmin(unit @ unit.mean(axis=0)))]

    def _limit(self, restrict: int | None) -> int:
        if restrict is None:
            return len(self)
        check_range(restrict, "[1, inf)", name="restrict")
        return min(restrict, len(self))

    def _best(self, scores: np.ndarray, *, top: int, without: Sequence[int] = ()) -> list[tuple[str, float]]:
        check_range(top, "[1, inf)", name="top")
        left = set(without)
        order = np.argsort(-scores, kind="stable")[: top + len(left)]
        return [(self.words[row], float(scores[row])) for row in order if int(row) not in left][:top]

    def save(
        self,
        folder: str | Path,
        *,
        method: str,
        training: Mapping[str, Any],
        lowercase: bool,
        normalize: bool = False,
    ) -> None:
        """Write the folder that `AutoModel`, `SentenceTransformer` and `model2vec.StaticModel` open.

        Weights are multiplied into the vectors there, so that each library has them; [`WordVectors.open`] divides by them.

        Args:
            folder: The folder.
            method: How the vectors were made, such as "skipgram".
            training: Options and facts of the training.
            lowercase: Whether text is lower-cased before its words are looked up; a given tokenizer decides for itself.
            normalize: Whether the vector of a text is divided by its length.

        Raises:
            InputError: If the tokenizer's tokens are not these words.
        """
        tokenizer = fast_tokenizer(self.tokenizer or _word_tokenizer(self.words, lowercase=lowercase))
        tokens = _words_of(tokenizer)
        if set(tokens) != set(self.words):
            odd = next(iter(set(tokens) ^ set(self.words)))
            lacks = "has no vector" if odd in tokens else "is none of the tokenizer's tokens, or a special one"
            raise InputError(
                f"tokenizer and words differ: {odd!r} {lacks}; give a vector for each token, and no other"
            )
        order = [self.ids[word] for word in tokens]
        table = np.zeros((len(tokenizer), self.vectors.shape[1]), dtype=np.float32)
        table[list(tokens.values())] = self._weighted()[order]
        config = StaticEmbeddingConfig(
            vocab_size=len(table),
            hidden_size=table.shape[1],
            normalize=normalize,
            method=method,
            lowercase=lowercase,
            training=plain(dict(training)),
            pad_token_id=tokenizer.pad_token_id,
            unk_token_id=tokenizer.unk_token_id,
            dtype="float32",
        )
        with torch.device("meta"):
            model = StaticEmbeddingModel(config)
        model.embeddings = torch.nn.Parameter(torch.from_numpy(table))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path, known = Path(folder, STATISTICS), {"counts": self.counts, "weights": self.weights}
        path.unlink(missing_ok=True)
        statistics = {name: values[order] for name, values in known.items() if values is not None}
        if statistics:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(statistics, path)

    def _weighted(self) -> np.ndarray:
        return self.vectors if self.weights is None else self.vectors * self.weights[:, None]

    @classmethod
    def open(cls, name_or_path: str | Path) -> WordVectors:
        """Open a folder, a model on the Hub, or a file of word2vec, GloVe or fastText.

        Folders of model2vec and of sentence-transformers' `StaticEmbedding` open too.

        Args:
            name_or_path: Folder, name on the Hub, or file, compressed or not.

        Returns:
            The words in the order of their ids, or of the file.

        Raises:
            InputError: If there is no such file or folder, or it is damaged.
        """
        if Path(name_or_path).is_file():
            return cls(*read_vectors(name_or_path))
        weights, tokens = (path_of(str(name_or_path), file) for file in (_WEIGHTS, _TOKENIZER))
        statistics = _find(str(name_or_path), STATISTICS)
        try:
            tokenizer = Tokenizer.from_file(tokens)
            table = _table(weights)
            known = {} if statistics is None else _tensors(statistics)
        except InputError:
            raise
        except (SafetensorError, OSError) as error:
            raise InputError(f"{str(name_or_path)!r} cannot be read: {one_line(error)}; copy it again") from error
        except Exception as error:  # noqa: BLE001 (tokenizers raises nothing narrower)
            raise InputError(f"{tokens} is no tokenizer: {one_line(error)}; copy it again") from error
        words = _words_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        if max(words.values(), default=0) >= len(table):
            raise InputError(f"{weights} has {len(table)} rows, fewer than {tokens} has tokens: copy the folder again")
        vectors = table[list(words.values())]
        if "weights" in known:
            vectors = vectors / known["weights"][:, None]
        return cls(tuple(words), vectors, known.get("counts"), known.get("weights"), tokenizer)


def fast_tokenizer(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer as transformers has it, without tokens that it would add to a text.

    Args:
        tokenizer: The tokenizer.
        **options: As of `PreTrainedTokenizerFast`.

    Raises:
        InputError: If it has no padding.
    """
    parts = json.loads(tokenizer.to_str()) | dict.fromkeys(("post_processor", "truncation", "padding"))
    names = tokenizer.get_vocab()
    pad, unk = (next((name for name in known if name in names), None) for known in (_PADDINGS, _UNKNOWNS))
    if pad is None:
        raise InputError(f"tokenizer has no {SPECIAL_WORDS[0]}: texts of different lengths need it to share a batch")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        pad_token=pad,
        unk_token=parts["model"].get("unk_token") or unk,
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


def analogy_scores(
    of_a: np.ndarray, of_b: np.ndarray, of_c: np.ndarray, *, method: AnalogyMethod = "add"
) -> np.ndarray:
    """Return how well candidates answer "a is to b as c is to what?"; the inputs are changed.

    Args:
        of_a: ``float32 [..., V]`` cosines of the candidates with a.
        of_b: Those with b.
        of_c: Those with c.
        method: "add": b - a + c; "multiply": b c / (a + 0.001), of cosines moved to the range from 0 to 1.

    Returns:
        ``float32 [..., V]``; the higher, the better.

    Raises:
        InputError: If there is no such method.
    """
    check_choice(method, get_args(AnalogyMethod), name="method")
    if method == "add":
        of_b -= of_a
        of_b += of_c
        return of_b
    for cosines in (of_a, of_b, of_c):
        cosines += 1
        cosines /= 2
        np.maximum(cosines, 0, out=cosines)  # rounding
    of_b *= of_c
    of_a += _EPSILON
    of_b /= of_a
    return of_b


def _word_tokenizer(words: Sequence[str], *, lowercase: bool) -> Tokenizer:
    special = [word for word in SPECIAL_WORDS if word in words]
    if special:
        raise InputError(f"words has {special[0]!r}, the name of a special token: leave it out")
    return word_tokenizer(words, lowercase=lowercase)


def _words_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the tokens that are no special ones, with their ids, in the order of these."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(SPECIAL_WORDS)
    vocabulary = tokenizer.get_vocab()
    return {
        token: vocabulary[token] for token in sorted(vocabulary, key=vocabulary.__getitem__) if token not in special
    }


def path_of(name_or_path: str, file: str) -> str:
    """Return the path of a file of a folder or of a repository.

    Raises:
        InputError: If there is none.
    """
    found = _find(name_or_path, file)
    if found is None:
        raise InputError(
            f"name_or_path={name_or_path!r} is no file, and no folder or repository with {file}: give one of word vectors"
        )
    return found


def _find(name_or_path: str, file: str) -> str | None:
    try:
        found: str | None = cached_file(
            name_or_path,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return found


def _tensors(path: str) -> dict[str, np.ndarray]:
    with safe_open(path, framework="pt") as file:
        return {
            name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
            for name in file.keys()  # noqa: SIM118 (it is no mapping)
            for tensor in (file.get_tensor(name),)
        }


def _table(path: str) -> np.ndarray:
    """Return the row of each id, ``float32 [ids, D]``, of weights under any of the usual keys."""
    tensors = _tensors(path)
    table = tensors.get("embeddings", tensors.get("embedding.weight"))
    if table is None:
        raise InputError(f"{path} has no table of static vectors (embeddings): give a folder of word vectors")
    # model2vec: several tokens may share a row, and have weights.
    table = table[tensors["mapping"]] if "mapping" in tensors else table
    weighted = table * tensors["weights"][:, None] if "weights" in tensors else table
    return np.asarray(weighted, dtype=np.float32)
