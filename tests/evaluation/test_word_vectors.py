"""Measures of words: numbers by hand, restrictions, ties, pictures."""

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from hf_pretrain import WordVectors
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.words import (
    AnalogyScore,
    analogy_accuracy,
    nearest_neighbours,
    plot_words,
    word_similarity,
)

# Countries and capitals, singular and plural: parallel by construction.
NAMES = ("france", "paris", "spain", "madrid", "italy", "rome", "cat", "cats", "dog", "dogs")


def parallel(names=NAMES):
    rng = np.random.default_rng(0)
    bases = rng.standard_normal((5, 20))
    steps = rng.standard_normal((2, 20))
    rows = [bases[row // 2] + (row % 2) * steps[0 if row < 6 else 1] for row in range(10)]
    return WordVectors(names, np.array(rows))


def questions(tmp_path, text):
    path = tmp_path / "questions.txt"
    path.write_text(text)
    return path


CAPITALS = "\n".join(
    " ".join((*NAMES[2 * a : 2 * a + 2], *NAMES[2 * b : 2 * b + 2])) for a, b in itertools.permutations(range(3), 2)
)
ALL = f": capitals\n{CAPITALS}\n: gram8-plural\ncat cats dog dogs\ncat cats fish fishes\n: family\nhe she king queen\n"


@pytest.mark.parametrize("method", ["add", "multiply"])
def test_analogies_that_hold_by_construction(method, tmp_path):
    found = analogy_accuracy(parallel(), questions(tmp_path, ALL), method=method)
    assert found.sections == {
        "capitals": AnalogyScore(6, 6, 6),
        "gram8-plural": AnalogyScore(1, 1, 2),
        "family": AnalogyScore(0, 0, 1),
    }
    assert found.semantic == (6, 6, 7) and found.syntactic == (1, 1, 2) and found.total == (7, 7, 9)
    assert found.total.accuracy == 1 and found.total.answered_share == 7 / 9
    assert found.sections["family"].accuracy is None and (found.candidates, found.method) == (10, method)


@pytest.mark.parametrize("method", ["add", "multiply"])
def test_the_answers_are_those_of_one_question_at_a_time(method, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_pretrain.evaluation.words._CHUNK", 100)
    rng = np.random.default_rng(1)
    words = tuple(f"w{row}" for row in range(30))
    vectors = WordVectors(words, rng.standard_normal((30, 3)))
    rows = [rng.choice(30, 4, replace=False) for _ in range(400)]
    lines = "\n".join(" ".join(words[row] for row in question) for question in rows)
    for limit in (None, 20):
        known = [row for row in rows if limit is None or max(row) < limit]
        right = sum(
            vectors.analogy(*(words[row] for row in question[:3]), method=method, restrict=limit)[0][0]
            == words[question[3]]
            for question in known
        )
        found = analogy_accuracy(vectors, questions(tmp_path, lines), restrict=limit, method=method)
        assert 0 < right < len(known) and found.total == (right, len(known), 400)


def test_only_the_first_words_are_candidates(tmp_path):
    found = analogy_accuracy(parallel(), questions(tmp_path, ALL), restrict=4)
    # France, Paris, Spain and Madrid are left: two questions, with one candidate each.
    assert found.total == (2, 2, 9) and found.candidates == 4
    nothing = analogy_accuracy(parallel(), questions(tmp_path, ALL), restrict=3).total
    assert nothing == (0, 0, 9) and nothing.accuracy is None and nothing.answered_share == 0


def test_the_words_of_a_question_are_no_answer(tmp_path):
    vectors = parallel()
    found = analogy_accuracy(vectors, questions(tmp_path, "france paris spain paris\nfrance france spain spain\n"))
    assert found.total == (0, 2, 2)


def test_ties_count_against_the_vectors(tmp_path):
    text = "a b c d\n"
    for table in (np.zeros((5, 2)), np.ones((5, 2))):
        assert analogy_accuracy(WordVectors(tuple("dabce"), table), questions(tmp_path, text)).total == (0, 1, 1)
    twins = np.array([[1, 0], [1, 1], [0, 1], [0.5, 1], [0.5, 1]])
    assert analogy_accuracy(WordVectors(tuple("abcde"), twins), questions(tmp_path, text)).total.correct == 0
    assert analogy_accuracy(WordVectors(tuple("abcd"), twins[:4]), questions(tmp_path, text)).total.correct == 1


def test_words_are_folded_as_the_vocabulary_is(tmp_path):
    path = questions(tmp_path, "France Paris Spain Madrid\n")
    assert analogy_accuracy(parallel(), path).total == (1, 1, 1)
    cased = parallel(("France", "Paris", "Spain", "madrid", *NAMES[4:]))
    assert analogy_accuracy(cased, path).total == (0, 0, 1)


@pytest.mark.parametrize(
    ("text", "message"), [("a b c\n", "line 1: .* not 3"), (": x\n", "no question"), ("", "no question")]
)
def test_wrong_questions_are_refused(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        analogy_accuracy(parallel(), questions(tmp_path, text))
    with pytest.raises(InputError, match="method='cosine'"):
        analogy_accuracy(parallel(), questions(tmp_path, ALL), method="cosine")
    with pytest.raises(InputError, match="no file"):
        analogy_accuracy(parallel(), tmp_path / "nowhere")


def test_similarity_is_scipys_over_the_pairs_that_are_known():
    vectors = parallel()
    rng = np.random.default_rng(3)
    rows = [(first, second, float(rng.integers(0, 9))) for first, second in itertools.combinations(NAMES, 2)]
    unit = vectors.vectors / np.linalg.norm(vectors.vectors, axis=1, keepdims=True)
    cosines = [unit[NAMES.index(first)] @ unit[NAMES.index(second)] for first, second, _ in rows]
    expected = spearmanr(cosines, [score for _, _, score in rows]).statistic
    found = word_similarity(vectors, [*rows, ("cat", "tiger", 7.0), ("Tiger", "tiger", 10.0)])
    assert found.correlation == pytest.approx(expected, abs=1e-6) and abs(expected) > 0.01
    assert (found.pairs, found.total) == (45, 47)
    assert word_similarity(vectors, rows[:1]) == (None, 1, 1)


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n# Word 1\tWord 2\tHuman (mean)\nCat\tdog\t7\nparis\tRome\t6\ncat\trome\t1\nx\ty\t3\n",
        "Word 1,Word 2,Human (mean)\ncat,dog,7\nparis,rome,6\ncat,rome,1\nx,y,3\n",
        "word1\tword2\tPOS\tSimLex999\tSD\r\ncat\tdog\tN\t7\t9\r\nparis\trome\tN\t6\t1\r\ncat\trome\tN\t1\t8\r\nx\ty\tN\t3\t0\r\n",
    ],
    ids=["tabs", "commas", "simlex"],
)
def test_files_of_scored_words(text, tmp_path):
    vectors = parallel()
    path = questions(tmp_path, text)
    expected = word_similarity(vectors, [("cat", "dog", 7), ("paris", "rome", 6), ("cat", "rome", 1)])
    assert word_similarity(vectors, path) == (expected.correlation, 3, 4)


def test_wrong_files_of_scored_words_are_refused(tmp_path):
    with pytest.raises(InputError, match="line 2: score='x' is no number"):
        word_similarity(parallel(), questions(tmp_path, "cat\tdog\t7\ncat\trome\tx\n"))
    with pytest.raises(InputError, match="line 1: there are no two words"):
        word_similarity(parallel(), questions(tmp_path, "cat dog 7\n"))


def test_neighbours_for_a_card():
    vectors = parallel()
    found = nearest_neighbours(vectors, ["Cat", "fish", "rome"], top=2)
    assert found == {"Cat": vectors.most_similar("cat", top=2), "rome": vectors.most_similar("rome", top=2)}
    assert nearest_neighbours(vectors, ["cat"], restrict=2, top=9)["cat"][0][0] in ("france", "paris")
    assert len(nearest_neighbours(vectors)) == 8


def test_pictures_of_words(tmp_path):
    vectors = parallel()
    svg = plot_words(vectors, tmp_path / "plots" / "words.svg").read_bytes()
    assert all(f"<!-- {word} -->".encode() in svg for word in NAMES) and b"10 words" in svg
    assert svg == plot_words(vectors, tmp_path / "again.svg").read_bytes()
    few = plot_words(vectors, tmp_path / "few.svg", words=["cat", "fish", "rome", "spain"], title="$few").read_bytes()
    assert b"<!-- cat -->" in few and b"<!-- fish -->" not in few and b"<!-- dog -->" not in few and b"$few" in few
    assert plot_words(vectors, tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="suffix of path='pdf'"):
        plot_words(vectors, tmp_path / "words.pdf")
    with pytest.raises(InputError, match="1 words with a vector"):
        plot_words(vectors, tmp_path / "words.svg", words=["cat", "fish"])
