"""Views of documents: each text is a range of its document, drawn by seed, epoch and example alone."""

import pickle

import datasets
import numpy as np
import pytest

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES, tokenize_documents
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.examples import views
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.data.examples.pairing import SentenceIndex
from hf_pretrain.data.examples.views import TextViewDataset, draw_partners, find_middles, join_short
from hf_pretrain.errors import InputError

CLS, SEP = 2, 3
FIRST_ID = 100  # A token's id tells its position.
VIEWS = ["same", "single", "neighbours", "spans", "ict", "title", "ngram"]
OF_UNITS = ["same", "single", "neighbours", "ngram"]
PAIRED = ["neighbours", "spans", "ict", "title"]


def to_documents(corpus, *, word_share=0.6, at=0):
    """Documents given by their sentences' lengths, whose tokens count from FIRST_ID over all of them."""
    columns = {name: [] for name in DOCUMENT_FEATURES}
    at += FIRST_ID
    for doc_id, lengths in enumerate(corpus):
        starts = np.concatenate([np.arange(length) == 0 for length in lengths]) if lengths else np.zeros(0, bool)
        words = starts | (draws.uniforms(draws.row_keys([doc_id], seed=0), len(starts))[0] < word_share)
        row = {"input_ids": np.arange(at, at + len(starts)), "word_starts": words, "sent_starts": starts}
        for name, value in (row | {"doc_id": doc_id}).items():
            columns[name].append(value)
        at += len(starts)
    return datasets.Dataset.from_dict(columns, features=DOCUMENT_FEATURES)


def a_corpus(*, documents=40, sentences=9, tokens=12, seed=3):
    """Keyed documents of 1 to `sentences` sentences of 1 to `tokens` tokens."""
    keys = draws.row_keys(range(documents), seed=seed, stream="view_corpus")
    counts = 1 + draws.integers(keys, 1, high=sentences)[:, 0]
    lengths = 1 + draws.integers(keys ^ np.uint64(1), sentences, high=tokens)
    return [row[:count].tolist() for row, count in zip(lengths, counts, strict=True)]


def make_views(corpus, *, word_share=0.6, **options):
    documents = to_documents(corpus, word_share=word_share)
    return TextViewDataset(documents, tokenizer=tiny_tokenizer(), **({"block_size": 32} | options))


def epoch_of(dataset, epoch=0):
    return [dataset[epoch * EPOCH_STRIDE + row] for row in range(len(dataset))]


def positions(text):
    """Positions of the tokens of a text that stands alone."""
    ids = text["input_ids"]
    assert ids[0] == CLS and ids[-1] == SEP and ids.dtype == np.int32
    assert len(text["word_starts"]) == len(ids) and text["word_starts"][[0, 1, -1]].all()
    return ids[1:-1] - FIRST_ID


def sides(text):
    """Positions of the tokens of the two sides of a pair."""
    ids, types = text["input_ids"], text["token_type_ids"]
    middle, end = np.flatnonzero(ids == SEP)
    assert ids[0] == CLS and end == len(ids) - 1 and types.dtype == np.int64
    assert types.tolist() == [0] * (middle + 1) + [1] * (end - middle)
    return ids[1:middle] - FIRST_ID, ids[middle + 1 : end] - FIRST_ID


def is_range(tokens):
    return len(tokens) > 0 and np.array_equal(tokens, np.arange(tokens[0], tokens[-1] + 1))


