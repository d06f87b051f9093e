"""What token deletion detection says must hold, beside what the shared tests ask of every method."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from token_deletion.collator import DataCollatorForTokenDeletion

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.data.examples.epochs import EpochDataset

SPECIAL = {0, 1, 2, 3, 4}


@pytest.fixture(scope="module")
def examples():
    """Words 5, 6, 7, ... in order, so that what is left says what was deleted."""
    rows = [{"input_ids": [2, *range(5, 8 + length % 20), 3]} for length in range(200)]
    dataset = EpochDataset(Dataset.from_list(rows))
    return [dataset[i] for i in range(len(dataset))]


def rows_of(batch):
    """The tokens and labels of each row, without padding."""
    for ids, mask, labels in zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and (ids[length:] == 0).all() and (labels[length:] == -100).all()
        yield ids[:length].tolist(), labels[:length].tolist()


def test_a_label_says_whether_something_is_missing_behind_a_token(examples):
    batch = DataCollatorForTokenDeletion(tiny_tokenizer(), deletion_probability=0.3)(examples)
    for example, (ids, labels) in zip(examples, rows_of(batch), strict=True):
        whole = list(example["input_ids"])
        places = [whole.index(token) for token in ids]
        assert (places[0], places[-1]) == (0, len(whole) - 1)
        gaps = [behind > place + 1 for place, behind in zip(places, places[1:], strict=False)]
        assert labels == [*map(int, gaps), 0]


def test_its_share_of_the_words_is_deleted_and_no_special_token(examples):
    words = sum(token not in SPECIAL for example in examples for token in example["input_ids"])
    for probability in (0.05, 0.15, 0.5):
        batch = DataCollatorForTokenDeletion(tiny_tokenizer(), deletion_probability=probability)(examples)
        left = sum(token not in SPECIAL for ids, _ in rows_of(batch) for token in ids)
        assert 1 - left / words == pytest.approx(probability, abs=4 * np.sqrt(probability / words))
        assert all(ids[0] == 2 and ids[-1] == 3 for ids, _ in rows_of(batch))


def test_deletions_depend_on_seed_and_epoch_and_not_on_the_batch(examples):
    collate = DataCollatorForTokenDeletion(tiny_tokenizer())
    rows = list(rows_of(collate(examples)))
    assert rows[7:9] == list(rows_of(collate(examples[7:9])))
    assert rows != list(rows_of(DataCollatorForTokenDeletion(tiny_tokenizer(), seed=1)(examples)))
    assert rows != list(rows_of(collate([example | {"epoch": 1} for example in examples])))


def test_padding_comes_in_multiples(examples):
    wide = DataCollatorForTokenDeletion(tiny_tokenizer(), pad_to_multiple_of=16)(examples)
    tight = DataCollatorForTokenDeletion(tiny_tokenizer())(examples)
    assert wide["input_ids"].shape[1] % 16 == 0
    assert list(rows_of(wide)) == list(rows_of(tight))
    assert all(values.dtype == torch.int64 for values in wide.values())
