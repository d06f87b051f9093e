"""Configurations: nested ones that survive saving, and those of models built from scratch."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.method_matrix import TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.configuration import ModelArguments, attention_options, build_config, parse_overrides
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining, EncoderForPreTrainingConfig


def arguments(model_type, **options):
    return ModelArguments(**{**TINY, "model_type": model_type, **options})


class TestCompositeConfig:
    def test_the_stock_configuration_survives_saving(self, tmp_path):
        inner = BertConfig(**TINY, vocab_size=77, hidden_act="relu", pad_token_id=3)
        EncoderForPreTrainingConfig(model=inner).save_pretrained(tmp_path)
        loaded = EncoderForPreTrainingConfig.from_pretrained(tmp_path)
        assert isinstance(loaded.model, BertConfig)
        assert loaded.model.to_diff_dict() == inner.to_diff_dict()
        assert loaded.pad_token_id == 3

    def test_the_configuration_is_the_models_own(self):
        model = AutoModelForMaskedLM.from_config(BertConfig(**TINY, vocab_size=77))
        assert EncoderForPreTraining.from_model(model).config.model is model.config

    @pytest.mark.parametrize("backend", ["sdpa", "eager"])
    def test_the_backend_of_the_model_is_kept(self, backend):
        config = BertConfig(**TINY, vocab_size=77, attn_implementation=backend)
        assert EncoderForPreTrainingConfig(model=config).model._attn_implementation == backend

    def test_it_is_empty_without_a_model(self):
        assert EncoderForPreTrainingConfig().model is None


class TestBuildConfig:
    @pytest.mark.parametrize("model_type", ["albert", "bert", "deberta-v2", "electra", "modernbert", "roberta"])
    def test_sizes_and_special_ids(self, model_type, tokenizer):
        config = build_config(arguments(model_type), tokenizer)
        assert config.model_type == model_type
        assert config.vocab_size == len(tokenizer) == VOCAB_SIZE
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            assert getattr(config, name) == TINY[name]
        assert config.pad_token_id == tokenizer.pad_token_id
        # As many tokens fit as were asked for, whatever number the architecture gives to the first position.
        model = AutoModelForMaskedLM.from_config(config)
        assert longest_sequence(model) in (None, TINY["max_position_embeddings"])
        ids = torch.full((1, TINY["max_position_embeddings"]), 7)
        with torch.no_grad():
            assert model.eval()(ids).logits.shape == (1, TINY["max_position_embeddings"], VOCAB_SIZE)

    def test_distilbert(self, tokenizer):
        """Its names differ from the others'."""
        config = build_config(arguments("distilbert"), tokenizer)
        assert (config.dim, config.hidden_dim, config.n_layers, config.n_heads) == (32, 64, 2, 2)

    def test_xlnet(self, tokenizer):
        """So do its own, one of its sizes follows from two others, and it will not hear of a longest sequence."""
        config = build_config(
            arguments("xlnet", config_overrides='{"dropout": 0.3, "n_layer": 3}'),
            tokenizer,
            auto_class=AutoModelForCausalLM,
        )
        sizes = (config.d_model, config.d_inner, config.n_layer, config.n_head, config.d_head, config.vocab_size)
        assert sizes == (32, 64, 3, 2, 16, VOCAB_SIZE)
        assert (config.dropout, config.pad_token_id, config.sep_token_id) == (0.3, 0, 3)
        assert AutoModelForCausalLM.from_config(config).transformer.layer[2].ff.layer_1.out_features == 64

    def test_overrides_go_before_the_sizes_and_changes_before_both(self, tokenizer):
        args = arguments("bert", config_overrides='{"vocab_size": 64, "hidden_act": "relu", "num_hidden_layers": 3}')
        config = build_config(args, tokenizer, num_hidden_layers=5)
        assert (config.vocab_size, config.hidden_act, config.num_hidden_layers) == (64, "relu", 5)

    @pytest.mark.parametrize(
        ("model_type", "name"),
        [("gpt2", "activation_function"), ("albert", "hidden_act"), ("gptj", "activation_function")],
    )
    def test_gelu_of_many_operations_becomes_its_one_kernel(self, model_type, name, tokenizer):
        """The function is the same, to rounding; an activation that is named stays."""
        assert getattr(CONFIG_MAPPING[model_type](), name) == "gelu_new"
        auto = AutoModelForMaskedLM if model_type == "albert" else AutoModelForCausalLM
        config = build_config(arguments(model_type), tokenizer, auto_class=auto)
        states = torch.linspace(-6, 6, 1001)
        torch.testing.assert_close(ACT2FN[getattr(config, name)](states), ACT2FN["gelu_new"](states))
        assert getattr(config, name) == "gelu_pytorch_tanh"
        for key in {name, "hidden_act"} & ({name} | set(config.attribute_map)):
            named = arguments(model_type, config_overrides=json.dumps({key: "relu"}))
            assert getattr(build_config(named, tokenizer, auto_class=auto), name) == "relu"
        assert build_config(arguments("bert"), tokenizer).hidden_act == "gelu"

    def test_embedding_size(self, tokenizer):
        assert build_config(arguments("electra", embedding_size=16), tokenizer).embedding_size == 16
        with pytest.raises(InputError, match="embedding_size=16: bert"):
            build_config(arguments("bert", embedding_size=16), tokenizer)

    @pytest.mark.parametrize(
        ("model_type", "sizes", "message"),
        [
            ("gpt2", {}, "model_type='gpt2' is no masked language model"),
            ("vit", {}, "model_type='vit' is no masked language model"),
            ("modernbrt", {}, "model_type='modernbrt' is not .*did you mean 'modernbert'"),
            ("funnel", {}, "model_type='funnel' cannot be built from these sizes, it has no intermediate_size"),
            ("bert", {"hidden_size": 0}, "hidden_size=0 must be at least 1"),
            ("bert", {"hidden_size": -4}, "hidden_size=-4 must be at least 1"),
            ("bert", {"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
            ("bert", {"num_hidden_layers": -1}, "num_hidden_layers=-1 must be at least 1"),
            ("bert", {"max_position_embeddings": 10**20}, "max_position_embeddings=1.* must be at most"),
            ("bert", {"config_overrides": '{"hidden_act": "bogus"}'}, "model_type='bert' cannot be built .*bogus"),
            ("roberta", {"config_overrides": '{"max_position_embeddings": null}'}, "roberta cannot be built"),
            ("bert", {"config_overrides": '{"model_type": "x"}'}, "bert cannot be built"),
            ("mobilebert", {}, "model_type='mobilebert' cannot be built with AutoModelForMaskedLM: .*dimension"),
            ("squeezebert", {}, "model_type='squeezebert' cannot be built with AutoModelForMaskedLM"),
            ("bert", {"attn_implementation": "flash_attention_2"}, "flash_attn|FlashAttention"),
            ("bert", {"model_dtype": "float16"}, "model_dtype='float16' must be one of float32, bfloat16"),
            (
                "bert",
                {"num_attention_heads": 3},
                "model_type='bert' cannot be built with AutoModelForMaskedLM: .*multiple",
            ),
            ("bert", {"config_overrides": '{"hidden_size": "wide"}'}, "bert cannot be built: .*expected int"),
            ("xlnet", {}, "model_type='xlnet' is no masked language model"),
        ],
    )
    def test_what_does_not_fit_together_is_refused_in_one_line(self, tokenizer, model_type, sizes, message):
        with pytest.raises(InputError, match=message) as caught:
            EncoderForPreTraining.from_arguments(arguments(model_type, **sizes), tokenizer)
        assert "\n" not in str(caught.value)

    def test_an_unknown_architecture_is_refused(self, tokenizer):
        with pytest.raises(InputError, match="model_type='brt'"):
            build_config(arguments("brt"), tokenizer)

    def test_an_unknown_option_is_refused_by_name(self, tokenizer):
        with pytest.raises(InputError, match="bert has no option hiden_act"):
            build_config(arguments("bert", config_overrides='{"hiden_act": "relu"}'), tokenizer)

    def test_a_tokenizer_that_pads_otherwise_is_refused_for_mpnet(self, tokenizer):
        """Its code takes token 1 for padding, whatever the configuration says."""
        with pytest.raises(InputError, match="takes token 1 for padding"):
            build_config(ModelArguments(model_type="mpnet"), tokenizer)

    def test_a_tokenizer_without_padding_is_refused(self):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        with pytest.raises(InputError, match="pad"):
            build_config(arguments("roberta"), tokenizer)


@pytest.mark.parametrize("text", ["{hidden_act: relu}", "", '["hidden_act"]', "3", "null"])
def test_overrides_that_are_no_json_object_are_refused(text):
    with pytest.raises(InputError, match="config_overrides") as caught:
        parse_overrides(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_are_read():
    assert parse_overrides('{"a": 1, "b": [true, null]}') == {"a": 1, "b": [True, None]}
    assert parse_overrides(None) == {}


def test_the_backend_is_passed_on_only_if_asked_for():
    assert attention_options(ModelArguments()) == {}
    assert attention_options(ModelArguments(attn_implementation="eager")) == {"attn_implementation": "eager"}


class TestEncoderFromArguments:
    def test_a_checkpoint_is_continued(self, tmp_path, tokenizer):
        model = AutoModelForMaskedLM.from_config(build_config(arguments("bert"), tokenizer))
        model.save_pretrained(tmp_path)
        args = ModelArguments(model_name_or_path=str(tmp_path), attn_implementation="eager")
        composite = EncoderForPreTraining.from_arguments(args, tokenizer)
        assert composite.model.config._attn_implementation == "eager"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), composite.model.parameters(), strict=True))

    def test_the_backend_of_a_fresh_model(self, tokenizer):
        composite = EncoderForPreTraining.from_arguments(arguments("bert", attn_implementation="eager"), tokenizer)
        assert composite.model.config._attn_implementation == "eager"


class TestFromPretrained:
    def test_a_missing_checkpoint_is_refused_in_one_line(self, tmp_path):
        name = str(tmp_path / "nothing")
        with pytest.raises(InputError, match="AutoModel") as caught:
            from_pretrained(AutoModel, name)
        assert name in str(caught.value) and "\n" not in str(caught.value)

    def test_an_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="cannot be loaded"):
            from_pretrained(AutoConfig, str(tmp_path))
