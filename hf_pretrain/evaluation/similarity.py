"""How good vectors of texts are: against scores of similarity, at finding the right document, and as a cloud of points.

[`text_vectors`] computes the vectors as `SentenceTransformer.encode` does. [`similarity_correlation`] compares their cosines with
scores that people gave, [`retrieval_recall`] ranks documents for queries, and [`alignment_uniformity`] says how near partners are
and how evenly all texts are spread. The last three take arrays, wherever these come from.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.text.lines import open_bytes, readable
from hf_pretrain.errors import InputError, check_range, one_line
from hf_pretrain.evaluation.metrics import checked_texts
from hf_pretrain.evaluation.probes import Batch, run_encoder, tokenize_inputs
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.tasks.files import kind_of

# Products of a chunk of rows with all others: 32 MiB.
_CHUNK = 1 << 22
# Cosines of fp32 vectors are known to about 1e-7; the same text may get another one in another batch.
_TIE = 1e-6
_TABLES: dict[str, dict[str, Any]] = {
    ".csv": {"strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_LINES = (".jsonl", ".json")


def text_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    modules: SentenceModules,
    max_length: int | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Return the vector of each text, as `SentenceTransformer.encode` computes it.

    As there, the name of a special token in a text is that token, and a default prompt of the modules stands before each text.

    Args:
        model: A stock model, with a head or without; the head is not used.
        tokenizer: Its tokenizer.
        texts: The texts; what is longer than `max_length` is cut off, in front of the last special token.
        modules: What follows the encoder, such as `SentenceModules.read(folder)` returns.
        max_length: Most tokens of a text, special ones included. By default that of the modules, otherwise as many as the model
            has positions and the tokenizer takes.
        batch_size: Texts in a batch; they are sorted by length first.

    Returns:
        ``float32 [N, E]``, in the order of the texts.

    Raises:
        InputError: If the model lacks ids or positions, a text has no token, or the modules leave a prompt out of the pooling.
    """
    base, texts = model.base_model, checked_texts(texts, batch_size=batch_size)
    prompt = _default_prompt(modules)
    tokenized = tokenize_inputs(
        base,
        tokenizer,
        [prompt + text for text in texts],
        max_length=max_length if max_length is not None else modules.max_length,
        reads_special_tokens=True,
    )

    def pooled(output: Any, batch: Batch, rows: np.ndarray) -> torch.Tensor:
        return modules.vectors(output.last_hidden_state, batch["attention_mask"])

    width = modules.width(base.config.hidden_size)
    return run_encoder(base, tokenizer, tokenized, pooled=pooled, width=width, batch_size=batch_size)


def _default_prompt(modules: SentenceModules) -> str:
    """Return what `SentenceTransformer.encode` puts before each text unless it is told otherwise."""
    name, prompts = modules.library.get("default_prompt_name"), modules.library.get("prompts") or {}
    prompt = str(prompts.get(name) or "") if name else ""
    if prompt and not modules.pooling.get("include_prompt", True):
        raise InputError(
            f"default_prompt_name={name!r} is left out of the pooling (include_prompt=false), which is not known here: "
            "encode with sentence-transformers"
        )
    return prompt


class ScoredPairs(NamedTuple):
    """Pairs of texts with scores of their similarity.

    Attributes:
        first: The first text of each pair.
        second: The second one.
        scores: ``float64 [N]``; the more alike, the higher.
    """

    first: list[str]
    second: list[str]
    scores: np.ndarray


