"""Vectors of texts against scikit-learn's vectorizers and NumPy's decomposition; folders that give the same vectors."""

import json
import math
import pickle

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from transformers import AutoModel, AutoTokenizer

from hf_pretrain import SparseTextModel
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.vectors.corpus import word_tokenizer
from hf_pretrain.vectors.text_vectors import LatentTextVectorizer, SparseTextVectorizer

TEXTS = [
    "The cat sat on the mat.",
    "A dog, the dog and The DOG!",
    "",
    "Straße und Straßen; naïve caf\u00e9 cafe\u0301",
    "हिन्दी में लिखा 我爱北京",
    "the cat and the dog sat",
    "mat mat mat mat cat",
]
UNSEEN = ["the unseen cat", "nothing known here", "", "dog dog \ud800 mat [UNK]"]


def analyzer(text):
    tokenizer = word_tokenizer(())
    words = tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str(text.replace("\ud800", "\ufffd"))
    )
    return [word for word, _ in words]


def made_up(count=60):
    draw = draws.uniforms(draws.row_keys(range(count), seed=0, stream="texts"), 30)
    ids = (25 * draw**2).astype(int) + 15 * (np.arange(count) % 2)[:, None]
    return [" ".join(f"w{number}" for number in row) for row in ids], np.arange(count) % 2


