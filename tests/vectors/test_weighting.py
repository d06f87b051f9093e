"""PMI by hand and of tables whose words are independent, TF-IDF's two conventions, and singular vectors against NumPy's."""

import math

import numpy as np
import pytest
from scipy import sparse

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.vectors.corpus import WordCorpus
from hf_pretrain.vectors.counts import Window, count_cooccurrences, latent_vectors, pmi_matrix, tfidf_weights

TABLE = sparse.csr_matrix(np.array([[4.0, 0, 1], [2, 2, 0], [0, 1, 6], [0, 0, 0]]))


def uniforms(rows, columns, *, stream):
    return draws.uniforms(draws.row_keys(range(rows), seed=0, stream=stream), columns)


def low_rank(rows=60, columns=45, rank=20, *, stream="low rank"):
    """A sparse matrix whose singular values fall by a fifth each: random projections find them."""
    left, _ = np.linalg.qr(uniforms(rows, rank, stream=stream + " left") - 0.5)
    right, _ = np.linalg.qr(uniforms(columns, rank, stream=stream + " right") - 0.5)
    return sparse.csr_matrix(left * 100 * 0.8 ** np.arange(rank) @ right.T)


class TestPMI:
    def test_by_hand(self):
        # n = 16; rows 5, 4, 7, 0; columns 6, 3, 7
        expected = np.zeros((4, 3))
        for row, column, count, product in [
            (0, 0, 4, 30),
            (0, 2, 1, 35),
            (1, 0, 2, 24),
            (1, 1, 2, 12),
            (2, 1, 1, 21),
            (2, 2, 6, 49),
        ]:
            expected[row, column] = math.log(count * 16 / product)
        np.testing.assert_allclose(pmi_matrix(TABLE, positive=False).toarray(), expected, rtol=1e-14)
        positive = pmi_matrix(TABLE)
        np.testing.assert_allclose(positive.toarray(), np.maximum(expected, 0), rtol=1e-14)
        assert positive.nnz == 4
        assert positive.dtype == np.float64

    def test_smoothing_by_hand(self):
        contexts = np.array([6, 3, 7]) ** 0.75
        expected = np.zeros((4, 3))
        for row, total in enumerate([5, 4, 7]):
            for column in range(3):
                if count := TABLE[row, column]:
                    expected[row, column] = math.log(count / total / (contexts[column] / contexts.sum()))
        np.testing.assert_allclose(pmi_matrix(TABLE, positive=False, smoothing=0.75).toarray(), expected, rtol=1e-13)

    @pytest.mark.parametrize("smoothing", [1.0, 0.75])
    @pytest.mark.parametrize("shift", [1.0, 2.0, 5.0, 0.5])
    def test_the_shift_is_the_logarithm_of_k(self, shift, smoothing):
        counts = sparse.csr_matrix(np.floor(6 * uniforms(20, 20, stream="counts")))
        plain = pmi_matrix(counts, positive=False, smoothing=smoothing)
        occurs = counts.toarray() > 0
        expected = np.where(occurs, np.maximum(plain.toarray() - math.log(shift), 0), 0)
        found = pmi_matrix(counts, shift=shift, smoothing=smoothing)
        np.testing.assert_array_equal(found.toarray(), expected)
        assert (found.data > 0).all()

    def test_a_table_of_products_has_none(self):
        words, contexts = np.array([1.0, 5, 30, 7]), np.array([2.0, 3, 11])
        table = pmi_matrix(sparse.csr_matrix(np.outer(words, contexts)), positive=False)
        assert table.nnz == 0

    def test_independent_words_have_none_but_noise(self):
        ids = (40 * uniforms(400, 500, stream="independent") ** 2).astype(int)
        corpus = WordCorpus.from_words([[[f"w{n}" for n in line]] for line in ids.tolist()])
        counts = count_cooccurrences(corpus, Window(size=3, weighting="uniform")).to_csr()
        table = pmi_matrix(counts, positive=False).toarray()
        expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
        # Of counts n the logarithm varies by about 1 / sqrt(n); each pair counts in both orders.
        noise = table * np.sqrt(expected / 2)
        assert np.abs(noise).max() < 6
        assert 0.5 < noise.std() < 1.5
        assert abs(noise.mean()) < 0.2

    def test_words_that_attract_each_other_have_more(self):
        lines = [["a", "b"]] * 30 + [["c", "d"]] * 30 + [["a", "d"]] * 2
        corpus = WordCorpus.from_words([lines])
        table = pmi_matrix(count_cooccurrences(corpus, Window(size=1)).to_csr(), positive=False)
        ids = corpus.vocabulary.ids
        assert table[ids["a"], ids["b"]] > 0.5 > -1 > table[ids["a"], ids["d"]]

    def test_the_counts_are_not_changed_and_need_not_be_summed(self):
        parts = sparse.csr_matrix(([1.0, 3.0, 2.0, 0.0], [0, 0, 1, 1], [0, 2, 4]), shape=(2, 2))
        before = parts.copy()
        np.testing.assert_allclose(pmi_matrix(parts).toarray(), np.diag([math.log(6 / 4), math.log(6 / 2)]))
        np.testing.assert_array_equal(parts.data, before.data)

    @pytest.mark.parametrize(
        ("counts", "options", "name"),
        [
            (TABLE, {"shift": 0}, "shift"),
            (TABLE, {"smoothing": -0.1}, "smoothing"),
            (-TABLE, {}, "negative"),
            (TABLE * 0, {}, "zero"),
            (TABLE * math.nan, {}, "finite"),
        ],
    )
    def test_what_is_refused(self, counts, options, name):
        with pytest.raises(InputError, match=name):
            pmi_matrix(counts, **options)


