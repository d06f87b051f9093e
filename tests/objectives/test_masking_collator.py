from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.schedules import TrainingSteps

NUM_TOKENS = 205
UNITS = ["token", "word", "ngram", "span", "given"]


def make_tokenizer(**options) -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(NUM_TOKENS - 5))]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, **options)


@pytest.fixture(scope="module")
def small_tokenizer():
    return make_tokenizer()


def make_examples(
    num_examples: int, *, least: int = 3, most: int = 96, epoch: int = 0, first_id: int = 0
) -> list[dict]:
    """Examples [CLS] ... [SEP] of differing lengths; the same id gives the same example."""
    examples = []
    for example_id in range(first_id, first_id + num_examples):
        rng = np.random.default_rng(example_id)
        length = int(rng.integers(least, most + 1))
        input_ids = rng.integers(5, NUM_TOKENS, length).astype(np.int32)
        input_ids[0], input_ids[-1] = 2, 3
        word_starts = rng.random(length) < 0.7
        word_starts[[0, -1]] = True
        spans = [(start, min(start + 3, length - 1)) for start in range(1, length - 1, 5)]
        examples.append(
            {
                "input_ids": input_ids,
                "word_starts": word_starts,
                "spans": spans,
                "example_id": example_id,
                "epoch": epoch,
            }
        )
    return examples


