"""Counts of pairs against a table by hand and a loop over all pairs; counts on disk against those in memory."""

import math

import numpy as np
import pytest

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.vectors import counts as module
from hf_pretrain.vectors.corpus import WordCorpus
from hf_pretrain.vectors.counts import Window, count_cooccurrences, document_counts

# Two documents, three lines: a b a c | c b || b b a
HAND = WordCorpus.from_words([[list("abac"), list("cb")], [list("bba")]])
WORDS = "bac"


def weight(window, distance):
    return {"uniform": 1, "linear": (window.size - distance + 1) / window.size, "harmonic": 1 / distance}[
        window.weighting
    ]


def by_loop(corpus, window):
    """The definition, pair by pair."""
    size = len(corpus.vocabulary)
    right = np.zeros((size, size))
    bounds = corpus.documents if window.crosses_lines else corpus.lines
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        unit = corpus.tokens[low:high]
        for left in range(len(unit)):
            for distance in range(1, min(window.size, len(unit) - 1 - left) + 1):
                right[unit[left], unit[left + distance]] += weight(window, distance)
    return {"right": right, "left": right.T, "both": right + right.T, "separate": np.hstack([right.T, right])}[
        window.direction
    ]


def made_up(*, words=30, documents=40, stream="made up"):
    """Documents of some lines, some of which are empty, and one long line; words are of unequal frequency."""
    texts = []
    for number in range(documents):
        draw = draws.uniforms(draws.row_keys([number], seed=0, stream=stream), 64)[0]
        ids = (words * draw**2).astype(int)
        cuts = sorted((64 * draw[:5]).astype(int))
        texts.append([[f"w{n}" for n in part] for part in np.split(ids, cuts)])
    texts.append([[f"w{n % 7}" for n in range(90)]])
    return WordCorpus.from_words(texts, min_count=3)


class TestByHand:
    # Rows and columns in the order b (4), a (3), c (2).
    @pytest.mark.parametrize(
        ("window", "table"),
        [
            # right neighbours at distance 1: ab, ba, ac, cb, bb, ba
            (Window(size=1, direction="right"), [[1, 2, 0], [1, 0, 1], [1, 0, 0]]),
            (Window(size=1, direction="left"), [[1, 1, 1], [2, 0, 0], [0, 1, 0]]),
            (Window(size=1, direction="both"), [[2, 3, 1], [3, 0, 1], [1, 1, 0]]),
            (Window(size=1, direction="separate"), [[1, 1, 1, 1, 2, 0], [2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0]]),
            # at distance 2: aa, bc, ba
            (Window(size=2, weighting="uniform", direction="right"), [[1, 3, 1], [1, 1, 1], [1, 0, 0]]),
            (Window(size=2, weighting="linear", direction="right"), [[1, 2.5, 0.5], [1, 0.5, 1], [1, 0, 0]]),
            # at distance 3: ac
            (Window(size=3, weighting="linear", direction="right"), [[1, 8 / 3, 2 / 3], [1, 2 / 3, 4 / 3], [1, 0, 0]]),
            (Window(size=3, weighting="harmonic", direction="right"), [[1, 2.5, 0.5], [1, 0.5, 4 / 3], [1, 0, 0]]),
            # over lines also at distance 1: cc
            (Window(size=1, direction="right", crosses_lines=True), [[1, 2, 0], [1, 0, 1], [1, 0, 1]]),
        ],
    )
    def test_a_table(self, window, table):
        assert HAND.vocabulary.words == tuple(WORDS)
        counts = count_cooccurrences(HAND, window)
        assert counts.shape == (3, 6 if window.direction == "separate" else 3)
        np.testing.assert_array_equal(counts.to_csr().toarray(), table)
        assert (counts.values > 0).all()

    def test_documents(self):
        np.testing.assert_array_equal(document_counts(HAND).toarray(), [[2, 2, 2], [2, 1, 0]])

    def test_an_empty_document_is_a_row(self):
        corpus = WordCorpus.from_words([[["a", "b"]], [], [["rare"]], [["b", "a", "a"]]], min_count=2)
        np.testing.assert_array_equal(document_counts(corpus).toarray(), [[1, 1], [0, 0], [0, 0], [2, 1]])

    def test_unknown_words_take_up_no_distance(self):
        corpus = WordCorpus.from_words([[["a", "rare", "odd", "b"], ["a", "b"]]], min_count=2)
        counts = count_cooccurrences(corpus, Window(size=1, direction="right"))
        np.testing.assert_array_equal(counts.to_csr().toarray(), [[0, 2], [0, 0]])


