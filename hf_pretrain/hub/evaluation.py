"""What was measured, for the Hub: evaluations on tasks, and the front matter of a card with its model-index.

`Evaluation` holds the scores of a model on a task; `mteb_evaluations` reads them from mteb's files. `card_metadata` puts them
beside the held-out numbers of the run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_pretrain.errors import InputError, nearest
from hf_pretrain.files import plain
from hf_pretrain.hub.identifiers import as_list
from hf_pretrain.hub.text import (
    bare_name,
    hub_id,
    is_loss,
    label,
    measured,
    split_by_held_out_set,
    with_perplexity,
    without_folders,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from hf_pretrain.hub.record import PretrainingCard

# Names of huggingface.co/metrics; others are in the model-index alone.
_METRICS_OF_THE_HUB = {
    *("accuracy", "exact_match", "f1", "mae", "matthews_correlation", "mse", "pearsonr", "perplexity", "precision"),
    *("recall", "roc_auc", "spearmanr"),
}

# Of what was measured on held-out text, one of each kind first. An accuracy on rare labels says little beside an AUC.
_SCORES = ("perplexity", "auc", "accuracy", "f1", "correlation", "exact_match", "energy")
_MOST_LOSSES, _MOST_SCORES = 3, 2
_MOST = _MOST_LOSSES + _MOST_SCORES
_SENTENCES = "sentence-transformers"
# Keys that a file of mteb has, the last one of versions before 1.11, and no evaluation of ours.
_MTEB = frozenset({"mteb_version", "task_name", "mteb_dataset_name"})
# The Hub's kind of task by the name of a metric; what else mteb does with vectors has none of its own.
_KINDS_OF_MTEB = {"spearman": "sentence-similarity", "accuracy": "text-classification", "ndcg": "text-retrieval"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a model on one task.

    Attributes:
        task: Name of the task: "SST-2". Together with `split` it is what a later evaluation of the same replaces.
        dataset: The data: an id on the Hub, "nyu-mll/glue", or a name in words.
        split: Part of the data that was scored: "validation".
        metrics: Metric -> value; names of the Hub where it has one, such as "accuracy".
        method: How it was measured: "linear probe on mean-pooled states", "fine-tuned for 3 epochs, one seed".
        task_type: The Hub's name of the kind of task: "text-classification".
        dataset_config: Configuration of the dataset: "sst2".
        baseline: Metric -> value of what to compare with.
        baseline_name: What that is: "most frequent class", "the model before it was trained further".
        num_examples: Examples that were scored.
        deviation: Metric -> standard deviation over several seeds, where the values of `metrics` are means.

    Raises:
        InputError: If a text is empty, a value is no finite number, or the baseline or the deviation has a metric that the model
            has not.
    """

    task: str
    dataset: str
    split: str
    metrics: Mapping[str, float]
    method: str
    task_type: str = "text-classification"
    dataset_config: str | None = None
    baseline: Mapping[str, float] = field(default_factory=dict)
    baseline_name: str = "baseline"
    num_examples: int | None = None
    deviation: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field; a dataset that is a path keeps its last part."""
        for name in ("task", "dataset", "split", "method", "task_type", "baseline_name"):
            if not isinstance(value := getattr(self, name), str) or not value.strip():
                raise InputError(f"{name}={value!r} of an evaluation: give a text that is not empty")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.task_type):
            raise InputError(f"task_type={self.task_type!r}: give the Hub's name of it, such as 'text-classification'")
        object.__setattr__(self, "dataset", without_folders(self.dataset))
        for name in ("metrics", "baseline", "deviation"):
            object.__setattr__(self, name, _scores(getattr(self, name), f"{name} of {self.task!r}"))
        if not self.metrics:
            raise InputError(f"metrics of {self.task!r} are empty: give at least one name and value")
        for part in ("baseline", "deviation"):
            if unknown := [name for name in getattr(self, part) if name not in self.metrics]:
                raise InputError(
                    f"{part} of {self.task!r} has {unknown[0]!r}, which is not among metrics: drop one or add it"
                )
        count = self.num_examples
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise InputError(f"num_examples={count!r} of {self.task!r}: give a number of examples, or leave it out")

    @classmethod
    def from_mapping(cls, values: Any, *, source: str) -> Evaluation:
        """Return the evaluation that a mapping with the names of the fields describes, as JSON files hold them.

        Args:
            values: The mapping.
            source: Where it comes from, for the messages.

        Raises:
            InputError: If it is no mapping, a field is unknown or missing, or a value is not right.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: an evaluation is an object with named fields, not {values!r}")
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        if unknown := [name for name in values if name not in fields]:
            hint = nearest(unknown[0], fields, otherwise=f"known are {', '.join(fields)}")
            raise InputError(f"{source}: unknown field {unknown[0]!r} of an evaluation: {hint}")
        for name, entry in fields.items():
            if name not in values and entry.default is entry.default_factory is dataclasses.MISSING:
                raise InputError(f"{source}: an evaluation without {name!r}: add it")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @property
    def is_on_hub(self) -> bool:
        """Whether the data is named by an id of the Hub."""
        return "/" in self.dataset and hub_id(self.dataset) is not None

    @property
    def identifier(self) -> str:
        """The data as the Hub writes identifiers: "Reviews, of my own" is "reviews-of-my-own"."""
        name = re.sub(r"[^a-z0-9]+", "-", self.dataset.lower()).strip("-") or "text"
        return self.dataset if self.is_on_hub else name

    @property
    def data_name(self) -> str:
        """The data with its configuration, for a reader: "nyu-mll/glue (sst2)"."""
        return f"{self.dataset} ({self.dataset_config})" if self.dataset_config else self.dataset


