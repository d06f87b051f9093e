"""Adapters as a strategy: what moves, what is saved, and which layers of an architecture are adapted."""

import copy
import json

import peft
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    GPT2Config,
)

from helpers.strategy_runs import CONFIGS, classifier, collate, examples, fine_tuner, moved, weights
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.observing.profile import peak_of_tensors
from hf_pretrain.transfer.adapters import linear_names, merge_for_export
from hf_pretrain.transfer.fine_tuning import FineTuningTrainer
from hf_pretrain.transfer.strategies import strategy_report

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

BATCH = {name: tensor for name, tensor in collate(list(examples())).items() if name != "labels"}
METHODS = {
    "lora": {"strategy": "lora"},
    "dora": {"strategy": "dora"},
    "ia3": {"strategy": "peft", "peft_config": '{"peft_type": "IA3"}'},
    "loha": {"strategy": "peft", "peft_config": {"peft_type": "LOHA", "r": 2}},
    "norms": {"strategy": "peft", "peft_config": {"peft_type": "LN_TUNING", "target_modules": ["LayerNorm"]}},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_and_the_head_move_and_the_model_below_does_not(tmp_path, method):
    model = classifier()
    given, start = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    trainer = fine_tuner(tmp_path, model, num_train_epochs=2, **METHODS[method])
    assert torch.allclose(logits(trainer.model), start, atol=1e-5)
    before = weights(trainer.model)
    trainer.train()
    names = moved(before, weights(trainer.model))
    kinds = ("lora_", "ia3_", "hada_", "ln_tuning_layers")
    assert all(any(kind in name for kind in kinds) or "modules_to_save.default" in name for name in names)
    assert {name.split(".modules_to_save")[0].split("model.", 2)[2] for name in names if "modules_to_save.d" in name} == {
        "bert.pooler", "classifier",
    }  # fmt: skip
    assert any(any(kind in name for kind in kinds) for name in names)
    # The root is a stock model with the same predictions.
    trained = logits(trainer.model)
    trainer.save_model()
    opened, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(opened), trained, rtol=0, atol=1e-5)
    assert not torch.allclose(trained, start, atol=1e-3)
    # What was not adapted is that of the model below, to the bit.
    table = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(opened.state_dict()[table], given[table])
    assert not (tmp_path / "adapter_config.json").exists()


def test_the_adapter_alone(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = fine_tuner(tmp_path, model, strategy="lora", export="adapter")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    opened = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    torch.testing.assert_close(logits(opened), logits(trainer.model))


def test_a_merged_model_is_a_copy_and_training_goes_on(tmp_path):
    trainer = fine_tuner(tmp_path, strategy="lora")
    trainer.train()
    before = weights(trainer.model)
    merged = merge_for_export(trainer.model)
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=0, atol=1e-5)
    assert not moved(before, weights(trainer.model)) and not any("lora" in name for name in merged.state_dict())
    trainer.train()
    assert moved(before, weights(trainer.model))


