"""Each phase trains on its own data, with its own masks, at the rate of the recipe."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.method_matrix import SPECIALS
from helpers.phased_runs import PhasedRun, Text, state_of

RATE = 1e-2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """Three phases of another text, mask rate, block length, batch size and base of the rotary positions each."""
    phases = [
        {"name": "one", "steps": 4, "mlm_probability": 0.5, "rate": "0%:0, 50%:1"},
        {"name": "two", "steps": 3, "mlm_probability": 0.25, "rate": 0.5, "train_file": [str(text.second)]},
        {
            "name": "three",
            "steps": 5,
            "rate": "0%:1, 100%:0",
            "shape": "1-sqrt",
            "mlm_probability": "0%:0.1, 100%:0.6",
            "block_size": 48,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "rope_theta": 170_000,
            "max_position_embeddings": 256,
        },
    ]
    folder = tmp_path_factory.mktemp("run") / "run"
    return PhasedRun(text, folder, phases, model_type="modernbert", per_device_train_batch_size=6)


def masked_share(step, *, names=("attention_mask", "labels")):
    """Masked tokens among those that can be masked, of each row."""
    shares = []
    for batch in step.batches:
        mask, labels = (batch[name] for name in names)
        for row_mask, row_labels in zip(mask, labels, strict=True):
            n = int(row_mask.sum())
            shares.append((int((row_labels != -100).sum()), n))
    return shares


class TestBatches:
    def test_each_step_is_of_its_phase(self, run):
        phases = [run.steps[step].phase for step in range(12)]
        assert phases == ["one"] * 4 + ["two"] * 3 + ["three"] * 5

    def test_lengths_and_sizes(self, run):
        lengths = [max(batch["input_ids"].shape[1] for batch in run.steps[step].batches) for step in range(12)]
        assert max(lengths[:7]) == 24 and 24 < max(lengths[7:]) <= 48
        sizes = [[len(batch["input_ids"]) for batch in run.steps[step].batches] for step in range(12)]
        assert sizes == [[6]] * 7 + [[2, 2, 2]] * 5

    def test_the_text(self, run):
        half = 27
        for step, recorded in run.steps.items():
            # What stands in the text, not what masks put in its place: labels where there are some.
            words = torch.cat(
                [torch.where(b["labels"] == -100, b["input_ids"], b["labels"]).flatten() for b in recorded.batches]
            )
            words = words[words >= len(SPECIALS)] - len(SPECIALS)
            assert len(words)
            is_second = recorded.phase == "two"
            assert bool((words >= half).all()) == is_second and bool((words < half).all()) == (not is_second), step

    def test_the_mask_rate_counts_within_the_phase(self, run):
        rates = [0.5] * 4 + [0.25] * 3 + [0.1, 0.2, 0.3, 0.4, 0.5]
        for step, rate in enumerate(rates):
            for masked, n in masked_share(run.steps[step]):
                assert masked == min(n - 2, max(1, round(rate * n))), (step, rate)
        logged = [row.get("mlm_probability") for row in run.log if "loss" in row]
        assert logged[:7] == [None] * 7 and logged[7:] == pytest.approx(rates[7:])

    def test_the_data_of_a_phase_begins_at_its_begin(self, run):
        rows = [row for row in run.log if "loss" in row]
        epochs = [row["epoch"] for row in rows]
        assert epochs[0] < 1 and epochs[4] == epochs[0] and epochs[7] < 1
        assert epochs == sorted(epochs[:4]) + sorted(epochs[4:7]) + sorted(epochs[7:])

    def test_phases_on_one_text_mask_other_tokens(self, text, tmp_path):
        phases = [{"name": "one", "steps": 2}, {"name": "two", "steps": 2}]
        run = PhasedRun(text, tmp_path / "run", phases, mlm_probability=0.3, per_device_train_batch_size=80)
        first, second = (run.steps[step].batches[0] for step in (0, 2))
        masks = []
        for batch in (first, second):
            rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
            known = {
                tuple(i if label == -100 else label for i, label in zip(ids, labels, strict=True)): [
                    x != -100 for x in labels
                ]
                for ids, labels in rows
            }
            masks.append(known)
        both = masks[0].keys() & masks[1].keys()
        assert len(both) > 40
        assert sum(masks[0][row] == masks[1][row] for row in both) < len(both) / 4
        orders = [batch["input_ids"][:, 1].tolist() for batch in (first, second)]
        assert orders[0] != orders[1]


class TestRate:
    def test_each_step_has_the_closed_form(self, run):
        factors = [0, 0.5, 1, 1, 0.5, 0.5, 0.5, *(1 - math.sqrt(step / 5) for step in range(5))]
        for step, factor in enumerate(factors):
            assert run.steps[step].rates == pytest.approx([RATE * factor] * 2, rel=1e-12, abs=1e-15), step
        logged = [row["learning_rate"] for row in run.log if "loss" in row]
        assert logged == pytest.approx([RATE * factor for factor in factors])

    def test_the_generator_of_rtd_too(self, text, tmp_path):
        phases = [
            {"name": "up", "steps": 3, "rate": "0:0, 2:1", "rtd_weight": 10},
            {"name": "down", "steps": 3, "rate": "0%:1, 100%:0.1", "shape": "cosine"},
        ]
        options = {"generator_learning_rate": 1e-3, "generator_size": 0.5, "embedding_sharing": "none"}
        run = PhasedRun(text, tmp_path / "run", phases, method="rtd", save_steps=100, **options)
        cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
        for step, factor in enumerate([0, 0.5, 1, *cosine]):
            rates = run.steps[step].rates
            assert {round(rate / factor, 12) if factor else rate for rate in rates} == (
                {RATE, 1e-3} if factor else {0.0}
            )

    def test_without_rates_one_schedule_spans_all_phases(self, text, tmp_path):
        phases = [{"name": "one", "share": "50%"}, {"name": "two", "share": "50%", "block_size": 12}]
        run = PhasedRun(text, tmp_path / "run", phases, max_steps=8, warmup_steps=2)
        factors = [0, 0.5, *((8 - step) / 6 for step in range(2, 8))]
        assert [run.steps[step].rates[0] for step in range(8)] == pytest.approx([RATE * factor for factor in factors])


class TestBesideAPlainRun:
    def test_the_first_phase_is_the_run_without_phases(self, text, tmp_path):
        phases = [
            {"name": "up", "share": "50%", "rate": "0%:0, 100%:1"},
            {"name": "down", "share": "50%", "rate": "0%:1, 100%:0"},
        ]
        options = {"max_steps": 8, "save_steps": 4}
        phased = PhasedRun(text, tmp_path / "phased", phases, **options)
        plain = PhasedRun(text, tmp_path / "plain", None, warmup_steps=4, **options)
        ours, theirs = (
            AutoModelForMaskedLM.from_pretrained(run.folder, dtype=torch.float32).state_dict()
            for run in (phased, plain)
        )
        from safetensors.torch import load_file

        border, same = (load_file(run.folder / "checkpoint-4" / "model.safetensors") for run in (phased, plain))
        assert border.keys() == same.keys()
        for name in border:
            torch.testing.assert_close(border[name], same[name], rtol=1e-6, atol=1e-8)
        # Behind it the order of the data is another, and the rate is the same.
        for step in range(8):
            assert phased.steps[step].rates == pytest.approx(plain.steps[step].rates)
        assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


class TestObjectives:
    def test_shares_change_and_parameters_do_not(self, text, tmp_path):
        phases = [
            {
                "name": "causal",
                "steps": 3,
                "objectives": ["mlm", "left_to_right"],
                "objective_shares": "mlm:1/6, left_to_right:5/6",
            },
            {"name": "masked", "steps": 2, "objectives": ["mlm"], "mlm_probability": 0.3},
        ]
        # Room for the segments of all modes, in both phases.
        options = {"config_overrides": '{"type_vocab_size": 6}', "per_device_train_batch_size": 30}
        run = PhasedRun(text, tmp_path / "run", phases, method="encoder", **options)
        modes = [[batch.get("lm_modes") for batch in run.steps[step].batches] for step in range(5)]
        causal = torch.cat([batch for step in modes[:3] for batch in step])
        assert 0.6 < float((causal != 0).float().mean()) < 1
        assert modes[3:] == [[None], [None]]
        weights, _ = state_of(run.trainer)
        assert weights.keys() == state_of(run.trainers[0])[0].keys()


class TestExport:
    def test_the_configuration_has_the_positions_of_the_last_phase(self, run):
        config = AutoConfig.from_pretrained(run.folder)
        assert config.rope_parameters["full_attention"]["rope_theta"] == 170_000
        assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
        assert config.max_position_embeddings == 256
        assert AutoConfig.from_pretrained(run.folder).vocab_size == run.trainer.model.config.model.vocab_size

    def test_the_model_computes_with_them(self, run):
        exported = AutoModelForMaskedLM.from_pretrained(run.folder, dtype=torch.float32).eval()
        batch = run.steps[11].batches[0]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        body = run.trainer.model.root.eval()
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids, attention_mask=mask).logits for model in (body, exported))
        torch.testing.assert_close(ours, theirs)
        rotary = run.trainer.model.root.model.rotary_emb
        head = run.trainer.model.root.config.hidden_size // 2
        expected = 1 / (170_000 ** (np.arange(0, head, 2) / head))
        np.testing.assert_allclose(rotary.full_attention_inv_freq.numpy(), expected, rtol=1e-6)
        before = run.trainers[0].model.root.model.rotary_emb.full_attention_inv_freq
        np.testing.assert_allclose(before.numpy(), 1 / (160_000 ** (np.arange(0, head, 2) / head)), rtol=1e-6)

    def test_held_out_numbers_are_of_the_begin_and_of_each_end(self, run):
        assert [row["step"] for row in run.log if "eval_loss" in row] == [0, 4, 7, 12]

    def test_the_recipe_starts_the_same_run_again(self, text, run, tmp_path, monkeypatch):
        from helpers.phased_runs import PROGRAMS

        recipe = run.folder / "recipe.yaml"
        assert "phases:" in recipe.read_text()
        folder = tmp_path / "again"
        PROGRAMS["mlm"].run(["--config", str(recipe), "--output_dir", str(folder)])
        ours, theirs = (json.loads((place / "trainer_state.json").read_text()) for place in (run.folder, folder))
        losses = [[row["loss"] for row in state["log_history"] if "loss" in row] for state in (ours, theirs)]
        assert losses[0] == losses[1] and len(losses[0]) == 12
        again = [
            line for line in (folder / "recipe.yaml").read_text().splitlines() if not line.startswith("output_dir")
        ]
        assert again == [line for line in recipe.read_text().splitlines() if not line.startswith("output_dir")]
