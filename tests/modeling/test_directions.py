"""Encoders as decoders and decoders as encoders: the same weights, in the other direction."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    ModernBertConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.causal_models import VOCAB_SIZE, causal_lm
from hf_pretrain.data.examples.lm_modes import LMMode
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.surgery.directions import to_decoder, to_encoder
from hf_pretrain.modeling.visibility.lm_modes import lm_mode_inputs

_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def modernbert(model_class=ModernBertForMaskedLM, **changes):
    torch.manual_seed(0)
    own = {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 11, "global_attn_every_n_layers": 2}
    own |= {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "max_position_embeddings": 64}
    model = model_class(ModernBertConfig(**_SIZES | own | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(rows=2, length=24):
    return torch.randint(4, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same_weights(model, other):
    expected, found = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@torch.no_grad()
def influence(model, ids):
    """``[n, n]`` bool: whether the logits at a position (row) move with a token (column)."""
    before = model(input_ids=ids[:1]).logits[0]
    columns = []
    for column in range(ids.shape[1]):
        edited = ids[:1].clone()
        edited[0, column] = 4 + (edited[0, column] - 3) % (VOCAB_SIZE - 4)
        columns.append((model(input_ids=edited).logits[0] - before).abs().amax(-1) > 0)
    return torch.stack(columns, dim=1)


# ModernBERT


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "attention_bias": False, "decoder_bias": False}]
)
def test_the_way_there_and_back_changes_no_bit(changes):
    """Weights and configuration come back, with an odd window and values that a decoder does not have."""
    model = modernbert(classifier_pooling="mean", **changes)
    decoder = to_decoder(model)
    back = to_encoder(decoder)
    assert type(decoder) is ModernBertDecoderForCausalLM and type(back) is ModernBertForMaskedLM
    assert_same_weights(model, back)
    assert sum(p.numel() for p in decoder.parameters()) == sum(p.numel() for p in model.parameters())
    expected, found = (made.config.to_dict() | {"dtype": None, "architectures": None} for made in (model, back))
    assert found == expected
    other = to_decoder(back)
    assert_same_weights(decoder, other)


def test_the_decoder_is_the_encoder_left_to_right():
    """Within a window, the decoder's logits are those of the encoder with a mask that hides what follows."""
    model, ids = modernbert(local_attention=64), tokens()
    rows = torch.full((2,), int(LMMode.LEFT_TO_RIGHT))
    inputs = lm_mode_inputs(
        model, input_ids=ids, attention_mask=torch.ones_like(ids), lm_modes=rows, source_lengths=torch.zeros_like(rows)
    )
    decoder = to_decoder(model)
    with torch.no_grad():
        torch.testing.assert_close(decoder(input_ids=ids).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    sees = influence(decoder, ids)
    assert torch.equal(sees, torch.ones_like(sees).tril())


def test_the_encoder_is_the_decoder_with_a_mask_of_both_sides():
    """Rows longer than the window: transformers masks a ModernBERT decoder with is_causal=False as the encoder."""
    decoder, ids = causal_lm("modernbert-decoder", local_attention=6, num_hidden_layers=3), tokens()
    encoder = to_encoder(decoder)
    assert encoder.config.layer_types == decoder.config.layer_types
    decoder.config.is_causal = False
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    with torch.no_grad():
        found, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (encoder, decoder))
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


def test_modernbert_opens_stock(tmp_path):
    """Both checkpoints open with the Auto classes; no weight is missing, none is left."""
    model, ids = modernbert(), tokens()
    for made, auto in (
        (to_decoder(model), AutoModelForCausalLM),
        (to_encoder(to_decoder(model)), AutoModelForMaskedLM),
    ):
        made.save_pretrained(tmp_path / auto.__name__)
        opened, info = auto.from_pretrained(tmp_path / auto.__name__, output_loading_info=True)
        assert type(opened) is type(made) and not any(info[name] for name in ("missing_keys", "unexpected_keys"))
        with torch.no_grad():
            assert torch.equal(opened(input_ids=ids).logits, made(input_ids=ids).logits)


def test_values_without_effect_are_named(monkeypatch):
    """A value that the other direction does not read is kept, and said."""
    said = []
    monkeypatch.setattr("hf_pretrain.modeling.surgery.directions.logger.warning", said.append)
    decoder = to_decoder(modernbert(classifier_pooling="mean"))
    assert decoder.config.classifier_pooling == "mean"
    assert len(said) == 1 and "classifier_pooling" in said[0] and "sparse_prediction" not in said[0]
    to_decoder(modernbert())
    assert len(said) == 1


