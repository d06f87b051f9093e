"""Skip-gram and CBOW: tables, draws, windows, checkpoints, and both backends against autograd."""

import heapq
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import logsigmoid

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, RunError
from hf_pretrain.vectors.corpus import WordCorpus
from hf_pretrain.vectors.word2vec import training
from hf_pretrain.vectors.word2vec.batches import TorchBackend, draw_noise
from hf_pretrain.vectors.word2vec.kernel import KernelBackend
from hf_pretrain.vectors.word2vec.tables import alias_table, huffman_codes, keep_probabilities, noise_distribution
from hf_pretrain.vectors.word2vec.training import StretchReader, Word2VecOptions, initial_state, train_word2vec


def made_up_corpus(num_words=20, num_lines=60, *, length=12, seed=0):
    """A corpus of words with Zipf's frequencies."""
    chosen = np.random.default_rng(seed).zipf(1.3, size=(num_lines, length)) % num_words
    return WordCorpus.from_words([[[f"w{word:02}" for word in line] for line in chosen]])


def one_line(size, *, num_words=4):
    """A corpus of one long line; only the attributes that training reads."""
    tokens = (np.arange(size) * 7919 % num_words).astype(np.int32)
    return SimpleNamespace(
        vocabulary=SimpleNamespace(words=tuple("abcdefgh"[:num_words]), counts=np.bincount(tokens), total=size),
        tokens=tokens,
        lines=np.array([0, size], dtype=np.int64),
    )


def table_of(counts, options):
    return (
        huffman_codes(counts) if options.hierarchical else alias_table(noise_distribution(counts, options.noise_power))
    )


def random_state(num_words, options, *, seed=1):
    rng, outputs = np.random.default_rng(seed), num_words - options.hierarchical
    return {
        name: rng.normal(size=(size, options.dimensions)).astype(np.float32)
        for name, size in (("inputs", num_words), ("outputs", outputs))
    }


