"""A step of Electric: what is noise, what the losses are, who learns from whom."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers.method_matrix import build, programs, tiny_data
from helpers.replaced_tokens import BERT, LIKELY, UNTIED, batch_of, run
from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.objectives.electric import DataCollatorForElectric

PROGRAM = programs()["electric"]
PAD, UNK, CLS, SEP = 0, 1, 2, 3


def no_masks(**changes):
    return MaskingArguments(**{"mask_share": 0.0, "random_share": 0.0, "mask_unknown": False, **changes})


def examples(rows):
    return [{"input_ids": row, "example_id": i, "epoch": 0} for i, row in enumerate(rows)]


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

    def test_a_candidate_that_is_never_sampled_has_no_label_and_no_loss(self, trainer):
        """Another collator may offer special tokens; the generator gives them no probability."""
        model, batch = trainer.model, batch_of(trainer)
        offered = batch | {"candidate_positions": torch.arange(batch["input_ids"].numel())}
        output, expected = run(model, offered)[0], run(model, batch)[0]
        special = batch["input_ids"] < 5
        assert special.any() and (output.score_labels[special] == IGNORED).all()
        for name, loss in expected.losses.items():
            torch.testing.assert_close(output.losses[name].sum, loss.sum)
            assert torch.equal(output.losses[name].count, loss.count)

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
        # Where all of a row is noise, a row of one word, the odds are infinite; such a row has a test of its own.
        kept = share < 1
        assert len(share[kept].unique()) > 3
        expected = energies + log_q + (share / (1 - share)).log()[:, None]
        finite = candidates & kept[:, None]
        torch.testing.assert_close(output.scores[finite], expected[finite], atol=1e-5, rtol=1e-5)
        nll = F.binary_cross_entropy_with_logits(expected, selected.float(), reduction="none")
        expected_sum = torch.where(candidates, nll, 0.0).sum(1)
        torch.testing.assert_close(output.losses["nce"].sum[kept], expected_sum[kept], atol=1e-4, rtol=1e-5)
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


DOCUMENTS = [[CLS, 10, 11, 12, SEP], [CLS, 20, 21, 22, 23, 24, 25, SEP], [CLS, 30, 31, SEP]]


def packed(trainer, documents):
    """One row that holds several documents."""
    document_ids = [number for number, document in enumerate(documents) for _ in document]
    row = {"input_ids": sum(documents, []), "document_ids": document_ids}
    return trainer.data_collator([row | {"example_id": 0, "epoch": 0}])


@pytest.fixture(params=["electra", "bert", "roberta", "modernbert", "deberta-v2"])
def packing_trainer(request, tmp_path):
    """A run on rows of documents that do not see each other."""
    tiny = tiny_data()
    data = replace(tiny, description={**tiny.description, "block_mode": "isolated_documents"})
    options = {"model_type": request.param, "generator_size": 1.0, "config_overrides": None}
    trainer = build(PROGRAM, tmp_path, data, model_options=options, mlm_probability=0.4)
    # Away from the initial values: states that are all alike would hide who sees whom.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return trainer


class TestIsolatedDocuments:
    def test_each_document_has_the_losses_that_it_has_alone(self, packing_trainer):
        """Noise and energies, with the same draws; the odds of noise are the row's."""
        model, batch = packing_trainer.model, packed(packing_trainer, DOCUMENTS)
        output, seen = run(model, batch)
        is_noise, is_candidate = batch["labels"][0] != IGNORED, batch["input_ids"][0] >= 5
        share = is_noise.sum() / is_candidate.sum()
        log_q, own_log_q, energies = [], [], []
        for text, given in zip(
            *(row[0].split([5, 8, 4]) for row in (batch["input_ids"], seen["input_ids"])), strict=True
        ):
            with torch.no_grad():
                probabilities = model.generator(text[None]).logits[0].log_softmax(-1)
                energies.append(model.discriminator(given[None]).logits.flatten())
            log_q.append(probabilities.gather(-1, given[:, None])[:, 0])
            own_log_q.append(probabilities.gather(-1, text[:, None])[:, 0])
        expected = torch.cat(energies) + torch.cat(log_q) + (share / (1 - share)).log()
        torch.testing.assert_close(output.scores[0, is_candidate], expected[is_candidate], atol=1e-4, rtol=1e-4)
        cloze = -torch.cat(own_log_q)[is_candidate].sum()
        torch.testing.assert_close(output.losses["cloze"].sum[0], cloze, atol=1e-4, rtol=1e-4)
        assert is_noise.any() and not is_noise[is_candidate].all()
        without = {name: value for name, value in batch.items() if name not in ("document_ids", "position_ids")}
        leaking, _ = run(model, without)
        assert (leaking.scores - output.scores).abs().max() > 1e-2, "this test can fail"

    def test_an_edit_of_one_moves_no_bit_of_the_others(self, packing_trainer):
        model = packing_trainer.model
        edited = [DOCUMENTS[0], [CLS, 20, 21, 40, 23, 41, 25, SEP], DOCUMENTS[2]]
        scores, states = [], []
        for documents in (DOCUMENTS, edited):
            batch = packed(packing_trainer, documents)
            inputs = {name: batch[name] for name in ("attention_mask", "document_ids", "position_ids")}
            scores.append(run(model, batch)[0].scores[0])
            states.append(model.generator.context_states(batch["input_ids"], **inputs)[0].detach())
        for before, after in (scores, states):
            assert torch.equal(before[:5], after[:5]) and torch.equal(before[13:], after[13:])
            assert not torch.equal(before[5:13], after[5:13])

    def test_what_cannot_is_refused_by_name(self, tmp_path, monkeypatch):
        tiny = tiny_data()
        data = replace(tiny, description={**tiny.description, "block_mode": "isolated_documents"})
        # A decoder under the towers' masks reads in both directions; as a discriminator it keeps to its own.
        options = {"model_type": "llama", "generator_size": 1.0, "config_overrides": None, **UNTIED}
        with pytest.raises(InputError, match="LlamaForTokenClassification .*cannot isolate documents"):
            build(PROGRAM, tmp_path, data, model_options=options)
        position_inputs = rules.position_inputs

        def of_the_row(plan, positions):
            """What the towers were tried out with is short."""
            return position_inputs(plan, positions) if positions.shape[1] <= 16 else {}

        monkeypatch.setattr(rules, "position_inputs", of_the_row)
        with pytest.raises(InputError, match="model_type='bert' as Electric's generator cannot isolate documents"):
            build(PROGRAM, tmp_path, data, model_options=BERT)
        build(PROGRAM, tmp_path, tiny, model_options=BERT)


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
