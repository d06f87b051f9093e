"""Runs of `encoder --objectives mlm clm`: one head, shares, resume, export, the next stage, what is printed and refused."""

import json
import logging

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForMaskedLM

from helpers.method_matrix import (
    build,
    isolated,
    log_of,
    relative_difference,
    tiny_data,
    tiny_documents,
    tiny_examples,
    tiny_tokenizer,
)
from hf_pretrain.cli import METHODS
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation import samples
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.visibility.lm_modes import left_to_right_inputs
from hf_pretrain.objectives.encoder import MASKED_LM, EncoderTrainingArguments
from hf_pretrain.objectives.encoder import METHOD as program
from hf_pretrain.objectives.encoder.generation import generate
from hf_pretrain.objectives.encoder.trainer import _FILL_SHIFTED_MASK, EncoderTrainer, demonstrate
from hf_pretrain.tasks.augmentation import augment
from hf_pretrain.training.parsing import parse_arguments

HYBRID = {"objectives": ["mlm", "clm"]}
BERT = {"model_type": "bert"}
# Large weights, so that what a state sees shows in it.
LARGE = {
    "config_overrides": '{"initializer_range": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'
}
HEAD = "cls.predictions"


def hybrid(output_dir, data=None, *, model_options=None, **options):
    return build(program, output_dir, data, model_options=BERT | (model_options or {}), **HYBRID | options)


def arguments(tmp_path, *objectives, **options):
    return EncoderTrainingArguments(output_dir=str(tmp_path), objectives=list(objectives), **options)


@pytest.mark.parametrize(
    ("mode", "predicts_end"),
    [("tokens", False), ("full_rows", False), ("full_sentences", False), ("doc_sentences", True)],
)
def test_rows_that_are_cut_anywhere_end_as_those_of_causal_language_models(tmp_path, mode, predicts_end):
    documents, inputs = tiny_documents(tiny_examples(40, seed=1)), {"processing_class": tiny_tokenizer()}
    data_args = DataArguments(block_mode=mode, block_size=24)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    args = arguments(tmp_path, "mlm", "clm", bf16=False, report_to="none")
    trainer = EncoderTrainer(
        ModelArguments(model_type="bert", **sizes), args, train_dataset=documents, data_args=data_args, **inputs
    )
    assert trainer.data_collator.predicts_end is predicts_end
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(16)])
    is_end = batch["input_ids"][batch["is_causal"]] == tiny_tokenizer().sep_token_id
    assert (
        batch["is_causal"].any() and bool((batch["labels"][batch["is_causal"]][:, -1:] != -100).any()) is predicts_end
    )
    assert is_end.any()


# One head


def test_both_losses_reach_the_same_head_and_their_gradients_add_up(tmp_path):
    found = {}
    for name, weights in {"both": (1, 1), "mlm": (1, 0), "clm": (0, 1)}.items():
        options = {"mlm_weight": weights[0], "clm_weight": weights[1], "learning_rate": 0.0}
        trainer = hybrid(tmp_path / name, per_device_train_batch_size=16, **options)
        trainer.train()
        (found[name],) = trainer.recorder.gradients
    head = {key for key in found["both"] if HEAD in key}
    assert len(head) >= 4
    for key in head:
        assert found["mlm"][key].abs().max() > 0 and found["clm"][key].abs().max() > 0, key
    summed = {key: found["mlm"][key] + found["clm"][key] for key in found["both"]}
    assert relative_difference(summed, found["both"]) < 1e-5
    assert relative_difference(found["mlm"], found["clm"]) > 0.1


def test_each_set_of_objectives_trains_the_same_parameters(tmp_path):
    models = [
        build(program, tmp_path / "-".join(names), model_options=BERT, objectives=names).model
        for names in (["mlm"], ["clm"], ["mlm", "clm"])
    ]
    for other in models[1:]:
        assert other.state_dict().keys() == models[0].state_dict().keys()
        for key, value in models[0].state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
        trainable = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (models[0], other)]
        assert trainable[0] == trainable[1]


def test_next_tokens_alone_are_trained_and_masked_ones_may_follow(tmp_path):
    first = build(
        program, tmp_path / "first", model_options=BERT, objectives=["clm"], max_steps=30, learning_rate=3e-3
    )
    assert first.args.loss_names == ["clm"] and first.args.heads == ["mlm"]
    before = first.evaluate()
    first.train()
    rows = [row for row in log_of(first) if "clm_loss" in row]
    assert rows and not any("mlm_loss" in row for row in rows)
    after = first.evaluate()
    assert after["eval_clm_loss"] < before["eval_clm_loss"] - 0.5
    assert after["eval_loss"] == pytest.approx(after["eval_clm_loss"])
    first.save_model()
    second = build(
        program,
        tmp_path / "second",
        model_options={"model_name_or_path": str(tmp_path / "first"), "config_overrides": None},
        objectives=["mlm"],
        prediction="shifted",
    )
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    assert second.model.config.shifted and not second.model.config.has_clm
    assert 0 < second.evaluate()["eval_mlm_loss"] < 10


# Examples