class TestTfidf:
    def test_both_conventions_by_hand(self):
        found = tfidf_weights(np.array([1, 3, 10, 0]), 10, convention="sklearn")
        np.testing.assert_allclose(found, [math.log(x) + 1 for x in (11 / 2, 11 / 4, 1, 11)])
        found = tfidf_weights(np.array([1, 3, 10, 0]), 10, convention="textbook")
        np.testing.assert_allclose(found, [math.log(10), math.log(10 / 3), 0, 0])

    def test_more_documents_than_there_are(self):
        with pytest.raises(InputError, match="documents=2"):
            tfidf_weights(np.array([3]), 2)
        with pytest.raises(InputError, match="convention"):
            tfidf_weights(np.array([3]), 3, convention="gensim")


class TestLatentVectors:
    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    def test_it_is_numpys_decomposition(self, exact, power):
        matrix = low_rank()
        left, values, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
        left, values, right = left[:, :8], values[:8], right[:8]
        found = latent_vectors(matrix, dimensions=8, power=power, exact=exact)
        tolerance = 1e-9 if exact else 1e-4
        np.testing.assert_allclose(found.singular_values, values, rtol=tolerance)
        signs = np.sign((left * found.vectors).sum(axis=0))
        np.testing.assert_allclose(found.vectors, left * signs * values**power, atol=100 * tolerance)
        np.testing.assert_allclose(found.components, right * signs[:, None], atol=10 * tolerance)

    @pytest.mark.parametrize("exact", [True, False])
    def test_no_matrix_of_the_rank_is_nearer(self, exact):
        matrix = low_rank(stream="nearest")
        found = latent_vectors(matrix, dimensions=6, power=1, exact=exact)
        error = np.linalg.norm(matrix.toarray() - found.vectors @ found.components)
        dropped = np.linalg.svd(matrix.toarray(), compute_uv=False)[6:]
        assert error == pytest.approx(np.linalg.norm(dropped), rel=1e-6)

    def test_slowly_falling_values_are_nearly_right(self):
        matrix = sparse.csr_matrix(np.maximum(uniforms(300, 200, stream="slow") - 0.8, 0))
        true = np.linalg.svd(matrix.toarray(), compute_uv=False)[:20]
        np.testing.assert_allclose(latent_vectors(matrix, dimensions=20).singular_values, true, rtol=0.08)
        np.testing.assert_allclose(latent_vectors(matrix, dimensions=20, exact=True).singular_values, true, rtol=1e-4)

    @pytest.mark.parametrize("exact", [True, False])
    def test_signs_are_fixed(self, exact):
        matrix = low_rank(stream="signs")
        found = latent_vectors(matrix, dimensions=8, exact=exact, seed=0)
        largest = np.abs(found.vectors).argmax(axis=0)
        assert (found.vectors[largest, np.arange(8)] > 0).all()
        mirrored = latent_vectors(-matrix, dimensions=8, exact=exact, seed=3)
        np.testing.assert_allclose(mirrored.vectors, found.vectors, atol=1e-3)
        np.testing.assert_allclose(mirrored.components, -found.components, atol=1e-3)

    @pytest.mark.parametrize("exact", [True, False])
    def test_the_seed_is_all_that_is_random(self, exact):
        matrix = sparse.csr_matrix(np.maximum(uniforms(80, 70, stream="seed") - 0.5, 0))
        first = latent_vectors(matrix, dimensions=5, exact=exact, seed=7)
        second = latent_vectors(matrix, dimensions=5, exact=exact, seed=7)
        np.testing.assert_array_equal(first.vectors, second.vectors)
        if not exact:
            assert not np.array_equal(first.vectors, latent_vectors(matrix, dimensions=5, seed=8).vectors)

    def test_the_precision_is_that_of_the_matrix(self):
        assert latent_vectors(low_rank().astype(np.float32), dimensions=3).vectors.dtype == np.float32
        assert latent_vectors((1000 * low_rank()).astype(np.int64), dimensions=3).vectors.dtype == np.float64

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"dimensions": 0}, "dimensions=0"),
            ({"dimensions": 46}, "from 1 to 45"),
            ({"dimensions": 45, "exact": True}, "from 1 to 44"),
            ({"dimensions": 30}, "at most 20"),
            ({"dimensions": 30, "exact": True}, "at most 20"),
            ({"dimensions": 3, "power": 2}, "power"),
        ],
    )
    def test_what_is_refused(self, options, name):
        with pytest.raises(InputError, match=name):
            latent_vectors(low_rank(), **options)
