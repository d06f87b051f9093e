"""What a stock encoder is like: every question of `backbone.py` to every architecture, against the model itself.

The right answers are written down from the code of each architecture, and where a forward can tell, it is run.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from helpers.method_matrix import VOCAB_SIZE
from hf_pretrain.errors import InputError
from hf_pretrain.modeling import backbone
from hf_pretrain.modeling.base import tokenizer_for

DEPTH, LENGTH = 2, 32
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    "pad_token_id": 1,
}
BERT = {
    "layers": "encoder.layer",
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "first": 0,
    "longest": LENGTH,
    "types": 2,
    "position_ids": True,
}
ROBERTA = BERT | {"counts": True, "first": 2, "longest": LENGTH - 2}
ROTARY = {"layers": "layers", "words": "embeddings.tok_embeddings", "positions": None, "longest": None, "types": 0}
# Options, and what differs from BERT's answers.
ARCHITECTURES = {
    "bert": ({}, {}),
    "electra": ({"embedding_size": 16}, {}),
    "albert": ({"embedding_size": 16}, {"layers": None, "modules": 1}),
    "distilbert": (
        {"dim": 32, "hidden_dim": 48, "n_layers": DEPTH, "n_heads": 2},
        {"layers": "transformer.layer", "types": 0},
    ),
    "roberta": ({}, ROBERTA),
    "xlm-roberta": ({"pad_token_id": 5, "type_vocab_size": 1}, ROBERTA | {"first": 6, "longest": 26, "types": 1}),
    "camembert": ({}, ROBERTA),
    "esm": ({"mask_token_id": 4}, ROBERTA | {"types": 0}),
    "mpnet": ({}, ROBERTA | {"types": 0}),
    "ibert": ({}, ROBERTA),
    "longformer": ({"attention_window": 4}, ROBERTA),
    "deberta": ({"relative_attention": True}, {"types": 0}),
    "deberta-v2": ({"position_biased_input": True, "type_vocab_size": 2}, {}),
    "deberta-v2 without positions": (
        {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["c2p"]},
        {"positions": None, "longest": None, "types": 0},
    ),
    "big_bird": ({"attention_type": "original_full"}, {}),
    "nystromformer": ({"num_landmarks": 4, "segment_means_seq_len": 4}, {"first": 2}),
    "yoso": ({}, {"first": 2, "types": 1}),
    "roformer": (
        {"embedding_size": 32},
        {"positions": "encoder.embed_positions", "learned": False, "position_ids": False},
    ),
    "modernbert": ({"local_attention": 8, "global_attn_every_n_layers": 2}, ROTARY | {"windows": [None, 4]}),
    "nomic_bert": ({}, {"layers": "layers", "positions": None, "longest": None}),
    "eurobert": ({"mask_token_id": 4}, ROTARY | {"words": "embed_tokens"}),
    "xlnet": (
        {"d_model": 32, "n_layer": DEPTH, "n_head": 2, "d_inner": 48},
        {"layers": "layer", "words": "word_embedding", "positions": None, "longest": None, "position_ids": False},
    ),
    "funnel": (
        {
            "architectures": ["FunnelModel"],
            "block_sizes": [1, 1],
            "d_model": 32,
            "n_head": 2,
            "d_head": 16,
            "d_inner": 48,
            "num_decoder_layers": 1,
        },
        {"layers": None, "modules": 2, "positions": None, "longest": None, "position_ids": False},
    ),
    "xlm": (
        {"emb_dim": 32, "n_layers": DEPTH, "n_heads": 2, "n_words": VOCAB_SIZE},
        {"layers": None, "modules": 2, "words": "embeddings", "positions": "position_embeddings", "types": 0},
    ),
    "bart": (
        {"d_model": 32, "encoder_layers": DEPTH, "decoder_layers": DEPTH, "encoder_attention_heads": 2},
        {
            **{"layers": None, "modules": 2, "words": "shared", "positions": "encoder.embed_positions", "first": 2},
            **{"learned": False, "types": 0, "position_ids": False},
        },
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    options, changes = ARCHITECTURES[request.param]
    model_type = request.param.split()[0]
    own_names = {"distilbert", "xlnet", "funnel", "xlm", "bart"} & {model_type}
    values = {name: value for name, value in SIZES.items() if not own_names or "token_id" in name or "vocab" in name}
    if model_type in ("distilbert", "xlm", "bart"):
        values["max_position_embeddings"] = LENGTH
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**values, **options})).eval()
    return model, BERT | {"modules": DEPTH, "windows": [None] * DEPTH, "learned": True} | changes


def runs(model, length, **inputs):
    with torch.no_grad():
        try:
            return model(torch.full((1, length), 7), **inputs)[0]
        except (IndexError, RuntimeError):
            return None


class TestEveryArchitecture:
    def test_layers(self, case):
        model, answers = case
        assert backbone.layers_name(model) == answers["layers"]
        layers, called = backbone.layer_modules(model), []
        assert len(layers) == answers["modules"]
        handles = [
            layer.register_forward_pre_hook(lambda *_, number=number: called.append(number))
            for number, layer in enumerate(layers)
        ]
        runs(model, 8)
        for handle in handles:
            handle.remove()
        assert called == (list(range(DEPTH)) if len(layers) == DEPTH else [0] * DEPTH)

    def test_tables(self, case):
        model, answers = case
        assert backbone.word_table_name(model) == answers["words"]
        assert backbone.vocabulary_size(model.get_input_embeddings()) == VOCAB_SIZE
        assert next(iter(backbone.position_tables(model)), None) == answers["positions"]
        learned = answers["learned"] and answers["positions"] and model.config.model_type != "ibert"
        assert bool(backbone.position_tables(model, learned=True)) == bool(learned)

    def test_the_first_position_is_the_row_that_a_forward_reads_first(self, case):
        model, answers = case
        first = backbone.first_position(model)
        assert first == (answers["first"] if answers["positions"] else 0)
        assert backbone.counts_from_padding(model) == answers.get("counts", False)
        if not answers["positions"] or model.config.model_type == "ibert":
            return
        table, read = backbone.position_tables(model)[answers["positions"]], []
        if model.config.model_type in ("bart", "roformer"):
            return  # They number positions inside of the table.
        handle = table.register_forward_hook(lambda module, args, output: read.append(args[0]))
        runs(model, 5)
        handle.remove()
        assert read[0].flatten()[:5].tolist() == list(range(first, first + 5))

    def test_the_longest_sequence_runs_and_one_more_token_does_not(self, case):
        model, answers = case
        longest = backbone.longest_sequence(model)
        assert longest == answers["longest"]
        if longest is None:
            # Funnel halves a row at each block; any other length will do as well.
            assert runs(model, 2 * LENGTH) is not None
        elif model.config.model_type != "longformer":  # It pads rows to whole windows.
            assert runs(model, longest) is not None and runs(model, longest + 1) is None

    def test_inputs(self, case):
        model, answers = case
        assert backbone.num_token_types(model.config) == (
            2 if model.config.model_type == "xlnet" else answers["types"]
        )
        names = backbone.input_names(model)
        assert ("position_ids" in names) == answers["position_ids"] == backbone.takes_input(model, "position_ids")
        assert ("token_type_ids" in names) == (backbone.num_token_types(model.config) > 1)
        if "token_type_ids" in names:
            zeros = torch.zeros(1, 8, dtype=torch.long)
            both = [runs(model, 8, token_type_ids=types) for types in (zeros, (torch.arange(8) > 3).long()[None])]
            assert not torch.equal(*both), "the types are read"

    def test_windows(self, case):
        model, answers = case
        assert [backbone.window_of(model.config, layer) for layer in range(1, DEPTH + 1)] == answers["windows"]
        assert backbone.window_of(model.config) == max(filter(None, answers["windows"]), default=None)

    def test_padding_on_the_left_moves_no_position(self, case):
        """A row that is padded on its left is read as without padding, where positions are absolute and can be given."""
        model, answers = case
        if (
            not answers["position_ids"]
            or not answers["positions"]
            or model.config.model_type in ("longformer", "nystromformer", "yoso")
        ):
            return  # Those mix padding into what they approximate.
        torch.manual_seed(1)
        ids = torch.randint(6, VOCAB_SIZE, (1, 6))
        padded = torch.nn.functional.pad(ids, (3, 0), value=model.config.pad_token_id)
        mask = (torch.arange(9) >= 3).long()[None]
        with torch.no_grad():
            alone = model(ids, attention_mask=torch.ones_like(ids))[0]
            for forced in (False, True):
                positions = backbone.row_position_inputs(model, mask, whatever_the_ids=forced)
                states = model(padded, attention_mask=mask, **positions)[0]
                torch.testing.assert_close(states[:, 3:], alone, atol=1e-5, rtol=1e-5)

    def test_rows_that_begin_with_a_token_have_the_positions_of_the_model(self, case):
        model, answers = case
        mask, ids = torch.ones(1, 6, dtype=torch.long), torch.arange(6, 12)[None]
        positions = backbone.row_position_inputs(model, mask)
        torch.manual_seed(2)
        given = model(ids, **positions)[0]
        torch.manual_seed(2)
        assert torch.equal(given, model(ids)[0])


def test_names_of_the_same_option():
    options = ("hidden_size", "hidden_act", "layer_norm_eps", "initializer_range", "hidden_dropout_prob")
    bert = AutoConfig.for_model("bert", layer_norm_eps=1e-3, hidden_act="relu", initializer_range=0.3)
    modern = AutoConfig.for_model("modernbert", norm_eps=1e-3, hidden_activation="relu", mlp_dropout=0.2)
    bart = AutoConfig.for_model("bart", init_std=0.3, dropout=0.2)
    distil = AutoConfig.for_model("distilbert", activation="relu", dim=24)
    found = [backbone.shared_options(config, *options) for config in (bert, modern, bart, distil)]
    assert [one["hidden_act"] for one in found if "hidden_act" in one] == ["relu"] * 3
    assert [one.get("layer_norm_eps") for one in found] == [1e-3, 1e-3, None, None]
    assert found[2]["initializer_range"] == found[0]["initializer_range"] == 0.3
    assert [one["hidden_dropout_prob"] for one in found] == [0.1, 0.2, 0.2, 0.1] and found[3]["hidden_size"] == 24
    for model_type, name in (("bert", "intermediate_size"), ("distilbert", "hidden_dim"), ("xlnet", "d_inner")):
        assert hasattr(AutoConfig.for_model(model_type), name) and backbone.feed_forward_name(model_type) == name


def test_what_counts_from_padding_is_known_before_it_is_built():
    for model_type in ARCHITECTURES:
        if model_type in backbone.POSITIONS_AFTER_PADDING:
            assert ARCHITECTURES[model_type][1]["first"] > 0
        elif " " not in model_type:
            assert ARCHITECTURES[model_type][1].get("first", 0) in (0, 2) and model_type not in ("roberta", "esm")


def test_a_body_that_does_not_show_its_layers_is_refused():
    model = AutoModel.from_config(AutoConfig.for_model("deberta", **SIZES))
    model.encoder.layer = torch.nn.ModuleList(list(model.encoder.layer)[:1])
    with pytest.raises(InputError, match="DebertaModel does not show its layers"):
        backbone.layer_modules(model)


def test_evaluating_leaves_each_module_in_its_own_mode():
    models = [AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)) for _ in range(2)]
    models[0].train().encoder.layer[0].eval()
    models[1].eval()
    before = [module.training for model in models for module in model.modules()]
    with pytest.raises(KeyError), backbone.evaluating(*models):
        assert not torch.is_grad_enabled() and not any(m.training for model in models for m in model.modules())
        kept = models[0](torch.full((1, 4), 7))[0]
        raise KeyError
    assert before == [module.training for model in models for module in model.modules()]
    assert torch.is_grad_enabled() and not kept.is_inference(), "what was made may be used in training"


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "distilbert", "esm", "fnet", "roberta", "deberta-v2"])
def test_a_tokenizer_makes_no_input_that_the_model_does_not_take(model_type, tokenizer, tmp_path):
    """`model(**tokenizer(text))` works for everybody who opens an export."""
    tokenizer = copy.deepcopy(tokenizer)
    names = tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = names
    small = {"hidden_dim": 48, "dim": 32, "n_heads": 2, "n_layers": DEPTH} if model_type == "distilbert" else {}
    few = {"roberta": {"type_vocab_size": 1}, "deberta-v2": {"type_vocab_size": 0}}.get(model_type, {})
    sizes = {name: value for name, value in SIZES.items() if not small or "token_id" in name or "vocab" in name}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes, **small, **few))
    with tokenizer_for(model, tokenizer):
        tokenizer.save_pretrained(tmp_path)
    encoded = AutoTokenizer.from_pretrained(tmp_path)(
        ["w1 w2", "w3"], ["w4", "w5 w6"], return_tensors="pt", padding=True
    )
    dropped = {"bert": set(), "fnet": {"attention_mask"}}.get(model_type, {"token_type_ids"})
    assert set(names) - set(encoded) == dropped
    model.eval()(**encoded)
    assert tokenizer.model_input_names == names and "token_type_ids" in tokenizer("w1")


def test_a_head_changes_no_answer():
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("roberta", **SIZES))
    assert backbone.layers_name(model) == "roberta.encoder.layer"
    assert backbone.word_table_name(model) == "roberta.embeddings.word_embeddings"
    assert backbone.first_position(model) == 2 and backbone.longest_sequence(model) == LENGTH - 2
