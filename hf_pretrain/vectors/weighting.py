"""From counts to weights, and from weights to dense vectors: PMI, TF-IDF, and the singular value decomposition.

A matrix of words and contexts becomes PPMI and then vectors (`pmi_matrix`, `latent_vectors`); a matrix of documents and words
is weighted by TF-IDF (`tfidf_weights`) and decomposed by the same function: latent semantic analysis.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd

from hf_pretrain.data.draws import generator_seed
from hf_pretrain.errors import InputError, check_choice, check_range

_POWER_ITERATIONS, _OVERSAMPLES = 4, 10
# ARPACK's start vector and scikit-learn's projections take seeds of 32 bits.
_SEED_BITS = 31


class LatentVectors(NamedTuple):
    """The largest singular vectors of a matrix.

    Attributes:
        vectors: U Σ^power, `[N, k]`.
        singular_values: Σ, from large to small, `[k]`.
        components: The right singular vectors V^T, `[k, C]`.
    """

    vectors: np.ndarray
    singular_values: np.ndarray
    components: np.ndarray


def pmi_matrix(
    counts: sparse.csr_matrix, *, positive: bool = True, shift: float = 1.0, smoothing: float = 1.0
) -> sparse.csr_matrix:
    """Return the pointwise mutual information of words and contexts: ln p(w, c) / (p(w) p(c)) - ln shift.

    Pairs that do not occur stay zero. So only with `positive` is the matrix what the formula says for all pairs; without it a
    pair that never occurs, whose PMI is minus infinity, counts as independent.

    Args:
        counts: How often each pair occurs, `[V, C]`.
        positive: Set negative values to zero (PPMI).
        shift: Subtract the logarithm of this number; skip-gram with k negative samples factorizes the matrix of shift k.
        smoothing: Exponent of the contexts' counts in p(c): 0.75 lessens the weight of rare contexts.

    Returns:
        `float64 [V, C]`, without stored zeros.

    Raises:
        InputError: If a count is negative or not finite, there is none, or an option is out of range.

    Source:
        Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization" (2014), 3; smoothing: Levy, Goldberg and
        Dagan, "Improving Distributional Similarity with Lessons Learned from Word Embeddings" (2015), 3.2.
    """
    check_range(shift, "(0, inf)", name="shift", hint="1 shifts nothing")
    check_range(smoothing, "[0, 1]", name="smoothing", hint="0.75 is usual, 1 smooths nothing")
    table = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    table.sum_duplicates()
    table.eliminate_zeros()
    if table.nnz == 0 or not np.isfinite(table.data).all() or table.data.min() < 0:
        raise InputError(f"counts of shape {table.shape} must be finite, not negative, and not all zero")
    words = np.asarray(table.sum(axis=1), dtype=np.float64).ravel()
    contexts = np.asarray(table.sum(axis=0), dtype=np.float64).ravel()
    # A context that never occurs stays at zero, also with an exponent of zero.
    contexts = np.where(contexts > 0, contexts**smoothing, 0)
    # Whole numbers below 2**53 make the quotient exactly 1 where word and context are independent.
    products = np.repeat(words, np.diff(table.indptr)) * contexts[table.indices]
    table.data = np.log(table.data * contexts.sum() / products)
    table.data -= np.log(shift)
    if positive:
        np.maximum(table.data, 0, out=table.data)
    table.eliminate_zeros()
    return table


def tfidf_weights(
    document_counts: np.ndarray, documents: int, *, convention: Literal["sklearn", "textbook"] = "sklearn"
) -> np.ndarray:
    """Return the inverse document frequency of each word.

    Args:
        document_counts: Documents that hold each word, `[V]`.
        documents: Documents of the corpus, n.
        convention: `"sklearn"`: ln((1 + n) / (1 + df)) + 1, never zero; `"textbook"`: ln(n / df), zero for a word that is in
            every document, and for one that is in none.

    Returns:
        `float64 [V]`.

    Raises:
        InputError: If a word is in more documents than there are.

    Source:
        Spärck Jones, "A statistical interpretation of term specificity" (1972), for the textbook's.
    """
    check_choice(convention, ("sklearn", "textbook"), name="convention")
    frequencies = np.asarray(document_counts, dtype=np.float64)
    if frequencies.size and (frequencies.min() < 0 or frequencies.max() > documents):
        raise InputError(
            f"documents={documents} are fewer than hold a word: document_counts has {frequencies.max():.0f}"
        )
    if convention == "sklearn":
        return np.log((1.0 + documents) / (1.0 + frequencies)) + 1.0
    return np.log(documents / np.where(frequencies > 0, frequencies, max(documents, 1)))


def latent_vectors(
    matrix: sparse.csr_matrix, *, dimensions: int, power: float = 0.5, seed: int = 0, exact: bool = False
) -> LatentVectors:
    """Return the truncated singular value decomposition U Σ V^T of a matrix, with U Σ^power as vectors.

    The sign of each pair of singular vectors is free. It is chosen so that the component of the left one with the largest
    absolute value is positive.

    Args:
        matrix: Weights, `[N, C]`.
        dimensions: Singular vectors, k; fewer than rows and columns.
        power: Exponent p of the singular values: 1 is latent semantic analysis; 0 and 0.5 are better for words.
        seed: Seed of the random projection, or of ARPACK's first vector.
        exact: Let ARPACK iterate until it converges. By default a random projection and four power iterations are used, which
            are faster and a few per cent off in the smallest singular values.

    Returns:
        The vectors in the precision of the matrix.

    Raises:
        InputError: If the dimensions do not fit the matrix, or it has not so many that are not zero.

    Source:
        Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), algorithm 4.4; power: Levy, Goldberg and Dagan
        (2015), 3.3.
    """
    check_range(power, "[0, 1]", name="power", hint="0.5 for words, 1 for documents")
    most = min(matrix.shape) - exact
    if not 1 <= dimensions <= most:
        raise InputError(f"dimensions={dimensions} must be from 1 to {most} for a matrix of shape {matrix.shape}")
    # Half precision and whole numbers have no decomposition.
    kind = matrix.dtype if matrix.dtype in (np.float32, np.float64) else np.float64
    matrix = sparse.csr_matrix(matrix, dtype=kind)
    number = generator_seed(seed=seed, stream="svd") % (1 << _SEED_BITS)
    left, values, right = _decomposed(matrix, dimensions, number, exact=exact)
    rank = int((values > values[0] * np.finfo(kind).eps * max(matrix.shape)).sum())
    if rank < dimensions:
        raise InputError(
            f"dimensions={dimensions}: the matrix has only {rank} independent columns; name at most {rank}"
        )
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(dimensions)])
    return LatentVectors(left * signs * values**power, values, right * signs[:, None])


def _decomposed(
    matrix: sparse.csr_matrix, dimensions: int, number: int, *, exact: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U, Σ and V^T, from the largest singular value on; their signs are free."""
    if not exact:
        return randomized_svd(
            matrix,
            dimensions,
            n_oversamples=_OVERSAMPLES,
            n_iter=_POWER_ITERATIONS,
            flip_sign=False,
            random_state=number,
        )
    start = np.random.Generator(np.random.Philox(key=number)).standard_normal(min(matrix.shape))
    left, values, right = svds(matrix, k=dimensions, v0=start.astype(matrix.dtype))
    order = np.argsort(-values, kind="stable")
    return left[:, order], values[order], right[order]
