"""The fixed inputs of the reference cards in model_cards/reference.

The values are examples, chosen by hand to exercise every section, and each card says so. A method may have an entry in
`REFERENCE_CARDS`; none needs one. After a wanted change:

    python tests/hub/reference_inputs.py    # rewrites the cards and their pictures
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hf_pretrain.evaluation.references import reference_rows
from hf_pretrain.hub.card import render_card
from hf_pretrain.hub.environment import Compute, Energy
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.plots import plot_training
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard
from hf_pretrain.hub.text import Row
from hf_pretrain.objectives.causal_lm import CausalLMTrainer
from hf_pretrain.objectives.distillation import StudentArguments
from hf_pretrain.objectives.distillation.comparison import comparison_rows
from hf_pretrain.objectives.distillation.trainer import (
    DistillationTrainer,
    TaskDistillationTrainer,
    describe,
    describe_origin,
)
from hf_pretrain.objectives.electric import ElectricTrainer
from hf_pretrain.objectives.elmo import ElmoTrainer
from hf_pretrain.objectives.encoder import EncoderTrainer, MaskedLMTrainer
from hf_pretrain.objectives.encoder.arguments import describe as describe_encoder
from hf_pretrain.objectives.permutation_lm import PermutationLMTrainer
from hf_pretrain.objectives.recurrent_lm import RecurrentLMTrainer
from hf_pretrain.objectives.replaced_token_detection import ReplacedTokenDetectionTrainer

REFERENCE_DIR = Path(__file__).resolve().parents[2] / "model_cards" / "reference"

NOTE = (
    "> **Reference card.** It shows the form of the cards that `hf_pretrain` writes. There is no such model: every"
    " number here is an example value, not a measurement."
)

RTD = ReplacedTokenDetectionTrainer.objective
MLM = MaskedLMTrainer.objective
ENCODER_WEIGHTS = {"mlm": 1.0, "pair": 1.0, "word_order": 0.5}
DISTIL_WEIGHTS = {"prediction": 5.0, "mlm": 2.0, "cosine": 1.0}

VERSIONS = {"python": "3.11", "transformers": "5.23.0", "torch": "2.13.0"}
FINE_TUNING_CLASS = "AutoModelForSequenceClassification"
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
        "disc_accuracy": [(0.86, 0.86), (0.87, 0.87), (0.88, 0.875), (0.885, 0.88), (0.89, 0.88)],
        "disc_auc": [(0.55, 0.55), (0.65, 0.64), (0.7, 0.69), (0.73, 0.72), (0.75, 0.74)],
    },
    weights={"mlm_loss": 1.0, "rtd_loss": 50.0},
)
MLM_LOG = _log({"mlm_loss": [(8.0, 7.9), (7.0, 7.0), (6.5, 6.6), (6.2, 6.4), (6.0, 6.3)]}, weights={"mlm_loss": 1.0})


def _course(first: float, last: float) -> list[tuple[float, float]]:
    """Return five values on the way from one to the other in training, each with a held-out one that lags behind."""
    on_the_way = [(share, 0.95 * share) for share in (0.0, 0.5, 0.75, 0.9, 1.0)]
    return [tuple(round(first + share * (last - first), 4) for share in shares) for shares in on_the_way]


def _reference(
    objective: ObjectiveDescription,
    *,
    model_class: str,
    components: dict[str, tuple[float, float]],
    weights: dict[str, float] | None = None,
    **facts: Any,
) -> PretrainingCard:
    """Return the card of a method from its own facts alone; what all methods have in common is filled in.

    Args:
        objective: The description that the method's Trainer has.
        model_class: Class of the root, by default.
        components: First and last value of each loss ("lm_loss") and each metric ("lm_accuracy") that it logs.
        weights: Weights of the losses where they are not 1.
        **facts: Other fields of the card, such as `parts`.
    """
    weights = {name: 1.0 for name in components if name.endswith("_loss")} | (weights or {})
    log = _log({name: _course(*ends) for name, ends in components.items()}, weights=weights)
    before, after = ({name: row[name] for name in row if name.startswith("eval_")} for row in (log[1], log[-1]))
    common = {
        "model_name": f"reference-{objective.name}",
        "note": NOTE,
        "fine_tuning_class": FINE_TUNING_CLASS,
        "language": "en",
        "data": {"sources": ["corpus.txt"], "documents": 1000, "tokens": 2_000_000, "held_out_documents": 50},
        "recipe": {"learning_rate": 5e-4, "max_steps": 500, "per_device_train_batch_size": 32, "seed": 0},
        "log_history": log,
        "metrics_before": before,
        "metrics_after": after,
        "compute": Compute(parameters=5_000_000, steps=500, tokens=2_000_000, seconds=200.0),
        "limits": LIMITS,
        "versions": VERSIONS,
    }
    return PretrainingCard(objective=objective, model_class=model_class, **(common | facts))


TASKS = (
    Evaluation(
        task="SST-2",
        dataset="nyu-mll/glue",
        dataset_config="sst2",
        split="validation",
        metrics={"accuracy": 0.875},
        method="fine-tuned for 3 epochs, one seed",
        baseline={"accuracy": 0.5},
        baseline_name="most frequent class",
        num_examples=872,
    ),
    Evaluation(
        task="Topics",
        dataset="sentences of the handbook",
        split="test",
        metrics={"accuracy": 0.75, "f1": 0.625},
        method="linear probe on mean-pooled states",
        num_examples=400,
    ),
)


def _comparison(**scores: float) -> list[Row]:
    """Return the table of a student beside its teacher, with the scores of both."""
    sizes = {"student_parameters": 5_000_000, "teacher_parameters": 20_000_000, "speed_up_batch_1": 2.5}
    return comparison_rows({**sizes, **scores, "agreement": 0.875, "kl": 0.25})


_CARDS = (
    PretrainingCard(
        model_name="reference-rtd",
        model_class="ElectraForPreTraining",
        objective=RTD,
        note=NOTE,
        fine_tuning_class=FINE_TUNING_CLASS,
        language="de",
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
        tags=["example"],
        examples=["Der Bäcker hat das |Brot| aus dem Ofen geholt.", "Am Abend war nichts mehr davon übrig."],
        recipe={"learning_rate": 5e-4, "max_steps": 500, "per_device_train_batch_size": 32, "seed": 0},
        options={
            "train_file": ["corpus.txt"],
            "block_size": 128,
            "hidden_size": 256,
            "num_hidden_layers": 12,
            "generator_size": 0.25,
            "per_device_train_batch_size": 32,
            "max_steps": 500,
            "learning_rate": 5e-4,
            "warmup_steps": 50,
            "adam_epsilon": 1e-6,
            "max_grad_norm": None,
            "seed": 0,
            "mlm_probability": 0.15,
            "rtd_weight": 50.0,
        },
        sizes={
            "": {"layers": 12, "width": 256, "attention heads": 4, "vocabulary": 8000, "parameters": 5_000_000},
            "pretraining/generator": {"layers": 12, "width": 64, "attention heads": 1, "vocabulary": 8000},
        },
        learning_rates=[(1, 0.0), (50, 5e-4), (500, 0.0)],
        log_history=RTD_LOG,
        metrics_before={"eval_mlm_loss": 9.0, "eval_rtd_loss": 0.7, "eval_disc_auc": 0.5, "eval_runtime": 1.0},
        metrics_after={
            "eval_loss": 22.8,
            "eval_mlm_loss": 6.3,
            "eval_rtd_loss": 0.33,
            "eval_disc_auc": 0.74,
            "eval_disc_gain": 0.14,
            "eval_runtime": 1.0,
        },
        compute=Compute(
            parameters=5_000_000,
            trained_parameters=6_000_000,
            steps=500,
            examples_per_step=32,
            tokens=2_000_000,
            seconds=200.0,
            flops=6e13,
            hardware="Example CPU, 4 cores",
            precision="fp32",
            energy=Energy(kwh=0.25, emissions_kg=0.0125, country="Iceland", scope="machine"),
        ),
        evaluations=TASKS,
        parts={"pretraining/generator": ("ElectraForMaskedLM", "the generator, to go on with the pre-training")},
        limits=LIMITS,
        versions=VERSIONS,
    ),
    PretrainingCard(
        model_name="reference-mlm",
        model_class="BertForMaskedLM",
        objective=MLM,
        note=NOTE,
        fine_tuning_class=FINE_TUNING_CLASS,
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
    _reference(
        describe_encoder(EncoderTrainer.objective, ["mlm", "sop", "word_order"], ENCODER_WEIGHTS),
        model_class="BertForPreTraining",
        components={
            "mlm_loss": (8.0, 5.0),
            "pair_loss": (0.7, 0.5),
            "word_order_loss": (8.0, 4.0),
            "pair_accuracy": (0.5, 0.75),
        },
        weights={f"{name}_loss": weight for name, weight in ENCODER_WEIGHTS.items()},
    ),
    _reference(
        ElectricTrainer.objective,
        model_class="ElectraForPreTraining",
        components={
            "cloze_loss": (8.0, 6.0),
            "nce_loss": (1.2, 0.36),
            "energy": (8.2, 6.1),
            "disc_gain": (-1.84, 0.148),
        },
        weights={"nce_loss": 50.0},
        parts={
            "pretraining/generator": (
                "hf_pretrain.objectives.electric.TwoTowerClozeModel",
                "the generator, to go on with the pre-training",
            )
        },
    ),
    _reference(
        PermutationLMTrainer.objective,
        model_class="XLNetLMHeadModel",
        components={"plm_loss": (8.0, 6.0), "plm_accuracy": (0.02, 0.15)},
    ),
    _reference(
        CausalLMTrainer.objective,
        model_class="GPT2LMHeadModel",
        components={"lm_loss": (8.0, 4.5), "lm_accuracy": (0.03, 0.28)},
        metrics_before={"eval_lm_loss": 8.0, "eval_perplexity": math.exp(8.0)},
        metrics_after={"eval_lm_loss": 4.75, "eval_perplexity": math.exp(4.75)},
        references=reference_rows({"unigram_nll": 7.125, "bigram_nll": 5.375}),
    ),
    _reference(
        ElmoTrainer.objective,
        model_class="ElmoForPreTraining",
        has_own_code=True,
        components={"forward_loss": (8.0, 5.0), "backward_loss": (8.0, 5.25)},
        weights={"forward_loss": 0.5, "backward_loss": 0.5},
        metrics_before={"eval_forward_loss": 8.0, "eval_backward_loss": 8.0, "eval_perplexity": math.exp(8.0)},
        metrics_after={"eval_forward_loss": 5.25, "eval_backward_loss": 5.5, "eval_perplexity": math.exp(5.375)},
        references=reference_rows({"unigram_nll": 7.125, "forward_bigram_nll": 6.0, "backward_bigram_nll": 6.125}),
    ),
    _reference(
        RecurrentLMTrainer.objective,
        model_class="TransformerXLForCausalLM",
        has_own_code=True,
        components={"lm_loss": (8.0, 5.0)},
        metrics_before={"eval_lm_loss": 8.0, "eval_perplexity": math.exp(8.0)},
        metrics_after={"eval_lm_loss": 5.15, "eval_perplexity": math.exp(5.15)},
    ),
    _reference(
        describe(DistillationTrainer.objective, DISTIL_WEIGHTS, head="masked_lm"),
        model_class="BertForMaskedLM",
        components={"prediction_loss": (3.0, 0.9), "mlm_loss": (8.0, 3.0), "cosine_loss": (1.0, 0.1)},
        weights={f"{name}_loss": weight for name, weight in DISTIL_WEIGHTS.items()},
        origin=describe_origin(
            StudentArguments(student_layers="every_other"),
            teacher="google-bert/bert-base-uncased",
            layers=(0, 2, 4, 7, 9, 11),
            last_layer=11,
        ),
        comparison=_comparison(student_mlm_loss=2.85, teacher_mlm_loss=2.25),
    ),
    _reference(
        describe(TaskDistillationTrainer.objective, {"prediction": 1.0}, head="classification"),
        model_class="BertForSequenceClassification",
        fine_tuning_class="",
        components={"prediction_loss": (0.7, 0.2), "accuracy": (0.5, 0.85)},
        origin=describe_origin(StudentArguments(hidden_size=312), teacher="textattack/bert-base-uncased-SST-2"),
        comparison=_comparison(student_accuracy=0.83, teacher_accuracy=0.92),
    ),
)
REFERENCE_CARDS = {card.objective.name: card for card in _CARDS}


def render_reference(name: str) -> str:
    """Return a reference card; its pictures have a folder of their own."""
    return render_card(REFERENCE_CARDS[name], plots_folder=f"plots/{name}")


if __name__ == "__main__":
    REFERENCE_DIR.mkdir(exist_ok=True)
    for name, card in REFERENCE_CARDS.items():
        (REFERENCE_DIR / f"{name}.md").write_text(render_reference(name), encoding="utf-8")
        for path in plot_training(
            card.log_history, REFERENCE_DIR, folder=f"plots/{name}", learning_rates=card.learning_rates
        ):
            print(path.relative_to(REFERENCE_DIR), path.stat().st_size)
