"""What a task gives without an encoder, and the record of scores beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np

from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.transfer.classic_heads import Kind, fit_tfidf

_CONSTANTS = {
    "classification": "most frequent class",
    "regression": "mean of the training rows",
    "tokens": "most frequent class",
    "choice": "most frequent choice",
    "span": "no answer",
}
_TFIDF = {"classification": "TF-IDF + linear_svc", "regression": "TF-IDF + ridge"}
_TASKS_OF_THE_HUB = {
    "classification": "text-classification",
    "regression": "text-classification",
    "tokens": "token-classification",
    "choice": "multiple-choice",
    "span": "question-answering",
}


class Reference(NamedTuple):
    """A model without an encoder, and its scores on the validation rows.

    Attributes:
        name: What a table calls it.
        scores: The scores.
        cv_score: Score of the cross-validation of the training rows; None of a constant.
        chosen: Chosen strength of the regularisation by its name.
    """

    name: str
    scores: dict[str, float]
    cv_score: float | None = None
    chosen: Mapping[str, float] = MappingProxyType({})


def constant_reference(data: TaskData) -> Reference:
    """Return the constant of a task: the most frequent class, the mean of the values, no answer."""
    return Reference(_CONSTANTS[data.spec.type], data.baseline())


def tfidf_reference(data: TaskData, *, folds: int = 5, seed: int = 0) -> Reference | None:
    """Return TF-IDF with a linear support vector machine (of values a ridge regression); None of other tasks than texts.

    Args:
        data: The task, with rows to train on.
        folds: Folds of the cross-validation that chooses the strength of the regularisation.
        seed: Seed of the folds.
    """
    kind = data.spec.type
    if kind not in _TFIDF:
        return None
    fitted = fit_tfidf(data.texts("train"), data.targets("train"), kind=cast(Kind, kind), folds=folds, seed=seed)
    scores = score_classes(data, fitted.pipeline.predict(data.texts("validation")))
    return Reference(_TFIDF[kind], scores, fitted.score, dict(fitted.chosen))


def score_classes(data: TaskData, predicted: np.ndarray) -> dict[str, float]:
    """Score predictions on the validation rows: numbers of classes, or values."""
    logits = predicted if data.labels is None else np.eye(len(data.labels))[predicted]
    return data.score("validation", logits)


def task_of_the_hub(data: TaskData) -> str:
    """Return the Hub's name of a kind of task, such as "text-classification"."""
    return _TASKS_OF_THE_HUB[data.spec.type]


def evaluation_of(data: TaskData, scores: dict[str, float], *, method: str, reference: Reference) -> Evaluation:
    """Return the record of scores on the validation rows, for a card.

    Args:
        data: The task.
        scores: The scores; those that are no finite number are left out.
        method: How they were reached, in words.
        reference: What stands beside them.
    """
    spec = data.spec
    # The metric that counts is the first one.
    names = sorted(scores, key=lambda name: name != data.main_metric)
    metrics = {name: scores[name] for name in names if np.isfinite(scores[name])}
    return Evaluation(
        task=spec.name,
        dataset=spec.dataset_name or Path((spec.validation_file or spec.train_file)[0]).name,
        dataset_config=spec.dataset_config_name,
        split="validation" if spec.validation_file or spec.validation_split else "held-out rows",
        metrics=metrics,
        method=method,
        task_type=task_of_the_hub(data),
        baseline={name: value for name, value in reference.scores.items() if name in metrics and np.isfinite(value)},
        baseline_name=reference.name,
        num_examples=num_labelled(data),
    )


def num_labelled(data: TaskData) -> int:
    """Return how many validation rows have a label."""
    targets: Any = data.targets("validation")
    if data.spec.type == "regression":
        return int(np.isfinite(targets).sum())
    if data.spec.type in ("classification", "choice"):
        return int((targets != IGNORED).sum())
    if data.spec.type == "tokens":
        return sum(bool((row != IGNORED).any()) for row in targets)
    return sum(row is not None for row in targets)
