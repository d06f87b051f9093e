"""Vectors of texts from the words in them: one-hot, counts, TF-IDF, and latent semantic analysis.

[`SparseTextVectorizer`] and [`LatentTextVectorizer`] are transformers of scikit-learn. Their words are those of
[`hf_pretrain.vectors.corpus.word_tokenizer`]. They are saved as a folder with a configuration, a tokenizer and safetensors.
`AutoModel` opens that of sparse vectors too, as a [`SparseTextModel`].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import normalize as unit_rows
from sklearn.utils.validation import check_is_fitted
from tokenizers import Tokenizer

from hf_pretrain.data.documents.words import encodable
from hf_pretrain.errors import InputError, check_choice, check_range, one_line
from hf_pretrain.files import plain, share_weights, write_text
from hf_pretrain.models.sparse_text.configuration_sparse_text import SparseTextConfig
from hf_pretrain.models.sparse_text.modeling_sparse_text import SparseTextModel
from hf_pretrain.vectors.corpus import SPECIAL_WORDS, WordCorpus, word_tokenizer
from hf_pretrain.vectors.counts import document_counts, latent_vectors, tfidf_weights
from hf_pretrain.vectors.folder import fast_tokenizer, path_of

_METHODS = ("onehot", "counts", "tfidf")
_CONFIG, _TOKENIZER, _WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
# Texts that are encoded together.
_TEXTS = 4096


class SparseTextVectorizer(TransformerMixin, BaseEstimator):
    """One column a word: whether a text holds it, how often, or its TF-IDF.

    Args:
        method: `"onehot"` (1 for each word that a text holds), `"counts"`, or `"tfidf"`.
        idf: Convention of the inverse document frequency of `"tfidf"`: `"sklearn"` or `"textbook"`, see
            [`hf_pretrain.vectors.counts.tfidf_weights`].
        sublinear_tf: Replace a count n by 1 + ln n; not for `"onehot"`.
        normalize: Divide each row by its length. By default only for `"tfidf"`.
        min_df: Documents that hold a word of the vocabulary at least: their number, or their share as a float.
        max_df: Documents that hold a word of the vocabulary at most, likewise.
        max_features: Most words in the vocabulary, the most frequent ones; by default there is no limit.
        lowercase: Lower the case.

    Attributes:
        tokenizer_: Word w has the id w + 2.
        weights_: Weight of each word, `float32 [V]`; ones but for `"tfidf"`.
        num_documents_: Documents that the vectorizer was fitted on.

    Source:
        Salton and Buckley, "Term-weighting approaches in automatic text retrieval" (1988).
    """

    model_type: ClassVar[str] = SparseTextConfig.model_type

    def __init__(
        self,
        method: Literal["onehot", "counts", "tfidf"] = "tfidf",
        *,
        idf: Literal["sklearn", "textbook"] = "sklearn",
        sublinear_tf: bool = False,
        normalize: bool | None = None,
        min_df: float = 1,
        max_df: float = 1.0,
        max_features: int | None = None,
        lowercase: bool = True,
    ) -> None:
        self.method = method
        self.idf = idf
        self.sublinear_tf = sublinear_tf
        self.normalize = normalize
        self.min_df = min_df
        self.max_df = max_df
        self.max_features = max_features
        self.lowercase = lowercase

    def fit(self, texts: Iterable[str], y: Any = None) -> Self:
        """Choose the vocabulary and weigh its words.

        Args:
            texts: The documents.
            y: Not used.

        Returns:
            The vectorizer.

        Raises:
            InputError: If an option is out of range or has no effect, a text is no string, or no word is left.
        """
        self._fit(texts)
        return self

    def _fit(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """Take the vocabulary and the weights from texts; return how often each of them holds each word."""
        self._check_options()
        with TemporaryDirectory() as folder:
            corpus = WordCorpus.build(
                lambda: _checked(texts), folder=Path(folder), min_count=1, lowercase=self.lowercase
            )
            counts, known = document_counts(corpus), corpus.vocabulary
        found = self._kept(known.document_counts, known.documents)
        # In the order of scikit-learn's columns.
        kept = sorted(found.tolist(), key=known.words.__getitem__)
        self.tokenizer_ = word_tokenizer([known.words[number] for number in kept], lowercase=self.lowercase)
        self.num_documents_ = known.documents
        weights = np.ones(len(kept))
        if self.method == "tfidf":
            weights = tfidf_weights(known.document_counts[kept], known.documents, convention=self.idf)
        self.weights_ = weights.astype(np.float32)
        return counts[:, kept].astype(np.float64)

    def _kept(self, in_documents: np.ndarray, documents: int) -> np.ndarray:
        """Return the numbers of the words of the vocabulary, which are sorted from frequent to rare."""
        limits = []
        for name in ("min_df", "max_df"):
            limit = getattr(self, name)
            is_share = isinstance(limit, float)
            check_range(
                limit, "[0, 1]" if is_share else "[1, inf)", name=name, hint="a number of documents, or a share"
            )
            limits.append(limit * documents if is_share else limit)
        if self.max_features is not None:
            check_range(self.max_features, "[1, inf)", name="max_features")
        kept = np.flatnonzero((in_documents >= limits[0]) & (in_documents <= limits[1]))[: self.max_features]
        if not len(kept):
            raise InputError(
                f"texts, {documents} of them, leave no vocabulary: no word is in {limits[0]:g} to {limits[1]:g} of them; "
                "change min_df or max_df"
            )
        return kept

    def transform(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """Return the vectors of texts; words outside of the vocabulary are left out.

        Args:
            texts: The texts.

        Returns:
            `float64 [N, V]`.

        Raises:
            InputError: If a text is no string.
        """
        return self._sparse(texts)

    def _sparse(self, texts: Iterable[str]) -> sparse.csr_matrix:
        check_is_fitted(self, "weights_")
        return self._weighted(_counts(self.tokenizer_, list(_checked(texts)), len(self.weights_)))

    def _weighted(self, table: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return the vectors of texts with these counts, which are changed."""
        if self.method == "onehot":
            table.data[:] = 1
        if self.sublinear_tf:
            table.data = np.log(table.data) + 1
        if self.method == "tfidf":
            table.data *= self.weights_.astype(np.float64)[table.indices]
            table.eliminate_zeros()
        is_unit = self.method == "tfidf" if self.normalize is None else self.normalize
        return unit_rows(table, norm="l2", copy=False) if is_unit else table

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the name of each column.

        Args:
            input_features: Not used.
        """
        check_is_fitted(self, "weights_")
        return np.array(
            [self.tokenizer_.id_to_token(n + len(SPECIAL_WORDS)) for n in range(len(self.weights_))], object
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a configuration, a tokenizer and weights, which `AutoModel` and `AutoTokenizer` open too.

        Args:
            folder: Made if need be.
        """
        check_is_fitted(self, "weights_")
        config = SparseTextConfig(
            **plain(self.get_params()),
            documents=self.num_documents_,
            vocab_size=self.tokenizer_.get_vocab_size(),
            hidden_size=len(self.weights_),
            first_word_id=len(SPECIAL_WORDS),
            dtype="float32",
        )
        with torch.device("meta"):
            model = SparseTextModel(config)
        model.weights = torch.nn.Parameter(torch.from_numpy(self.weights_))
        model.save_pretrained(folder)
        # The text "[UNK]" is three words.
        fast_tokenizer(self.tokenizer_, split_special_tokens=True).save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Return the vectorizer of a folder or of a model on the Hub; it gives the same vectors bit for bit.

        Args:
            folder: Where `save_pretrained` wrote it, or a name on the Hub.

        Raises:
            InputError: If the folder holds none, or one of another kind.
        """
        try:
            paths = {name: path_of(str(folder), name) for name in (_CONFIG, _TOKENIZER, _WEIGHTS)}
            config = json.loads(Path(paths[_CONFIG]).read_text(encoding="utf-8"))
            if config.get("model_type") == cls.model_type:
                vectorizer = cls(**{name: config[name] for name in cls().get_params()})
                vectorizer._check_options()
                vectorizer.num_documents_ = config["documents"]
                ids = Tokenizer.from_file(paths[_TOKENIZER]).get_vocab()
                words = sorted(ids, key=ids.__getitem__)[len(SPECIAL_WORDS) :]
                # Anew: in the file the names of special words are no text.
                vectorizer.tokenizer_ = word_tokenizer(words, lowercase=vectorizer.lowercase)
                vectorizer._take(load_file(paths[_WEIGHTS]), len(words))
                return vectorizer
        except Exception as error:  # noqa: BLE001 (tokenizers raises bare ones)
            raise InputError(
                f"folder={str(folder)!r} holds no whole vectorizer: {one_line(error)}; save_pretrained writes one"
            ) from error
        raise InputError(
            f"folder={str(folder)!r} has model_type {config.get('model_type')!r}: {cls.__name__} opens {cls.model_type!r}"
        )

    def _take(self, tensors: dict[str, np.ndarray], num_words: int) -> None:
        """Take the tensors of a file; raise if they do not fit the tokenizer."""
        self.weights_ = tensors["weights"]
        if self.weights_.shape != (num_words,):
            raise ValueError(f"weights of shape {self.weights_.shape} do not fit {num_words} words of {_TOKENIZER}")

    def _check_options(self) -> None:
        check_choice(self.method, _METHODS, name="method")
        check_choice(self.idf, ("sklearn", "textbook"), name="idf")
        if self.idf != "sklearn" and self.method != "tfidf":
            raise InputError(f"idf={self.idf!r} has no effect with method={self.method!r}: leave it out")
        if self.sublinear_tf and self.method == "onehot":
            raise InputError("sublinear_tf=True has no effect with method='onehot': leave it out")


class LatentTextVectorizer(SparseTextVectorizer):
    """Latent semantic analysis of texts: dense vectors from the singular value decomposition of weighted counts.

    A text x has the vector x V Σ^(power - 1). For a text of the decomposed ones this is its row of U Σ^power; another text is
    folded in and does not change the space.

    Args:
        dimensions: Width of the vectors, k.
        power: Exponent of the singular values: 1 keeps the inner products of the texts, 0 weighs all dimensions alike.
        exact: Let ARPACK iterate until it converges, instead of a random projection with four power iterations.
        seed: Seed of the random projection.
        method: Weights before the decomposition; this and the rest as in [`SparseTextVectorizer`].
        idf: Likewise.
        sublinear_tf: Likewise.
        normalize: Likewise, of the rows before the decomposition.
        min_df: Likewise.
        max_df: Likewise.
        max_features: Likewise.
        lowercase: Likewise.

    Attributes:
        components_: V^T, `float32 [k, V]`.
        singular_values_: Σ, `float32 [k]`.

    Source:
        Deerwester et al., "Indexing by latent semantic analysis" (1990); folding in: its equation for pseudo-documents.
    """

    model_type: ClassVar[str] = "latent_text_vectors"

    def __init__(
        self,
        dimensions: int = 100,
        *,
        power: float = 1.0,
        exact: bool = False,
        seed: int = 0,
        method: Literal["onehot", "counts", "tfidf"] = "tfidf",
        idf: Literal["sklearn", "textbook"] = "sklearn",
        sublinear_tf: bool = False,
        normalize: bool | None = None,
        min_df: float = 1,
        max_df: float = 1.0,
        max_features: int | None = None,
        lowercase: bool = True,
    ) -> None:
        super().__init__(
            method,
            idf=idf,
            sublinear_tf=sublinear_tf,
            normalize=normalize,
            min_df=min_df,
            max_df=max_df,
            max_features=max_features,
            lowercase=lowercase,
        )
        self.dimensions = dimensions
        self.power = power
        self.exact = exact
        self.seed = seed

    def fit(self, texts: Iterable[str], y: Any = None) -> Self:
        """Choose the vocabulary, weigh the words, and decompose the matrix of the texts.

        Args:
            texts: The documents.
            y: Not used.

        Returns:
            The vectorizer.

        Raises:
            InputError: If an option is out of range, a text is no string, or the texts have fewer dimensions than asked.
        """
        latent = latent_vectors(
            self._weighted(self._fit(texts)),
            dimensions=self.dimensions,
            power=self.power,
            seed=self.seed,
            exact=self.exact,
        )
        self.components_ = np.ascontiguousarray(latent.components, dtype=np.float32)
        self.singular_values_ = latent.singular_values.astype(np.float32)
        return self

    def transform(self, texts: Iterable[str]) -> np.ndarray:
        """Return the vectors of texts.

        Args:
            texts: The texts.

        Returns:
            `float64 [N, k]`; a text without a known word has zeros.

        Raises:
            InputError: If a text is no string.
        """
        table = self._sparse(texts)
        scale = self.singular_values_.astype(np.float64) ** (self.power - 1)
        return np.asarray(table @ self.components_.T.astype(np.float64)) * scale

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the name of each column.

        Args:
            input_features: Not used.
        """
        check_is_fitted(self, "components_")
        return np.array([f"latent{number}" for number in range(len(self.singular_values_))], dtype=object)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `tokenizer.json` and `model.safetensors`.

        Args:
            folder: Made if need be.
        """
        check_is_fitted(self, "components_")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": self.model_type, **plain(self.get_params()), "documents": self.num_documents_}
        write_text(folder / _CONFIG, json.dumps(config, indent=2) + "\n")
        self.tokenizer_.save(str(folder / _TOKENIZER))
        tensors = {"weights": self.weights_, "components": self.components_, "singular_values": self.singular_values_}
        save_file(tensors, folder / _WEIGHTS)
        share_weights(folder)

    def _take(self, tensors: dict[str, np.ndarray], num_words: int) -> None:
        super()._take(tensors, num_words)
        self.components_, self.singular_values_ = tensors["components"], tensors["singular_values"]
        if self.components_.shape != (len(self.singular_values_), num_words):
            raise ValueError(f"components of shape {self.components_.shape} do not fit {num_words} words")


def _checked(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise InputError(f"texts={texts[:40]!r} is one string: pass a list of texts")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts[{number}]={str(text)[:40]} is {type(text).__name__}, not a string: leave it out")
        yield encodable(text)


def _counts(tokenizer: Tokenizer, texts: list[str], num_words: int) -> sparse.csr_matrix:
    """Return how often each text holds each word: `float64 [N, V]`."""
    ids, lengths = [np.empty(0, dtype=np.int64)], [0]
    for begin in range(0, len(texts), _TEXTS):
        for encoding in tokenizer.encode_batch_fast(texts[begin : begin + _TEXTS], add_special_tokens=False):
            known = np.array(encoding.ids, dtype=np.int64) - len(SPECIAL_WORDS)
            ids.append(known[known >= 0])
            lengths.append(len(ids[-1]))
    columns = np.concatenate(ids)
    table = sparse.csr_matrix((np.ones(len(columns)), columns, np.cumsum(lengths)), shape=(len(texts), num_words))
    table.sum_duplicates()
    return table
