"""Joint, decoupled and two-stage training: who moves when, and on what."""

from itertools import pairwise

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from helpers.method_matrix import NO_DROPOUT, build, log_of, relative_difference
from helpers.replaced_tokens import MODES, PROGRAM, STEPS, data_with_an_empty_rank
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.optimizers import AdamWithoutBiasCorrection

GDES = {"embedding_sharing": "gdes"}
TWO_STAGE = {"training_mode": "two_stage", "model_options": {"embedding_sharing": "none", "generator_size": 1.0}}
WITH_DROPOUT = {"config_overrides": None}


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def parts_that_moved(before, after):
    return {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}


class TestDecoupled:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_it_is_two_optimizers_one_after_the_other(self, tmp_path, accumulation):
        """Against the loop written out: the discriminator reads the generator's new table, and each is clipped by itself."""
        options = {
            "model_options": GDES,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_steps": 3,
        }
        size = 8 // accumulation
        trainer = build(
            PROGRAM, tmp_path / "run", training_mode="decoupled", **options,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        by_hand = build(PROGRAM, tmp_path / "hand", **options)
        model = by_hand.model.train()
        decayed = by_hand.get_decay_parameter_names(model)
        optimizers = {}
        for part in ("generator", "discriminator"):
            named = [(n, p) for n, p in model.named_parameters() if n.startswith(part)]
            groups = [
                {"params": [p for n, p in named if (n in decayed) == is_decayed], "weight_decay": 0.1 * is_decayed}
                for is_decayed in (True, False)
            ]
            optimizers[part] = AdamWithoutBiasCorrection(groups, eps=1e-6)
        order = list(by_hand._get_train_sampler(by_hand.train_dataset))
        for step in range(3):
            batch = by_hand.data_collator([by_hand.train_dataset[i] for i in order[8 * step : 8 * step + 8]])
            replaced = None
            for part, loss, weight in (("generator", "mlm", 1.0), ("discriminator", "rtd", 50.0)):
                output = model(**batch, stage=part, replaced_ids=replaced)
                assert list(output.losses) == [loss]
                replaced, (total, count) = output.replaced_ids, output.losses[loss]
                (weight * total.sum() / count.sum()).backward()
                clip_grad_norm_(model.parameters(), 0.5)
                for group in optimizers[part].param_groups:
                    group["lr"] = 1e-2 * (1 - step / 3)
                optimizers[part].step()
                model.zero_grad()
        trainer.train()
        assert relative_difference(weights(trainer.model), weights(model)) < 2e-4

    def test_both_losses_and_each_token_are_logged_once(self, tmp_path):
        joint = build(PROGRAM, tmp_path / "joint", model_options=GDES)
        decoupled = build(PROGRAM, tmp_path / "decoupled", model_options=GDES, training_mode="decoupled")
        joint.train()
        decoupled.train()
        rows = [log_of(trainer)[0] for trainer in (joint, decoupled)]
        assert rows[0].keys() == rows[1].keys()
        assert rows[0]["num_tokens"] == rows[1]["num_tokens"] and rows[0]["mlm_loss"] == rows[1]["mlm_loss"]
        # The generator had already moved.
        assert rows[0]["rtd_loss"] != rows[1]["rtd_loss"]


class TestTwoStage:
    def test_one_learns_then_the_other_from_where_it_stands(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, **TWO_STAGE, max_steps=6, generator_steps=3, learning_rate=1e-2)
        seen = []
        step = trainer.training_step
        trainer.training_step = lambda *args, **kwargs: (seen.append(weights(trainer.model)), step(*args, **kwargs))[1]
        trainer.train()
        seen.append(weights(trainer.model))
        # At its first step with a learning rate of zero nothing moves; a stage's schedule starts with the stage.
        assert [parts_that_moved(a, b) for a, b in pairwise(seen)][:3] == [{"generator"}] * 3
        assert all(parts_that_moved(a, b) == {"discriminator"} for a, b in pairwise(seen[3:]))
        rows = log_of(trainer)
        assert [sorted(n for n in row if n.endswith("_loss") and n != "train_loss") for row in rows[:6]] == [
            ["mlm_loss"]
        ] * 3 + [["rtd_loss"]] * 3
        assert [row["learning_rate"] for row in rows[:3]] == [row["learning_rate"] for row in rows[3:6]]

    def test_each_training_hands_over(self, tmp_path, monkeypatch):
        trainer = build(PROGRAM, tmp_path, **TWO_STAGE, max_steps=2)
        body, taken = trainer.model.discriminator.base_model, []
        monkeypatch.setattr(body, "load_state_dict", lambda state: taken.append(trainer.state.global_step))
        trainer.train()
        trainer.train()
        assert taken == [1, 1]

    def test_the_discriminator_starts_as_the_generator(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, **TWO_STAGE, max_steps=4, generator_steps=0.5, learning_rate=0.0)
        trainer.train()
        body = trainer.model.generator.base_model.state_dict()
        assert all(torch.equal(v, body[n]) for n, v in trainer.model.discriminator.base_model.state_dict().items())

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"model_options": {"generator_size": 1.0}}, "embedding_sharing='none'"),
            ({"model_options": {"embedding_sharing": "none"}}, "training_mode='two_stage' needs equal parameters"),
        ],
    )
    def test_models_that_do_not_fit_are_refused(self, tmp_path, options, match):
        with pytest.raises(InputError, match=match):
            build(PROGRAM, tmp_path, **{**TWO_STAGE, **options})

    def test_a_stage_without_steps_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="generator_steps=9"):
            build(PROGRAM, tmp_path, **TWO_STAGE, max_steps=4, generator_steps=9).train()


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(InputError, match="training_mode='alternating'"):
        build(PROGRAM, tmp_path, training_mode="alternating")