class TestSparse:
    @pytest.mark.parametrize("sublinear", [False, True])
    @pytest.mark.parametrize("normalize", [None, True, False])
    @pytest.mark.parametrize("limits", [{}, {"min_df": 2, "max_features": 5}, {"max_df": 0.3}])
    def test_tfidf_is_scikit_learns(self, sublinear, normalize, limits):
        ours = SparseTextVectorizer(sublinear_tf=sublinear, normalize=normalize, **limits).fit(TEXTS)
        norm = None if normalize is False else "l2"
        theirs = TfidfVectorizer(analyzer=analyzer, sublinear_tf=sublinear, norm=norm, **limits).fit(TEXTS)
        assert ours.get_feature_names_out().tolist() == theirs.get_feature_names_out().tolist()
        for texts in (TEXTS, UNSEEN):
            np.testing.assert_allclose(ours.transform(texts).toarray(), theirs.transform(texts).toarray(), atol=1e-6)

    @pytest.mark.parametrize(("method", "binary"), [("counts", False), ("onehot", True)])
    def test_counts_and_presence_are_scikit_learns(self, method, binary):
        ours = SparseTextVectorizer(method)
        theirs = CountVectorizer(analyzer=analyzer, binary=binary)
        expected = theirs.fit_transform(TEXTS).toarray()
        np.testing.assert_array_equal(ours.fit_transform(TEXTS).toarray(), expected)
        np.testing.assert_array_equal(ours.transform(UNSEEN).toarray(), theirs.transform(UNSEEN).toarray())
        assert sparse.issparse(ours.transform(TEXTS))

    def test_the_textbooks_tfidf_by_hand(self):
        found = SparseTextVectorizer(idf="textbook", normalize=False).fit(["a b b", "a c", "a"])
        expected = [[0, 2 * math.log(3), 0], [0, 0, math.log(3)], [0, 0, 0]]
        table = found.transform(["a b b", "a c", "a"])
        np.testing.assert_allclose(table.toarray(), expected, rtol=1e-6)
        unit = SparseTextVectorizer(idf="textbook").fit(["a b b", "a c", "a"]).transform(["b b c", "a"])
        np.testing.assert_allclose(unit.toarray(), [[0, 2 / 5**0.5, 1 / 5**0.5], [0, 0, 0]], rtol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [{"method": "onehot"}, {"method": "counts"}, {"idf": "textbook", "sublinear_tf": True}, {"lowercase": False}],
    )
    def test_a_folder_gives_the_same_vectors(self, options, tmp_path):
        ours = SparseTextVectorizer(**options).fit(TEXTS)
        ours.save_pretrained(tmp_path / "folder")
        again = SparseTextVectorizer.from_pretrained(tmp_path / "folder")
        assert again.get_params() == ours.get_params()
        assert again.num_documents_ == len(TEXTS)
        for texts in (TEXTS, UNSEEN):
            assert again.transform(texts).toarray().tobytes() == ours.transform(texts).toarray().tobytes()

    @pytest.mark.parametrize(
        "options",
        [
            {"method": "onehot"},
            {"method": "onehot", "normalize": True},
            {"method": "counts", "sublinear_tf": True},
            {},
            {"normalize": False, "lowercase": False},
            {"idf": "textbook", "sublinear_tf": True, "max_features": 7},
        ],
    )
    def test_auto_classes_open_the_folder_with_the_same_vectors(self, options, tmp_path):
        ours = SparseTextVectorizer(**options).fit([*TEXTS, "[ UNK ]"])
        ours.save_pretrained(tmp_path)
        (model, info), tokenizer = (
            AutoModel.from_pretrained(tmp_path, output_loading_info=True),
            AutoTokenizer.from_pretrained(tmp_path),
        )
        assert type(model) is SparseTextModel and not any(info.values())
        texts = [*TEXTS, *(text for text in UNSEEN if "\ud800" not in text), "mat [UNK] mat [PAD]"]
        pooled = model(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        assert pooled.is_sparse
        np.testing.assert_allclose(pooled.to_dense().detach().numpy(), ours.transform(texts).toarray(), rtol=1e-7)

    def test_texts_may_come_one_by_one(self):
        one_by_one = SparseTextVectorizer().fit(text for text in TEXTS)
        np.testing.assert_array_equal(one_by_one.weights_, SparseTextVectorizer().fit(TEXTS).weights_)
        assert one_by_one.num_documents_ == len(TEXTS)


class TestLatent:
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("method", ["tfidf", "counts"])
    def test_it_is_numpys_decomposition(self, method, power):
        texts, _ = made_up()
        table = SparseTextVectorizer(method).fit_transform(texts).toarray()
        left, values, right = np.linalg.svd(table, full_matrices=False)
        found = LatentTextVectorizer(6, method=method, power=power, exact=True).fit(texts)
        np.testing.assert_allclose(found.singular_values_, values[:6], rtol=1e-4)
        signs = np.sign((found.components_ * right[:6]).sum(axis=1))
        np.testing.assert_allclose(found.components_, right[:6] * signs[:, None], atol=1e-5)
        # Each document folded in is its row of the decomposition.
        np.testing.assert_allclose(found.transform(texts), left[:, :6] * signs * values[:6] ** power, atol=1e-4)

    def test_what_is_left_out_is_the_least(self):
        texts, _ = made_up()
        table = SparseTextVectorizer().fit_transform(texts).toarray()
        found = LatentTextVectorizer(6, exact=True).fit(texts)
        error = np.linalg.norm(table - found.transform(texts) @ found.components_)
        assert error == pytest.approx(np.linalg.norm(np.linalg.svd(table, compute_uv=False)[6:]), rel=1e-5)

    def test_unknown_words_do_not_matter(self):
        texts, _ = made_up()
        found = LatentTextVectorizer(4).fit(texts)
        first, second, none = found.transform(["w1 w2", "w1 oh w2", "oh"])
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(none, np.zeros(4))
        np.testing.assert_array_equal(found.transform(texts[3:4])[0], found.transform(texts)[3])

    def test_a_folder_gives_the_same_vectors(self, tmp_path):
        texts, _ = made_up()
        ours = LatentTextVectorizer(5, power=0.5, sublinear_tf=True, seed=3).fit(texts)
        ours.save_pretrained(tmp_path)
        again = LatentTextVectorizer.from_pretrained(tmp_path)
        assert again.transform(texts).tobytes() == ours.transform(texts).tobytes()
        assert again.get_params() == ours.get_params()
        with pytest.raises(InputError, match="latent_text_vectors"):
            SparseTextVectorizer.from_pretrained(tmp_path)

    def test_the_seed_is_all_that_is_random(self):
        texts, _ = made_up()
        first = LatentTextVectorizer(5, seed=1).fit_transform(texts)
        assert first.tobytes() == LatentTextVectorizer(5, seed=1).fit_transform(texts).tobytes()

    def test_texts_of_fewer_dimensions(self):
        with pytest.raises(InputError, match="dimensions=3"):
            LatentTextVectorizer(3).fit(["a b", "a b", "a b", "a c d"])


@pytest.mark.parametrize("make", [SparseTextVectorizer, lambda: LatentTextVectorizer(3)])
class TestEstimator:
    def test_it_is_cloned_and_pickled(self, make):
        texts, _ = made_up()
        fitted = make().fit(texts)
        assert clone(fitted).get_params() == fitted.get_params()
        with pytest.raises(NotFittedError):
            clone(fitted).transform(texts)
        again = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(
            *(np.asarray(one.transform(texts) @ np.eye(one.transform(texts).shape[1])) for one in (fitted, again))
        )
        assert len(fitted.get_feature_names_out()) == fitted.transform(texts).shape[1]

    def test_it_is_searched_in_a_pipeline(self, make):
        texts, labels = made_up()
        pipeline = make_pipeline(make(), LogisticRegression())
        name = pipeline.steps[0][0]
        search = GridSearchCV(pipeline, {f"{name}__method": ["onehot", "counts", "tfidf"]}, cv=3, error_score="raise")
        search.fit(texts, labels)
        assert search.best_score_ > 0.95
        assert search.predict(["w38 w39 w37", "w0 w1 w0 w2"]).tolist() == [1, 0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"method": "tf-idf"}, "tfidf"),
            ({"idf": "gensim"}, "idf"),
            ({"method": "counts", "idf": "textbook"}, "idf"),
            ({"method": "onehot", "sublinear_tf": True}, "sublinear_tf"),
            ({"min_df": 50}, "no vocabulary"),
            ({"min_df": -1}, "min_df"),
        ],
    )
    def test_an_option(self, options, name):
        with pytest.raises(InputError, match=name) as caught:
            SparseTextVectorizer(**options).fit(TEXTS)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("texts", ["one text", ["a", None], ["a", math.nan], [], ["", " "]])
    def test_texts(self, texts):
        with pytest.raises(InputError, match="texts"):
            SparseTextVectorizer().fit(texts)

    @pytest.mark.parametrize("damage", ["missing", "weights", "config"])
    def test_a_damaged_folder(self, damage, tmp_path):
        SparseTextVectorizer().fit(TEXTS).save_pretrained(tmp_path)
        if damage == "missing":
            (tmp_path / "tokenizer.json").unlink()
        elif damage == "weights":
            other = tmp_path / "other"
            SparseTextVectorizer().fit(TEXTS[:2]).save_pretrained(other)
            (other / "model.safetensors").rename(tmp_path / "model.safetensors")
        else:
            config = json.loads((tmp_path / "config.json").read_text())
            config["method"] = "red"
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="no whole vectorizer") as caught:
            SparseTextVectorizer.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
