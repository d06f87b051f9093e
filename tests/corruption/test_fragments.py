"""T5 spans, UL2, prefix language modelling and MASS against rules that are written a second time here, a token at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hf_pretrain.corruption.fragments import (
    MODE_TOKENS,
    Denoiser,
    MassNoise,
    PrefixLM,
    SpanCorruption,
    UL2Noise,
    sentinels_needed,
    span_counts,
)
from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.corruption.texts import NoisedTexts, Texts
from hf_pretrain.errors import InputError

# Out of order and without a gap to the text's ids, so that a sentinel computed from its number is a wrong one.
SENTINELS = np.array([9_000 + 7 * (i * 37 % 101) for i in range(100)])
MODES = {"R": 7_001, "X": 7_002, "S": 7_003}
PAPER = tuple(map(Denoiser.parse, ["R:3:0.15", "R:8:0.15", "X:3:0.5", "X:8:0.5", "X:64:0.15", "X:64:0.5", "S:0.25"]))
MASK, RANDOM_IDS, FIRST_ID = 4, np.arange(5_000, 5_010), 10_000_000
T5 = SpanCorruption(sentinels=SENTINELS)
MASS = MassNoise(mask_token_id=MASK, random_ids=RANDOM_IDS)
UL2 = UL2Noise(denoisers=PAPER, sentinels=SENTINELS, mode_ids=MODES)
NOISES = {
    "t5": T5,
    "roll": replace(T5, random_roll=True),
    "iid": replace(T5, choice="iid"),
    "ul2": UL2,
    "prefix_lm": PrefixLM(),
    "prefix_lm_share": PrefixLM(share=0.25),
    "mass": MASS,
}


def make_texts(lengths, *, width=None, rows=None, offsets=None, first_example=50, epoch=0, seed=3) -> Texts:
    """Texts of which no two tokens are alike; special tokens are none."""
    lengths = np.asarray(lengths, dtype=np.int64)
    width = max(int(lengths.max(initial=1)), 1) if width is None else width
    rows = np.arange(len(lengths)) if rows is None else np.asarray(rows)
    offsets = np.zeros(len(lengths), dtype=np.int64) if offsets is None else np.asarray(offsets)
    valid = np.arange(width) < lengths[:, None]
    examples = np.arange(rows.max(initial=-1) + 1) + first_example
    ids = FIRST_ID + (examples[rows] * 10_000 + offsets)[:, None] + np.arange(width)
    ids[~valid] = 0
    keys = RowKeys(examples, np.full(len(examples), epoch), seed)
    return Texts(ids, valid, valid.copy(), None, np.zeros_like(valid), rows, offsets, keys)


def lists(values: np.ndarray, valid: np.ndarray) -> list[list[int]]:
    assert (np.diff(valid.astype(int), axis=1) <= 0).all(), "not left-aligned"
    return [row[keep].tolist() for row, keep in zip(values, valid, strict=True)]


def parts(texts: Texts, pairs: NoisedTexts):
    """Each text with its input, target and flags, as lists."""
    raw = lists(texts.input_ids, texts.valid)
    inputs, targets = lists(pairs.input_ids, pairs.input_valid), lists(pairs.targets, pairs.target_valid)
    assert not pairs.is_hidden[~pairs.target_valid].any()
    return zip(raw, inputs, targets, lists(pairs.is_hidden, pairs.target_valid), strict=True)


def reconstruct(inputs: list[int], target: list[int]) -> list[int]:
    """Put the spans of a target into the places of their sentinels, after the sentinels have been checked."""
    marks = set(SENTINELS.tolist())
    spans: list[list[int]] = []
    for token in target:
        if token in marks:
            spans.append([])
        else:
            spans[-1].append(token)
    in_order = SENTINELS[: len(spans)].tolist()
    assert [token for token in target if token in marks] == in_order
    assert [token for token in inputs if token in marks] == in_order
    assert all(spans), "an empty span"
    assert not any(a in marks and b in marks for a, b in itertools.pairwise(inputs)), "spans touch"
    whole = []
    for token in inputs:
        whole += spans[SENTINELS.tolist().index(token)] if token in marks else [token]
    return whole


def hidden_mask(texts: Texts, pairs: NoisedTexts) -> np.ndarray:
    """Where the tokens of the text are that a target holds: `[P, W]`; no two tokens are alike."""
    return np.isin(texts.input_ids, pairs.targets[pairs.is_hidden]) & texts.valid


@pytest.mark.parametrize(
    ("inputs", "raw", "targets"), [(512, 568, 114), (128, 141, 29), (256, 284, 58), (1024, 1137, 229)]
)
def test_a_text_of_this_length_fills_t5s_input_exactly(inputs, raw, targets):
    noise = replace(T5, sentinels=np.arange(100))
    assert noise.longest_pair(raw) == (inputs - 1, targets - 1) and noise.longest_pair(raw + 1)[0] > inputs - 1
    pairs = noise(make_texts([raw] * 40))
    assert pairs.input_valid.shape == (40, inputs - 1) and pairs.input_valid.all()
    assert pairs.target_valid.shape == (40, targets - 1) and pairs.target_valid.all()


def test_no_longer_text_has_a_shorter_pair():
    for density, mean, roll in itertools.product([0.05, 0.15, 0.5, 0.9], [1.0, 2.0, 3.0, 64.0, 1e6], [False, True]):
        noise = SpanCorruption(sentinels=np.arange(999), density=density, mean_length=mean, random_roll=roll)
        pairs = [noise.longest_pair(length) for length in range(1, 200)]
        assert pairs == sorted(pairs)


def test_counts_are_those_of_a_loop_with_rounding_to_even():
    for density, mean in itertools.product([0.05, 0.15, 0.25, 0.5, 0.9], [1.0, 2.0, 3.0, 8.0, 64.0]):
        hidden, spans = span_counts(np.arange(1200), density=density, mean_length=mean)
        for n in range(2, 1200):
            wanted = min(max(round(n * density), 1), n - 1)
            assert hidden[n] == wanted
            assert spans[n] == min(max(round(wanted / mean), 1), n - wanted)
        assert (hidden[:2].tolist(), spans[:2].tolist()) == ([0, 1], [0, 1])
    # Halves: 1.5, 4.5, 7.5 and 10.5 tokens.
    assert span_counts(np.array([10, 30, 50, 70]), density=0.15, mean_length=3.0)[0].tolist() == [2, 4, 8, 10]
    # One density and mean length a text.
    hidden, spans = span_counts(
        np.array([568, 512, 100]), density=np.array([0.15, 0.5, 0.25]), mean_length=np.array([3, 3, np.inf])
    )
    assert (hidden.tolist(), spans.tolist()) == ([85, 256, 25], [28, 85, 1])


@pytest.mark.parametrize("name", ["t5", "roll", "iid"])
def test_input_and_target_make_the_text_again(name):
    texts = make_texts([0, 1, 2, 3, 4, 5, 7, 10, 20, 33, 64, 100, 141, 200, 333, 400] * 20)
    pairs = NOISES[name](texts)
    for raw, inputs, target, hidden in parts(texts, pairs):
        assert reconstruct(inputs, target) == raw
        assert hidden == [token not in SENTINELS for token in target]
    assert pairs.starts is None and not pairs.kinds.any() and not T5.has_whole_target and T5.ends_target


def test_number_of_hidden_tokens_and_spans_is_exact():
    lengths = np.repeat([2, 3, 10, 30, 141, 400, 568], 30)
    texts = make_texts(lengths)
    for density, mean in [(0.15, 3.0), (0.5, 8.0), (0.9, 2.0), (0.15, 1.0)]:
        pairs = replace(T5, density=density, mean_length=mean, sentinels=np.arange(400))(texts)
        hidden, spans = span_counts(lengths, density=density, mean_length=mean)
        assert np.array_equal(pairs.is_hidden.sum(axis=1), hidden)
        assert np.array_equal(pairs.target_valid.sum(axis=1), hidden + spans)
        assert np.array_equal(pairs.input_valid.sum(axis=1), lengths - hidden + spans)


def test_spans_have_the_mean_length_and_lie_alike_everywhere():
    texts = make_texts([300] * 4000)
    mask = hidden_mask(texts, T5(texts))
    assert not mask[:, 0].any() and mask[:, -1].all()
    assert (mask.sum(axis=1) == 45).all()  # the density is exact
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    assert abs(mask.sum() / starts.sum() - 3.0) < 0.05
    # In the interior the bias of both ends is small.
    assert np.abs(mask[:, 40:-40].mean(axis=0) - 0.15).max() < 0.03

    rolled = hidden_mask(texts, NOISES["roll"](texts))
    assert (rolled.sum(axis=1) == 45).all()
    assert np.abs(rolled.reshape(4000, 30, 10).mean(axis=(0, 2)) - 0.15).max() < 0.01
    assert abs(rolled[:, 0].mean() - 0.15) < 0.02 and abs(rolled[:, -1].mean() - 0.15) < 0.02
    # The very same spans, rotated by offsets of which all are alike.
    found = [(2 * row.tobytes()).find(turned.tobytes()) for row, turned in zip(mask, rolled, strict=True)]
    offsets = np.array(found)
    assert offsets.min() == 0 and offsets.max() == 299
    assert stats.chisquare(np.bincount(offsets // 10, minlength=30)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("length", "density", "mean", "num_masks"), [(8, 0.5, 2.0, 9), (9, 0.34, 1.0, 10), (10, 0.3, 1.5, 12)]
)
def test_all_ways_to_lay_spans_are_alike(length, density, mean, num_masks):
    hidden, spans = (int(count) for count in span_counts(length, density=density, mean_length=mean))
    # By brute force: all masks with that many hidden tokens and spans, of which the last ends the text.
    wanted = []
    for positions in itertools.combinations(range(length), hidden):
        bits = "".join("1" if i in positions else "0" for i in range(length))
        if len([run for run in bits.split("0") if run]) == spans and bits[0] == "0" and bits[-1] == "1":
            wanted.append(bits)
    assert len(wanted) == num_masks
    # Longer and shorter texts in the same batch must not matter.
    lengths = np.full(20_000, length)
    lengths[::3], lengths[1::3] = length + 13, length - 3
    texts = make_texts(lengths)
    mask = hidden_mask(texts, replace(T5, density=density, mean_length=mean)(texts))[lengths == length, :length]
    found = ["".join("01"[int(token)] for token in row) for row in mask]
    assert set(found) == set(wanted)
    assert stats.chisquare([found.count(bits) for bits in wanted]).pvalue > 1e-3


def test_iid_hides_each_token_by_itself_and_merges_runs():
    texts = make_texts([300] * 2000)
    pairs = NOISES["iid"](texts)
    mask = hidden_mask(texts, pairs)
    assert abs(mask.mean() - 0.15) < 0.003
    counts = mask.sum(axis=1)
    assert abs(counts.std() - np.sqrt(300 * 0.15 * 0.85)) < 0.4  # and not a fixed number
    assert abs((mask[:, 1:] & mask[:, :-1]).mean() - 0.15**2) < 0.001
    runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(axis=1)
    assert np.array_equal(pairs.target_valid.sum(axis=1), counts + runs)


def test_too_many_spans_are_refused_with_both_numbers():
    message = (
        r"^sentinels holds 100 ids, but a text of 2048 tokens needs 102 with density=0.15 and mean_length=3: "
        r"use shorter texts, longer spans, or a tokenizer with more sentinel tokens$"
    )
    assert sentinels_needed(2048, density=0.15, mean_length=3.0) == 102
    for refuse in (lambda: T5(make_texts([10, 2048, 20])), lambda: T5.check_length(2048)):
        with pytest.raises(InputError, match=message):
            refuse()
    longest = max(n for n in range(2048) if sentinels_needed(n, density=0.15, mean_length=3.0) <= 100)
    T5.check_length(longest)
    assert T5(make_texts([longest])).input_valid.any()
    with pytest.raises(InputError, match="needs 101"):
        T5.check_length(longest + 1)
    # 28 spans fill 512 tokens; a rotation may make 29 of them, and in some text it does.
    roll = NOISES["roll"]
    replace(T5, sentinels=SENTINELS[:28]).check_length(568)
    replace(roll, sentinels=SENTINELS[:29]).check_length(568)
    with pytest.raises(InputError, match="holds 28 ids, but a text of 568 tokens needs 29"):
        replace(roll, sentinels=SENTINELS[:28]).check_length(568)
    with pytest.raises(InputError, match="holds 28 ids, but a text of 568 tokens needs 29"):
        replace(roll, sentinels=SENTINELS[:28])(make_texts([568] * 100))
    assert sentinels_needed(10, density=0.2, mean_length=1.0, random_roll=True) == 2  # a span of one token stays one
    iid = NOISES["iid"]
    iid.check_length(400)
    with pytest.raises(
        InputError, match=r"holds 100 ids, but a text of 700 tokens needs \d+ with density=0.15 and choice='iid'"
    ):
        iid.check_length(700)
    with pytest.raises(
        InputError, match=r"holds 3 ids, but a text of 60 tokens needs \d+ with density=0.15 and choice='iid'"
    ):
        replace(iid, sentinels=SENTINELS[:3])(make_texts([60] * 30))


def test_iid_texts_need_no_more_sentinels_than_were_checked():
    noise = replace(NOISES["iid"], density=0.3)
    for length in [1, 2, 5, 20, 100, 300]:
        enough = min(n for n in range(1, 400) if not refuses(replace(noise, sentinels=np.arange(n)), length))
        replace(noise, sentinels=np.arange(enough))(make_texts([length] * 3000))
        assert enough <= (length + 1) // 2 and enough < 0.21 * length + 7 * np.sqrt(length)


def refuses(noise, length: int) -> bool:
    try:
        noise.check_length(length)
    except InputError:
        return True
    return False


def test_ul2_draws_each_denoiser_alike_and_begins_with_its_mode():
    lengths = np.tile([100, 90, 41, 141], 2500)
    texts = make_texts(lengths)
    pairs = UL2(texts)
    assert UL2.kinds == ("r_3_15", "r_8_15", "x_3_50", "x_8_50", "x_64_15", "x_64_50", "s_25")
    assert [
        str(denoiser) for denoiser in PAPER
    ] == "R:3:0.15 R:8:0.15 X:3:0.5 X:8:0.5 X:64:0.15 X:64:0.5 S:0.25".split()
    assert np.abs(np.bincount(pairs.kinds, minlength=7) / len(lengths) - 1 / 7).max() < 0.012
    drawn = [PAPER[kind] for kind in pairs.kinds]
    density, mean = (np.array([getattr(one, name) for one in drawn]) for name in ("density", "mean_length"))
    hidden, spans = span_counts(lengths, density=density, mean_length=mean)
    assert np.array_equal(pairs.is_hidden.sum(axis=1), hidden)
    assert np.array_equal(pairs.target_valid.sum(axis=1), np.add(hidden, spans))
    for denoiser, length, (raw, inputs, target, _) in zip(drawn, lengths, parts(texts, pairs), strict=True):
        assert inputs[0] == MODES[denoiser.mode]
        assert reconstruct(inputs[1:], target) == raw
        assert inputs[1] == raw[0]
        if denoiser.mode == "S":
            tail = round(0.25 * length)
            assert inputs[1:] == [*raw[:-tail], SENTINELS[0]] and target == [SENTINELS[0], *raw[-tail:]]
    most = UL2.longest_pair(141)
    assert most == (pairs.input_valid.sum(axis=1).max(), pairs.target_valid.sum(axis=1).max())


def test_ul2_refuses_by_the_name_of_the_denoiser():
    raw = 767
    assert sentinels_needed(raw, density=0.5, mean_length=3.0) == 128
    message = (
        r"^sentinels holds 100 ids, but a text of 767 tokens needs 128 with the denoiser X:3:0.5: use shorter texts"
    )
    for refuse in (lambda: UL2.check_length(raw), lambda: UL2(make_texts([raw] * 40))):
        with pytest.raises(InputError, match=message):
            refuse()
    replace(UL2, sentinels=np.arange(128)).check_length(raw)
    with pytest.raises(
        InputError, match=r"^mode_ids has no id for 'S', the mode of S:0.25: add \[S2S\] to the tokenizer$"
    ):
        replace(UL2, mode_ids={"R": 1, "X": 2})
    with pytest.raises(InputError, match="^denoisers="):
        replace(UL2, denoisers=())
    assert list(MODE_TOKENS) == ["R", "X", "S"]


def test_a_denoiser_that_is_given_twice_is_twice_as_frequent():
    noise = replace(UL2, denoisers=(PAPER[0], PAPER[6], PAPER[6]))
    assert noise.kinds == ("r_3_15", "s_25")
    kinds = noise(make_texts([20] * 6000)).kinds
    assert abs((kinds == 1).mean() - 2 / 3) < 0.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("R:3", r"'R:3' must be R or X, mean length and share .* such as R:3:0.15, or S and share, such as S:0.25"),
        ("S:3:0.25", "'S:3:0.25' must be R or X"),
        ("Q:3:0.15", "'Q:3:0.15' must be R or X"),
        ("R:three:0.15", "'R:three:0.15' must be R or X"),
        ("", "'' must be R or X"),
        ("R:3:1.5", "share of hidden tokens in 'R:3:1.5'=1.5 must be a number above 0 and below 1"),
        ("S:0", "share of hidden tokens in 'S:0'=0.0 must be"),
        ("S:nan", "share of hidden tokens in 'S:nan'=nan must be"),
        ("X:0.5:0.5", "mean length in 'X:0.5:0.5'=0.5 must be a number of at least 1"),
        ("X:inf:0.5", "mean length in 'X:inf:0.5'=inf must be"),
    ],
)
def test_a_denoiser_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(InputError, match=f"^denoisers: .*{message}"):
        Denoiser.parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(T5, density=0.0), "^density=0.0 must be"),
        (lambda: replace(T5, density=1.0), "^density=1.0 must be"),
        (lambda: replace(T5, mean_length=0.5), "^mean_length=0.5 must be"),
        (lambda: replace(T5, choice="idd"), "^choice='idd' must be one of random, iid; did you mean 'iid'"),
        (lambda: replace(T5, choice="iid", random_roll=True), "^random_roll=True has no effect with choice='iid'"),
        (lambda: PrefixLM(share=1.0), "^share=1.0 must be"),
        (lambda: replace(MASS, share=0.0), "^share=0.0 must be"),
        (lambda: replace(MASS, random_ids=np.zeros(0, dtype=np.int64)), r"^random_ids=\[\] must hold"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_prefix_lm_cuts_each_text_in_two():
    for noise in (PrefixLM(), PrefixLM(share=0.25), PrefixLM(share=0.9)):
        texts = make_texts(np.tile([2, 3, 5, 6, 10, 40], 100))
        pairs = noise(texts)
        assert np.array_equal(pairs.is_hidden, pairs.target_valid)
        for raw, inputs, target, _ in parts(texts, pairs):
            assert inputs + target == raw and inputs and target
            assert noise.share is None or len(target) == min(max(round(noise.share * len(raw)), 1), len(raw) - 1)
    texts = make_texts(np.tile([21, 5], 10_000))
    sizes = PrefixLM()(texts).target_valid.sum(axis=1)
    for length in (21, 5):
        counts = np.bincount(sizes[texts.lengths == length], minlength=length)
        assert counts[0] == 0 and len(counts) == length
        assert stats.chisquare(counts[1:]).pvalue > 1e-3


def test_mass_hides_one_fragment_at_the_places_of_the_paper():
    length, size = 101, 50  # 50.5 is rounded to even
    texts = make_texts([length] * 20_000)
    pairs = MASS(texts)
    assert not MASS.ends_target and not MASS.has_whole_target
    assert pairs.target_valid.shape == (20_000, size) and pairs.target_valid.all()
    fragments = texts.input_ids[np.arange(20_000)[:, None], pairs.starts[:, None] + np.arange(size)]
    assert np.array_equal(pairs.targets, fragments)
    assert pairs.starts.min() == 1 and pairs.starts.max() == length - size
    inside = 0.6 / (
        length - size
    )  # the share that the uniform draw gives to each start, the first and the last among them
    assert abs((pairs.starts == 1).mean() - 0.2 - inside) < 0.02
    assert abs((pairs.starts == length - size).mean() - 0.2 - inside) < 0.02
    counts = np.bincount(pairs.starts, minlength=length - size + 1)
    assert stats.chisquare(counts[2:-1]).pvalue > 1e-3
    # 80 % masked, 10 % random, 10 % kept, at every place of the fragment.
    shown = pairs.input_ids[np.arange(20_000)[:, None], pairs.starts[:, None] + np.arange(size)]
    is_random = np.isin(shown, RANDOM_IDS)
    for found, share in [(shown == MASK, 0.8), (is_random, 0.1), (shown == fragments, 0.1)]:
        assert abs(found.mean() - share) < 0.005
        assert np.abs(found.mean(axis=0) - share).max() < 0.02
    assert ((shown == MASK) | is_random | (shown == fragments)).all()
    assert np.array_equal(pairs.is_hidden, shown != fragments)
    assert stats.chisquare(np.bincount(shown[is_random] - 5_000, minlength=10)).pvalue > 1e-3


def test_mass_shows_everything_else_and_nothing_of_the_fragment_but_the_kept_share():
    texts = make_texts(np.tile([2, 3, 4, 5, 6, 7, 31, 64], 150))
    for share in (0.5, 0.15, 0.99):
        noise = replace(MASS, share=share)
        pairs = noise(texts)
        assert np.array_equal(pairs.input_valid, texts.valid)
        starts = pairs.starts.tolist()
        for start, (raw, inputs, target, hidden) in zip(starts, parts(texts, pairs), strict=True):
            assert len(target) == min(max(round(share * len(raw)), 1), len(raw) - 1) == noise.longest_pair(len(raw))[1]
            end = start + len(target)
            assert start >= 1 and target == raw[start:end]
            assert inputs[:start] + target + inputs[end:] == raw  # each token is visible or a target, and in its place
            shown_targets = set(inputs) & set(target)
            assert shown_targets == {token for token, flag in zip(target, hidden, strict=True) if not flag}


def test_mass_never_makes_a_special_token_random():
    texts = make_texts([40] * 3000)
    special = np.zeros_like(texts.valid)
    special[:, ::2] = True
    pairs = MASS(replace(texts, is_special=special))
    is_random = np.isin(pairs.input_ids, RANDOM_IDS)
    fragment = np.isin(texts.input_ids, pairs.targets)
    assert not is_random[special].any()
    assert abs((pairs.input_ids == MASK)[special & fragment].mean() - 0.9) < 0.01
    assert abs(is_random[~special & fragment].mean() - 0.1) < 0.01


@pytest.mark.parametrize("name", NOISES)
def test_short_texts_make_pairs(name):
    noise = NOISES[name]
    texts = make_texts([0, 1, 2, 0, 1], width=4)
    pairs = noise(texts)
    for raw, inputs, target, hidden in parts(texts, pairs):
        inputs = inputs[1:] if name == "ul2" else inputs
        if not raw:
            assert (inputs, target, hidden) == ([], [], [])
        elif name == "mass":
            assert len(inputs) == len(raw) and target == raw[-1:]
        elif name.startswith("prefix"):
            assert inputs + target == raw and len(target) == 1
        elif name != "iid":
            assert reconstruct(inputs, target) == raw and len(target) == 2 and target[0] == SENTINELS[0]
        if raw and name != "iid":
            assert noise.longest_pair(len(raw)) == (len(inputs) + (name == "ul2"), len(target))
    if name == "mass":
        assert pairs.starts.tolist() == [0, 0, 1, 0, 0]
    for empty in (make_texts([0, 0], width=3), make_texts([], width=3)):
        assert not noise(empty).target_valid.any() and len(noise(empty).targets) == len(empty.rows)


@pytest.mark.parametrize("name", NOISES)
def test_no_pair_is_longer_than_announced(name):
    noise, lengths = NOISES[name], np.tile([1, 2, 3, 9, 50, 120], 200)
    texts = make_texts(lengths)
    pairs = noise(texts)
    announced = np.array([noise.longest_pair(int(length)) for length in lengths])
    assert (pairs.input_valid.sum(axis=1) <= announced[:, 0]).all()
    assert (pairs.target_valid.sum(axis=1) <= announced[:, 1]).all()


def results(texts: Texts, pairs: NoisedTexts) -> list[tuple]:
    starts = [0] * len(pairs.kinds) if pairs.starts is None else pairs.starts.tolist()
    found = parts(texts, pairs)
    return [(*lists_, kind, start) for lists_, kind, start in zip(found, pairs.kinds.tolist(), starts, strict=True)]


@pytest.mark.parametrize("name", NOISES)
def test_a_pair_depends_on_its_text_alone(name):
    noise, lengths = NOISES[name], [60, 2, 0, 33, 1, 91, 17, 60]
    alone = []
    for index, length in enumerate(lengths):
        texts = make_texts([length], first_example=50 + index)
        alone += results(texts, noise(texts))
    for width in (91, 200):
        texts = make_texts(lengths, width=width)
        assert results(texts, noise(texts)) == alone
    # Several texts of one example: the draws belong to the position in it.
    together = make_texts([20, 15, 30, 9], rows=[0, 0, 0, 1], offsets=[1, 22, 40, 1])
    found = results(together, noise(together))
    for index, (length, row, offset) in enumerate([(20, 0, 1), (15, 0, 22), (30, 0, 40), (9, 1, 1)]):
        text = make_texts([length], rows=[0], offsets=[offset], first_example=50 + row)
        assert results(text, noise(text)) == found[index : index + 1]


@pytest.mark.parametrize("name", [name for name in NOISES if name != "prefix_lm_share"])
def test_epochs_seeds_examples_and_offsets_have_draws_of_their_own(name):
    noise = NOISES[name]

    def shapes(**options) -> list[tuple]:
        """Results in which tokens are numbered by their place in the text, so that only the draws count."""
        texts = make_texts([200] * 30, **options)
        base = texts.input_ids[:, :1]
        pairs = noise(replace(texts, input_ids=texts.input_ids - base + FIRST_ID))
        return [(pairs.input_ids[i].tolist(), pairs.targets[i].tolist()) for i in range(30)]

    first = shapes()
    assert shapes() == first
    for other in (shapes(epoch=1), shapes(seed=4), shapes(first_example=1000), shapes(offsets=[5] * 30)):
        assert np.mean([a == b for a, b in zip(first, other, strict=True)]) < 0.2
    assert len({str(pair) for pair in first}) > 15


def test_special_tokens_inside_a_text_are_like_others():
    texts = make_texts([50] * 200)
    special = np.zeros_like(texts.valid)
    special[:, ::7] = True
    for noise in (T5, UL2, PrefixLM()):
        a, b = noise(texts), noise(replace(texts, is_special=special))
        assert np.array_equal(a.targets, b.targets) and np.array_equal(a.input_ids, b.input_ids)
