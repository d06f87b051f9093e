"""Minimal pairs: scores against the models' own logits, one token and one text at a time."""

import json
import lzma

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    ElectraConfig,
    ElectraForPreTraining,
    RobertaConfig,
    set_seed,
)

from helpers.scored_texts import (
    SIZES,
    TEXTS,
    decoder,
    denoiser,
    detector,
    masked_lm,
    wordpiece,
)
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.minimal_pairs import (
    MinimalPair,
    causal_log_likelihoods,
    denoising_log_likelihoods,
    originality_scores,
    pair_accuracy,
    pseudo_log_likelihoods,
    read_minimal_pairs,
)


@torch.no_grad()
def one_by_one(model, tokenizer, text, *, words=None):
    """The score by the definition; `words` gives the word of each token where those to its right are masked too."""
    ids = tokenizer(text)["input_ids"]
    total = 0.0
    for place in range(1, len(ids) - 1):
        hidden = [place]
        if words is not None:
            hidden += [other for other in range(place + 1, len(ids) - 1) if words[other - 1] == words[place - 1]]
        masked = [tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(ids)]
        logits = model.eval()(torch.tensor([masked])).logits[0, place]
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


class TestPseudoLogLikelihood:
    @pytest.mark.parametrize("config_class", [BertConfig, ElectraConfig, RobertaConfig])
    @pytest.mark.parametrize("batch_size", [1, 3, 256])
    def test_each_token_is_masked_in_turn(self, config_class, batch_size):
        model, tokenizer = masked_lm(config_class), wordpiece()
        scores = pseudo_log_likelihoods(model, tokenizer, TEXTS, batch_size=batch_size)
        assert scores == pytest.approx([one_by_one(model, tokenizer, text) for text in TEXTS], rel=1e-5)

    def test_the_rest_of_a_word_is_hidden(self):
        """The words of the first text are un|happi|ness, sat and the point; the separator is nobody's."""
        model, tokenizer = masked_lm(), wordpiece()
        words = [[0, 0, 0, 1, 2], [0, 1], [0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6], [0, 1, 2]]
        assert [len(part) for part in words] == [len(tokenizer(text)["input_ids"]) - 2 for text in TEXTS]
        scores = pseudo_log_likelihoods(model, tokenizer, TEXTS, within_word="l2r")
        expected = [one_by_one(model, tokenizer, text, words=part) for text, part in zip(TEXTS, words, strict=True)]
        assert scores == pytest.approx(expected, rel=1e-5)
        visible = pseudo_log_likelihoods(model, tokenizer, TEXTS)
        assert (np.abs(scores - visible) > 1e-4).tolist() == [True, False, True, False]

    def test_the_head_runs_at_the_masked_places_only(self):
        model, shapes = masked_lm(), []
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:-1]))
        pseudo_log_likelihoods(model, wordpiece(), ["the cat sat"], batch_size=2)
        assert shapes == [(1, 2), (1, 1)]

    def test_dropout_is_off_and_the_mode_is_left_as_it_was(self):
        model = masked_lm().train()
        first, second = (pseudo_log_likelihoods(model, wordpiece(), TEXTS) for _ in range(2))
        assert np.array_equal(first, second) and model.training

    def test_the_model_is_left_as_it_was(self):
        """No hook stays behind, not after an error either."""
        model = masked_lm()
        pseudo_log_likelihoods(model, wordpiece(), TEXTS)
        assert not any(module._forward_hooks for module in model.modules())
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pseudo_log_likelihoods(model, wordpiece(), TEXTS)
        assert not any(module._forward_hooks for module in model.modules())

    def test_bad_input(self):
        model, tokenizer = masked_lm(), wordpiece()
        with pytest.raises(InputError, match="within_word='left'"):
            pseudo_log_likelihoods(model, tokenizer, TEXTS, within_word="left")
        with pytest.raises(InputError, match="22 tokens, more than the 20 positions"):
            pseudo_log_likelihoods(model, tokenizer, ["cat " * 20])
        tokenizer.mask_token = None
        with pytest.raises(InputError, match="no mask token"):
            pseudo_log_likelihoods(model, tokenizer, TEXTS)


