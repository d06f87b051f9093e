"""Batches of texts that get one vector each: rows, keys of texts, draws, and what is refused."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from test_denoising_collator import FIRST_WORD
from test_denoising_collator import tokenizer as framed_tokenizer
from test_masking_collator import NUM_TOKENS, make_tokenizer

from helpers.contrastive_batches import (
    MASK,
    NUM_TEXTS,
    SETTINGS,
    collator_of,
    decoder_rows,
    make_examples,
    make_text,
    role_by_role,
    texts_of,
)
from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.contrastive.collator import text_keys
from hf_pretrain.schedules import Schedule, TrainingSteps


@pytest.mark.parametrize("num_texts", [2, 4])
@pytest.mark.parametrize("with_types", [False, True])
@pytest.mark.parametrize(("packed", "side"), [(False, "right"), (False, "left"), (True, "right"), (True, "left")])
def test_every_text_comes_back_bit_exact_and_in_its_order(num_texts, with_types, packed, side):
    examples = make_examples(23, num_texts=num_texts, with_types=with_types)
    batch = collator_of(side=side, packed=packed)(examples)
    texts, others = texts_of(batch)
    assert not others and [text.ids for text in texts] == role_by_role(examples)
    if with_types:
        assert [text.types for text in texts] == role_by_role(examples, "token_type_ids")
    assert all(values.dtype == torch.int64 for values in batch.values())
    assert batch["documents"].tolist() == [example["document"] for example in examples]
    expected = {"input_ids", "attention_mask", "text_ids", "first_positions", "documents", "text_keys"}
    expected |= {"document_ids", "position_ids"} if packed else set()
    assert set(batch) == expected | ({"token_type_ids"} if with_types else set())
    if not packed:
        assert [text.first // batch["input_ids"].shape[1] for text in texts] == list(range(23 * num_texts))
        assert batch["attention_mask"][:, -1 if side == "left" else 0].all()
    else:
        assert batch["attention_mask"][:, 0].all()
    assert batch["input_ids"].shape[1] == max(len(ids) for ids in role_by_role(examples))


@pytest.mark.parametrize(("objective", "beside"), SETTINGS)
def test_rows_that_are_shared_hold_the_same_sequences(objective, beside):
    examples = make_examples(40, num_texts=NUM_TEXTS[objective])

    def contents(batch):
        texts, others = texts_of(batch)
        return [(text.ids, text.labels) for text in texts], Counter(str(other[2:]) for other in others)

    alone, together = (collator_of(objective, beside, packed=packed)(examples) for packed in (False, True))
    assert contents(alone) == contents(together)
    rest = set(alone) - {"input_ids", "attention_mask", "text_ids", "first_positions", "labels", "target_positions"}
    rest -= {"target_examples"}
    assert all(torch.equal(alone[name], together[name]) for name in rest)


def test_targets_know_their_example():
    """Of 12 examples whose words are their number, masked copies and anchors in their rows."""
    for objective, beside in SETTINGS:
        if beside != "mlm":
            continue
        examples = make_examples(12, num_texts=NUM_TEXTS[objective])
        for packed in (False, True):
            whole = collator_of(objective, beside, packed=packed)(examples)
            found = Counter(
                (int(example), int(whole["labels"].flatten()[position]))
                for example, position in zip(whole["target_examples"], whole["target_positions"], strict=True)
            )
            expected = Counter()
            for number, example in enumerate(examples):
                lone = collator_of(objective, beside, packed=packed)([example])
                labels = lone["labels"].flatten()
                expected.update((number, int(labels[position])) for position in lone["target_positions"])
            assert found == expected, (objective, packed)


def test_rows_that_are_shared_are_fewer():
    alone, together = (
        collator_of("contrastive", "none", packed=packed)(make_examples(40, num_texts=2)) for packed in (False, True)
    )
    assert len(together["input_ids"]) < len(alone["input_ids"])


def test_shared_rows_are_full():
    """On sentences of 20 tokens in the mean, of very different lengths."""
    examples = []
    for number in range(64):
        rng = np.random.default_rng(number)
        lengths = np.clip(rng.lognormal(np.log(17), 0.55, 2), 4, 80).astype(int)
        examples.append(
            {
                "texts": [make_text(rng, least=length, most=length) for length in lengths],
                "document": number,
                "example_id": number,
                "epoch": 0,
            }
        )
    for beside in ("none", "mlm"):
        fill = collator_of(beside=beside, packed=True)(examples)["attention_mask"].double().mean()
        assert fill >= 0.93
    assert collator_of(packed=True, row_length=256)(examples)["attention_mask"].double().mean() >= 0.9


def test_shared_rows_have_the_width_that_is_given():
    examples = make_examples(16)
    longest = max(map(len, role_by_role(examples)))
    for options, width in (
        ({"packed": True, "row_length": 100}, 100),
        ({"packed": True, "row_length": 100, "pad_to_multiple_of": 32}, 128),
        ({"packed": True, "row_length": longest}, longest),
        ({"packed": True, "pad_to_multiple_of": 64}, 64),
        ({"pad_to_multiple_of": 64}, 64),
    ):
        batch = collator_of(**options)(examples)
        assert batch["input_ids"].shape[1] == width
        assert [text.ids for text in texts_of(batch)[0]] == role_by_role(examples)


def test_equal_texts_have_equal_keys_and_others_do_not():
    rng = np.random.default_rng(0)
    drawn, sizes = rng.integers(5, 30, (170_000, 8)).tolist(), rng.integers(1, 9, 170_000).tolist()
    texts = {tuple(ids[:size]) for ids, size in zip(drawn, sizes, strict=True)}
    # What a sum or a product of tokens would mix up.
    texts |= {(5, 6, 7), (7, 6, 5), (6, 5, 7), (6, 6, 6), (0, 5), (5, 0), (5,), (0,), (0, 0), (0, 0, 0)}
    texts = [*texts]
    assert len(texts) > 100_000
    lengths = np.array([len(text) for text in texts])
    flat = np.array([token for text in texts for token in text])
    keys = text_keys(flat, lengths=lengths)
    assert keys.dtype == np.int64 and len(set(keys.tolist())) == len(texts)
    # All 64 bits are used, each half of the time.
    shares = np.unpackbits(keys.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert (abs(shares - 0.5) < 0.01).all()
    order = rng.permutation(len(texts))[:50]
    again = text_keys(np.concatenate([np.array(texts[index]) for index in order]), lengths=lengths[order])
    assert again.tolist() == keys[order].tolist()


def test_keys_of_texts_depend_on_the_tokens_alone():
    examples = make_examples(12, num_texts=3)
    examples[7]["texts"][2] = dict(examples[2]["texts"][0])
    wanted = collator_of()(examples)["text_keys"]
    assert wanted[2 * 12 + 7] == wanted[2] and len(set(wanted.tolist())) == 35
    for number, example in enumerate(examples):
        moved = {**example, "epoch": 4, "example_id": 99, "document": 8}
        for batch in (
            collator_of(side="left", pad_to_multiple_of=128, seed=1)([moved]),
            collator_of(beside="mlm", packed=True)([moved]),
        ):
            assert batch["text_keys"].tolist() == wanted[number::12].tolist()


def facts(batch):
    """All that a batch says of each example, free of its place in the batch."""
    texts, copies = texts_of(batch)
    num_examples = len(batch["documents"])
    found = [
        [batch["documents"][row].item(), *((text.ids, text.labels, text.types) for text in texts[row::num_examples])]
        for row in range(num_examples)
    ]
    if copies and "document_ids" not in batch:
        for row, copy in zip(found, copies, strict=True):
            row.append((copy.ids, copy.labels))
    for row, keys in zip(found, batch["text_keys"].view(-1, num_examples).T.tolist(), strict=True):
        row.append(keys)
    if "decoder_mask" in batch:
        for row, decoder in zip(found, decoder_rows(batch), strict=True):
            row.append(decoder)
    if "decoder_keys" in batch:
        for row, key in zip(found, batch["decoder_keys"].tolist(), strict=True):
            row.append(key)
    return found, Counter(str(copy[2:]) for copy in copies)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("objective", "beside", "options"),
    [(*pair, {}) for pair in SETTINGS] + [("retromae", "none", {"enhanced_decoding": True})],
)
def test_batch_order_side_and_lists_change_no_bit(objective, beside, options, packed):
    examples = make_examples(24, num_texts=NUM_TEXTS[objective], with_types=True)
    collator = collator_of(objective, beside, packed=packed, seed=11, **options)
    wanted, copies = facts(collator(examples))
    for size in (1, 5):
        parts = [facts(collator(examples[start : start + size])) for start in range(0, 24, size)]
        assert [row for part, _ in parts for row in part] == wanted
        assert sum((others for _, others in parts), Counter()) == copies
    order = np.random.default_rng(1).permutation(24)
    shuffled, others = facts(collator([examples[index] for index in order]))
    assert shuffled == [wanted[index] for index in order] and others == copies
    left = collator_of(objective, beside, side="left", packed=packed, seed=11, pad_to_multiple_of=32, **options)
    assert facts(left(examples)) == (wanted, copies)
    listed = [
        {
            **example,
            "texts": [{name: values.tolist() for name, values in text.items()} for text in example["texts"]],
        }
        for example in examples
    ]
    assert facts(collator(listed)) == (wanted, copies)
    copy = pickle.loads(pickle.dumps(collator))
    assert facts(copy(examples)) == (wanted, copies)


DRAWN = {
    ("contrastive", "mlm"): ["labels"],
    ("infoword", "mlm"): ["labels"],
    ("retromae", "mlm"): ["labels", "decoder_labels"],
    ("tsdae", "none"): ["text_lengths"],
    ("contrastive", "rtd"): ["rtd_labels", "rtd_sample_uniforms"],
}


@pytest.mark.parametrize(("objective", "beside"), DRAWN)
def test_another_epoch_or_seed_draws_anew_and_static_masks_repeat(objective, beside):
    def drawn(epoch, seed=0, **masking):
        examples = make_examples(40, num_texts=NUM_TEXTS[objective], epoch=epoch)
        batch = collator_of(objective, beside, seed=seed, masking=MaskingArguments(**masking))(examples)
        batch["text_lengths"] = torch.bincount(batch["text_ids"].flatten() + 1)
        return [batch[name].tolist() for name in DRAWN[objective, beside]]

    for first, other, seeded in zip(drawn(0), drawn(1), drawn(0, seed=1), strict=True):
        assert first != other and first != seeded and other != seeded
    assert drawn(1) == drawn(1)
    assert drawn(0, static_masks=2) == drawn(2, static_masks=2) == drawn(0)
    assert all(a != b for a, b in zip(drawn(0, static_masks=2), drawn(1, static_masks=2), strict=True))


@pytest.mark.parametrize(
    ("objective", "packed"), [("contrastive", False), ("contrastive", True), ("infoword", False), ("retromae", False)]
)
@pytest.mark.parametrize("num_examples", [1, 16])
def test_target_slots_fix_the_number_of_targets(objective, packed, num_examples):
    examples = make_examples(num_examples, num_texts=NUM_TEXTS[objective])
    plain = collator_of(objective, "mlm", packed=packed)(examples)["target_positions"]
    batch = collator_of(objective, "mlm", packed=packed, target_slots=32)(examples)
    positions = batch["target_positions"]
    assert len(positions) % 32 == 0 and len(positions) - len(plain) < 32
    assert torch.equal(positions[: len(plain)], plain)
    (filler,) = set(positions[len(plain) :].tolist()) or {int((batch["labels"].flatten() == -100).int().argmax())}
    assert batch["labels"].flatten()[filler] == -100


def test_a_batch_without_a_free_position_is_widened_for_its_slots():
    """Rows of ordinary tokens alone that are targets throughout."""
    examples = [
        {
            "texts": [{"input_ids": [FIRST_WORD + i for i in range(6)], "word_starts": [True] * 6}],
            "document": 0,
            "example_id": number,
            "epoch": 0,
        }
        for number in range(3)
    ]
    masking = MaskingArguments(mlm_probability=1.0, mask_share=1.0, random_share=0.0)
    for packed in (False, True):
        options = {"tokenizer": framed_tokenizer("bare"), "masking": masking, "packed": packed}
        assert collator_of("retromae", "mlm", **options)(examples)["labels"].shape == (3, 6)
        batch = collator_of("retromae", "mlm", target_slots=8, **options)(examples)
        assert batch["labels"].shape == (3, 7) and len(batch["target_positions"]) == 24
        fillers = batch["target_positions"][18:]
        assert (batch["labels"].flatten()[fillers] == -100).all()
        assert [text.ids for text in texts_of(batch)[0]] == [[MASK] * 6] * 3


@pytest.mark.parametrize(
    ("objective", "beside", "name"),
    [
        ("contrastive", "mlm", "labels"),
        ("retromae", "mlm", "labels"),
        ("contrastive", "rtd", "rtd_labels"),
    ],
)
def test_a_schedule_of_the_mask_rate_reaches_every_mask(objective, beside, name):
    masking = MaskingArguments(mlm_probability=Schedule.parse("0:0.8, 10:0.1", name="mlm_probability"))
    examples = make_examples(64, num_texts=NUM_TEXTS[objective], least=30)
    for index, example in enumerate(examples):
        example["order_index"] = index
    collator = collator_of(objective, beside, masking=masking)
    late = (collator(examples)[name] != -100).sum()
    assert collator.training_steps is None
    steps = TrainingSteps(examples_per_step=64, per_epoch=10, total=10)
    collator.training_steps = steps
    assert collator.training_steps is steps
    early = (collator(examples)[name] != -100).sum()
    assert 6 < early / late < 10


def test_without_masks_no_mask_token_is_needed():
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    examples = make_examples(4)
    assert [text.ids for text in texts_of(collator_of(tokenizer=tokenizer)(examples))[0]] == role_by_role(examples)
    lonely = make_examples(4, num_texts=1)
    wanted = collator_of("tsdae")(lonely)
    assert torch.equal(collator_of("tsdae", tokenizer=tokenizer)(lonely)["input_ids"], wanted["input_ids"])
    for objective, beside in (("contrastive", "mlm"), ("infoword", "none"), ("retromae", "none"), ("tsdae", "rtd")):
        with pytest.raises(InputError, match="no mask token"):
            collator_of(objective, beside, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "infomax"}, "objective='infomax' must be one of .*contrastive"),
        ({"beside": "auto"}, "beside='auto' must be one of none, mlm, rtd"),
        ({"deletion_probability": 1.5}, "deletion_probability=1.5"),
        ({"decoder_mask_probability": 0.0}, "decoder_mask_probability=0.0"),
        ({"enhanced_decoding": True}, "enhanced_decoding=True has no effect on objective='contrastive'"),
        ({"row_length": 64}, "row_length=64 has no effect .* packed=True"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
        ({"target_slots": 0}, "target_slots=0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        collator_of(**options)


def test_examples_that_cannot_be_are_refused():
    def refused(message, examples, *args, **options):
        with pytest.raises(InputError, match=message):
            collator_of(*args, **options)(examples)

    two, three = make_examples(2), make_examples(2, num_texts=3)
    refused("texts has 2 or 3 texts", [two[0], three[1]])
    refused("texts has 1 texts .* objective='contrastive' needs an anchor, a positive", make_examples(2, num_texts=1))
    refused("texts has 3 texts .* objective='infoword'", three, "infoword")
    refused("texts has 2 texts .* objective='tsdae' needs one text", two, "tsdae")
    refused("texts has 2 texts .* objective='retromae'", two, "retromae")
    for name in ("texts", "document"):
        refused(f"no entry '{name}'", [two[0], {key: two[1][key] for key in two[1] if key != name}])
    bare = [{key: example[key] for key in example if key != "ngram"} for example in two]
    refused("no entry 'ngram'", bare, "infoword")
    for ngram in ((-1, 2), (3, 3), (1, len(two[1]["texts"][0]["input_ids"]) + 1)):
        refused(r"ngram=\(", [two[0], two[1] | {"ngram": ngram}], "infoword")
    for role in (0, 1):
        strange = make_examples(2)
        strange[1]["texts"][role]["input_ids"][1] = NUM_TOKENS
        refused(f"input_ids holds the id {NUM_TOKENS}", strange)
        empty = make_examples(2)
        empty[1]["texts"][role] = {"input_ids": [], "word_starts": []}
        refused("text without tokens in the example with document=0", empty)
    typed = make_examples(2)
    typed[1]["texts"][1]["token_type_ids"] = [0] * len(typed[1]["texts"][1]["input_ids"])
    refused("token_type_ids is a column of some texts", typed)
    typed[1]["texts"][1]["token_type_ids"] = [0]
    for text in (*typed[0]["texts"], typed[1]["texts"][0]):
        text["token_type_ids"] = [0] * len(text["input_ids"])
    refused("token_type_ids is not as long as input_ids", typed)
    refused("row_length=4 is less than the", two, packed=True, row_length=4)
    keyless = [{key: example[key] for key in example if key != "epoch"} for example in two]
    refused("no entry 'epoch'", keyless, beside="mlm")
    refused(
        "no column 'word_starts'",
        [example | {"texts": [{"input_ids": text["input_ids"]} for text in example["texts"]]} for example in two],
        beside="mlm",
        masking=MaskingArguments(masking_unit="word"),
    )
