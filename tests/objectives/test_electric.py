"""Electric: what is noise, what the losses are, who learns from whom, and what is left behind."""

import json
import math
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModel,
    BertConfig,
    BertForTokenClassification,
    ElectraConfig,
    ElectraForPreTraining,
    ElectraModel,
)

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.data import draws
from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.electric import (
    DataCollatorForElectric,
    ElectricForPreTraining,
    ElectricModelArguments,
    TwoTowerClozeModel,
    build_model,
    score_texts,
)
from hf_pretrain.training.parsing import parse_arguments
from method_matrix import NO_DROPOUT, TINY, build, log_of, relative_difference, tiny_data

PROGRAM = import_module("hf_pretrain.trainers.electric")
UNTIED = {"embedding_sharing": "none"}
BERT = {"model_type": "bert", "generator_size": 1.0}
LIKELY = 1e4
PAD, UNK, CLS, SEP = 0, 1, 2, 3


def batch_of(trainer, count=12):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


def run(model, batch):
    """Return the output in evaluation mode and what the discriminator was given."""
    seen = {}
    handle = model.discriminator.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        output = model.eval()(**batch)
    handle.remove()
    return output, seen


def favour(model, token_ids):
    """Make the generator all but sure of these tokens, everywhere."""
    with torch.no_grad():
        model.generator.bias[token_ids] = LIKELY


@pytest.fixture
def trainer(tmp_path):
    return build(PROGRAM, tmp_path)


class TestCollator:
    def test_the_text_is_left_as_it_is_and_candidates_are_its_ordinary_tokens(self, tokenizer):
        rows = [[CLS, 10, UNK, 11, 12, SEP], [CLS, 20, 21, SEP], [CLS, UNK, SEP]]
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = DataCollatorForElectric(tokenizer, masking=no_masks())(examples(rows))
            ids = batch["input_ids"]
            assert [row[mask.bool()].tolist() for row, mask in zip(ids, batch["attention_mask"], strict=True)] == rows
            candidates = torch.zeros_like(ids, dtype=torch.bool)
            candidates.view(-1)[batch["candidate_positions"]] = True
            assert torch.equal(candidates, ids >= 10)
            selected = batch["labels"] != IGNORED
            assert not (selected & ~candidates).any()
            assert selected.any(dim=1).tolist() == [True, True, False]
            assert torch.equal(selected.flatten().nonzero().flatten(), batch["target_positions"])
            assert batch["sample_uniforms"].shape == batch["target_positions"].shape
        tokenizer.padding_side = "right"

    @pytest.mark.parametrize("option", [{"mask_share": 0.85}, {"random_share": 0.1}, {"mask_unknown": True}])
    def test_options_of_masking_are_refused(self, tokenizer, option):
        with pytest.raises(InputError, match=next(iter(option))):
            DataCollatorForElectric(tokenizer, masking=no_masks(**option))


def no_masks(**changes):
    return MaskingArguments(**{"mask_share": 0.0, "random_share": 0.0, "mask_unknown": False, **changes})


def examples(rows):
    return [{"input_ids": row, "example_id": i, "epoch": 0} for i, row in enumerate(rows)]


