"""What the keys of the Trainer's log mean: losses, metrics of quality, or bookkeeping, and how a reader calls them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BOOKKEEPING = ("time", "per_second", "epoch", "step", "steps", "samples", "tokens", "targets", "count", "flos", "mib")
_QUALITY = ("accuracy", "auc", "precision", "recall", "f1", "correlation")
_IN_FULL = {"disc": "discriminator", "qq": "query-query", "kk": "key-key", "vv": "value-value"}
_CAPITALS = {"mlm", "rtd", "plm", "nsp", "sop", "lm", "nce", "auc", "kl", "mse", "f1"}


# Marks of a row of the log whose numbers are no part of the run's course.
OTHER_DATA, OTHER_WEIGHTS = "other_data", "other_weights"
# The mean loss of predicted tokens, whose exponential is a perplexity.
_LANGUAGE_MODELS = ("mlm", "plm", "lm", "tlm", "clm")
_MOST_NATS = 20.0  # a mean loss beyond it is that of a model that has diverged


def bare_name(key: str) -> str:
    """Return a key of an evaluation row without the Trainer's prefix: "eval_mlm_loss" is "mlm_loss"."""
    return key.removeprefix("eval_")


def split_by_held_out_set(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of an evaluation by held-out set, with the keys that they have where there is one set only.

    Args:
        row: Keys and values as `Trainer.evaluate` returns them: "eval_mlm_loss", or "eval_news_mlm_loss" of the set "news".

    Returns:
        Name of the set -> its metrics; the name is "" where the sets have none.
    """
    # The Trainer times each set, so that key has no more than the name.
    names = [found[1] for key in row if (found := re.fullmatch(r"eval_(.+)_runtime", key, flags=re.DOTALL))]
    split: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in row.items():
        # Of "news" and "news_old" the longer is the right one.
        name = max((name for name in names if key.startswith(f"eval_{name}_")), key=len, default="")
        split.setdefault(name, {})[key.replace(f"eval_{name}_", "eval_", 1) if name else key] = value
    return {name: metrics for name, metrics in split.items() if metrics}


def is_foreign(row: Mapping[str, Any]) -> bool:
    """Whether a row of the log was measured on other data than the run's held-out text, or of weights of no step of it."""
    return bool(row.get(OTHER_DATA) or row.get(OTHER_WEIGHTS))


def evaluated_steps(log_history: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the steps whose weights were measured on the run's held-out text, in the order of the log."""
    return [row["step"] for row in log_history if _is_evaluation(row)]


def evaluation_at(log_history: Sequence[Mapping[str, Any]], step: int | None) -> dict[str, Any]:
    """Return what was measured of the weights of a step on the run's held-out text; {} if nothing was.

    This alone decides which numbers stand beside weights, in the card, in its record and in the report of a program.

    Args:
        log_history: Rows as in `Trainer.state.log_history`.
        step: The step; None for weights that are of no step.

    Returns:
        One row of the log, or the rows of all held-out sets in one; of two alike, the later.
    """
    rows = [row for row in log_history if row.get("step") == step and _is_evaluation(row)]
    return {key: value for row in rows for key, value in row.items()}


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    is_measured = any(key.startswith("eval_") and is_loss(key) for key in row)
    return "step" in row and is_measured and not is_foreign(row)


def with_perplexity(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with the perplexity behind each loss of a language model, where none was measured."""
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        found[key] = value
        model = key.removesuffix("_loss").rpartition("_")[2] if key.endswith("_loss") else ""
        has_one = any(name.endswith("perplexity") for name in metrics)
        if model in _LANGUAGE_MODELS and not has_one and isinstance(value, (int, float)) and value < _MOST_NATS:
            found[f"{key.removesuffix('_loss')}_perplexity"] = math.exp(value)
    return found


def is_bookkeeping(key: str) -> bool:
    """Whether the key counts or times the run instead of measuring the model."""
    return bare_name(key).endswith(_BOOKKEEPING)


def is_loss(key: str) -> bool:
    """Whether the key is a loss: "loss" itself, the weighted total, or a component such as "mlm_loss"."""
    return bare_name(key) == "loss" or bare_name(key).endswith("_loss")


def is_quality(key: str) -> bool:
    """Whether the key is a metric of quality that lies between 0 and 1, such as an accuracy or an AUC."""
    return bare_name(key).endswith(_QUALITY)


def label(key: str) -> str:
    """Return the key as a reader says it: "eval_mlm_loss" is "MLM loss", "loss" is "Total loss"."""
    name = bare_name(key)
    if name == "loss":
        return "Total loss"
    words = [word.upper() if word in _CAPITALS else _IN_FULL.get(word, word) for word in name.split("_") if word]
    text = " ".join(words)
    return text[:1].upper() + text[1:]
