"""Features of a frozen encoder: equal however they are made, kept only where they are still right, and fit for scikit-learn."""

import pickle
import threading

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    RobertaConfig,
    T5Config,
    pipeline,
    set_seed,
)

from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import PretrainedFeatures
from hf_pretrain.errors import InputError
from hf_pretrain.transfer import features as module

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "", "w3 w2 w1", "w12 " * 12]
PAIRS = [("w1 w2", "w3"), ("w4", "w5 w6 w7"), ("w1 " * 20, "w2 " * 20)]
LAST_FOUR = (-1, -2, -3, -4)


def tiny_model(config=None, auto_class=AutoModel, seed=0):
    set_seed(seed)
    return auto_class.from_config(config or BertConfig(**SIZES)).eval()


def with_segments():
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def live(model=None, tokenizer=None, **options):
    return PretrainedFeatures(model or tiny_model(), tokenizer=tokenizer or tiny_tokenizer(), **options).fit()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a head, as of pre-training: a stock AutoModel would draw its pooler at random."""
    tiny_model(auto_class=AutoModelForMaskedLM).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def states_of(model, tokenizer, text):
    inputs = tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt", truncation=True)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    return [state[0].double() for state in output.hidden_states], inputs["input_ids"][0].tolist()


class TestByHand:
    @pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last", "eos"])
    @pytest.mark.parametrize("layer", [-1, -3, 0])
    def test_one_layer(self, pooling, layer):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        found = live(model, tokenizer, pooling=pooling, layer=layer).transform(TEXTS)
        for text, row in zip(TEXTS, found, strict=True):
            states = states_of(model, tokenizer, text)[0][layer]
            pooled = {"mean": states.mean(0), "max": states.amax(0), "cls": states[0]}.get(pooling, states[-1])
            np.testing.assert_allclose(row, pooled.numpy(), atol=1e-6)

    @pytest.mark.parametrize("pooling", ["mean", "max", "last"])
    @pytest.mark.parametrize("combination", ["concat", "sum", "mean", (0.5, -1.0, 2.0, 0.1)])
    def test_several_layers(self, pooling, combination):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        found = live(model, tokenizer, pooling=pooling, layer=LAST_FOUR, combination=combination).transform(TEXTS)
        for text, row in zip(TEXTS, found, strict=True):
            states = [states_of(model, tokenizer, text)[0][layer] for layer in LAST_FOUR]
            if combination == "concat":
                combined = torch.cat(states, dim=-1)
            else:
                weights = {"sum": [1.0] * 4, "mean": [0.25] * 4}.get(combination, combination)
                combined = sum(weight * state for weight, state in zip(weights, states, strict=True))
            pooled = {"mean": combined.mean(0), "max": combined.amax(0), "last": combined[-1]}[pooling]
            np.testing.assert_allclose(row, pooled.numpy(), atol=2e-6)

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_they_are_those_of_the_feature_extraction_pipeline(self, pooling):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        stock = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
        options = {"truncation": True, "max_length": 10}
        found = live(model, tokenizer, pooling=pooling, max_length=10).transform(TEXTS)
        for row, states in zip(found, stock(TEXTS, tokenize_kwargs=options), strict=True):
            expected = np.mean(states[0], axis=0) if pooling == "mean" else states[0][0]
            np.testing.assert_allclose(row, expected, atol=1e-6)

    def test_pairs_have_segments(self):
        model, tokenizer = tiny_model(), with_segments()
        found = live(model, tokenizer).transform(PAIRS)
        for pair, row in zip(PAIRS, found, strict=True):
            np.testing.assert_allclose(row, states_of(model, tokenizer, pair)[0][-1].mean(0).numpy(), atol=1e-6)
        swapped = live(model, tokenizer).transform([pair[::-1] for pair in PAIRS])
        assert np.abs(swapped - found).max() > 1e-3
        np.testing.assert_allclose(live(model, tokenizer).transform(np.array(PAIRS, dtype=object)), found, atol=1e-6)

    def test_the_end_token_need_not_be_the_last_one(self):
        """GPT-2's way with text behind the end token: the state at the end token is taken, not that of the last."""
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = "w5"
        model = tiny_model()
        (found,) = live(model, tokenizer, pooling="eos").transform(["w1 w5 w2 w5 w3"])
        states, ids = states_of(model, tokenizer, "w1 w5 w2 w5 w3")
        np.testing.assert_allclose(found, states[-1][len(ids) - 3].numpy(), atol=1e-6)
        with pytest.raises(InputError, match=r"texts\[1\] has no end token"):
            live(model, tokenizer, pooling="eos").transform(["w5", "w1"])

    def test_the_encoder_of_an_encoder_decoder(self):
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        model = tiny_model(T5Config(vocab_size=VOCAB_SIZE, pad_token_id=0, **sizes))
        found = live(model, layer=(0, -1)).transform(TEXTS[:2])
        with torch.no_grad():
            inputs = tiny_tokenizer()(TEXTS[0], return_tensors="pt")
            output = model.encoder(**inputs, output_hidden_states=True)
        expected = torch.cat([output.hidden_states[0], output.last_hidden_state], dim=-1)[0].mean(0)
        np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-6)