class TestNoise:
    def test_samples_at_the_selected_positions_and_the_text_elsewhere(self, trainer):
        model, batch = trainer.model, batch_of(trainer)
        selected = batch["labels"] != IGNORED
        output, seen = run(model, batch)
        given, text = seen["input_ids"], batch["input_ids"]
        assert torch.equal(given[~selected], text[~selected]) and (given != text).any()
        logits = model.generator(text, batch["attention_mask"]).logits
        cumulative = logits[selected].softmax(-1).cumsum(-1)
        expected = (cumulative <= batch["sample_uniforms"][:, None] * cumulative[:, -1:]).sum(-1)
        assert torch.equal(given[selected], expected)
        assert (given[selected] >= 5).all()

    def test_every_sample_is_noise_even_where_it_is_the_text(self, trainer):
        """Each example repeats one word; the generator says the word number 10 always."""
        model, batch = trainer.model, batch_of(trainer, 40)
        favour(model, 10)
        selected, is_ten = batch["labels"] != IGNORED, batch["input_ids"] == 10
        output, seen = run(model, batch)
        assert (seen["input_ids"][selected] == 10).all() and (selected & is_ten).any()
        candidates = batch["input_ids"] >= 5
        assert torch.equal(output.score_labels == 1, selected)
        assert torch.equal(output.score_labels != IGNORED, candidates)
        assert torch.equal(output.metrics["sampled_accuracy"].sum, (selected & is_ten).sum(1).float())

    def test_the_logit_is_energy_and_noise_probability_and_odds_of_the_row(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, mlm_probability=0.3)
        model, batch = trainer.model, batch_of(trainer)
        output, seen = run(model, batch)
        text, mask = batch["input_ids"], batch["attention_mask"]
        energies = model.discriminator(seen["input_ids"], attention_mask=mask).logits
        # The probability of what the discriminator sees, given the text around it, not the noise.
        log_q = model.generator(text, mask).logits.log_softmax(-1).gather(-1, seen["input_ids"][..., None])[..., 0]
        candidates, selected = text >= 5, batch["labels"] != IGNORED
        share = selected.sum(1) / candidates.sum(1)
        assert len(share.unique()) > 3
        expected = energies + log_q + (share / (1 - share)).log()[:, None]
        torch.testing.assert_close(output.scores[candidates], expected[candidates], atol=1e-5, rtol=1e-5)
        nll = F.binary_cross_entropy_with_logits(expected, selected.float(), reduction="none")
        expected_sum = torch.where(candidates, nll, 0.0).sum(1)
        torch.testing.assert_close(output.losses["nce"].sum, expected_sum, atol=1e-4, rtol=1e-5)
        own = model.generator(text, mask).logits.log_softmax(-1).gather(-1, text[..., None])[..., 0]
        torch.testing.assert_close(output.losses["cloze"].sum, -torch.where(candidates, own, 0.0).sum(1))
        for loss in output.losses.values():
            assert torch.equal(loss.count, candidates.sum(1).float())
        mean = torch.where(candidates & ~selected, energies, 0.0).sum(1)
        torch.testing.assert_close(output.metrics["energy"].sum, mean, atol=1e-5, rtol=1e-5)

    def test_a_token_without_probability_counts_for_nothing(self, trainer):
        """A generator that excludes more than the collator knows of."""
        model, batch = trainer.model, batch_of(trainer)
        word = int(batch["input_ids"][0, 1])
        expected, _ = run(model, batch)
        model.generator.excluded_tokens[word] = True
        output, seen = run(model, batch)
        has_word = (batch["input_ids"] == word).any(1)
        assert has_word.any() and not has_word.all()
        for loss in output.losses.values():
            assert loss.sum.isfinite().all()
            assert not loss.count[has_word].any() and loss.count[~has_word].all()
        assert torch.equal(seen["input_ids"][has_word], batch["input_ids"][has_word])
        model.train()(**batch).losses["nce"].sum.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_fillers_change_nothing(self, trainer):
        batch = batch_of(trainer)
        trainer.data_collator.target_slots = 50
        filled = batch_of(trainer)
        assert len(filled["target_positions"]) > len(batch["target_positions"])
        (expected, seen), (output, seen_filled) = run(trainer.model, batch), run(trainer.model, filled)
        assert torch.equal(seen["input_ids"], seen_filled["input_ids"])
        for name in expected.losses:
            torch.testing.assert_close(output.losses[name], expected.losses[name])

    @pytest.mark.parametrize("excluded", [[PAD], []])
    def test_no_sample_shifts_the_positions_of_roberta(self, tmp_path, excluded):
        trainer = build(PROGRAM, tmp_path, model_options={**BERT, "model_type": "roberta"})
        model, batch = trainer.model, batch_of(trainer)
        model.generator.excluded_tokens.zero_()
        model.generator.excluded_tokens[excluded] = True
        favour(model, PAD)
        numbers = []
        table = model.discriminator.roberta.embeddings.position_embeddings
        handle = table.register_forward_pre_hook(lambda module, args: numbers.append(args[0].clone()))
        _, seen = run(model, batch)
        model.discriminator(batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
        assert (seen["input_ids"] == PAD)[batch["attention_mask"] == 1].any() == (not excluded)
        assert torch.equal(*numbers)

    def test_documents_of_a_block_are_apart(self, trainer):
        """Two documents in one row, each with the noise that it has there, have the losses that they have alone."""
        rows = [[CLS, 10, 11, 12, SEP], [CLS, 20, 21, 22, 23, 24, SEP]]
        joined = {"input_ids": [*rows[0], *rows[1]], "document_ids": [0] * 5 + [1] * 7, "example_id": 0, "epoch": 0}
        batch = trainer.data_collator([joined])
        output, _ = run(trainer.model, batch)
        candidates = batch["candidate_positions"]
        states = [
            trainer.model.generator.context_states(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))[0]
            for row in rows
        ]
        log_q = trainer.model.generator.log_probs(torch.cat(states)[candidates], batch["input_ids"][0, candidates])
        torch.testing.assert_close(output.losses["cloze"].sum, -log_q.sum()[None], atol=1e-5, rtol=1e-5)
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, 8] = 30
        scores = [run(trainer.model, b)[0].scores[0] for b in (batch, changed)]
        difference = (scores[0] - scores[1]).abs()
        # The share of noise is the row's, and it has not changed.
        assert difference[:5].max() < 1e-6 < difference[5:].max()


