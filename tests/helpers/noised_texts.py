"""Texts for the noises of BART, and checks of what they become."""

import math
from dataclasses import replace

import numpy as np
from scipy import stats

from hf_pretrain.corruption.denoising import BART_STEPS, BartNoise
from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.corruption.texts import Texts

MASK = 7
# Options that make each noise the identity.
NOTHING = {f"{step}_probability": 0.0 for step in BART_STEPS}


def make_texts(lengths, *, width=None, first_id=0, epoch=0, seed=0, words=1 / 1.4, sentences=0.15, specials=0.0):
    """Texts in which every token is another one; words, sentences and special tokens lie at random, padding is garbage."""
    lengths = np.asarray(lengths)
    shape = (len(lengths), width or max(int(lengths.max(initial=0)), 1))
    # By column, so that a wider batch has the same texts.
    drawn = np.random.default_rng(5).random((shape[1], 3, len(lengths))).transpose(1, 2, 0)
    valid = np.arange(shape[1]) < lengths[:, None]
    is_special = (drawn[0] < specials) & valid
    sent_starts = drawn[1] < sentences
    word_starts = (drawn[2] < words) | sent_starts | is_special
    word_starts[:, 1:] |= is_special[:, :-1]
    word_starts[:, 0] = sent_starts[:, 0] = True
    return Texts(
        input_ids=100 + np.arange(shape[0])[:, None] * 1000 + np.arange(shape[1]),
        valid=valid,
        word_starts=word_starts,
        sent_starts=sent_starts,
        is_special=is_special,
        rows=np.arange(len(lengths)),
        offsets=np.zeros(len(lengths), dtype=np.int64),
        keys=RowKeys(np.arange(first_id, first_id + len(lengths)), np.full(len(lengths), epoch), seed),
    )


def same_texts(number, *, words, sentences=None):
    """Many copies of one text, of words of the given sizes, in sentences of the given numbers of words."""
    width = sum(words)
    starts = np.zeros(width, dtype=bool)
    firsts = np.cumsum([0, *words])[:-1]
    starts[firsts] = True
    sent_starts = np.zeros(width, dtype=bool)
    sent_starts[firsts[np.cumsum([0, *(sentences or [len(words)])])[:-1]]] = True
    texts = make_texts(np.full(number, width))
    return replace(
        texts,
        input_ids=np.tile(100 + np.arange(width), (number, 1)),
        word_starts=np.tile(starts, (number, 1)),
        sent_starts=np.tile(sent_starts, (number, 1)),
        is_special=np.zeros((number, width), dtype=bool),
    )


def noise_of(*steps, **options):
    return BartNoise(steps=steps, mask_token_id=MASK, **options)


def inputs_of(pairs):
    return [ids[valid].tolist() for ids, valid in zip(pairs.input_ids, pairs.input_valid, strict=True)]


def pieces_of(row, starts, texts):
    """The text of a row, cut before each token at which a piece starts: lists of columns."""
    columns = np.flatnonzero(texts.valid[row])
    return [piece.tolist() for piece in np.split(columns, np.flatnonzero(starts[row, columns])) if len(piece)]


def words_of(row, texts):
    return [word for word in pieces_of(row, texts.word_starts, texts) if not texts.is_special[row, word].any()]


def hidden_words(row, texts, pairs):
    """Which words of a row are hidden; none is hidden in part."""
    hidden = [pairs.is_hidden[row, word] for word in words_of(row, texts)]
    assert all(flags.all() or not flags.any() for flags in hidden)
    return [bool(flags.all()) for flags in hidden]


def check_pairs(texts, pairs):
    """What is true of every composition: the untouched target, and the hidden tokens are those the input lacks."""
    assert np.array_equal(pairs.targets[pairs.target_valid], texts.input_ids[texts.valid])
    assert np.array_equal(pairs.target_valid, texts.valid)
    assert not pairs.is_hidden[~texts.valid].any() and not pairs.is_hidden[texts.is_special].any()
    assert pairs.input_ids.dtype == np.int64 and not pairs.kinds.any() and pairs.kinds.shape == texts.rows.shape
    for row, ids in enumerate(inputs_of(pairs)):
        shown = texts.input_ids[row][texts.valid[row] & ~pairs.is_hidden[row]]
        assert sorted(token for token in ids if token != MASK) == shown.tolist()


def check_chi_square(counts, expected=None):
    """Fails one time in three million (five sigma) for counts of the expected distribution, uniform by default."""
    assert stats.chisquare(counts, expected).pvalue > 6e-7


def check_share(count, number, share):
    assert abs(count / number - share) < 5 * math.sqrt(share * (1 - share) / number)


def ceil_share(probability, number):
    return math.ceil(round(probability * number, 6))


def some_orders(number=40):
    """Orders of some of the noises, all lengths among them."""
    rng = np.random.default_rng(3)
    return [tuple(rng.permutation(BART_STEPS)[: 2 + number % 4].tolist()) for number in range(number)]