def is_mteb_result(values: Any) -> bool:
    """Whether a mapping has the form of a file that mteb writes for a task."""
    return isinstance(values, Mapping) and not _MTEB.isdisjoint(values)


def mteb_evaluations(values: Mapping[str, Any], *, source: str) -> list[Evaluation]:
    """Return the evaluations that mteb's result on a task holds: one a split and subset of the data.

    Args:
        values: Content of the file: `task_name`, `mteb_version` and `scores`, which have a list of subsets a split.
        source: Where it comes from, for the messages.

    Returns:
        Evaluations with two metrics: mteb's `main_score`, and the metric whose value it is, such as `cosine_spearman`; of several
        with this value the one with the longest name. The file does not name the dataset's repository, so the data is called as
        on the Hub's cards, "MTEB STSBenchmark".

    Raises:
        InputError: If an entry is missing, or not of its kind.

    Source: mteb from 1.11 on, `mteb.results.TaskResult`.
    """
    task, scores = values.get("task_name"), values.get("scores")
    if not isinstance(task, str) or not isinstance(scores, Mapping) or not scores:
        raise InputError(
            f"{source}: a result of mteb has a 'task_name' and 'scores' by split, as mteb 1.11 and later write them: "
            "run it with such a version"
        )
    found = []
    for split, subsets in scores.items():
        if not isinstance(subsets, list) or not subsets:
            raise InputError(f"{source}: scores of {split!r} are no list of subsets of {task}: run mteb again")
        for entry in subsets:
            subset = entry.get("hf_subset") if isinstance(entry, Mapping) else None
            if not isinstance(subset, str) or "main_score" not in entry:
                raise InputError(
                    f"{source}: a subset in scores of {split!r} has no 'hf_subset' or no 'main_score': run mteb again"
                )
            main = entry["main_score"]
            named = [
                name for name, value in entry.items() if name != "main_score" and _is_number(value) and value == main
            ]
            version = entry.get("mteb_version") or values.get("mteb_version") or "of an unknown version"
            kinds = [kind for name, kind in _KINDS_OF_MTEB.items() if any(name in metric for metric in named)]
            evaluation = {
                "task": task if subset == "default" else f"{task} ({subset})",
                "dataset": f"MTEB {task}",
                "dataset_config": None if subset == "default" else subset,
                "split": split,
                "metrics": {name: entry[name] for name in ("main_score", *sorted(named, key=len)[-1:])},
                "method": f"mteb {version}",
                "task_type": kinds[0] if kinds else "feature-extraction",
            }
            found.append(Evaluation.from_mapping(evaluation, source=source))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scores(values: Any, where: str) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: give names and values, not {values!r}")
    scores = {}
    for name, value in plain(values).items():
        if not _is_number(value) or not math.isfinite(value):
            raise InputError(f"{where}: {name}={value!r} is no finite number")
        scores[name] = float(value)
    return scores


