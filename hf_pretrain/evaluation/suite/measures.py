"""How a model is measured on a task: each measure returns an `Evaluation` with its method, baseline and number of examples.

[`measure_task`] calls the measure by its name. Fine-tuning and a head that was fine-tuned are none of them: they belong to
`transfer`. [`over_seeds`] makes one evaluation of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.likelihood import score_options
from hf_pretrain.evaluation.minimal_pairs import MinimalPair, pair_accuracy, read_minimal_pairs
from hf_pretrain.evaluation.probes import probe_predictions
from hf_pretrain.evaluation.similarity import similarity_correlation, text_vectors
from hf_pretrain.evaluation.suite.models import EvaluatedModel
from hf_pretrain.evaluation.suite.tasks import How, SuiteTask
from hf_pretrain.evaluation.words import analogy_accuracy, read_questions, read_scored_words, word_similarity
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.tasks.examples import choices_of
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import load_task

# Names of the Hub for metrics of tasks.
_HUB_NAMES = {"matthews": "matthews_correlation", "spearman": "spearmanr", "pearson": "pearsonr"}
_TASK_TYPES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "tokens": "token-classification",
    "choice": "multiple-choice",
    "span": "question-answering",
}
_CONSTANTS = {"regression": "mean of the training rows", "span": "no answer"}
# Candidates for an answer, from the most frequent word on.
_CANDIDATES = 30_000
_COINS = 0.5


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What all measures share.

    Attributes:
        max_train_examples: Rows that probes and fine-tuning learn from, at most.
        max_examples: Rows that are scored, at most: the first ones; of minimal pairs those of each paradigm.
        max_length: Most tokens of a text.
        validation_fraction: Share of the rows that is held out where a task has none to evaluate on.
        seed: Key of the draws.
    """

    max_train_examples: int | None = None
    max_examples: int | None = None
    max_length: int | None = None
    validation_fraction: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class LoadedTask:
    """A task with its content, read once for all models.

    Attributes:
        task: The task.
        options: What all measures share.
    """

    task: SuiteTask
    options: MeasureOptions

    @cached_property
    def data(self) -> TaskData:
        """The labelled examples."""
        assert self.task.spec is not None, "it is a task of labelled examples"
        options = self.options
        data = load_task(
            self.task.spec,
            seed=options.seed,
            validation_fraction=options.validation_fraction,
            max_examples=options.max_train_examples,
        )
        if options.max_examples is not None and options.max_examples < len(data.validation):
            data = replace(data, validation=data.validation.select(range(options.max_examples)))
        return data

    @cached_property
    def pairs(self) -> list[MinimalPair]:
        """The minimal pairs."""
        return read_minimal_pairs(list(self.task.files), limit=self.options.max_examples)

    @property
    def num_examples(self) -> int:
        """Validation rows that count: those with a label."""
        targets = self.data.targets("validation")
        if targets.dtype == object:
            if self.data.spec.type == "span":
                return sum(answers is not None for answers in targets)
            return sum(bool((np.asarray(classes) != IGNORED).any()) for classes in targets)
        return int((np.isfinite(targets) if targets.dtype.kind == "f" else targets != IGNORED).sum())

    def read(self) -> None:
        """Read the content now, so that a mistake in it is said before any model is opened."""
        if self.task.spec is not None:
            self.data.baseline()
        elif self.task.material == "minimal pairs":
            _ = self.pairs
        else:
            self.words()

    def words(self) -> list[str]:
        """Return the words of a task of words, in their order."""
        (path,) = self.task.files
        if self.task.material == "analogies":
            return [word for rows in read_questions(path).values() for row in rows for word in row]
        return [word for first, second, _ in read_scored_words(path) for word in (first, second)]

    def of_examples(self, scores: Mapping[str, float], *, method: str, how: How) -> Evaluation:
        """Return scores of labelled examples with their baseline, a constant."""
        spec, data = self.data.spec, self.data
        main = data.main_metric
        if main not in scores:
            raise InputError(
                f"task {spec.name!r}: metric={main!r} is not measured by how={how!r}, which has {', '.join(scores)}: name one of "
                "them, or choose another how"
            )
        ordered = {main: scores[main]} | dict(scores)
        baseline = data.baseline()
        return Evaluation(
            task=self.name_of(how),
            **self.origin(),
            metrics={_HUB_NAMES.get(name, name): value for name, value in ordered.items()},
            method=method,
            task_type=_TASK_TYPES[spec.type],
            baseline={_HUB_NAMES.get(name, name): baseline[name] for name in ordered if name in baseline},
            baseline_name=_CONSTANTS.get(spec.type, "most frequent class"),
            num_examples=self.num_examples,
        )

    def origin(self) -> dict[str, Any]:
        """Return where labelled examples are from, as fields of an `Evaluation`."""
        spec = self.data.spec
        files = [Path(file) for file in spec.validation_file or spec.train_file]
        is_held_out = not (spec.validation_file or spec.validation_split)
        return {
            "dataset": spec.dataset_name or ", ".join((spec.name, files[0].name)),
            "dataset_config": spec.dataset_config_name,
            "split": "held-out rows" if is_held_out else spec.validation_split or "validation",
        }

    def name_of(self, how: How) -> str:
        """Return the name of the task in a card: that of another than the usual measure stands behind it."""
        return self.task.name if how == self.task.hows[0] else f"{self.task.name}, {how}"


