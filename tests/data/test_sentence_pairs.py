from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.examples import pairing
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset, EpochSampler
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.examples.pairing import PairRule, SentenceIndex, draw_chunks, draw_pairs
from hf_pretrain.data.examples.sentence_pairs import SentencePairDataset
from hf_pretrain.errors import InputError

CLS, SEP = 2, 3
FIRST_ID = 100  # A token's id tells its position.
SPECIALS = 3
TASKS = ["nsp", "sop", "structural", "none"]
RANDOM = {"nsp": 1, "structural": 2}


def sentence_lengths(seed: int, *, documents: int, sentences: int = 9, tokens: int = 12) -> list[list[int]]:
    """Keyed documents of 1 to `sentences` sentences of 1 to `tokens` tokens."""
    keys = draws.row_keys(range(documents), seed=seed, stream="pair_corpus")
    counts = 1 + draws.integers(keys, 1, high=sentences)[:, 0]
    lengths = 1 + draws.integers(keys ^ np.uint64(1), sentences, high=tokens)
    return [row[:count].tolist() for row, count in zip(lengths, counts, strict=True)]


def to_documents(corpus: list[list[int]]) -> datasets.Dataset:
    """Documents given by their sentences' lengths, whose tokens count from FIRST_ID over all of them."""
    columns: dict[str, list] = {name: [] for name in DOCUMENT_FEATURES}
    at = FIRST_ID
    for doc_id, lengths in enumerate(corpus):
        starts = np.concatenate([np.arange(length) == 0 for length in lengths]) if lengths else np.zeros(0, bool)
        words = starts | (draws.uniforms(draws.row_keys([doc_id], seed=0), len(starts))[0] < 0.6)
        row = {"input_ids": np.arange(at, at + len(starts)), "word_starts": words, "sent_starts": starts}
        for name, value in (row | {"doc_id": doc_id}).items():
            columns[name].append(value)
        at += len(starts)
    return datasets.Dataset.from_dict(columns, features=DOCUMENT_FEATURES)


def index_of(corpus: list[list[int]]) -> SentenceIndex:
    return SentenceIndex.of(TokenStore(to_documents(corpus)))


def make_pairs(corpus: list[list[int]], **options) -> SentencePairDataset:
    return SentencePairDataset(to_documents(corpus), tokenizer=tiny_tokenizer(), **({"block_size": 32} | options))


def segments(example: dict) -> tuple[np.ndarray, np.ndarray]:
    """Positions of A's and of B's tokens."""
    ids = example["input_ids"]
    middle, end = np.flatnonzero(ids == SEP)
    assert ids[0] == CLS and end == len(ids) - 1
    return ids[1:middle] - FIRST_ID, ids[middle + 1 : end] - FIRST_ID


def coins(rule: PairRule, epoch: int, number: int, stream: str) -> Iterator[bool]:
    """Fair coins: the bits of a keyed stream, from the highest of each word."""
    keys = rule.keys(np.array([number]), epoch=epoch, stream=stream)
    for word in draws.bits(keys, 64)[0].tolist():
        yield from (word >> (63 - bit) & 1 for bit in range(64))


def truncate(a: list[int], b: list[int], room: int, front_a: Iterator[bool], front_b: Iterator[bool]) -> None:
    """BERT's: one token at a time."""
    while len(a) + len(b) > room:
        longer, front = (a, front_a) if len(a) > len(b) else (b, front_b)
        del longer[0 if next(front) else -1]