class TestLosses:
    def test_levels_of_the_untrained_pair(self, tmp_path):
        """ln V for the generator; the discriminator knows nothing but q = 1 / V and the odds of the row."""
        size = 2000
        options = {"config_overrides": json.dumps({"vocab_size": size}), "hidden_size": 64}
        trainer = build(PROGRAM, tmp_path, model_options=options)
        model, batch = trainer.model, batch_of(trainer, 64)
        # The tokenizer has 55 ordinary words; the other ids of the table are excluded.
        for excluded, ordinary in ((model.generator.excluded_tokens, 55), (torch.zeros(size).bool(), size)):
            model.generator.excluded_tokens = excluded
            losses = run(model, batch)[0].losses
            cloze = losses["cloze"].sum.sum() / losses["cloze"].count.sum()
            assert float(cloze) == pytest.approx(math.log(ordinary), rel=0.01)
            num_noise, num_candidates = (batch["labels"] != IGNORED).sum(1), (batch["input_ids"] >= 5).sum(1)
            logits = -math.log(ordinary) + (num_noise / (num_candidates - num_noise)).log()
            expected = num_noise * F.softplus(-logits) + (num_candidates - num_noise) * F.softplus(logits)
            is_mixed = num_noise < num_candidates
            nce = losses["nce"].sum[is_mixed].sum()
            assert float(nce) == pytest.approx(float(expected[is_mixed].sum()), rel=0.02)
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["loss"] == pytest.approx(row["cloze_loss"] + 50 * row["nce_loss"], rel=1e-5)

    @pytest.mark.parametrize(
        "rows", [[[CLS, SEP]] * 3, [[CLS, UNK, SEP]], [[CLS, 10, SEP]], [[CLS, SEP], [CLS, *range(10, 20), SEP]]]
    )
    def test_rows_with_nothing_or_nothing_else_to_select(self, trainer, rows):
        batch = trainer.data_collator(examples(rows))
        output, _ = run(trainer.model, batch)
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        assert math.isfinite(float(loss.detach()))
        # Zero, not none: distributed training waits for every gradient.
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if max(map(len, rows)) <= 3:
            # Where all candidates or none are noise, there is nothing to tell apart.
            assert output.losses["nce"].sum.max() < 1e-20
            inner = trainer.model.discriminator.electra.encoder.parameters()
            assert max(float(parameter.grad.abs().max()) for parameter in inner) < 1e-20

    def test_no_noise_by_chance(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, masking_count="bernoulli", mlm_probability=0.05)
        batch = batch_of(trainer, 40)
        has_noise = (batch["labels"] != IGNORED).any(1)
        assert has_noise.any() and not has_noise.all()
        nce = run(trainer.model, batch)[0].losses["nce"]
        assert nce.sum[~has_noise].max() < 1e-20 and nce.sum[has_noise].min() > 1e-3

    def test_none_reaches_the_generator_from_the_discriminator_nor_back(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options=UNTIED)
        losses = trainer.model.train()(**batch_of(trainer)).losses
        parameters = dict(trainer.model.named_parameters())
        for name, part in (("cloze", "generator."), ("nce", "discriminator.")):
            gradients = torch.autograd.grad(losses[name].sum.sum(), list(parameters.values()), allow_unused=True)
            reached = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
            assert reached == {key for key in parameters if key.startswith(part)}

    def test_shared_embeddings_get_the_sum_of_both(self, trainer):
        model, batch, gradients = trainer.model, batch_of(trainer), []
        for weights in ((1, 0), (0, 1), (1, 1)):
            model.zero_grad()
            losses = model.eval()(**batch).losses
            (weights[0] * losses["cloze"].sum.sum() + weights[1] * losses["nce"].sum.sum()).backward()
            gradients.append(model.get_input_embeddings().weight.grad.clone())
        cloze, nce, both = gradients
        assert cloze.any() and nce.any()
        torch.testing.assert_close(both, cloze + nce, atol=1e-5, rtol=1e-4)