def test_bodies_alone_turn_too():
    """The body without a head has the same classes; half precision stays, and no memory is shared."""
    model = modernbert().to(torch.bfloat16)
    body = to_decoder(model.model)
    assert body.dtype == torch.bfloat16 and not body.training
    back = to_encoder(body)
    assert_same_weights(model.model, back)
    body.embeddings.tok_embeddings.weight.data.zero_()
    assert (
        model.model.embeddings.tok_embeddings.weight.abs().sum()
        > 0
        < back.embeddings.tok_embeddings.weight.abs().sum()
    )


# Other decoders


def qwen3(**changes):
    torch.manual_seed(0)
    config = Qwen3Config(**_SIZES | {"num_key_value_heads": 1, "head_dim": 16} | changes)
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gpt_neox", "opt", "cohere"])
def test_each_token_sees_the_whole_row(model_type, backend):
    """Before, a token sees none that follow; after, all."""
    model = causal_lm(model_type, attn_implementation=backend)
    encoder, ids = to_encoder(model), tokens(length=9)
    assert type(encoder) is type(model) and encoder.config._attn_implementation == backend
    assert influence(encoder, ids).all()
    before = influence(model, ids)
    assert torch.equal(before, torch.ones_like(before).tril())
    assert_same_weights(model, encoder)


def test_a_bidirectional_decoder_opens_stock(tmp_path):
    """AutoModel opens the export without further options, and no token is hidden; padding moves nothing."""
    encoder, ids = to_encoder(qwen3()), tokens(length=10)
    encoder.save_pretrained(tmp_path)
    body, head = AutoModel.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    with torch.no_grad():
        expected = encoder.model(input_ids=ids).last_hidden_state
        assert torch.equal(body(input_ids=ids).last_hidden_state, expected)
        padded = body(input_ids=ids, attention_mask=mask).last_hidden_state[:, :7]
        torch.testing.assert_close(padded, body(input_ids=ids[:, :7]).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert influence(head, ids).all()


def test_a_window_reaches_both_ways():
    """A layer with a window sees its tokens on both sides, and none beyond."""
    model = qwen3(num_hidden_layers=1, use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"])
    sees = influence(to_encoder(model), tokens(length=12))
    places = torch.arange(12)
    assert torch.equal(sees, (places[:, None] - places).abs() <= 3)


def test_a_decoder_comes_back():
    """to_decoder undoes to_encoder, in weights and in logits."""
    model, ids = qwen3(tie_word_embeddings=True), tokens(length=10)
    back = to_decoder(to_encoder(model))
    assert_same_weights(model, back)
    assert "is_causal" not in back.config.to_dict() and not hasattr(model.config, "is_causal")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, back(input_ids=ids).logits)


def test_one_causal_layer_is_found(monkeypatch):
    """A layer that stays causal is named, although those before it see ahead."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = qwen3(layer_types=kinds, use_sliding_window=True, sliding_window=4)
    monkeypatch.setattr(
        "transformers.models.qwen3.modeling_qwen3.create_sliding_window_causal_mask",
        lambda inputs_embeds, **inputs: inputs_embeds.new_ones(2 * inputs_embeds.shape[1:2]).tril().bool()[None, None],
    )
    with pytest.raises(InputError, match="in layer 1 a token does not see the next one"):
        to_encoder(model)


# Refusals


def test_what_cannot_turn_is_refused():
    """Each refusal names the class and what to do."""
    bert = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    mamba = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    refused = [
        (to_encoder, mamba, r"MambaForCausalLM.*choose an architecture such as llama"),
        (to_encoder, causal_lm("openai-gpt"), "in layer 0 a token does not see the next one"),
        (to_encoder, t5, "get_encoder"),
        (to_encoder, BertLMHeadModel(BertConfig(**bert, is_decoder=True)), "is_decoder=False"),
        (to_encoder, to_encoder(qwen3()), "is an encoder already"),
        (to_encoder, modernbert(), r"ModernBertForMaskedLM.*is an encoder already"),
        (to_decoder, BertForMaskedLM(BertConfig(**bert)), r"BertForMaskedLM.*is_decoder=True"),
        (to_decoder, modernbert(ModernBertForSequenceClassification), "ModernBertForMaskedLM or ModernBertModel"),
        (to_decoder, qwen3(), "ModernBertForMaskedLM or ModernBertModel"),
    ]
    for turn, model, words in refused:
        with pytest.raises(InputError, match=words):
            turn(model)


def test_a_window_that_an_encoder_cannot_have_is_refused():
    """ModernBERT's decoder may have no window; its encoder must have one."""
    decoder = causal_lm("modernbert-decoder", local_attention=None, layer_types=["full_attention"] * 2)
    with pytest.raises(InputError, match="modernbert cannot have"):
        to_encoder(decoder)
