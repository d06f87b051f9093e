"""Layer-wise learning rates: the powers of the paper and of the official code, on any stock architecture."""

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    FunnelConfig,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    XLMConfig,
    XLNetConfig,
)

from hf_pretrain.errors import InputError
from hf_pretrain.transfer.fine_tuning import layerwise_parameter_groups

SMALL = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": 40, "dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 8, "pad_token_id": 0}
XLNET = {"vocab_size": 40, "d_model": 8, "n_layer": 3, "n_head": 2, "d_inner": 8}
CONFIGS = {
    "bert": BertConfig(**SMALL),
    "electra": ElectraConfig(**SMALL, embedding_size=4),
    "roberta": RobertaConfig(**SMALL),
    "distilbert": DistilBertConfig(**DISTIL),
    "deberta": DebertaV2Config(
        **SMALL, relative_attention=True, norm_rel_ebd="layer_norm", pos_att_type=["p2c", "c2p"], conv_kernel_size=3
    ),
    "modernbert": ModernBertConfig(**SMALL),
    "mpnet": MPNetConfig(**SMALL),
    "xlnet": XLNetConfig(**XLNET),
    "gpt2": GPT2Config(vocab_size=40, n_embd=8, n_layer=3, n_head=2),
}
# A layer's share of a name, what is below the layers and what is behind them.
PLACES = {
    "bert": (".encoder.layer.", [".embeddings."], [".pooler.", "classifier."]),
    "electra": (".encoder.layer.", [".embeddings.", "embeddings_project"], ["classifier."]),
    "roberta": (".encoder.layer.", [".embeddings."], ["classifier."]),
    "distilbert": (".transformer.layer.", [".embeddings."], ["classifier."]),
    "deberta": (
        ".encoder.layer.",
        [".embeddings.", "rel_embeddings", ".encoder.LayerNorm", ".encoder.conv"],
        ["pooler.", "classifier."],
    ),
    "modernbert": ("model.layers.", [".embeddings."], ["final_norm", "head.", "classifier."]),
    "mpnet": (".encoder.layer.", [".embeddings.", "relative_attention_bias"], ["classifier."]),
    "xlnet": ("transformer.layer.", ["mask_emb", "word_embedding"], ["sequence_summary", "logits_proj"]),
    "gpt2": ("transformer.h.", [".wte.", ".wpe."], [".ln_f.", "score."]),
}