def card_metadata(card: PretrainingCard) -> ModelCardData:
    """Return the metadata that the Hub reads, with a model-index of the held-out metrics and of the tasks."""
    from huggingface_hub import ModelCardData

    datasets = [name for name in card.datasets if hub_id(name)]
    results = [*_held_out_results(card, dataset=datasets[0] if datasets else "text"), *_task_results(card)]
    metrics = dict.fromkeys(name.metric_type for name in results if name.metric_type in _METRICS_OF_THE_HUB)
    own = ("hf_pretrain", card.objective.name, *card.objective.tags)
    return ModelCardData(
        language=as_list(card.language) or None,
        license=card.license or None,
        library_name="peft" if card.adapter else _SENTENCES if _SENTENCES in card.objective.tags else "transformers",
        pipeline_tag=card.objective.pipeline_tag,
        tags=list(dict.fromkeys((*own, "generated_from_trainer", *card.tags))),
        base_model=hub_id(card.base_model),
        datasets=datasets or None,
        metrics=list(metrics) or None,
        model_name=card.model_name,
        eval_results=results or None,
        co2_eq_emissions=_emissions(card),
    )


def _held_out_results(card: PretrainingCard, *, dataset: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=card.objective.pipeline_tag,
            task_name=card.objective.title,
            dataset_type=dataset,
            # The Hub puts results of one type and configuration together, and several held-out sets must stay apart.
            dataset_config=name or None,
            dataset_name=f"{card.evaluation_name}: {name}" if name else card.evaluation_name,
            metric_type=bare_name(key),
            metric_name=label(key),
            metric_value=_rounded(value),
        )
        for name, metrics in split_by_held_out_set(card.metrics_after).items()
        for key, value in _chosen(with_perplexity(measured(metrics)), headline=card.objective.headline).items()
    ]


def _rounded(value: float) -> float:
    """Return a number with four significant digits: more are noise to a reader of the Hub."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _chosen(metrics: Mapping[str, float], *, headline: Sequence[str]) -> dict[str, float]:
    """Return the few metrics of the model's quality: those of the headline, or losses with a meaning of their own, and scores.

    The total loss depends on the weights of a method, and rates and gains on its options; they stay in the card's table.
    """
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    named = {bare_name(key): key for key in finite}
    if chosen := [named[name] for name in headline if name in named]:
        return {key: finite[key] for key in chosen[:_MOST]}
    components = [key for key in finite if is_loss(key) and bare_name(key) != "loss"]
    losses = components or [key for key in finite if is_loss(key)]
    kinds = [[key for key in finite if bare_name(key).endswith(kind)] for kind in _SCORES]
    scores = [key for kind in kinds for key in kind[:1]] + [key for kind in kinds for key in kind[1:]]
    kept = {*losses[:_MOST_LOSSES], *scores[:_MOST_SCORES]}
    return {key: value for key, value in finite.items() if key in kept}


def _task_results(card: PretrainingCard) -> Sequence[EvalResult]:
    """Return the results on tasks; those on the same data may be put together, so the task is in the metric's name."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=evaluation.task_type,
            task_name=evaluation.task_type.replace("-", " ").capitalize(),
            dataset_type=evaluation.identifier,
            dataset_name=evaluation.data_name,
            dataset_config=evaluation.dataset_config,
            dataset_split=evaluation.split,
            metric_type=name,
            metric_name=f"{evaluation.task}: {label(name)}",
            metric_value=_rounded(value),
        )
        for evaluation in card.evaluations
        for name, value in evaluation.metrics.items()
    ]


def _emissions(card: PretrainingCard) -> dict[str, Any] | None:
    energy = card.compute.energy
    if energy is None or energy.emissions_kg is None:
        return None
    facts = {
        "emissions": round(1000 * energy.emissions_kg, 6),  # the Hub counts grams
        "source": energy.source,
        "training_type": "pre-training",
        "geographical_location": energy.country,
        "hardware_used": card.compute.hardware,
    }
    return {name: value for name, value in facts.items() if value is not None}
