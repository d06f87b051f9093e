"""Classifiers and regressors on the features of a frozen encoder, saved without pickle.

[`FeatureClassifier`] and [`FeatureRegressor`] are estimators of scikit-learn: texts go in, labels or values come out. A saved
folder is a stock checkpoint with two more files. `feature_head.json` says how features are made, and `feature_head.skops` holds
the head, one of [`hf_pretrain.transfer.classic_heads`].
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from hf_pretrain.errors import InputError, check_choice, one_line
from hf_pretrain.evaluation.probes import Inputs
from hf_pretrain.files import plain, share_weights, write_text
from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.environment import Compute, hardware, versions
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard, cite
from hf_pretrain.hub.run import earlier_trainings
from hf_pretrain.hub.text import hub_id
from hf_pretrain.modeling.loading import find_file
from hf_pretrain.transfer.classic_heads import HEADS, Kind, fit_head, read_head, save_head
from hf_pretrain.transfer.features import PretrainedFeatures

CONFIG, HEAD = "feature_head.json", "feature_head.skops"
_FORMAT = 1
# These are of the machine and of the moment, and travel with no model.
_OF_THE_MACHINE = ("model", "tokenizer", "revision", "device", "cache_dir")


class _OnFeatures(BaseEstimator):
    """A head on frozen features, whatever its kind."""

    kind: ClassVar[Kind]

    def __init__(self, features: PretrainedFeatures, head: str, *, folds: int = 5, seed: int = 0) -> None:
        self.features = features
        self.head = head
        self.folds = folds
        self.seed = seed

    def _fit(self, texts: Inputs, targets: np.ndarray) -> Self:
        check_choice(self.head, HEADS[self.kind], name="head")
        texts = list(texts)  # type: ignore[assignment]
        features = clone(self.features).fit()
        return self._fit_rows(features, features.transform(texts), targets, texts)

    def _fit_rows(self, features: PretrainedFeatures, table: np.ndarray, targets: np.ndarray, texts: Inputs) -> Self:
        fitted = fit_head(self.head, table, targets, kind=self.kind, folds=self.folds, seed=self.seed)
        self.head_, self.chosen_, self.cv_score_ = fitted
        self.features_, self.num_examples_ = features, len(texts)
        self.reads_pairs_ = not isinstance(texts[0], str)
        return self

    def _features(self, texts: Inputs) -> np.ndarray:
        check_is_fitted(self, "head_")
        return self.features_.transform(texts).astype(np.float64)

    def predict(self, texts: Inputs) -> np.ndarray:
        """Return the label or the value of each text."""
        return self.predict_features(self._features(texts))

    def predict_features(self, table: np.ndarray) -> np.ndarray:
        """Return the label or the value of each row of features."""
        return np.asarray(self.head_.predict(table.astype(np.float64)))

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        include_encoder: bool = True,
        evaluations: Sequence[Evaluation] = (),
        data: dict[str, Any] | None = None,
    ) -> None:
        """Write the head, the encoder as a stock checkpoint, and a model card; nothing is pickled.

        Args:
            folder: Made if need be.
            include_encoder: Write the encoder and its tokenizer. Otherwise the folder holds the head alone, and names the encoder
                on the Hub and its commit.
            evaluations: What was measured, for the card.
            data: What the card says of the training data.

        Raises:
            InputError: If an encoder that is left out has no name on the Hub, or one that is not cannot be saved on its own.
        """
        check_is_fitted(self, "head_")
        folder, features = Path(folder), self.features_
        name = features.model if isinstance(features.model, str) else None
        source = {"model": None, "revision": None, "tokenizer": None}
        if not include_encoder:
            source = self._source(name)
        elif getattr(features.encoder.config, "is_encoder_decoder", False):
            raise InputError(
                f"model={features.model!r} is an encoder-decoder, whose encoder alone is no stock checkpoint: give "
                "include_encoder=False"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if include_encoder:
            weights = features.encoder.state_dict()
            kept = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
            features.encoder.save_pretrained(folder, state_dict=kept)
            features.text_tokenizer.save_pretrained(folder)
            share_weights(folder)
        options = {key: value for key, value in features.get_params().items() if key not in _OF_THE_MACHINE}
        content = {
            "format": _FORMAT,
            "kind": self.kind,
            "head": self.head,
            "folds": self.folds,
            "seed": self.seed,
            "chosen": self.chosen_,
            "cv_score": self.cv_score_,
            "classes": None if self.kind == "regression" else plain(self.classes_),
            "num_examples": self.num_examples_,
            "reads_pairs": self.reads_pairs_,
            "encoder": source | {"digest": features.model_digest_},
            "features": options,
        }
        write_text(folder / CONFIG, json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n")
        save_head(self.head_, folder / HEAD)
        self._write_card(folder, name, evaluations=evaluations, data=data or {}, has_encoder=include_encoder)

    def _source(self, name: str | None) -> dict[str, Any]:
        """Return where the encoder is found on the Hub."""
        if name is None or hub_id(name) is None or Path(name).exists():
            raise InputError(
                f"include_encoder=False needs a model with a name on the Hub, not {name or 'a live one'!r}"
            )
        tokenizer = self.features_.tokenizer
        if tokenizer is not None and (not isinstance(tokenizer, str) or hub_id(tokenizer) is None):
            raise InputError(
                "include_encoder=False needs a tokenizer with a name on the Hub: leave it out, or name one"
            )
        revision = self.features_.commit_ or self.features_.revision
        return {"model": name, "revision": revision, "tokenizer": tokenizer}

    def _write_card(
        self,
        folder: Path,
        name: str | None,
        *,
        evaluations: Sequence[Evaluation],
        data: dict[str, Any],
        has_encoder: bool,
    ) -> None:
        features, title = self.features_, HEADS[self.kind][self.head].title
        own = type(self).__name__
        text = '("A text.", "Another text.")' if self.reads_pairs_ else '"A text."'
        usage = f'from hf_pretrain import {own}\n\nmodel = {own}.from_pretrained("{{repo}}")\nprint(model.predict([{text}]))\n'
        base = hub_id(name) if name and not Path(name).exists() else None
        encoder = f"[{base}](https://huggingface.co/{base})" if base else "an encoder"
        chosen = "".join(f", {key} = {value:g} by cross-validation" for key, value in self.chosen_.items())
        objective = ObjectiveDescription(
            name="features",
            title=f"Frozen features and a {title}",
            description=f"The encoder was not trained. A {title}{chosen}, reads its features ({self.features_.pooling} pooling).",
            citations=cite("devlin2019bert"),
            pipeline_tag="text-classification",
            usage=usage,
            tags=("scikit-learn", "skops"),
        )
        card = PretrainingCard(
            model_name=folder.resolve().name,
            model_class=type(features.encoder).__name__ if has_encoder else own,
            has_own_code=has_encoder and not type(features.encoder).__module__.startswith("transformers."),
            loading="" if has_encoder else usage,
            objective=objective,
            origin=f"A {title} was fitted on features of {encoder}",
            base_model=base,
            earlier=earlier_trainings(name) if name else (),
            data={"examples": self.num_examples_} | data,
            recipe={"classifier": self.head, "pooling": features.pooling, "layer": features.layer}
            | {"seed": self.seed},
            evaluations=evaluations,
            compute=Compute(hardware=hardware(device_type=features.encoder.device.type)),
            versions=versions() | {"scikit-learn": _version("sklearn"), "skops": _version("skops")},
        )
        write_card(card, folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Save, and upload the folder.

        Args:
            repo_id: Repository; made if need be.
            private: Whether a new repository is private.
            **options: As in `save_pretrained`.

        Returns:
            Address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, repo_id.rpartition("/")[2])
            self.save_pretrained(folder, **options)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {type(self).__name__}")
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Return what `save_pretrained` wrote; it gives the same predictions bit for bit on the same machine.

        Args:
            name_or_path: Folder, or repository of the Hub.
            revision: Branch, tag or commit of the repository.
            device: Where the encoder computes.
            cache_dir: Folder that keeps features.

        Raises:
            InputError: If there is no head, one of another kind, one with a type that is not trusted, or one that was fitted on
                another encoder.
        """
        name = str(name_or_path)
        content = _read_config(name, revision)
        if content["kind"] != cls.kind:
            other = {"classification": "FeatureClassifier", "regression": "FeatureRegressor"}.get(content["kind"])
            raise InputError(f"name_or_path={name!r} holds a head of {content['kind']}: open it with {other}")
        encoder = content["encoder"]
        if encoder["model"] is None:
            source: dict[str, Any] = {"model": name, "revision": revision}
        else:
            source = {key: encoder[key] for key in ("model", "revision", "tokenizer")}
        options = content["features"]
        for key in ("layer", "combination"):
            options[key] = tuple(options[key]) if isinstance(options[key], list) else options[key]
        features = PretrainedFeatures(**source, **options, device=device, cache_dir=cache_dir).fit()
        if features.model_digest_ != encoder["digest"]:
            raise InputError(
                f"the encoder of {name!r} has other weights than those that its head was fitted on: put them back, or fit anew"
            )
        known = cls(features, content["head"], folds=content["folds"], seed=content["seed"])
        known.features_, known.head_ = features, read_head(_file(name, HEAD, revision))
        known.chosen_, known.cv_score_ = content["chosen"], content["cv_score"]
        known.num_examples_ = content["num_examples"]
        known.reads_pairs_ = content["reads_pairs"]
        if content["classes"] is not None:
            known.classes_ = np.asarray(content["classes"])
        return known


