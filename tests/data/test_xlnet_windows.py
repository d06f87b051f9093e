from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.data.examples.windows import LaneStream, XLNetWindows
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.permutation_lm.collator import DataCollatorForPermutationLM, PermutationArguments

CLS, SEP = 2, 3
WINDOW, REUSE = 40, 16
ROOM = WINDOW - REUSE - 3


def make_stream(num_lanes: int = 3, *, num_documents: int = 12, sentence: float = 0.2) -> LaneStream:
    """Documents whose tokens count from 100, so that each is found by its id."""
    rng = np.random.default_rng(0)
    rows, at = [], 100
    for doc_id in range(num_documents):
        length = int(rng.integers(20, 90))
        starts = rng.random(length) < sentence
        starts[0] = True
        rows.append({"input_ids": np.arange(at, at + length), "word_starts": rng.random(length) < 0.7})
        rows[-1] |= {"sent_starts": starts, "doc_id": doc_id}
        at += length
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    documents = datasets.Dataset.from_dict(columns, features=DOCUMENT_FEATURES)
    return LaneStream(documents, tokenizer=tiny_tokenizer(), num_lanes=num_lanes)


def make_windows(stream: LaneStream | None = None, **options) -> XLNetWindows:
    options = {"window": WINDOW, "reuse_len": REUSE} | options
    return XLNetWindows(make_stream() if stream is None else stream, tokenizer=tiny_tokenizer(), **options)


