"""The discriminator's metrics: identities that hold for known predictors."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from helpers.method_matrix import build, programs
from hf_pretrain.data import draws
from hf_pretrain.evaluation.metrics import collapse_warning, detection_metrics


def entropy(rate):
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)


@pytest.fixture
def labels():
    return (draws.uniforms(draws.row_keys([0], seed=1), 2000)[0] < 0.14).astype(np.int64)


def binary_cross_entropy(logits, labels):
    return float(np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean())


class TestIdentities:
    @pytest.mark.parametrize("logit", [0.0, -3.0])
    def test_a_model_that_calls_everything_original(self, labels, logit):
        """A logit of zero is no alarm: a comparison of the sigmoid with zero would always be one."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metrics = detection_metrics(np.full(2000, logit), labels)
        rate = labels.mean()
        assert metrics == {
            "disc_accuracy": pytest.approx(1 - rate),
            "disc_precision": 0.0,
            "disc_recall": 0.0,
            "disc_auc": 0.5,
            "fake_rate": pytest.approx(rate),
        }

    def test_a_model_that_calls_everything_replaced(self, labels):
        metrics = detection_metrics(np.full(2000, 2.0), labels)
        assert (
            metrics["disc_accuracy"]
            == metrics["disc_precision"]
            == metrics["fake_rate"]
            == pytest.approx(labels.mean())
        )
        assert metrics["disc_recall"] == 1.0

    def test_a_perfect_model_and_its_opposite(self, labels):
        logits = 10.0 * labels - 5
        perfect = detection_metrics(logits, labels, loss=0.0)
        assert all(perfect[f"disc_{name}"] == 1.0 for name in ("accuracy", "precision", "recall", "auc", "gain"))
        opposite = detection_metrics(-logits, labels)
        assert all(opposite[f"disc_{name}"] == 0.0 for name in ("accuracy", "precision", "recall", "auc"))

    @pytest.mark.parametrize("label", [0, 1])
    def test_one_class_alone(self, label):
        metrics = detection_metrics(np.array([-1.0, 2.0]), np.full(2, label), loss=0.3)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["disc_auc"] == 0.5 and metrics["disc_accuracy"] == 0.5 and "disc_gain" not in metrics


def test_metrics_equal_sklearn(labels):
    logits = np.random.default_rng(0).normal(size=2000) + labels
    logits[:50] = 0.25  # ties
    metrics = detection_metrics(logits, labels)
    assert metrics["disc_auc"] == roc_auc_score(labels, logits)
    assert metrics["disc_precision"] == pytest.approx(precision_score(labels, logits > 0))
    assert metrics["disc_recall"] == pytest.approx(recall_score(labels, logits > 0))


class TestGain:
    def test_the_base_rate_explains_nothing(self, labels):
        rate = labels.mean()
        logits = np.full(2000, math.log(rate / (1 - rate)))
        loss = binary_cross_entropy(logits, labels)
        assert loss == pytest.approx(entropy(rate))
        assert detection_metrics(logits, labels, loss=loss)["disc_gain"] == pytest.approx(0, abs=1e-9)

    def test_zero_logits_are_worse_than_the_base_rate(self, labels):
        metrics = detection_metrics(np.zeros(2000), labels, loss=math.log(2))
        assert metrics["disc_gain"] == pytest.approx(1 - math.log(2) / entropy(labels.mean()))
        assert metrics["disc_gain"] < 0

    def test_half_the_entropy(self):
        labels = np.array([0, 1])
        assert detection_metrics(np.zeros(2), labels, loss=math.log(2) / 2)["disc_gain"] == pytest.approx(0.5)

    def test_only_with_a_loss(self, labels):
        assert "disc_gain" not in detection_metrics(np.zeros(2000), labels)


class TestCollapse:
    def test_one_answer_for_all_tokens_is_a_collapse(self, labels):
        rate = labels.mean()
        for logit in (math.log(rate / (1 - rate)), 0.0, -8.0, 3.0):
            logits = np.full(2000, logit)
            metrics = detection_metrics(logits, labels, loss=binary_cross_entropy(logits, labels))
            warning = collapse_warning({f"eval_{name}": value for name, value in metrics.items()})
            assert warning is not None and "\n" not in warning
            assert f"disc_gain={metrics['disc_gain']:.3f}" in warning and "learning_rate" in warning

    def test_who_tells_something_has_not_collapsed(self, labels):
        """A fifth of the replaced tokens is found, none wrongly; accuracy is hardly above that of calling all original."""
        found = (labels == 1) & (np.arange(2000) % 5 == 0)
        logits = np.where(found, 4.0, math.log(0.11 / 0.89))
        metrics = detection_metrics(logits, labels, loss=binary_cross_entropy(logits, labels))
        assert metrics["disc_accuracy"] < 0.9
        assert collapse_warning(metrics) is None

    def test_of_several_held_out_sets_one_is_enough(self):
        assert collapse_warning({"eval_a_disc_gain": -0.1, "eval_b_disc_gain": 0.2}) is None
        assert collapse_warning({"eval_a_disc_gain": -0.1, "eval_b_disc_gain": 0.0}) is not None

    def test_what_is_not_known_is_no_collapse(self):
        assert collapse_warning({}) is None
        assert collapse_warning({"eval_mlm_loss": 3.0, "eval_disc_auc": 0.5}) is None

    def test_a_gain_that_is_no_number_is_none(self):
        assert collapse_warning({"disc_gain": math.nan}) is not None


def test_the_trainer_leaves_padding_out(tmp_path):
    """Padding is easily told from replaced tokens, so counting it would flatter every metric."""
    trainer = build(programs()["rtd"], tmp_path, max_steps=30, learning_rate=3e-3)
    trainer.train()
    metrics = trainer.evaluate()
    examples = [trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))]
    batch = trainer.data_collator(examples)
    assert int((batch["attention_mask"] == 0).sum()) > 20
    with torch.no_grad():
        output = trainer.model.eval()(**batch)
    is_real = batch["attention_mask"].bool()
    scores, labels = output.scores[is_real].double().numpy(), output.score_labels[is_real].numpy()
    assert len(labels) == sum(len(example["input_ids"]) for example in examples)
    assert metrics["eval_disc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert metrics["eval_disc_accuracy"] == pytest.approx(((scores > 0) == labels).mean())
    assert metrics["eval_fake_rate"] == pytest.approx(labels.mean())
    loss = binary_cross_entropy(scores, labels)
    assert metrics["eval_disc_gain"] == pytest.approx(1 - loss / entropy(labels.mean()), abs=1e-5)
    padded = np.where(output.score_labels.flatten().numpy() == 1, 1, 0)
    assert metrics["eval_disc_auc"] != pytest.approx(roc_auc_score(padded, output.scores.flatten().numpy()), abs=1e-4)


def test_nothing_of_nothing():
    assert detection_metrics(np.zeros(0), np.zeros(0)) == {}


def test_another_decision_has_names_of_its_own() -> None:
    logits, labels = np.array([1.0, -1.0, 2.0]), np.array([1, 0, 0])
    known = detection_metrics(logits, labels, loss=0.3)
    named = detection_metrics(logits, labels, loss=0.3, prefix="deletion", rate_name="deletion_rate")
    renamed = {
        name.replace("disc_", "deletion_").replace("fake_", "deletion_"): value for name, value in known.items()
    }
    assert named == renamed and len(named) == 6
