"""From words to tables of counts, and from tables to vectors: co-occurrence, PMI, TF-IDF, singular values.

Pairs are counted part by part. The words at distance d of all positions are one shifted copy of the tokens; a part's pairs are
sorted by (row, column) and summed. Sums that no longer fit in memory go to a file as a sorted run, and the runs are merged in
blocks of keys. All weights of a window are multiples of one number, so that sums are exact and do not depend on the parts.

A table of words and contexts becomes PPMI and then vectors (`pmi_matrix`, `latent_vectors`); a table of documents and words is
weighted by TF-IDF (`tfidf_weights`) and decomposed by the same function: latent semantic analysis.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd
from tqdm.auto import tqdm

from hf_pretrain.data.draws import generator_seed
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.vectors.corpus import WordCorpus

_POWER_ITERATIONS, _OVERSAMPLES = 4, 10
# ARPACK's start vector and scikit-learn's projections take seeds of 32 bits.
_SEED_BITS = 31
_WEIGHTINGS, _DIRECTIONS = ("uniform", "linear", "harmonic"), ("both", "left", "right", "separate")
# Pairs that are sorted together: 128 MiB of keys.
_PAIRS = 1 << 24
# A common unit of 1/1 ... 1/size beyond this leaves too few bits of a double for the counts.
_LARGEST_UNIT = 1 << 28


@dataclass(frozen=True)
class Window:
    """Which words are near a word, and how much each counts.

    Args:
        size: Greatest distance in known words.
        weighting: Weight of distance d: 1 (`"uniform"`), (size - d + 1) / size (`"linear"`, word2vec's on average), or 1 / d
            (`"harmonic"`, GloVe's).
        direction: Which side of a word its contexts are on: `"both"`, `"left"`, `"right"`, or `"separate"`, where each word is
            two contexts, one on the left and one on the right.
        crosses_lines: Whether windows end at documents instead of lines.

    Raises:
        InputError: If an option is out of range.
    """

    size: int = 5
    weighting: Literal["uniform", "linear", "harmonic"] = "linear"
    direction: Literal["both", "left", "right", "separate"] = "both"
    crosses_lines: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_range(self.size, "[1, 65535]", name="size", hint="5 is usual, 10 or 15 for GloVe")
        check_choice(self.weighting, _WEIGHTINGS, name="weighting")
        check_choice(self.direction, _DIRECTIONS, name="direction")

    def weights(self) -> np.ndarray:
        """Return the weight of each distance from 1 to `size`: `float64 [size]`."""
        numerators, denominator = self._ratios()
        return numerators / denominator

    def _ratios(self) -> tuple[np.ndarray, float]:
        """Return the weights as whole numbers, and what to divide their sums by."""
        distances = np.arange(1, self.size + 1)
        if self.weighting == "uniform":
            return np.ones(self.size), 1.0
        if self.weighting == "linear":
            return (self.size + 1.0 - distances), float(self.size)
        unit = math.lcm(*distances.tolist()) if self.size < 64 else _LARGEST_UNIT + 1
        if unit > _LARGEST_UNIT:
            return 1.0 / distances, 1.0
        return np.array([float(unit // distance) for distance in distances.tolist()]), float(unit)


@dataclass(frozen=True, eq=False)
class Cooccurrences:
    """The pairs that occur, sorted by (row, column), with their counts.

    Attributes:
        shape: Words, and contexts: as many, or twice as many if left and right are separate.
        rows: Word of each pair, `int32 [N]`; like the others memory-mapped if the counts are on disk.
        columns: Context of each pair, `int32 [N]`; a word on the right is context V + w where sides are separate.
        values: Sum of the weights of each pair, `float64 [N]`, all positive.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    # Removes the files with the object, where the caller has named no folder.
    _files: Any = field(default=None, repr=False)

    def to_csr(self) -> sparse.csr_matrix:
        """Return the counts as a sparse matrix in memory, `float64 [V, C]`."""
        ends = np.cumsum(np.bincount(self.rows, minlength=self.shape[0]))
        indptr = np.concatenate([[0], ends])
        matrix = sparse.csr_matrix((np.array(self.values), np.array(self.columns), indptr), shape=self.shape)
        matrix.has_canonical_format = True
        return matrix


def count_cooccurrences(
    corpus: WordCorpus, window: Window, *, max_entries: int = 1 << 26, folder: Path | None = None
) -> Cooccurrences:
    """Count the pairs of words that stand in a window of each other.

    Args:
        corpus: The words.
        window: What a window is.
        max_entries: Most different pairs of neighbours in memory, of 12 bytes each; more are written to files.
        folder: Where these files are. By default a temporary folder that goes with the result.

    Returns:
        The counts, the same bit for bit for every `max_entries`; with harmonic windows of 23 words and more, whose weights have
        no common unit, the same up to rounding.

    Source:
        Levy, Goldberg and Dagan, "Improving Distributional Similarity with Lessons Learned from Word Embeddings" (2015), 3.1.
    """
    check_range(max_entries, "[1, inf)", name="max_entries")
    size = len(corpus.vocabulary)
    shape = (size, 2 * size if window.direction == "separate" else size)
    numerators, denominator = window._ratios()
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    temporary = None
    counted: sparse.csr_matrix | None = None
    for part in _counted_parts(corpus, window, numerators, max_pairs=min(_PAIRS, max_entries)):
        if counted is not None and counted.nnz + part.nnz > max_entries:
            if folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="cooccurrences-")
                folder = Path(temporary.name)
            runs.append(_write_run(_oriented(counted, window.direction), folder, len(runs)))
            counted = None
        counted = part if counted is None else counted + part
    last = _oriented(counted if counted is not None else sparse.csr_matrix(shape), window.direction)
    if not runs or folder is None:
        keys_rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(last.indptr))
        return Cooccurrences(shape, keys_rows, last.indices.astype(np.int32, copy=False), last.data / denominator)
    runs.append(_write_run(last, folder, len(runs)))
    arrays = _merge_runs(runs, folder, num_columns=shape[1], denominator=denominator, block=max_entries)
    for number in range(len(runs)):
        for path in _run_paths(folder, number):
            path.unlink()
    return Cooccurrences(shape, *arrays, temporary)


