"""Metrics of tasks as plain functions: arrays or lists in, a number out, all in [-1, 1] and better where larger.

[`METRICS_OF_TYPES`] says which of them count for a type of task. [`as_evaluate_metric`] gives one the form of `evaluate.Metric`;
only there is `evaluate` imported, which takes seconds, and scikit-learn and SciPy only in the metrics that need them.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_pretrain.errors import InputError, check_choice

if TYPE_CHECKING:
    import evaluate

METRICS_OF_TYPES: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("spearman", "pearson"),
    "tokens": ("entity_f1", "accuracy", "macro_f1"),
    "choice": ("accuracy",),
    "span": ("f1", "exact_match"),
}
"""Type of a task -> the metrics that may count, by default the first."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PREFIXES = frozenset("BIOES")


def accuracy(predictions: Any, references: Any) -> float:
    """Return the share of predictions that are equal to their reference, ``[N]`` each; 0 of none."""
    predicted, wanted = _both(predictions, references)
    return float(np.mean(predicted == wanted)) if len(wanted) else 0.0


def f1(predictions: Any, references: Any, *, positive: Any = 1) -> float:
    """Return F1 of one class, the harmonic mean of precision and recall; 0 where undefined.

    Args:
        predictions: Classes, ``[N]``.
        references: Right classes, ``[N]``.
        positive: The class that is to be found.
    """
    predicted, wanted = _both(predictions, references)
    hits = int(((predicted == positive) & (wanted == positive)).sum())
    return _f1(hits, int((predicted == positive).sum()), int((wanted == positive).sum()))


def macro_f1(predictions: Any, references: Any) -> float:
    """Return the mean F1 of the classes that are predicted or right somewhere, ``[N]`` each."""
    from sklearn.metrics import f1_score

    predicted, wanted = _both(predictions, references)
    return float(f1_score(wanted, predicted, average="macro", zero_division=0.0)) if len(wanted) else 0.0


def matthews(predictions: Any, references: Any) -> float:
    """Return the Matthews correlation of classes, ``[N]`` each; 0 where undefined.

    Source: Matthews 1975; for more than two classes Gorodkin 2004, as scikit-learn has it.
    """
    predicted, wanted = _both(predictions, references)
    if len(np.unique(predicted)) < 2 or len(np.unique(wanted)) < 2:
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(wanted, predicted))


def pearson(predictions: Any, references: Any) -> float:
    """Return the linear correlation of values, ``[N]`` each; 0 where one side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Any, references: Any) -> float:
    """Return the correlation of ranks, ``[N]`` each, equal values sharing their mean rank; 0 where one side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


class Entity(NamedTuple):
    """A part of a sentence that tags mark.

    Attributes:
        type: Type of the entity, "_" of tags without one.
        begin: Its first word.
        end: The word behind its last one.
    """

    type: str
    begin: int
    end: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a sentence's tags: IOB or IOBES.

    The tags need not keep to their scheme: I or E without a beginning begins an entity, and another type ends one, as in
    CoNLL's official scorer.

    Args:
        tags: "O", or B, I, E or S with a type, such as "B-PER".

    Raises:
        InputError: If a tag is none of these.
    """
    found: list[Entity] = []
    before = ("O", "")
    for index, tag in enumerate([*tags, "O"]):
        prefix, kind = _parts(tag)
        is_inside = prefix in ("I", "E") and before[0] in ("B", "I") and before[1] == kind
        if is_inside:
            found[-1] = found[-1]._replace(end=index + 1)
        elif prefix != "O":
            found.append(Entity(kind, index, index + 1))
        before = (prefix, kind)
    return found


def are_entity_tags(names: Sequence[str]) -> bool:
    """Whether names of classes are tags of entities: "O", and others with a prefix and a type, such as "B-PER"."""
    others = [name for name in names if name != "O"]
    return "O" in names and bool(others) and all(name[:1] in _PREFIXES and name[1:2] == "-" for name in others)


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of entities over all sentences; each has to be right from end to end, with its type.

    Args:
        predictions: Tags of each sentence.
        references: Right tags of each sentence.

    Returns:
        `entity_precision`, `entity_recall` and `entity_f1`, 0 where undefined.

    Raises:
        InputError: If sentences are not equally long.

    Source: Tjong Kim Sang and De Meulder 2003, CoNLL-2003; the same numbers as `seqeval` by default.
    """
    _check_same(len(predictions), len(references), "sentences")
    hits = predicted = wanted = 0
    for number, (guess, truth) in enumerate(zip(predictions, references, strict=True)):
        _check_same(len(guess), len(truth), f"tags in sentence {number}")
        left, right = set(entities(guess)), set(entities(truth))
        hits, predicted, wanted = hits + len(left & right), predicted + len(left), wanted + len(right)
    return {
        "entity_precision": hits / max(1, predicted),
        "entity_recall": hits / max(1, wanted),
        "entity_f1": _f1(hits, predicted, wanted),
    }


