"""The kernel of skip-gram and CBOW: its draws and its sigmoid, and what numba compiles against plain Python."""

import numpy as np
import pytest
from test_word2vec import CASES, made_up_corpus, noise_words, random_state, table_of

from hf_pretrain.vectors.word2vec import training
from hf_pretrain.vectors.word2vec.kernel import KernelBackend, _draw, _sigmoid, sigmoid_table
from hf_pretrain.vectors.word2vec.tables import alias_table, noise_distribution
from hf_pretrain.vectors.word2vec.training import StretchReader, Word2VecOptions, train_word2vec


def test_noise_is_that_of_numpy():
    table = alias_table(noise_distribution(np.array([90, 30, 10, 9, 1]), 0.75))
    for key in np.random.default_rng(0).integers(2**64, size=40, dtype=np.uint64):
        with np.errstate(over="ignore"):
            found = [_draw(key, number, table.thresholds, table.aliases) for number in range(6)]
        assert found == noise_words(table, key, range(6)).tolist()


def test_the_sigmoid_is_exact_to_a_millionth_and_learns_beyond_its_table():
    scores = np.concatenate([np.linspace(-30, 30, 4001), [-8, 8, 7.999999, -7.999999]]).astype(np.float32)
    table = sigmoid_table()
    found = np.array([_sigmoid(score, table) for score in scores])
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-scores.astype(np.float64))), atol=1e-6)
    assert 0 < _sigmoid(np.float32(-20), table) < 1e-8


@pytest.mark.parametrize("case", [*CASES, {"mode": "cbow", "cbow_gradient": "word2vec"}], ids=str)
def test_numba_computes_what_python_does(case):
    pytest.importorskip("numba")
    corpus, options = made_up_corpus(), Word2VecOptions(dimensions=9, window=3, sample=0.05, **case)
    table, state = table_of(corpus.vocabulary.counts, options), random_state(20, options)
    stretch, results = StretchReader(corpus, options).stretch(0, 100, 200), []
    for is_compiled in (False, True):
        backend = KernelBackend(
            {name: array.copy() for name, array in state.items()}, table, options, is_compiled=is_compiled
        )
        with np.errstate(over="ignore"):
            results.append((*backend.learn(stretch), backend.inputs, backend.outputs))
    for plain, compiled in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-5)


def test_one_thread_repeats_resumes_and_ignores_the_size_of_a_stretch(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    corpus, options = made_up_corpus(), Word2VecOptions(dimensions=8, epochs=3, sample=0.05)
    whole = train_word2vec(corpus, options, progress=False)
    monkeypatch.setattr(KernelBackend, "positions", 37)
    save = training._Run.save

    def save_and_stop(run, *args):
        save(run, *args)
        if run.epoch == 1 and run.position:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_word2vec(corpus, options, checkpoint_folder=tmp_path, checkpoint_words=100, progress=False)
    monkeypatch.setattr(training._Run, "save", save)
    resumed = train_word2vec(corpus, options, checkpoint_folder=tmp_path, progress=False)
    np.testing.assert_array_equal(resumed.vectors, whole.vectors)
    np.testing.assert_array_equal(resumed.outputs, whole.outputs)


def test_threads_learn_all_pairs():
    pytest.importorskip("numba")
    corpus, options = made_up_corpus(num_lines=300), Word2VecOptions(dimensions=8, epochs=4, learning_rate=0.1)
    one = train_word2vec(corpus, options, progress=False)
    three = train_word2vec(corpus, Word2VecOptions(**{**options.__dict__, "threads": 3}), progress=False)
    assert three.loss[-1][0] == one.loss[-1][0]
    assert three.loss[-1][1] == pytest.approx(one.loss[-1][1], rel=0.05)