def naive_pairs(corpus: list[list[int]], rule: PairRule, epoch: int) -> Iterator[tuple[list[int], list[int], int]]:
    """BERT's loop over documents, sentence by sentence, with the same draws."""

    def uniforms(number: int, stream: str) -> list[float]:
        return draws.uniforms(rule.keys(np.array([number]), epoch=epoch, stream=stream), 2)[0].tolist()

    bounds = np.cumsum([0, *(length for lengths in corpus for length in lengths)])
    sentences = iter([list(range(low, high)) for low, high in zip(bounds[:-1], bounds[1:], strict=True)])
    documents = [[next(sentences) for _ in lengths] for lengths in corpus]
    kinds = {"nsp": "nr", "sop": "ns", "structural": "nsr", "none": "n"}[rule.task]
    forced = not rule.balanced and "r" in kinds
    number = 0
    for document in documents:
        draw = uniforms(documents.index(document), "target")
        target = 2 + int(draw[1] * (rule.room - 1)) if draw[0] < rule.short_probability else rule.room
        at = 0
        while at < len(document):
            begin, chunk = at, []
            while at < len(document):
                chunk.append(document[at])
                at += 1
                if sum(map(len, chunk)) >= target and (forced or (len(chunk) > 1 and at != len(document) - 1)):
                    break
            if len(chunk) == 1 and not forced:
                continue
            draw = uniforms(number + begin, "chunk")
            split = 1 + int(draw[0] * (len(chunk) - 1))
            label = int(draw[1] * len(kinds)) if len(chunk) > 1 else kinds.index("r")
            a, b = sum(chunk[:split], []), sum(chunk[split:], [])
            if kinds[label] == "s":
                a, b = b, a
            if kinds[label] == "r":
                draw = uniforms(number + begin, "random")
                others = [other for other in documents if other is not document]
                other, b = others[int(draw[0] * len(others))], []
                for sentence in other[int(draw[1] * len(other)) :]:
                    b += sentence
                    if len(b) >= target - len(a):
                        break
                at -= len(chunk) - split
            truncate(a, b, rule.room, *(coins(rule, epoch, number + begin, f"cut_{side}") for side in "ab"))
            yield a, b, label
        number += len(document)