class TopicCorpus:
    """Texts of 20 words, drawn independently from one of four distributions: all the others tell which."""

    def __init__(self):
        weights = np.array([35, 25, 15, 10, 5, 4, 2, 1, 1, 1, 0.5, 0.5])
        self.topics = np.stack([np.roll(weights / weights.sum(), 3 * topic) for topic in range(4)])
        self.words = self._draw(100, seed=2)

    def _draw(self, count, *, seed):
        uniforms = draws.uniforms(draws.row_keys(range(count), seed=seed, stream="topics"), 21)
        cumulative = self.topics[(uniforms[:, 0] * 4).astype(int)].cumsum(1)
        return (cumulative[:, None, :] <= uniforms[:, 1:, None]).sum(-1).clip(max=11)

    def _ids(self, words):
        ids = np.pad(words + 5, ((0, 0), (1, 1)), constant_values=CLS)
        ids[:, -1] = SEP
        return ids

    def input_ids(self):
        """The held-out texts."""
        return self._ids(self.words)

    def data(self, count):
        train, held_out = (
            Dataset.from_list([{"input_ids": row, "word_starts": [True] * 22} for row in ids.tolist()])
            for ids in (self._ids(self._draw(count, seed=1)), self.input_ids())
        )
        return replace(tiny_data(), train_dataset=EpochDataset(train), eval_dataset=EpochDataset(held_out))

    def marginal_log_probs(self):
        """Of each held-out word by itself."""
        return np.log(self.topics.mean(0)[self.words])

    def log_probs(self):
        """Of each held-out word given all the others of its text, by Bayes."""
        each = np.log(self.topics[:, self.words])
        others = each.sum(-1, keepdims=True) - each
        posterior = np.exp(others - others.max(0))
        return np.log((posterior * np.exp(each)).sum(0) / posterior.sum(0))


