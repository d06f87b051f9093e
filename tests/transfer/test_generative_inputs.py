"""The rows of GPT-1's fine-tuning, written out, and their batches."""

import math

import pytest
import torch
from datasets import Dataset

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.transfer.generative.inputs import (
    TRANSFER_TOKENS,
    DataCollatorForGenerativeTransfer,
    TransferTokens,
    add_transfer_tokens,
    input_rows,
    longest_row,
    transform_examples,
)
from hf_pretrain.transfer.generative.modeling import GenerativeTransferConfig

S, D, C = 60, 61, 62  # the ids of the special tokens behind a vocabulary of 60
W0 = 5  # the id of the word w0


def extended():
    tokenizer = tiny_tokenizer()
    add_transfer_tokens(tokenizer)
    return tokenizer


def rows_of(columns, *, transformation, text_columns, label_column=None, max_length=24, num_labels=2):
    config = GenerativeTransferConfig(
        transformation=transformation, num_labels=1 if transformation == "multiple_choice" else num_labels
    )
    return transform_examples(
        Dataset.from_dict(columns),
        extended(),
        config=config,
        text_columns=text_columns,
        label_column=label_column,
        max_length=max_length,
    )


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


LONG = list(range(101, 121))
ROWS = {
    "classification": ([[1, 2, 3]], [[S, 1, 2, 3, C]]),
    "classification, cut": ([LONG], [[S, *range(101, 111), C]]),
    "entailment": ([[1, 2], [3]], [[S, 1, 2, D, 3, C]]),
    # Each text has 12 // 2 - 2 tokens at most, even where the other one leaves room.
    "entailment, cut": ([LONG, [3]], [[S, 101, 102, 103, 104, D, 3, C]]),
    "entailment, both cut": ([LONG, LONG[5:]], [[S, 101, 102, 103, 104, D, 106, 107, 108, 109, C]]),
    "similarity": ([[1, 2], [3]], [[S, 1, 2, D, 3, C], [S, 3, D, 1, 2, C]]),
    "similarity, cut": ([[1], LONG], [[S, 1, D, 101, 102, 103, 104, C], [S, 101, 102, 103, 104, D, 1, C]]),
    "multiple_choice": ([[1, 2], [3], [4, 5], []], [[S, 1, 2, D, 3, C], [S, 1, 2, D, 4, 5, C], [S, 1, 2, D, C]]),
    "multiple_choice, cut": (
        [LONG, LONG[9:], [7]],
        [[S, 101, 102, 103, 104, D, 110, 111, 112, 113, C], [S, 101, 102, 103, 104, D, 7, C]],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_are_those_of_the_paper(name):
    segments, expected = ROWS[name]
    tokens = TransferTokens(S, D, C)
    assert input_rows(segments, transformation=name.split(",")[0], tokens=tokens, max_length=12) == expected


def test_a_row_of_two_texts_fits_whatever_the_length():
    for length in range(6, 40):
        (row,) = input_rows(
            [range(99), range(99)], transformation="entailment", tokens=TransferTokens(S, D, C), max_length=length
        )
        assert len(row) == 2 * (length // 2 - 2) + 3 <= length


def test_texts_become_rows_and_special_tokens_in_them_are_text():
    columns = {
        "a": [words(0, 1), "w2 _classify_ w3", None],
        "b": [words(4), words(5), words(6)],
        "label": [1, 0, -1],
    }
    found = rows_of(columns, transformation="entailment", text_columns=["a", "b"], label_column="label")
    unknown = tiny_tokenizer().unk_token_id
    assert found["input_ids"][:] == [
        [[S, W0, W0 + 1, D, W0 + 4, C]],
        [[S, W0 + 2, unknown, W0 + 3, D, W0 + 5, C]],
        [[S, D, W0 + 6, C]],
    ]
    assert found["labels"][:] == [1, 0, -100]


def test_the_labels_of_a_regression_are_values():
    found = rows_of(
        {"text": [words(0), words(1)], "score": [2.5, None]},
        transformation="classification",
        text_columns=["text"],
        label_column="score",
        num_labels=1,
    )
    assert found["labels"][0] == 2.5
    assert math.isnan(found["labels"][1])


def test_a_column_may_hold_the_answers_and_a_question_outlives_its_document():
    columns = {
        "article": [words(*range(20)), words(1)],
        "question": [words(30, 31), words(32)],
        "answers": [[words(40), words(41), words(42)], [words(43)]],
        "right": [2, 0],
    }
    found = rows_of(
        columns,
        transformation="multiple_choice",
        text_columns=["article", "question", "answers"],
        label_column="right",
        max_length=12,
    )
    context = [W0, W0 + 1, W0 + 30, W0 + 31]
    assert found["input_ids"][0] == [[S, *context, D, W0 + answer, C] for answer in (40, 41, 42)]
    assert found["input_ids"][1] == [[S, W0 + 1, W0 + 32, D, W0 + 43, C]]
    assert found["labels"][:] == [2, 0]
    assert longest_row(found) == 8


def test_answers_in_columns_are_answers_in_a_list():
    columns = {"a": [words(0)], "b": [words(1)], "c": [words(2)], "all": [[words(1), words(2)]]}
    apart = rows_of(columns, transformation="multiple_choice", text_columns=["a", "b", "c"])
    together = rows_of(columns, transformation="multiple_choice", text_columns=["a", "all"])
    assert apart["input_ids"][:] == together["input_ids"][:] == [[[S, W0, D, W0 + 1, C], [S, W0, D, W0 + 2, C]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformation": "entailment", "text_columns": ["a"]}, "needs 2"),
        ({"transformation": "classification", "text_columns": ["z"]}, "no 'z'"),
        ({"transformation": "classification", "text_columns": ["list"]}, "holds lists"),
        ({"transformation": "multiple_choice", "text_columns": ["a", "b"]}, "two answers or more"),
        ({"transformation": "multiple_choice", "text_columns": ["a", "list"], "label_column": "three"}, "number them"),
        ({"transformation": "multiple_choice", "text_columns": ["a", "empty"]}, "no answers"),
        ({"transformation": "classification", "text_columns": ["a"], "label_column": "z"}, "label_column"),
        ({"transformation": "classification", "text_columns": ["a"], "label_column": "three"}, "label"),
        ({"transformation": "classification", "text_columns": ["a"], "max_length": 5}, "max_length"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    columns = {"a": ["w1"], "b": ["w2"], "list": [["w3", "w4"]], "empty": [[]], "three": [3]}
    with pytest.raises(InputError, match=message):
        rows_of(columns, **options)


def test_the_tokens_are_added_once_and_padding_is_none_of_them():
    tokenizer = tiny_tokenizer()
    assert add_transfer_tokens(tokenizer) == [S, D, C]
    assert add_transfer_tokens(tokenizer) == []
    assert tokenizer.convert_tokens_to_ids(list(TRANSFER_TOKENS)) == [S, D, C]
    bare = tiny_tokenizer()
    bare.pad_token = None
    add_transfer_tokens(bare)
    assert bare.pad_token == "[UNK]"
    with pytest.raises(InputError, match="_start_"):
        DataCollatorForGenerativeTransfer(tiny_tokenizer())


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_keeps_the_rows_of_an_example_together(side):
    tokenizer = extended()
    tokenizer.padding_side = side
    examples = [
        {"input_ids": [[S, 7, D, 8, C], [S, 7, D, 9, 10, C]], "labels": 1},
        {"input_ids": [[S, 11, D, 12, C]], "labels": 0},
    ]
    batch = DataCollatorForGenerativeTransfer(tokenizer, pad_to_multiple_of=4)(examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, 8)
    for number, example in enumerate(examples):
        for row, ids in enumerate(example["input_ids"]):
            is_real = batch["attention_mask"][number, row].bool()
            assert batch["input_ids"][number, row][is_real].tolist() == ids
    assert batch["row_mask"].tolist() == [[True, True], [True, False]]
    assert batch["labels"].tolist() == [1, 0]
    # What is predicted: all tokens of all rows but the first of each; nothing behind the last, nothing of the row of filler.
    targets = batch["input_ids"].flatten()[batch["target_positions"] + 1].tolist()
    assert targets == [7, D, 8, C, 7, D, 9, 10, C, 11, D, 12, C]
    assert batch["input_ids"].flatten()[batch["target_positions"]].tolist() == [
        S,
        7,
        D,
        8,
        S,
        7,
        D,
        9,
        10,
        S,
        11,
        D,
        12,
    ]


def test_a_row_without_its_last_token_is_refused():
    with pytest.raises(InputError, match="_classify_"):
        DataCollatorForGenerativeTransfer(extended())([{"input_ids": [[S, 7, D, 8]]}])


def test_labels_of_values_stay_values():
    examples = [{"input_ids": [[S, 7, C]], "labels": value} for value in (1.0, 2.5)]
    batch = DataCollatorForGenerativeTransfer(extended())(examples)
    assert batch["labels"].dtype == torch.float32
    assert "row_mask" not in batch
