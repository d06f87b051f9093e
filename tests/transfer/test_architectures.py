"""Architectures on top of an encoder in a fine-tuning: strategies, resumes, exports, and pairs of texts."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from helpers.strategy_runs import CONFIGS, DEFAULTS, WITHOUT_DROPOUT, classifier, collate, fine_tuner, moved, weights
from hf_pretrain import (
    DataCollatorForTextPairs,
    EncoderForSequenceClassification,
    encode_text_pairs,
    layerwise_parameter_groups,
    reinitialise_layers,
    strategy_report,
)

OPTIONS = {"bilstm": {"lstm_size": 6}, "cnn": {"num_filters": 5}}


def model_of(architecture="bilstm", *, backbone="bert", **settings):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(
        type(CONFIGS[backbone]).from_dict({**CONFIGS[backbone].to_dict(), **WITHOUT_DROPOUT})
    )
    settings = {
        "num_labels": 3,
        "architecture_options": OPTIONS.get(architecture),
        "classifier_dropout": 0.0,
    } | settings
    return EncoderForSequenceClassification.from_encoder(encoder, architecture=architecture, **settings).train()


def test_each_layer_of_the_encoder_has_its_rate_and_the_architecture_the_full_one():
    model = model_of("scalar_mix")
    groups = layerwise_parameter_groups(model, learning_rate=1.0, decay=0.5)
    rates = {weight: group["lr"] for group in groups for weight in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        layer = name.removeprefix("encoder.encoder.layer.")
        depth = 0 if "embeddings." in name else int(layer[0]) + 1 if layer != name else 4
        assert rates[weight] == 0.5 ** (4 - depth), name


@pytest.mark.parametrize("backbone", ["modernbert", "distilbert", "electra"])
def test_the_layers_are_found_in_other_encoders(backbone, tmp_path):
    rows = strategy_report(model_of(backbone=backbone), fine_tuner(tmp_path, strategy="gradual").args)
    assert {"layer 1", "layer 2", "layer 3", "embeddings", "head"} <= {row.part for row in rows}


def test_layers_that_begin_anew_are_drawn_as_the_encoder_draws_them():
    model, alone = model_of(), model_of().encoder
    before = weights(model)
    reinitialise_layers(model, 1, seed=5)
    reinitialise_layers(alone, 1, seed=5)
    assert not moved(weights(model.encoder), weights(alone))
    assert {name.rpartition("layer.")[2][0] for name in moved(before, weights(model))} == {"2"}


@pytest.mark.parametrize(
    ("strategy", "architecture", "parts"),
    [
        ("layerwise_decay", "bilstm", {"encoder", "architecture"}),
        ("frozen", "cnn", {"architecture"}),
        ("scalar_mix", "scalar_mix", {"scalar_mix", "architecture"}),
    ],
)
def test_strategies_move_what_they_should(strategy, architecture, parts, tmp_path):
    trainer = fine_tuner(tmp_path, model_of(architecture), strategy=strategy, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    found = moved(before, weights(trainer.model))
    assert {name.split(".")[0] for name in found} == parts
    if "encoder" not in parts:
        wanted = {name for name in before if name.split(".")[0] in parts}
        assert found == wanted


def test_a_resumed_training_is_equal_to_the_bit_in_every_stage(tmp_path):
    make = partial(fine_tuner, strategy="gradual", num_train_epochs=4, save_strategy="epoch")
    whole = make(tmp_path / "whole", model_of())
    whole.train()
    for step in (3, 6):
        again = make(tmp_path / f"again{step}", model_of("bilstm"))
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert not moved(weights(whole.model), weights(again.model))


def test_adapters_are_merged_into_the_encoder_that_is_exported(tmp_path):
    trainer = fine_tuner(tmp_path, model_of("cnn"), strategy="lora", max_steps=3)
    before = weights(trainer.model)
    trainer.train()
    names = moved(before, weights(trainer.model))
    assert any("lora_" in name for name in names) and any("architecture" in name for name in names)
    trainer.save_model(str(tmp_path / "out"))
    opened, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(opened) is EncoderForSequenceClassification and not any(info.values())
    batch = collate([{"input_ids": [3, 4, 5, 6], "labels": 0}])
    torch.testing.assert_close(opened(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-5, rtol=0)


def test_the_mean_of_last_states_is_what_the_architecture_says(tmp_path):
    """The stock Trainer trains it too."""
    args = TrainingArguments(**{"output_dir": str(tmp_path), **DEFAULTS, "max_steps": 30})
    rows = Dataset.from_dict(
        {"input_ids": [[3 + i % 3, 9, 9 + i % 5] for i in range(24)], "labels": [i % 3 for i in range(24)]}
    )
    trainer = Trainer(model_of("attention_pooling"), args, train_dataset=rows, data_collator=collate)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before / 2


# Pairs of texts.


def pairs(count=48):
    words = [f"w{i}" for i in range(6)]
    first = [f"{words[i % 6]} {words[(i // 6) % 6]}" for i in range(count)]
    second = [text if i % 2 else f"{words[(i + 1) % 6]} {words[(i + 3) % 6]}" for i, text in enumerate(first)]
    return Dataset.from_dict({"a": first, "b": second, "same": [i % 2 for i in range(count)]})


def test_two_texts_are_tokenized_and_padded_apart(tokenizer):
    config = classifier(num_labels=2).config
    encoded = encode_text_pairs(pairs(), tokenizer, columns=("a", "b"), labels="same", config=config, max_length=32)
    for row, source in zip(encoded, pairs(), strict=True):
        assert row["input_ids"] == tokenizer(source["a"])["input_ids"]
        assert row["pair_input_ids"] == tokenizer(source["b"])["input_ids"]
        assert row["labels"] == source["same"]
    rows = [encoded[i] for i in range(4)]
    batch = DataCollatorForTextPairs(tokenizer)(rows)
    for prefix in ("", "pair_"):
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        assert ids.shape[1] == max(len(row[f"{prefix}input_ids"]) for row in rows)
        for number, row in enumerate(rows):
            assert ids[number][mask[number].bool()].tolist() == row[f"{prefix}input_ids"]
    with pytest.raises(ValueError, match="name two columns"):
        encode_text_pairs(pairs(), tokenizer, columns=("a",), labels=None, config=config, max_length=32)
    with pytest.raises(ValueError, match="make them with encode_text_pairs"):
        DataCollatorForTextPairs(tokenizer)([{"input_ids": [1], "labels": 0}])


def test_a_pair_encoder_is_trained_from_texts(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = type(CONFIGS["bert"]).from_dict(
        {**CONFIGS["bert"].to_dict(), **WITHOUT_DROPOUT, "vocab_size": len(tokenizer)}
    )
    settings = {"num_labels": 2, "classifier_dropout": 0.0, "architecture": "pair_encoder"}
    model = EncoderForSequenceClassification.from_encoder(AutoModel.from_config(config), **settings)
    encoded = encode_text_pairs(
        pairs(), tokenizer, columns=("a", "b"), labels="same", config=model.config, max_length=32
    )
    trainer = fine_tuner(tmp_path, model, train=encoded, strategy="full", max_steps=60)
    trainer.data_collator = DataCollatorForTextPairs(tokenizer)
    trainer.train()
    found = trainer.predict(encoded)
    assert (found.predictions.argmax(1) == found.label_ids).mean() > 0.9
