"""Answers from a span head: the best spans of a text by the logits of their first and last tokens.

[`best_spans`] is the decoder, exact in O(tokens x longest answer). [`read_answers`] joins the windows of a long text and returns
pieces of the text itself. [`answer_questions`] asks a model, as `pipeline("question-answering")` did before transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.evaluation.metrics import checked_texts
from hf_pretrain.modeling.backbone import evaluating, longest_sequence
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.tasks.batches import DataCollatorForTaskHead
from hf_pretrain.tasks.questions import QuestionWindow, question_windows

WindowRule = Literal["max", "max_context"]


class Span(NamedTuple):
    """A span of tokens.

    Attributes:
        first: Its first token.
        last: Its last token, never before the first.
        score: Sum of the logits of the two.
    """

    first: int
    last: int
    score: float


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        text: The piece of the text from `start` to `end`; empty if the answer is that there is none.
        start: Its first character.
        end: The character behind its last one.
        score: Sum of the logits of its first and its last token.
        probability: Its share of all spans that may be answers, by softmax of their scores.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float


@dataclass(frozen=True)
class FoundAnswers:
    """The answers to one question.

    Attributes:
        answers: The best first; no two have a character in common. Empty if no span may be one.
        null_difference: Score of no answer above that of the best span; minus infinity if the tokenizer has no token for it.
    """

    answers: list[Answer]
    null_difference: float


def best_spans(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    max_answer_tokens: int = 30,
    n_best: int = 1,
    allowed: np.ndarray | None = None,
) -> list[Span]:
    """Return the best spans of a text, exactly: no pair of a first and a last token is left out.

    Args:
        start_logits: ``[T]``, of each token as the first of the answer.
        end_logits: ``[T]``, of each token as the last.
        max_answer_tokens: Most tokens of a span.
        n_best: How many spans. After the best one comes the best that shares no token with it, and so on.
        allowed: Tokens that a span may begin and end with, ``bool [T]``; by default all.

    Returns:
        The spans, the best first; of equal ones that which begins first, then the shorter. Fewer where no more fit.

    Raises:
        InputError: If logits are not of equal length or no numbers.

    Source: Devlin et al. 2019, section 4.2: the score of a span is S·T_i + E·T_j with j >= i.
    """
    check_range(n_best, "[1, inf)", name="n_best")
    return _select(_span_scores(start_logits, end_logits, max_answer_tokens, allowed), n_best)


def read_answers(
    texts: Sequence[str],
    windows: Sequence[QuestionWindow],
    start_logits: Sequence[np.ndarray] | np.ndarray,
    end_logits: Sequence[np.ndarray] | np.ndarray,
    *,
    doc_stride: int,
    n_best: int = 1,
    max_answer_tokens: int = 30,
    null_threshold: float | None = None,
    window_rule: WindowRule = "max",
) -> list[FoundAnswers]:
    """Read the answers to questions from the logits of their windows.

    Args:
        texts: The text of each question.
        windows: The windows of the questions in order, as [`question_windows`] returns them.
        start_logits: Of each window, one a token, perhaps with padding behind them.
        end_logits: As these.
        doc_stride: Tokens that a window shares with the next.
        n_best: Most answers of a question.
        max_answer_tokens: Most tokens of an answer.
        null_threshold: A question has no answer if that scores higher than the best span by more than this. None always gives
            a span, as in SQuAD 1.1.
        window_rule: "max" gives a span in several windows its highest score. "max_context" takes it from the window in which
            its first token has most text on both sides, as BERT's official code does.

    Returns:
        The answers of each question.
    """
    check_choice(window_rule, get_args(WindowRule), name="window_rule")
    check_range(n_best, "[1, inf)", name="n_best")
    of_questions: list[list[int]] = [[] for _ in texts]
    for number, window in enumerate(windows):
        of_questions[window.source].append(number)
    found = []
    for text, numbers in zip(texts, of_questions, strict=True):
        parts = [
            _Part(windows[i], *(np.asarray(row[i])[: len(windows[i].in_text)] for row in (start_logits, end_logits)))
            for i in numbers
        ]
        offsets, scores = _joined(text, parts, doc_stride, max_answer_tokens, window_rule)
        null = min((part.null_score for part in parts), default=-np.inf)
        found.append(_answers(text, offsets, scores, null=null, threshold=null_threshold, n_best=n_best))
    return found


def best_null_threshold(
    null_differences: Sequence[float], span_scores: Sequence[float], has_answer: Sequence[bool]
) -> tuple[float, float]:
    """Tune the threshold above which a question has no answer, on questions with known answers.

    Args:
        null_differences: Score of no answer above that of the best span, of each question.
        span_scores: Metric of the best span, such as F1, of each question.
        has_answer: Whether each question has an answer; where it has none, "no answer" scores 1.

    Returns:
        The threshold, one of the differences or minus infinity (never an answer), and the mean metric with it; of equally good
        thresholds the smallest.

    Source: the official evaluation script of SQuAD 2.0, `find_best_thresh`.
    """
    differences = np.asarray(null_differences, dtype=np.float64)
    if not len(differences):
        raise InputError("null_differences is empty: a threshold needs questions")
    # A question is answered at a threshold of at least its difference.
    gains = np.asarray(span_scores, dtype=np.float64) - ~np.asarray(has_answer, dtype=bool)
    thresholds, group = np.unique(differences, return_inverse=True)
    sums = np.append(0.0, np.cumsum(np.bincount(group, weights=gains, minlength=len(thresholds))))
    best = int(sums.argmax())
    nothing = int((~np.asarray(has_answer, dtype=bool)).sum())
    return float(np.append(-np.inf, thresholds)[best]), float(nothing + sums[best]) / len(differences)


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    n_best: int = 1,
    max_length: int | None = None,
    doc_stride: int | None = None,
    max_answer_tokens: int = 30,
    null_threshold: float | None = None,
    window_rule: WindowRule = "max",
    batch_size: int = 32,
) -> list[list[Answer]]:
    """Answer questions by parts of texts.

    Args:
        model: An `AutoModelForQuestionAnswering`.
        tokenizer: Its tokenizer, a fast one.
        questions: The questions.
        contexts: The text of each question.
        n_best: Most answers of a question.
        max_length: Most tokens of a window, the question included; by default 384, or fewer if the model takes no more.
        doc_stride: Tokens that a window shares with the next; by default 128, at most a third of `max_length`.
        max_answer_tokens: Most tokens of an answer.
        null_threshold: A question has no answer, the empty text, if that scores higher than any span by more than this.
            [`best_null_threshold`] tunes it. None always gives a span.
        window_rule: How windows with the same span are joined: "max" or "max_context"; see [`read_answers`].
        batch_size: Windows in a batch; they are sorted by length.

    Returns:
        The answers of each question, the best first; no two have a character in common.

    Raises:
        InputError: If the model has no span head, or texts or lengths do not fit.
    """
    texts, asked = checked_texts(contexts, batch_size=batch_size), checked_texts(questions)
    if len(texts) != len(asked):
        raise InputError(
            f"questions has {len(asked)} entries and contexts {len(texts)}: give a text for each question"
        )
    longest = longest_sequence(model.base_model)
    if max_length is None:
        max_length = min(384, longest or 384)
    elif longest is not None and max_length > longest:
        raise InputError(f"max_length={max_length}: the model takes at most {longest} tokens")
    stride = min(128, max_length // 3) if doc_stride is None else doc_stride
    if not texts:
        return []
    windows = question_windows(asked, texts, tokenizer, max_length=max_length, doc_stride=stride)
    logits = _logits(model, windows, tokenizer, batch_size=batch_size)
    found = read_answers(
        texts,
        windows,
        [pair[0] for pair in logits],
        [pair[1] for pair in logits],
        doc_stride=stride,
        n_best=n_best,
        max_answer_tokens=max_answer_tokens,
        null_threshold=null_threshold,
        window_rule=window_rule,
    )
    return [item.answers for item in found]


def _logits(
    model: PreTrainedModel,
    windows: Sequence[QuestionWindow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
) -> list[np.ndarray]:
    """Return the logits of each window's first and last tokens, ``[2, L]``, with padding behind."""
    logits: list[np.ndarray] = [np.empty(0)] * len(windows)
    with evaluating(model):
        for numbers, batch in _batches(windows, tokenizer, batch_size=batch_size):
            output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            if getattr(output, "start_logits", None) is None or getattr(output, "end_logits", None) is None:
                raise InputError(
                    f"model={type(model).__name__} has no start_logits and end_logits: load it by AutoModelForQuestionAnswering"
                )
            pairs_B2L = torch.stack([output.start_logits, output.end_logits], dim=1).float().cpu().numpy()
            for number, pair in zip(numbers, pairs_B2L, strict=True):
                logits[number] = pair
    return logits