class TestRuns:
    def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(self, tmp_path):
        runs = []
        for batch, accumulation in ((8, 1), (2, 4)):
            options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            runs.append(build(PROGRAM, tmp_path / str(batch), **options))
            runs[-1].train()
        whole, *cut = runs
        for other in cut:
            assert relative_difference(whole.recorder.gradients[0], other.recorder.gradients[0]) < 1e-4
            for name in ("loss", "cloze_loss", "nce_loss"):
                assert log_of(other)[0][name] == pytest.approx(log_of(whole)[0][name], rel=1e-5)

    def test_resume_is_bit_exact(self, tmp_path):
        options = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "learning_rate": 1e-3,
            "model_options": {"config_overrides": None},
        }
        straight = build(PROGRAM, tmp_path / "straight", **options)
        straight.train()
        resumed = build(PROGRAM, tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
        assert log_of(resumed) == log_of(straight)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name

    def test_the_generator_learns_what_the_context_tells(self, tmp_path):
        corpus = TopicCorpus()
        options = {"max_steps": 100, "learning_rate": 3e-3, "model_options": {"num_hidden_layers": 1}}
        trainer = build(PROGRAM, tmp_path, corpus.data(1600), per_device_train_batch_size=16, **options)
        trainer.train()
        after = trainer.evaluate()
        unigram, best = -corpus.marginal_log_probs().mean(), -corpus.log_probs().mean()
        assert best < after["eval_cloze_loss"] < best + 0.3 < unigram - 0.3
        assert {"eval_energy", "eval_disc_gain", "eval_fake_rate"} <= after.keys()

    @pytest.mark.slow
    def test_energies_are_the_negative_log_probabilities_of_the_text(self, tmp_path):
        """Those that follow from how the text was made; of a clean text, from the exported model alone."""
        corpus = TopicCorpus()
        options = {"max_steps": 1200, "learning_rate": 1e-3, "max_grad_norm": 1.0, "warmup_steps": 20}
        trainer = build(PROGRAM, tmp_path, corpus.data(20_000), per_device_train_batch_size=32, **options)
        trainer.train()
        trainer.save_model()
        expected = corpus.log_probs()
        model = ElectraForPreTraining.from_pretrained(tmp_path)
        energies = model(torch.from_numpy(corpus.input_ids())).logits.detach()[:, 1:-1].numpy()
        assert energies.mean() == pytest.approx(-expected.mean(), abs=0.1)
        assert np.corrcoef(energies.ravel(), -expected.ravel())[0, 1] > 0.85
        assert np.corrcoef(-corpus.marginal_log_probs().ravel(), -expected.ravel())[0, 1] < 0.4
        texts = trainer.processing_class.batch_decode(corpus.input_ids()[:, 1:-1])
        scores = score_texts(model, trainer.processing_class, texts)
        assert np.corrcoef(scores, expected.sum(1))[0, 1] > 0.8

    def test_bf16_loss_is_near_fp32(self, trainer):
        """And the probabilities are taken in fp32."""
        losses = []
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output, _ = run(trainer.model, batch_of(trainer))
            losses.append(sum(float(loss.sum.sum()) for loss in output.losses.values()))
            assert output.scores.dtype == output.losses["cloze"].sum.dtype == torch.float32
        assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)

    def test_the_recipe_is_accepted(self, tmp_path):
        argv = ["--config", "electric_small", "--output_dir", str(tmp_path), "--bf16", "false"]
        data_args, model_args, args = parse_arguments(PROGRAM.ARGUMENTS, argv, prog="electric", description="")
        assert args.max_steps == 1_000_000 and args.nce_weight == 50 and args.masking == no_masks()
        assert model_args == ElectricModelArguments(embedding_size=128)