def test_kinds_are_mixed_in_their_shares_within_a_batch_and_have_the_same_types(tmp_path):
    trainer = hybrid(tmp_path, objective_shares="mlm:2/3, clm:1/3")
    marks = [trainer.train_dataset[i]["is_causal"] for i in range(len(trainer.train_dataset))]
    assert abs(sum(marks) - len(marks) / 3) <= 1
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(24)])
    assert set(batch["is_causal"].tolist()) == {True, False}
    assert "token_type_ids" not in batch and "lm_modes" not in batch
    assert trainer.model.model.config.type_vocab_size == 2, "no types for modes"
    held_out = trainer.eval_dataset
    kinds = [held_out[i]["is_causal"] for i in range(len(held_out))]
    assert kinds.count(True) == kinds.count(False) == 13, "each held-out example once in each way"


def test_pairs_may_be_among_them(tmp_path):
    trainer = hybrid(tmp_path, objectives=["mlm", "sop", "clm"], max_steps=2)
    trainer.train()
    evaluated = trainer.evaluate()
    assert all(0 < evaluated[f"eval_{name}_loss"] < 10 for name in ("mlm", "clm", "pair"))
    assert set(trainer.train_dataset.parts) == {"sop", "clm"}


# Training


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    options = {"max_steps": 2, "learning_rate": 0.0}
    whole = hybrid(tmp_path / "whole", per_device_train_batch_size=8, **options)
    cut = hybrid(tmp_path / "cut", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    whole.train()
    cut.train()
    for ours, theirs in zip(whole.recorder.gradients, cut.recorder.gradients, strict=True):
        assert relative_difference(ours, theirs) < 1e-4
    assert all({"mlm_loss", "clm_loss"} <= row.keys() for row in log_of(whole) if "learning_rate" in row)


def test_a_run_resumes_bit_equal(tmp_path):
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-3}
    straight = hybrid(tmp_path / "straight", **options)
    straight.train()
    resumed = hybrid(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-5"))
    assert log_of(resumed) == log_of(straight)
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize(("prediction", "steps"), [("same", 400), ("shifted", 200)])
def test_both_are_learned(prediction, steps, tmp_path):
    """Words count to three again and again: either neighbour tells a masked one, and two before it the next one."""
    trainer = hybrid(
        tmp_path,
        tiny_data(train=400, text="counts"),
        prediction=prediction,
        max_steps=steps,
        learning_rate=3e-3,
        per_device_train_batch_size=16,
    )
    trainer.train()
    evaluated = trainer.evaluate()
    assert evaluated["eval_mlm_accuracy"] > 0.8 and evaluated["eval_clm_accuracy"] > 0.75
    assert evaluated["eval_mlm_loss"] < 0.7 and evaluated["eval_clm_loss"] < 0.7


# What is left behind


def test_the_export_is_stock_and_says_how_it_predicts(tmp_path, capsys):
    trainer = hybrid(tmp_path, max_steps=3, learning_rate=1e-3)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.shifted_prediction is True
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(ids).logits, trainer.model.model.eval()(ids).logits, atol=1e-6, rtol=0
        )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for part in (
        "clm_loss",
        "clm_perplexity",
        "x_{<i}",
        "state of the token before it",
        "Charpentier",
        "position - 1",
    ):
        assert part in card, part
    assert "pipeline_tag: feature-extraction" in card, "the Hub would fill in masks at the wrong position"


def test_the_code_of_the_card_fills_in_the_mask(tmp_path):
    trainer = hybrid(tmp_path)
    trainer.save_model()
    code = _FILL_SHIFTED_MASK.replace("{repo}", str(tmp_path))
    names = {}
    exec(code.replace("{masked}", 'f"w1 {fill_mask.tokenizer.mask_token} w2"'), names)  # noqa: S102 (it is ours)
    tokenizer, model = tiny_tokenizer(), trainer.model.model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("w1 [MASK] w2")["input_ids"]])).logits[0]
    best = tokenizer.convert_ids_to_tokens(logits[1].topk(5).indices.tolist())
    assert names["predictions"] == best != tokenizer.convert_ids_to_tokens(logits[2].topk(5).indices.tolist())