class TestWhateverTheWay:
    @pytest.mark.parametrize(
        "config", [BertConfig(**SIZES), RobertaConfig(**SIZES), GPT2Config(n_embd=16, n_layer=4, n_head=2)]
    )
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_batch_size_padding_side_and_order_change_nothing(self, config, pooling):
        model = tiny_model(config)
        expected = live(model, pooling=pooling, batch_size=1).transform(TEXTS)
        left = tiny_tokenizer()
        left.padding_side = "left"
        for features in (live(model, pooling=pooling, batch_size=4), live(model, left, pooling=pooling)):
            np.testing.assert_allclose(features.transform(TEXTS), expected, atol=1e-6)
            np.testing.assert_allclose(features.transform(TEXTS[::-1])[::-1], expected, atol=1e-6)

    def test_bfloat16_is_near_and_is_not_the_same(self):
        exact, near = live().transform(TEXTS), live(bf16=True).transform(TEXTS)
        assert near.dtype == np.float32 and 1e-5 < np.abs(exact - near).max() < 0.1

    def test_a_checkpoint_with_a_head_is_read_without_it(self, folder):
        one = PretrainedFeatures(str(folder)).fit()
        module._named.cache_clear()
        other = PretrainedFeatures(str(folder)).fit()
        assert one.encoder is not other.encoder
        # The pooler that a stock AutoModel would draw is neither in the digest nor in the features.
        assert one.model_digest_ == other.model_digest_ and one.encoder.pooler is None
        model = AutoModelForMaskedLM.from_pretrained(folder)
        np.testing.assert_array_equal(one.transform(TEXTS), live(model).transform(TEXTS))


