"""What an evaluation measures of a held-out set: a part that is spread over all of it, always the same, with its own masks."""

import numpy as np
import pytest
from datasets import Dataset

from helpers.method_matrix import tiny_tokenizer
from helpers.toy_recurrence import documents
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, ORDER_STRIDE, EpochDataset, MixtureDataset
from hf_pretrain.data.examples.held_out import evaluated_tokens, held_out_part, mean_tokens, spread
from hf_pretrain.data.examples.windows import LaneDataset, LaneStream


def rows(count, length=10):
    return EpochDataset(Dataset.from_dict({"input_ids": [[row] * length for row in range(count)]}))


def ids(part):
    return [part[row]["example_id"] for row in range(len(part))]


class TestSpread:
    @pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 7), (7, 5), (1000, 3), (1000, 999), (10**12, 4)])
    def test_each_stretch_has_one(self, total, count):
        chosen = spread(total, count)
        assert len(chosen) == count and len(set(chosen.tolist())) == count
        for number, row in enumerate(chosen.tolist()):
            assert number * total // count <= row < (number + 1) * total // count

    def test_it_is_drawn_within_the_stretch(self):
        """Rows at equal distances could all begin a document of equal documents."""
        offsets = spread(100_000, 1000) % 100
        assert abs(offsets.mean() - 49.5) < 5 and len(set(offsets.tolist())) > 50


class TestPart:
    def test_it_has_the_tokens_of_all_stretches(self):
        part = held_out_part(rows(1000), 400)
        assert len(part) == 40
        assert np.array_equal(np.array(ids(part)) // 25, np.arange(40))

    @pytest.mark.parametrize("tokens", [None, 1000, 10**6])
    def test_the_whole_set_is_itself(self, tokens):
        whole = rows(100)
        assert held_out_part(whole, tokens) is whole

    def test_one_example_is_the_least(self):
        assert len(held_out_part(rows(100), 1)) == 1

    def test_an_example_is_the_one_of_the_whole_set(self):
        """With its id, and so its masks; alone, in a batch, and with an epoch and an order in the index."""
        whole = rows(1000)
        part = held_out_part(whole, 400)
        indices = [3, 2 * ORDER_STRIDE + EPOCH_STRIDE * 5 + 3]
        for index, example in zip(indices, part.__getitems__(indices), strict=True):
            row = ids(part)[3]
            assert example == part[index] == whole[index - 3 + row]
            assert example["input_ids"] == [row] * 10
        for index in (40, -1):
            with pytest.raises(IndexError):
                part[index]

    def test_short_and_long_examples_are_counted_as_they_are(self):
        lengths = [1] * 500 + [19] * 500
        whole = EpochDataset(Dataset.from_dict({"input_ids": [[0] * length for length in lengths]}))
        assert mean_tokens(whole) == 10
        assert len(held_out_part(whole, 400)) == 40

    def test_tokens_of_several_texts_count(self):
        example = {"texts": [{"input_ids": [1, 2], "word_starts": [1, 0]}, {"input_ids": [3]}], "document": 7}
        assert mean_tokens(EpochDataset([example] * 9)) == 3

    def test_lanes_are_read_from_their_beginning(self):
        stream = LaneStream(documents([50, 70, 30]), tokenizer=tiny_tokenizer(), num_lanes=3, complete=True)
        whole = EpochDataset(LaneDataset(stream, window=4))
        # Windows of four tokens; a time has three of them.
        part = held_out_part(whole, 30)
        assert ids(part) == list(range(9)) and part.num_lanes == 3 and part.in_order

    def test_a_group_stays_whole(self):
        parts = {"a": rows(60), "b": rows(30)}
        whole = MixtureDataset(parts, shares={"a": 2, "b": 1}, group_size=3, seed=1)
        part = held_out_part(whole, 120)
        expected = [whole[row]["example_id"] for row in range(len(whole))]
        assert len(part) == 12
        starts = [expected.index(found) for found in ids(part)[::3]]
        assert all(start % 3 == 0 for start in starts)
        assert ids(part) == [found for start in starts for found in expected[start : start + 3]]


@pytest.mark.parametrize(
    ("trained", "minutes", "expected"),
    [
        (None, None, None),
        (1000, None, 16_384),
        (10**9, None, 25_000_000),
        (10**9, 30, 16_384 * 30),
        (10**6, 30, 25_000),
        (10**9, 0.1, 16_384),
    ],
)
def test_the_usual_tokens_are_a_share_of_the_training(trained, minutes, expected):
    assert evaluated_tokens(trained, max_minutes=minutes) == expected