def plain(value):
    """An example as lists, to compare."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


class TestEveryView:
    @pytest.mark.parametrize(
        ("view", "scorer"), [*((view, "bi") for view in VIEWS), *((view, "cross") for view in PAIRED)]
    )
    def test_draws_are_keyed(self, view, scorer):
        """By seed, epoch and example: not by the order, the process, or what was read before."""
        corpus = a_corpus(tokens=60, documents=12)
        dataset = make_views(corpus, view=view, scorer=scorer, seed=5)
        first, second = epoch_of(dataset), epoch_of(dataset, 1)
        again = pickle.loads(pickle.dumps(dataset))
        assert "_layout" not in vars(pickle.loads(pickle.dumps(dataset)))
        rows = draws.permutation(len(dataset), seed=1).tolist()
        assert plain([again[EPOCH_STRIDE + row] for row in rows]) == plain([second[row] for row in rows])
        assert plain(again.__getitems__(rows)) == plain([first[row] for row in rows])
        assert plain(first) != plain([example | {"epoch": 0} for example in second])
        other = make_views(corpus, view=view, scorer=scorer, seed=6)
        assert plain(epoch_of(other)) != plain(first)
        static = make_views(corpus, view=view, scorer=scorer, seed=5, static_epochs=1)
        assert plain(epoch_of(static, 1)) == plain([example | {"epoch": 1} for example in first])

    @pytest.mark.parametrize("block_size", [5, 32, 200])
    @pytest.mark.parametrize(
        ("view", "unit"),
        [*((view, None) for view in VIEWS), *((view, unit) for view in OF_UNITS for unit in ("sentence", "block"))],
    )
    def test_texts_are_of_their_document_and_fit(self, view, block_size, unit):
        corpus = [[1], [], *a_corpus(tokens=50, documents=9), [], [2, 1, 1, 1], [150, 150], [150, 150]]
        documents = to_documents(corpus)
        store = TokenStore(documents)
        words = store.read(0, store.num_tokens)[1]
        dataset = TextViewDataset(
            documents, tokenizer=tiny_tokenizer(), view=view, text_unit=unit, block_size=block_size
        )
        assert dataset.num_tokens == store.num_tokens and f"view={view!r}" in repr(dataset)
        for epoch in (0, 1):
            last = 0
            for example in epoch_of(dataset, epoch):
                low, high = store.begins[example["document"] : example["document"] + 2]
                assert len(example["texts"]) == (1 if view == "single" else 2)
                for text in example["texts"]:
                    tokens = positions(text)
                    assert len(text["input_ids"]) <= block_size
                    assert low <= tokens.min() and tokens.max() < high
                    assert is_range(tokens) or (view == "ict" and text is example["texts"][1])
                    seams = np.flatnonzero(np.diff(tokens, prepend=-9) != 1)
                    expected = words[tokens].copy()
                    expected[seams] = True
                    assert text["word_starts"][1:-1].tolist() == expected.tolist()
                assert example["document"] >= last
                last = example["document"]

    def test_is_an_epoch_dataset(self):
        dataset = make_views(a_corpus())
        assert EpochDataset.wrap(dataset) is dataset
        example = dataset[2 * EPOCH_STRIDE + 3 + (8 << 64)]
        assert (example["example_id"], example["epoch"], example["order_index"]) == (3, 2, 7)
        for index in (-1, len(dataset)):
            with pytest.raises(IndexError):
                dataset[index]


class TestUnits:
    @pytest.mark.parametrize("view", ["same", "single", "neighbours"])
    @pytest.mark.parametrize("unit", ["sentence", "block"])
    def test_each_is_the_anchor_once(self, view, unit):
        corpus = a_corpus(documents=60)
        dataset = make_views(corpus, view=view, text_unit=unit)
        for epoch in (0, 1):
            seen = np.concatenate([positions(example["texts"][0]) for example in epoch_of(dataset, epoch)])
            skipped = set()
            if view == "neighbours":
                bounds = np.cumsum([0, *map(sum, corpus)])
                used = {example["document"] for example in epoch_of(dataset, epoch)}
                skipped = {t for d in range(60) if d not in used for t in range(bounds[d], bounds[d + 1])}
                assert 0 < len(skipped) < 0.5 * bounds[-1]
            assert sorted([*seen.tolist(), *skipped]) == list(range(sum(map(sum, corpus))))

    def test_blocks_are_as_many_whole_sentences_as_fit(self):
        dataset = make_views([[10, 10, 9, 2], [40, 3], [5]], view="single", text_unit="block")  # a room of 30
        found = [(int(tokens[0]), len(tokens)) for tokens in (positions(e["texts"][0]) for e in epoch_of(dataset))]
        assert found == [(0, 29), (29, 2), (31, 29), (60, 14), (74, 5)]  # a long sentence is cut before a word

    def test_short_sentences_are_joined(self):
        """With the next of their document, or the one before at its end; until there are enough tokens."""
        for lengths, expected in (
            ([1, 9, 3, 8], [10, 11]),
            ([9, 1], [10]),
            ([1, 1, 1, 1, 1, 9, 4], [4, 10, 4]),
            ([5, 2, 5, 1, 1], [5, 9]),
            ([1, 1], [2]),
            ([1], [1]),
            ([6, 1, 1, 1], [9]),
            ([3, 3, 6, 2, 2], [6, 6, 4]),
            ([6, 3, 1, 3], [6, 7]),
        ):
            # Short sentences of neighbouring documents have nothing to do with each other.
            sentences = SentenceIndex.of(TokenStore(to_documents([[2, 1], lengths, [1], [2, 2]])))
            units = join_short(sentences, least=4)
            assert np.diff(units.starts).tolist() == [3, *expected, 1, 4]
            assert np.diff(units.documents).tolist() == [1, len(expected), 1, 1]

    def test_a_long_sentence_is_cut_at_words_and_read_to_its_end_in_time(self):
        dataset = make_views([[300], [8]], view="same", block_size=12)
        assert len(dataset) == 2
        seen = np.concatenate([positions(dataset[epoch * EPOCH_STRIDE]["texts"][0]) for epoch in range(200)])
        counts = np.bincount(seen, minlength=300)
        assert len(seen) == 2000 and counts[:15].sum() > 20 and counts[270:].sum() > 40
        first, second = dataset[0]["texts"]
        assert plain(first) == plain(second)


def test_held_out_halves_join_to_the_text():
    corpus = [*a_corpus(tokens=60), [1], [1]]
    # A document whose only word is long.
    long = to_documents([[9]], word_share=0, at=sum(map(sum, corpus)))
    documents = datasets.concatenate_datasets([to_documents(corpus), long])
    options = {"tokenizer": tiny_tokenizer(), "block_size": 32}
    for unit in ("sentence", "block"):
        train = TextViewDataset(documents, view="same", text_unit=unit, **options)
        held_out = TextViewDataset(documents, view="same", text_unit=unit, held_out=True, **options)
        whole = {tuple(positions(example["texts"][0])[:1]): example for example in epoch_of(train)}
        words = train.store.read(0, train.store.num_tokens)[1]
        starts, skipped = set(), 0
        for example in epoch_of(held_out):
            first, second = map(positions, example["texts"])
            assert is_range(np.concatenate([first, second])) and words[second[0]]
            text = np.arange(first[0], second[-1] + 1)
            inner = text[1:][words[text[1:]]]
            middle = text[0] + len(text) // 2
            assert abs(second[0] - middle) == np.abs(inner - middle).min()
            starts.add((int(text[0]),))
            if len(text) < 30:
                assert np.array_equal(text, positions(whole[(text[0],)]["texts"][0]))
                assert whole[(text[0],)]["document"] == example["document"]
        for start, example in whole.items():
            text = positions(example["texts"][0])
            if start not in starts and len(text) < 30:
                skipped += 1
                assert not words[text[1:]].any(), "only texts of one word are left out"
        assert skipped >= 3
        assert plain(epoch_of(held_out, 3)) == plain([example | {"epoch": 3} for example in epoch_of(held_out)])


def test_middles_do_not_depend_on_windows(monkeypatch):
    store = TokenStore(to_documents(a_corpus(), word_share=0.2))
    starts = SentenceIndex.of(store).starts
    whole = find_middles(store, starts[:-1], starts[1:])
    monkeypatch.setattr(views, "_WINDOW_TOKENS", 15)
    assert np.array_equal(find_middles(store, starts[:-1], starts[1:]), whole)
    assert (whole == -1).any() and (whole > 0).any()


def test_neighbours_follow_each_other_in_their_document():
    corpus = a_corpus(documents=80)
    dataset = make_views(corpus, view="neighbours", block_size=64)
    bounds = np.cumsum([0, *map(sum, corpus)])
    behind, inner = 0, 0
    for example in epoch_of(dataset):
        anchor, other = map(positions, example["texts"])
        assert anchor[-1] + 1 == other[0] or other[-1] + 1 == anchor[0]
        low, high = bounds[example["document"] : example["document"] + 2]
        if low < anchor[0] and anchor[-1] + 1 < high:
            behind, inner = behind + (anchor[0] < other[0]), inner + 1
    assert behind / inner == pytest.approx(0.5, abs=0.1) and inner > 100


class TestSpans:
    def test_lengths_are_beta_and_the_partner_touches_the_anchor(self):
        corpus = [[20] * 50] * 60
        dataset = make_views(corpus, view="spans", block_size=102, shortest_span=20, word_share=1.0)
        assert len(dataset) == 60 * (1000 // 102)
        lengths, gaps, starts = [], [], []
        for epoch in range(6):
            for example in epoch_of(dataset, epoch):
                anchor, other = map(positions, example["texts"])
                assert other[0] <= anchor[-1] + 1 and anchor[0] <= other[-1] + 1
                lengths.append((len(anchor), len(other)))
                starts.append(anchor[0] % 1000 / (1000 - len(anchor)))
                gaps.append((other[0] - anchor[0] + len(other)) / (len(anchor) + len(other)))
        lengths, gaps = np.array(lengths), np.array(gaps)
        assert lengths.min() >= 20 and lengths.max() <= 100
        shares = (lengths - 20) / 80
        # Mean and variance of Beta(4, 2) and Beta(2, 4).
        assert shares.mean(0) == pytest.approx([2 / 3, 1 / 3], abs=0.015)
        assert shares.var(0) == pytest.approx([8 / 252, 8 / 252], rel=0.1)
        assert np.corrcoef(shares.T)[0, 1] == pytest.approx(0, abs=0.06)
        # The anchor is anywhere, and the partner anywhere beside it: from adjacent in front to adjacent behind.
        for values in (np.array(starts), gaps):
            assert values.mean() == pytest.approx(0.5, abs=0.02) and values.var() == pytest.approx(1 / 12, rel=0.1)
        assert gaps.min() < 0.02 and gaps.max() > 0.98

    def test_short_documents_give_halves_and_one_word_gives_nothing(self):
        documents = datasets.concatenate_datasets(
            [to_documents([[6, 5], [70, 70]]), to_documents([[11]], word_share=0), to_documents([[39]])]
        )
        dataset = TextViewDataset(documents, tokenizer=tiny_tokenizer(), view="spans", block_size=32, shortest_span=20)
        examples = epoch_of(dataset)
        assert [example["document"] for example in examples] == [0, 1, 1, 1, 1, 3]
        for example in (examples[0], examples[-1]):
            assert is_range(np.concatenate([*map(positions, example["texts"])]))
        halves = [len(positions(text)) for text in examples[0]["texts"]]
        assert sum(halves) == 11 and abs(halves[0] - halves[1]) <= 5
        for example in examples[1:-1]:
            assert all(20 <= len(positions(text)) <= 30 for text in example["texts"])

    def test_a_document_of_one_long_word_still_gives_spans(self):
        documents = datasets.concatenate_datasets([to_documents([[300]], word_share=0), to_documents([[300]])])
        dataset = TextViewDataset(documents, tokenizer=tiny_tokenizer(), view="spans", block_size=32)
        for example in epoch_of(dataset):
            assert all(len(positions(text)) >= 7 for text in example["texts"])


class TestContext:
    def test_context_and_sentence_are_a_block_of_whole_sentences(self):
        corpus = a_corpus(documents=200, sentences=12, tokens=10)
        dataset = make_views(corpus, view="ict", block_size=42)
        bounds = set(np.cumsum([0, *(length for lengths in corpus for length in lengths)]).tolist())
        kept, full, fronts = 0, 0, []
        for example in epoch_of(dataset):
            anchor, context = map(positions, example["texts"])
            assert {int(anchor[0]), int(anchor[-1]) + 1} <= bounds
            block = np.unique(np.concatenate([anchor, context]))
            assert is_range(block) and {int(block[0]), int(block[-1]) + 1} <= bounds
            overlap = np.intersect1d(anchor, context)
            assert len(overlap) in (0, len(anchor)) and len(context) > len(overlap)
            kept += len(overlap) > 0
            full += len(context) > 28
            if len(np.setdiff1d(block, anchor)) > 28:
                fronts.append((anchor[0] - block[0]) / (len(block) - len(anchor)))
        assert kept / len(dataset) == pytest.approx(0.1, abs=0.02)
        low = sum(max(sum(lengths) for lengths in corpus) < 40 for _ in corpus)
        assert low == 0 and full > 0.5 * len(dataset), "contexts fill their room where there is text"
        assert len(fronts) > 300 and np.std(fronts) > 0.25

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_the_share_that_is_kept_is_an_option(self, share):
        dataset = make_views([[5, 6, 7]] * 30, view="ict", ict_keep_probability=share)
        for example in epoch_of(dataset):
            anchor, context = map(positions, example["texts"])
            assert np.isin(anchor, context).all() == bool(share) and is_range(context) | (not share)

    def test_a_neighbour_that_is_too_long_gives_its_next_part(self):
        dataset = make_views([[80, 6, 80]] * 30, view="ict", ict_keep_probability=1.0)
        found = set()
        for example in epoch_of(dataset):
            anchor, context = map(positions, example["texts"])
            at = anchor[0] % 166
            if at == 80:
                assert is_range(context)
                if context[0] % 166 == 86:
                    found.add("behind")
                    assert len(context) == 30
                else:
                    found.add("in front")
                    assert context[-1] + 1 == anchor[0] and 20 <= len(context) <= 30
            else:
                assert len(anchor) == 30 and not set(anchor) & set(context)
        assert found == {"behind", "in front"}

    def test_lone_sentences_give_nothing(self):
        dataset = make_views([[9], [5, 5], [2, 5], [6, 7, 8]], view="ict")
        assert [example["document"] for example in epoch_of(dataset)] == [1, 1, 3, 3, 3]


def test_titles_and_any_block_of_the_rest():
    corpus = [[2, *[7] * 20], [9], [40, 3], [4, 50]]
    dataset = make_views(corpus, view="title", block_size=32)  # a room of 30, four sentences of seven
    begins = []
    for epoch in range(300):
        first, second, third = epoch_of(dataset, epoch)
        assert [example["document"] for example in (first, second, third)] == [0, 2, 3]
        title, block = map(positions, first["texts"])
        assert title.tolist() == [0, 1] and len(block) == 28 and (block[0] - 2) % 7 == 0
        begins.append((block[0] - 2) // 7)
        assert [positions(text).tolist() for text in second["texts"]] == [
            list(range(151, 181)),
            list(range(191, 194)),
        ]
        assert positions(third["texts"][1]).tolist() == list(range(198, 228))
    counts = np.bincount(begins, minlength=16)
    # From 140 tokens on 30 are full up to the sentence that begins at 110: those with the numbers 0 to 15.
    assert len(counts) == 16 and counts.min() > 5 and counts.max() < 45


class TestNgrams:
    @pytest.mark.parametrize("unit", [None, "sentence"])
    def test_lengths_are_rounded_normal_draws(self, unit):
        dataset = make_views([[30] * 20] * 30, view="ngram", text_unit=unit, block_size=128)
        lengths, places = [], []
        words = dataset.store.read(0, dataset.store.num_tokens)[1]
        for epoch in range(32 if unit is None else 8):
            for example in epoch_of(dataset, epoch):
                begin, end = example["ngram"]
                text, ngram = (entry["input_ids"] for entry in example["texts"])
                assert text[begin:end].tolist() == ngram[1:-1].tolist()
                assert words[ngram[1] - FIRST_ID]
                lengths.append(end - begin)
                places.append((begin - 1) / (len(text) - 2 - (end - begin)))
        assert len(lengths) == 4800
        shares = np.bincount(lengths, minlength=11) / len(lengths)
        assert shares[3:8] == pytest.approx([0.060, 0.241, 0.383, 0.242, 0.061], abs=0.02)
        assert len(shares) == 11 and shares[0] == 0
        assert np.mean(places) == pytest.approx(0.5, abs=0.02) and max(places) == 1

    def test_the_exact_shares(self):
        """Without the noise of a sample: where the draw changes from one length to the next."""
        edges = np.diff(np.concatenate([[0], make_views([[9]], view="ngram")._ngram_shares, [1]]))
        assert edges[2:7] == pytest.approx([0.0606, 0.2417, 0.3829, 0.2417, 0.0606], abs=0.0005)
        assert len(edges) == 10
        longer = make_views([[9]], view="ngram", ngram_mean_length=7.0)
        assert int(np.argmax(np.diff(longer._ngram_shares))) + 2 == 7

    def test_a_token_stays_outside(self):
        dataset = make_views([[1], [2], [3], [1], [6]], view="ngram")
        assert [example["document"] for example in epoch_of(dataset)] == [1, 2, 4]
        for epoch in range(30):
            for example in epoch_of(dataset, epoch):
                begin, end = example["ngram"]
                length = len(example["texts"][0]["input_ids"])
                assert 1 <= begin < end <= length - 1 and end - begin < length - 2


class TestPairs:
    @pytest.mark.parametrize("view", PAIRED)
    @pytest.mark.parametrize("block_size", [9, 40])
    def test_false_candidates_are_partners_of_other_documents(self, view, block_size):
        corpus = [*a_corpus(tokens=40), [9]]
        dataset = make_views(corpus, view=view, scorer="cross", cross_negatives=4, block_size=block_size)
        bounds = np.cumsum([0, *map(sum, corpus)])
        sources = []
        for example in epoch_of(dataset):
            assert len(example["texts"]) == 5
            low, high = bounds[example["document"] : example["document"] + 2]
            anchor, partner = sides(example["texts"][0])
            assert ((low <= partner) & (partner < high)).all()
            candidates = {tuple(partner)}
            for text in example["texts"]:
                assert len(text["input_ids"]) <= block_size and len(text["word_starts"]) == len(text["input_ids"])
                own, other = sides(text)
                assert own[0] == anchor[0] and len(other) and ((low <= own) & (own < high)).all()
                candidates.add(tuple(other))
                if text is not example["texts"][0]:
                    assert ((other < low) | (other >= high)).all()
                    source = np.unique(np.searchsorted(bounds, other, side="right"))
                    assert len(source) == 1
                    sources.append(int(source[0]))
            assert len(candidates) == 5
        assert len(set(sources)) > 25

    def test_both_sides_keep_their_beginning(self):
        dataset = make_views([[60, 60]] * 5, view="neighbours", scorer="cross", block_size=23)
        alone = make_views([[60, 60]] * 5, view="neighbours", block_size=21)
        for pair, text in zip(epoch_of(dataset), epoch_of(alone), strict=True):
            own, other = sides(pair["texts"][0])
            assert len(own) == len(other) == 10
            # The room of a pair is a token more than that of each text alone here: 19 and 20.
            assert (own // 60)[0] == (positions(text["texts"][0]) // 60)[0] and is_range(own) and is_range(other)

    def test_partners_are_drawn_from_all_others_and_differ(self):
        texts = [{"input_ids": np.array([number // 2]), "number": number} for number in range(20)]
        counts = np.zeros(20)
        for row in range(3000):
            key = draws.row_keys([row], seed=0)
            options = {"own": (5, 8), "num_examples": 20, "wanted": 3, "key": key}
            found = draw_partners(texts[5], texts.__getitem__, **options)
            assert len({int(text["input_ids"][0]) for text in [*found, texts[5]]}) == 4
            np.add.at(counts, [text["number"] for text in found], 1)
        # 4 is equal to the true one, 5 to 7 are its own.
        assert counts[4:8].tolist() == [0] * 4
        assert counts[[*range(4), *range(8, 20)]].min() > 400 and counts.max() < 720

    def test_equal_texts_are_taken_where_there_are_no_others(self):
        text = {"input_ids": np.array([1])}
        key = draws.row_keys([0], seed=0)
        assert len(draw_partners(text, lambda _: text, own=(0, 1), num_examples=2, wanted=3, key=key)) == 3


@pytest.mark.parametrize(
    "text",
    [
        "Der Fluss ist tief. Die Straße führt über die Brücke! Wer kommt heute zum großen Markt?",
        "今天天气很好。我们去公园散步吧！明天会下雨吗？河水很深。",
    ],
)
def test_real_text_of_a_real_tokenizer(text):
    sentences = [text, "\n".join([text] * 3), text[: len(text) // 2], "", text[0], text[::-1]]
    tokenizer = train_tokenizer([text], vocab_size=160)
    documents = tokenize_documents(datasets.Dataset.from_dict({"text": sentences}), tokenizer)
    rows = [" ".join(map(str, row)) for row in documents["input_ids"]]
    for view in VIEWS:
        dataset = TextViewDataset(documents, tokenizer=tokenizer, view=view, block_size=16)
        examples = epoch_of(dataset)
        assert examples
        for example in examples:
            for text_of in example["texts"]:
                ids = text_of["input_ids"].tolist()
                assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id and len(ids) <= 16
                inner = f" {' '.join(map(str, ids[1:-1]))} "
                cut = view == "ict" and text_of is example["texts"][1]
                assert cut or inner in f" {rows[example['document']]} "
    pairs = TextViewDataset(documents, tokenizer=tokenizer, view="neighbours", scorer="cross", block_size=16)
    assert {len(example["texts"]) for example in epoch_of(pairs)} == {4}


class TestRefusals:
    @pytest.mark.parametrize(
        ("corpus", "options", "message"),
        [
            ([[], []], {}, "documents hold no token"),
            ([[5, 6]], {}, "view='same' tells texts of different documents apart, but there is one document only"),
            ([[5, 6]], {"view": "ict", "scorer": "cross"}, "there is one document only"),
            ([[5], [6]], {"view": "neighbours"}, "none of 2 documents has two sentences"),
            ([[5], [6]], {"view": "neighbours", "text_unit": "block"}, "none of 2 documents has two blocks"),
            ([[5], [6]], {"view": "title"}, "none of 2 documents has two sentences"),
            ([[5], [6, 7]], {"view": "ict"}, "only one of 2 documents gives examples"),
            ([[1], [1]], {"held_out": True}, "none of 2 documents has a text of two words"),
            ([[1], [1]], {"view": "spans"}, "none of 2 documents has two words"),
            ([[1], [1]], {"view": "ngram"}, "none of 2 documents has a text of two tokens"),
            ([[5], [6]], {"block_size": 2}, "block_size=2 leaves no room"),
            ([[5, 5], [6, 6]], {"view": "ict", "scorer": "cross", "block_size": 4}, "leaves no room for a pair"),
            ([[5], [6]], {"scorer": "cross"}, "scorer='cross' does not go with view='same'"),
            ([[5], [6]], {"scorer": "cross", "view": "ngram"}, "does not go with view='ngram'"),
            ([[5], [6]], {"view": "titlex"}, "view='titlex' must be one of .*did you mean 'title'"),
            ([[5], [6]], {"view": "ict", "text_unit": "block"}, "text_unit='block' has no effect on view='ict'"),
            ([[5], [6]], {"ict_keep_probability": 1.5}, "ict_keep_probability=1.5"),
            ([[5], [6]], {"shortest_span": 40}, "shortest_span=40 must be a number from 1 to 30"),
            ([[5], [6]], {"ngram_mean_length": 0.0}, "ngram_mean_length=0.0"),
            ([[5], [6]], {"cross_negatives": 0}, "cross_negatives=0"),
        ],
    )
    def test_what_gives_nothing_is_refused_in_a_line(self, corpus, options, message):
        with pytest.raises(InputError, match=message) as error:
            make_views(corpus, **options)
        assert "\n" not in str(error.value)

    def test_single_texts_need_no_other_document(self):
        for view in ("single", "ngram"):
            assert len(make_views([[5, 6]], view=view, text_unit="sentence")) == 2