class TestCache:
    def count(self, monkeypatch):
        """Count the texts that an encoder reads."""
        counted, encode = [], module.encode_tokenized
        monkeypatch.setattr(
            module,
            "encode_tokenized",
            lambda *given, **options: counted.append(len(given[2]["input_ids"])) or encode(*given, **options),
        )
        return counted

    def test_what_is_there_is_not_computed_again(self, tmp_path, monkeypatch):
        model, counted = tiny_model(), self.count(monkeypatch)
        plain = live(model).transform(TEXTS)
        counted.clear()
        kept = live(model, cache_dir=tmp_path)
        np.testing.assert_allclose(kept.transform(TEXTS), plain, atol=1e-6)
        np.testing.assert_allclose(
            kept.transform([*TEXTS, "w20", *TEXTS[::-1]]),
            [*plain, *live(model).transform(["w20"]), *plain[::-1]],
            atol=1e-6,
        )
        # All, then the new one by itself; equal texts are read once.
        assert counted == [6, 1, 1]
        again = live(tiny_model(), cache_dir=tmp_path)
        assert np.array_equal(again.transform(TEXTS), kept.transform(TEXTS)) and counted == [6, 1, 1]

    def test_other_weights_find_nothing(self, tmp_path, monkeypatch):
        model, counted = tiny_model(), self.count(monkeypatch)
        features = live(model, cache_dir=tmp_path)
        before = features.transform(TEXTS)
        with torch.no_grad():
            model.encoder.layer[3].output.dense.bias[7] += 0.01
        after = features.transform(TEXTS)
        assert counted == [6, 6] and np.abs(after - before).max() > 1e-4
        np.testing.assert_allclose(after, live(model).transform(TEXTS), atol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [
            {"pooling": "max"},
            {"layer": -2},
            {"layer": (-1, -2)},
            {"layer": (-1, -2), "combination": "sum"},
            {"layer": (-1, -2), "combination": (0.5, 0.5)},
            {"bf16": True},
            {"max_length": 3},
            {"tokenizer": with_segments()},
        ],
    )
    def test_other_options_find_nothing(self, options, tmp_path):
        model = tiny_model()
        texts = [text for text in TEXTS if text] if "tokenizer" not in options else PAIRS
        live(model, cache_dir=tmp_path).transform(texts)
        live(model, cache_dir=tmp_path, layer=(-2, -1)).transform(texts)
        found = live(model, cache_dir=tmp_path, **options).transform(texts)
        np.testing.assert_array_equal(found, live(model, **options).transform(texts))

    def test_other_combinations_of_the_same_layers_find_nothing(self, tmp_path):
        model, options = tiny_model(), [{"combination": name} for name in ("sum", "mean", (0.5, 1.0), (1.0, 0.5))]
        for own in options:
            found = live(model, cache_dir=tmp_path, layer=(-1, -2), **own).transform(TEXTS)
            np.testing.assert_array_equal(found, live(model, layer=(-1, -2), **own).transform(TEXTS))

    def test_a_configuration_that_computes_otherwise_finds_nothing(self, tmp_path):
        one, other = (
            tiny_model(BertConfig(**SIZES, hidden_act="gelu")),
            tiny_model(BertConfig(**SIZES, hidden_act="relu")),
        )
        assert live(one).model_digest_ == live(other).model_digest_
        live(one, cache_dir=tmp_path).transform(TEXTS)
        np.testing.assert_array_equal(live(other, cache_dir=tmp_path).transform(TEXTS), live(other).transform(TEXTS))

    def test_threads_write_at_once(self, tmp_path):
        model, models = tiny_model(), [tiny_model() for _ in range(4)]
        texts = [f"w{number} w{number % 7}" for number in range(40)]
        expected, results = live(model).transform(texts), {}

        def run(number):
            own = live(models[number], cache_dir=tmp_path, batch_size=1 + number)
            results[number] = [own.transform(texts[begin : begin + 10]) for begin in range(0, 40, 10)]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for parts in results.values():
            np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)
        assert len(results) == 4 and not list(tmp_path.rglob("*.part"))

    def test_a_damaged_file_is_said_and_left_aside(self, tmp_path, caplog):
        features = live(cache_dir=tmp_path)
        expected = features.transform(TEXTS)
        (path,) = tmp_path.rglob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-40])
        np.testing.assert_allclose(features.transform(TEXTS), expected, atol=1e-6)
        assert "is damaged" in caplog.text

    def test_adapters_can_be_switched_so_they_are_not_kept(self, tmp_path):
        from peft import LoraConfig, inject_adapter_in_model

        model = inject_adapter_in_model(LoraConfig(target_modules=["query"]), tiny_model())
        assert live(model).transform(TEXTS).shape == (6, 16)
        with pytest.raises(InputError, match="cache_dir=.* has adapters"):
            live(model, cache_dir=tmp_path).transform(TEXTS)