def entity_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Return F1 of entities over all sentences; see [`entity_scores`]."""
    return entity_scores(predictions, references)["entity_f1"]


def normalised_answer(text: str, *, language: str = "en") -> str:
    """Return an answer without what does not count in SQuAD: case, punctuation, double spaces, and English articles.

    Args:
        text: The answer.
        language: Language of the text. Articles (a, an, the) are removed only from English, "en": "a" is a word of meaning in
            other languages. There, punctuation beyond ASCII is removed too.

    Source: Rajpurkar et al. 2016, and the official evaluation script of SQuAD 1.1 and 2.0.
    """
    text = text.lower()
    if language == "en":
        text = "".join(character for character in text if character not in string.punctuation)
        text = _ARTICLES.sub(" ", text)
    else:
        text = "".join(
            character
            for character in text
            if character not in string.punctuation and unicodedata.category(character)[0] != "P"
        )
    return " ".join(text.split())


def answer_exact_match(prediction: str, answers: Sequence[str], *, language: str = "en") -> float:
    """Return 1.0 if an answer is equal to one of the right ones, else 0.0; without a right one the answer has to be empty.

    Args:
        prediction: The answer.
        answers: The right answers.
        language: See [`normalised_answer`].
    """
    right = _right_answers(answers, language)
    return float(normalised_answer(prediction, language=language) in right)


def answer_f1(prediction: str, answers: Sequence[str], *, language: str = "en") -> float:
    """Return F1 of the words of an answer against the right one that it is nearest to.

    Words are what lies between spaces: in Chinese, Japanese or Thai this is about the exact match.

    Args:
        prediction: The answer.
        answers: The right answers; none where the question has none.
        language: See [`normalised_answer`].
    """
    words = normalised_answer(prediction, language=language).split()
    return max(_f1_of_words(words, right.split()) for right in _right_answers(answers, language))


def squad_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str = "en"
) -> dict[str, float]:
    """Return `exact_match` and `f1` of answers: means over questions, in [0, 1].

    Args:
        predictions: An answer for each question, empty for none.
        references: The right answers of each question; none where it has none.
        language: See [`normalised_answer`].
    """
    _check_same(len(predictions), len(references), "answers")
    pairs = list(zip(predictions, references, strict=True))
    return {
        "exact_match": _mean([answer_exact_match(*pair, language=language) for pair in pairs]),
        "f1": _mean([answer_f1(*pair, language=language) for pair in pairs]),
    }


def as_evaluate_metric(name: str, **options: Any) -> evaluate.Metric:
    """Return a metric in the form of `evaluate.Metric`, which works offline, in one call or batch by batch.

    Args:
        name: "accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "entity_f1" or "squad".
        **options: `cache_dir` and other options of `evaluate.Metric`.

    Returns:
        Its `compute(predictions=..., references=...)` returns the number under the metric's name, or of "squad" `exact_match`
        and `f1`.

    Raises:
        InputError: If there is no such metric.
    """
    check_choice(name, _SHELLS, name="name")
    import datasets
    import evaluate

    function, kinds = _SHELLS[name]
    types = [
        datasets.List(datasets.Value(kind[5:-1])) if kind.startswith("list") else datasets.Value(kind)
        for kind in kinds
    ]

    class PlainMetric(evaluate.Metric):
        """A plain function of `hf_pretrain.tasks.metrics` as a metric of evaluate."""

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=str(function.__doc__),
                citation="",
                inputs_description="predictions and references, one an example",
                features=datasets.Features(dict(zip(("predictions", "references"), types, strict=True))),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            result = function(predictions, references)
            return result if isinstance(result, dict) else {name: result}

    return PlainMetric(**options)


# Name -> the function, and the types of a prediction and of a reference.
_SHELLS: dict[str, tuple[Callable[..., Any], tuple[str, str]]] = {
    **{function.__name__: (function, ("int64", "int64")) for function in (accuracy, f1, macro_f1, matthews)},
    **{function.__name__: (function, ("float64", "float64")) for function in (pearson, spearman)},
    "entity_f1": (entity_f1, ("list<string>", "list<string>")),
    "squad": (squad_scores, ("string", "list<string>")),
}


def _both(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, wanted = np.asarray(predictions), np.asarray(references)
    _check_same(len(predicted), len(wanted), "values")
    return predicted, wanted


def _check_same(predicted: int, wanted: int, what: str) -> None:
    if predicted != wanted:
        raise InputError(f"predictions and references: {predicted} and {wanted} {what}; give as many of each")


def _correlation(function: Callable[..., Any], predictions: Any, references: Any) -> float:
    predicted, wanted = (
        np.asarray(values, dtype=np.float64).reshape(len(values)) for values in _both(predictions, references)
    )
    if len(wanted) < 2 or np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return 0.0
    value = float(function(predicted, wanted)[0])
    return value if np.isfinite(value) else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _f1(hits: int, predicted: int, wanted: int) -> float:
    return 2 * hits / max(1, predicted + wanted)


def _parts(tag: str) -> tuple[str, str]:
    """Return prefix and type of a tag."""
    prefix, _, kind = tag.partition("-")
    if prefix not in _PREFIXES or (prefix == "O" and kind):
        raise InputError(f"tag={tag!r} is no tag of entities: they are O, or B, I, E or S with a type, such as B-PER")
    return prefix, kind or "_"


def _right_answers(answers: Sequence[str], language: str) -> list[str]:
    """Return the right answers without what does not count; one that is empty then means that there is none."""
    return [right for answer in answers if (right := normalised_answer(answer, language=language))] or [""]


def _f1_of_words(words: Sequence[str], right: Sequence[str]) -> float:
    if not words or not right:
        return float(list(words) == list(right))
    return _f1((Counter(words) & Counter(right)).total(), len(words), len(right))
