"""Classic heads on features: better than no look at the text, the same after a round trip, and nothing that runs code."""

import json
import pickle

import numpy as np
import pytest
import skops.io
import torch
from huggingface_hub import HfApi, constants
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, set_seed

from helpers.loopback_hub import LoopbackHub, connected
from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import Evaluation, FeatureClassifier, FeatureRegressor, PretrainedFeatures
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.hub.record import read_record
from hf_pretrain.transfer.classic_heads import HEADS, fit_head

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
LABELS = ("Ärger", "joy", "None")


def task(count, *, seed=0):
    """Texts whose label says which of three words they hold among others; the first class is twice as frequent."""
    words = draws.integers(draws.row_keys(range(count), seed=seed, stream="heads"), 5, high=25).tolist()
    numbers = [(0, 0, 1, 2)[row[0] % 4] for row in words]
    texts = [
        " ".join([*(f"w{10 + word}" for word in row[1:3]), f"w{number}", f"w{10 + row[3]}"])
        for row, number in zip(words, numbers, strict=True)
    ]
    return texts, [LABELS[number] for number in numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    set_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    AutoModelForMaskedLM.from_config(BertConfig(**SIZES)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def features(folder, **options):
    return PretrainedFeatures(str(folder), **options)


@pytest.fixture(scope="module")
def fitted(folder):
    """A classifier of each kind."""
    texts, labels = task(240)
    return {
        head: FeatureClassifier(features(folder), head, folds=3).fit(texts, labels) for head in HEADS["classification"]
    }


class TestClassifier:
    @pytest.mark.parametrize("head", HEADS["classification"])
    def test_it_beats_the_most_frequent_class(self, head, fitted):
        texts, labels = task(120, seed=1)
        share = max(labels.count(label) for label in LABELS) / len(labels)
        assert fitted[head].score(texts, labels) > share + 0.15
        assert fitted[head].classes_.tolist() == sorted(LABELS) and set(fitted[head].predict(texts)) == set(LABELS)

    @pytest.mark.parametrize("head", HEADS["classification"])
    def test_a_round_trip_gives_the_same_bit_for_bit(self, head, fitted, tmp_path):
        texts, _ = task(120, seed=1)
        model = fitted[head]
        model.save_pretrained(tmp_path / "out")
        again = FeatureClassifier.from_pretrained(tmp_path / "out")
        assert again.predict(texts).tolist() == model.predict(texts).tolist() and again.chosen_ == model.chosen_
        for method in ("decision_function", "predict_proba"):
            assert hasattr(again, method) == hasattr(model, method)
            if hasattr(model, method):
                assert np.array_equal(getattr(again, method)(texts), getattr(model, method)(texts))
        assert not list((tmp_path / "out").glob("*.pkl"))

    def test_the_root_is_a_stock_checkpoint_without_a_pooler_of_chance(self, fitted, folder, tmp_path):
        fitted["logistic"].save_pretrained(tmp_path)
        model, info = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        stock = AutoModelForMaskedLM.from_pretrained(folder).base_model
        assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("labels", [["b", "a"], [True, False], [3, 7], [0.5, 1.5]])
    def test_labels_keep_their_type(self, labels, folder, tmp_path):
        texts, given = task(40)[0], [labels[number % 2] for number in range(40)]
        model = FeatureClassifier(features(folder), folds=0).fit(texts, given)
        model.save_pretrained(tmp_path)
        for known in (model, FeatureClassifier.from_pretrained(tmp_path)):
            found = known.predict(texts)
            assert found.dtype == np.asarray(labels).dtype and set(found.tolist()) <= set(labels)

    def test_pairs(self, folder, tmp_path):
        texts, labels = task(60)
        pairs = [(text, "w20 w21") for text in texts]
        model = FeatureClassifier(features(folder, pooling="max", layer=(-1, -2)), folds=0).fit(pairs, labels)
        model.save_pretrained(tmp_path)
        again = FeatureClassifier.from_pretrained(tmp_path)
        assert again.features.layer == (-1, -2) and np.array_equal(again.predict(pairs), model.predict(pairs))
        assert '("A text.", "Another text.")' in (tmp_path / "README.md").read_text()

    def test_scikit_learn_takes_it(self, folder, tmp_path):
        texts, labels = task(90)
        model = FeatureClassifier(features(folder, cache_dir=tmp_path), folds=0)
        assert clone(model).set_params(features__pooling="cls").features.pooling == "cls"
        assert cross_val_score(model, texts, labels, cv=3).mean() > 0.6
        fitted = model.fit(texts, labels)
        assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict(texts), fitted.predict(texts))
        assert not hasattr(model, "features_") or model.features.__dict__.get("model_digest_") is None


class TestRegressor:
    @pytest.mark.parametrize("head", HEADS["regression"])
    def test_it_explains_values_at_any_scale_and_survives_a_round_trip(self, head, folder, tmp_path):
        texts, labels = task(200)
        values = [1e4 * LABELS.index(label) + 5e5 for label in labels]
        model = FeatureRegressor(features(folder), head, folds=3).fit(texts[:150], values[:150])
        assert model.score(texts[150:], values[150:]) > 0.2
        model.save_pretrained(tmp_path)
        assert np.array_equal(FeatureRegressor.from_pretrained(tmp_path).predict(texts), model.predict(texts))
        with pytest.raises(InputError, match="a head of regression: open it with FeatureRegressor"):
            FeatureClassifier.from_pretrained(tmp_path)


class TestStrength:
    def test_it_is_chosen_by_the_rows_that_are_given_alone(self):
        """With a hundred columns of noise for 150 rows strong regularisation is best; where all is clear weak is."""
        labels = np.arange(150) % 2
        noisy = np.random.default_rng(0).normal(size=(150, 100))
        noisy[:, 0] += labels * 1.5
        chosen = fit_head("logistic", noisy, labels, kind="classification").chosen["C"]
        curved = np.linspace(-1, 1, 200)[:, None]
        clear = fit_head("rbf_svm", curved, (np.sin(12 * curved[:, 0]) > 0).astype(int), kind="classification").chosen[
            "C"
        ]
        assert chosen < 1.0 and clear > 0.1
        assert fit_head("logistic", noisy, labels, kind="classification", folds=0).chosen == {}

    def test_features_are_standardised_within_each_fold(self, monkeypatch):
        """The scaler is part of what is fitted in a fold: it never sees the rows that the fold is measured on."""
        from sklearn.preprocessing import StandardScaler

        seen, fit = [], StandardScaler.fit
        monkeypatch.setattr(
            StandardScaler, "fit", lambda self, X, y=None, **kw: seen.append(len(X)) or fit(self, X, y, **kw)
        )
        fit_head("linear_svc", np.random.default_rng(0).normal(size=(50, 3)), np.arange(50) % 2, kind="classification")
        assert seen.count(40) == 30 and seen.count(50) == 1

    def test_a_rare_class_makes_fewer_folds(self, caplog):
        labels = np.array([0] * 20 + [1] * 3)
        table = labels[:, None] + np.zeros((23, 2))
        assert "C" in fit_head("logistic", table, labels, kind="classification").chosen and "3 folds" in caplog.text
        labels[-2:] = 0
        assert fit_head("logistic", table, labels, kind="classification").chosen == {}
        assert "no strength is chosen" in caplog.text

    @pytest.mark.parametrize(
        ("name", "kind", "labels", "message"),
        [
            ("ridge", "classification", [0, 1], "head='ridge'"),
            ("logistic", "regression", [0, 1], "head='logistic'"),
            ("logistic", "classification", [1, 1], "one class"),
            ("logistic", "classification", [1, 0, 1], "2 and 3"),
        ],
    )
    def test_refused(self, name, kind, labels, message):
        with pytest.raises(InputError, match=message):
            fit_head(name, np.zeros((2, 2)), np.array(labels), kind=kind)


class TestFolder:
    def test_a_type_that_is_not_trusted_is_refused_by_name(self, fitted, tmp_path):
        fitted["logistic"].save_pretrained(tmp_path)
        foreign = Pipeline([("scaler", FunctionTransformer(draws.row_keys)), ("head", fitted["logistic"].head_[-1])])
        skops.io.dump(foreign, tmp_path / "feature_head.skops")
        with pytest.raises(InputError, match=r"holds .*draws.row_keys.*do not use it"):
            FeatureClassifier.from_pretrained(tmp_path)
        (tmp_path / "feature_head.skops").write_bytes(b"PK nothing")
        with pytest.raises(InputError, match="feature_head.skops' cannot be read"):
            FeatureClassifier.from_pretrained(tmp_path)
        (tmp_path / "feature_head.skops").unlink()
        with pytest.raises(InputError, match="has no feature_head.skops"):
            FeatureClassifier.from_pretrained(tmp_path)

    def test_a_live_model_is_saved_without_its_pooler(self, tmp_path):
        set_seed(3)
        model, (texts, labels) = AutoModel.from_config(BertConfig(**SIZES)), task(60)
        known = FeatureClassifier(PretrainedFeatures(model, tokenizer=tiny_tokenizer()), folds=0).fit(texts, labels)
        known.save_pretrained(tmp_path)
        assert model.pooler is not None
        again = FeatureClassifier.from_pretrained(tmp_path)
        assert np.array_equal(again.decision_function(texts), known.decision_function(texts))

    def test_another_encoder_is_refused(self, fitted, tmp_path):
        fitted["logistic"].save_pretrained(tmp_path)
        set_seed(1)
        AutoModel.from_config(BertConfig(**SIZES)).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="other weights than those that its head was fitted on"):
            FeatureClassifier.from_pretrained(tmp_path)

    def test_no_path_of_the_machine_is_written(self, fitted, folder, tmp_path):
        fitted["rbf_svm"].save_pretrained(tmp_path)
        for name in ("feature_head.json", "README.md", "pretraining/run.json"):
            assert str(folder) not in (tmp_path / name).read_text()

    def test_the_card_has_what_was_measured(self, fitted, tmp_path):
        score = Evaluation(
            task="words", dataset="Words", split="test", metrics={"accuracy": 0.875}, method="frozen features",
            baseline={"accuracy": 0.5}, baseline_name="most frequent class", num_examples=120,
        )  # fmt: skip
        fitted["linear_svc"].save_pretrained(tmp_path, evaluations=[score], data={"sources": ["train.tsv"]})
        card = (tmp_path / "README.md").read_text()
        assert "FeatureClassifier.from_pretrained" in card and "0.875" in card and "train.tsv" in card
        assert "library_name: transformers" in card and "- skops" in card
        assert f"C = {fitted['linear_svc'].chosen_['C']:g} by cross-validation" in card
        assert read_record(tmp_path).evaluations[0].metrics == {"accuracy": 0.875}

    def test_the_hub_holds_it_whole_or_by_the_name_of_its_encoder(self, fitted, folder, tmp_path, monkeypatch):
        texts, labels = task(60)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        with LoopbackHub(tmp_path / "hub") as hub, connected(hub.url):
            api = HfApi(endpoint=hub.url)
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            api.create_repo("tester/encoder")
            api.upload_folder(repo_id="tester/encoder", folder_path=folder)
            model = FeatureClassifier(PretrainedFeatures("tester/encoder"), folds=0).fit(texts, labels)
            model.save_pretrained(tmp_path / "head", include_encoder=False)
            assert not list((tmp_path / "head").glob("*.safetensors"))
            content = json.loads((tmp_path / "head" / "feature_head.json").read_text())
            assert content["encoder"]["model"] == "tester/encoder" and content["encoder"]["revision"] == hub.head(
                "tester/encoder"
            )
            # The encoder goes on, and the head keeps to the commit that it was fitted on.
            set_seed(1)
            AutoModel.from_config(BertConfig(**SIZES)).save_pretrained(tmp_path / "next")
            api.upload_folder(repo_id="tester/encoder", folder_path=tmp_path / "next")
            assert PretrainedFeatures("tester/encoder").fit().model_digest_ != model.features_.model_digest_
            again = FeatureClassifier.from_pretrained(tmp_path / "head")
            assert np.array_equal(again.decision_function(texts), model.decision_function(texts))
            assert "tester/encoder" in (tmp_path / "head" / "README.md").read_text()
            model.push_to_hub("tester/whole")
            whole = FeatureClassifier.from_pretrained("tester/whole")
            assert np.array_equal(whole.decision_function(texts), model.decision_function(texts))
        with pytest.raises(InputError, match="include_encoder=False needs a model with a name on the Hub"):
            fitted["logistic"].save_pretrained(tmp_path / "no", include_encoder=False)
