"""Accuracy works offline, in one call or batch by batch, on lists and on arrays."""

import evaluate
import numpy as np
import pytest

from hf_pretrain.evaluation.metrics import Accuracy


@pytest.fixture
def metric(tmp_path):
    return Accuracy(cache_dir=str(tmp_path))


def test_it_is_a_metric_of_evaluate(metric):
    assert isinstance(metric, evaluate.Metric)
    assert set(metric.features) == {"predictions", "references"}


@pytest.mark.parametrize("kind", [list, np.asarray])
@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [([1, 0, 2, 1], [1, 1, 2, 0], 0.5), ([3, 3], [3, 3], 1.0), ([0], [1], 0.0)],
)
def test_it_is_the_share_of_what_is_right(metric, kind, predictions, references, expected):
    result = metric.compute(predictions=kind(predictions), references=kind(references))
    assert result == {"accuracy": expected}
    assert type(result["accuracy"]) is float


def test_batches_of_unequal_size_count_by_their_examples(metric):
    """The mean of the batches' accuracies would be 1/2."""
    metric.add_batch(predictions=[1], references=[1])
    metric.add_batch(predictions=[0, 0, 0], references=[1, 1, 1])
    assert metric.compute() == {"accuracy": 0.25}


def test_predictions_without_references_are_refused(metric):
    with pytest.raises(ValueError):
        metric.compute(predictions=[1, 0], references=[1])