def classifier(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def factors(model, **options):
    """Name of each trainable parameter -> its share of the learning rate; fails if one has not exactly one group."""
    groups = layerwise_parameter_groups(model, learning_rate=2.0, **options)
    grouped = [(id(p), group["lr"] / 2.0) for group in groups for p in group["params"]]
    assert sorted(key for key, _ in grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_id = dict(grouped)
    return {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("mode", "top", "embeddings"), [("paper", 0.8, 0.8**13), ("official", 0.64, 0.8**14)], ids=["paper", "official"]
)
def test_twelve_layers(mode, top, embeddings):
    config = ElectraConfig(**{**SMALL, "num_hidden_layers": 12}, embedding_size=4)
    found = factors(classifier(config), decay=0.8, mode=mode)
    layers = [found[f"electra.encoder.layer.{i}.output.dense.weight"] for i in range(12)]
    assert layers[-1] == pytest.approx(top)
    assert layers[:-1] == pytest.approx([0.8 * rate for rate in layers[1:]])
    for name in ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias", "embeddings_project.weight"):
        assert found[f"electra.{name}"] == pytest.approx(embeddings)
    assert found["classifier.dense.weight"] == found["classifier.out_proj.bias"] == 1
    assert round(embeddings, 3) == {"paper": 0.055, "official": 0.044}[mode]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name):
    layers, below, behind = PLACES[name]
    found = factors(classifier(CONFIGS[name]), decay=0.5)
    expected = {}
    for parameter in found:
        if layers in parameter:
            expected[parameter] = 0.5 ** (3 - int(parameter.split(layers)[1].split(".")[0]))
        elif any(part in parameter for part in below):
            expected[parameter] = 0.5**4
        else:
            assert any(part in parameter for part in behind), parameter
            expected[parameter] = 1.0
    assert found == expected
    assert set(found.values()) == {1.0, 0.5, 0.25, 0.125, 0.0625}


@pytest.mark.parametrize(
    "build", [AutoModelForTokenClassification.from_config, AutoModelForMaskedLM.from_config], ids=["tokens", "masked"]
)
@pytest.mark.parametrize("name", ["bert", "electra", "modernbert", "deberta"])
def test_other_heads(build, name):
    found = factors(build(CONFIGS[name]), decay=0.5)
    assert set(found.values()) == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_a_tied_output_matrix_goes_with_the_embeddings():
    model = AutoModelForMaskedLM.from_config(CONFIGS["bert"])
    words = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is words
    groups = layerwise_parameter_groups(model, learning_rate=1.0, decay=0.5)
    assert [group["lr"] for group in groups for p in group["params"] if p is words] == [0.5**4]


def test_a_weight_that_stands_in_two_places_goes_with_the_lower():
    model = classifier(CONFIGS["bert"])
    model.bert.pooler.dense.weight = model.bert.encoder.layer[1].attention.output.dense.weight
    found = factors(model, decay=0.5)
    assert found["bert.encoder.layer.1.attention.output.dense.weight"] == 0.25
    assert found["bert.pooler.dense.bias"] == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_and_biases_are_not_decayed(name):
    model = classifier(CONFIGS[name])
    groups = layerwise_parameter_groups(model, learning_rate=1.0, decay=0.5, weight_decay=0.01)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for parameter_name, parameter in model.named_parameters():
        is_exempt = id(parameter) in norms or parameter_name.endswith("bias")
        assert decays[id(parameter)] == (0.0 if is_exempt else 0.01), parameter_name


def test_what_is_frozen_is_in_no_group():
    model = classifier(CONFIGS["bert"])
    model.base_model.embeddings.requires_grad_(False)
    assert not any("embeddings" in name for name in factors(model, decay=0.5))


def test_the_heads_group_comes_first():
    """A Trainer logs the rate of the first group."""
    groups = layerwise_parameter_groups(classifier(CONFIGS["bert"]), learning_rate=3.0, decay=0.5)
    rates = [group["lr"] for group in groups]
    assert rates[0] == 3.0 and rates == sorted(rates, reverse=True)


def test_without_a_head():
    base = classifier(CONFIGS["electra"]).base_model
    assert set(factors(base, decay=0.5).values()) == {0.5, 0.25, 0.125, 0.0625}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AlbertConfig(**SMALL, embedding_size=4), "3 layers of AlbertModel .*albert_layer_groups of 1:"),
        (FunnelConfig(vocab_size=40, block_sizes=[2, 2], d_model=8, n_head=2, d_head=4, d_inner=8), "blocks of 2:"),
        (XLMConfig(vocab_size=40, emb_dim=8, n_layers=2, n_heads=2), "layers of XLMModel"),
        (
            BartConfig(
                vocab_size=40, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
            ),
            "encoder.layers of 2, decoder.layers of 2",
        ),
    ],
    ids=["albert", "funnel", "xlm", "bart"],
)  # fmt: skip
def test_layers_that_are_not_one_list_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        factors(classifier(config), decay=0.8)


def test_albert_with_weights_of_its_own_for_each_layer():
    config = AlbertConfig(**SMALL, embedding_size=4, num_hidden_groups=3)
    assert set(factors(classifier(config), decay=0.5).values()) == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_one_layer_that_stands_twice_in_the_list_is_refused():
    model = classifier(CONFIGS["bert"])
    model.bert.encoder.layer[2] = model.bert.encoder.layer[1]
    with pytest.raises(InputError, match="share the weight"):
        factors(model, decay=0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"decay": 0}, "=0 must"), ({"decay": 1.2}, "=1.2 must"), ({"decay": 0.8, "mode": "papers"}, "'papers'")],
)
def test_bad_values(options, message):
    with pytest.raises(InputError, match=message):
        factors(classifier(CONFIGS["bert"]), **options)