class FeatureClassifier(ClassifierMixin, _OnFeatures):
    """A classifier of texts, or of pairs of texts: a head of scikit-learn on the features of a frozen encoder.

    Args:
        features: The features; an unfitted copy of them is fitted.
        head: `"logistic"`, `"linear_svc"`, `"rbf_svm"` or `"random_forest"`.
        folds: Folds of the cross-validation that chooses the strength of the regularisation; 0 chooses none.
        seed: Seed of the folds and of the head.

    Attributes:
        classes_: Labels, sorted.
        features_: The fitted features.
        head_: The fitted pipeline of scikit-learn, which knows the labels by their numbers.
        chosen_: The chosen strength by its name.
        cv_score_: Mean score over the folds, see [`hf_pretrain.transfer.classic_heads.FittedHead`].
    """

    kind = "classification"

    def __init__(self, features: PretrainedFeatures, head: str = "logistic", *, folds: int = 5, seed: int = 0) -> None:
        super().__init__(features, head, folds=folds, seed=seed)

    def fit(self, texts: Inputs, labels: Sequence[Any] | np.ndarray) -> Self:
        """Fit the head.

        Args:
            texts: The texts, or pairs of texts.
            labels: The label of each: strings, numbers or booleans.

        Returns:
            The classifier.

        Raises:
            InputError: If something is no text, or there is one class.
        """
        self.classes_, numbers = np.unique(np.asarray(labels), return_inverse=True)
        return self._fit(texts, numbers)

    def fit_features(self, table: np.ndarray, labels: Sequence[Any] | np.ndarray, *, texts: Inputs) -> Self:
        """Fit the head on what the fitted `features` made of the texts, to make them once for several heads."""
        self.classes_, numbers = np.unique(np.asarray(labels), return_inverse=True)
        return self._fit_rows(self.features, table, numbers, texts)

    def predict_features(self, table: np.ndarray) -> np.ndarray:
        """Return the label of each row of features."""
        return np.asarray(self.classes_[super().predict_features(table)])

    @available_if(lambda self: self.head in ("logistic", "random_forest"))
    def predict_proba(self, texts: Inputs) -> np.ndarray:
        """Return the probability of each class: `[N, classes]`; not of support vector machines."""
        return np.asarray(self.head_.predict_proba(self._features(texts)))

    @available_if(lambda self: self.head != "random_forest")
    def decision_function(self, texts: Inputs) -> np.ndarray:
        """Return the score of each class, `[N, classes]`; of two classes `[N]`, positive for the second."""
        return np.asarray(self.head_.decision_function(self._features(texts)))


