"""An objective of forty lines, made from the shared parts, has everything that the methods of the library have.

The toy asks two things of a stock token classifier: of some tokens, drawn anew each epoch, whether their id is even
("parity", one target a chosen token), and of each example whether it is long ("length", one target an example).
"""

import inspect
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_methods as matrix
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from transformers import AutoModelForTokenClassification

import two_rank_worker
from hf_pretrain.cli import METHODS
from hf_pretrain.corruption.rows import RowKeys, stack_column
from hf_pretrain.hub.record import ObjectiveDescription
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.configuration import ModelArguments, build_config
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.trainer import PretrainingTrainer
from loopback_hub import LoopbackHub, hub_environment
from method_matrix import build, log_of
from two_ranks import run_on_two_ranks


class ToyCollator:
    def __init__(self, *, seed):
        self.seed, self.pad_to_multiple_of = seed, None

    def __call__(self, examples):
        ids, valid = stack_column(examples, "input_ids", multiple=self.pad_to_multiple_of or 1)
        keys = RowKeys.from_examples(examples, seed=self.seed)
        chosen = valid & (keys.bits("chosen", length=ids.shape[1]) < np.uint64(2**63))
        labels = np.where(chosen, ids % 2 == 0, IGNORED)
        batch = {"input_ids": ids, "attention_mask": valid, "labels": labels, "is_long": valid.sum(1) > 12}
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}


class ToyModel(PretrainingModel):
    def __init__(self, model):
        super().__init__(model.config)
        self.model = model
        self.post_init()

    @staticmethod
    def count_targets(batch):
        return {"parity": (batch["labels"] != IGNORED).sum(), "length": torch.tensor(len(batch["is_long"]))}

    def forward(self, input_ids, attention_mask, labels, is_long):
        parity, length = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float().unbind(-1)
        chosen, ones = (labels != IGNORED).float(), torch.ones(len(labels))
        nll = F.binary_cross_entropy_with_logits(parity, labels.clamp(min=0).float(), reduction="none")
        nll_length = F.binary_cross_entropy_with_logits(length[:, 0], is_long.float(), reduction="none")
        right = ((parity > 0) == (labels == 1)) * chosen
        losses = {"parity": ExampleSum((nll * chosen).sum(1), chosen.sum(1)), "length": ExampleSum(nll_length, ones)}
        return PretrainingOutput(losses, {"parity_accuracy": ExampleSum(right.sum(1), chosen.sum(1))})


@dataclass
class ToyArguments(PretrainingArguments):
    length_weight: float = field(default=0.5, metadata={"help": "Weight of the length."})


class ToyTrainer(PretrainingTrainer):
    objective = ObjectiveDescription(name="toy", title="Parity and length", description="Which ids are even?")


def build_trainer(data, model_args, args):
    model = AutoModelForTokenClassification.from_config(build_config(model_args, data.tokenizer))
    sets = {"train_dataset": data.train_dataset, "eval_dataset": data.eval_dataset}
    collator = ToyCollator(seed=args.seed)
    return ToyTrainer(ToyModel(model), args, **sets, data_collator=collator, processing_class=data.tokenizer)


# What a program of the library offers.
ARGUMENTS = (SimpleNamespace, ModelArguments, ToyArguments)
TOY = SimpleNamespace(ARGUMENTS=ARGUMENTS, build_trainer=build_trainer)


def test_the_toy_is_small():
    parts = (ToyCollator, ToyModel, ToyArguments, ToyTrainer, build_trainer)
    assert sum(bool(line.strip()) for part in parts for line in inspect.getsource(part).splitlines()) <= 40


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path, batch, accumulation):
    matrix.test_gradient_does_not_depend_on_how_the_batch_is_cut(TOY, tmp_path, batch, accumulation)


def test_gradient_is_that_of_the_weighted_means(tmp_path):
    matrix.test_gradient_is_that_of_the_weighted_means(TOY, tmp_path)


