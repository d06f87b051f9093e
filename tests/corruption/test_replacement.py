from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats
from transformers import BertTokenizer, HfArgumentParser, TrainingArguments

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.corruption.masking import Vocabulary, mask_rows
from hf_pretrain.corruption.rows import ExampleRows, RowKeys
from hf_pretrain.errors import InputError

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NUM_TOKENS = 105


@pytest.fixture(scope="module")
def small_tokenizer():
    # Special tokens in the middle of the ids, so that "ids from 5 on" is not the right answer.
    tokens = [f"w{i}" for i in range(50)] + SPECIALS + [f"w{i}" for i in range(50, 100)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def make_rows(num_rows: int, width: int) -> ExampleRows:
    rng = np.random.default_rng(1)
    input_ids = rng.integers(0, 50, (num_rows, width))
    input_ids[:, 0], input_ids[:, -1] = 52, 53
    word_starts = rng.random((num_rows, width)) < 0.6
    keys = RowKeys(np.arange(num_rows), np.zeros(num_rows, dtype=np.int64), seed=11)
    return ExampleRows(input_ids, np.ones_like(word_starts), keys, word_starts=word_starts)


def fates(rows: ExampleRows, masked, *, mask_id: int = 54) -> np.ndarray:
    """0 masked, 1 another token, 2 the same token, of each target."""
    new, old = masked.input_ids.ravel()[masked.positions], rows.input_ids.ravel()[masked.positions]
    return np.where(new == mask_id, 0, np.where(new != old, 1, 2))


@pytest.mark.parametrize("replacement_unit", ["token", "word", "unit"])
@pytest.mark.parametrize("masking_unit", ["token", "word", "ngram", "span"])
def test_eighty_ten_ten_for_every_pair_of_units(small_tokenizer, masking_unit, replacement_unit):
    rows = make_rows(2048, 512)
    arguments = MaskingArguments(masking_unit=masking_unit, replacement_unit=replacement_unit)
    masked = mask_rows(rows, arguments=arguments, vocabulary=Vocabulary.from_tokenizer(small_tokenizer))
    shares = np.bincount(fates(rows, masked), minlength=3) / len(masked.positions)
    # One random token in a hundred is the token itself. Spans are decided in lumps of some nine tokens.
    tolerance = 0.012 if replacement_unit == "unit" and masking_unit == "span" else 0.005
    np.testing.assert_allclose(shares, [0.8, 0.099, 0.101], atol=tolerance)
    untouched = ~masked.selection.mask
    np.testing.assert_array_equal(masked.input_ids[untouched], rows.input_ids[untouched])


def test_random_tokens_are_uniform_and_never_special(small_tokenizer):
    rows = make_rows(2048, 512)
    arguments = MaskingArguments(mlm_probability=0.5, mask_share=0.0, random_share=1.0)
    masked = mask_rows(rows, arguments=arguments, vocabulary=Vocabulary.from_tokenizer(small_tokenizer))
    counts = np.bincount(masked.input_ids.ravel()[masked.positions], minlength=NUM_TOKENS)
    assert not counts[50:55].any()
    assert stats.chisquare(np.delete(counts, range(50, 55))).pvalue > 1e-4


def test_random_tokens_do_not_depend_on_the_decision(small_tokenizer):
    rows = make_rows(2048, 512)
    vocabulary = Vocabulary.from_tokenizer(small_tokenizer)
    masked = mask_rows(rows, arguments=MaskingArguments(), vocabulary=vocabulary)
    replaced = masked.input_ids.ravel()[masked.positions][fates(rows, masked) == 1]
    assert stats.chisquare(np.bincount(replaced, minlength=NUM_TOKENS)[55:]).pvalue > 1e-4


def groups_of(rows: ExampleRows, masked, *, unit: str) -> np.ndarray:
    """The number of the word or the unit of each target, found without the tables of the library."""
    starts = masked.selection.unit_starts if unit == "unit" else rows.word_starts | (rows.input_ids >= 50)
    starts = starts.copy()
    if unit == "word":
        starts[:, 1:] |= rows.input_ids[:, :-1] >= 50
    return np.cumsum(starts.ravel())[masked.positions]


@pytest.mark.parametrize(
    ("masking_unit", "replacement_unit", "is_constant"),
    [("word", "word", True), ("span", "unit", True), ("ngram", "unit", True), ("span", "word", True)]
    + [("word", "token", False), ("span", "token", False)],
)
def test_a_decision_holds_for_its_whole_unit(small_tokenizer, masking_unit, replacement_unit, is_constant):
    rows = make_rows(256, 256)
    arguments = MaskingArguments(
        masking_unit=masking_unit, replacement_unit=replacement_unit, mask_share=0.5, random_share=0.0
    )
    masked = mask_rows(rows, arguments=arguments, vocabulary=Vocabulary.from_tokenizer(small_tokenizer))
    groups = groups_of(rows, masked, unit="word" if replacement_unit == "word" else "unit")
    is_mask = masked.input_ids.ravel()[masked.positions] == 54
    _, index = np.unique(groups, return_inverse=True)
    share = np.bincount(index, weights=is_mask) / np.bincount(index)
    assert np.isin(share, [0, 1]).all() == is_constant
    assert abs(share.mean() - 0.5) < 0.05
    if (masking_unit, replacement_unit) == ("span", "word"):
        units = groups_of(rows, masked, unit="unit")
        _, index = np.unique(units, return_inverse=True)
        assert not np.isin(np.bincount(index, weights=is_mask) / np.bincount(index), [0, 1]).all()


def test_a_random_span_holds_different_tokens(small_tokenizer):
    rows = make_rows(64, 256)
    arguments = MaskingArguments(masking_unit="span", replacement_unit="unit", mask_share=0.0, random_share=1.0)
    masked = mask_rows(rows, arguments=arguments, vocabulary=Vocabulary.from_tokenizer(small_tokenizer))
    new = masked.input_ids.ravel()[masked.positions]
    is_neighbour = np.diff(masked.positions) == 1
    assert abs((new[1:] == new[:-1])[is_neighbour].mean() - 0.01) < 0.02


@pytest.mark.parametrize(("masking_unit", "least", "most"), [("span", 3.6, 4.4), ("ngram", 1.5, 1.65)])
def test_lengths_do_not_depend_on_the_order_of_trial(small_tokenizer, masking_unit, least, most):
    # If one draw gave both the order and the length, what is tried first would always be one word long.
    rows = make_rows(512, 512)
    rows.word_starts[:] = True
    masked = mask_rows(
        rows,
        arguments=MaskingArguments(masking_unit=masking_unit),
        vocabulary=Vocabulary.from_tokenizer(small_tokenizer),
    )
    spans = masked.selection.spans()
    assert least < (spans[:, 2] - spans[:, 1]).mean() < most


@pytest.mark.parametrize("masking_unit", ["token", "word", "ngram", "span"])
def test_padding_is_never_selected_whatever_id_it_has(small_tokenizer, masking_unit):
    rows = make_rows(32, 64)
    rows.valid[:, 40:] = False
    masking = MaskingArguments(masking_unit=masking_unit, mlm_probability=1.0)
    masked = mask_rows(rows, arguments=masking, vocabulary=Vocabulary.from_tokenizer(small_tokenizer))
    np.testing.assert_array_equal(masked.selection.mask, rows.valid & (rows.input_ids < 50))


@pytest.mark.parametrize(("mask_unknown", "rate"), [(True, 0.15), (False, 0.0)])
def test_the_unknown_token_is_selected_if_asked_for(small_tokenizer, mask_unknown, rate):
    rows = make_rows(512, 128)
    rows.input_ids[:, 5:60] = small_tokenizer.unk_token_id
    vocabulary = Vocabulary.from_tokenizer(small_tokenizer, mask_unknown=mask_unknown)
    masked = mask_rows(rows, arguments=MaskingArguments(mask_unknown=mask_unknown), vocabulary=vocabulary)
    assert abs(masked.selection.mask[:, 5:60].mean() - rate) < 0.02
    assert not (masked.input_ids.ravel()[masked.positions] == small_tokenizer.unk_token_id).any() or mask_unknown
    assert small_tokenizer.unk_token_id not in vocabulary.ordinary_ids


def test_tokens_added_as_special_are_protected(small_tokenizer):
    tokenizer = BertTokenizer(vocab=small_tokenizer.get_vocab())
    tokenizer.add_tokens(["plain"])
    tokenizer.add_tokens(["<entity>"], special_tokens=True)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.protected[tokenizer.convert_tokens_to_ids("<entity>")]
    assert tokenizer.convert_tokens_to_ids("<entity>") not in vocabulary.ordinary_ids
    assert tokenizer.convert_tokens_to_ids("plain") in vocabulary.ordinary_ids


def test_ids_of_another_tokenizer_are_refused(small_tokenizer):
    rows = make_rows(2, 8)
    rows.input_ids[1, 3] = NUM_TOKENS
    with pytest.raises(InputError, match="input_ids holds the id 105"):
        mask_rows(rows, arguments=MaskingArguments(), vocabulary=Vocabulary.from_tokenizer(small_tokenizer))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mlm_probability", 1.5),
        ("mask_share", -0.1),
        ("masking_unit", "words"),
        ("masking_count", "poisson"),
        ("replacement_unit", "span"),
        ("span_length_mode", "truncate"),
        ("span_geometric_p", 0.0),
        ("max_ngram", 0),
        ("max_span_length", 2.5),
        ("static_masks", -1),
    ],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(InputError, match=f"^{option}={value!r} "):
        MaskingArguments(**{option: value})


