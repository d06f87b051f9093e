"""The noises of BART against slow rules in Python, their distributions, and their composition."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from helpers.noised_texts import (
    MASK,
    NOTHING,
    ceil_share,
    check_chi_square,
    check_pairs,
    check_share,
    hidden_words,
    inputs_of,
    make_texts,
    noise_of,
    pieces_of,
    same_texts,
    some_orders,
    words_of,
)
from hf_pretrain.corruption.denoising import BART_STEPS, LONGEST_SPAN, draw_spans, poisson_shares
from hf_pretrain.data import draws

# What each noise does to a text


@pytest.mark.parametrize("probability", [0.15, 0.5, 1.0])
def test_deletion_removes_whole_words_and_keeps_the_order(probability):
    texts = make_texts(np.arange(120) % 60, specials=0.1)
    pairs = noise_of("token_deletion", token_deletion_probability=probability)(texts)
    check_pairs(texts, pairs)
    for row, ids in enumerate(inputs_of(pairs)):
        assert ids == sorted(ids) and MASK not in ids
        hidden = hidden_words(row, texts, pairs)
        assert sum(hidden) == ceil_share(probability, len(hidden))


@pytest.mark.parametrize("probability", [0.15, 0.5, 1.0])
def test_masking_puts_one_mask_in_the_place_of_each_word(probability):
    texts = make_texts(np.arange(120) % 60, specials=0.1)
    pairs = noise_of("token_masking", token_masking_probability=probability)(texts)
    check_pairs(texts, pairs)
    for row, ids in enumerate(inputs_of(pairs)):
        hidden = hidden_words(row, texts, pairs)
        assert sum(hidden) == ceil_share(probability, len(hidden))
        expected = []
        for word in pieces_of(row, texts.word_starts, texts):
            is_hidden = pairs.is_hidden[row, word[0]]
            expected += [MASK] if is_hidden else texts.input_ids[row, word].tolist()
        assert ids == expected


@pytest.mark.parametrize("step", ["token_masking", "token_deletion"])
def test_every_choice_of_words_is_as_likely(step):
    texts = same_texts(30000, words=[1, 3, 1, 2, 1])
    pairs = noise_of(step, **{f"{step}_probability": 0.3})(texts)
    choices = pairs.is_hidden[:, [0, 1, 4, 5, 7]] @ (1 << np.arange(5))
    values, counts = np.unique(choices, return_counts=True)
    assert len(values) == math.comb(5, 2)
    check_chi_square(counts)


def check_infilled(row, ids, texts, pairs):
    """Walk through an infilled text; return its spans and its empty spans.

    One mask stands for each run of hidden words, and a special token ends a run. Any other mask lies between two words that stay.
    """
    waiting, spans, empty = list(ids), 0, 0
    before = "start"
    for word in pieces_of(row, texts.word_starts, texts):
        if pairs.is_hidden[row, word[0]]:
            if before != "hidden":
                assert waiting.pop(0) == MASK
                spans += 1
            before = "hidden"
            continue
        now = "special" if texts.is_special[row, word[0]] else "word"
        if waiting[0] == MASK:
            assert before == now == "word", "an empty span lies between two words"
            waiting.pop(0)
            empty += 1
        for token in texts.input_ids[row, word]:
            assert waiting.pop(0) == token
        before = now
    assert not waiting
    return spans, empty


@pytest.mark.parametrize("specials", [0.0, 0.1])
@pytest.mark.parametrize("probability", [0.1, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("mean", [1e-300, 0.05, 1.0, 3.0, 20.0, float(LONGEST_SPAN)])
def test_infilling_covers_exactly_its_share_of_words(mean, probability, specials):
    texts = make_texts(np.arange(90) % 45, specials=specials)
    pairs = noise_of("infilling", infilling_probability=probability, infilling_mean_length=mean)(texts)
    check_pairs(texts, pairs)
    empty = 0
    for row, ids in enumerate(inputs_of(pairs)):
        hidden = hidden_words(row, texts, pairs)
        assert sum(hidden) == ceil_share(probability, len(hidden))
        empty += check_infilled(row, ids, texts, pairs)[1]
    if probability < 0.5:  # otherwise there may be no two words left side by side
        assert (empty > 0) == (mean < 20)


def iid_spans(rng, *, budget, mean):
    """Draw lengths one after the other until they reach the budget: spans with words, empty spans."""
    total = spans = empty = 0
    while total < budget:
        length = rng.poisson(mean)
        total, spans, empty = total + length, spans + (length > 0), empty + (length == 0)
    return spans, empty


@pytest.mark.parametrize("mean", [0.7, 3.0])
def test_infilling_has_as_many_spans_as_draws_in_a_row_have(mean):
    num_texts, num_words, budget = 1500, 80, 24
    texts = same_texts(num_texts, words=[1, 2] * (num_words // 2))
    pairs = noise_of("infilling", infilling_mean_length=mean)(texts)
    found = np.array([check_infilled(row, ids, texts, pairs) for row, ids in enumerate(inputs_of(pairs))])
    rng = np.random.default_rng(0)
    expected = np.array([iid_spans(rng, budget=budget, mean=mean) for _ in range(20000)])
    errors = expected.std(axis=0) * math.sqrt(1 / num_texts + 1 / len(expected))
    assert (abs(found.mean(axis=0) - expected.mean(axis=0)) < 5 * errors).all()
    check_share(found[:, 1].sum(), found.sum(), math.exp(-mean))


@pytest.mark.parametrize("mean", [0.2, 1.0, 3.0, 3.5])
def test_drawn_lengths_are_poisson(mean):
    bits = [draws.bits(draws.row_keys([0], seed=0, stream=stream), 1 << 20)[0] for stream in ("a", "b")]
    lengths, empty = draw_spans(*bits, mean=mean)
    assert abs(empty.sum() / (empty.sum() + len(lengths)) - math.exp(-mean)) < 0.003
    number = empty.sum() + len(lengths)
    assert abs(lengths.sum() / number - mean) < 5 * math.sqrt(mean / number)
    sizes = np.arange(1, 8)
    shares = stats.poisson.pmf(sizes, mean) / stats.poisson.sf(0, mean)
    counts = [*(np.count_nonzero(lengths == size) for size in sizes), np.count_nonzero(lengths > 7)]
    check_chi_square(counts, np.append(shares, 1 - shares.sum()) * len(lengths))
    # The number of empty draws before one that is not.
    runs = math.exp(-mean) ** np.arange(3) * (1 - math.exp(-mean))
    counts = [*(np.count_nonzero(empty == size) for size in range(3)), np.count_nonzero(empty > 2)]
    check_chi_square(counts, np.append(runs, 1 - runs.sum()) * len(lengths))


@pytest.mark.parametrize("mean", [1e-300, 0.5, 3.0, 128.0])
def test_table_of_lengths_is_poisson_up_to_the_longest(mean):
    shares = poisson_shares(mean)
    sizes = np.arange(LONGEST_SPAN + 1)
    expected = stats.poisson.pmf(sizes, mean)
    np.testing.assert_allclose(shares, expected / expected.sum(), rtol=1e-9, atol=1e-300)


def test_every_layout_of_spans_is_as_likely():
    """Two of six words as spans of one word, which do not touch: 10 layouts."""
    texts = same_texts(30000, words=[1, 2, 1, 1, 1, 1])
    pairs = noise_of("infilling", infilling_probability=2 / 6, infilling_mean_length=1e-9)(texts)
    values, counts = np.unique(pairs.is_hidden[:, [0, 1, 3, 4, 5, 6]] @ (1 << np.arange(6)), return_counts=True)
    apart = [mask for mask in range(64) if mask.bit_count() == 2 and not mask & (mask << 1)]
    assert values.tolist() == apart
    check_chi_square(counts)


def test_the_cut_span_may_be_any_of_a_text():
    """The lengths of the first and of the last span of a text have one distribution."""
    num_texts = 4000
    texts = same_texts(num_texts, words=[1] * 40)
    hidden = noise_of("infilling")(texts).is_hidden
    sizes = []
    for flags in (hidden, hidden[:, ::-1]):
        first = flags.argmax(axis=1)
        ends = ~flags & (np.arange(40) > first[:, None])
        sizes.append(np.where(ends.any(axis=1), ends.argmax(axis=1), 40) - first)
    gap = sizes[0].mean() - sizes[1].mean()
    assert abs(gap) < 5 * np.sqrt((sizes[0].var() + sizes[1].var()) / num_texts)


@pytest.mark.parametrize("extra", [0, 2])
def test_an_input_is_no_longer_than_it_may_be(extra):
    """Many more empty spans are drawn than there is room for."""
    texts = same_texts(200, words=[1] * 30)
    options = {"infilling_probability": 0.1, "infilling_mean_length": 0.05}
    free = noise_of("infilling", **options)(texts).input_valid.sum(1)
    assert free.max() > 30 + extra
    bound = noise_of("infilling", **options, longest_input=30 + extra)(texts).input_valid.sum(1)
    assert bound.max() == 30 + extra
    assert (bound[free <= 30] == free[free <= 30]).all()


def test_empty_spans_lie_between_any_two_words():
    texts = same_texts(40000, words=[1, 2, 1, 2, 1])
    pairs = noise_of("infilling", infilling_probability=0.2, infilling_mean_length=1.5)(texts)
    counts = dict.fromkeys((101, 103, 104, 106), 0)
    for ids, hidden in zip(inputs_of(pairs), pairs.is_hidden, strict=True):
        if hidden[0]:  # the first word is the span
            for before, token in itertools.pairwise(ids[1:]):
                if before == MASK:
                    counts[token] += 1
    assert counts.pop(101) == 0
    check_chi_square(list(counts.values()))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sentences_are_permuted_whole(share):
    texts = make_texts(np.arange(120) % 60)
    pairs = noise_of("sentence_permutation", sentence_permutation_probability=share)(texts)
    check_pairs(texts, pairs)
    moved = 0
    for row, ids in enumerate(inputs_of(pairs)):
        sentences = [texts.input_ids[row, piece].tolist() for piece in pieces_of(row, texts.sent_starts, texts)]
        order = [next(number for number, sentence in enumerate(sentences) if sentence[0] == token)
                 for token in ids if any(sentence[0] == token for sentence in sentences)]  # fmt: skip
        assert sorted(order) == list(range(len(sentences)))
        assert ids == [token for number in order for token in sentences[number]]
        changed = sum(number != place for place, number in enumerate(order))
        assert changed <= ceil_share(share, len(sentences))
        moved += changed
    assert moved > 100


def test_every_order_of_sentences_is_as_likely():
    texts = same_texts(30000, words=[1, 2, 1, 1, 3], sentences=[2, 1, 2])
    pairs = noise_of("sentence_permutation")(texts)
    orders, counts = np.unique(pairs.input_ids, axis=0, return_counts=True)
    assert len(orders) == 6
    check_chi_square(counts)


def test_part_of_the_sentences_is_permuted():
    """Half of five sentences is three of them: ten subsets, each in one of six orders."""
    texts = same_texts(60000, words=[1] * 5, sentences=[1] * 5)
    pairs = noise_of("sentence_permutation", sentence_permutation_probability=0.5)(texts)
    expected = dict.fromkeys(itertools.permutations(range(100, 105)), 0)
    for subset in itertools.combinations(range(5), 3):
        for order in itertools.permutations(subset):
            result = list(range(100, 105))
            for place, number in zip(subset, order, strict=True):
                result[place] = 100 + number
            expected[tuple(result)] += 1
    counts = dict.fromkeys(expected, 0)
    for ids in inputs_of(pairs):
        counts[tuple(ids)] += 1
    possible = [order for order, ways in expected.items() if ways]
    assert sum(counts[order] for order in possible) == 60000
    check_chi_square([counts[order] for order in possible], [expected[order] * 1000 for order in possible])


def test_a_special_token_moves_with_the_sentence_before_it():
    """Its own flag does not begin a sentence."""
    texts = same_texts(200, words=[1] * 7, sentences=[2, 1, 1, 2, 1])
    is_special = np.zeros((200, 7), dtype=bool)
    is_special[:, [2, 6]] = True
    pairs = noise_of("sentence_permutation")(replace(texts, is_special=is_special))
    expected = {
        tuple(itertools.chain(*order)) for order in itertools.permutations([(100, 101, 102), (103,), (104, 105, 106)])
    }
    assert {tuple(ids) for ids in inputs_of(pairs)} == expected


def test_rotation_is_a_cyclic_shift_with_a_uniform_offset():
    texts = make_texts(np.full(20000, 9))
    pairs = noise_of("rotation")(texts)
    offsets = pairs.input_ids[:, 0] - texts.input_ids[:, 0]
    assert np.array_equal(pairs.input_ids, texts.input_ids[:, :1] + (np.arange(9) + offsets[:, None]) % 9)
    counts = np.bincount(offsets, minlength=9)
    assert not counts[0] and len(counts) == 9
    check_chi_square(counts[1:])


def test_rotation_turns_its_share_of_the_texts():
    texts = make_texts(np.full(20000, 30))
    pairs = noise_of("rotation", rotation_probability=0.3)(texts)
    is_rotated = pairs.input_ids[:, 0] != texts.input_ids[:, 0]
    check_share(np.count_nonzero(is_rotated), 20000, 0.3)
    offsets = (pairs.input_ids[:, 0] - texts.input_ids[:, 0])[is_rotated]
    check_chi_square(np.bincount(offsets, minlength=30)[1:])


@pytest.mark.parametrize("steps", [*((step,) for step in BART_STEPS), BART_STEPS, ()])
def test_probability_zero_is_the_identity(steps):
    texts = make_texts(np.arange(40), specials=0.1)
    pairs = noise_of(*steps, **NOTHING)(texts)
    check_pairs(texts, pairs)
    assert not pairs.is_hidden.any()
    assert np.array_equal(pairs.input_valid, texts.valid)
    assert np.array_equal(pairs.input_ids[texts.valid], texts.input_ids[texts.valid])


# Composition


@pytest.mark.parametrize("options", [{"words": 1.0, "sentences": 0.7}, {"specials": 0.15}])
def test_any_composition_shows_what_is_not_hidden(options):
    texts = make_texts(np.arange(60) % 15, **options)
    for steps in some_orders():
        for mean, probability in [(3.0, 0.3), (0.3, 0.7)]:
            pairs = noise_of(*steps, infilling_mean_length=mean, infilling_probability=probability)(texts)
            check_pairs(texts, pairs)
            if not {"sentence_permutation", "rotation"} & set(steps):
                for ids in inputs_of(pairs):
                    kept = [token for token in ids if token != MASK]
                    assert kept == sorted(kept)


@pytest.mark.parametrize("step", ["token_masking", "token_deletion"])
@pytest.mark.parametrize("before", [("sentence_permutation",), ("sentence_permutation", "rotation")])
def test_the_same_words_are_chosen_behind_other_noises(step, before):
    """A rotation may cut one word into two; here words have one token."""
    texts = make_texts(np.arange(60), words=1.0)
    alone, behind = noise_of(step)(texts), noise_of(*before, step)(texts)
    assert np.array_equal(alone.is_hidden, behind.is_hidden)
    assert inputs_of(alone) != inputs_of(behind)


def test_infilling_behind_permuted_sentences():
    """The paper's best noise: in the permuted text, the hidden words are spans of one mask each."""
    texts = make_texts(np.arange(120) % 60, specials=0.05)
    permuted = noise_of("sentence_permutation")(texts)
    pairs = noise_of("sentence_permutation", "infilling")(texts)
    check_pairs(texts, pairs)
    rows = np.arange(len(texts.rows))[:, None]
    columns = np.where(permuted.input_valid, permuted.input_ids - 100 - rows * 1000, 0)
    moved = replace(
        texts,
        input_ids=permuted.input_ids,
        word_starts=texts.word_starts[rows, columns],
        is_special=texts.is_special[rows, columns] & texts.valid,
    )
    hidden = replace(pairs, is_hidden=pairs.is_hidden[rows, columns] & texts.valid)
    for row, ids in enumerate(inputs_of(pairs)):
        words = hidden_words(row, moved, hidden)
        assert sum(words) == ceil_share(0.3, len(words))
        check_infilled(row, ids, moved, hidden)


