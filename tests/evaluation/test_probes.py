"""Frozen features: independent of how texts are batched, and probes that the test set cannot help."""

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, ElectraConfig, RobertaConfig, set_seed

from helpers.method_matrix import BLOCK_SIZE, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.probes import encode, probe_accuracy

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "", "w3 w2 w1", "w12 " * 12]


def tiny_model(config_class=BertConfig, auto_class=AutoModel):
    set_seed(0)
    return auto_class.from_config(config_class(**SIZES))


@pytest.mark.parametrize("config_class", [BertConfig, ElectraConfig, RobertaConfig])
@pytest.mark.parametrize("layer", [-1, 0, 1, 3])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_features_are_those_of_each_text_alone(config_class, layer, pooling):
    model, tokenizer = tiny_model(config_class), tiny_tokenizer()
    features = encode(model, tokenizer, TEXTS, pooling=pooling, layer=layer, batch_size=4)
    assert features.dtype == np.float32 and features.shape == (len(TEXTS), 16)
    model.eval()
    for text, row in zip(TEXTS, features, strict=True):
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        states = output.hidden_states[layer][0]
        expected = states.mean(0) if pooling == "mean" else states[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)


def test_the_output_of_an_encoder_with_a_last_norm_is_taken_after_it():
    from transformers import ModernBertConfig

    set_seed(0)
    model = AutoModel.from_config(
        ModernBertConfig(**SIZES, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    )
    with torch.no_grad():
        expected = model.eval()(**tiny_tokenizer()("w1 w2", return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(encode(model, tiny_tokenizer(), ["w1 w2"])[0], expected.numpy(), atol=1e-5)


def test_dropout_is_off_and_the_mode_is_left_as_it_was():
    model = tiny_model().train()
    first, second = (encode(model, tiny_tokenizer(), TEXTS) for _ in range(2))
    assert np.array_equal(first, second)
    assert model.training and all(module.training for module in model.modules())


def test_a_head_is_not_asked():
    model = tiny_model(auto_class=AutoModelForMaskedLM)
    model.cls.register_forward_hook(lambda *args: pytest.fail("the head was called"))
    np.testing.assert_array_equal(
        encode(model, tiny_tokenizer(), TEXTS), encode(model.base_model, tiny_tokenizer(), TEXTS)
    )


def test_what_is_too_long_is_cut_off_in_front_of_the_last_special_token():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    words = [f"w{i % 50}" for i in range(60)]
    cut = encode(model, tokenizer, [" ".join(words)])
    with torch.no_grad():
        ids = tokenizer(" ".join(words), truncation=False, verbose=False)["input_ids"]
        expected = model.eval()(torch.tensor([[*ids[: BLOCK_SIZE - 1], ids[-1]]])).last_hidden_state.mean(1)
    np.testing.assert_allclose(cut, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pooling": "median"}, "pooling='median'"), ({"layer": 4}, "layer=4"), ({"layer": -5}, "layer=-5")],
)
def test_bad_values(options, message):
    with pytest.raises(InputError, match=message):
        encode(tiny_model(), tiny_tokenizer(), TEXTS, **options)


def test_a_tokenizer_that_the_model_does_not_know():
    set_seed(0)
    small = AutoModel.from_config(BertConfig(**{**SIZES, "vocab_size": 20}))
    with pytest.raises(InputError, match="embeds only 20"):
        encode(small, tiny_tokenizer(), TEXTS)


class TestProbe:
    def data(self, count=400, *, noise=0.0, classes=2, seed=0):
        """Features of which the third tells the class, at a scale a million times below the others'."""
        random = np.random.default_rng(seed)
        labels = random.integers(classes, size=count)
        features = random.normal(size=(count, 6)) * 1000
        features[:, 2] = (labels + noise * random.normal(size=count)) / 1000
        return features.astype(np.float32), labels

    @pytest.mark.parametrize("classes", [2, 3])
    def test_what_is_linear_is_found_at_any_scale(self, classes):
        score = probe_accuracy(*self.data(classes=classes), *self.data(classes=classes, seed=1))
        assert score.accuracy == score.matthews_correlation == 1

    def test_nothing_is_found_where_nothing_is(self):
        features, _ = self.data()
        others, labels = self.data(seed=1)
        score = probe_accuracy(features[:, :2], self.data(seed=2)[1], others[:, :2], labels)
        assert abs(score.accuracy - 0.5) < 0.1 and abs(score.matthews_correlation) < 0.2

    def test_overfitting_is_held_back_by_a_part_of_the_training_set(self):
        """A hundred features of noise for 150 rows: the strongest regularisation is best, and is chosen."""
        random = np.random.default_rng(0)
        labels = np.arange(150) % 2
        train, test = random.normal(size=(2, 150, 100))
        train[:, 0] += labels * 1.5
        test[:, 0] += labels * 1.5
        score = probe_accuracy(train, labels, test, labels)
        assert score.regularization < 1
        assert score.accuracy > 0.6

    def test_the_test_set_decides_nothing(self):
        train, test = self.data(noise=1.0), self.data(noise=1.0, seed=1)
        whole = probe_accuracy(*train, *test)
        halves = [probe_accuracy(*train, test[0][part], test[1][part]) for part in (slice(0, 200), slice(200, 400))]
        assert {half.regularization for half in halves} == {whole.regularization}
        assert np.mean([half.accuracy for half in halves]) == pytest.approx(whole.accuracy)

    def test_a_majority_guess_has_no_correlation(self):
        features, labels = self.data()
        labels[20:] = 1
        score = probe_accuracy(features[:, :2], labels, features[:, :2] * 0, labels)
        assert score.matthews_correlation == 0 and score.accuracy == pytest.approx(labels.mean())

    def test_one_class_is_refused(self):
        features, _ = self.data()
        with pytest.raises(InputError, match="one class"):
            probe_accuracy(features, np.zeros(400), features, np.zeros(400))


class TestOddInput:
    @pytest.mark.parametrize("text", ["", "  ", "[MASK] [SEP]", "\U0001f469", "w1\r\nw2", "w1 " * 500, "\x00"])
    def test_a_text_has_finite_features(self, text):
        features = encode(tiny_model(), tiny_tokenizer(), [text, "w1"])
        assert features.shape == (2, 16) and np.isfinite(features).all()

    def test_none_at_all(self):
        assert encode(tiny_model(), tiny_tokenizer(), []).shape == (0, 16)

    def test_a_text_without_a_token_is_named(self):
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        with pytest.raises(InputError, match=r"texts\[1\]='' has no token"):
            encode(tiny_model(), tokenizer, ["w1", ""])

    @pytest.mark.parametrize(
        ("texts", "words"), [("w1", "one text"), ([None], r"texts\[0\]"), (["\udc80"], "half of a character")]
    )
    def test_what_is_no_text_is_named(self, texts, words):
        with pytest.raises(InputError, match=words):
            encode(tiny_model(), tiny_tokenizer(), texts)

    @pytest.mark.parametrize("change", [{"test_labels": [0]}, {"train_features": np.full((9, 2), np.nan)}])
    def test_features_that_cannot_be_right(self, change):
        given = {"train_features": np.zeros((9, 2)), "train_labels": [0, 1, 0] * 3}
        given |= {"test_features": np.zeros((2, 2)), "test_labels": [0, 1]} | change
        with pytest.raises(InputError, match="(train|test)_features has"):
            probe_accuracy(**given)