@pytest.mark.parametrize("mode", ["decoupled", "two_stage"])
def test_resume_is_bit_exact(tmp_path, mode):
    options = {
        **MODES[mode], "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "generator_learning_rate": 2e-3,
    }  # fmt: skip
    options["model_options"] = options["model_options"] | WITH_DROPOUT
    straight = build(PROGRAM, tmp_path / "straight", **options)
    straight.train()
    # The checkpoint at step 2 is the last before the hand-over.
    for stop in (1, 2, 3):
        resumed = build(PROGRAM, tmp_path / f"resumed-{stop}", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
        assert log_of(resumed) == log_of(straight)
        assert not parts_that_moved(weights(straight.model), weights(resumed.model))


class TestTwoRanks:
    """One run of two processes serves the tests here."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("ranks")
        run_on_two_ranks("helpers.rtd_modes_worker", folder)
        return folder

    @pytest.mark.parametrize("mode", MODES)
    def test_two_ranks_that_accumulate_equal_one_batch(self, folder, tmp_path, mode):
        alone = build(PROGRAM, tmp_path, **STEPS, **MODES[mode])
        before = weights(alone.model)
        alone.train()
        expected = weights(alone.model)
        for rank in range(2):
            found = {
                name: value for name, value in torch.load(folder / f"{mode}-{rank}.pt").items() if name in expected
            }
            assert {"generator", "discriminator"} == parts_that_moved(before, found)
            assert relative_difference(expected, found) < 1e-5

    def test_a_rank_with_nothing_to_select_neither_hangs_nor_counts(self, folder, tmp_path):
        alone = build(PROGRAM, tmp_path, data_with_an_empty_rank())
        order = alone._get_train_sampler(alone.train_dataset)
        batch = alone.data_collator([alone.train_dataset[i] for i in order])
        assert [bool(row.any()) for row in batch["labels"] != IGNORED] == [True] * 4 + [False] * 4
        alone.train()
        for rank in range(2):
            found = torch.load(folder / f"empty-{rank}.pt")
            assert relative_difference(alone.recorder.gradients[0], found) < 1e-5


def test_a_learning_rate_of_the_generators_own(tmp_path):
    options = {"model_options": {"config_overrides": NO_DROPOUT, **GDES}, "learning_rate": 1e-3}
    trainer = build(PROGRAM, tmp_path, **options, generator_learning_rate=0.0, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert parts_that_moved(before, weights(trainer.model)) == {"discriminator"}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(map(id, parameters))) == len(list(trainer.model.parameters()))


def test_weight_and_temperature_follow_their_schedules(tmp_path):
    trainer = build(PROGRAM, tmp_path, max_steps=3, rtd_weight="0:0, 2:50", temperature="0%:1, 100%:0.001")
    seen = []
    forward = trainer.model.forward
    trainer.model.forward = lambda **inputs: (seen.append(inputs), forward(**inputs))[1]
    trainer.train()
    rows = log_of(trainer)
    for row, weight in zip(rows[:3], (0.0, 25.0, 50.0), strict=True):
        assert row["loss"] == pytest.approx(row["mlm_loss"] + weight * row["rtd_loss"], rel=1e-4)
    assert [float(inputs["temperature"]) for inputs in seen] == pytest.approx([1.0, 0.667, 0.334])
    trainer.evaluate()
    assert "temperature" not in seen[-1] and trainer.model.config.temperature == 0.001


def test_a_constant_temperature_is_that_of_the_model(tmp_path):
    trainer = build(PROGRAM, tmp_path, temperature=0.5)
    assert trainer.model.config.temperature == 0.5
    trainer.args.temperature = 2.0
    with pytest.raises(InputError, match="temperature=2.0, but the model was built to sample at 0.5"):
        type(trainer)(trainer.model, trainer.args)


def test_a_discriminator_that_learned_nothing_is_told(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_pretrain.objectives.replaced_token_detection.trainer.logger.warning", warnings.append)
    trainer = build(PROGRAM, tmp_path, max_steps=2)
    trainer.evaluate()
    assert not warnings, "an untrained one is no news"
    trainer.train()
    with torch.no_grad():
        trainer.model.discriminator.discriminator_predictions.dense_prediction.bias.fill_(5.0)
    assert trainer.evaluate()["eval_disc_gain"] < 0
    assert len(warnings) == 1 and "learning_rate" in warnings[0]


def test_the_log_says_what_the_discriminator_explains(tmp_path):
    trainer = build(PROGRAM, tmp_path)
    trainer.train()
    row = log_of(trainer)[0]
    rate = torch.tensor(row["fake_rate"], dtype=torch.float64)
    entropy = torch.distributions.Bernoulli(rate).entropy()
    assert 0 < rate < 0.2 and row["disc_gain"] == pytest.approx(float(1 - row["rtd_loss"] / entropy), rel=1e-5)