class TestScikitLearn:
    def test_a_clone_shares_the_model_and_is_not_fitted(self):
        features = live(pooling="max", layer=(-1, -2))
        copy = clone(features)
        assert copy.model is features.model and copy.get_params(deep=False) == features.get_params(deep=False)
        check_is_fitted(features)
        for call in (lambda: check_is_fitted(copy), lambda: copy.transform(TEXTS), copy.get_feature_names_out):
            with pytest.raises(NotFittedError):
                call()

    def test_names_of_columns(self):
        names = live(pooling="cls", layer=(-1, 2)).get_feature_names_out()
        assert names[0] == "cls_layer-1_0" and names[-1] == "cls_layer2_15" and len(set(names)) == len(names) == 32
        assert len(live(layer=(-1, 2), combination="sum").get_feature_names_out()) == 16
        table = live().set_output(transform="pandas").transform(TEXTS)
        assert table.shape == (6, 16) and table.columns[3] == "mean_layer-1_3"

    def test_a_grid_search_over_layers_finds_the_one_that_knows(self, tmp_path):
        """The label is the first word: states of the first token know it after attention, embeddings of [CLS] never do."""
        texts = [f"w{number % 2} w{10 + number % 13}" for number in range(60)]
        labels = ["even" if number % 2 == 0 else "odd" for number in range(60)]
        model = make_pipeline(
            PretrainedFeatures(tiny_model(), tokenizer=tiny_tokenizer(), pooling="cls", cache_dir=tmp_path),
            LogisticRegression(C=1e4, max_iter=2000),
        )
        search = GridSearchCV(model, {"pretrainedfeatures__layer": [0, -1]}, cv=3).fit(texts, labels)
        assert search.best_params_ == {"pretrainedfeatures__layer": -1} and search.best_score_ > 0.9
        assert set(search.predict(texts[:4])) == {"even", "odd"}
        assert search.cv_results_["mean_test_score"][0] < 0.6

    def test_it_is_pickled_by_name_without_weights(self, folder):
        features = PretrainedFeatures(str(folder)).fit()
        content = pickle.dumps(features)
        assert len(content) < 2000
        module._named.cache_clear()
        again = pickle.loads(content)
        check_is_fitted(again)
        np.testing.assert_array_equal(again.transform(TEXTS), features.transform(TEXTS))
        tiny_model(seed=1).save_pretrained(folder)
        with pytest.raises(InputError, match="other weights than those that these features were fitted with"):
            pickle.loads(content).transform(TEXTS)
        with pytest.raises(InputError, match="is live, and features are pickled"):
            pickle.dumps(live())

    def test_a_folder_that_has_changed_is_read_anew(self, folder):
        before = PretrainedFeatures(str(folder)).fit().model_digest_
        tiny_model(seed=1).save_pretrained(folder)
        assert PretrainedFeatures(str(folder)).fit().model_digest_ != before


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pooling": "median"}, "pooling='median'"),
            ({"layer": 5}, "layer=5"),
            ({"layer": ()}, "names no layer"),
            ({"combination": "sum"}, "has no effect with one layer"),
            ({"layer": (1, 2), "combination": (1.0,)}, "1 weights for 2 layers"),
            ({"layer": (1, 2), "combination": (1.0, float("nan"))}, "not finite"),
            ({"layer": (1, 2), "combination": "product"}, "combination='product'"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"revision": "main"}, "revision='main' has no effect"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(InputError, match=message):
            live(**options)

    def test_models(self, folder):
        with pytest.raises(InputError, match="give its tokenizer"):
            PretrainedFeatures(tiny_model()).fit()
        with pytest.raises(InputError, match="weights in torch.bfloat16"):
            live(tiny_model().bfloat16())
        config = BertConfig.from_pretrained(folder)
        config.num_hidden_layers = 5
        config.save_pretrained(folder)
        with pytest.raises(InputError, match="has no encoder.layer.4.* drawn at random"):
            PretrainedFeatures(str(folder)).fit()

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            ("w1", "one text"),
            (["w1", None], r"texts\[1\]"),
            ([("w1", "w2"), "w3"], r"texts\[1\]='w3' is no pair"),
            ([("w1", None)], r"texts\[0\]"),
        ],
    )
    def test_texts(self, texts, message):
        with pytest.raises(InputError, match=message):
            live().transform(texts)

    def test_no_text_has_no_row(self, tmp_path):
        assert live(layer=(-1, -2), cache_dir=tmp_path).transform([]).shape == (0, 32)
