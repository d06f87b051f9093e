"""Stock encoder-decoders of denoising: built from sizes, opened, joined from two halves, or given."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    EncoderDecoderModel,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from helpers.denoising_models import TEXTS, copy_of, extra_ids, model_options, save_models
from hf_pretrain.data.documents.tokenizers import add_special_tokens, train_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import build_encoder_decoder_config
from hf_pretrain.objectives.denoising.building import (
    build_stock_model,
    check_decoder_length,
)

STARTS = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pegasus", "marian", "prophetnet"), "pad"),
    **dict.fromkeys(("bart", "mbart", "m2m_100", "plbart"), "sep"),
    **dict.fromkeys(("blenderbot", "t5gemma"), "cls"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=120)


@pytest.fixture
def own(tokenizer, tmp_path):
    return copy_of(tokenizer, tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    return save_models(tokenizer, tmp_path_factory.mktemp("models"))


def runs(model, **others):
    """Logits of a few tokens."""
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids[:, :6], **others).logits


# From sizes


@pytest.mark.parametrize("model_type", STARTS)
def test_an_architecture_is_built_from_the_usual_sizes(model_type, tokenizer, tmp_path):
    set_seed(1)
    model = build_stock_model(model_options(model_type=model_type), tokenizer)
    assert isinstance(model, AutoModelForSeq2SeqLM._model_mapping[type(model.config)])
    lists = [[m for m in part.modules() if isinstance(m, torch.nn.ModuleList)] for part in halves(model)]
    depths = [len(found[0]) for found in lists]
    assert depths == [3, 2]
    for part in halves(model):
        shapes = {tuple(parameter.shape) for parameter in part.parameters()}
        assert {(48, 32), (32, 48), (32, 32)} <= shapes
        assert {size for shape in shapes for size in shape} <= allowed_sizes(model_type, len(tokenizer))
    config, start = model.config, getattr(tokenizer, f"{STARTS[model_type]}_token_id")
    for known in (config, model.generation_config):
        assert known.decoder_start_token_id == start
        assert (known.pad_token_id, known.eos_token_id) == (tokenizer.pad_token_id, tokenizer.sep_token_id)
        assert known.bos_token_id == tokenizer.cls_token_id
        assert getattr(known, "forced_eos_token_id", None) in (None, tokenizer.sep_token_id)
    # The decoder reads the encoder.
    logits = runs(model)
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        other = model(input_ids=ids.flip(0), decoder_input_ids=ids[:, :6]).logits
    assert logits.shape == (2, 6, len(tokenizer))
    assert not torch.allclose(logits, other)
    model.save_pretrained(tmp_path)
    opened, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(opened.state_dict()[key], value) for key, value in model.state_dict().items())
    # Products of the same numbers elsewhere in memory may be summed in another order.
    assert torch.allclose(runs(opened), logits, atol=1e-5)
    assert (opened.generate(ids, max_new_tokens=2)[:, 0] == start).all()


def halves(model):
    return [model.get_encoder(), model.get_decoder()]


def allowed_sizes(model_type, tokens):
    """Return the lengths that parameters of the model have, if nothing of it keeps a default size."""
    # Positions with the rows that some leave free, buckets of distances and their heads, experts.
    own = {"bart": {66}, "mbart": {66}, "plbart": {66}, "prophetnet": {64 + 1, 32 * 4, 2}}
    others = {"switch_transformers": {8}}.get(model_type, set())
    return {32, 48, tokens, 64, 4} | own.get(model_type, set()) | others


def test_a_decoder_has_as_many_layers_as_its_encoder_by_default(tokenizer):
    config = build_encoder_decoder_config(model_options(model_type="t5"), tokenizer)
    assert (config.num_layers, config.num_decoder_layers, config.d_kv) == (3, 3, 8)


def test_a_decoder_deeper_than_its_encoder_is_built_where_generate_can_use_it(tokenizer):
    deep = {"num_hidden_layers": 1, "num_decoder_layers": 2}
    model = build_stock_model(model_options(model_type="bart", **deep), tokenizer)
    assert model.generate(torch.arange(4, 14)[None], max_new_tokens=3).shape[1] <= 4
    with pytest.raises(
        InputError, match="num_decoder_layers=2 is more than the 1 layers that transformers generates with in a t5"
    ):
        build_stock_model(model_options(model_type="t5", **deep), tokenizer)


def test_further_values_of_a_configuration_come_through(tokenizer):
    chosen = model_options(config_overrides='{"tie_word_embeddings": false, "attention_dropout": 0.25}')
    model = build_stock_model(chosen, tokenizer)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.config.attention_dropout == 0.25


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"model_type": "bert"}, "model_type='bert' is no encoder-decoder: choose one such as bart, t5"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is no encoder-decoder"),
        ({"model_type": "brat"}, "did you mean 'bart'"),
        ({"model_type": "encoder-decoder"}, "two checkpoints: name them with encoder_name_or_path"),
        ({"model_type": "t5gemma2"}, "model_type='t5gemma2' cannot be built from these sizes"),
        ({"embedding_size": 16}, "embedding_size=16: bart embeds at its full width"),
        ({"hidden_size": 30}, "hidden_size=30 does not divide into num_attention_heads=4"),
        ({"config_overrides": '{"no_such": 1}'}, "bart has no option no_such"),
        # transformers ties the head of every T5.
        (
            {"model_type": "t5", "config_overrides": '{"tie_word_embeddings": false}'},
            "config_overrides: t5 sets tie_word_embeddings=True itself",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(chosen, words, tokenizer):
    with pytest.raises(InputError, match=words):
        build_stock_model(model_options(**chosen), tokenizer)


# Opened


def test_an_encoder_decoder_is_opened_as_it_is(folders, tokenizer):
    model = build_stock_model(model_options(model_name_or_path=folders["bart"]), tokenizer)
    plain = AutoModelForSeq2SeqLM.from_pretrained(folders["bart"])
    assert type(model) is BartForConditionalGeneration
    assert torch.equal(runs(model), runs(plain))
    assert model.config.decoder_start_token_id == plain.config.decoder_start_token_id


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "bert",
            "must be an encoder-decoder, but bert is an encoder: join it with a decoder by --encoder_name_or_path",
        ),
        ("modernbert", "but modernbert is an encoder"),
        (
            "gpt2",
            "but gpt2 is a decoder: name an encoder with --encoder_name_or_path, and this one with --decoder_name",
        ),
        ("t5-encoder", "holds no weights of a decoder, such as decoder"),
        ("bart-decoder", "holds no weights of an encoder, such as model.encoder"),
    ],
)
def test_one_half_alone_is_refused(name, words, folders, tokenizer):
    with pytest.raises(InputError, match=words):
        build_stock_model(model_options(model_name_or_path=folders[name]), tokenizer)


# Joined


def test_an_encoder_is_joined_with_a_copy_of_itself(folders, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_pretrain"):
        model = build_stock_model(model_options(encoder_name_or_path=folders["bert"]), tokenizer)
    own = [record.getMessage() for record in caplog.records if record.name.startswith("hf_pretrain")]
    assert len(own) == 1
    assert "the decoder's attention to the encoder (20 parameters)" in own[0]
    checkpoint = BertForMaskedLM.from_pretrained(folders["bert"]).state_dict()
    state = model.state_dict()
    for key, value in checkpoint.items():
        assert torch.equal(state[f"decoder.{key}"], value)
        if key.startswith("bert."):
            assert torch.equal(state[f"encoder.{key.removeprefix('bert.')}"], value)
    fresh = set(model.fresh_parameters)
    assert {key for key in fresh if "crossattention" in key} == {
        key for key, _ in model.named_parameters() if "crossattention" in key
    }
    assert all("crossattention" in key or "pooler" in key for key in fresh)
    # Training one half leaves the other.
    assert model.encoder.get_input_embeddings().weight is not model.decoder.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    opened, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is EncoderDecoderModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(runs(opened), runs(model))
    ids = torch.arange(4, 24).view(2, 10)
    assert (opened.generate(ids, max_new_tokens=2)[:, 0] == tokenizer.cls_token_id).all()
    assert opened.generation_config.eos_token_id == tokenizer.sep_token_id


def test_the_joined_decoder_reads_the_encoder_and_not_the_future(folders, tokenizer):
    model = build_stock_model(model_options(encoder_name_or_path=folders["bert"]), tokenizer).eval()
    ids = torch.arange(4, 24).view(2, 10)
    changed = ids[:, :6].clone()
    changed[:, -1] = 5
    with torch.no_grad():
        logits, other = (model(input_ids=ids, decoder_input_ids=target).logits for target in (ids[:, :6], changed))
        flipped = model(input_ids=ids.flip(0), decoder_input_ids=ids[:, :6]).logits
    assert torch.allclose(logits[:, :-1], other[:, :-1], atol=1e-6)
    assert not torch.allclose(logits[:, -1], other[:, -1])
    assert not torch.allclose(logits, flipped)


def test_an_encoder_is_joined_with_a_decoder_of_another_width(folders, tokenizer, tmp_path):
    chosen = model_options(encoder_name_or_path=folders["modernbert"], decoder_name_or_path=folders["gpt2"])
    model = build_stock_model(chosen, tokenizer)
    assert {"enc_to_dec_proj.weight", "enc_to_dec_proj.bias"} <= set(model.fresh_parameters)
    encoder = ModernBertForMaskedLM.from_pretrained(folders["modernbert"]).model.state_dict()
    assert all(torch.equal(model.encoder.state_dict()[key], value) for key, value in encoder.items())
    model.save_pretrained(tmp_path)
    opened, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(runs(opened), runs(model))


def test_halves_that_cannot_be_joined_are_refused(folders, tokenizer, own, tmp_path):
    def refused(words, *, tokens=tokenizer, **chosen):
        with pytest.raises(InputError, match=words):
            build_stock_model(model_options(**chosen), tokens)

    bert, modernbert = folders["bert"], folders["modernbert"]
    refused(
        "encoder_name_or_path=.*modernbert has no attention to an encoder: name its decoder with decoder_name.*bert, roberta",
        encoder_name_or_path=modernbert,
    )
    refused(
        "decoder_name_or_path=.*modernbert has no attention",
        encoder_name_or_path=bert,
        decoder_name_or_path=modernbert,
    )
    refused("must be an encoder, not bart: continue it with model_name_or_path", encoder_name_or_path=folders["bart"])
    refused(
        "decoder_name_or_path=.*bart has no", encoder_name_or_path=bert, decoder_name_or_path=folders["bart-decoder"]
    )
    small = tmp_path / "small"
    config = BertConfig(**BertConfig.from_pretrained(bert).to_diff_dict() | {"vocab_size": len(tokenizer) - 5})
    BertForMaskedLM(config).save_pretrained(small)
    refused(
        f"embeds {len(tokenizer) - 5} tokens, and the tokenizer has {len(tokenizer)}",
        encoder_name_or_path=bert,
        decoder_name_or_path=str(small),
    )
    other = train_tokenizer(["zyx wvu"] * 9, vocab_size=len(tokenizer))
    other.add_tokens([f"more{number}" for number in range(len(tokenizer) - len(other))])
    BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    refused(
        "decoder_name_or_path=.*has another vocabulary",
        encoder_name_or_path=bert,
        decoder_name_or_path=str(tmp_path / "other"),
    )
    add_special_tokens(own, extra_ids(4))
    refused("encoder_name_or_path=.*resize_token_embeddings", tokens=own, encoder_name_or_path=bert)


# Given in Python


def test_a_given_model_is_taken_or_refused_by_its_name(folders, tokenizer):
    stock = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=99))
    assert build_stock_model(model_options(), tokenizer, stock=stock) is stock
    assert (
        stock.config.decoder_start_token_id == stock.generation_config.decoder_start_token_id == tokenizer.pad_token_id
    )
    bert = BertForMaskedLM.from_pretrained(folders["bert"])
    with pytest.raises(InputError, match="model=BertForMaskedLM is no encoder-decoder.*encoder_name_or_path"):
        build_stock_model(model_options(), tokenizer, stock=bert)
    with pytest.raises(InputError, match="model=BartModel has no language-model head.*BartForConditionalGeneration"):
        build_stock_model(model_options(), tokenizer, stock=BartModel.from_pretrained(folders["bart"]))


# Positions of the decoder


@pytest.mark.parametrize("model_type", ["bart", "prophetnet", "pegasus"])
def test_targets_longer_than_the_positions_are_refused(model_type, tokenizer):
    model = build_stock_model(model_options(model_type=model_type), tokenizer)
    check_decoder_length(model, 64)
    with pytest.raises(InputError, match="targets of up to 65 tokens are longer than the 64 positions .*block_size"):
        check_decoder_length(model, 65)


def test_the_positions_of_a_joined_decoder_are_its_own(folders, tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = RobertaConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=42, pad_token_id=1, is_decoder=True
    )
    RobertaForCausalLM(config).save_pretrained(tmp_path)
    chosen = model_options(encoder_name_or_path=folders["bert"], decoder_name_or_path=str(tmp_path))
    model = build_stock_model(chosen, tokenizer)
    check_decoder_length(model, 40)
    with pytest.raises(InputError, match="longer than the 40 positions of the decoder of EncoderDecoderModel"):
        check_decoder_length(model, 41)


def test_distances_have_no_end(tokenizer):
    check_decoder_length(build_stock_model(model_options(model_type="t5"), tokenizer), 1 << 20)