def measure_task(model: EvaluatedModel, loaded: LoadedTask, how: How) -> Evaluation:
    """Measure a model on a task.

    Args:
        model: The model.
        loaded: The task.
        how: One of the task's measures, other than "finetune" and "head".

    Returns:
        Its scores: the one that counts is the first.

    Raises:
        InputError: If the model lacks what the measure needs, or the task cannot be measured so.
    """
    if how not in loaded.task.hows or how not in _MEASURES:
        known = [name for name in loaded.task.hows if name in _MEASURES]
        raise InputError(f"how={how!r} does not measure the task {loaded.task.name!r}: choose of {', '.join(known)}")
    model.check(how, task=loaded.task.name)
    return _MEASURES[how](model, loaded)


def _probe(model: EvaluatedModel, loaded: LoadedTask) -> Evaluation:
    """Measure a linear probe on frozen features."""
    data, kind = loaded.data, cast(Literal["classification", "regression"], loaded.data.spec.type)
    train, held_out = (
        model.features(data.texts(split), max_length=loaded.options.max_length) for split in ("train", "validation")
    )
    predicted, _ = probe_predictions(train, data.targets("train"), held_out, kind=kind, seed=loaded.options.seed)
    logits = predicted if data.labels is None else np.eye(len(data.labels))[predicted]
    head = "logistic regression" if kind == "classification" else "ridge regression"
    features = f"frozen {model.vectors_in_words}"
    if len(data.spec.text) == 2:
        together = "difference and product of both texts'" if model.makes_vectors else "both texts read together,"
        features = f"{together} {features}"
    method = f"{head} on {features}, {len(train):,} training rows"
    return loaded.of_examples(data.score("validation", logits), method=method, how="probe")


def _similarity(model: EvaluatedModel, loaded: LoadedTask) -> Evaluation:
    """Measure the rank correlation of the cosines of two texts' vectors with scores."""
    data = loaded.data
    targets = data.targets("validation")
    pairs = [pair for pair, score in zip(data.texts("validation"), targets, strict=True) if not math.isnan(score)]
    options: dict[str, Any] = {"modules": model.modules, "max_length": loaded.options.max_length}
    first, second = (
        text_vectors(
            model.encoder, model.tokenizer, [pair[side] for pair in pairs], batch_size=model.batch_size, **options
        )
        for side in (0, 1)
    )
    correlation = similarity_correlation(first, second, targets[~np.isnan(targets)])
    return Evaluation(
        task=loaded.name_of("similarity"),
        **loaded.origin(),
        metrics={"spearmanr": correlation},
        method=f"cosine of {model.vectors_in_words}, no training",
        task_type="sentence-similarity",
        num_examples=len(pairs),
    )


def _pairs(model: EvaluatedModel, loaded: LoadedTask) -> Evaluation:
    """Measure how often the acceptable sentence of a minimal pair scores higher."""
    language_model, pairs = model.language_model, loaded.pairs
    accuracy = pair_accuracy(language_model.score, pairs)
    fields = {f"accuracy_{name}": value for name, value in accuracy.fields.items()}
    metrics = {"accuracy": accuracy.mean} | (fields if len(fields) > 1 else {})
    return Evaluation(
        task=loaded.name_of("pairs"),
        dataset=_named(loaded),
        split="minimal pairs",
        metrics=metrics,
        method=f"{language_model.method}; mean over {len(accuracy.paradigms)} paradigms",
        task_type="text-generation" if language_model.kind == "causal" else "fill-mask",
        baseline=dict.fromkeys(metrics, _COINS),
        baseline_name="chance",
        num_examples=len(pairs),
    )