ODD = ["", "   ", "\n", "[MASK] [SEP]", "\u200b", "\U0001f469\u200d\U0001f469", "the cat\r\nsat.", "\x00"]


@pytest.mark.parametrize(
    ("score", "model"),
    [
        (pseudo_log_likelihoods, masked_lm),
        (originality_scores, detector),
        (denoising_log_likelihoods, denoiser),
        (causal_log_likelihoods, decoder),
    ],
)
class TestOddTexts:
    def test_each_has_the_score_that_it_has_alone(self, score, model):
        together = score(model(), wordpiece(), [*ODD, *TEXTS], batch_size=3)
        alone = [score(model(), wordpiece(), [text])[0] for text in (*ODD, *TEXTS)]
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        assert together[0] == together[1] == together[2] == 0 and np.isfinite(together).all()

    def test_none_at_all(self, score, model):
        assert score(model(), wordpiece(), []).shape == (0,)

    def test_the_name_of_a_special_token_is_text(self, score, model):
        """As it was in training: three pieces or words that are not known, and no mask."""
        tokenizer = wordpiece()
        first = score(model(), tokenizer, ["[MASK]", "the cat"])
        assert first[0] != 0 and tokenizer("[MASK]")["input_ids"] == [2, 4, 3], "the tokenizer is as it was"
        np.testing.assert_allclose(first[0], score(model(), tokenizer, ["[ MASK ]"])[0], rtol=1e-5)

    @pytest.mark.parametrize(
        ("texts", "batch_size", "words"),
        [
            ("the cat", 1, "texts is one text"),
            (["the", None], 1, r"texts\[1\] is of type NoneType"),
            ([3], 1, r"texts\[0\] is of type int"),
            (["a\ud800b"], 1, "half of a character at 1"),
            (TEXTS, 0, "batch_size=0"),
        ],
    )
    def test_what_is_no_text_is_named(self, score, model, texts, batch_size, words):
        with pytest.raises(InputError, match=words):
            score(model(), wordpiece(), texts, batch_size=batch_size)


class TestOriginality:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_the_sum_of_the_log_probabilities_of_being_original(self, batch_size):
        set_seed(0)
        tokenizer = wordpiece()
        models = [
            ElectraForPreTraining(ElectraConfig(**SIZES)),
            AutoModelForTokenClassification.from_config(BertConfig(**SIZES, num_labels=1)),
        ]
        for model in models:
            scores = originality_scores(model, tokenizer, TEXTS, batch_size=batch_size)
            for text, score in zip(TEXTS, scores, strict=True):
                with torch.no_grad():
                    replaced = model.eval()(**tokenizer(text, return_tensors="pt")).logits.flatten()[1:-1].sigmoid()
                assert score == pytest.approx(float((1 - replaced).log().sum()), rel=1e-4)

    def test_a_suspicious_token_costs(self):
        """The sign: a logit above zero says that a token was replaced."""
        set_seed(0)
        model = ElectraForPreTraining(ElectraConfig(**SIZES))
        model.discriminator_predictions.dense_prediction.weight.data.zero_()
        scores = []
        for bias in (-2.0, 2.0):
            model.discriminator_predictions.dense_prediction.bias.data.fill_(bias)
            scores.append(float(originality_scores(model, wordpiece(), ["the cat"])[0]))
        assert scores == pytest.approx([2 * np.log(1 / (1 + np.exp(-2))), 2 * np.log(1 / (1 + np.exp(2)))], rel=1e-5)