CORPORA = {
    "mixed": {"documents": 40},
    "one-sentence documents": {"documents": 60, "sentences": 2},
    "one-token sentences": {"documents": 20, "tokens": 1},
    "long sentences": {"documents": 20, "tokens": 200, "sentences": 4},
    "long documents": {"documents": 3, "sentences": 80},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", CORPORA)
def test_equals_a_plain_loop(task, shape, monkeypatch):
    corpus = sentence_lengths(3, **CORPORA[shape])
    sentences = index_of(corpus)
    for room in (2, 3, 11, 40):
        for epoch, balanced, window in ((0, True, 1 << 18), (1, False, 1 << 18), (2, True, 20)):
            monkeypatch.setattr(pairing, "_WINDOW_SENTENCES", window)
            rule = PairRule(task, room, seed=5, balanced=balanced, short_probability=0.3)
            table = draw_pairs(sentences, rule=rule, epoch=epoch)
            expected = list(naive_pairs(corpus, rule, epoch))
            assert len(expected) == len(table.labels) > 0
            ranges = [[list(range(*ends)) for ends in zip(*row, strict=True)] for row in zip(*table[:2], strict=True)]
            assert ranges == [[a, b] for a, b, _ in expected]
            assert table.labels.tolist() == [label for *_, label in expected]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("balanced", [True, False])
def test_what_a_label_says_is_so(task, balanced):
    """In coordinates of the documents: who follows whom, who is from elsewhere; both sides there, none too long."""
    corpus = sentence_lengths(1, documents=300)
    pairs = make_pairs(corpus, task=task, balanced=balanced)
    document_of = np.repeat(np.arange(300), [sum(lengths) for lengths in corpus])
    seen = set()
    for example in pairs:
        a, b = segments(example)
        assert len(a) and len(b) and len(example["input_ids"]) <= 32
        assert np.array_equal(a, np.arange(a[0], a[-1] + 1)) and np.array_equal(b, np.arange(b[0], b[-1] + 1))
        assert np.ptp(document_of[a]) == np.ptp(document_of[b]) == 0
        label = example.get("pair_label", 0)
        seen.add(label)
        if label == RANDOM.get(task):
            assert document_of[a[0]] != document_of[b[0]]
            continue
        assert document_of[a[0]] == document_of[b[0]]
        before, behind = (a, b) if label == 0 else (b, a)
        gap = behind[0] - before[-1] - 1
        assert gap >= 0
        # Only what was too long has lost tokens between the two.
        assert gap == 0 or len(example["input_ids"]) == 32
    assert seen == set(range({"nsp": 2, "sop": 2, "structural": 3, "none": 1}[task]))


def many_documents(*, lone: float) -> SentenceIndex:
    """20 000 documents, a share of which has one sentence; made without tokens."""
    keys = draws.row_keys(range(20_000), seed=2, stream="many")
    counts = 2 + draws.integers(keys, 1, high=12)[:, 0]
    counts[draws.uniforms(keys ^ np.uint64(1), 1)[:, 0] < lone] = 1
    lengths = 1 + draws.integers(keys[0], int(counts.sum()), high=30)
    return SentenceIndex(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([[0], np.cumsum(counts)]))


def shares(sentences: SentenceIndex, rule: PairRule) -> np.ndarray:
    labels = draw_pairs(sentences, rule=rule, epoch=0).labels
    assert len(labels) > 8000
    return np.bincount(labels) / len(labels)


@pytest.mark.parametrize("lone", [0.0, 0.6])
def test_every_label_has_the_same_share_however_many_documents_have_one_sentence(lone):
    sentences = many_documents(lone=lone)
    for room in (60, 250):
        assert shares(sentences, PairRule("nsp", room)) == pytest.approx([1 / 2] * 2, abs=0.01)
        assert shares(sentences, PairRule("sop", room)) == pytest.approx([1 / 2] * 2, abs=0.01)
        assert shares(sentences, PairRule("structural", room)) == pytest.approx([1 / 3] * 3, abs=0.01)
        # BERT's rule gives every lone sentence a random partner.
        assert shares(sentences, PairRule("nsp", room, balanced=False))[1] > 0.53


@pytest.mark.parametrize("lone", [0.0, 0.6])
def test_the_label_says_nothing_about_the_number_of_sentences(lone):
    sentences = many_documents(lone=lone)
    documents = (0, len(sentences.documents) - 1)
    chunks = draw_chunks(sentences, rule=PairRule("nsp", 60), epoch=0, documents=documents)
    sizes = chunks.last - chunks.first
    assert sizes.min() == 2
    for size in (2, 3, 4, 5):
        of_size = chunks.labels[sizes == size]
        assert of_size.mean() == pytest.approx(0.5, abs=3 * 0.5 / len(of_size) ** 0.5)


def covered(sentences: SentenceIndex, rule: PairRule) -> np.ndarray:
    """How often each sentence is in a chunk's first part, or in a second part that was not exchanged."""
    documents = (0, len(sentences.documents) - 1)
    chunks = draw_chunks(sentences, rule=rule, epoch=0, documents=documents)
    times = np.zeros(len(sentences.starts), dtype=np.int64)
    stop = np.where(chunks.labels == RANDOM.get(rule.task), chunks.middle, chunks.last)
    np.add.at(times, chunks.first, 1)
    np.add.at(times, stop, -1)
    assert (stop > chunks.first).all()
    return np.cumsum(times)[:-1]


@pytest.mark.parametrize("task", ["nsp", "structural"])
def test_what_gave_way_is_put_back_so_that_every_sentence_comes_once(task):
    sentences = many_documents(lone=0.2)
    assert (covered(sentences, PairRule(task, 100, balanced=False)) == 1).all()
    times = covered(sentences, PairRule(task, 100))
    assert times.max() == 1
    is_last = np.zeros(len(times), dtype=np.bool_)
    is_last[sentences.documents[1:] - 1] = True
    assert is_last[times == 0].all(), "only a document's last sentence can be left alone"
    assert 0.02 < np.mean(times == 0) < 0.08  # 0.027 are documents of one sentence


@pytest.mark.parametrize("task", ["sop", "none"])
@pytest.mark.parametrize("balanced", [True, False])
def test_pairs_of_one_text_cover_all_that_is_not_alone_once(task, balanced):
    sentences = many_documents(lone=0.2)
    alone = np.repeat(np.diff(sentences.documents) == 1, np.diff(sentences.documents))
    assert np.array_equal(covered(sentences, PairRule(task, 100, balanced=balanced)), ~alone)


def test_cuts_in_front_and_behind_are_equally_frequent():
    sentences = many_documents(lone=0.0)
    rule = PairRule("nsp", 60)
    chunks = draw_chunks(sentences, rule=rule, epoch=0, documents=(0, 20_000))
    table = draw_pairs(sentences, rule=rule, epoch=0)
    front = table.starts[:, 0] - sentences.starts[chunks.first]
    back = sentences.starts[chunks.middle] - table.stops[:, 0]
    assert front.min() >= 0 and back.min() >= 0 and front.sum() + back.sum() > 10_000
    assert front.sum() / (front.sum() + back.sum()) == pytest.approx(0.5, abs=0.02)
    once = front + back == 1
    assert front[once].mean() == pytest.approx(0.5, abs=4 * 0.5 / once.sum() ** 0.5)
    # Of ten tokens the number lost in front is binomial: its variance is 10 / 4, not that of one coin for all.
    ten = front[front + back == 10]
    assert ten.var() == pytest.approx(2.5, rel=0.3)


def test_lengths_that_are_wanted():
    rule = PairRule("nsp", 50, short_probability=0.1)
    targets = rule.targets(np.arange(200_000), epoch=0)
    # A short target is the room itself once in 49 times.
    assert np.mean(targets < 50) == pytest.approx(0.1 * 48 / 49, abs=0.003)
    counts = np.bincount(targets[targets < 50])
    assert counts[:2].tolist() == [0, 0] and counts[2:].min() > 300 and counts[2:].max() < 520
    assert set(PairRule("nsp", 50, short_probability=0.0).targets(np.arange(1000), epoch=0)) == {50}
    sentences = many_documents(lone=0.0)
    full = draw_pairs(sentences, rule=PairRule("none", 250, short_probability=0.0), epoch=0)
    short = draw_pairs(sentences, rule=PairRule("none", 250, short_probability=1.0), epoch=0)
    assert (short.stops - short.starts).sum(1).mean() < 0.8 * (full.stops - full.starts).sum(1).mean()


def test_split_and_place_of_random_text_are_uniform():
    """Each sentence border is as likely a split; each other document is as likely, whatever its length."""
    corpus = [[5] * 4] * 900 + [[5] * 400]
    sentences = index_of(corpus)
    rule = PairRule("nsp", 20, short_probability=0.0)
    chunks = draw_chunks(sentences, rule=rule, epoch=0, documents=(0, 900))
    whole = chunks.last - chunks.first == 4
    splits = np.bincount((chunks.middle - chunks.first)[whole], minlength=4)[1:] / whole.sum()
    assert splits == pytest.approx([1 / 3] * 3, abs=0.06)
    sources, places = [], []
    for epoch in range(20):
        table = draw_pairs(sentences, rule=rule, epoch=epoch)
        b = table.starts[table.labels == 1, 1] // 5
        sources.append(np.minimum(b // 4, 900))
        places.append(b[b < 3600] % 4)
    source, place = np.concatenate(sources), np.concatenate(places)
    assert np.mean(source == 900) < 0.004  # a tenth of the sentences, one of 901 documents
    assert len(np.unique(source)) == 901
    assert np.bincount(place) / len(place) == pytest.approx([0.25] * 4, abs=0.02)


def as_lists(examples: list[dict]) -> list[list]:
    return [[value.tolist() if isinstance(value, np.ndarray) else value for value in row.values()] for row in examples]


def identity(examples: list[dict]) -> list[dict]:
    return examples


def build_and_read(indices: list[int]) -> list[list]:
    return as_lists(make_pairs(sentence_lengths(4, documents=80), seed=9).__getitems__(indices))


def test_epochs_and_seeds_differ_and_another_process_agrees():
    corpus = sentence_lengths(4, documents=80)
    rows = list(range(len(make_pairs(corpus, seed=9))))
    tables = [build_and_read([epoch * EPOCH_STRIDE + row for row in rows]) for epoch in (0, 3)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(build_and_read, [[3 * EPOCH_STRIDE + row for row in rows]], 1) == [tables[1]]
    texts = [{tuple(example[0]) for example in table} for table in tables]
    assert len(texts[0] & texts[1]) < 0.2 * len(rows)
    other = {tuple(example["input_ids"].tolist()) for example in make_pairs(corpus, seed=10)}
    assert len(texts[0] & other) < 0.2 * len(rows)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_read_the_epochs_pairs(workers, persistent):
    pairs = make_pairs(sentence_lengths(4, documents=40), task="structural")
    alone = make_pairs(sentence_lengths(4, documents=40), task="structural")
    sampler = EpochSampler(len(pairs), seed=1)
    loader = DataLoader(
        pairs,
        batch_size=7,
        sampler=sampler,
        collate_fn=identity,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
    )
    for epoch in (0, 1, 4):
        sampler.set_epoch(epoch)
        received = [example for batch in loader for example in batch]
        assert [example["order_index"] for example in received] == list(range(len(pairs)))
        order = draws.permutation(len(pairs), seed=1, epoch=epoch)
        assert [example["example_id"] for example in received] == order.tolist()
        expected = [
            alone[epoch * EPOCH_STRIDE + row] | {"order_index": place} for place, row in enumerate(order.tolist())
        ]
        assert as_lists(received) == as_lists(expected)
        assert all(example["epoch"] == epoch for example in received)


def test_an_epoch_is_fitted_to_the_length_of_the_first():
    pairs = make_pairs(sentence_lengths(6, documents=60))
    differences = set()
    for epoch in range(12):
        table = pairs.pairs(epoch)
        rows = {
            (*map(tuple, starts_stops), label)
            for *starts_stops, label in zip(*(v.tolist() for v in table), strict=True)
        }
        assert len(rows) == len(table.labels)
        fitted = pairs._table(epoch)
        kept = [(*map(tuple, pair), label) for *pair, label in zip(*(v.tolist() for v in fitted), strict=True)]
        assert len(kept) == len(pairs) == len(pairs.pairs(0).labels)
        assert set(kept) <= rows
        surplus = len(rows) - len(pairs)
        assert len(set(kept)) == min(len(rows), len(pairs)), "none comes twice unless there are too few"
        differences.add(int(np.sign(surplus)))
        assert np.all(np.diff(fitted.starts[:, 0]) >= -40), "in the order of the documents"
    assert differences == {-1, 0, 1}


def test_tables_of_two_epochs_are_kept(monkeypatch):
    pairs = make_pairs(sentence_lengths(6, documents=30), static_epochs=0)
    made = []
    monkeypatch.setattr(pairs, "pairs", lambda epoch: made.append(epoch) or SentencePairDataset.pairs(pairs, epoch))
    for epoch in (0, 1, 0, 1, 2, 1, 2, 0):
        pairs[epoch * EPOCH_STRIDE]
        assert len(pairs._tables) <= 2
    assert made == [1, 2, 0]


def test_static_epochs_repeat_pairs_but_not_epochs():
    pairs = make_pairs(sentence_lengths(6, documents=30), static_epochs=2)
    rows = range(len(pairs))
    epochs = [[pairs[epoch * EPOCH_STRIDE + row] for row in rows] for epoch in range(4)]
    ids = [[example["input_ids"].tolist() for example in examples] for examples in epochs]
    assert ids[0] == ids[2] != ids[1] == ids[3]
    assert epochs[3][0]["epoch"] == 3


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_aligned(task):
    corpus = sentence_lengths(8, documents=50)
    documents = to_documents(corpus)
    words = np.concatenate([np.array(row) for row in documents["word_starts"]])
    pairs = SentencePairDataset(documents, tokenizer=tiny_tokenizer(), block_size=24, task=task)
    read = list(pairs)
    for example in read:
        a, b = segments(example)
        for segment, start in ((a, 1), (b, len(a) + 2)):
            flags = example["word_starts"][start : start + len(segment)]
            assert flags[0] and np.array_equal(flags[1:], words[segment[1:]])
        assert example["word_starts"][[0, len(a) + 1, -1]].all()
        assert example["token_type_ids"].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert example["source_length"] == len(a) + 2
        assert ("pair_label" in example) == (task != "none")
        kinds = [example[name].dtype for name in ("input_ids", "word_starts", "token_type_ids")]
        assert kinds == [np.int32, np.bool_, np.int64]
    assert [len(example["input_ids"]) for example in read] == pairs.lengths.tolist()
    assert pairs.num_tokens == sum(len(example["input_ids"]) - SPECIALS for example in read)
    assert pairs.fill == pytest.approx(np.mean(pairs.lengths) / 24)
    assert sum(pairs.label_shares) == pytest.approx(1) and f"fill={pairs.fill:.3f}" in repr(pairs)
    if task != "none":
        assert pairs.label_shares[1] == pytest.approx(np.mean([example["pair_label"] == 1 for example in read]))


def test_a_dataset_is_an_epoch_dataset_and_is_pickled_without_its_tables():
    pairs = make_pairs(sentence_lengths(6, documents=300))
    assert EpochDataset.wrap(pairs) is pairs
    assert len(pairs.lengths) == len(pairs)
    with pytest.raises(IndexError):
        pairs[len(pairs)]
    with pytest.raises(IndexError):
        pairs[-1]
    again = pickle.loads(pickle.dumps(pairs))
    assert not again._tables and "sentences" not in vars(again) and "lengths" not in vars(again)
    assert as_lists(list(again)) == as_lists(list(pairs))
    assert repr(again) == repr(pairs)


def test_documents_are_read_in_their_new_order_and_empty_ones_are_none():
    corpus = [[3, 4, 5], [], [6, 2], [], [1, 1, 1, 1]]
    documents = to_documents(corpus).select([4, 1, 2, 3, 0])
    for example in SentencePairDataset(documents, tokenizer=tiny_tokenizer(), task="none", block_size=15):
        a, b = segments(example)
        assert b[0] == a[-1] + 1
    assert make_pairs([[4, 4, 4]], task="sop").num_tokens == 12, "one document is enough for pairs of one text"
    assert len(make_pairs([[4], [5]], balanced=False)) == 2


def test_what_can_not_be_pairs_is_refused():
    corpus = sentence_lengths(0, documents=5)
    for options, message in (
        ({"task": "nextsent"}, "task='nextsent' must be one of nsp, sop, structural, none"),
        ({"short_probability": 1.5}, r"short_probability=1.5 must be a number from 0 to 1"),
        ({"static_epochs": -1}, "static_epochs=-1 must be a number of at least 0"),
        ({"block_size": 4}, "block_size=4 leaves no room for a pair"),
    ):
        with pytest.raises(InputError, match=message):
            make_pairs(corpus, **options)
    for task in RANDOM:
        with pytest.raises(InputError, match="one document only"):
            make_pairs([[3, 4]], task=task)
    for options in ({}, {"task": "sop"}, {"task": "sop", "balanced": False}, {"task": "none"}):
        with pytest.raises(InputError, match="none of 3 has two sentences"):
            make_pairs([[3], [4], [2]], **options)
    with pytest.raises(InputError, match="documents hold no token"):
        make_pairs([[], []])


def test_the_same_documents_serve_blocks():
    documents = to_documents(sentence_lengths(0, documents=9))
    blocks = BlockDataset(documents, tokenizer=tiny_tokenizer(), block_size=32)
    pairs = SentencePairDataset(documents, tokenizer=tiny_tokenizer(), block_size=32, task="none")
    of_pairs = {"token_type_ids", "source_length", "example_id", "epoch"}
    assert set(blocks[0]) - {"goes_on"} | of_pairs == set(pairs[0])
