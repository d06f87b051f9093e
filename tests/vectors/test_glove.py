"""GloVe: its gradient by autograd, the program's rule by hand, the order of the counts, and what is learned."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_pretrain.errors import InputError, RunError
from hf_pretrain.vectors import glove
from hf_pretrain.vectors.corpus import WordCorpus
from hf_pretrain.vectors.counts import Window, count_cooccurrences
from hf_pretrain.vectors.glove import (
    CHECKPOINT,
    GloVeOptions,
    Side,
    batch_gradient,
    entry_batches,
    train_glove,
    update_side,
)

OPTIONS = GloVeOptions(dimensions=8, epochs=3, batch_size=64)


def counts_of(matrix):
    """Counts sorted by row and column, as they are stored."""
    rows, columns = np.nonzero(matrix)
    values = matrix[rows, columns].astype(np.float32)
    return SimpleNamespace(
        shape=matrix.shape, rows=rows.astype(np.int32), columns=columns.astype(np.int32), values=values
    )


def random_counts(num_words=40, density=0.4, seed=0):
    rng = np.random.default_rng(seed)
    matrix = np.exp(rng.normal(1, 1.5, (num_words, num_words))) * (rng.random((num_words, num_words)) < density)
    return counts_of(matrix + matrix.T)


def side(num_words=6, width=4, *, seed=0, start=0.0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_words, width, generator=generator)
    biases = torch.randn(num_words, generator=generator)
    return Side(vectors, biases, torch.full_like(vectors, start), torch.full_like(biases, start))


def test_the_gradient_is_autograds_where_words_repeat():
    words, contexts = side(seed=1), side(seed=2)
    rows, columns = torch.tensor([3, 0, 3, 3, 5]), torch.tensor([2, 2, 1, 2, 0])
    counts = torch.tensor([0.5, 3.0, 25.0, 9.0, 10.0])
    cost, *gradients = batch_gradient(words, contexts, rows, columns, counts, GloVeOptions(x_max=10, alpha=0.75))
    leaves = [tensor.double().requires_grad_() for tensor in (*words[:2], *contexts[:2])]
    products = (leaves[0][rows] * leaves[2][columns]).sum(1) + leaves[1][rows] + leaves[3][columns]
    weights = torch.where(counts < 10, (counts / 10) ** 0.75, 1.0).double()
    expected = 0.5 * (weights * (products - counts.double().log()) ** 2).sum()
    expected.backward()
    assert cost.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, of_vectors, of_biases in zip(gradients, leaves[::2], leaves[1::2], strict=True):
        dense = torch.zeros_like(of_vectors.grad).index_add(0, gradient.rows, gradient.vectors.double())
        torch.testing.assert_close(dense, of_vectors.grad, rtol=1e-5, atol=1e-5)
        dense = torch.zeros_like(of_biases.grad).index_add(0, gradient.rows, gradient.biases.double())
        torch.testing.assert_close(dense, of_biases.grad, rtol=1e-5, atol=1e-5)
    assert gradients[0].rows.tolist() == [0, 3, 5]
    assert gradients[1].rows.tolist() == [0, 1, 2]


def test_a_step_is_adagrads():
    words, contexts = side(seed=1), side(seed=2)
    rows, columns, counts = torch.tensor([3, 0, 3]), torch.tensor([2, 2, 1]), torch.tensor([0.5, 3.0, 25.0])
    parameter = torch.nn.Parameter(words.vectors.clone())
    optimizer = torch.optim.Adagrad([parameter], lr=0.05, eps=1e-10)
    for _ in range(2):
        _, gradient, _ = batch_gradient(words, contexts, rows, columns, counts, GloVeOptions())
        update_side(words, gradient, GloVeOptions(learning_rate=0.05))
        parameter.grad = torch.zeros_like(parameter).index_add(0, gradient.rows, gradient.vectors)
        optimizer.step()
    torch.testing.assert_close(words.vectors, parameter.data)
    assert torch.equal(words.vectors[1], side(seed=1).vectors[1])


def stanford_by_hand(tables, rows, columns, counts, *, x_max, alpha, eta):
    """The program's loop over single counts, in Python's own numbers: vectors, biases and their sums of squares of both sides."""
    w, b, w2, b2, c, d, c2, d2 = (tensor.double().tolist() for tensor in tables)
    for i, j, x in zip(rows, columns, counts, strict=True):
        error = sum(p * q for p, q in zip(w[i], c[j], strict=True)) + b[i] + d[j] - math.log(x)
        slope = error * min(1, x / x_max) ** alpha
        for k in range(len(w[i])):
            of_word = eta * max(-100, min(100, slope * c[j][k]))
            of_context = eta * max(-100, min(100, slope * w[i][k]))
            w[i][k] -= of_word / math.sqrt(w2[i][k])
            c[j][k] -= of_context / math.sqrt(c2[j][k])
            w2[i][k] += of_word**2
            c2[j][k] += of_context**2
        b[i] -= slope / math.sqrt(b2[i])
        d[j] -= slope / math.sqrt(d2[j])
        b2[i] += slope**2
        d2[j] += slope**2
    return [torch.tensor(values) for values in (w, b, w2, b2, c, d, c2, d2)]


def test_the_rule_of_the_program_by_hand():
    words, contexts = side(seed=1, start=1.0), side(seed=2, start=1.0)
    words.vectors[3] *= 60  # so that a gradient is cut
    rows, columns, counts = [3, 0, 3, 3, 5], [2, 2, 1, 2, 0], [0.5, 3.0, 25.0, 9.0, 10.0]
    options = GloVeOptions(x_max=10, learning_rate=0.05, batch_size=1, update="stanford")
    expected = stanford_by_hand((*words, *contexts), rows, columns, counts, x_max=10, alpha=0.75, eta=0.05)
    cut = 0
    for entry in zip(rows, columns, counts, strict=True):
        batch = (torch.tensor([entry[0]]), torch.tensor([entry[1]]), torch.tensor([entry[2]]))
        _, of_words, of_contexts = batch_gradient(words, contexts, *batch, options)
        cut += int((of_contexts.vectors.abs() == 100).sum())
        update_side(words, of_words, options)
        update_side(contexts, of_contexts, options)
    assert cut
    for tensor, wanted in zip((*words, *contexts), expected, strict=True):
        torch.testing.assert_close(tensor, wanted.float(), rtol=1e-4, atol=1e-4)


def test_vectors_of_the_program_begin_with_squares_of_one():
    first = glove._first_side(5, dataclasses.replace(OPTIONS, update="stanford"), "words")
    assert (first.vector_squares == 1).all() and (first.bias_squares == 1).all()
    assert first.vectors.abs().max() <= 1 / 16 < first.vectors.abs().max() * 1.5
    assert (glove._first_side(5, OPTIONS, "words").vector_squares == 0).all()
    # A word's first vector does not depend on how many words there are.
    assert torch.equal(
        glove._first_side(3, OPTIONS, "words").vectors, glove._first_side(5, OPTIONS, "words").vectors[:3]
    )
    assert not torch.equal(first.vectors, glove._first_side(5, OPTIONS, "contexts").vectors)


def test_the_cost_falls_in_each_epoch():
    costs = np.array(train_glove(random_counts(), dataclasses.replace(OPTIONS, epochs=12, dimensions=16)).costs)
    assert (np.diff(costs) < 0).all()
    assert costs[-1] < costs[0] / 4


def test_the_rule_of_the_program_learns():
    options = dataclasses.replace(OPTIONS, epochs=6, update="stanford", batch_size=1)
    costs = np.array(train_glove(random_counts(12), options).costs)
    # Biases without a learning rate are noisy, and so is the cost.
    assert costs[-1] < costs[0] / 3


def test_the_cost_is_the_mean_over_the_counts():
    cooccurrences = random_counts()
    options = dataclasses.replace(OPTIONS, epochs=1, learning_rate=1e-30)
    result = train_glove(cooccurrences, options)
    x = cooccurrences.values.astype(np.float64)
    products = (result.words[cooccurrences.rows] * result.contexts[cooccurrences.columns]).sum(1)
    error = products + result.biases[0][cooccurrences.rows] + result.biases[1][cooccurrences.columns] - np.log(x)
    expected = 0.5 * np.mean(np.minimum(1, x / 10) ** 0.75 * error**2)
    assert result.costs == (pytest.approx(expected, rel=1e-4),)


def test_the_optimum_is_the_logarithm_of_the_counts():
    matrix = np.exp(np.random.default_rng(0).normal(1, 1, (6, 6)))
    result = train_glove(counts_of(matrix), GloVeOptions(dimensions=8, epochs=600, batch_size=36, learning_rate=0.2))
    products = result.words @ result.contexts.T + result.biases[0][:, None] + result.biases[1]
    assert np.abs(products - np.log(matrix)).max() < 0.05


def test_two_topics_separate():
    topics = np.arange(24) // 12
    rng = np.random.default_rng(0)
    rates = np.where(topics[:, None] == topics, 20.0, 1.0)
    result = train_glove(counts_of(rng.poisson(rates) + 0.1), dataclasses.replace(OPTIONS, epochs=40))
    unit = result.vectors / np.linalg.norm(result.vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    same = topics[:, None] == topics
    off_diagonal = ~np.eye(24, dtype=bool)
    assert cosines[same & off_diagonal].mean() > cosines[~same].mean() + 0.5


def test_vectors_are_the_sums_of_both_sides():
    result = train_glove(random_counts(), OPTIONS)
    assert result.vectors.dtype == np.float32 and result.vectors.shape == (40, 8) and result.biases.shape == (2, 40)
    assert np.array_equal(result.vectors, result.words + result.contexts)
    assert not np.array_equal(result.words, result.contexts)


def read_all(cooccurrences, *, epoch, batch_size=100, seed=0):
    batches = list(entry_batches(cooccurrences, batch_size=batch_size, seed=seed, epoch=epoch))
    return batches, [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def numbered(num_entries):
    numbers = np.arange(num_entries)
    return SimpleNamespace(
        shape=(5000, 5000),
        rows=numbers.astype(np.int32),
        columns=(numbers + 7).astype(np.int32),
        values=(numbers + 1).astype(np.float64),
    )


@pytest.fixture()
def small_pools(monkeypatch):
    monkeypatch.setattr(glove, "_BLOCK", 16)
    monkeypatch.setattr(glove, "_POOL", 160)


@pytest.mark.parametrize("num_entries", [1, 16, 1003])
def test_each_count_comes_once_an_epoch(small_pools, num_entries):
    batches, (rows, columns, values) = read_all(numbered(num_entries), epoch=0)
    assert sorted(rows.tolist()) == list(range(num_entries))
    assert np.array_equal(columns, rows + 7) and np.array_equal(values, rows + 1) and values.dtype == np.float32
    assert all(len(batch[0]) <= 100 for batch in batches)


def test_the_order_is_mixed_over_blocks_and_within_them(small_pools):
    _, (first, *_) = read_all(numbered(1600), epoch=0)
    _, (again, *_) = read_all(numbered(1600), epoch=0)
    _, (second, *_) = read_all(numbered(1600), epoch=1)
    _, (other, *_) = read_all(numbered(1600), epoch=0, seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    # A pool holds blocks from everywhere, and neighbours in a block are apart.
    assert np.ptp(first[:160] // 16) > 50
    assert (np.abs(np.diff(first)) == 1).mean() < 0.02
    # The places within blocks say how a pool is mixed: differently in each pool and epoch.
    places = [part % 16 for part in (first[:160], first[160:320], second[:160])]
    assert not np.array_equal(places[0], places[1]) and not np.array_equal(places[0], places[2])


def test_memory_mapped_counts_give_the_same_bits(small_pools, tmp_path):
    cooccurrences = random_counts()
    mapped = {}
    for name in ("rows", "columns", "values"):
        np.save(tmp_path / f"{name}.npy", getattr(cooccurrences, name))
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    results = [train_glove(each, OPTIONS) for each in (cooccurrences, SimpleNamespace(shape=(40, 40), **mapped))]
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


def test_counts_of_a_corpus_on_disk_give_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    lines = [[f"{topic}{word}" for word in rng.integers(0, 9, 12)] for topic in "ab" * 60]
    corpus = WordCorpus.from_words([lines])
    counts = [
        count_cooccurrences(corpus, Window(size=4, weighting="harmonic"), **options)
        for options in ({}, {"max_entries": 1024, "folder": tmp_path})
    ]
    results = [train_glove(each, dataclasses.replace(OPTIONS, epochs=20)) for each in counts]
    assert np.array_equal(results[0].vectors, results[1].vectors)
    names = np.array([word[0] for word in corpus.vocabulary.words])
    unit = results[0].vectors / np.linalg.norm(results[0].vectors, axis=1, keepdims=True)
    same = names[:, None] == names
    assert (unit @ unit.T)[same].mean() > (unit @ unit.T)[~same].mean() + 0.5


def test_a_run_goes_on_with_the_same_bits(tmp_path):
    cooccurrences = random_counts()
    whole = train_glove(cooccurrences, OPTIONS)
    train_glove(cooccurrences, dataclasses.replace(OPTIONS, epochs=1), checkpoint_folder=tmp_path)
    resumed = train_glove(cooccurrences, OPTIONS, checkpoint_folder=tmp_path)
    for one, other in zip(whole, resumed, strict=True):
        assert np.array_equal(one, other)
    # All epochs are done: nothing changes.
    stored = (tmp_path / CHECKPOINT).read_bytes()
    assert np.array_equal(train_glove(cooccurrences, OPTIONS, checkpoint_folder=tmp_path).vectors, whole.vectors)
    assert (tmp_path / CHECKPOINT).read_bytes() == stored


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    cooccurrences = random_counts()
    train_glove(cooccurrences, OPTIONS, checkpoint_folder=tmp_path)
    with pytest.raises(InputError, match="seed=0, and this run has 1"):
        train_glove(cooccurrences, dataclasses.replace(OPTIONS, seed=1), checkpoint_folder=tmp_path)
    with pytest.raises(InputError, match=r"counts=\d+"):
        train_glove(random_counts(seed=1), OPTIONS, checkpoint_folder=tmp_path)
    with pytest.raises(InputError, match="epochs=1 are fewer than the 3"):
        train_glove(cooccurrences, dataclasses.replace(OPTIONS, epochs=1), checkpoint_folder=tmp_path)


def test_the_seed_decides():
    one, same, other = (
        train_glove(random_counts(), dataclasses.replace(OPTIONS, seed=seed)).vectors for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_counts_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="direction"):
        train_glove(SimpleNamespace(shape=(3, 6)), OPTIONS)
    with pytest.raises(InputError, match="no count"):
        train_glove(counts_of(np.zeros((3, 3))), OPTIONS)
    negative = random_counts()
    negative.values[5] = 0
    with pytest.raises(InputError, match="above 0"):
        train_glove(negative, OPTIONS)
    with pytest.raises(InputError, match="update='adam'"):
        GloVeOptions(update="adam")
    with pytest.raises(InputError, match="dimensions=0"):
        GloVeOptions(dimensions=0)


def test_a_cost_that_is_not_finite_ends_the_run(tmp_path):
    options = dataclasses.replace(OPTIONS, update="stanford", learning_rate=1e30, epochs=5)
    with pytest.raises(RunError, match="batch_size=64"):
        train_glove(random_counts(), options, checkpoint_folder=tmp_path)