def _batches(
    windows: Sequence[QuestionWindow], tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield numbers of windows of about one length, the longest first, and their batch."""
    order = sorted(range(len(windows)), key=lambda number: -len(windows[number].in_text))
    collate = DataCollatorForTaskHead(tokenizer, padding_side="right")
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        yield numbers, collate([dict(windows[number].inputs) for number in numbers])


class _Part(NamedTuple):
    """A window with its logits."""

    window: QuestionWindow
    starts: np.ndarray
    ends: np.ndarray

    @property
    def offsets(self) -> np.ndarray:
        return self.window.offsets[self.window.in_text]

    @property
    def null_score(self) -> float:
        place = self.window.no_answer
        return -np.inf if place == IGNORED else float(self.starts[place]) + float(self.ends[place])


def _span_scores(
    start_logits: np.ndarray, end_logits: np.ndarray, max_answer_tokens: int, allowed: np.ndarray | None
) -> np.ndarray:
    """Return the score of the span of k + 1 tokens from each token, ``[T, K]``, minus infinity where there is none."""
    check_range(max_answer_tokens, "[1, inf)", name="max_answer_tokens")
    starts, ends = (np.array(logits, dtype=np.float64) for logits in (start_logits, end_logits))
    if starts.shape != ends.shape or starts.ndim != 1:
        raise InputError(
            f"start_logits and end_logits are of shapes {starts.shape} and {ends.shape}: give one each a token"
        )
    if np.isnan(starts).any() or np.isnan(ends).any() or np.isposinf(starts).any() or np.isposinf(ends).any():
        raise InputError("start_logits and end_logits have what is no number or infinite: the model has diverged")
    if allowed is not None:
        starts[~np.asarray(allowed, dtype=bool)] = ends[~np.asarray(allowed, dtype=bool)] = -np.inf
    width = min(max_answer_tokens, len(starts))
    if not width:
        return np.empty((0, 0))
    padded = np.append(ends, np.full(width - 1, -np.inf))
    return starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)


def _select(scores: np.ndarray, count: int) -> list[Span]:
    """Return the best spans that share no token; `scores` as [`_span_scores`] has them."""
    spans: list[Span] = []
    if not scores.size:
        return spans
    scores = scores.copy()
    rows, width = np.arange(scores.shape[0]), scores.shape[1]
    while len(spans) < count:
        first, length = divmod(int(scores.argmax()), width)
        best = float(scores[first, length])
        if best == -np.inf:
            break
        last = first + length
        spans.append(Span(first, last, best))
        # What begins inside, and what begins before it and reaches into it.
        scores[first : last + 1] = -np.inf
        before = rows[max(0, first - width + 1) : first]
        scores[before[:, None], np.arange(width)] = np.where(
            before[:, None] + np.arange(width) >= first, -np.inf, scores[before]
        )
    return spans


def _joined(
    text: str, parts: Sequence[_Part], doc_stride: int, max_answer_tokens: int, rule: WindowRule
) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters of all tokens of a text, ``[D, 2]``, and the scores of its spans over its windows, ``[D, K]``."""
    parts = sorted(parts, key=lambda part: part.offsets[0].tolist())
    lengths = np.array([len(part.offsets) for part in parts])
    # The first token of each window among those of the text.
    firsts = np.append(0, np.cumsum(lengths - doc_stride)[:-1])
    for part, following in zip(parts, parts[1:], strict=False):
        if not np.array_equal(part.offsets[len(part.offsets) - doc_stride :], following.offsets[:doc_stride]):
            raise InputError(
                f"doc_stride={doc_stride}: the windows share another number of tokens: give the doc_stride of the windows"
            )
    size = int(firsts[-1] + lengths[-1])
    offsets, tokens = np.zeros((size, 2), dtype=np.int64), np.arange(size)
    contexts = [
        np.where(
            (tokens >= first) & (tokens < first + length),
            np.minimum(tokens - first, first + length - 1 - tokens) + 0.01 * length,
            -np.inf,
        )
        for first, length in zip(firsts, lengths, strict=True)
    ]
    owner = np.argmax(contexts, axis=0)
    scores = np.full((size, min(max_answer_tokens, size)), -np.inf)
    for number, (part, first, length) in enumerate(zip(parts, firsts, lengths, strict=True)):
        shown = part.offsets
        is_visible = np.array([bool(text[begin:end].strip()) for begin, end in shown])
        in_text = part.window.in_text
        found = _span_scores(part.starts[in_text], part.ends[in_text], max_answer_tokens, is_visible)
        if rule == "max_context":
            found = np.where((owner[first : first + length] == number)[:, None], found, -np.inf)
        target = scores[first : first + length, : found.shape[1]]
        np.maximum(target, found, out=target)
        offsets[first : first + length] = shown
    return offsets, scores


def _answers(
    text: str, offsets: np.ndarray, scores: np.ndarray, *, null: float, threshold: float | None, n_best: int
) -> FoundAnswers:
    """Return the answers of a question from the scores of its spans."""
    spans = _select(scores, n_best)
    best = spans[0].score if spans else -np.inf
    counted = scores.ravel() if threshold is None else np.append(scores.ravel(), null)
    total = float(np.logaddexp.reduce(counted)) if counted.size else -np.inf
    answers = []
    for span in spans:
        begin, end = int(offsets[span.first, 0]), int(offsets[span.last, 1])
        piece = text[begin:end]
        begin, end = end - len(piece.lstrip()), begin + len(piece.rstrip())
        answers.append(Answer(text[begin:end], begin, end, span.score, float(np.exp(span.score - total))))
    difference = null - best if np.isfinite(null) else -np.inf
    if threshold is not None and np.isfinite(null):
        nothing = Answer("", 0, 0, null, float(np.exp(null - total)))
        # First where it wins, else behind the best span, in the order of scores.
        place = 0 if difference > threshold else max(1, sum(answer.score >= null for answer in answers))
        answers.insert(place, nothing)
    return FoundAnswers(answers[:n_best], float(difference))