def _words(model: EvaluatedModel, loaded: LoadedTask) -> Evaluation:
    """Measure vectors of words: against scores of similarity, or at analogies."""
    (path,) = loaded.task.files
    vectors, how_made = model.word_vectors(loaded.words())
    if loaded.task.material == "scored words":
        similarity = word_similarity(vectors, path)
        if similarity.correlation is None:
            raise InputError(
                f"model={model.name!r} knows {similarity.pairs} of the {similarity.total} pairs of {loaded.task.name!r}, too few "
                "for a correlation: leave the task out"
            )
        metrics = {"spearmanr": similarity.correlation}
        count, method = similarity.pairs, f"cosines {how_made}; {similarity.pairs} of {similarity.total} pairs"
    else:
        restrict = _CANDIDATES if model.is_static else None
        answers = analogy_accuracy(vectors, path, restrict=restrict)
        parts = {"accuracy": answers.total, "semantic_accuracy": answers.semantic}
        parts["syntactic_accuracy"] = answers.syntactic
        metrics = {name: part.accuracy for name, part in parts.items() if part.accuracy is not None}
        if not metrics:
            raise InputError(
                f"model={model.name!r} knows the words of none of the {answers.total.total} questions of {loaded.task.name!r}: "
                "leave the task out"
            )
        count, method = answers.total.answered, f"3CosAdd {how_made}, {answers.candidates:,} candidates"
        method += f"; {answers.total.answered} of {answers.total.total} questions"
    return Evaluation(
        task=loaded.name_of("words"),
        dataset=_named(loaded),
        split="pairs" if loaded.task.material == "scored words" else "questions",
        metrics=metrics,
        method=method,
        task_type="sentence-similarity",
        num_examples=count,
    )


def _likelihood(model: EvaluatedModel, loaded: LoadedTask) -> Evaluation:
    """Measure how often the right choice is the most probable one after its context, a token at a time."""
    data, language_model = loaded.data, model.language_model
    spec = data.spec
    prompts, options = [], []
    for row in data.validation:
        texts = ["" if row[name] is None else str(row[name]) for name in spec.text]
        prompts.append(" ".join(filter(None, texts)))
        options.append(choices_of(row, spec.choices))
    found = score_options(
        language_model.model, model.tokenizer, prompts, options, unconditional=None, batch_size=model.batch_size
    )
    most = max(map(len, options))
    scores = np.full((len(options), most), -np.inf)
    for row, values in enumerate(found["tokens"]):
        scores[row, : len(values)] = values
    method = f"{language_model.kind} likelihood of a choice by token, no training"
    return loaded.of_examples(data.score("validation", scores), method=method, how="likelihood")


_MEASURES: dict[How, Callable[[EvaluatedModel, LoadedTask], Evaluation]] = {
    "probe": _probe,
    "similarity": _similarity,
    "pairs": _pairs,
    "words": _words,
    "likelihood": _likelihood,
}


def _named(loaded: LoadedTask) -> str:
    """Return the data of a task of files: the file, or the name of the task where there are several."""
    files = loaded.task.files
    return Path(files[0]).name if len(files) == 1 else loaded.task.name


def beside_untrained(evaluation: Evaluation, untrained: Evaluation) -> Evaluation:
    """Return an evaluation with the scores of an untrained model as its baseline."""
    scores = {name: untrained.metrics[name] for name in evaluation.metrics if name in untrained.metrics}
    return replace(evaluation, baseline=scores, baseline_name="the same architecture, untrained")


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the mean of evaluations that differ in their seed alone, with the standard deviation of each metric.

    Args:
        evaluations: At least two, of one model and task.
    """
    first, count = evaluations[0], len(evaluations)
    metrics = {name: [evaluation.metrics[name] for evaluation in evaluations] for name in first.metrics}
    baselines = {name: [evaluation.baseline[name] for evaluation in evaluations] for name in first.baseline}
    method = first.method.removesuffix(", one seed")
    return replace(
        first,
        metrics={name: float(np.mean(values)) for name, values in metrics.items()},
        deviation={name: float(np.std(values, ddof=1)) for name, values in metrics.items()},
        baseline={name: float(np.mean(values)) for name, values in baselines.items()},
        method=f"{method}; mean and deviation of {count} seeds",
    )