class TestModels:
    @pytest.mark.parametrize(
        "options",
        [{}, BERT, {**BERT, "model_type": "roberta"}, {"model_type": "albert", "embedding_size": 16}, UNTIED],
        ids=["electra", "bert", "roberta", "albert", "untied"],
    )
    def test_sharing_and_export(self, tmp_path, options):
        trainer = build(PROGRAM, tmp_path, save_strategy="steps", save_steps=1, model_options=options)
        trainer.train()
        reloaded = ElectricForPreTraining.from_pretrained(tmp_path / "checkpoint-1")
        trainer.save_model()
        for model in (trainer.model, reloaded):
            tables = [part.get_input_embeddings().weight for part in (model.generator, model.discriminator)]
            assert (tables[0] is tables[1]) == (options is not UNTIED)
            assert model.generator.right_tower.get_input_embeddings().weight is tables[0]
        discriminator = trainer.model.discriminator
        stock, info = type(discriminator).from_pretrained(tmp_path, output_loading_info=True)
        assert type(stock).__module__.startswith("transformers.")
        assert not info["missing_keys"] and not info["unexpected_keys"]
        generator, info = TwoTowerClozeModel.from_pretrained(
            tmp_path, subfolder="pretraining/generator", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids = torch.arange(5, 25).reshape(2, 10)
        for loaded, part in ((stock, discriminator), (generator, trainer.model.generator)):
            torch.testing.assert_close(loaded.eval()(ids).logits, part.eval()(ids).logits, atol=1e-6, rtol=0)
        assert AutoModel.from_pretrained(tmp_path) is not None

    def test_an_export_is_continued_as_it_was(self, tmp_path, tokenizer):
        trainer = build(PROGRAM, tmp_path)
        trainer.train()
        trainer.save_model()
        model = build_model(ElectricModelArguments(model_name_or_path=str(tmp_path)), tokenizer)
        expected, _ = run(trainer.model, batch_of(trainer))
        output, _ = run(model, batch_of(trainer))
        for name in expected.losses:
            torch.testing.assert_close(output.losses[name], expected.losses[name])

    def test_a_stock_checkpoint_gets_a_fresh_generator_and_keeps_its_embeddings(self, tmp_path, tokenizer, caplog):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = ElectraConfig(**{name: TINY[name] for name in names}, vocab_size=60, embedding_size=16)
        published = ElectraForPreTraining(config)
        published.save_pretrained(tmp_path)
        # Such as a generator of masked tokens, which replaced token detection leaves there.
        ElectraModel(config).save_pretrained(tmp_path / "pretraining" / "generator")
        args = ElectricModelArguments(model_name_or_path=str(tmp_path), generator_size=0.5)
        model = build_model(args, tokenizer)
        assert model.generator.config.tower.hidden_size == TINY["hidden_size"] // 2
        assert model.generator.excluded_tokens.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
        for name, value in published.state_dict().items():
            torch.testing.assert_close(model.discriminator.state_dict()[name], value, msg=name)
        assert model.get_input_embeddings().weight is model.discriminator.get_input_embeddings().weight
        with pytest.raises(InputError, match="is no two-tower generator"):
            build_model(
                ElectricModelArguments(model_name_or_path=str(tmp_path), generator_name_or_path=str(tmp_path)),
                tokenizer,
            )

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"embedding_sharing": "gdes"}, "embedding_sharing='gdes'"),
            ({"generator_size": 0.0}, "generator_size=0.0"),
            ({"model_type": "bert", **TINY}, "embedding_sharing='tied' needs equal parameters"),
            ({**TINY, "num_attention_heads": 4, "generator_size": 0.7}, "generator_size=0.7"),
            ({**TINY, "attn_implementation": "flex_attention"}, "attn_implementation='flex_attention'"),
        ],
    )
    def test_what_cannot_be_is_refused(self, tokenizer, option, message):
        with pytest.raises(InputError, match=message):
            build_model(ElectricModelArguments(**option), tokenizer)

    def test_the_backend_is_that_which_was_asked_for(self, tokenizer):
        args = ElectricModelArguments(**TINY, config_overrides=NO_DROPOUT, attn_implementation="eager")
        model = build_model(args, tokenizer)
        bodies = (model.generator.left_tower, model.generator.right_tower, model.discriminator)
        assert [body.config._attn_implementation for body in bodies] == ["eager"] * 3


class TestScores:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return ElectraForPreTraining(ElectraConfig(**TINY, vocab_size=60, embedding_size=16)).eval()

    def test_a_score_is_the_sum_of_the_negated_energies_of_the_words(self, model, tokenizer):
        texts = ["w1 w2 w3", "w4", "w5 nothing w6 w7", ""]
        scores = score_texts(model, tokenizer, texts)
        for text, score in zip(texts, scores, strict=True):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            energies = model(ids).logits[0].detach()
            assert score == pytest.approx(-float(energies[ids[0] >= 5].sum()), abs=1e-5)
        assert scores[3] == 0

    def test_batches_and_order_change_nothing(self, model, tokenizer):
        texts = [" ".join(f"w{i}" for i in range(n)) for n in (7, 1, 20, 3, 3)]
        scores = score_texts(model.train(), tokenizer, texts, batch_size=2)
        assert model.training
        one_by_one = [score_texts(model, tokenizer, [text])[0] for text in texts]
        assert scores == pytest.approx(one_by_one, abs=1e-4)

    def test_what_cannot_be_scored_is_refused(self, model, tokenizer):
        with pytest.raises(InputError, match=r"texts\[1\] has 42 tokens, more than the 32"):
            score_texts(model, tokenizer, ["w1", "w1 " * 40])
        classifier = BertForTokenClassification(BertConfig(**TINY, vocab_size=60, num_labels=2))
        with pytest.raises(InputError, match="gives 2 logits a token"):
            score_texts(classifier, tokenizer, ["w1 w2"])