class FeatureRegressor(RegressorMixin, _OnFeatures):
    """A regression of texts, or of pairs of texts: a head of scikit-learn on the features of a frozen encoder.

    Args:
        features: The features; an unfitted copy of them is fitted.
        head: `"ridge"`, `"linear_svr"`, `"rbf_svr"` or `"random_forest"`.
        folds: Folds of the cross-validation that chooses the strength of the regularisation; 0 chooses none.
        seed: Seed of the folds and of the head.

    Attributes:
        features_: The fitted features.
        head_: The fitted pipeline of scikit-learn.
        chosen_: The chosen strength by its name.
        cv_score_: Mean score over the folds, see [`hf_pretrain.transfer.classic_heads.FittedHead`].
    """

    kind = "regression"

    def __init__(self, features: PretrainedFeatures, head: str = "ridge", *, folds: int = 5, seed: int = 0) -> None:
        super().__init__(features, head, folds=folds, seed=seed)

    def fit(self, texts: Inputs, values: Sequence[float] | np.ndarray) -> Self:
        """Fit the head on the value of each text.

        Raises:
            InputError: If something is no text, or a value is not finite.
        """
        targets = np.asarray(values, dtype=np.float64)
        if not np.isfinite(targets).all():
            raise InputError(f"values[{int(np.argmin(np.isfinite(targets)))}] is not finite: leave the row out")
        return self._fit(texts, targets)

    def fit_features(self, table: np.ndarray, values: Sequence[float] | np.ndarray, *, texts: Inputs) -> Self:
        """Fit the head on what the fitted `features` made of the texts, to make them once for several heads."""
        return self._fit_rows(self.features, table, np.asarray(values, dtype=np.float64), texts)


def _read_config(name: str, revision: str | None) -> dict[str, Any]:
    path = _file(name, CONFIG, revision)
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{CONFIG} of {name!r} is damaged ({one_line(error)}): copy it again") from error
    if version > _FORMAT:
        raise InputError(
            f"{CONFIG} of {name!r} has format {version}, and {_FORMAT} is known: install a newer hf_pretrain"
        )
    return content


def _file(name: str, file: str, revision: str | None) -> str:
    try:
        path = find_file(name, file, **({} if revision is None else {"revision": revision}))
    except (OSError, ValueError):
        path = None
    if path is None:
        raise InputError(
            f"name_or_path={name!r} has no {file}: give what save_pretrained of a FeatureClassifier wrote"
        )
    return path


def _version(package: str) -> str:
    return str(getattr(__import__(package), "__version__", ""))
