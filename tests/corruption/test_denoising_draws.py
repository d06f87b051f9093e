"""The draws of BART's noises, which depend on the example alone; and texts at the limits of what they take."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from helpers.noised_texts import (
    MASK,
    NOTHING,
    check_pairs,
    check_share,
    inputs_of,
    make_texts,
    noise_of,
    same_texts,
    some_orders,
)
from hf_pretrain.corruption.denoising import BART_STEPS
from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.errors import InputError

# Randomness


def take(texts, index):
    """Some texts of a batch, by themselves."""
    fields = {name: getattr(texts, name)[index] for name in ("input_ids", "valid", "word_starts", "sent_starts")}
    return replace(
        texts, **fields, is_special=texts.is_special[index], rows=texts.rows[index], offsets=texts.offsets[index]
    )


ALL = [*((step,) for step in BART_STEPS), BART_STEPS, ("infilling", "rotation", "sentence_permutation")]


@pytest.mark.parametrize("steps", ALL)
def test_a_pair_depends_on_its_example_alone(steps):
    lengths = np.random.default_rng(1).integers(0, 80, 30)
    texts, noise = make_texts(lengths, specials=0.05), noise_of(*steps)
    together = inputs_of(noise(texts))
    assert inputs_of(noise(make_texts(lengths, width=131, specials=0.05))) == together
    for number in range(30):
        keys = RowKeys(texts.keys.example_ids[[number]], texts.keys.epochs[[number]], 0)
        alone = replace(take(texts, [number]), keys=keys, rows=np.zeros(1, dtype=np.int64))
        assert inputs_of(noise(alone)) == [together[number]]
    some = take(texts, [3, 11, 12])
    assert inputs_of(noise(some)) == [together[number] for number in (3, 11, 12)]


@pytest.mark.parametrize("steps", ALL)
def test_texts_of_one_example_do_not_share_draws(steps):
    """Three equal texts, of which two are of one example: each as by itself, and all different."""
    texts = make_texts([60, 60, 60])
    same = {name: getattr(texts, name)[:1].repeat(3, axis=0) for name in ("input_ids", "word_starts", "sent_starts")}
    rows, offsets = np.array([0, 0, 1]), np.array([1, 64, 1])
    texts = replace(texts, **same, rows=rows, offsets=offsets, keys=RowKeys(np.arange(2), np.zeros(2, np.int64), 0))
    noise = noise_of(*steps)
    together = inputs_of(noise(texts))
    assert [inputs_of(noise(take(texts, [number])))[0] for number in range(3)] == together
    assert len({tuple(ids) for ids in together}) == 3


@pytest.mark.parametrize("steps", ALL)
def test_epochs_seeds_and_examples_differ(steps):
    noise, lengths = noise_of(*steps), np.full(8, 50)
    texts = make_texts(lengths)
    other_keys = [
        RowKeys(np.arange(8), np.ones(8, dtype=np.int64), 0),
        RowKeys(np.arange(8), np.zeros(8, dtype=np.int64), 1),
        RowKeys(np.arange(8, 16), np.zeros(8, dtype=np.int64), 0),
    ]
    results = [inputs_of(noise(replace(texts, keys=keys))) for keys in (texts.keys, *other_keys)]
    for one, other in itertools.combinations(results, 2):
        assert sum(ids == others for ids, others in zip(one, other, strict=True)) <= 2
    assert inputs_of(noise(texts)) == results[0]


def test_noises_have_draws_of_their_own():
    """Masking and deletion of the same share choose different words, and what infilling covers is another choice."""
    texts = make_texts(np.full(20, 60), words=1.0)
    half = {f"{step}_probability": 0.5 for step in ("token_masking", "token_deletion", "infilling")}
    hidden = [noise_of(step, **half)(texts).is_hidden for step in ("token_masking", "token_deletion", "infilling")]
    for one, other in itertools.combinations(hidden, 2):
        check_share(np.count_nonzero(one & other), one.size, 0.25)


# Corners


@pytest.mark.parametrize("lengths", [[0], [1], [2], [0, 0, 0], [0, 1, 2, 0, 1, 2, 3], []])
@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_short_texts(lengths, probability):
    texts = make_texts(lengths, words=1.0)
    options = dict.fromkeys(NOTHING, probability)
    for steps in [*ALL, *some_orders(8)]:
        for mean in (1e-12, 3.0):
            pairs = noise_of(*steps, **options, infilling_mean_length=mean)(texts)
            check_pairs(texts, pairs)
            assert len(pairs.input_ids) == len(lengths)
    for row, ids in enumerate(inputs_of(noise_of("infilling", infilling_probability=probability)(texts))):
        if lengths[row]:
            assert ids.count(MASK) == 1 and len(ids) == (1 if probability == 1 else lengths[row])


def test_spans_without_room_are_joined_evenly():
    """Sixteen spans of one word have five slots around the four words that stay."""
    texts = same_texts(200, words=[1] * 20)
    pairs = noise_of("infilling", infilling_probability=0.8, infilling_mean_length=1e-9)(texts)
    for ids in inputs_of(pairs):
        assert ids[::2] == [MASK] * 5
        assert sorted(np.diff([99, *ids[1::2], 120]) - 1) == [3, 3, 3, 3, 4]


def test_more_sentences_than_tokens():
    """Of three sentences of one word, one has an empty span behind it, and rotation cuts it in two: four sentences."""
    texts = same_texts(300, words=[1] * 3, sentences=[1] * 3)
    options = {"infilling_probability": 0.1, "infilling_mean_length": 1e-9}
    rotated = inputs_of(noise_of("infilling", "rotation", **options)(texts))
    pairs = noise_of("infilling", "rotation", "sentence_permutation", **options)(texts)
    for before, after in zip(rotated, inputs_of(pairs), strict=True):
        assert sorted(after) == sorted(before)
    assert inputs_of(pairs) != rotated and max(map(len, rotated)) == 4


def test_texts_of_special_tokens_alone_stay():
    texts = make_texts([5, 1, 0])
    texts = replace(texts, is_special=texts.valid.copy())
    pairs = noise_of("sentence_permutation", "token_masking", "token_deletion", "infilling")(texts)
    assert not pairs.is_hidden.any()
    assert inputs_of(pairs) == [ids[valid].tolist() for ids, valid in zip(texts.input_ids, texts.valid, strict=True)]


def test_a_special_token_divides_a_span():
    texts = same_texts(50, words=[1] * 5)
    is_special = np.zeros((50, 5), dtype=bool)
    is_special[:, 2] = True
    pairs = noise_of("infilling", infilling_probability=1.0)(replace(texts, is_special=is_special))
    assert inputs_of(pairs) == [[MASK, 102, MASK]] * 50


def test_sentences_are_needed_by_their_permutation_alone():
    assert noise_of("infilling", "sentence_permutation").needs_sentences
    others = [step for step in BART_STEPS if step != "sentence_permutation"]
    noise = noise_of(*others)
    assert not noise.needs_sentences and noise.has_whole_target and noise.kinds == ("denoising",)
    texts = make_texts(np.arange(30))
    with_none = noise(replace(texts, sent_starts=None))
    assert inputs_of(with_none) == inputs_of(noise(texts))


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (("infiling",), {}, "noise_steps='infiling' must be one of .*; did you mean 'infilling'"),
        (("rotation", "infilling", "rotation"), {}, "noise_steps=.* has 'rotation' twice: give each noise once"),
        (("infilling",), {"infilling_probability": 1.5}, "infilling_probability=1.5 must be a number from 0 to 1"),
        ((), {"rotation_probability": -0.1}, "rotation_probability=-0.1 must be"),
        (("infilling",), {"infilling_mean_length": 0.0}, "infilling_mean_length=0.0 must be a number above 0"),
        (("infilling",), {"infilling_mean_length": float("nan")}, "infilling_mean_length=nan must be"),
    ],
)
def test_wrong_options_are_refused(steps, options, message):
    with pytest.raises(InputError, match=message):
        noise_of(*steps, **options)
