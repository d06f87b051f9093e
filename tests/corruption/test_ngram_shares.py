"""N-grams by given shares and of tokens, as UniLM hides them, and special tokens that may be selected."""

from dataclasses import replace

import numpy as np
import pytest

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.corruption.masking import Vocabulary, mask_rows, needs_word_starts
from hf_pretrain.corruption.rows import ExampleRows, RowKeys
from hf_pretrain.corruption.spans import ngram_lengths
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError

CLOZE = {"masking_unit": "ngram", "ngram_unit": "token", "ngram_shares": [0.8, 0.1, 0.1]}
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def vocabulary():
    protected = np.zeros(100, dtype=np.bool_)
    protected[:5] = True
    return Vocabulary(mask_id=4, protected=protected, ordinary_ids=np.arange(5, 100))


def rows_of(count, length, *, seed=0):
    """Rows [CLS] a [SEP] b [SEP] of one length, without word starts."""
    keys = RowKeys(np.arange(count), np.zeros(count, dtype=np.int64), seed=seed)
    ids = 5 + draws.integers(draws.row_keys(range(count), seed=7, stream="ids"), length, high=95)
    ids[:, 0], ids[:, length // 3], ids[:, -1] = CLS, SEP, SEP
    return ExampleRows(ids, np.ones_like(ids, dtype=np.bool_), keys)


def sizes(selection):
    spans = selection.spans()
    return np.bincount(spans[:, 2] - spans[:, 1], minlength=4)[1:] / len(spans)


def test_lengths_are_drawn_by_the_shares():
    uniforms = draws.uniforms(draws.row_keys([2], seed=0, stream="lengths"), 1_000_000)[0]
    for available, expected in ((9, [0.8, 0.1, 0.1]), (2, [8 / 9, 1 / 9]), (1, [1.0])):
        lengths = ngram_lengths(
            uniforms, available=np.full(len(uniforms), available), max_ngram=3, shares=[0.8, 0.1, 0.1]
        )
        np.testing.assert_allclose(np.bincount(lengths)[1:] / lengths.size, expected, atol=0.0025)
    for available, expected in ((9, 3), (2, 2), (1, 1)):
        available = np.full(len(uniforms), available)
        assert (ngram_lengths(uniforms, available=available, max_ngram=3, shares=[0.0, 0.0, 1.0]) == expected).all()


def test_cloze_hides_single_tokens_and_runs_of_two_or_three_by_their_shares(vocabulary):
    # Few targets in long rows: hardly any run meets another one or the end of the budget.
    arguments = MaskingArguments(**CLOZE, mlm_probability=0.02)
    selection = mask_rows(rows_of(700, 3000), arguments=arguments, vocabulary=vocabulary).selection
    np.testing.assert_allclose(sizes(selection), [0.8, 0.1, 0.1], atol=0.01)
    # At 15 % some do, and the longer ones more often.
    masked = mask_rows(rows_of(1000, 512), arguments=MaskingArguments(**CLOZE), vocabulary=vocabulary)
    np.testing.assert_allclose(sizes(masked.selection), [0.8, 0.1, 0.1], atol=0.025)
    assert (masked.selection.mask.sum(axis=1) == round(0.15 * 512)).all()


def test_runs_are_of_tokens_that_neither_words_nor_special_tokens_end(vocabulary):
    rows, arguments = rows_of(300, 60), MaskingArguments(**CLOZE | {"ngram_shares": [0.0, 0.0, 1.0]})
    assert not needs_word_starts(arguments)
    one_word = np.zeros_like(rows.valid)
    masked = [
        mask_rows(r, arguments=arguments, vocabulary=vocabulary) for r in (rows, replace(rows, word_starts=one_word))
    ]
    assert np.array_equal(masked[0].input_ids, masked[1].input_ids)
    mask = masked[0].selection.mask
    assert not mask[:, [0, 20, -1]].any() and sizes(masked[0].selection)[2] > 0.8
    by_words = MaskingArguments(masking_unit="ngram", ngram_shares=[0.8, 0.1, 0.1])
    assert needs_word_starts(by_words)
    whole = mask_rows(replace(rows, word_starts=one_word), arguments=by_words, vocabulary=vocabulary).selection.mask
    assert set(whole[:, 1:20].sum(axis=1)) <= {0, 19}


@pytest.mark.parametrize("options", [{}, CLOZE, {"masking_count": "bernoulli"}, {"masking_unit": "word"}])
def test_a_special_token_is_a_target_like_any_other_where_it_may_be(vocabulary, options):
    rows, arguments = rows_of(20_000, 40), MaskingArguments(**options)
    rows = replace(rows, word_starts=np.ones_like(rows.valid))
    may = np.zeros_like(rows.valid)
    may[::2, -1] = True
    masked = mask_rows(replace(rows, also_maskable=may), arguments=arguments, vocabulary=vocabulary)
    mask = masked.selection.mask
    assert not mask[1::2, -1].any() and not mask[:, [0, 13]].any()
    rate, others = mask[::2, -1].mean(), mask[::2, 1:13].mean()
    # The last token of a run has no neighbour after it from which a run of two could begin.
    assert abs(rate - others) < 0.015 and rate > 0.1
    assert set(masked.input_ids[::2, -1]) > {SEP, 4}, "hidden, exchanged or left"
    assert np.array_equal(masked.input_ids[~mask], rows.input_ids[~mask])


@pytest.mark.parametrize(
    "shares", [[], [1.0], [0.5, 0.5, 0.5], [1.2, -0.1, -0.1], [0.4, 0.3, 0.2, 0.1], ["a", "b", "c"]]
)
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(InputError, match=r"ngram_shares=.* must be 3 numbers from 0 that add up to 1"):
        MaskingArguments(**CLOZE | {"ngram_shares": shares})


def test_an_unknown_unit_is_refused():
    with pytest.raises(InputError, match="ngram_unit='letter' must be one of word, token"):
        MaskingArguments(ngram_unit="letter")