def test_the_option_called_like_the_loss_is_its_weight(tmp_path):
    rows = {}
    for weight in (0.5, 3.0):
        trainer = build(TOY, tmp_path / str(weight), length_weight=weight)
        trainer.train()
        rows[weight] = trainer.state.log_history[0]
        assert trainer.loss_weight("parity") == 1.0
        total = rows[weight]["parity_loss"] + weight * rows[weight]["length_loss"]
        assert rows[weight]["loss"] == pytest.approx(total, rel=1e-5)
    # Logged components are not weighted.
    assert rows[0.5]["length_loss"] == pytest.approx(rows[3.0]["length_loss"], rel=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact(tmp_path, workers):
    matrix.test_resume_is_bit_exact(TOY, tmp_path, workers)


def test_checkpoint_is_whole_and_the_export_is_stock(tmp_path):
    matrix.test_checkpoint_is_whole_and_the_export_is_stock(TOY, tmp_path)


def test_resume_refuses_another_model(tmp_path):
    matrix.test_resume_refuses_another_model(TOY, tmp_path)


def test_evaluation_is_weighted_by_targets_and_repeatable(tmp_path):
    matrix.test_evaluation_is_weighted_by_targets_and_repeatable(TOY, tmp_path)


def test_padding_changes_nothing(tmp_path):
    matrix.test_padding_changes_nothing(TOY, tmp_path)


def test_bf16_loss_is_near_fp32(tmp_path):
    matrix.test_bf16_loss_is_near_fp32(TOY, tmp_path)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that was evaluated before and after."""
    folder = tmp_path_factory.mktemp("toy") / "even-toy"
    trainer = build(
        TOY,
        folder,
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        logging_steps=20,
        eval_on_start=True,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return trainer, folder


def test_it_learns_and_logs_every_component(learned):
    trainer, _ = learned
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in steps] == [20, 40, 60]
    logged = {"parity_loss", "length_loss", "parity_accuracy", "num_tokens", "tokens_per_second", "peak_memory_mib"}
    assert all(logged <= row.keys() for row in steps)
    before, after = (row for row in trainer.state.log_history if "eval_loss" in row)
    assert (before["step"], after["step"]) == (0, 60)
    assert after["eval_parity_loss"] < 0.2 < 0.5 < before["eval_parity_loss"]
    assert after["eval_parity_accuracy"] > 0.95


def test_its_card_is_written(learned):
    trainer, folder = learned
    card = ModelCard.load(folder / "README.md")
    after = log_of(trainer)[-1]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for name in ("parity_loss", "length_loss", "parity_accuracy"):
        assert results[name] == pytest.approx(after[f"eval_{name}"], rel=1e-3)
    assert {"toy", "hf_pretrain"} <= set(card.data.tags)
    assert "Which ids are even?" in card.text and "BertForTokenClassification" in card.text
    assert not re.search(r"\bNone\b|\bnan\b|\{\{|\]\(\)", card.text)
    assert {path.name for path in (folder / "plots").glob("*.png")} == {"loss.png", "learning_rate.png", "quality.png"}


def test_it_has_an_empty_share_of_a_loss_in_a_micro_batch(tmp_path):
    """A micro-batch without any target of one loss adds nothing to it, and the others are counted as ever."""
    trainer = build(TOY, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    original = trainer.data_collator

    def without_parity(examples):
        batch = original(examples)
        batch["labels"].fill_(IGNORED)
        return batch

    trainer.data_collator = without_parity
    trainer.train()
    row = trainer.state.log_history[0]
    assert "parity_loss" not in row
    assert row["loss"] == pytest.approx(0.5 * row["length_loss"], rel=1e-5)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def main(folder):
    """What each of two ranks does."""
    METHODS.clear()
    METHODS["toy"] = ("test_toy_objective", "a toy")
    two_rank_worker.main(folder)


def test_two_ranks(tmp_path, monkeypatch):
    run_on_two_ranks("test_toy_objective", tmp_path)
    monkeypatch.setitem(matrix.PROGRAMS, "toy", TOY)
    ranks = matrix.TestTwoRanks()
    ranks.test_gradient_equals_one_process(tmp_path, tmp_path / "1", "toy")
    ranks.test_every_rank_logs_every_component(tmp_path, tmp_path / "2", "toy")
    ranks.test_evaluation_equals_one_process(tmp_path, tmp_path / "3", "toy")
    ranks.test_ranks_stay_equal_after_evaluate_then_train(tmp_path, "toy")


PUSH = """
import sys
import torch
from transformers import AutoModelForTokenClassification
from method_matrix import build
from test_toy_objective import TOY

trainer = build(TOY, sys.argv[1], push_to_hub=True, hub_model_id="tester/toy", hub_strategy="end")
trainer.train()
trainer.push_to_hub(language="en", license="mit")
ids = torch.arange(5, 25).reshape(2, 10)
loaded = AutoModelForTokenClassification.from_pretrained("tester/toy").eval()
assert type(loaded).__module__.startswith("transformers.")
with torch.no_grad():
    torch.testing.assert_close(loaded(ids).logits, trainer.model.model.eval()(ids).logits, atol=1e-6, rtol=0)
"""


def test_it_is_pushed_and_opens_from_the_hub(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub_environment(hub.url, tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", PUSH, str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("tester/toy")
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "plots/loss.png"} <= files.keys()
        assert not [path for path in files if path.startswith(("checkpoint-", "_"))]
        card = ModelCard(files["README.md"].read_text())
        assert (card.data.language, card.data.license) == (["en"], "mit")
        assert 'from_pretrained("tester/toy")' in card.text
        assert hub.unknown == []
