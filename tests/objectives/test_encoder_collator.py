"""Batches of an encoder with several heads: shuffled runs, spans with their boundaries, pairs, languages and modes."""

import pickle

import numpy as np
import pytest
import torch
from test_masking_collator import isolated_examples, make_examples, make_tokenizer, rows_of

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.encoder import DataCollatorForEncoder
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

ALL = ("mlm", "pair", "span_boundary", "word_order")
SPANS = MaskingArguments(masking_unit="span", replacement_unit="unit")
MASK = 4


def collator_of(heads=ALL, *, side="right", masking=SPANS, **options):
    return DataCollatorForEncoder(make_tokenizer(padding_side=side), heads=heads, masking=masking, **options)


def originals(examples, width, *, side="right"):
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    for row, example in enumerate(examples):
        values = torch.as_tensor(np.asarray(example["input_ids"], dtype=np.int64))
        start = width - len(values) if side == "left" else 0
        ids[row, start : start + len(values)] = values
    return ids


def facts(batch):
    """What each example is asked, by its place in the example: free of padding and of the rest of the batch."""
    width = batch["input_ids"].shape[1]
    first = batch["attention_mask"].argmax(dim=1)

    def place(flat):
        row = int(flat) // width
        return row, int(flat) % width - int(first[row])

    found = [[row] for row in rows_of([batch])]
    for flat, label in zip(batch["order_positions"], batch["order_labels"], strict=True):
        if label != -100:
            row, column = place(flat)
            found[row].append(("order", column, int(label)))
    for values in zip(
        *(batch[f"span_{name}"].tolist() for name in ("left", "right", "offsets", "labels")), strict=True
    ):
        if values[3] != -100:
            row, column = place(values[0])
            found[row].append(("span", column, place(values[1])[1], *values[2:]))
    return found


def test_heads_that_are_not_asked_for_add_nothing():
    examples = make_examples(32)
    plain = DataCollatorForMaskedLM(make_tokenizer(), masking=SPANS)(examples)
    batch = collator_of(("mlm",))(examples)
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[name], plain[name]) for name in plain)


@pytest.mark.parametrize("side", ["right", "left"])
def test_shuffled_tokens_are_not_masked_and_their_labels_are_the_originals(side):
    examples = make_examples(400)
    batch = collator_of(("mlm", "word_order"), side=side, masking=None)(examples)
    before = originals(examples, batch["input_ids"].shape[1], side=side).flatten()
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    positions = batch["order_positions"]
    assert torch.equal(batch["order_labels"], before[positions])
    assert len(positions.unique()) == len(positions) and len(positions) % 3 == 0
    assert (labels[positions] == -100).all() and (before[positions] >= 5).all()
    runs = positions.view(-1, 3)
    assert (runs.diff(dim=1) == 1).all()
    assert torch.equal(ids[runs].sort(dim=1).values, before[runs].sort(dim=1).values)
    changed = (ids != before) & (labels == -100)
    assert changed.any() and torch.isin(changed.nonzero().flatten(), positions).all()
    # The masks are those of the collator without this head.
    plain = DataCollatorForMaskedLM(make_tokenizer(padding_side=side))(examples)
    assert torch.equal(batch["labels"], plain["labels"])
    untouched = torch.ones_like(ids, dtype=torch.bool).index_fill(0, positions, False)
    assert torch.equal(ids[untouched], plain["input_ids"].flatten()[untouched])


def test_five_percent_of_the_tokens_lie_in_shuffled_runs():
    examples = make_examples(2048, least=512, most=512)
    batch = collator_of(("mlm", "word_order"), masking=None)(examples)
    assert abs(len(batch["order_positions"]) / batch["attention_mask"].sum() - 0.05) < 0.003


def test_runs_lie_in_one_sentence_where_sentences_are_known():
    examples = make_examples(64, least=60)
    for example in examples:
        example["sent_starts"] = np.arange(len(example["input_ids"])) % 4 == 1
    batch = collator_of(("mlm", "word_order"), word_order_probability=0.3)(examples)
    columns = batch["order_positions"].view(-1, 3) % batch["input_ids"].shape[1]
    assert len(columns) > 50 and (columns[:, 1:] % 4 != 1).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("span_positions", [2, 20])
def test_span_boundaries_are_visible_and_ordinary(side, span_positions):
    examples = make_examples(400)
    batch = collator_of(("mlm", "span_boundary"), side=side, span_positions=span_positions)(examples)
    before = originals(examples, batch["input_ids"].shape[1], side=side).flatten()
    is_hidden = batch["labels"].flatten() != -100
    left, right, offsets = (batch[f"span_{name}"] for name in ("left", "right", "offsets"))
    for outside in (left, right):
        assert not is_hidden[outside].any() and (before[outside] >= 5).all()
    targets = left + 1 + offsets
    assert torch.equal(batch["span_labels"], before[targets]) and len(targets.unique()) == len(targets)
    assert all(is_hidden[int(a) + 1 : int(b)].all() for a, b in zip(left, right, strict=True))
    # Every hidden token is asked for, but those of spans beside a special token and those far inside.
    asked = torch.zeros_like(is_hidden).index_fill(0, targets, True)
    for flat in (is_hidden & ~asked).nonzero().flatten().tolist():
        start = flat
        while is_hidden[start - 1]:
            start -= 1
        end = flat
        while is_hidden[end]:
            end += 1
        assert before[start - 1] < 5 or before[end] < 5 or flat - start >= span_positions


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_company_and_lists_change_no_bit(side):
    examples = make_examples(64)
    for example in examples:
        example["pair_label"] = example["example_id"] % 3
    wanted = facts(collator_of(word_order_probability=0.2)(examples))
    assert sum(fact[0] == "order" for row in wanted for fact in row[1:]) > 100
    assert sum(fact[0] == "span" for row in wanted for fact in row[1:]) > 100
    for options in ({}, {"pad_to_multiple_of": 64}, {"target_slots": 32}):
        collator = pickle.loads(pickle.dumps(collator_of(side=side, word_order_probability=0.2, **options)))
        for size in (7, 64):
            batches = [collator(examples[start : start + size]) for start in range(0, 64, size)]
            assert [row for batch in batches for row in facts(batch)] == wanted
            assert torch.cat([batch["pair_labels"] for batch in batches]).tolist() == [i % 3 for i in range(64)]
    listed = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in example.items()} for example in examples]
    assert facts(collator_of(side=side, word_order_probability=0.2)(listed)) == wanted