class TestAccuracy:
    PAIRS = (
        MinimalPair("aa", "a", "one", "syntax"),
        MinimalPair("a", "aa", "one", "syntax"),
        MinimalPair("aa", "a", "two", "syntax"),
        MinimalPair("a", "b", "three", "semantics"),
        MinimalPair("aaa", "b", "three", "semantics"),
        MinimalPair("b", "aaa", "three", "semantics"),
        MinimalPair("b", "aaa", "three", "semantics"),
    )

    def test_paradigms_count_alike_and_ties_one_half(self):
        result = pair_accuracy(lambda texts: np.array([len(text) for text in texts]), self.PAIRS)
        assert result.paradigms == {"one": 0.5, "two": 1.0, "three": 0.375}
        assert result.fields == {"syntax": 0.75, "semantics": 0.375}
        assert result.mean == pytest.approx((0.5 + 1.0 + 0.375) / 3)

    @pytest.mark.parametrize("kind", ["masked", "discriminator", "causal"])
    def test_an_untrained_model_guesses(self, kind):
        """On pairs of random words; within four standard errors."""
        words = draws.integers(draws.row_keys(range(600), seed=0, stream="pairs"), 8, high=40)
        texts = [" ".join(f"x{word}" for word in row) for row in words.tolist()]
        pairs = [MinimalPair(a, b, "random", "none") for a, b in zip(texts[:300], texts[300:], strict=True)]
        tokenizer = wordpiece()
        if kind == "masked":
            model = masked_lm()
            result = pair_accuracy(lambda texts: pseudo_log_likelihoods(model, tokenizer, texts), pairs)
        elif kind == "causal":
            model = decoder()
            result = pair_accuracy(lambda texts: causal_log_likelihoods(model, tokenizer, texts), pairs)
        else:
            set_seed(0)
            model = ElectraForPreTraining(ElectraConfig(**SIZES))
            result = pair_accuracy(lambda texts: originality_scores(model, tokenizer, texts), pairs)
        assert abs(result.mean - 0.5) < 4 * 0.5 / np.sqrt(300)


class TestReading:
    def rows(self):
        return [
            {
                "sentence_good": f"Good {i}.",
                "sentence_bad": f"Bad {i}.",
                "UID": f"p{i % 2}",
                "field": "syntax",
                "pairID": i,
            }
            for i in range(6)
        ]

    def test_json_lines_compressed_or_not(self, tmp_path):
        text = "".join(json.dumps(row) + "\n" for row in self.rows())
        (tmp_path / "a.jsonl").write_text(text)
        (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(text.encode()))
        plain, packed = read_minimal_pairs(tmp_path / "a.jsonl"), read_minimal_pairs(tmp_path / "b.jsonl.xz")
        assert plain == packed and len(plain) == 6
        assert plain[3] == MinimalPair("Good 3.", "Bad 3.", "p1", "syntax")
        assert len(read_minimal_pairs(tmp_path)) == 12

    def test_the_first_of_each_paradigm(self, tmp_path):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        limited = read_minimal_pairs(tmp_path / "a.jsonl", limit=2)
        assert [pair.good for pair in limited] == ["Good 0.", "Good 1.", "Good 2.", "Good 3."]

    def test_a_field_of_two_spellings_is_one(self, tmp_path):
        spellings = ("syntax/semantics", "syntax_semantics")
        rows = [row | {"field": spellings[i % 2]} for i, row in enumerate(self.rows())]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert {pair.field for pair in read_minimal_pairs(tmp_path)} == {"syntax_semantics"}

    @pytest.mark.parametrize(
        ("change", "message"), [({"sentence_bad": None}, "empty entries .*5 of sentence_bad"), ({"UID": 7}, "'UID'")]
    )
    def test_a_row_that_lacks_an_entry(self, tmp_path, change, message):
        rows = self.rows()
        rows[2] |= change
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=message):
            read_minimal_pairs(tmp_path / "a.jsonl")

    def test_a_column_that_is_not_there(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b", "UID": "c"}\n')
        with pytest.raises(InputError, match="'field'"):
            read_minimal_pairs(tmp_path / "a.jsonl")