class TestDefinition:
    @pytest.mark.parametrize("weighting", ["uniform", "linear", "harmonic"])
    @pytest.mark.parametrize("direction", ["both", "left", "right", "separate"])
    @pytest.mark.parametrize("crosses_lines", [False, True])
    @pytest.mark.parametrize("size", [1, 5, 8, 40])
    def test_it_is_a_loop_over_pairs(self, weighting, direction, crosses_lines, size, tmp_path):
        corpus = made_up(documents=4)
        window = Window(size, weighting, direction, crosses_lines)
        expected = by_loop(corpus, window)
        for most in (1 << 26, 300):
            counts = count_cooccurrences(corpus, window, max_entries=most, folder=tmp_path / str(most))
            np.testing.assert_allclose(counts.to_csr().toarray(), expected, rtol=1e-12)
            keys = counts.rows.astype(np.int64) * counts.shape[1] + counts.columns
            assert (np.diff(keys) > 0).all()
            assert (counts.rows.dtype, counts.columns.dtype) == (np.int32, np.int32)

    def test_both_sides_are_symmetric(self):
        table = count_cooccurrences(made_up(), Window(weighting="harmonic")).to_csr()
        assert (table != table.T).nnz == 0

    def test_the_weights_of_distances(self):
        np.testing.assert_allclose(Window(4, "linear").weights(), [1, 0.75, 0.5, 0.25])
        np.testing.assert_array_equal(Window(50, "harmonic").weights(), 1 / np.arange(1, 51))
        np.testing.assert_array_equal(Window(22, "harmonic").weights(), 1 / np.arange(1, 23))
        assert math.lcm(*range(1, 23)) <= module._LARGEST_UNIT


class TestOnDisk:
    @pytest.mark.parametrize("weighting", ["linear", "harmonic"])
    @pytest.mark.parametrize("direction", ["both", "separate"])
    @pytest.mark.parametrize("most", [70, 300])
    def test_it_is_bit_for_bit_as_in_memory(self, weighting, direction, most, tmp_path):
        corpus, window = made_up(documents=8), Window(15, weighting, direction)
        whole = count_cooccurrences(corpus, window)
        spilled = count_cooccurrences(corpus, window, max_entries=most, folder=tmp_path)
        assert isinstance(spilled.values, np.memmap)
        assert not isinstance(whole.values, np.memmap)
        for name in ("rows", "columns", "values"):
            np.testing.assert_array_equal(getattr(spilled, name), getattr(whole, name))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "pairs.columns.bin",
            "pairs.rows.bin",
            "pairs.values.bin",
        ]

    def test_a_run_of_each_pair(self, tmp_path):
        window = Window(size=3, weighting="harmonic")
        counts = count_cooccurrences(HAND, window, max_entries=1, folder=tmp_path)
        np.testing.assert_array_equal(counts.to_csr().toarray(), count_cooccurrences(HAND, window).to_csr().toarray())

    def test_no_more_is_in_memory_than_asked(self, tmp_path, monkeypatch):
        sizes = []
        write = module._write_run

        def noted(matrix, folder, number):
            sizes.append(matrix.nnz)
            return write(matrix, folder, number)

        monkeypatch.setattr(module, "_write_run", noted)
        count_cooccurrences(made_up(), Window(direction="right"), max_entries=200, folder=tmp_path)
        assert len(sizes) > 3
        assert max(sizes) <= 200

    def test_a_temporary_folder_goes_with_the_counts(self):
        counts = count_cooccurrences(made_up(), Window(), max_entries=100)
        folder = counts._files.name
        assert len(list(module.Path(folder).iterdir())) == 3
        del counts
        assert not module.Path(folder).exists()

    def test_a_line_that_is_longer_than_a_part(self, tmp_path):
        corpus = WordCorpus.from_words([[[f"w{n * n % 11}" for n in range(900)]]])
        window = Window(size=7, weighting="harmonic")
        counts = count_cooccurrences(corpus, window, max_entries=98, folder=tmp_path)
        np.testing.assert_allclose(counts.to_csr().toarray(), by_loop(corpus, window), rtol=1e-12)

    def test_lines_of_one_word_have_no_pairs(self):
        counts = count_cooccurrences(WordCorpus.from_words([[["a"], ["b"]], [["a"]]]), Window())
        assert counts.to_csr().nnz == len(counts.values) == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "name"),
        [({"size": 0}, "size"), ({"weighting": "lineer"}, "linear"), ({"direction": "up"}, "direction")],
    )
    def test_an_option_out_of_range(self, options, name):
        with pytest.raises(InputError, match=name):
            Window(**options)

    def test_no_entries(self):
        with pytest.raises(InputError, match="max_entries"):
            count_cooccurrences(HAND, Window(), max_entries=0)
