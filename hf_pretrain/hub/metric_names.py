"""What the keys of the Trainer's log mean: losses, metrics of quality, or bookkeeping, and how a reader calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BOOKKEEPING = ("time", "per_second", "epoch", "step", "steps", "samples", "tokens", "targets", "count", "flos", "mib")
_QUALITY = ("accuracy", "auc", "precision", "recall", "f1", "correlation")
_IN_FULL = {"disc": "discriminator"}
_CAPITALS = {"mlm", "rtd", "plm", "nsp", "sop", "lm", "nce", "auc", "kl", "mse", "f1"}


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
    names = [found[1] for key in row if (found := re.fullmatch(r"eval_(.+)_runtime", key))]
    split: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in row.items():
        # Of "news" and "news_old" the longer is the right one.
        name = max((name for name in names if key.startswith(f"eval_{name}_")), key=len, default="")
        split.setdefault(name, {})[key.replace(f"eval_{name}_", "eval_", 1) if name else key] = value
    return {name: metrics for name, metrics in split.items() if metrics}


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