def test_a_checkpoint_has_the_adapter_and_the_end_a_stock_model(tmp_path):
    trainer = fine_tuner(tmp_path, strategy="lora", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_layers_of_an_encoder_are_adapted(tmp_path, name):
    trainer = fine_tuner(tmp_path, classifier(name), strategy="lora", lora_rank=2)
    inner = trainer.model.get_base_model()
    adapted = {key for key, module in inner.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert adapted == set(linear_names(classifier(name)))
    linear = {key for key, module in classifier(name).base_model.named_modules() if isinstance(module, nn.Linear)}
    outside = {"electra": {"embeddings_project"}, "albert": {"encoder.embedding_hidden_mapping_in", "pooler"}}
    outside["bert"] = {"pooler.dense"}
    prefix = inner.base_model_prefix
    assert {f"{prefix}.{key}" for key in linear - outside.get(name, set())} == adapted
    before, start = weights(trainer.model), logits(trainer.model)
    trainer.train()
    names = moved(before, weights(trainer.model))
    assert names and all("lora_" in each or "modules_to_save.default" in each for each in names)
    assert any("modules_to_save.default" in each for each in names)
    torch.testing.assert_close(logits(merge_for_export(trainer.model)), logits(trainer.model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(trainer.model), start, atol=1e-4)


def test_other_kinds_of_models():
    gpt = AutoModelForSequenceClassification.from_config(
        GPT2Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    assert linear_names(gpt) == [
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]  # fmt: skip
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    bart = AutoModelForSequenceClassification.from_config(
        BartConfig(vocab_size=40, d_model=8, encoder_layers=1, decoder_layers=1, **heads)
    )
    names = linear_names(bart)
    assert any(".encoder." in name for name in names) and any("encoder_attn" in name for name in names)
    assert not any(name.startswith("classification_head") for name in names)


def test_a_head_for_tokens(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(CONFIGS["bert"])
    trainer = FineTuningTrainer(model, fine_tuner(tmp_path, strategy="lora").args)
    report = strategy_report(trainer.model, trainer.args)
    assert [(row.part, row.parameters) for row in report if row.part == "head" and row.begins == "at once"] == [
        ("head", 27)
    ]
    assert type(trainer.model).__name__ == "PeftModelForTokenClassification"


@pytest.mark.parametrize(
    "auto_class",
    [
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
        AutoModelForMultipleChoice,
    ],
)
def test_every_input_reaches_the_model_below(tmp_path, auto_class):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["bert"])
    config.num_labels = 2
    model = auto_class.from_config(config).eval()
    shape = (2, 3, 6) if auto_class is AutoModelForMultipleChoice else (2, 6)
    ids = torch.randint(5, 40, shape)
    types, positions = (torch.arange(6) > 2).long().expand(shape), torch.arange(6).flip(0).expand(shape)
    inputs = {"input_ids": ids, "token_type_ids": types, "position_ids": positions}
    with torch.no_grad():
        expected = [value for value in model(**inputs).values()]
        without = next(iter(model(input_ids=ids).values()))
        # The update of a fresh adapter is zero.
        adapted = FineTuningTrainer(model, fine_tuner(tmp_path, strategy="lora").args).model.eval()
        found = [value for value in adapted(**inputs).values()]
    assert not torch.allclose(expected[0], without)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_rates_of_an_adapter_follow_the_depth(tmp_path):
    trainer = fine_tuner(tmp_path, strategy="lora", lora_rank=4, layerwise_learning_rate_decay=0.5)
    report = [row for row in strategy_report(trainer.model, trainer.args) if row.begins == "at once"]
    assert [(row.part, row.learning_rate) for row in report] == [
        ("head", 1e-2), ("layer 3", 5e-3), ("layer 2", 2.5e-3), ("layer 1", 1.25e-3),
    ]  # fmt: skip
    # Six linear layers of 8 x 8 with two matrices of rank 4 each.
    assert report[1].parameters == 6 * 2 * 8 * 4


def test_the_first_weights_follow_the_seed(tmp_path):
    def first(**options):
        torch.manual_seed(torch.seed() % 1000)
        return weights(fine_tuner(tmp_path, strategy="lora", **options).model)

    assert not moved(first(), first()) and moved(first(), first(seed=6))


def test_options_reach_the_adapter(tmp_path):
    options = {"lora_rank": 2, "lora_alpha": 6, "lora_dropout": 0.2, "lora_target_modules": ["query", "value"]}
    config = fine_tuner(tmp_path, strategy="dora", **options).model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (2, 6, 0.2, True)
    assert set(config.target_modules) == {"query", "value"}
    plain = fine_tuner(tmp_path, strategy="lora").model.peft_config["default"]
    assert (plain.r, plain.lora_alpha, plain.lora_dropout, plain.use_dora) == (8, 16, 0, False)


def test_a_configuration_from_a_file(tmp_path):
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": "LORA", "r": 3}))
    trainer = fine_tuner(tmp_path, strategy="peft", peft_config=str(tmp_path / "peft.json"))
    assert trainer.model.peft_config["default"].r == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORRA"}, "peft_type='LORRA' is no method of peft: did you mean 'LORA'"),
        ({"r": 2}, "peft_type=None is no method"),
        ({"peft_type": "LORA", "rank": 2}, "LORA refuses the options.*rank"),
        ({"peft_type": "LORA", "target_modules": ["qeury"]}, "peft refuses the options: No modules were targeted"),
        ({"peft_type": "LORA", "modules_to_save": ["classifier"]}, r"does not train the head \(bert.pooler\)"),
        ({"peft_type": "ADALORA"}, "needs calls in training"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "export='merged'"),
        ("[1]", "peft_config='.1.' is no JSON"),
        ("none.json", "is no JSON and no file"),
        ('{"peft_type": ', "is no JSON"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        fine_tuner(tmp_path, strategy="peft", peft_config=config)


def test_models_that_are_refused(tmp_path):
    adapted = fine_tuner(tmp_path, strategy="lora").model
    with pytest.raises(InputError, match="adapters already"):
        fine_tuner(tmp_path, adapted, strategy="lora")
    with pytest.raises(InputError, match="no adapters to merge"):
        merge_for_export(classifier())
    with pytest.raises(InputError, match="no adapters yet"):
        strategy_report(classifier(), fine_tuner(tmp_path, strategy="lora").args)


def test_a_model_that_its_owner_adapted_is_tuned_with_the_rates_of_its_layers(tmp_path):
    model = peft.get_peft_model(
        classifier(), peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    )
    trainer = fine_tuner(tmp_path, model, strategy="layerwise_decay", layerwise_learning_rate_decay=0.5)
    before = weights(model)
    trainer.train()
    assert {group["name"]: round(group["initial_lr"], 6) for group in trainer.optimizer.param_groups} == {
        "head": 0.01, "layer 3": 0.005, "layer 2": 0.0025, "layer 1": 0.00125,
    }  # fmt: skip
    names = moved(before, weights(model))
    assert all("lora_" in name or "modules_to_save.default" in name for name in names) and len(names) > 6


WIDE = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 40}


ACTIVATION = {
    "bert": "hidden_act",
    "distilbert": "activation",
    "modernbert": "hidden_activation",
    "roberta": "hidden_act",
}


@pytest.mark.parametrize("name", ACTIVATION)
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_computing_cheap_results_twice_changes_no_bit(name, activation, tmp_path):
    model = classifier(name, **{ACTIVATION[name]: activation})
    batch = collate(list(examples()))
    trainer = fine_tuner(tmp_path, model, strategy="lora", num_train_epochs=1)
    with torch.no_grad():  # B begins at zero, and A would have no gradient
        for key, parameter in trainer.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = []
    for recomputes in (False, True):
        trainer._recomputes = lambda value=recomputes: value
        for _ in range(2):  # a second pass has the memory of the first one
            trainer.model.zero_grad()
            torch.manual_seed(2)
            loss = trainer.compute_loss(trainer.model.train(), dict(batch))
            loss.backward()
        gradients = {key: p.grad.clone() for key, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients, torch.rand(1)))
    (loss, gradients, draw), (other, others, next_draw) = found
    assert torch.equal(loss, other) and torch.equal(draw, next_draw)
    assert gradients.keys() == others.keys() and all(torch.equal(gradients[key], others[key]) for key in gradients)
    assert sum(bool(value.any()) for value in gradients.values()) > 10


def test_adapters_hold_less_than_seven_tenths_of_full_fine_tuning(tmp_path):
    rows = Dataset.from_dict(
        {"input_ids": [[3 + (i + j) % 37 for j in range(128)] for i in range(8)], "labels": [0] * 8}
    )
    batch, peaks = collate(list(rows)), {}
    for strategy in ("full", "lora"):
        model = classifier("bert", **WIDE, num_attention_heads=4, max_position_embeddings=128)
        trainer = fine_tuner(tmp_path, model, strategy=strategy, train=rows)
        trainer.model.train()
        peaks[strategy] = peak_of_tensors(
            lambda trainer=trainer: trainer.compute_loss(trainer.model, batch).backward()
        )
        # A model that recomputes whole layers has no use for it.
        assert trainer._recomputes() == (strategy == "lora")
        trainer.plan.inner.activation_checkpointing_enable()
        assert not trainer._recomputes()
    assert peaks["lora"] < 0.7 * peaks["full"], peaks


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_results_of_activations_are_not_kept(activation, tmp_path):
    sizes = WIDE | {"num_attention_heads": 4, "max_position_embeddings": 128, "attention_probs_dropout_prob": 0.0}
    rows = Dataset.from_dict(
        {"input_ids": [[3 + (i + j) % 37 for j in range(128)] for i in range(8)], "labels": [0] * 8}
    )
    batch, peaks = collate(list(rows)), []
    trainer = fine_tuner(tmp_path, classifier("bert", **sizes, hidden_act=activation), strategy="lora", train=rows)
    trainer.model.train()
    for recomputes in (False, True):
        trainer._recomputes = lambda value=recomputes: value
        trainer.model.zero_grad()
        peaks.append(peak_of_tensors(lambda: trainer.compute_loss(trainer.model, batch).backward()))
    # Of two layers, one result is made again while the other's backward has not begun.
    one = 8 * 128 * WIDE["intermediate_size"] * 4
    assert peaks[0] - peaks[1] >= one, (peaks, one)