def read_scored_pairs(
    path: str | Path, *, columns: tuple[str, str, str] = ("sentence1", "sentence2", "score")
) -> ScoredPairs:
    """Read pairs of texts and their scores.

    Args:
        path: CSV, TSV or JSON lines, also compressed. A table without a header has three columns: two texts and a number. In TSV
            a quotation mark is text.
        columns: Names of both texts and the score, in the header of a table or in each JSON object; others are passed over.

    Returns:
        The pairs in the order of the file.

    Raises:
        InputError: If the file cannot be read, or a row is not right; the message has its line.
    """
    kind = kind_of(str(path))
    if kind not in (*_TABLES, *_LINES):
        raise InputError(f"path={str(path)!r} must be a table (.csv, .tsv) or JSON lines (.jsonl), also compressed")
    if not Path(path).is_file():
        raise InputError(f"path={str(path)!r} is no file")
    with readable(path), open_bytes(str(path)) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: it is not text in UTF-8; convert it, e.g. with iconv") from error
    found = _json_pairs(text, path, columns) if kind in _LINES else _table_pairs(text, path, columns, **_TABLES[kind])
    rows = [_checked_pair(row, where=f"{path}, line {line}") for line, row in found]
    if not rows:
        raise InputError(f"{path} has no pair: give a file with two texts and a score a line")
    first, second, scores = zip(*rows, strict=True)
    return ScoredPairs(list(first), list(second), np.array(scores, dtype=np.float64))