def test_contradictions_are_refused():
    with pytest.raises(InputError, match="mask_share=0.8 and random_share=0.3"):
        MaskingArguments(random_share=0.3)
    with pytest.raises(InputError, match="masking_count='bernoulli'.*masking_unit='span'"):
        MaskingArguments(masking_unit="span", masking_count="bernoulli")
    assert MaskingArguments(mask_share=0.9, random_share=0.1) and MaskingArguments(mask_share=0.85, random_share=0.0)


@dataclasses.dataclass
class ToyArguments(MaskingArguments, TrainingArguments):
    """Both, in the order in which trainers mix them."""


def test_options_mix_with_training_arguments_and_parse(tmp_path):
    masking, training = (
        {field.name for field in dataclasses.fields(cls)} for cls in (MaskingArguments, TrainingArguments)
    )
    assert not masking & training
    line = ["--output_dir", str(tmp_path), "--masking_unit", "span", "--mlm_probability", "0.2", "--no_mask_unknown"]
    (arguments,) = HfArgumentParser(ToyArguments).parse_args_into_dataclasses(
        [*line, "--use_cpu", "--eval_strategy", "steps", "--logging_steps", "7"]
    )
    assert (arguments.masking_unit, arguments.mlm_probability, arguments.mask_unknown) == ("span", 0.2, False)
    assert arguments.eval_steps == 7, "TrainingArguments fills this in its own __post_init__, which must run too"
    with pytest.raises(InputError, match="max_ngram=0"):
        ToyArguments(output_dir=str(tmp_path), max_ngram=0)
    assert "--static_masks" in HfArgumentParser(ToyArguments).format_help()
