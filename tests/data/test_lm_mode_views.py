"""Views of pairs and blocks in each attention mode."""

import numpy as np
import pytest
import torch

from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, ORDER_STRIDE, EpochDataset
from hf_pretrain.data.examples.lm_modes import LMMode, LMModeView, mode_token_types, stop_candidates
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

MODES = [mode.name.lower() for mode in LMMode]


def pairs(*, label=1):
    """[CLS] a a [SEP] b [SEP], and a longer one."""
    rows = [([2, 10, 11, 3, 12, 3], 4), ([2, 10, 3, 11, 12, 13, 14, 3], 3)]
    return EpochDataset(
        [
            {
                "input_ids": np.array(ids, dtype=np.int32),
                "word_starts": np.ones(len(ids), dtype=np.bool_),
                "token_type_ids": (np.arange(len(ids)) >= source).astype(np.int64),
                "pair_label": label,
                "source_length": source,
            }
            for ids, source in rows
        ]
    )


def blocks():
    return EpochDataset([{"input_ids": [2, *range(10, 10 + n), 3], "word_starts": [True] * (n + 2)} for n in (3, 5)])


TYPES = {
    # Of the first pair: four tokens of the source, two of the target.
    "bidirectional": ([0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]),
    "left_to_right": ([2] * 6, [0] * 6),
    "right_to_left": ([3] * 6, [1] * 6),
    "sequence_to_sequence": ([4, 4, 4, 4, 5, 5], [0, 0, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_segments_and_labels(mode):
    example = LMModeView(pairs(), mode=mode, type_vocab_size=6)[0]
    assert example["lm_mode"] == MODES.index(mode) and isinstance(example["lm_mode"], int)
    assert example["source_length"] == (4 if mode == "sequence_to_sequence" else 0)
    assert example["pair_label"] == (1 if mode == "bidirectional" else -100)
    assert example["input_ids"].tolist() == [2, 10, 11, 3, 12, 3] and example["word_starts"].all()
    for size, expected in ((6, TYPES[mode][0]), (8, TYPES[mode][0]), (2, TYPES[mode][1]), (5, TYPES[mode][1])):
        assert LMModeView(pairs(), mode=mode, type_vocab_size=size)[0]["token_type_ids"].tolist() == expected
    for size in (0, 1):
        assert "token_type_ids" not in LMModeView(pairs(), mode=mode, type_vocab_size=size)[0]
    assert LMModeView(pairs(), mode=LMMode.of(mode), type_vocab_size=6)[0].keys() == example.keys()


def test_all_six_types_come_and_tell_mode_and_segment_apart():
    seen = {}
    for mode in LMMode:
        for segment in (0, 1):
            (token_type,) = mode_token_types(mode, np.array([segment]), type_vocab_size=6)
            seen.setdefault(int(token_type), set()).add(mode)
    assert sorted(seen) == list(range(6)) and all(len(modes) == 1 for modes in seen.values())


@pytest.mark.parametrize("mode", MODES[:3])
def test_blocks_are_one_segment(mode):
    example = LMModeView(blocks(), mode=mode, type_vocab_size=6)[1]
    assert len(set(example["token_type_ids"].tolist())) == 1 and len(example["token_type_ids"]) == 7
    assert example["source_length"] == 0 and "pair_label" not in example


class EpochEcho(EpochDataset):
    """Examples that depend on their epoch, as pairs do."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return example | {"input_ids": [2, 10 + example["epoch"], 3, 20, 3], "source_length": 3}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_epoch_and_place_reach_the_dataset():
    view = LMModeView(EpochEcho([{}] * 4), mode="sequence_to_sequence", type_vocab_size=6)
    indices = [3, 2 * EPOCH_STRIDE + 1, 5 * ORDER_STRIDE + 7 * EPOCH_STRIDE]
    examples = view.__getitems__(indices)
    assert [e["input_ids"][1] for e in examples] == [10, 12, 17]
    assert [(e["example_id"], e["epoch"], e.get("order_index")) for e in examples] == [
        (3, 0, None),
        (1, 2, None),
        (0, 7, 4),
    ]
    for one, index in zip(examples, indices, strict=True):
        other = view[index]
        assert one.keys() == other.keys() and np.array_equal(one["token_type_ids"], other["token_type_ids"])
    assert len(view) == 4 and EpochDataset.wrap(view) is view
    assert repr(view).startswith("LMModeView(sequence_to_sequence, EpochEcho(")
    with pytest.raises(IndexError):
        view[4]


def test_the_dataset_is_left_as_it_is():
    dataset = pairs()
    LMModeView(dataset, mode="right_to_left", type_vocab_size=6)[0]
    assert dataset.base[0]["pair_label"] == 1 and dataset[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]


def test_what_a_mode_cannot_read_is_refused():
    with pytest.raises(InputError, match="mode='causal' must be one of bidirectional, left_to_right"):
        LMModeView(blocks(), mode="causal", type_vocab_size=6)
    with pytest.raises(InputError, match=r"source_length=0 of an example of 5 tokens .* needs a dataset of pairs"):
        LMModeView(blocks(), mode="sequence_to_sequence", type_vocab_size=6)[0]
    isolated = EpochDataset([{"input_ids": [2, 10, 3], "document_ids": [0, 0, 0]}])
    with pytest.raises(InputError, match="mode='left_to_right' .* documents are isolated"):
        LMModeView(isolated, mode="left_to_right", type_vocab_size=6)[0]


def test_the_end_may_be_selected_from_sequence_to_sequence_only():
    valid = np.arange(7) < np.array([5, 7, 3, 6])[:, None]
    marked = stop_candidates(valid, lm_modes=np.array([3, 3, 0, 1]))
    assert np.argwhere(marked).tolist() == [[0, 4], [1, 6]]
    assert not stop_candidates(valid, lm_modes=np.zeros(4, dtype=np.int64)).any()


def test_views_of_all_modes_make_one_batch(tokenizer):
    views = [LMModeView(pairs(), mode=mode, type_vocab_size=6) for mode in MODES]
    batch = DataCollatorForMaskedLM(tokenizer)([view[0] for view in views])
    assert batch["token_type_ids"].tolist() == [TYPES[mode][0] for mode in MODES]
    assert torch.equal(batch["attention_mask"], torch.ones(4, 6, dtype=torch.int64))