def _table_pairs(
    text: str, path: str | Path, columns: tuple[str, str, str], **options: Any
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the line where each row of a table begins, and its texts and score."""
    chosen, width = [0, 1, 2], 3
    for number, (line, row) in enumerate(_table_rows(text, path, **options)):
        where, names = f"{path}, line {line}", ", ".join(columns)
        if number == 0 and set(columns) <= set(row):
            chosen, width = [row.index(name) for name in columns], len(row)
            continue
        if len(row) != width:
            hint = f", or a header with {names}" if number == 0 else ""
            raise InputError(f"{where}: {len(row)} columns, but {width} are needed: two texts and a score{hint}")
        first, second, score = (row[column] for column in chosen)
        try:
            yield line, [first, second, float(score)]
        except ValueError as error:
            hint = (
                f"; in a header, give the columns the names {names}, or give theirs as columns" if number == 0 else ""
            )
            raise InputError(f"{where}: score={score!r} is no number{hint}") from error


def _table_rows(text: str, path: str | Path, **options: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not blank, each with the line where it begins."""
    reader, line = csv.reader(io.StringIO(text, newline=""), **options), 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: {one_line(error)}: is a quotation mark missing there?") from error


def _json_pairs(text: str, path: str | Path, columns: tuple[str, str, str]) -> Iterator[tuple[int, list[Any]]]:
    """Yield the line of each JSON object, and its texts and score."""
    for line, part in enumerate(text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            row = json.loads(part)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line}: it is no JSON ({one_line(error)})") from error
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            names = ", ".join(columns)
            raise InputError(f"{path}, line {line}: there is no {missing[0]!r}; each line is an object with {names}")
        yield line, [row[name] for name in columns]


def _checked_pair(pair: list[Any], *, where: str) -> tuple[str, str, float]:
    first, second, score = pair
    for text in (first, second):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: {text!r} is no text: give one, or leave the pair out")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise InputError(f"{where}: score={score!r} is no finite number")
    return first, second, float(score)


def similarity_correlation(first: np.ndarray, second: np.ndarray, scores: Sequence[float] | np.ndarray) -> float:
    """Return Spearman's rank correlation between the cosines of pairs and their scores.

    Args:
        first: ``[N, E]`` vectors of the first texts.
        second: ``[N, E]`` vectors of the second ones.
        scores: ``[N]``.

    Returns:
        From -1 to 1; 0 where all cosines are equal.

    Raises:
        InputError: If sizes differ, a number is not finite, or all scores are equal.

    Source: Cer et al. 2017, "SemEval-2017 Task 1" (STS-B); Reimers and Gurevych 2019, "Sentence-BERT", section 4 (Spearman).
    """
    left, right = _unit(first, name="first"), _unit(second, name="second")
    given = np.asarray(scores, dtype=np.float64)
    if left.shape != right.shape or given.shape != left.shape[:1]:
        raise InputError(
            f"first, second and scores have the shapes {left.shape}, {right.shape} and {given.shape}: give a row of each a pair"
        )
    if not np.isfinite(given).all() or len(np.unique(given)) < 2:
        raise InputError("scores must be finite and not all equal: a correlation needs two different ones")
    cosines = np.einsum("ne,ne->n", left, right)
    if np.ptp(cosines) <= _TIE:
        return 0.0
    from scipy.stats import spearmanr  # Few runs measure similarity.

    return float(spearmanr(cosines, given).statistic)


def retrieval_recall(
    queries: np.ndarray, documents: np.ndarray, relevant: Sequence[int] | np.ndarray, *, at: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """Return how often the right document is among the nearest of a query, by cosine.

    The rank of the right document is one more than the number of others that are at least as near: ties count against the model,
    and one that gives all texts the same vector finds nothing. Cosines within 1e-6 are equal, as those of fp32 vectors are.

    Args:
        queries: ``[Q, E]``.
        documents: ``[N, E]``, each different: a copy of the right one counts as another.
        relevant: ``[Q]``, number of the right document of each query.
        at: Numbers of nearest documents.

    Returns:
        `recall_at_K` for each K, the share of queries whose rank is at most K; and `mrr`, the mean of the ranks' inverses.

    Raises:
        InputError: If there is no query, widths differ, a number is not finite, or there is no such document.
    """
    left, right = _unit(queries, name="queries"), _unit(documents, name="documents")
    chosen = np.asarray(relevant)
    if not len(left) or left.shape[1] != right.shape[1] or chosen.shape != left.shape[:1]:
        raise InputError(
            f"queries, documents and relevant have the shapes {left.shape}, {right.shape} and {chosen.shape}: "
            "give vectors of one width, and a document for each query, at least one"
        )
    if chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= len(right):
        raise InputError(f"relevant must be numbers of the {len(right)} documents, from 0 on")
    for number in at:
        check_range(number, "[1, inf)", name="at")
    ranks = np.empty(len(left), dtype=np.int64)
    for rows in _chunks(len(left), len(right)):
        cosines = left[rows] @ right.T
        own = np.take_along_axis(cosines, chosen[rows, None], axis=1)
        # The right document is counted too: it is as near as itself.
        ranks[rows] = np.count_nonzero(cosines >= own - _TIE, axis=1)
    recalls = {f"recall_at_{number}": float((ranks <= number).mean()) for number in at}
    return recalls | {"mrr": float((1 / ranks).mean())}


class AlignmentUniformity(NamedTuple):
    """How near partners are, and how evenly texts are spread over the sphere; the lower, the better.

    Attributes:
        alignment: Mean squared distance of the unit vectors of two partners, from 0 to 4.
        uniformity: Logarithm of the mean of exp(-2 d²) over the distances d of two different texts' unit vectors, 0 if all are in
            one point; the mean over both sides.
    """

    alignment: float
    uniformity: float


def alignment_uniformity(first: np.ndarray, second: np.ndarray) -> AlignmentUniformity:
    """Measure the vectors of partners as a cloud of points.

    Args:
        first: ``[N, E]``.
        second: ``[N, E]``, the partner of each row.

    Raises:
        InputError: If sizes differ, a number is not finite, or there are fewer than two rows.

    Source: Wang and Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", section 4 (alpha 2, t 2).
    """
    left, right = _unit(first, name="first"), _unit(second, name="second")
    if left.shape != right.shape or len(left) < 2:
        raise InputError(
            f"first and second have the shapes {left.shape} and {right.shape}: give two rows or more, a pair each"
        )
    alignment = float(np.square(left - right).sum(axis=1).mean())
    return AlignmentUniformity(alignment, (_uniformity(left) + _uniformity(right)) / 2)


def _uniformity(unit: np.ndarray) -> float:
    total = 0.0
    for rows in _chunks(len(unit), len(unit)):
        kernel = np.exp(-2 * np.maximum(2 - 2 * (unit[rows] @ unit.T), 0))
        own = np.arange(rows.start, rows.stop)
        total += float(kernel.sum() - kernel[own - rows.start, own].sum())
    return math.log(total / (len(unit) * (len(unit) - 1)))


def _chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield the rows of a table of products in parts that fit in memory."""
    step = max(1, _CHUNK // max(1, num_columns))
    for begin in range(0, num_rows, step):
        yield slice(begin, min(begin + step, num_rows))


def _unit(vectors: np.ndarray, *, name: str) -> np.ndarray:
    """Return vectors of length one as ``float64 [N, E]``; a vector of zeros stays one, and has no direction."""
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise InputError(f"{name} must be finite numbers of two dimensions, rows of vectors, not {rows.shape}")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
