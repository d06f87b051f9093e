"""How well replaced tokens are found."""

from __future__ import annotations

import math

import numpy as np
from sklearn.metrics import roc_auc_score


def detection_metrics(logits: np.ndarray, labels: np.ndarray, *, loss: float | None = None) -> dict[str, float]:
    """Return the metrics of a binary decision a token.

    Accuracy alone says little: a model that calls every token original is right on all but the replaced ones.

    Args:
        logits: ``[N]``, positive for "replaced".
        labels: ``[N]``, one where a token was replaced; padding left out.
        loss: Mean binary cross-entropy in nats, for `disc_gain`.

    Returns:
        `disc_accuracy`, `disc_precision`, `disc_recall` (zero where undefined), `disc_auc` (0.5 where undefined), `fake_rate` r,
        and with a loss `disc_gain` = 1 - loss / H(r): the share of the labels' entropy that is explained, at most 1; zero or
        less means that the discriminator has learned nothing.
    """
    says_replaced, is_replaced = logits > 0, labels == 1
    hits = int((says_replaced & is_replaced).sum())
    rate = float(is_replaced.mean())
    metrics = {
        "disc_accuracy": float((says_replaced == is_replaced).mean()),
        "disc_precision": hits / max(1, int(says_replaced.sum())),
        "disc_recall": hits / max(1, int(is_replaced.sum())),
        "disc_auc": float(roc_auc_score(is_replaced, logits)) if 0 < rate < 1 else 0.5,
        "fake_rate": rate,
    }
    if loss is not None and 0 < rate < 1:
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
        metrics["disc_gain"] = 1 - loss / entropy
    return metrics
