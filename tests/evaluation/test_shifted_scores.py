"""Scores of encoders that predict at the position before: masked tokens from both sides, and next tokens from left to right."""

import copy
import math

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertForPreTraining, BertLMHeadModel, ElectraConfig, ModernBertConfig, set_seed

from helpers.scored_texts import SIZES, TEXTS, decoder, detector, masked_lm, wordpiece
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.harness import harness_model
from hf_pretrain.evaluation.likelihood import LikelihoodScorer, rolling_perplexity
from hf_pretrain.evaluation.minimal_pairs import (
    MinimalPair,
    causal_log_likelihoods,
    pair_accuracy,
    pseudo_log_likelihoods,
)


def shifted_lm(config_class=BertConfig):
    model = masked_lm(config_class)
    model.config.shifted_prediction = True
    return model


@torch.no_grad()
def masked_by_hand(model, tokenizer, text, *, shift):
    ids = tokenizer(text)["input_ids"]
    total = 0.0
    for place in range(1, len(ids) - 1):
        row = [tokenizer.mask_token_id if i == place else token for i, token in enumerate(ids)]
        logits = model.eval()(torch.tensor([row])).logits[0, place - shift]
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


@torch.no_grad()
def next_by_hand(model, tokenizer, text):
    """The stock decoder with the same weights."""
    config = copy.deepcopy(model.config)
    config.is_decoder = True
    stock = BertLMHeadModel(config).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    ids = tokenizer(text)["input_ids"]
    log_probs = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(1, len(ids) - 1))


class TestMasked:
    @pytest.mark.parametrize("config_class", [BertConfig, ElectraConfig])
    @pytest.mark.parametrize("batch_size", [1, 3, 256])
    def test_a_masked_token_is_read_off_the_state_before_it(self, config_class, batch_size):
        model, tokenizer = masked_lm(config_class), wordpiece()
        scores = pseudo_log_likelihoods(model, tokenizer, TEXTS, shifted=True, batch_size=batch_size)
        assert scores == pytest.approx([masked_by_hand(model, tokenizer, text, shift=1) for text in TEXTS], rel=1e-5)

    def test_the_configuration_decides_unless_told_otherwise(self):
        model, tokenizer = shifted_lm(), wordpiece()
        wanted = {shift: [masked_by_hand(model, tokenizer, text, shift=shift) for text in TEXTS] for shift in (0, 1)}
        assert pseudo_log_likelihoods(model, tokenizer, TEXTS) == pytest.approx(wanted[1], rel=1e-5)
        assert pseudo_log_likelihoods(model, tokenizer, TEXTS, shifted=False) == pytest.approx(wanted[0], rel=1e-5)
        assert pseudo_log_likelihoods(masked_lm(), tokenizer, TEXTS) == pytest.approx(wanted[0], rel=1e-5)
        pairs = [("", text) for text in TEXTS]
        assert LikelihoodScorer(model, tokenizer).score(pairs).log_likelihoods == pytest.approx(wanted[1], rel=1e-5)
        found = LikelihoodScorer(model, tokenizer, shifted=False).score(pairs).log_likelihoods
        assert found == pytest.approx(wanted[0], rel=1e-5)

    @torch.no_grad()
    def test_one_token_has_the_probability_of_its_mask(self):
        model, tokenizer = shifted_lm().eval(), wordpiece()
        probabilities = model(torch.tensor([[2, 4, 3]])).logits[0, 0].softmax(-1)
        for word in ("cat", "dog"):
            (score,) = pseudo_log_likelihoods(model, tokenizer, [word])
            assert score == pytest.approx(math.log(probabilities[tokenizer.convert_tokens_to_ids(word)]), rel=1e-5)

    def test_a_text_with_nothing_before_its_first_token_is_refused(self):
        tokenizer = wordpiece()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        for score in (
            lambda: pseudo_log_likelihoods(shifted_lm(), tokenizer, TEXTS),
            lambda: LikelihoodScorer(shifted_lm(), tokenizer).score([("", "the cat")]),
        ):
            with pytest.raises(InputError, match="puts no special token before a text"):
                score()
        assert np.isfinite(pseudo_log_likelihoods(masked_lm(), tokenizer, TEXTS)).all()