def document_counts(corpus: WordCorpus) -> sparse.csr_matrix:
    """Return how often each word occurs in each document: `int64 [D, V]`.

    Args:
        corpus: The words; a document without a known word is a row of zeros.
    """
    ones = np.ones(len(corpus.tokens), dtype=np.int64)
    shape = (len(corpus.documents) - 1, len(corpus.vocabulary))
    matrix = sparse.csr_matrix((ones, np.array(corpus.tokens), corpus.documents), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _counted_parts(
    corpus: WordCorpus, window: Window, numerators: np.ndarray, *, max_pairs: int
) -> Iterator[sparse.csr_matrix]:
    """Yield the sums of (word, word to its right) for parts of the corpus: `[V, V]`."""
    size, num_tokens = len(corpus.vocabulary), len(corpus.tokens)
    bounds = corpus.documents if window.crosses_lines else corpus.lines
    # The distance is in the low bits of a key, so that sorting the keys is all that is moved.
    low_bits = (window.size - 1).bit_length()
    if size * size >= 1 << (63 - low_bits):
        raise InputError(f"size={window.size} is too large for {size} words: a pair and its distance exceed 63 bits")
    step = max(1, max_pairs // window.size)
    for begin in tqdm(range(0, num_tokens, step), desc="Counting pairs", unit=" parts", delay=2, disable=None):
        end = min(begin + step, num_tokens)
        tokens = np.asarray(corpus.tokens[begin : end + window.size], dtype=np.int64)
        # A pair belongs to the part of its left word; the right one may lie beyond the part, but not beyond the line.
        positions = np.arange(begin, end)
        room = bounds[np.searchsorted(bounds, positions, side="right")] - positions
        left_words = (tokens[: end - begin] * size) << low_bits
        right_words = tokens << low_bits
        keys = []
        for distance in range(1, min(window.size, len(tokens) - 1) + 1):
            right = right_words[distance : distance + end - begin]
            both = (left_words[: len(right)] + right) | (distance - 1)
            keys.append(both[room[: len(right)] > distance])
        if pairs := sum(map(len, keys)):
            yield _summed(np.concatenate(keys), numerators, size=size, low_bits=low_bits, pairs=pairs)


def _summed(keys: np.ndarray, weights: np.ndarray, *, size: int, low_bits: int, pairs: int) -> sparse.csr_matrix:
    keys.sort()
    distances = keys & ((1 << low_bits) - 1)
    keys >>= low_bits
    firsts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sums = np.add.reduceat(weights[distances], firsts)
    keys = keys[firsts]
    return _csr(keys, sums, shape=(size, size))


def _csr(keys: np.ndarray, values: np.ndarray, *, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Return the matrix of sorted keys, row times columns plus column, that are all different."""
    rows, columns = np.divmod(keys, shape[1])
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    matrix = sparse.csr_matrix((values, columns, indptr), shape=shape)
    matrix.has_canonical_format = True
    return matrix


def _oriented(right: sparse.csr_matrix, direction: str) -> sparse.csr_matrix:
    """Turn counts of (word, word to its right) into those of (word, context)."""
    if direction == "right":
        oriented = right
    elif direction == "left":
        oriented = right.T.tocsr()
    elif direction == "both":
        oriented = right + right.T.tocsr()
    else:
        oriented = sparse.hstack([right.T, right], format="csr")
    oriented.sort_indices()
    return oriented


def _run_paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"pairs-{number}.keys.npy", folder / f"pairs-{number}.sums.npy"


def _write_run(matrix: sparse.csr_matrix, folder: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Write sorted keys and sums to files, and return them memory-mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    paths = _run_paths(folder, number)
    np.save(paths[0], rows * matrix.shape[1] + matrix.indices)
    np.save(paths[1], matrix.data)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


def _merge_runs(
    runs: list[tuple[np.ndarray, np.ndarray]], folder: Path, *, num_columns: int, denominator: float, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add the runs up, about `block` of their entries at a time; return rows, columns and values, memory-mapped."""
    kinds = {"rows": np.int32, "columns": np.int32, "values": np.float64}
    paths = {name: folder / f"pairs.{name}.bin" for name in kinds}
    taken, share = [0] * len(runs), max(1, block // len(runs))
    files = {name: path.open("wb") for name, path in paths.items()}
    try:
        while any(done < len(keys) for done, (keys, _) in zip(taken, runs, strict=True)):
            ahead = [
                keys[min(at + share, len(keys)) - 1]
                for at, (keys, _) in zip(taken, runs, strict=True)
                if at < len(keys)
            ]
            # No run has more than its share up to the smallest of these keys.
            last = min(ahead)
            stops = [int(np.searchsorted(keys, last, side="right")) for keys, _ in runs]
            spans = [slice(at, max(at, stop)) for at, stop in zip(taken, stops, strict=True)]
            keys = np.concatenate([run[0][span] for run, span in zip(runs, spans, strict=True)])
            sums = np.concatenate([run[1][span] for run, span in zip(runs, spans, strict=True)])
            order = np.argsort(keys, kind="stable")
            keys, sums = keys[order], sums[order]
            firsts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            rows, columns = np.divmod(keys[firsts], num_columns)
            rows.astype(np.int32).tofile(files["rows"])
            columns.astype(np.int32).tofile(files["columns"])
            (np.add.reduceat(sums, firsts) / denominator).tofile(files["values"])
            taken = [span.stop for span in spans]
    finally:
        for file in files.values():
            file.close()
    rows_, columns_, values = (np.memmap(paths[name], dtype=kind, mode="r") for name, kind in kinds.items())
    return rows_, columns_, values


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