def test_masks_travel_with_their_sentences():
    """Sentences of two words, one of which is masked: a mask in front of a sentence begins it."""
    texts = same_texts(3000, words=[1] * 6, sentences=[2] * 3)
    masked = inputs_of(noise_of("token_masking", token_masking_probability=0.5)(texts))
    pairs = noise_of("token_masking", "sentence_permutation", token_masking_probability=0.5)(texts)
    for before, after in zip(masked, inputs_of(pairs), strict=True):
        sentences = [before[:2], before[2:4], before[4:]]
        assert sorted([after[:2], after[2:4], after[4:]]) == sorted(sentences)


def test_what_is_left_of_a_sentence_begins_with_its_first_word_left():
    texts = same_texts(3000, words=[1] * 9, sentences=[3] * 3)
    options = {"token_deletion_probability": 0.4}
    deleted = inputs_of(noise_of("token_deletion", **options)(texts))
    pairs = noise_of("token_deletion", "sentence_permutation", **options)(texts)
    shuffled = 0
    for before, after in zip(deleted, inputs_of(pairs), strict=True):
        sentences = [[token for token in before if (token - 100) // 3 == number] for number in range(3)]
        orders = {tuple(itertools.chain(*order)) for order in itertools.permutations(sentences)}
        assert tuple(after) in orders
        shuffled += before != after
    assert shuffled > 2000


def test_empty_spans_end_the_sentence_before():
    """One word of four is hidden; every gap between words that stay holds an empty span."""
    texts = same_texts(2000, words=[1] * 4, sentences=[2, 2])
    options = {"infilling_probability": 0.25, "infilling_mean_length": 1e-6}
    infilled = inputs_of(noise_of("infilling", **options)(texts))
    pairs = noise_of("infilling", "sentence_permutation", **options)(texts)
    swapped = {
        (MASK, 101, MASK, 102, MASK, 103): (102, MASK, 103, MASK, 101, MASK),
        (100, MASK, 102, MASK, 103): (102, MASK, 103, 100, MASK),
        (100, MASK, 101, MASK, 103): (MASK, 103, 100, MASK, 101),
        (100, MASK, 101, MASK, 102, MASK): (102, MASK, 100, MASK, 101, MASK),
    }
    seen = set()
    for before, after in zip(map(tuple, infilled), map(tuple, inputs_of(pairs)), strict=True):
        assert after in (before, swapped[before])
        seen.add(before if after == before else (before, after))
    assert len(seen) == 8


def test_masks_are_never_selected_again():
    texts = make_texts(np.full(60, 40))
    masked = noise_of("token_masking", token_masking_probability=0.5)(texts)
    for step in ("token_deletion", "infilling"):
        both = noise_of("token_masking", step, token_masking_probability=0.5, **{f"{step}_probability": 0.5})(texts)
        assert (both.is_hidden >= masked.is_hidden).all()
        for row, ids in enumerate(inputs_of(both)):
            hidden, before = sum(hidden_words(row, texts, both)), sum(hidden_words(row, texts, masked))
            number = len(words_of(row, texts))
            assert hidden - before == ceil_share(0.5, number - before)
            assert ids.count(MASK) >= before and (step == "infilling" or ids.count(MASK) == before)


def test_a_rotated_text_keeps_its_sentences():
    """The cut sentence is two; three sentences of two tokens give at most four, whose order is any."""
    texts = same_texts(3000, words=[1] * 6, sentences=[2] * 3)
    seen = {tuple(ids) for ids in inputs_of(noise_of("rotation", "sentence_permutation")(texts))}
    assert (103, 102, 104, 105, 100, 101) in seen, "the pieces of a cut sentence are apart"
    for ids in seen:
        assert sum(ids.index(first + 1) == ids.index(first) + 1 for first in (100, 102, 104)) >= 2
