"""The fixed inputs of the reference cards in model_cards/reference.

The values are examples, chosen by hand to exercise every section, and each card says so. After a wanted change:

    python tests/hub/reference_inputs.py    # rewrites the cards and their pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_pretrain.hub.card import Compute, PretrainingCard, render_card
from hf_pretrain.hub.plots import plot_training
from hf_pretrain.objectives.masked_lm import MaskedLMTrainer
from hf_pretrain.objectives.replaced_token_detection import ReplacedTokenDetectionTrainer

REFERENCE_DIR = Path(__file__).resolve().parents[2] / "model_cards" / "reference"

NOTE = (
    "> **Reference card.** It shows the form of the cards that `hf_pretrain` writes. There is no such model: every"
    " number here is an example value, not a measurement."
)

RTD = ReplacedTokenDetectionTrainer.objective
MLM = MaskedLMTrainer.objective

VERSIONS = {"python": "3.11", "transformers": "5.23.0", "torch": "2.13.0"}
LIMITS = (
    "The model reproduces what its text holds, biases included, and was checked on held-out text of the same kind"
    " only. It must be fine-tuned before it decides anything."
)


def _log(component_values: dict[str, list[tuple[float, float]]], *, weights: dict[str, float]) -> list[dict[str, Any]]:
    """Build a log as the Trainer's from (training, held-out) values of each component, 100 steps apart."""
    rows: list[dict[str, Any]] = []
    for i in range(len(next(iter(component_values.values())))):
        step = 100 * (i + 1)
        for kind, prefix in enumerate(("", "eval_")):
            values = {name: pairs[i][kind] for name, pairs in component_values.items()}
            total = sum(weight * values[name] for name, weight in weights.items())
            row = {f"{prefix}loss": total, **{f"{prefix}{name}": value for name, value in values.items()}}
            rows.append(row | ({"learning_rate": 5e-4 * (1 - step / 600)} if not prefix else {}) | {"step": step})
    return rows


RTD_LOG = _log(
    {
        "mlm_loss": [(8.0, 7.9), (7.0, 7.0), (6.5, 6.6), (6.2, 6.4), (6.0, 6.3)],
        "rtd_loss": [(0.42, 0.40), (0.36, 0.36), (0.34, 0.34), (0.33, 0.335), (0.32, 0.33)],
        "rtd_accuracy": [(0.86, 0.86), (0.87, 0.87), (0.88, 0.875), (0.885, 0.88), (0.89, 0.88)],
        "rtd_auc": [(0.55, 0.55), (0.65, 0.64), (0.7, 0.69), (0.73, 0.72), (0.75, 0.74)],
    },
    weights={"mlm_loss": 1.0, "rtd_loss": 50.0},
)
MLM_LOG = _log({"mlm_loss": [(8.0, 7.9), (7.0, 7.0), (6.5, 6.6), (6.2, 6.4), (6.0, 6.3)]}, weights={"mlm_loss": 1.0})

REFERENCE_CARDS = {
    "rtd": PretrainingCard(
        model_name="reference-rtd",
        model_class="ElectraForPreTraining",
        objective=RTD,
        note=NOTE,
        language="en",
        license="apache-2.0",
        data={
            "sources": ["corpus.txt"],
            "documents": 1000,
            "tokens": 2_000_000,
            "blocks": 16_000,
            "block_size": 128,
            "tokenizer": "WordPiece",
            "vocabulary_size": 8000,
            "held_out_documents": 50,
            "held_out_tokens": 100_000,
        },
        recipe={"learning_rate": 5e-4, "max_steps": 500, "per_device_train_batch_size": 32, "seed": 0},
        log_history=RTD_LOG,
        metrics_before={"eval_mlm_loss": 9.0, "eval_rtd_loss": 0.7, "eval_rtd_auc": 0.5, "eval_runtime": 1.0},
        metrics_after={"eval_mlm_loss": 6.3, "eval_rtd_loss": 0.33, "eval_rtd_auc": 0.74, "eval_runtime": 1.0},
        compute=Compute(
            parameters=5_000_000,
            trained_parameters=6_000_000,
            steps=500,
            tokens=2_000_000,
            seconds=200.0,
            hardware="Example CPU, 4 cores",
            precision="fp32",
        ),
        parts={"pretraining/generator": ("ElectraForMaskedLM", "the generator, to go on with the pre-training")},
        limits=LIMITS,
        versions=VERSIONS,
    ),
    "mlm": PretrainingCard(
        model_name="reference-mlm",
        model_class="BertForMaskedLM",
        objective=MLM,
        note=NOTE,
        base_model="google-bert/bert-base-uncased",
        language="en",
        data={"sources": ["corpus.txt"], "documents": 1000, "tokens": 2_000_000, "blocks": 16_000},
        recipe={"learning_rate": 1e-4, "max_steps": 500, "mlm_probability": 0.2, "seed": 0},
        log_history=MLM_LOG,
        metrics_after={"eval_loss": 6.3, "eval_mlm_loss": 6.3, "eval_mlm_accuracy": 0.2},
        compute=Compute(parameters=110_000_000, steps=500),
        limits=LIMITS,
        versions=VERSIONS,
    ),
}


def render_reference(name: str) -> str:
    """Return a reference card; its pictures have a folder of their own."""
    return render_card(REFERENCE_CARDS[name], plots_folder=f"plots/{name}")


if __name__ == "__main__":
    REFERENCE_DIR.mkdir(exist_ok=True)
    for name, card in REFERENCE_CARDS.items():
        (REFERENCE_DIR / f"{name}.md").write_text(render_reference(name), encoding="utf-8")
        for path in plot_training(card.log_history, REFERENCE_DIR, folder=f"plots/{name}"):
            print(path.relative_to(REFERENCE_DIR), path.stat().st_size)