class TestLeftToRight:
    @pytest.mark.parametrize("batch_size", [1, 64])
    def test_the_score_is_the_sum_of_the_next_tokens(self, batch_size):
        model, tokenizer = shifted_lm(), wordpiece()
        scores = causal_log_likelihoods(model, tokenizer, TEXTS, left_to_right=True, batch_size=batch_size)
        wanted = [next_by_hand(model, tokenizer, text) for text in TEXTS]
        assert scores == pytest.approx(wanted, rel=1e-5)
        found = LikelihoodScorer(model, tokenizer, left_to_right=True).score([("", text) for text in TEXTS])
        assert found.log_likelihoods == pytest.approx(wanted, rel=1e-5)
        assert rolling_perplexity(model, tokenizer, TEXTS[:1], left_to_right=True).nats == pytest.approx(
            -wanted[0], rel=1e-5
        )

    def test_a_continuation_is_the_difference_of_two_texts(self):
        model, tokenizer = shifted_lm(), wordpiece()
        whole, context = (next_by_hand(model, tokenizer, text) for text in ("the cat sat.", "the cat"))
        found = LikelihoodScorer(model, tokenizer, left_to_right=True).score([("the cat", " sat.")])
        assert found.log_likelihoods[0] == pytest.approx(whole - context, rel=1e-4)

    def test_what_follows_does_not_count_and_a_class_with_two_heads_will_do(self):
        set_seed(0)
        for model in (masked_lm(ModernBertConfig), BertForPreTraining(BertConfig(**SIZES))):
            scores = causal_log_likelihoods(model, wordpiece(), ["the cat", "the cat sat"], left_to_right=True)
            single = LikelihoodScorer(model, wordpiece(), left_to_right=True).score([("the cat", " sat")])
            assert scores[1] - scores[0] == pytest.approx(single.log_likelihoods[0], rel=1e-4)

    def test_both_ways_are_scores_of_minimal_pairs(self):
        model, tokenizer = shifted_lm(), wordpiece()
        pairs = [MinimalPair("the cat sat.", "cat the sat.", "order", "syntax")]
        for score, by_hand in (
            (
                lambda texts: pseudo_log_likelihoods(model, tokenizer, texts),
                lambda t: masked_by_hand(model, tokenizer, t, shift=1),
            ),
            (
                lambda texts: causal_log_likelihoods(model, tokenizer, texts, left_to_right=True),
                lambda t: next_by_hand(model, tokenizer, t),
            ),
        ):
            wanted = by_hand(pairs[0].good) > by_hand(pairs[0].bad)
            assert pair_accuracy(score, pairs).mean == float(wanted)

    def test_the_model_is_left_as_it_was(self):
        model = shifted_lm().train()
        causal_log_likelihoods(model, wordpiece(), TEXTS, left_to_right=True)
        assert model.training and not any(module._forward_hooks for module in model.modules())

    def test_bad_input(self):
        tokenizer = wordpiece()
        with pytest.raises(InputError, match="left_to_right=True for an encoder"):
            causal_log_likelihoods(masked_lm(), tokenizer, TEXTS)
        with pytest.raises(InputError, match="left_to_right=True is for encoders, and GPT2LMHeadModel is causal"):
            causal_log_likelihoods(decoder(), tokenizer, TEXTS, left_to_right=True)
        with pytest.raises(InputError, match="ElectraForPreTraining does not predict tokens"):
            causal_log_likelihoods(detector(), tokenizer, TEXTS, left_to_right=True)
        with pytest.raises(InputError, match="left_to_right=True reads as a causal model, but kind='masked'"):
            LikelihoodScorer(masked_lm(), tokenizer, kind="masked", left_to_right=True)
        with pytest.raises(InputError, match="shifted=True is for masked tokens, but the model is causal"):
            LikelihoodScorer(masked_lm(), tokenizer, left_to_right=True, shifted=True)

    def test_a_task_that_generates_is_refused(self):
        pytest.importorskip("lm_eval")
        lm = harness_model(shifted_lm(), wordpiece(), left_to_right=True)
        with pytest.raises(InputError, match="BertForMaskedLM is an encoder and generates no text"):
            lm.generate_until([])
