import pytest

from hf_pretrain.errors import InputError, check_choice, check_range, nearest, one_line


def test_a_choice_names_the_argument_the_known_values_and_the_nearest():
    check_choice("word", ("token", "word", None), name="unit")
    check_choice(None, ("token", None), name="unit")
    with pytest.raises(InputError) as refused:
        check_choice("wrod", ("token", "word", None), name="unit")
    assert str(refused.value) == "unit='wrod' must be one of token, word; did you mean 'word'?"
    with pytest.raises(InputError, match="^unit=7 must be one of token, word$"):
        check_choice(7, ("token", "word"), name="unit")


@pytest.mark.parametrize("value", [0.0, 0.999])
def test_a_number_in_range_passes(value):
    check_range(value, "[0, 1)", name="share")


@pytest.mark.parametrize("value", [-0.001, 1, float("nan"), float("inf")])
def test_a_number_out_of_range_is_refused_with_the_range_and_the_hint(value):
    with pytest.raises(InputError) as refused:
        check_range(value, "[0, 1)", name="share", hint="0.1 is usual")
    assert str(refused.value) == f"share={value!r} must be a number from 0 to below 1; 0.1 is usual"


def test_the_nearest_name_or_all_of_them():
    assert nearest("bart", ["bert", "xlnet"]) == "did you mean 'bert'?"
    assert nearest("zzz", ["bert", "xlnet"]) == "choose one of bert, xlnet"
    assert nearest("zzz", ["bert"], otherwise="see --help") == "see --help"


@pytest.mark.parametrize(
    ("line", "expected"),
    [(None, "Class: loading failed because of x"), (0, "Class:"), (-1, "because of x"), (7, "because of x")],
)
def test_one_line_of_an_error(line, expected):
    assert one_line(ValueError("Class:\n  loading failed\n because of x\n"), line=line) == expected


def test_an_error_without_words_is_named_by_its_type():
    assert one_line(KeyError(), line=0) == one_line(KeyError()) == "KeyError"