def lane_arrays(windows: XLNetWindows, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A whole lane in its direction: tokens, word starts, and a number a sentence."""
    stream = windows.stream
    ids, words, begins = stream.read(lane % stream.num_lanes, 0, stream.lane_length)
    sentence = np.cumsum(begins)
    if lane >= stream.num_lanes:
        ids, words, sentence = ids[::-1], words[::-1], sentence[::-1]
    return ids, words, sentence


def naive_segments(sentence: np.ndarray, begin: int, uniforms: np.ndarray) -> tuple[range, range]:
    """The official choice of A and B, a token at a time, but for one bound."""
    end, cuts = begin + 1, []
    while end < len(sentence):
        if sentence[end] != sentence[end - 1]:
            if end - begin >= ROOM:
                break
            cuts.append(end)
        end += 1
    if not cuts or uniforms[0] < 0.5:
        a_end = cuts[int(uniforms[1] * len(cuts))] if cuts else end
        b_length = max(1, ROOM - (a_end - begin))
        b_begin = int(uniforms[2] * (len(sentence) - b_length + 1))
        b_end = b_begin + b_length
        drawn = b_begin
        while b_begin > 0 and sentence[b_begin - 1] == sentence[b_begin]:
            b_begin -= 1
        b_begin = b_begin if drawn - b_begin <= ROOM else drawn  # ours: not further than a window's text
        while b_end < len(sentence) and sentence[b_end - 1] == sentence[b_end]:
            b_end += 1
    else:
        a_end = cuts[int(uniforms[1] * len(cuts))]
        b_begin, b_end = a_end, end
    a_length, b_length = a_end - begin, b_end - b_begin
    while a_length + b_length > ROOM:
        if a_length > b_length:
            a_length -= 1
        else:
            b_length -= 1
    return range(begin, begin + a_length), range(b_begin, b_begin + b_length)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sentence", [0.08, 0.2, 0.6])
def test_windows_are_those_of_a_plain_loop(bidirectional, sentence):
    windows = make_windows(make_stream(sentence=sentence), bidirectional=bidirectional, seed=4)
    assert windows.num_lanes == (6 if bidirectional else 3)
    kinds = set()
    for epoch in range(3):
        for row in range(len(windows)):
            example = windows[epoch * EPOCH_STRIDE + row]
            time, lane = divmod(row, windows.num_lanes)
            ids, words, numbers = lane_arrays(windows, lane)
            uniforms = draws.uniforms(draws.row_keys([row], seed=4, epoch=epoch, stream="xlnet_window"), 3)[0]
            a, b = naive_segments(numbers, time * REUSE + REUSE, uniforms)
            kinds.add((a.stop == b.start, len(a) > len(b)))
            first = range(time * REUSE, time * REUSE + REUSE)
            wanted = [*ids[first], *ids[a], SEP, *ids[b], SEP, CLS]
            assert example["input_ids"].tolist() == wanted
            assert example["word_starts"].tolist() == [*words[first], *words[a], 1, *words[b], 1, 1]
            assert example["token_type_ids"].tolist() == [0] * (REUSE + len(a) + 1) + [1] * (len(b) + 1) + [2]
            assert len(wanted) == WINDOW and len(a) and len(b)
            assert (example["lane"], example["memory_reset"]) == (lane, time == 0)
            assert (example["example_id"], example["epoch"]) == (row, epoch)
            assert example.get("backward") == (lane >= 3 if bidirectional else None)
    assert len(kinds) == 4, "continuations and others, the longer segment on either side"


def test_first_stretches_go_on_without_a_gap_and_each_step_holds_every_lane():
    windows = make_windows(bidirectional=True)
    for lane in range(6):
        steps = range(lane, len(windows), 6)
        read = np.concatenate([windows[row]["input_ids"][:REUSE] for row in steps])
        assert np.array_equal(read, lane_arrays(windows, lane)[0][: len(read)])
        assert [windows[row]["memory_reset"] for row in steps] == [True] + [False] * (len(steps) - 1)
        # Another window would not fit.
        assert len(steps) * REUSE + REUSE + ROOM > windows.stream.lane_length
    assert len(windows) == windows.num_windows * 6


def test_half_of_the_segments_follow_on():
    stream = make_stream(2, num_documents=40)
    windows = make_windows(stream)
    follows = []
    for epoch in range(3):
        for row in range(len(windows)):
            ids = windows[epoch * EPOCH_STRIDE + row]["input_ids"]
            last_of_a, first_of_b = (ids[np.flatnonzero(ids == SEP)[-2] + offset] for offset in (-1, 1))
            follows.append(first_of_b - last_of_a in (1, 2))  # or a document's end between, or A was cut
    assert 0.3 < np.mean(follows) < 0.6


def test_epochs_seeds_and_company():
    windows = make_windows()
    rows = list(range(len(windows)))

    def segments(dataset: XLNetWindows, epoch: int = 0) -> list[list[int]]:
        return [
            example["input_ids"].tolist() for example in dataset.__getitems__([epoch * EPOCH_STRIDE + r for r in rows])
        ]

    first = segments(windows)
    assert segments(make_windows()) == first
    for other in (segments(windows, 1), segments(make_windows(seed=1))):
        assert [ids[:REUSE] for ids in other] == [ids[:REUSE] for ids in first]
        assert np.mean([mine != yours for mine, yours in zip(first, other, strict=True)]) > 0.6
    assert EpochDataset.wrap(windows) is windows and windows.base.num_lanes == 3 and len(windows.base) == len(windows)
    with pytest.raises(IndexError):
        windows[len(windows)]
    loaded = DataLoader(windows, batch_size=None, num_workers=1)
    assert [example["input_ids"].tolist() for example in loaded] == first


def test_text_without_sentences_fills_its_windows():
    windows = make_windows(make_stream(2, num_documents=8, sentence=0.0))
    for row in range(len(windows)):
        assert len(windows[row]["input_ids"]) == WINDOW
    default = XLNetWindows(windows.stream, tokenizer=tiny_tokenizer(), window=WINDOW)
    assert default.reuse_len == WINDOW // 2


def test_a_batch_of_windows():
    windows = make_windows(bidirectional=True)
    examples = windows.__getitems__(list(range(6, 12)))
    arguments = PermutationArguments(reuse_len=REUSE)
    batch = DataCollatorForPermutationLM(tiny_tokenizer(), permutation=arguments)(examples)
    assert batch["lanes"].tolist() == list(range(6)) and not batch["memory_reset"].any()
    assert batch["backward"].tolist() == [False] * 3 + [True] * 3
    assert (batch["labels"] != -100).sum(1).tolist() == [round(WINDOW / 6)] * 6
    sees = batch["key_ranks"][:, None, :] < batch["thresholds"][:, :, None]
    assert not sees[:, :REUSE, REUSE:].any() and sees[:, REUSE:, :REUSE].all()
    assert torch.equal(batch["token_type_ids"][:, -1], torch.full((6,), 2))


def test_what_cannot_be_windows_is_refused():
    stream = make_stream()
    with pytest.raises(InputError, match="window=20 leaves 1 tokens for two segments after reuse_len=16"):
        make_windows(stream, window=20)
    with pytest.raises(InputError, match="does not fit into lanes of"):
        make_windows(make_stream(30))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, sep_token="[SEP]")
    with pytest.raises(InputError, match="no sep_token or no cls_token"):
        XLNetWindows(stream, tokenizer=tokenizer)
