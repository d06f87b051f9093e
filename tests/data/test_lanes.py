"""Lanes: every token once, in order, with the next one as its target, whatever the window and the number of lanes."""

import itertools
import pickle

import numpy as np
import pytest

from helpers.method_matrix import tiny_tokenizer
from helpers.toy_recurrence import documents
from hf_pretrain.data.examples.windows import LaneDataset, LaneStream
from hf_pretrain.errors import InputError

SEPARATOR = 3
LENGTHS = [7, 1, 12, 3, 20, 5, 5, 9, 1, 1, 14]
TEXT = documents(LENGTHS)
FLAT = [token for row in TEXT["input_ids"] for token in [*row, SEPARATOR]]
INPUTS = [SEPARATOR, *FLAT[:-1]]


def stream(num_lanes, *, complete=False, text=TEXT):
    return LaneStream(text, tokenizer=tiny_tokenizer(), num_lanes=num_lanes, complete=complete)


def by_lane(dataset):
    """The windows of each lane, in the order of time."""
    lanes = [[] for _ in range(dataset.num_lanes)]
    for index in range(len(dataset)):
        example = dataset[index]
        assert example["lane"] == index % dataset.num_lanes
        lanes[example["lane"]].append(example)
    return lanes


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 7, 89])
def test_stream_reads_any_range_of_any_lane(num_lanes):
    lanes = stream(num_lanes)
    assert lanes.num_tokens == len(FLAT) == 89
    assert lanes.lane_length == 89 // num_lanes
    sentences = [f for row in TEXT["sent_starts"] for f in [*row, True]]
    for lane in range(num_lanes):
        begin = lane * lanes.lane_length
        for start, stop in itertools.combinations(range(-1, lanes.lane_length + 1), 2):
            ids, words, sents = lanes.read(lane, start, stop)
            assert ids.dtype == np.int32 and words.all()
            # Before the text lies a separator.
            assert ids.tolist() == [SEPARATOR, *FLAT][begin + start + 1 : begin + stop + 1]
            assert sents.tolist() == [True, *sentences][begin + start + 1 : begin + stop + 1]


def test_words_are_those_of_the_text():
    text = TEXT.map(lambda row: {"word_starts": [i % 2 == 0 for i in range(len(row["input_ids"]))]})
    _, words, _ = stream(1, text=text).read(0, -1, 89)
    assert words.tolist() == [True, *(f for row in text["word_starts"] for f in [*row, True])]


def test_the_separator_is_eos_where_there_is_one():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "w0"
    assert LaneStream(TEXT, tokenizer=tokenizer, num_lanes=1).separator == 5
    tokenizer.eos_token = tokenizer.sep_token = None
    with pytest.raises(InputError, match="no eos_token and no sep_token"):
        LaneStream(TEXT, tokenizer=tokenizer, num_lanes=1)


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize(("num_lanes", "window"), [(1, 1), (1, 100), (2, 4), (3, 9), (7, 5), (13, 2), (100, 3)])
def test_evaluation_scores_every_token_once(num_lanes, window, by_document):
    dataset = LaneDataset(stream(num_lanes, complete=True), window=window, reset_at_documents=by_document)
    windows = [example for lane in by_lane(dataset) for example in lane]
    assert [token for example in windows for token in example["labels"]] == FLAT
    assert [token for example in windows for token in example["input_ids"]] == INPUTS
    assert max(len(example["labels"]) for example in windows) <= window


@pytest.mark.parametrize(("num_lanes", "window"), [(1, 1), (1, 89), (2, 4), (3, 9), (7, 5), (13, 2)])
def test_training_lanes_are_equal_and_contiguous(num_lanes, window):
    dataset = LaneDataset(stream(num_lanes), window=window)
    length = 89 // num_lanes
    for lane, windows in enumerate(by_lane(dataset)):
        labels = [token for example in windows for token in example["labels"]]
        assert labels == FLAT[lane * length : (lane + 1) * length]
        assert [len(example["labels"]) for example in windows[:-1]] == [window] * (len(windows) - 1)
        assert [example["memory_reset"] for example in windows] == [True] + [False] * (len(windows) - 1)
        # The label of a window's last token is the first token of the next.
        for before, after in itertools.pairwise(windows):
            assert before["labels"][-1] == after["input_ids"][0]


@pytest.mark.parametrize(("num_lanes", "window"), [(1, 4), (2, 4), (3, 6), (5, 3)])
def test_a_window_of_documents_never_crosses_an_end(num_lanes, window):
    dataset = LaneDataset(stream(num_lanes), window=window, reset_at_documents=True)
    assert dataset.num_windows == sum(-(-(length + 1) // window) for length in LENGTHS) // num_lanes
    for windows in by_lane(dataset):
        for before, after in itertools.pairwise(windows):
            assert SEPARATOR not in before["labels"][:-1]
            ends = before["labels"][-1] == SEPARATOR
            assert after["memory_reset"] == ends
            assert ends or len(before["labels"]) == window
        assert windows[0]["memory_reset"]


def test_epochs_read_the_same_lanes_after_pickling():
    dataset = LaneDataset(stream(3), window=4)
    copy = pickle.loads(pickle.dumps(dataset))
    for index in range(len(dataset)):
        for name, value in dataset[index].items():
            assert np.array_equal(copy[index][name], value)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert repr(dataset) == "LaneDataset(8 windows of 4 tokens in 3 lanes)"


def test_too_little_text_is_refused():
    with pytest.raises(InputError, match="num_lanes=90: the text has only 89 tokens"):
        stream(90)
    with pytest.raises(InputError, match="num_lanes=0 must be a number of at least 1"):
        stream(0)
    with pytest.raises(InputError, match="89 tokens in 10 lanes do not fill windows of 9"):
        LaneDataset(stream(10), window=9)
    LaneDataset(stream(10), window=8)
    with pytest.raises(InputError, match="89 tokens in 12 lanes do not fill windows of 100"):
        LaneDataset(stream(12), window=100, reset_at_documents=True)
    with pytest.raises(InputError, match="window=0"):
        LaneDataset(stream(1), window=0)
