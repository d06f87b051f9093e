"""The heads of scikit-learn that read features: which there are, how their strength is chosen, and how they are saved.

A head is a `Pipeline` that standardises the features and classifies them, or estimates a value. [`fit_head`] makes one, and
[`fit_tfidf`] the baseline that reads no features. [`save_head`] writes one with skops, and [`read_head`]
opens no type that is not known to be harmless.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC, LinearSVR

from hf_pretrain.errors import InputError, check_choice, check_range, one_line

Kind = Literal["classification", "regression"]

TRUSTED_TYPES = ("sklearn.tree._tree.Tree",)
"""Types that skops does not know as harmless and the heads are made of: arrays of numbers of a decision tree."""

_TREES = 300
# From strong regularisation to weak: of equals the first is taken.
_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_RBF_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
_ITERATIONS = 5000

logger = logging.getLogger(__name__)


class HeadKind(NamedTuple):
    """A kind of head.

    Attributes:
        title: Its name in words.
        make: Makes it from a seed.
        strength: Name of the parameter of its regularisation, of the last step of the pipeline; "" if there is none to choose.
        strengths: The values to choose from, from strong regularisation to weak.
    """

    title: str
    make: Any
    strength: str = ""
    strengths: tuple[float, ...] = ()


def _scaled_target(regressor: Any) -> TransformedTargetRegressor:
    # The tolerance of a support vector regression is a number in the units of the target.
    return TransformedTargetRegressor(regressor, transformer=StandardScaler())


HEADS: dict[Kind, dict[str, HeadKind]] = {
    "classification": {
        "logistic": HeadKind(
            "logistic regression", lambda seed: LogisticRegression(max_iter=_ITERATIONS), "C", _STRENGTHS
        ),
        "linear_svc": HeadKind(
            "linear support vector machine",
            lambda seed: LinearSVC(max_iter=_ITERATIONS, random_state=seed),
            "C",
            _STRENGTHS,
        ),
        "rbf_svm": HeadKind("support vector machine with an RBF kernel", lambda seed: SVC(), "C", _RBF_STRENGTHS),
        "random_forest": HeadKind(
            "random forest", lambda seed: RandomForestClassifier(n_estimators=_TREES, random_state=seed)
        ),
    },
    "regression": {
        "ridge": HeadKind("ridge regression", lambda seed: Ridge(), "alpha", (1e4, 1e3, 1e2, 1e1, 1.0)),
        "linear_svr": HeadKind(
            "linear support vector regression",
            lambda seed: _scaled_target(
                LinearSVR(loss="squared_epsilon_insensitive", dual="auto", max_iter=_ITERATIONS, random_state=seed)
            ),
            "regressor__C",
            _STRENGTHS,
        ),
        "rbf_svr": HeadKind(
            "support vector regression with an RBF kernel",
            lambda seed: _scaled_target(SVR()),
            "regressor__C",
            _RBF_STRENGTHS,
        ),
        "random_forest": HeadKind(
            "random forest", lambda seed: RandomForestRegressor(n_estimators=_TREES, random_state=seed)
        ),
    },
}
"""The heads of each kind, by name."""


class FittedHead(NamedTuple):
    """A fitted head, and what the cross-validation said of it.

    Attributes:
        pipeline: The pipeline of scikit-learn, fitted on all rows.
        chosen: The chosen strength by its name; {} where there was none to choose.
        score: Mean over the folds of the Matthews correlation, of values of R²; None without cross-validation.
    """

    pipeline: Pipeline
    chosen: dict[str, float]
    score: float | None


def fit_head(
    name: str, features: np.ndarray, targets: np.ndarray, *, kind: Kind, folds: int = 5, seed: int = 0
) -> FittedHead:
    """Fit a head, with the strength of its regularisation chosen by cross-validation of these rows alone.

    The features are standardised inside of each fold. The strength with the best Matthews correlation is taken, of values that
    with the best R²; of equals the stronger. Then the head is fitted on all rows.

    Args:
        name: One of the heads of the kind.
        features: `[N, D]`.
        targets: `[N]`: numbers of classes, or values.
        kind: Kind of the targets.
        folds: Folds of the cross-validation; fewer where a class has fewer rows. 0 keeps scikit-learn's own strength.
        seed: Seed of the folds and of the head.

    Raises:
        InputError: If the head is unknown for the kind, or there is one class.
    """
    check_choice(name, HEADS[kind], name="head")
    head = HEADS[kind][name]
    scaler = [] if name == "random_forest" else [("scaler", StandardScaler())]
    pipeline = Pipeline([*scaler, ("head", head.make(seed))])
    grid = {f"head__{head.strength}": head.strengths} if head.strength else {}
    return _fit(pipeline, grid, features.astype(np.float64), targets, kind=kind, folds=folds, seed=seed)


def fit_tfidf(
    texts: Sequence[str] | Sequence[tuple[str, str]], targets: np.ndarray, *, kind: Kind, folds: int = 5, seed: int = 0
) -> FittedHead:
    """Fit the baseline without an encoder: TF-IDF of words and pairs of words, and a linear support vector machine.

    Values get a ridge regression. The words of the second text of a pair are other ones than those of the first. The arguments
    are those of [`fit_head`].
    """
    model = LinearSVC(max_iter=_ITERATIONS, random_state=seed) if kind == "classification" else Ridge()
    pipeline = Pipeline([("tfidf", TfidfVectorizer(analyzer=_ngrams, sublinear_tf=True)), ("head", model)])
    # Rows of length 1 need less regularisation than standardised ones.
    grid = (
        {"head__C": (0.01, 0.1, 1.0, 10.0, 100.0)}
        if kind == "classification"
        else {"head__alpha": (10.0, 1.0, 0.1, 0.01)}
    )
    return _fit(pipeline, grid, list(texts), targets, kind=kind, folds=folds, seed=seed)


def _ngrams(text: str | tuple[str, str]) -> list[tuple[Any, ...]]:
    """Return the words of a text and its pairs of neighbours, each with the number of the text."""
    texts = (text,) if isinstance(text, str) else text
    found: list[tuple[Any, ...]] = []
    for number, part in enumerate(texts):
        words = re.findall(r"\w+", part.lower())
        found += [(number, *words[begin : begin + size]) for size in (1, 2) for begin in range(len(words) - size + 1)]
    return found


def _fit(
    pipeline: Pipeline,
    grid: Mapping[str, tuple[float, ...]],
    rows: Any,
    targets: np.ndarray,
    *,
    kind: Kind,
    folds: int,
    seed: int,
) -> FittedHead:
    check_range(folds, "[0, inf)", name="folds", hint="5 is usual, 0 chooses nothing")
    if len(rows) != len(targets) or not len(rows):
        raise InputError(f"texts and labels are {len(rows)} and {len(targets)}: give as many, at least one")
    counts = np.unique(targets, return_counts=True)[1]
    if kind == "classification" and len(counts) < 2:
        raise InputError(f"labels have one class in {len(targets)} rows: a classifier needs two")
    most = int(counts.min()) if kind == "classification" else len(targets)
    if folds > most:
        left = "no strength is chosen" if most < 2 else f"there are {most} folds"
        logger.warning("folds=%d, but the rarest class has %d rows: %s", folds, most, left)
    folds = min(folds, most)
    if folds < 2:
        return FittedHead(pipeline.fit(rows, targets), {}, None)
    splitter = StratifiedKFold if kind == "classification" else KFold
    search = GridSearchCV(
        pipeline,
        grid,
        cv=splitter(folds, shuffle=True, random_state=seed),
        scoring="matthews_corrcoef" if kind == "classification" else "r2",
    ).fit(rows, targets)
    chosen = {name.rpartition("__")[2]: float(value) for name, value in search.best_params_.items()}
    return FittedHead(search.best_estimator_, chosen, float(search.best_score_))


def save_head(head: Pipeline, path: Path) -> None:
    """Write a fitted head; raise InputError if skops is not installed."""
    _skops().dump(head, path)


def read_head(path: str | Path) -> Pipeline:
    """Open a head; a type that is not known to be harmless is refused, and none of its code runs.

    Raises:
        InputError: If there is such a type, the file is damaged, or skops is not installed.
    """
    skops = _skops()
    try:
        foreign = sorted(set(skops.get_untrusted_types(file=path)) - set(TRUSTED_TYPES))
        head = None if foreign else skops.load(path, trusted=list(TRUSTED_TYPES))
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{str(path)!r} cannot be read ({one_line(error)}): copy it again") from error
    if foreign:
        raise InputError(
            f"{str(path)!r} holds {', '.join(foreign)}, which is no part of a head of this library: do not use it"
        )
    if not isinstance(head, Pipeline):
        raise InputError(f"{str(path)!r} holds a {type(head).__name__}, not a Pipeline: copy it again")
    return head


def _skops() -> Any:
    try:
        import skops.io
    except ImportError as error:
        raise InputError(
            "a head is saved by skops, which is not installed: pip install 'hf-pretrain[features]'"
        ) from error
    return skops.io
