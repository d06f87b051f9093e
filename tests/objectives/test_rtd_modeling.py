"""A step of generator and discriminator: what each sees, what it loses, and who learns from whom."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest

from helpers.method_matrix import NO_DROPOUT, build
from helpers.replaced_tokens import PROGRAM, ROBERTA, UNTIED, batch_of, favour, originals, run
from hf_pretrain.data import draws
from hf_pretrain.modeling.losses import IGNORED, sample_tokens
from hf_pretrain.objectives.replaced_token_detection import (
    DataCollatorForReplacedTokenDetection,
    ReplacedTokenDetectionForPreTraining,
)


@pytest.fixture
def trainer(tmp_path):
    return build(PROGRAM, tmp_path)


class TestDiscriminatorInput:
    @pytest.mark.parametrize("mask_share", [0.85, 1.0, 0.0])
    def test_samples_at_the_selected_positions_and_the_text_elsewhere(self, tmp_path, mask_share):
        trainer = build(PROGRAM, tmp_path, mask_share=mask_share, mlm_probability=0.3)
        batch = batch_of(trainer)
        text, selected = originals(trainer, batch), batch["labels"] != IGNORED
        output, seen = run(trainer.model, batch)
        given = seen["input_ids"]
        assert torch.equal(given[~selected], text[~selected])
        logits = trainer.model.generator.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = sample_tokens(logits[selected], batch["sample_uniforms"], excluded=trainer.model.excluded_tokens)
        assert torch.equal(given[selected], expected)
        assert not torch.isin(given[selected], torch.tensor(trainer.processing_class.all_special_ids)).any()
        assert not (given == trainer.processing_class.mask_token_id).any()
        assert torch.equal(seen["attention_mask"], batch["attention_mask"])

    def test_a_label_says_that_a_selected_token_is_another_now(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, mlm_probability=0.5)
        batch = batch_of(trainer, 60)
        text, selected = originals(trainer, batch), batch["labels"] != IGNORED
        output, seen = run(trainer.model, batch)
        is_real = batch["attention_mask"].bool()
        differs = seen["input_ids"] != text
        assert torch.equal(output.score_labels[is_real] == 1, (selected & differs)[is_real])
        assert torch.equal(output.score_labels == IGNORED, ~is_real)
        is_special = torch.isin(text, torch.tensor([2, 3])) & is_real
        assert not output.score_labels[is_special].any()
        # By chance some guesses are right, so the assertions above saw both kinds.
        assert (selected & ~differs).any() and (selected & differs).any()

    def test_a_right_guess_is_an_original(self, trainer):
        """Each example repeats one word; the generator says the word number 10 always."""
        favour(trainer.model, 10)
        batch = batch_of(trainer, 40)
        selected, is_ten = batch["labels"] != IGNORED, originals(trainer, batch) == 10
        output, seen = run(trainer.model, batch)
        assert (seen["input_ids"][selected] == 10).all()
        assert (is_ten & selected).any() and (~is_ten & selected).any()
        assert torch.equal(output.score_labels == 1, selected & ~is_ten)
        hits, count = output.metrics["sampled_accuracy"]
        assert torch.equal(hits, (selected & is_ten).sum(1).float()) and torch.equal(count, selected.sum(1).float())

    def test_the_temperature_is_that_of_the_configuration(self, trainer):
        batch = batch_of(trainer)
        trainer.model.config.temperature = 1e-6
        output, seen = run(trainer.model, batch)
        logits = trainer.model.generator(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        best = logits.masked_fill(trainer.model.excluded_tokens, -torch.inf).argmax(-1)
        selected = batch["labels"] != IGNORED
        assert torch.equal(seen["input_ids"][selected], best[selected])

    def test_further_inputs_reach_both_models(self, trainer):
        batch = batch_of(trainer)
        plain, _ = run(trainer.model, batch)
        typed, seen = run(trainer.model, {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])})
        assert seen["token_type_ids"].all()
        assert not torch.equal(plain.losses["mlm"].sum, typed.losses["mlm"].sum)

    def test_fillers_change_nothing(self, trainer):
        batch = batch_of(trainer)
        trainer.data_collator.target_slots = 50
        filled = batch_of(trainer)
        assert (
            len(filled["target_positions"]) % 50
            == 0
            < len(filled["target_positions"]) - len(batch["target_positions"])
        )
        (expected, seen), (output, seen_filled) = run(trainer.model, batch), run(trainer.model, filled)
        assert torch.equal(seen["input_ids"], seen_filled["input_ids"])
        for name in expected.losses:
            torch.testing.assert_close(output.losses[name], expected.losses[name])
        for name in expected.metrics:
            torch.testing.assert_close(output.metrics[name], expected.metrics[name])

    def test_each_epoch_draws_anew(self, trainer):
        example = {"input_ids": [2, *range(10, 30), 3], "example_id": 4}
        first, again, later = (trainer.data_collator([{**example, "epoch": epoch}]) for epoch in (0, 0, 1))
        assert torch.equal(first["sample_uniforms"], again["sample_uniforms"])
        assert not set(first["sample_uniforms"].tolist()) & set(later["sample_uniforms"].tolist())

    def test_samples_are_drawn_apart_from_the_masks(self, tokenizer):
        """From the draws that choose what is masked, the uniforms of what was chosen would all be small."""
        collator = DataCollatorForReplacedTokenDetection(tokenizer)
        row = {"input_ids": [2, *range(5, 55), 3], "epoch": 0}
        batch = collator([{**row, "example_id": i} for i in range(500)])
        chosen = batch["target_positions"]
        is_masked = batch["input_ids"].flatten()[chosen] == tokenizer.mask_token_id
        for group in (is_masked, ~is_masked):
            assert group.sum() > 400
            assert kstest(batch["sample_uniforms"][group].numpy(), "uniform").pvalue > 1e-3


class TestNeverSampled:
    def test_ids_that_the_tokenizer_does_not_have(self, tmp_path):
        """60 tokens in a table of 64 rows: the generator must not say one of the four."""
        overrides = json.dumps({**json.loads(NO_DROPOUT), "vocab_size": 64})
        trainer = build(PROGRAM, tmp_path, model_options={"config_overrides": overrides})
        model = trainer.model
        assert model.excluded_tokens.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 60, 61, 62, 63]
        favour(model, [60, 61, 62, 63])
        _, seen = run(model, batch_of(trainer, 40))
        assert seen["input_ids"].max() < 60
        uniforms = (
            torch.from_numpy(draws.uniforms(draws.row_keys([0], seed=0), 10**6)[0]).float().clamp(max=1 - 2**-24)
        )
        logits = 3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
        drawn = torch.cat(
            [
                sample_tokens(logits.expand(50_000, -1), u, excluded=model.excluded_tokens)
                for u in uniforms.split(50_000)
            ]
        )
        assert drawn.min() >= 5 and drawn.max() <= 59
        model.save_pretrained(tmp_path)
        loaded = ReplacedTokenDetectionForPreTraining.from_pretrained(tmp_path)
        assert torch.equal(loaded.excluded_tokens, model.excluded_tokens)

    def test_a_sampled_padding_token_cannot_shift_the_positions_of_roberta(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options=ROBERTA)
        model, batch = trainer.model, batch_of(trainer)
        favour(model, trainer.processing_class.all_special_ids)
        numbers = []
        table = model.discriminator.roberta.embeddings.position_embeddings
        handle = table.register_forward_pre_hook(lambda module, args: numbers.append(args[0].clone()))
        _, seen = run(model, batch)
        text = originals(trainer, batch)
        forced = text.masked_fill(batch["labels"] != IGNORED, trainer.processing_class.pad_token_id)
        for ids in (text, forced):
            model.discriminator(ids, attention_mask=batch["attention_mask"])
        handle.remove()
        assert (seen["input_ids"] != text).any()
        with_samples, without, with_padding = numbers
        assert torch.equal(with_samples, without)
        # Had it been sampled, the positions would have shifted.
        assert not torch.equal(with_padding, without)


class TestLosses:
    def test_levels_of_the_untrained_pair(self, tmp_path):
        """ln V for the generator, ln 2 for the discriminator, and their weighted sum."""
        overrides = json.dumps({"vocab_size": 2000})
        trainer = build(
            PROGRAM,
            tmp_path,
            per_device_train_batch_size=64,
            model_options={"config_overrides": overrides, "hidden_size": 64},
        )
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["mlm_loss"] == pytest.approx(math.log(2000), rel=0.01)
        assert row["rtd_loss"] == pytest.approx(math.log(2), rel=0.02)
        assert row["loss"] == pytest.approx(math.log(2000) + 50 * math.log(2), rel=0.02)
        assert row["loss"] == pytest.approx(row["mlm_loss"] + 50 * row["rtd_loss"], rel=1e-5)

    def test_the_discriminator_answers_for_all_real_tokens_and_no_padding(self, trainer):
        batch = batch_of(trainer)
        output, seen = run(trainer.model, batch)
        logits = trainer.model.discriminator(seen["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = (seen["input_ids"] != originals(trainer, batch)).float()
        assert (batch["attention_mask"] == 0).any()
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            expected = F.binary_cross_entropy_with_logits(logits[row, :length], labels[row, :length], reduction="sum")
            torch.testing.assert_close(output.losses["rtd"].sum[row], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(output.losses["rtd"].count, batch["attention_mask"].sum(1).float())

    def test_the_generators_metrics(self, trainer):
        batch = batch_of(trainer)
        output, seen = run(trainer.model, batch)
        selected = batch["labels"] != IGNORED
        logits = trainer.model.generator(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = {"mlm_accuracy": logits.argmax(-1), "sampled_accuracy": seen["input_ids"]}
        assert output.metrics.keys() == expected.keys() | {"fake_rate"}
        for name, guesses in expected.items():
            assert torch.equal(output.metrics[name].sum, ((guesses == batch["labels"]) & selected).sum(1).float())
        output = trainer.model.train()(**batch)
        assert output.metrics.keys() == {"fake_rate"} and output.scores is None and output.score_labels is None

    def test_rows_with_nothing_to_select(self, trainer):
        empty = {"input_ids": [2, 3], "word_starts": [True, True], "epoch": 0}
        batch = trainer.data_collator([{**empty, "example_id": i} for i in range(3)])
        assert len(batch["target_positions"]) == 0
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        assert math.isfinite(float(loss.detach())) and float(loss.detach()) > 0
        # Zero, not none: distributed training waits for every gradient.
        shared = {id(parameter) for parameter in trainer.model.discriminator.parameters()}
        for name, parameter in trainer.model.generator.named_parameters():
            assert parameter.grad is not None, name
            if id(parameter) not in shared:
                assert not parameter.grad.any(), name
        mixed = trainer.data_collator([{**empty, "example_id": 99}, trainer.train_dataset[0]])
        output, _ = run(trainer.model, mixed)
        assert float(output.losses["mlm"].sum[0]) == float(output.losses["mlm"].count[0]) == 0
        assert output.losses["rtd"].count[0] == 2


class TestGradients:
    def test_none_reaches_the_generator_from_the_discriminator(self, tmp_path):
        gradients = []
        for weight in (0.0, 50.0):
            trainer = build(PROGRAM, tmp_path / str(weight), model_options=UNTIED, rtd_weight=weight)
            trainer.train()
            gradients.append(trainer.recorder.gradients[0])
        generator = [name for name in gradients[0] if name.startswith("generator.")]
        assert any(".encoder." in name and gradients[0][name].any() for name in generator)
        assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in generator)
        discriminator = gradients[0].keys() - set(generator)
        assert not any(gradients[0][name].any() for name in discriminator)
        assert any(gradients[1][name].any() for name in discriminator)

    @pytest.mark.parametrize("weight", [1.0, 50.0])
    def test_shared_embeddings_get_the_sum_of_both(self, tmp_path, weight):
        """Against two stock models apart, each with a table of its own and the dense head."""
        trainer = build(PROGRAM, tmp_path, rtd_weight=weight)
        model, batch = trainer.model, batch_of(trainer, 8)
        generator, discriminator = copy.deepcopy(model.generator), copy.deepcopy(model.discriminator)
        generator.base_model._forward_hooks.clear()
        _, seen = run(model, batch)
        trainer.compute_loss(model, batch).backward()
        mask = batch["attention_mask"]
        logits = generator(batch["input_ids"], attention_mask=mask).logits
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED).backward()
        is_real = mask.bool()
        labels = (seen["input_ids"] != originals(trainer, batch)).float()
        logits = discriminator(seen["input_ids"], attention_mask=mask).logits
        F.binary_cross_entropy_with_logits(logits[is_real], labels[is_real]).backward()
        names = [name for name, _ in model.generator.electra.embeddings.named_parameters()]
        assert len(names) == 5
        for name in names:
            total, ours, theirs = (
                part.electra.embeddings.get_parameter(name).grad
                for part in (model.generator, generator, discriminator)
            )
            assert ours.any() and theirs.any()
            scale = float(total.abs().max())
            assert float((total - ours - weight * theirs).abs().max()) <= 1e-5 * scale, name
        assert (
            model.discriminator.get_input_embeddings().weight.grad
            is model.generator.get_input_embeddings().weight.grad
        )