def test_another_epoch_shuffles_anew_and_static_masks_repeat():
    def runs(epoch, **options):
        collator = collator_of(("mlm", "word_order"), masking=MaskingArguments(**options))
        return collator(make_examples(32, least=80, epoch=epoch))["order_positions"].tolist()

    assert runs(0) != runs(1) and runs(0) == runs(0)
    assert runs(0, static_masks=2) == runs(2, static_masks=2) != runs(1, static_masks=2)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("num_examples", [1, 16])
def test_target_slots_fix_every_shape(side, num_examples):
    examples = make_examples(num_examples, least=3, most=40)
    plain, batch = collator_of(side=side)(examples), collator_of(side=side, target_slots=64)(examples)
    for entries in (("order_positions", "order_labels"), ("span_left", "span_right", "span_offsets", "span_labels")):
        count = len(plain[entries[0]])
        for name in entries:
            assert len(batch[name]) == max(64, -(-count // 64) * 64)
            assert torch.equal(batch[name][:count], plain[name])
            assert (batch[name][count:] == (-100 if name.endswith("labels") else 0)).all()
            assert batch[name].dtype == torch.int64


def test_pairs_languages_places_modes_and_bitext_travel_with_their_examples():
    examples = make_examples(4, least=10)
    lengths = [len(example["input_ids"]) for example in examples]
    examples[0] |= {"pair_label": 1, "lm_mode": 3, "source_length": 4}
    examples[1] |= {"is_bitext": True, "langs": np.arange(lengths[1]) % 2, "position_ids": np.arange(lengths[1]) % 5}
    examples[2] |= {"pair_label": np.int64(2), "source_length": 3, "lm_mode": 1}
    for side in ("right", "left"):
        batch = collator_of(("mlm", "pair"), side=side)(examples)
        assert batch["pair_labels"].tolist() == [1, -100, 2, -100]
        assert (batch["lm_modes"].tolist(), batch["source_lengths"].tolist()) == ([3, 0, 1, 0], [4, 0, 3, 0])
        assert batch["is_bitext"].dtype == torch.bool and batch["is_bitext"].tolist() == [False, True, False, False]
        for row, length in enumerate(lengths):
            real = batch["attention_mask"][row].bool()
            places, langs = np.arange(length), np.zeros(length, dtype=int)
            if row == 1:
                places, langs = places % 5, places % 2
            assert batch["position_ids"][row][real].tolist() == places.tolist()
            assert batch["langs"][row][real].tolist() == langs.tolist()
            assert not batch["position_ids"][row][~real].any() and not batch["langs"][row][~real].any()
    # The length of a first segment alone, which every pair has, is no mode.
    assert not {"lm_modes", "source_lengths"} & collator_of()([make_examples(1)[0] | {"source_length": 2}]).keys()


def test_the_end_of_a_target_is_hidden_too_but_no_other_special_token():
    """So that a model learns to stop."""
    examples = make_examples(2000, least=12, most=30)
    for example in examples:
        example |= {"lm_mode": example["example_id"] % 4, "source_length": 6 * (example["example_id"] % 4 == 3)}
    batch = collator_of(("mlm",), masking=None)(examples)
    before = originals(examples, batch["input_ids"].shape[1])
    is_hidden = batch["labels"] != -100
    assert not is_hidden[before == 2].any()
    ends = (is_hidden & (before == 3)).any(dim=1).view(-1, 4).float().mean(dim=0)
    assert ends[:3].tolist() == [0, 0, 0] and 0.1 < ends[3] < 0.2


def test_what_cannot_be_is_refused():
    options = [("word_order_probability", 1.5), ("word_order_size", 1), ("word_order_size", 8), ("span_positions", 0)]
    for name, value in options:
        with pytest.raises(InputError, match=f"{name}={value}"):
            collator_of(**{name: value})
    with pytest.raises(InputError, match="langs is not as long as input_ids"):
        collator_of()([make_examples(1)[0] | {"langs": [0]}])


@pytest.mark.parametrize("with_sentences", [False, True])
def test_isolated_documents_are_kept_apart_without_special_tokens(with_sentences):
    """A shuffled run, and a span with the tokens around it, lie in one document."""
    examples = isolated_examples(64)
    if with_sentences:
        for example in examples:
            example["sent_starts"] = np.arange(len(example["input_ids"])) % 5 == 0
    collator = collator_of(("mlm", "span_boundary", "word_order"), word_order_probability=0.4)
    batch = collator(examples)
    documents = batch["document_ids"].flatten()
    runs = batch["order_positions"].reshape(-1, 3)
    assert len(runs) > 50
    assert (documents[runs] == documents[runs[:, :1]]).all()
    assert len(batch["span_left"]) > 50
    assert torch.equal(documents[batch["span_left"]], documents[batch["span_right"]])
