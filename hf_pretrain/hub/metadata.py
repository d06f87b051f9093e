"""What the Hub reads of a card: its front matter, with a model-index of everything that was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_pretrain.hub import card_text
from hf_pretrain.hub.metric_names import bare_name, is_loss, label, split_by_held_out_set

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from hf_pretrain.hub.facts import PretrainingCard

# Names of huggingface.co/metrics; others are in the model-index alone.
_METRICS_OF_THE_HUB = {
    *("accuracy", "exact_match", "f1", "mae", "matthews_correlation", "mse", "pearsonr", "perplexity", "precision"),
    *("recall", "roc_auc", "spearmanr"),
}

# Of what was measured on held-out text, one of each kind first. An accuracy on rare labels says little beside an AUC.
_SCORES = ("perplexity", "auc", "accuracy", "f1", "correlation", "exact_match", "energy")
_MOST_LOSSES, _MOST_SCORES = 3, 2


def card_metadata(card: PretrainingCard) -> ModelCardData:
    """Return the metadata that the Hub reads, with a model-index of the held-out metrics and of the tasks."""
    from huggingface_hub import ModelCardData

    language = [card.language] if isinstance(card.language, str) else list(card.language or ())
    datasets = [name for name in card.datasets if hub_id(name)]
    results = [*_held_out_results(card, dataset=datasets[0] if datasets else "text"), *_task_results(card)]
    metrics = dict.fromkeys(name.metric_type for name in results if name.metric_type in _METRICS_OF_THE_HUB)
    return ModelCardData(
        language=language or None,
        license=card.license or None,
        library_name="peft" if card.adapter else "transformers",
        pipeline_tag=card.objective.pipeline_tag,
        tags=["hf_pretrain", card.objective.name, "generated_from_trainer"],
        base_model=hub_id(card.base_model),
        datasets=datasets or None,
        metrics=list(metrics) or None,
        model_name=card.model_name,
        eval_results=results or None,
        co2_eq_emissions=_emissions(card),
    )


def hub_id(name: str | None) -> str | None:
    """Return `name` if the Hub could have a repository of that name; a local path is of no use to a reader."""
    return name if name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) else None


def unique_name(name: str) -> str:
    """Return a name as the Hub writes identifiers: "Reviews, of my own" is "reviews-of-my-own"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "text"


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
            metric_value=rounded(value),
        )
        for name, metrics in split_by_held_out_set(card.metrics_after).items()
        for key, value in _chosen(card_text.measured(metrics)).items()
    ]


def rounded(value: float) -> float:
    """Return a number with four significant digits: more are noise to a reader of the Hub."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _chosen(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the few metrics that tell the model's quality: losses that have a meaning of their own, and scores.

    The total loss depends on the weights of a method, and rates and gains on its options; they stay in the card's table.
    """
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
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
            dataset_type=evaluation.dataset if evaluation.is_on_hub else unique_name(evaluation.dataset),
            dataset_name=evaluation.data_name,
            dataset_config=evaluation.dataset_config,
            dataset_split=evaluation.split,
            metric_type=name,
            metric_name=f"{evaluation.task}: {label(name)}",
            metric_value=value,
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
