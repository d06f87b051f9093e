"""Classify texts by the features of a frozen encoder: logistic regression, support vector machines, random forest.

    hf-pretrain features my-encoder --tasks tasks.yaml --task sst2 --classifier all --output_dir my-classifier
    hf-pretrain features my-encoder --train_file train.tsv --validation_file dev.tsv --classifier all

The first rows of the table need no encoder: the most frequent class, and TF-IDF with a linear support vector machine. The
strength of the regularisation is chosen by cross-validation of the training rows alone. The validation rows are only measured.
With --classifier all the classifier with the best cross-validation is written.

The folder opens with `hf_pretrain.FeatureClassifier`, and its encoder with `AutoModel.from_pretrained`. Values (--task_type
regression) have the heads ridge, linear_svr, rbf_svr and random_forest, and `hf_pretrain.FeatureRegressor`.
Needs the package skops to write a folder: pip install 'hf-pretrain[features]'.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.probes import Pooling
from hf_pretrain.options import option
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec
from hf_pretrain.training.output_folder import output_directory, paths_in
from hf_pretrain.training.program import print_table
from hf_pretrain.transfer.classic_heads import HEADS, Kind
from hf_pretrain.transfer.feature_heads import FeatureClassifier, FeatureRegressor
from hf_pretrain.transfer.features import PretrainedFeatures
from hf_pretrain.transfer.tuning.options import TaskArguments
from hf_pretrain.transfer.tuning.references import (
    Reference,
    constant_reference,
    evaluation_of,
    score_classes,
    tfidf_reference,
)


@dataclass
class FeaturesArguments(TaskArguments):
    """Which encoder, which task, how features are made, and what reads them.

    Raises:
        InputError: If an option is out of range, or has no effect beside the others.
    """

    ranges: ClassVar[dict[str, str]] = {
        "max_length": "[1, inf)",
        "batch_size": "[1, inf)",
        "folds": "[0, inf)",
    }

    needs: ClassVar[dict[str, str]] = {"overwrite_output_dir": "output_dir"}

    output_dir: str | None = option(None, "Folder to write the classifier to; it does not exist, or is empty.")
    overwrite_output_dir: bool = option(
        False, "Replace the earlier classifier or run in output_dir, once all is measured."
    )
    task_type: Literal["classification", "regression"] = option(
        "classification", "Whether labels are classes or values."
    )
    classifier: str | None = option(
        None,
        "logistic, linear_svc, rbf_svm, random_forest, or all; of values ridge, linear_svr, rbf_svr, random_forest, or all. By "
        "default the first.",
    )
    folds: int = option(5, "Folds of the cross-validation that chooses the regularisation; 0 chooses none.")
    pooling: Pooling = option("mean", "How the states of the tokens become one vector.")
    layer: list[int] = option(
        factory=lambda: [-1],
        help="Layers of the states: 0 is the embeddings, -1 the model's output; several are combined.",
    )
    combination: Literal["concat", "sum", "mean"] = option("concat", "How several layers are combined.")
    layer_weights: list[float] | None = option(None, "Instead of combination: a weight for each layer, of their sum.")
    max_length: int | None = option(
        None, "Most tokens of a text; by default as many as the model has positions and the tokenizer takes."
    )
    batch_size: int = option(32, "Texts in a batch; they are sorted by length.")
    bf16: bool | None = option(None, "Compute in bfloat16; by default on a GPU that has it.")
    cache_dir: str | None = option(None, "Folder that keeps the features for another run.")
    seed: int = option(0, "Seed of the folds, of the heads, and of the rows that are held out.")

    def __post_init__(self) -> None:
        """Refuse what has no effect or is missing."""
        super().__post_init__()
        if self.layer_weights is not None and self.combination != "concat":
            raise InputError(f"combination={self.combination!r} has no effect beside layer_weights: leave it out")

    def spec(self) -> TaskSpec:
        """Return the task.

        Raises:
            InputError: If there is none of that name, or one without one label a text.
        """
        return self.find_task(tuple(HEADS), what="classic heads are")

    def features(self) -> PretrainedFeatures:
        """Return the features, before they are fitted."""
        combination = self.combination if self.layer_weights is None else tuple(self.layer_weights)
        return PretrainedFeatures(
            self.model_name_or_path,
            pooling=self.pooling,
            layer=self.layer[0] if len(self.layer) == 1 else tuple(self.layer),
            combination=combination,
            max_length=self.max_length,
            batch_size=self.batch_size,
            bf16=self.bf16,
            cache_dir=self.cache_dir,
        )

    def heads(self, kind: Kind) -> list[str]:
        """Return the heads to fit.

        Raises:
            InputError: If there is none of that name for the kind.
        """
        if self.classifier == "all":
            return list(HEADS[kind])
        name = self.classifier or next(iter(HEADS[kind]))
        check_choice(name, (*HEADS[kind], "all"), name="classifier")
        return [name]


ARGUMENTS = (FeaturesArguments,)


class Measured(NamedTuple):
    """A model and its scores.

    Attributes:
        name: What the table calls it.
        model: The classifier; None of a baseline.
        cv_score: Score of the cross-validation of the training rows.
        chosen: Chosen strength by its name.
        scores: Scores on the validation rows.
    """

    name: str
    model: FeatureClassifier | FeatureRegressor | None
    cv_score: float | None
    chosen: dict[str, float]
    scores: dict[str, float]


def measure(args: FeaturesArguments, data: TaskData) -> list[Measured]:
    """Fit and measure the baselines and the heads.

    Args:
        args: The options.
        data: The task.

    Returns:
        The constant, TF-IDF, and the heads.

    Raises:
        InputError: If a training row lacks its label, or the encoder cannot give such features.
    """
    kind = cast(Kind, data.spec.type)
    heads = args.heads(kind)
    shared: dict[str, Any] = {"folds": args.folds, "seed": args.seed}
    texts, targets, held_out = data.texts("train"), data.targets("train"), data.texts("validation")
    # The encoder is opened before anything is fitted: a mistake is said at once.
    features = args.features().fit()
    references = (constant_reference(data), tfidf_reference(data, **shared))
    found = [
        Measured(known.name, None, known.cv_score, dict(known.chosen), known.scores)
        for known in references
        if known is not None
    ]
    table, held_out_table = features.transform(texts), features.transform(held_out)
    for name in heads:
        if kind == "classification":
            labels = np.asarray(data.labels)[targets]
            model: Any = FeatureClassifier(features, name, **shared).fit_features(table, labels, texts=texts)
            index = {label: number for number, label in enumerate(data.labels or [])}
            predicted = np.array([index[label] for label in model.predict_features(held_out_table)])
        else:
            model = FeatureRegressor(features, name, **shared).fit_features(table, targets, texts=texts)
            predicted = model.predict_features(held_out_table)
        found.append(Measured(name, model, model.cv_score_, model.chosen_, score_classes(data, predicted)))
    return found


def best_of(found: list[Measured]) -> Measured:
    """Return the head with the best cross-validation of the training rows; the first one where there was none."""
    heads = [entry for entry in found if entry.model is not None]
    return max(heads, key=lambda entry: -np.inf if entry.cv_score is None else entry.cv_score)


def _save(args: FeaturesArguments, data: TaskData, found: list[Measured], folder: Path) -> Measured:
    """Write the best head with its scores beside those of TF-IDF."""
    best, tfidf = best_of(found), found[1]
    assert best.model is not None, "it is a head"
    evaluation = evaluation_of(
        data,
        best.scores,
        method=f"{HEADS[best.model.kind][best.name].title} on frozen features",
        reference=Reference(tfidf.name, tfidf.scores),
    )
    facts = {"sources": [Path(name).name for name in data.spec.train_file] or [str(data.spec.dataset_name)]}
    best.model.save_pretrained(folder, evaluations=[evaluation], data=facts)
    return best


def main(argv: list[str] | None = None) -> None:
    """Read the task, fit, measure, and write the best; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="features", description=__doc__, first="model_name_or_path")
    spec = args.spec()
    args.heads(cast(Kind, spec.type))
    if args.output_dir is None:
        _measured(args, spec)
        return
    with output_directory(args, inputs=paths_in((args,), sys.argv[1:] if argv is None else argv)) as claimed:
        data, found = _measured(args, spec)
        claimed.training_begins()
        best = _save(args, data, found, Path(args.output_dir))
        loader = type(best.model).__name__
        print(f'model  {args.output_dir}  ({best.name}; opens with {loader}.from_pretrained("{args.output_dir}"))')


def _measured(args: FeaturesArguments, spec: TaskSpec) -> tuple[TaskData, list[Measured]]:
    """Read the task, fit and measure, and print the table."""
    begin = time.perf_counter()
    data = args.load(spec, seed=args.seed)
    print(
        f"task   {spec.name}: {len(data.rows('train')):,} examples to train on, {len(data.validation):,} to measure on\n"
        f"       columns: {data.columns}",
        flush=True,
    )
    found = measure(args, data)
    names = list(found[0].scores)
    names.insert(0, names.pop(names.index(data.main_metric)))
    rows = [
        (
            entry.name,
            ", ".join(f"{name}={value:g}" for name, value in entry.chosen.items()),
            "" if entry.cv_score is None else f"{entry.cv_score:.3f}",
            *(f"{entry.scores[name]:.3f}" for name in names),
        )
        for entry in found
    ]
    print_table(rows, header=("", "", "train cv " + ("Matthews" if data.labels else "R2"), *names))
    print(f"       in {time.perf_counter() - begin:.1f} s")
    return data, found