class TinyDataset(Dataset):
    def __init__(self, examples: list[dict]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.examples[index]


def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Each example of the batches as (input_ids, labels) without padding."""
    rows = []
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            rows.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
    return rows


def selected(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["labels"] != -100


@pytest.mark.parametrize("unit", UNITS)
def test_batch_holds_what_it_says(small_tokenizer, unit):
    examples = make_examples(64)
    batch = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit=unit))(examples)
    width = max(len(example["input_ids"]) for example in examples)
    originals = torch.zeros(64, width, dtype=torch.int64)
    for row, example in enumerate(examples):
        originals[row, : len(example["input_ids"])] = torch.as_tensor(example["input_ids"])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "target_positions"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert torch.equal(batch["attention_mask"], (originals != 0).long())
    targets = selected(batch)
    assert torch.equal(batch["target_positions"], targets.flatten().nonzero().flatten())
    assert torch.equal(batch["labels"][targets], originals[targets])
    assert torch.equal(batch["input_ids"][~targets], originals[~targets])
    assert (originals[targets] >= 5).all(), "special tokens and padding are never targets"
    assert ((batch["input_ids"][targets] == 4) | (batch["input_ids"][targets] >= 5)).all()
    assert (batch["input_ids"][targets] == 4).any()
    assert (targets.sum(dim=1) >= 1)[torch.tensor([len(e["input_ids"]) > 2 for e in examples])].all()


def test_token_counts_are_exact_for_rows_of_every_length(small_tokenizer):
    examples = [
        {"input_ids": [2, *[9] * (length - 2), 3], "example_id": length, "epoch": 0} for length in range(2, 130)
    ]
    for probability in (0.15, 0.25):
        collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(mlm_probability=probability))
        counts = selected(collator(examples)).sum(dim=1).tolist()
        assert counts == [min(n - 2, max(1, round(probability * n))) for n in range(2, 130)]


@pytest.mark.parametrize("unit", UNITS)
def test_batch_size_and_company_change_no_bit(small_tokenizer, unit):
    collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit=unit))
    examples = make_examples(64)
    wanted = rows_of([collator(examples)])
    for size in (1, 4, 32):
        assert rows_of([collator(examples[start : start + size]) for start in range(0, 64, size)]) == wanted
    order = np.random.default_rng(0).permutation(64)
    shuffled = rows_of([collator([examples[index] for index in order])])
    assert shuffled == [wanted[index] for index in order]


@pytest.mark.parametrize("unit", ["token", "span"])
def test_workers_change_no_bit(small_tokenizer, unit):
    collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit=unit))
    dataset = TinyDataset(make_examples(48))
    alone, with_workers = (
        rows_of(list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collator)))
        for workers in (0, 2)
    )
    assert alone == with_workers


def test_collator_survives_pickling(small_tokenizer):
    collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit="word"), seed=3)
    copy, examples = pickle.loads(pickle.dumps(collator)), make_examples(8)
    for name, tensor in collator(examples).items():
        assert torch.equal(tensor, copy(examples)[name])


@pytest.mark.parametrize("unit", UNITS)
def test_padding_side_and_multiple_change_no_bit(small_tokenizer, unit):
    examples, masking = make_examples(32), MaskingArguments(masking_unit=unit)
    right = DataCollatorForMaskedLM(small_tokenizer, masking=masking)(examples)
    left = DataCollatorForMaskedLM(make_tokenizer(padding_side="left"), masking=masking, pad_to_multiple_of=64)(
        examples
    )
    assert left["input_ids"].shape[1] == 128
    assert rows_of([left]) == rows_of([right])
    assert left["attention_mask"][:, -1].all() and right["attention_mask"][:, 0].all()
    assert (left["input_ids"][left["attention_mask"] == 0] == 0).all()
    for batch in (left, right):
        assert torch.equal(batch["target_positions"], selected(batch).flatten().nonzero().flatten())


@pytest.mark.parametrize("unit", UNITS)
def test_lists_and_arrays_give_the_same(small_tokenizer, unit):
    collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit=unit))
    examples = make_examples(16)
    listed = [
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in example.items()}
        for example in examples
    ]
    numbers = [{**example, "word_starts": list(example["word_starts"])} for example in examples]
    wanted = collator(examples)
    for variant in (listed, numbers):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in collator(variant).items())


def test_another_epoch_or_seed_hides_other_tokens(small_tokenizer):
    first = selected(DataCollatorForMaskedLM(small_tokenizer)(make_examples(2048, least=512, most=512)))
    others = (
        DataCollatorForMaskedLM(small_tokenizer)(make_examples(2048, least=512, most=512, epoch=1)),
        DataCollatorForMaskedLM(small_tokenizer, seed=1)(make_examples(2048, least=512, most=512)),
    )
    for other in map(selected, others):
        jaccard = (first & other).sum() / (first | other).sum()
        assert abs(jaccard - 0.081) < 0.005


def test_static_masks_are_frozen_copies_used_in_turn(small_tokenizer):
    collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(static_masks=3))
    batches = [collator(make_examples(16, least=40, epoch=epoch)) for epoch in range(7)]
    for epoch in range(4):
        for name, tensor in batches[epoch].items():
            assert torch.equal(tensor, batches[epoch + 3][name])
    assert len({tuple(rows_of([batch])[0][0]) for batch in batches}) == 3


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_probability_zero_and_one(small_tokenizer, unit, probability):
    masking = MaskingArguments(masking_unit=unit, mlm_probability=probability)
    examples = make_examples(16)
    batch = DataCollatorForMaskedLM(small_tokenizer, masking=masking)(examples)
    if probability == 0:
        assert not selected(batch).any() and batch["target_positions"].shape == (0,)
        return
    ids = torch.where(selected(batch), batch["labels"], batch["input_ids"])
    candidates = ids >= 5
    if unit == "given":
        for row, example in enumerate(examples):
            inside = torch.zeros(ids.shape[1], dtype=torch.bool)
            for start, end in example["spans"]:
                inside[start:end] = True
            candidates[row] &= inside
    assert torch.equal(selected(batch), candidates)


def test_token_type_ids_travel_with_their_tokens():
    examples = make_examples(8, least=10)
    for example in examples:
        example["token_type_ids"] = (np.arange(len(example["input_ids"])) >= 5).astype(np.int64)
    for side in ("right", "left"):
        batch = DataCollatorForMaskedLM(make_tokenizer(padding_side=side))(examples)
        for row, example in enumerate(examples):
            real = batch["attention_mask"][row].bool()
            assert batch["token_type_ids"][row][real].tolist() == example["token_type_ids"].tolist()
            assert not batch["token_type_ids"][row][~real].any()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("slots", [1, 64])
def test_target_slots_fill_up_with_a_position_without_label(side, slots):
    tokenizer, examples = make_tokenizer(padding_side=side), make_examples(8)
    plain = DataCollatorForMaskedLM(tokenizer)(examples)["target_positions"]
    batch = DataCollatorForMaskedLM(tokenizer, target_slots=slots)(examples)
    positions = batch["target_positions"]
    assert len(positions) == -(-len(plain) // slots) * slots
    assert torch.equal(positions[: len(plain)], plain)
    assert (batch["labels"].flatten()[positions[len(plain) :]] == -100).all()


def test_target_slots_find_a_free_position_even_where_every_token_is_a_target(small_tokenizer):
    # Tokens without any special one: only a further column of padding can take the filling.
    examples = [{"input_ids": [7, 8, 9], "example_id": index, "epoch": 0} for index in range(2)]
    for side in ("right", "left"):
        tokenizer = make_tokenizer(padding_side=side)
        collator = DataCollatorForMaskedLM(tokenizer, masking=MaskingArguments(mlm_probability=1.0), target_slots=4)
        batch = collator(examples)
        labels = batch["labels"].flatten()[batch["target_positions"]]
        assert labels.tolist() == [7, 8, 9, 7, 8, 9, -100, -100]
        assert batch["attention_mask"].sum() == 6
    nothing = MaskingArguments(mlm_probability=0.0)
    empty = DataCollatorForMaskedLM(small_tokenizer, masking=nothing, target_slots=4)(examples)
    assert empty["target_positions"].shape == (4,) and (empty["labels"] == -100).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_uniforms_of_targets_belong_to_the_token_not_to_the_batch(side):
    collator = DataCollatorForMaskedLM(make_tokenizer(padding_side=side), target_slots=32)
    examples = make_examples(32)
    reference = DataCollatorForMaskedLM(make_tokenizer()).keyed_uniforms(examples, "generator", length=96)
    assert reference.dtype == np.float32 and reference.min() >= 0 and reference.max() < 1
    batch = collator(examples)
    drawn = collator.target_uniforms(examples, batch, stream="generator")
    assert drawn.dtype == torch.float32 and drawn.shape == batch["target_positions"].shape
    expected = []
    for row, (_, labels) in enumerate(rows_of([batch])):
        expected += [reference[row, place] for place, label in enumerate(labels) if label != -100]
    assert drawn[: len(expected)].tolist() == [float(value) for value in expected]
    assert collator.target_uniforms(examples, batch, stream="other")[0] != drawn[0]


def test_uniforms_never_reach_one(small_tokenizer, monkeypatch):
    monkeypatch.setattr("hf_pretrain.data.draws.bits", lambda keys, length: np.full((1, length), 2**64 - 1, np.uint64))
    uniforms = DataCollatorForMaskedLM(small_tokenizer).keyed_uniforms(make_examples(1), "generator", length=2)
    assert (uniforms < 1).all() and (uniforms > 0.9999).all()


def test_examples_without_keys_words_or_spans_are_refused(small_tokenizer):
    def collate(unit: str, *without: str):
        examples = [{key: example[key] for key in example if key not in without} for example in make_examples(2)]
        return DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit=unit))(examples)

    assert collate("token", "word_starts", "spans")["labels"].shape[0] == 2
    for missing, unit, fix in (
        ("example_id", "token", "EpochDataset"),
        ("epoch", "token", "EpochDataset"),
        ("word_starts", "word", "masking_unit='token'"),
        ("word_starts", "ngram", "masking_unit='token'"),
        ("word_starts", "span", "masking_unit='token'"),
        ("spans", "given", "choose another unit"),
    ):
        with pytest.raises(InputError, match=f"'{missing}'.*{fix}"):
            collate(unit, missing)


def test_examples_that_do_not_fit_are_refused(small_tokenizer):
    words = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit="word"))
    with pytest.raises(InputError, match="word_starts is not as long as input_ids"):
        words([{"input_ids": [2, 7, 3], "word_starts": [True, True], "example_id": 0, "epoch": 0}])
    given = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit="given"))
    for span in ((1, 1), (-1, 2), (1, 4)):
        with pytest.raises(InputError, match=rf"spans holds \({span[0]}, {span[1]}\)"):
            given([{"input_ids": [2, 7, 3], "spans": [span], "example_id": 0, "epoch": 0}])


def test_tokenizers_and_numbers_that_cannot_work_are_refused(small_tokenizer):
    backend = small_tokenizer.backend_tokenizer
    with pytest.raises(InputError, match="no mask token"):
        DataCollatorForMaskedLM(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]"))
    with pytest.raises(InputError, match="no padding token"):
        DataCollatorForMaskedLM(PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]"))
    for option in ("pad_to_multiple_of", "target_slots"):
        with pytest.raises(InputError, match=f"{option}=0"):
            DataCollatorForMaskedLM(small_tokenizer, **{option: 0})


class TestMaskRatesThatChange:
    """The oracle of a row whose rate is p is the collator whose rate is p throughout."""

    STEPS = TrainingSteps(examples_per_step=8, per_epoch=4, total=8)
    RATES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1)

    def collator(self, tokenizer, *, target_slots=None, **options):
        masking = MaskingArguments(mlm_probability="0:0.5, 4:0.1", **options)
        collator = DataCollatorForMaskedLM(tokenizer, masking=masking, target_slots=target_slots)
        collator.training_steps = self.STEPS
        return collator

    def examples(self):
        """Two epochs of 30 examples in steps of 8, 8, 8 and 6, shuffled."""
        examples = []
        for epoch in range(2):
            for index, example in enumerate(make_examples(30, epoch=epoch)):
                examples.append({**example, "order_index": index})
        return [examples[index] for index in np.random.default_rng(1).permutation(60)]

    def rate(self, example):
        return self.RATES[4 * example["epoch"] + example["order_index"] // 8]

    @pytest.mark.parametrize(
        "options",
        [*({"masking_unit": unit} for unit in UNITS)]
        + [{"masking_unit": unit, "masking_count": "bernoulli"} for unit in ("token", "word", "given")],
        ids=lambda options: "-".join(options.values()),
    )
    def test_every_row_is_masked_as_by_its_own_rate(self, small_tokenizer, options):
        examples = self.examples()
        rows = rows_of([self.collator(small_tokenizer, **options)(examples)])
        for example, row in zip(examples, rows, strict=True):
            masking = MaskingArguments(mlm_probability=self.rate(example), **options)
            assert rows_of([DataCollatorForMaskedLM(small_tokenizer, masking=masking)([example])]) == [row]

    def test_counts_are_exact(self, small_tokenizer):
        examples = self.examples()
        counts = selected(self.collator(small_tokenizer)(examples)).sum(dim=1).tolist()
        lengths = [len(example["input_ids"]) for example in examples]
        rates = map(self.rate, examples)
        assert counts == [min(n - 2, max(1, round(rate * n))) for n, rate in zip(lengths, rates, strict=True)]

    def test_without_an_index_or_before_training_the_rate_is_the_last(self, small_tokenizer):
        constant = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(mlm_probability=0.1))
        without = make_examples(30)
        assert rows_of([self.collator(small_tokenizer)(without)]) == rows_of([constant(without)])
        before = self.collator(small_tokenizer)
        before.training_steps = None
        assert rows_of([before(self.examples())]) == rows_of([constant(self.examples())])

    def test_slots_for_the_highest_rate_fix_the_shape(self, small_tokenizer):
        collator = self.collator(small_tokenizer, target_slots=8 * 48)
        for epoch in range(2):
            for start in range(0, 32, 8):
                examples = make_examples(8, least=96, most=96, epoch=epoch)
                batch = collator([{**example, "order_index": start + i} for i, example in enumerate(examples)])
                assert batch["target_positions"].shape == (8 * 48,)

    def test_refusals(self):
        with pytest.raises(InputError, match="mlm_probability='0:2' goes to 2: .* from 0 to 1"):
            MaskingArguments(mlm_probability="0:2")
        with pytest.raises(InputError, match="static_masks=10 freezes the masks"):
            MaskingArguments(mlm_probability="0:0.2", static_masks=10)


def isolated_examples(num_examples: int) -> list[dict]:
    """Rows of several documents without a special token between them; some begin with what is no start of a word."""
    examples = []
    for example in make_examples(num_examples, least=12):
        rng = np.random.default_rng(1000 + example["example_id"])
        length = len(example["input_ids"])
        example["input_ids"] = rng.integers(5, NUM_TOKENS, length).astype(np.int32)
        begins = rng.random(length) < 0.15
        begins[0] = True
        example["document_ids"] = np.cumsum(begins) - 1
        example["word_starts"] = rng.random(length) < 0.5
        crossing = [(start, min(start + 4, length)) for start in range(0, length - 1, 3)]
        bounds = [*np.flatnonzero(begins).tolist(), length]
        inside = [(i, min(i + 2, end)) for start, end in itertools.pairwise(bounds) for i in range(start, end, 2)]
        example["spans"] = sorted(crossing + inside)
        examples.append(example)
    return examples


class TestIsolatedDocuments:
    """With a tokenizer that adds no special tokens, nothing but `document_ids` tells where a document ends."""

    OPTIONS = [*({"masking_unit": unit} for unit in UNITS), {"masking_unit": "ngram", "ngram_unit": "token"}]

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
    @pytest.mark.parametrize("count", ["exact", "bernoulli"])
    def test_a_unit_lies_in_one_document(self, small_tokenizer, options, count):
        if count == "bernoulli" and options["masking_unit"] in ("ngram", "span"):
            count = "exact"
        masking = MaskingArguments(mlm_probability=0.4, masking_count=count, **options)
        collator = DataCollatorForMaskedLM(small_tokenizer, masking=masking)
        rows = collator.read(isolated_examples(64))
        selection = collator.corrupt(rows).selection
        units = selection.spans()
        assert len(units) > 100
        row, start, end = units.T
        assert (rows.document_ids[row, start] == rows.document_ids[row, end - 1]).all()
        # There is something to keep apart: hidden tokens on both sides of borders.
        touching = selection.mask[:, 1:] & selection.mask[:, :-1] & (np.diff(rows.document_ids, axis=1) > 0)
        assert touching.sum() > 20

    @pytest.mark.parametrize(
        "options",
        [
            {"masking_unit": "span", "span_geometric_p": 0.01, "max_span_length": 8},
            {"masking_unit": "ngram", "max_ngram": 3, "ngram_shares": [0.0, 0.0, 1.0]},
            {"masking_unit": "ngram", "max_ngram": 3, "ngram_shares": [0.0, 0.0, 1.0], "ngram_unit": "token"},
            {"masking_unit": "word"},
        ],
        ids=["span", "ngram", "ngram-token", "word"],
    )
    def test_a_long_unit_ends_with_its_document(self, small_tokenizer, options):
        """What is hidden before a border does not tell what is hidden behind it, as it does inside of a document."""
        masking = MaskingArguments(mlm_probability=0.3, **options)
        collator = DataCollatorForMaskedLM(small_tokenizer, masking=masking)
        rows = collator.read(isolated_examples(400))
        mask = collator.corrupt(rows).selection.mask
        both = rows.valid[:, 1:] & mask[:, :-1]
        borders = rows.document_starts()[:, 1:]
        goes_on = rows.valid[:, 1:] if rows.word_starts is None else ~rows.word_starts[:, 1:]
        across, within = (mask[:, 1:][both & place & goes_on].mean() for place in (borders, ~borders))
        assert across < 0.5 < 0.6 < within

    def test_a_given_span_of_two_documents_is_no_candidate(self, small_tokenizer):
        collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit="given"))
        examples = isolated_examples(16)
        for example in examples:
            begins = np.flatnonzero(np.diff(example["document_ids"])) + 1
            example["spans"] = [(begin - 1, begin + 1) for begin in begins.tolist()]
        assert sum(len(example["spans"]) for example in examples) > 20
        assert not collator.corrupt(collator.read(examples)).selection.mask.any()

    def test_a_word_does_not_begin_in_the_document_before(self, small_tokenizer):
        """Also where its first token is no start of a word: the piece of a cut word is a word."""
        collator = DataCollatorForMaskedLM(small_tokenizer, masking=MaskingArguments(masking_unit="word"))
        rows = collator.read(isolated_examples(64))
        selection = collator.corrupt(rows).selection
        begins = rows.word_starts | rows.document_starts()
        begins[:, 0] = True
        for row, start, end in selection.spans():
            assert begins[row, start] and not begins[row, start + 1 : end].any()
            assert end == rows.valid[row].sum() or begins[row, end]

    @pytest.mark.parametrize("unit", ["span", "given"])
    def test_what_replaces_is_decided_in_each_document(self, small_tokenizer, unit):
        """Of hidden tokens on both sides of a border, some are masked on one side only."""
        masking = MaskingArguments(masking_unit=unit, replacement_unit="unit", mlm_probability=0.5, mask_share=0.5)
        collator = DataCollatorForMaskedLM(small_tokenizer, masking=masking)
        rows = collator.read(isolated_examples(64))
        masked = collator.corrupt(rows)
        touching = masked.selection.mask[:, 1:] & masked.selection.mask[:, :-1]
        is_masked = masked.input_ids == small_tokenizer.mask_token_id
        differs = is_masked[:, 1:] != is_masked[:, :-1]
        borders = rows.document_starts()[:, 1:]
        assert (touching & borders & differs).sum() > 5
        if unit == "span":
            assert not (touching & ~borders & differs).any()