def test_the_samples_of_a_run_read_the_states_that_predict(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(samples, "print_guesses", lambda data, guess, **options: seen.append((guess, options)))
    ids = [2, 7, 9, 11, 3]
    masked = torch.tensor([[2, 7, 4, 11, 3]])
    for number, (objectives, shift) in enumerate(((["mlm", "clm"], 1), (["mlm"], 0), (["clm"], 1))):
        trainer = build(program, tmp_path / str(number), model_options=BERT | LARGE, objectives=objectives)
        model, data = trainer.model.model.eval(), tiny_data()
        seen.clear()
        demonstrate(trainer, data)
        assert len(seen) == len(objectives)
        with torch.no_grad():
            if "mlm" in objectives:
                guess = seen.pop(0)[0]
                assert torch.equal(guess(list(ids), 2), model(masked).logits[0, 2 - shift])
            if "clm" in objectives:
                guess, options = seen.pop(0)
                assert options["reads_all"] is False
                inputs = left_to_right_inputs(model, input_ids=torch.tensor([[2, 7, 9, 11]]))
                found = guess([7, 9, 11, 8], 3)
                assert torch.equal(found, model(**inputs).logits[0, -1])
                assert not torch.allclose(found, model(torch.tensor([[2, 7, 9, 11]])).logits[0, -1], atol=1e-3)


def test_a_run_that_predicts_in_another_way_than_its_checkpoint_says_so(tmp_path, caplog):
    first = hybrid(tmp_path / "first")
    first.save_model()
    again = {"model_name_or_path": str(tmp_path / "first"), "config_overrides": None}
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            same = build(MASKED_LM, tmp_path / "mlm", model_options=again)
        assert "run `hf-pretrain encoder --prediction shifted`" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build(program, tmp_path / "on", model_options=again, objectives=["mlm"], prediction="shifted")
        assert "prediction shifted" not in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()
    same.save_model()
    assert "shifted_prediction" not in json.loads((tmp_path / "mlm" / "config.json").read_text())


@pytest.mark.parametrize("use", ["teacher", "augmentation", "generate"])
def test_what_reads_the_mask_itself_refuses_a_shifted_model(use, tmp_path):
    trainer = hybrid(tmp_path / "first")
    trainer.save_model()
    model, tokenizer = trainer.model.model, tiny_tokenizer()
    with pytest.raises(InputError, match="predicts a masked token at the position before it, but is read at the mask"):
        if use == "teacher":
            options = {"teacher_name_or_path": str(tmp_path / "first"), "config_overrides": None}
            build(METHODS["distil"].load("distil"), tmp_path, model_options=options)
        elif use == "augmentation":
            data = Dataset.from_dict({"text": ["w1 w2"]})
            augment(data, model=model, tokenizer=tokenizer, text_columns=["text"])
        else:
            generate(model, tokenizer, ["w1 w2"])


# Options


def test_where_masked_tokens_are_predicted_by_default(tmp_path):
    def shifted(*objectives, **options):
        return arguments(tmp_path, *objectives, **options).shifted

    assert shifted("mlm", "clm") and shifted("clm") and not shifted("mlm") and not shifted("mlm", "sop")
    assert not shifted("mlm", "clm", prediction="same") and shifted("mlm", prediction="shifted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ["clm", "sop"]}, "leaves out mlm"),
        ({"objectives": ["mlm", "clm", "left_to_right"]}, "left_to_right tells its mode by token types"),
        ({"objectives": ["mlm", "clm", "word_order"]}, "which clm hides"),
        ({"objectives": ["mlm", "clm", "span_boundary"], "masking_unit": "span"}, "which clm hides"),
        ({"objectives": ["mlm", "clm", "tlm"]}, "mixes kinds within a batch"),
        ({"objectives": ["clm"], "prediction": "same"}, "is about masked tokens"),
        ({"objectives": ["mlm"], "prediction": "next"}, "prediction='next' must be one of"),
        ({"objectives": ["mlm", "word_order"], "prediction": "shifted"}, "does not go with word_order"),
        ({"objectives": ["mlm", "right_to_left"], "prediction": "shifted"}, "state of the mask itself"),
        ({"objectives": ["mlm", "clm"], "objective_shares": "mlm:1"}, "gives clm no share"),
        ({"objectives": ["mlm", "clm"], "clm_weight": -1.0}, "clm_weight=-1.0 must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        EncoderTrainingArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("objectives", "option"),
    [
        (["clm"], ["--mlm_probability", "0.3"]),
        (["clm"], ["--mlm_weight", "2"]),
        (["clm"], ["--masking_unit", "word"]),
        (["mlm"], ["--clm_weight", "2"]),
    ],
)
def test_an_option_without_effect_is_refused(objectives, option, tmp_path):
    argv = ["--objectives", *objectives, "--output_dir", str(tmp_path), "--train_file", "x", *option]
    with pytest.raises(InputError, match=f"{option[0][2:]}=.* has no effect"):
        parse_arguments(program.arguments, argv, prog="test", description="")


def test_isolated_documents_and_models_that_cannot_are_refused(tmp_path):
    with pytest.raises(InputError, match="isolated_documents"):
        hybrid(tmp_path, isolated(tiny_data()))
    with pytest.raises(InputError, match="ConvBertForMaskedLM .*cannot read text in one direction"):
        hybrid(tmp_path, model_options={"model_type": "convbert"})


def test_documents_in_a_row_keep_their_first_tokens_where_the_one_before_would_predict_them(tmp_path):
    hidden = {}
    for prediction in ("same", "shifted"):
        options = {"objectives": ["mlm"], "prediction": prediction}
        trainer = build(program, tmp_path, isolated(tiny_data()), model_options=BERT, **options)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
        is_first = batch["document_ids"].diff(dim=1) > 0
        hidden[prediction] = int((is_first & (batch["labels"][:, 1:] != -100)).sum())
        assert trainer.model(**batch).losses["mlm"].sum.isfinite().all()
    assert hidden["shifted"] == 0 < hidden["same"]
