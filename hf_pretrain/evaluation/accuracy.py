"""Accuracy as a metric of 🤗 evaluate that needs no network.

Importing evaluate takes seconds: import this module where it is used, not at the top of a program.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "The share of predictions that are equal to their reference."


class Accuracy(evaluate.Metric):
    """The share of predictions that are right, in one call or batch by batch.

    `compute(predictions=..., references=...)` takes class ids, ``[N]`` each, and returns ``{"accuracy": share}``. Unlike
    `evaluate.load("accuracy")`, which asks the Hub for its code, this works offline.
    """

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions and references: class ids, one an example",
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
