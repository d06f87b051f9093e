"""What is hidden in batches of texts that get one vector each: masked copies, n-grams, deletion, and what decoders read."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_denoising_collator import EOS, FIRST_WORD
from test_denoising_collator import PAD as T5_PAD
from test_denoising_collator import tokenizer as framed_tokenizer
from test_masking_collator import make_tokenizer

from helpers.contrastive_batches import (
    CLS,
    FIRST,
    MASK,
    NUM_TEXTS,
    PAD,
    SEP,
    SETTINGS,
    anchors_of,
    collator_of,
    decoder_rows,
    make_examples,
    masked_anchors,
    role_by_role,
    texts_of,
)
from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.objectives.replaced_token_detection import DataCollatorForReplacedTokenDetection


@pytest.mark.parametrize("objective", ["contrastive", "tsdae"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_masked_copies_are_those_of_masked_language_modelling(objective, packed, unit):
    masking = MaskingArguments(masking_unit=unit)
    examples = make_examples(30, num_texts=NUM_TEXTS[objective], with_types=True)
    batch = collator_of(objective, "mlm", packed=packed, masking=masking, seed=7)(examples)
    texts, copies = texts_of(batch)
    wanted = masked_anchors(examples, masking=masking, seed=7)
    assert Counter(str((copy.ids, copy.labels)) for copy in copies) == Counter(map(str, wanted))
    assert Counter(str(copy.types) for copy in copies) == Counter(
        map(str, role_by_role(examples, "token_type_ids")[:30])
    )
    assert all(set(text.labels) == {-100} for text in texts)
    if objective == "contrastive":
        assert [text.ids for text in texts] == role_by_role(examples)
    if not packed:
        assert [(copy.ids, copy.labels) for copy in copies] == wanted
        assert [copy.first // batch["input_ids"].shape[1] for copy in copies] == [
            len(texts) + row for row in range(30)
        ]
    positions = (batch["labels"].flatten() != -100).nonzero().flatten()
    assert torch.equal(batch["target_positions"], positions) and len(positions) > 30


@pytest.mark.parametrize(("objective", "beside"), [pair for pair in SETTINGS if pair[1] != "mlm"])
def test_without_masked_language_modelling_there_are_no_targets(objective, beside):
    batch = collator_of(objective, beside)(make_examples(8, num_texts=NUM_TEXTS[objective]))
    assert not {"labels", "target_positions"} & set(batch)
    assert len(batch["input_ids"]) == 8 * NUM_TEXTS[objective]


@pytest.mark.parametrize("beside", ["none", "mlm"])
@pytest.mark.parametrize("masking", [{}, {"masking_unit": "word"}, {"mlm_probability": 0.9, "mask_share": 0.0}])
def test_an_ngram_is_hidden_whole_and_is_no_target(beside, masking):
    examples = make_examples(300)
    batch = collator_of("infoword", beside, masking=MaskingArguments(**masking))(examples)
    texts, others = texts_of(batch)
    originals = role_by_role(examples)
    assert not others and [text.ids for text in texts[300:]] == originals[300:]
    num_targets = num_kept = 0
    for example, anchor, original in zip(examples, texts, originals, strict=False):
        begin, end = example["ngram"]
        assert anchor.ids[begin:end] == [MASK] * (end - begin)
        for column, (ids, before) in enumerate(zip(anchor.ids, original, strict=True)):
            label = anchor.labels[column] if beside == "mlm" else -100
            if label == -100:
                assert ids == before or begin <= column < end
                num_kept += 1
            else:
                assert label == before >= FIRST and not begin <= column < end
                num_targets += 1
    assert num_kept > 300 and (num_targets > 300) == (beside == "mlm")
    keys = collator_of()(examples)["text_keys"]
    assert torch.equal(batch["text_keys"], keys), "those of the texts before masks"


def test_the_encoder_of_retromae_reads_the_masks_of_the_options():
    masking = MaskingArguments(mlm_probability=0.3, masking_unit="word")
    examples = make_examples(60, num_texts=1)
    texts, others = texts_of(collator_of("retromae", "mlm", masking=masking, seed=3)(examples))
    assert not others
    assert [(text.ids, text.labels) for text in texts] == masked_anchors(examples, masking=masking, seed=3)
    plain, _ = texts_of(collator_of("retromae", "none", masking=masking, seed=3)(examples))
    assert [text.ids for text in plain] == [text.ids for text in texts]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_decoder_of_retromae_has_masks_of_its_own(side):
    examples = make_examples(1500, num_texts=1, least=20)
    masking = MaskingArguments(mlm_probability=0.3)
    batch = collator_of("retromae", "mlm", side=side, masking=masking, decoder_mask_probability=0.5)(examples)
    texts, _ = texts_of(batch)
    assert "decoder_keys" not in batch
    counts = Counter()
    for (ids, labels), text, original in zip(decoder_rows(batch), texts, role_by_role(examples), strict=True):
        for token, label, before, target in zip(ids, labels, original, text.labels, strict=True):
            if label == -100:
                assert token == before
            else:
                assert token == MASK and label == before >= FIRST
            if before >= FIRST:
                counts[target != -100, label != -100] += 1
        assert sum(label != -100 for label in labels) == round(0.5 * len(original))
    # Being selected for one says nothing about the other.
    shares = [counts[hidden, True] / (counts[hidden, True] + counts[hidden, False]) for hidden in (False, True)]
    assert abs(shares[0] - shares[1]) < 0.02 and abs(shares[1] - 0.53) < 0.03


def test_the_decoder_of_retromae_masks_by_the_unit_of_the_options():
    examples = make_examples(200, num_texts=1, least=20)
    masking = MaskingArguments(masking_unit="word", random_share=0.2, mask_share=0.1)
    batch = collator_of("retromae", masking=masking)(examples)
    for (ids, labels), example in zip(decoder_rows(batch), examples, strict=True):
        hidden = np.array(labels) != -100
        assert hidden.any() and set(np.array(ids)[hidden].tolist()) == {MASK}
        words = example["texts"][0]["word_starts"].copy()
        words[1] = True  # Behind a special token a word begins in any case.
        changes = hidden[1:] != hidden[:-1]
        assert words[1:][changes].all(), "hidden and visible tokens meet at borders of words only"


def test_enhanced_decoding_predicts_every_ordinary_token():
    examples = make_examples(300, num_texts=1)
    batch = collator_of("retromae", enhanced_decoding=True)(examples)
    for (ids, labels), original in zip(decoder_rows(batch), role_by_role(examples), strict=True):
        assert ids == original
        assert labels == [-100, *original[1:-1], -100]
    keys = batch["decoder_keys"]
    assert keys.shape == (300,) and keys.dtype == torch.int64 and len(set(keys.tolist())) == 300
    later = collator_of("retromae", enhanced_decoding=True)(make_examples(300, num_texts=1, epoch=1))["decoder_keys"]
    assert not set(keys.tolist()) & set(later.tolist())


def test_the_vector_has_a_column_where_no_special_token_comes_first():
    ids = [FIRST_WORD + 1, FIRST_WORD + 2, FIRST_WORD + 3, EOS]
    example = {
        "texts": [{"input_ids": ids, "word_starts": [True] * 4}],
        "document": 0,
        "example_id": 0,
        "epoch": 0,
    }
    enhanced = collator_of("retromae", tokenizer=framed_tokenizer("t5"), enhanced_decoding=True)([example])
    assert enhanced["decoder_input_ids"].tolist() == [[T5_PAD, *ids]]
    assert enhanced["decoder_labels"].tolist() == [[-100, *ids[:3], -100]]
    assert enhanced["decoder_mask"].tolist() == [[1] * 5]
    masked = collator_of("retromae", tokenizer=framed_tokenizer("t5"), decoder_mask_probability=1.0)([example])
    assert masked["decoder_input_ids"].tolist() == [[T5_PAD, MASK, MASK, MASK, EOS]]
    assert masked["decoder_labels"].tolist() == [[-100, *ids[:3], -100]]
    rebuilt = collator_of("tsdae", tokenizer=framed_tokenizer("t5"))([example])
    assert rebuilt["decoder_input_ids"].tolist() == [[T5_PAD, *ids[:3]]]
    assert rebuilt["decoder_labels"].tolist() == [ids]


def test_deletion_leaves_a_subsequence_with_the_special_tokens():
    examples = make_examples(2000, num_texts=1, least=3)
    batch = collator_of("tsdae")(examples)
    texts, _ = texts_of(batch)
    deleted = total = 0
    for text, original in zip(texts, role_by_role(examples), strict=True):
        rest = iter(original)
        assert all(token in rest for token in text.ids), "in the order of the text"
        assert text.ids[0] == CLS and text.ids[-1] == SEP and len(text.ids) >= 3 - (len(original) == 2)
        # Few texts are so short that a token stays against the draws.
        if len(original) >= 20:
            deleted, total = deleted + len(original) - len(text.ids), total + len(original) - 2
    assert total > 20000 and abs(deleted / total - 0.6) < 0.02


def test_each_token_is_deleted_by_its_own_draw():
    """At any probability; and if all would go, each is as likely to stay."""
    examples = [
        {
            "texts": [{"input_ids": [CLS, 10, 11, 12, 13, SEP], "word_starts": [True] * 6}],
            "document": 0,
            "example_id": number,
            "epoch": 0,
        }
        for number in range(4000)
    ]
    left = [text.ids[1:-1] for text in texts_of(collator_of("tsdae", deletion_probability=0.5)(examples))[0]]
    counts = Counter(map(tuple, left))
    assert len(counts) == 15, "every subset but the empty one"
    for kept, count in counts.items():
        wanted = 1 / 16 + (1 / 64 if len(kept) == 1 else 0)
        assert abs(count / 4000 - wanted) < 0.018
    alone, _ = texts_of(collator_of("tsdae", deletion_probability=1.0)(examples))
    assert {len(text.ids) for text in alone} == {3}
    whole, _ = texts_of(collator_of("tsdae", deletion_probability=0.0)(examples))
    assert all(text.ids == [CLS, 10, 11, 12, 13, SEP] for text in whole)


def test_a_text_of_special_tokens_alone_stays_as_it_is():
    example = {"texts": [{"input_ids": [CLS, SEP]}], "document": 0, "example_id": 0, "epoch": 0}
    batch = collator_of("tsdae", deletion_probability=1.0)([example])
    assert batch["input_ids"].tolist() == [[CLS, SEP]]
    assert batch["decoder_labels"].tolist() == [[-100, SEP]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_decoder_of_tsdae_writes_the_untouched_text(side):
    examples = make_examples(50, num_texts=1)
    batch = collator_of("tsdae", side=side, pad_to_multiple_of=16)(examples)
    assert batch["decoder_mask"].shape[1] % 16 == 0
    for (ids, labels), original in zip(decoder_rows(batch), role_by_role(examples), strict=True):
        assert ids == [PAD, *original[:-1]]
        assert labels == [-100, *original[1:]], "the last token too, so that it learns to stop"


@pytest.mark.parametrize("side", ["right", "left"])
def test_replaced_token_detection_gets_the_untouched_anchors(side):
    examples = make_examples(20, num_texts=3)
    options = {
        "masking": MaskingArguments(mlm_probability=0.3),
        "seed": 5,
        "pad_to_multiple_of": 8,
        "target_slots": 64,
    }
    batch = collator_of(beside="rtd", side=side, **options)(examples)
    wanted = DataCollatorForReplacedTokenDetection(make_tokenizer(padding_side=side), **options)(anchors_of(examples))
    assert {name for name in batch if name.startswith("rtd_")} == {f"rtd_{name}" for name in wanted}
    assert all(torch.equal(batch[f"rtd_{name}"], values) for name, values in wanted.items())
    assert "sample_uniforms" in wanted
    assert [text.ids for text in texts_of(batch)[0]] == role_by_role(examples)
    # A deletion is not seen by it.
    detection = collator_of("tsdae", "rtd", side=side, **options)(make_examples(20, num_texts=1))
    alone = DataCollatorForReplacedTokenDetection(make_tokenizer(padding_side=side), **options)
    assert torch.equal(detection["rtd_labels"], alone(anchors_of(make_examples(20, num_texts=1)))["labels"])