def noise_words(table, key, numbers):
    """The noise of a centre by NumPy's draws."""
    bits = draws.bits(np.array([key], dtype=np.uint64), max(numbers) + 1)[0][list(numbers)]
    columns = ((bits >> np.uint64(32)) * np.uint64(len(table.thresholds)) >> np.uint64(32)).astype(int)
    low = (bits & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return np.where(low < table.thresholds[columns], columns, table.aliases[columns])


def reference(stretch, table, options, inputs, outputs):
    """The sum of the losses with torch's autograd, pair by pair; the mean of CBOW is in the graph."""
    total = torch.zeros((), dtype=torch.float64)
    for centre, key in enumerate(stretch.keys):
        place = stretch.first + centre
        neighbours = [
            other
            for other in range(place - stretch.before[centre], place + stretch.after[centre] + 1)
            if other != place
        ]
        target = int(stretch.words[place])
        if options.mode == "cbow":
            hidden = [inputs[stretch.words[neighbours].tolist()].mean(0)] if neighbours else []
        else:
            hidden = [inputs[int(stretch.words[other])] for other in neighbours]
        for other, vector in zip(neighbours, hidden, strict=False):
            if options.hierarchical:
                path = slice(table.offsets[target], table.offsets[target + 1])
                nodes, signs = table.nodes[path].tolist(), 1 - 2 * torch.tensor(table.bits[path])
            else:
                offset = other - place + options.window
                first = 0 if options.shared_negatives or options.mode == "cbow" else offset - (other > place)
                numbers = range(first * options.negatives, (first + 1) * options.negatives)
                noise = [word for word in noise_words(table, key, numbers).tolist() if word != target]
                nodes, signs = [target, *noise], torch.tensor([1] + [-1] * len(noise))
            total = total - logsigmoid(signs * (outputs[nodes] @ vector)).sum()
    return total


CASES = [
    {"mode": "skipgram"},
    {"mode": "skipgram", "shared_negatives": False},
    {"mode": "skipgram", "hierarchical": True},
    {"mode": "cbow"},
    {"mode": "cbow", "hierarchical": True},
]


def gradients_of(stretch, table, options, state):
    inputs, outputs = (torch.tensor(state[name], dtype=torch.float64, requires_grad=True) for name in state)
    loss = reference(stretch, table, options, inputs, outputs)
    loss.backward()
    return loss.item(), inputs.grad.numpy(), outputs.grad.numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_torch_has_the_gradients_of_autograd(case):
    corpus, options = made_up_corpus(), Word2VecOptions(dimensions=7, window=3, backend="torch", sample=0.05, **case)
    table, state = table_of(corpus.vocabulary.counts, options), random_state(20, options)
    stretch = StretchReader(corpus, options).stretch(1, 100, 160)
    backend = TorchBackend(state, table, options, pairs_per_word=4.0)
    found = backend.gradients(stretch)
    loss, inputs, outputs = gradients_of(stretch, table, options, state)
    for rows, steps, expected in (
        (found.input_rows, found.input_steps, inputs),
        (found.output_rows, found.output_steps, outputs),
    ):
        sums = torch.zeros(expected.shape).index_add_(0, rows, steps)
        np.testing.assert_allclose(sums, -expected, rtol=1e-3, atol=2e-5)
    assert float(found.loss) == pytest.approx(loss, rel=1e-5)
    # The step is that of torch's AdaGrad.
    parameters = [torch.nn.Parameter(torch.tensor(array)) for array in state.values()]
    for parameter, gradient in zip(parameters, (inputs, outputs), strict=True):
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
    torch.optim.Adagrad(parameters, lr=float(stretch.rates.mean()), eps=1e-10).step()
    learnt_loss, pairs = backend.learn(stretch)
    assert pairs == (stretch.before + stretch.after).sum() if options.mode == "skipgram" else len(stretch.keys)
    for name, parameter, gradient in zip(("inputs", "outputs"), parameters, (inputs, outputs), strict=True):
        clear = np.abs(gradient) > 1e-3
        np.testing.assert_allclose(backend.state()[name][clear], parameter.detach().numpy()[clear], atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_kernel_takes_the_step_of_autograd(case):
    corpus, rate = made_up_corpus(), 1e-2
    options = Word2VecOptions(dimensions=7, window=3, learning_rate=rate, sample=0.05, **case)
    table, state = table_of(corpus.vocabulary.counts, options), random_state(20, options)
    # One centre: the steps of several are taken one after the other. Without sharing so are those of its pairs.
    for begin in range(100, 110):
        stretch = StretchReader(corpus, options).stretch(0, begin, begin + 1)
        if case.get("shared_negatives") is False:
            stretch = stretch._replace(after=np.minimum(stretch.after, 1), before=stretch.before * 0)
        stretch = stretch._replace(rates=np.full_like(stretch.rates, rate))
        backend = KernelBackend(
            {name: array.copy() for name, array in state.items()}, table, options, is_compiled=False
        )
        with np.errstate(over="ignore"):
            found, pairs = backend.learn(stretch)
        loss, inputs, outputs = gradients_of(stretch, table, options, state) if pairs else (0.0, 0, 0)
        np.testing.assert_allclose(backend.inputs - state["inputs"], -rate * inputs, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(backend.outputs - state["outputs"], -rate * outputs, rtol=1e-3, atol=1e-6)
        assert found == pytest.approx(loss, rel=1e-4)


def test_the_gradient_of_word2vec_is_not_divided():
    corpus, results = made_up_corpus(), []
    stretch = StretchReader(corpus, Word2VecOptions(window=3, sample=0)).stretch(0, 101, 102)
    size = int(stretch.before[0] + stretch.after[0])
    assert size > 1
    for gradient in ("mean", "word2vec"):
        options = Word2VecOptions(mode="cbow", dimensions=7, window=3, cbow_gradient=gradient)
        table, state = table_of(corpus.vocabulary.counts, options), random_state(20, options)
        backend = KernelBackend(
            {name: array.copy() for name, array in state.items()}, table, options, is_compiled=False
        )
        with np.errstate(over="ignore"):
            backend.learn(stretch)
        torch_backend = TorchBackend(state, table, options, pairs_per_word=4.0)
        results.append((backend.inputs - state["inputs"], torch_backend.gradients(stretch).input_steps.numpy()))
    for divided, whole in zip(*results, strict=True):
        assert np.abs(divided).max() > 0
        np.testing.assert_allclose(divided * size, whole, rtol=1e-2, atol=1e-6)


def test_huffman_codes_are_prefix_free_and_of_least_length():
    counts = np.random.default_rng(0).zipf(1.5, size=300)
    codes = huffman_codes(counts)
    words = ["".join(map(str, codes.bits[codes.offsets[w] : codes.offsets[w + 1]])) for w in range(len(counts))]
    ordered = sorted(words)
    assert not any(after.startswith(before) for before, after in zip(ordered, ordered[1:], strict=False))
    heap, least = counts.tolist(), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        weight = heapq.heappop(heap) + heapq.heappop(heap)
        least += weight
        heapq.heappush(heap, weight)
    assert int((counts * np.diff(codes.offsets)).sum()) == least
    # A node says the same about the words under it, whatever word is asked.
    prefixes = {}
    for word, code in enumerate(words):
        for depth, node in enumerate(codes.nodes[codes.offsets[word] : codes.offsets[word + 1]]):
            assert prefixes.setdefault(int(node), code[:depth]) == code[:depth]
    assert len(prefixes) == len(set(prefixes.values())) == len(counts) - 1


def test_probabilities_by_formula():
    counts = np.array([500, 300, 150, 50])
    ratio = 1e-2 / (counts / 1000)
    np.testing.assert_allclose(keep_probabilities(counts, 1000, 1e-2), np.minimum(1, np.sqrt(ratio) + ratio))
    np.testing.assert_array_equal(keep_probabilities(counts, 1000, 0), 1)
    expected = counts**0.75 / (counts**0.75).sum()
    np.testing.assert_allclose(noise_distribution(counts, 0.75), expected)
    table = alias_table(expected)
    own = table.thresholds / 2**32 / 4
    implied = own + np.bincount(table.aliases, 1 / 4 - own, minlength=4)
    np.testing.assert_allclose(implied, expected, atol=1e-9)


def test_probabilities_are_those_of_gensim():
    models = pytest.importorskip("gensim.models")
    counts = np.array([5000, 900, 300, 80, 20])
    model = models.Word2Vec(min_count=1, sample=1e-3)
    model.build_vocab_from_freq({f"w{word}": int(count) for word, count in enumerate(counts)})
    keep = [model.wv.get_vecattr(f"w{word}", "sample_int") / 2**32 for word in range(5)]
    np.testing.assert_allclose(np.minimum(1, keep), keep_probabilities(counts, counts.sum(), 1e-3), atol=1e-6)
    noise = np.diff(model.cum_table, prepend=0) / model.cum_table[-1]
    np.testing.assert_allclose(noise, noise_distribution(counts, 0.75), atol=1e-6)


def test_draws_have_their_distributions():
    options = Word2VecOptions(window=4, sample=0.02, backend="torch")
    corpus = one_line(80_000)
    reader = StretchReader(corpus, options)
    stretch = reader.stretch(0, 0, 80_000)
    kept, keep = np.bincount(stretch.words, minlength=4), keep_probabilities(corpus.vocabulary.counts, 80_000, 0.02)
    sizes = corpus.vocabulary.counts
    assert (keep < 1).all() and chisquare(
        [*kept, *(sizes - kept)], [*sizes * keep, *sizes * (1 - keep)], ddof=3
    ).pvalue > 1e-3
    spans = np.bincount(stretch.before[4:], minlength=5)[1:]
    assert chisquare(spans).pvalue > 1e-3
    # A pair at distance d is in the window with probability (w - d + 1) / w.
    share = [(stretch.after[:-4] >= distance).mean() for distance in (1, 2, 3, 4)]
    np.testing.assert_allclose(share, [1, 0.75, 0.5, 0.25], atol=0.01)
    table = alias_table(np.array([0.6, 0.25, 0.1, 0.05]))
    keys = torch.from_numpy(stretch.keys.view(np.int64))[:20_000, None]
    noise = draw_noise(keys, torch.arange(5), *(torch.from_numpy(column.astype(np.int64)) for column in table))
    found = np.bincount(noise.flatten())
    assert chisquare(found, noise.numel() * np.array([0.6, 0.25, 0.1, 0.05])).pvalue > 1e-3
    np.testing.assert_array_equal(noise[7], noise_words(table, stretch.keys[7], range(5)))
    # Other epochs and seeds have other draws.
    assert not np.array_equal(stretch.keys[:9], reader.stretch(1, 0, 80_000).keys[:9])


def test_a_stretch_is_a_part_of_the_whole():
    corpus = made_up_corpus(num_lines=5, length=40)
    reader = StretchReader(corpus, Word2VecOptions(window=3, sample=0.02))
    whole = reader.stretch(2, 0, 200)
    assert len(whole.keys) < 170

    def windows(stretch):
        return [
            (int(key), stretch.words[place - before : place + after + 1].tolist(), before, float(rate))
            for place, (key, before, after, rate) in enumerate(
                zip(stretch.keys, stretch.before.tolist(), stretch.after.tolist(), stretch.rates, strict=True),
                start=stretch.first,
            )
        ]

    for step in (1, 7, 40, 64):
        parts = [reader.stretch(2, begin, min(begin + step, 200)) for begin in range(0, 200, step)]
        assert sum(map(windows, parts), []) == windows(whole)


def test_windows_do_not_cross_lines():
    corpus = WordCorpus.from_words([[["a", "b"], ["c", "d"]] * 30])
    stretch = StretchReader(corpus, Word2VecOptions(sample=0)).stretch(0, 0, 120)
    assert stretch.before.tolist() == [0, 1] * 60 and stretch.after.tolist() == [1, 0] * 60


def test_the_learning_rate_falls_over_all_epochs():
    reader = StretchReader(made_up_corpus(), Word2VecOptions(learning_rate=0.5, epochs=3, sample=0))
    assert len(reader.tokens) == 720
    rates = np.concatenate([reader.stretch(epoch, 0, 720).rates for epoch in range(3)])
    np.testing.assert_allclose(rates, 0.5 * (1 - np.arange(2160) / 2160), rtol=1e-6)
    floor = StretchReader(made_up_corpus(), Word2VecOptions(learning_rate=0.5, epochs=1, min_learning_rate_share=0.3))
    assert floor.learning_rates(0, np.array([719]))[0] == pytest.approx(0.15)


def test_noise_equal_to_the_target_is_left_out():
    corpus = made_up_corpus()
    options = Word2VecOptions(dimensions=4, window=1, noise_power=0.75, backend="torch")
    table = alias_table(np.eye(20)[3])
    tokens = np.array([3, 5, 3], dtype=np.int32)
    corpus = SimpleNamespace(vocabulary=corpus.vocabulary, tokens=tokens, lines=np.array([0, 3]))
    reader = StretchReader(corpus, Word2VecOptions(window=1, sample=0))
    state = initial_state(20, 20, options)
    stretch = reader.stretch(0, 0, 1)
    backend = TorchBackend(state, table, options, pairs_per_word=1.0)
    assert float(backend.gradients(stretch).loss) == pytest.approx(np.log(2))
    kernel = KernelBackend(state, table, options, is_compiled=False)
    with np.errstate(over="ignore"):
        assert kernel.learn(stretch)[0] == pytest.approx(np.log(2))
        assert kernel.learn(reader.stretch(0, 1, 2))[0] == pytest.approx(12 * np.log(2), rel=1e-2)


def test_initial_vectors_do_not_depend_on_the_size_of_a_part(monkeypatch):
    options = Word2VecOptions(dimensions=8)
    whole = initial_state(50, 50, options)
    assert np.abs(whole["inputs"]).max() <= 0.5 / 8 and whole["inputs"].std() == pytest.approx(
        1 / 8 / np.sqrt(12), rel=0.1
    )
    assert not whole["outputs"].any()
    monkeypatch.setattr(training, "_ROWS", 7)
    np.testing.assert_array_equal(initial_state(50, 50, options)["inputs"], whole["inputs"])


@pytest.mark.parametrize("case", [{}, {"mode": "cbow", "hierarchical": True}], ids=["skipgram", "cbow"])
def test_a_resumed_run_equals_an_uninterrupted_one(case, tmp_path, monkeypatch):
    corpus = made_up_corpus()
    options = Word2VecOptions(dimensions=8, backend="torch", batch_size=300, epochs=3, **case)
    whole = train_word2vec(corpus, options, progress=False)
    repeated = train_word2vec(corpus, options, progress=False)
    np.testing.assert_array_equal(whole.vectors, repeated.vectors)
    save = training._Run.save

    def save_and_stop(run, *args):
        save(run, *args)
        if (run.epoch, run.position > 0) == (1, True):
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_word2vec(corpus, options, checkpoint_folder=tmp_path, checkpoint_words=100, progress=False)
    monkeypatch.setattr(training._Run, "save", save)
    (checkpoint,) = tmp_path.iterdir()
    # What was being written when a run stopped is passed over.
    (tmp_path / "word2vec-00002-000000000000000").mkdir()
    resumed = train_word2vec(corpus, options, checkpoint_folder=tmp_path, checkpoint_words=100, progress=False)
    np.testing.assert_array_equal(resumed.vectors, whole.vectors)
    np.testing.assert_array_equal(resumed.outputs, whole.outputs)
    assert resumed.loss == whole.loss and not checkpoint.exists()
    with pytest.raises(InputError, match="with seed=0, not 1"):
        train_word2vec(corpus, Word2VecOptions(**{**options.__dict__, "seed": 1}), checkpoint_folder=tmp_path)
    with pytest.raises(InputError, match="with corpus="):
        train_word2vec(made_up_corpus(seed=1), options, checkpoint_folder=tmp_path)


def test_skipgram_finds_shifted_pmi():
    # At full rank the optimum of w . c is PMI - ln k, with the noise's distribution (Levy and Goldberg 2014, section 3.1).
    rng, k = np.random.default_rng(0), 2
    joint = rng.dirichlet(np.full(16, 4.0)).reshape(4, 4)
    joint = (joint + joint.T) / 2
    pairs = rng.choice(16, size=3000, p=joint.flatten())
    corpus = WordCorpus.from_words([[["abcd"[pair // 4], "abcd"[pair % 4]] for pair in pairs]])
    options = Word2VecOptions(
        dimensions=4,
        window=1,
        negatives=k,
        sample=0,
        noise_power=1,
        epochs=60,
        learning_rate=0.3,
        backend="torch",
        batch_size=1500,
    )
    result = train_word2vec(corpus, options, progress=False)
    counts = np.zeros((4, 4))
    np.add.at(counts, (corpus.tokens[::2], corpus.tokens[1::2]), 1)
    counts += counts.T
    share = counts.sum(1) / counts.sum()
    # Noise equal to the target is left out: a pair draws the noise of the input's other pairs alone.
    joint = counts / counts.sum()
    expected = np.log(joint / (k * share * (share[:, None] - joint)))
    np.testing.assert_allclose(result.vectors @ result.outputs.T, expected, atol=0.1)


@pytest.mark.parametrize("mode", ["skipgram", "cbow"])
@pytest.mark.parametrize("hierarchical", [False, True], ids=["negatives", "tree"])
def test_words_of_a_topic_are_neighbours(mode, hierarchical):
    rng = np.random.default_rng(0)
    lines = [[f"{topic}{word}" for word in rng.integers(10, size=12)] for topic in "ab" * 150]
    corpus = WordCorpus.from_words([lines])
    options = Word2VecOptions(
        mode=mode, hierarchical=hierarchical, dimensions=16, sample=0, epochs=4, backend="torch", batch_size=2000
    )
    result = train_word2vec(corpus, options, progress=False)
    topics = np.array([word[0] for word in corpus.vocabulary.words])
    start = initial_state(20, 20 - hierarchical, options)["inputs"]
    shares = []
    for vectors in (start, result.vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        nearest = np.argsort(-(unit @ unit.T), axis=1)[:, 1:6]
        shares.append((topics[nearest] == topics[:, None]).mean())
    assert shares[0] < 0.7 and shares[1] > 0.95
    assert result.loss[-1][1] < result.loss[0][1] and result.loss[-1][0] == 4 * 3600


def test_a_large_batch_stays_finite():
    corpus = one_line(60_000, num_words=8)
    options = Word2VecOptions(dimensions=8, epochs=3, sample=0, backend="torch")
    assert options.batch_size == 65_536
    result = train_word2vec(corpus, options, progress=False)
    assert np.isfinite(result.vectors).all() and np.abs(result.vectors).max() < 10


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="mode='glove' must be one of skipgram, cbow"):
        Word2VecOptions(mode="glove")
    with pytest.raises(InputError, match="negatives=0"):
        Word2VecOptions(negatives=0)
    with pytest.raises(InputError, match="corpus has 1 known words"):
        train_word2vec(WordCorpus.from_words([[["a", "a"]]]), Word2VecOptions())
    with pytest.raises(RunError, match="not finite after 7 words"):
        training._Run().record(float("nan"), 1, seen=7, total=9)


def test_numba_is_asked_for_only_where_it_can_be(monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    assert Word2VecOptions().used_backend == "torch" and Word2VecOptions().initial_learning_rate == 0.1
    with pytest.raises(InputError, match="pip install"):
        Word2VecOptions(backend="numba").used_backend  # noqa: B018
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: object())
    assert Word2VecOptions().used_backend == "numba" and Word2VecOptions(device="cuda").used_backend == "torch"
    rates = [
        Word2VecOptions(mode=mode, cbow_gradient=gradient).initial_learning_rate
        for mode, gradient in (("skipgram", "mean"), ("cbow", "mean"), ("cbow", "word2vec"))
    ]
    assert rates == [0.025, 0.15, 0.05]
    with pytest.raises(InputError, match="runs on the CPU"):
        Word2VecOptions(backend="numba", device="cuda").used_backend  # noqa: B018
