"""Tiny causal language models of many architectures."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 60
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
_KEYS = {"num_key_value_heads": 2}
OWN_SIZES = {
    "gpt2": _GPT | {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    "openai-gpt": _GPT | {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    "gptj": _GPT | {"rotary_dim": 8, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": _SIZES | _KEYS,
    "modernbert-decoder": _SIZES | {"local_attention": 16, "cls_token_id": 2, "sep_token_id": 3},
    "gpt_neox": _SIZES,
    "gemma2": _SIZES | _KEYS | {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 2.0},
    "granite": _SIZES | _KEYS | {"logits_scaling": 4.0},
    "cohere": _SIZES | _KEYS,
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    | {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0},
    "bert": _SIZES | {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "dropout": 0.0},
    "mistral": _SIZES | _KEYS,
}
# The heads that do something to the logits that a linear map has made.
CHANGED_LOGITS = ("gemma2", "granite", "cohere")


def causal_lm(model_type, **changes):
    """A model in evaluation mode with random weights; those of norms and biases too."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **special | OWN_SIZES[model_type] | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def next_token_batch(rows=3, length=20, *, seed=0):
    """Tokens with the next of each as its label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB_SIZE, (rows, length), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], dim=1)
    return {"input_ids": ids, "labels": labels, "target_positions": (labels.flatten() != -100).nonzero().flatten()}
