"""Checkpoints of the `TransfoXL` models, which transformers had until release 4.35, as ours.

    >>> load_transfo_xl_checkpoint("old-folder").save_pretrained("new-folder")

The weights compute the same function; what was around them differs:

- Memory. The old models began with `mem_len` vectors of zeros, which were attended. Here the memory begins empty. To get the old
  outputs give zeros as `mems`, without `mem_lengths`.
- `same_length`. The old window counted `mem_len` positions with the query's own, here it is the own one and `mem_len` before it:
  the converted `mem_len` is smaller by one.
- Cluster order. The old models' logits of the tail clusters were in the order of the clusters, as here. The PyTorch code of the
  paper's authors reads them backwards: turn its `cluster_weight` and `cluster_bias` round before.
- Vocabulary. It was pickled with a tokenizer of its own and is not converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.models.transformer_xl.configuration_transformer_xl import TransformerXLConfig
from hf_pretrain.models.transformer_xl.layers_transformer_xl import tied_weights
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM, TransformerXLModel

# Our option -> the old one, where only the name is another.
_OPTIONS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "head_dim": "d_head",
    "intermediate_size": "d_inner",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "dropatt",
    "untie_r": "untie_r",
    "pre_layer_norm": "pre_lnorm",
    "cutoffs": "cutoffs",
    "div_val": "div_val",
    "embedding_size": "d_embed",
    "layer_norm_eps": "layer_norm_epsilon",
    "initializer_range": "init_std",
    "projection_initializer_range": "proj_init_std",
    "eos_token_id": "eos_token_id",
}

# The values of options that an old configuration leaves out.
_DEFAULTS = {"attn_type": 0, "clamp_len": 1000, "mem_len": 1600, "same_length": True, "proj_share_all_but_first": True}

# Old name (a pattern) -> our name.
_NAMES = {
    r"word_emb\.emb_layers\.(\d+)\.weight": r"embeddings.tables.\1.weight",
    r"word_emb\.emb_projs\.(\d+)": r"embeddings.projections.\1",
    r"layers\.(\d+)\.dec_attn\.([ro])_net\.weight": r"layers.\1.attention.\2_proj.weight",
    r"layers\.(\d+)\.dec_attn\.layer_norm\.(\w+)": r"layers.\1.attention_norm.\2",
    r"layers\.(\d+)\.pos_ff\.CoreNet\.0\.(\w+)": r"layers.\1.up_proj.\2",
    r"layers\.(\d+)\.pos_ff\.CoreNet\.3\.(\w+)": r"layers.\1.down_proj.\2",
    r"layers\.(\d+)\.pos_ff\.layer_norm\.(\w+)": r"layers.\1.feed_forward_norm.\2",
    r"crit\.out_layers\.(\d+)\.(\w+)": r"lm_head.tables.\1.\2",
    r"crit\.out_projs\.(\d+)": r"lm_head.projections.\1",
    r"crit\.(cluster_\w+)": r"lm_head.\1",
}


def convert_transfo_xl_checkpoint(
    state_dict: Mapping[str, torch.Tensor], config_dict: Mapping[str, Any]
) -> tuple[TransformerXLConfig, dict[str, torch.Tensor]]:
    """Convert the weights and the configuration of a `TransfoXLModel` or `TransfoXLLMHeadModel`.

    Args:
        state_dict: Its weights by their names.
        config_dict: Its `config.json`.

    Returns:
        The configuration and the state of a [`TransformerXLForCausalLM`], or of a [`TransformerXLModel`] where the checkpoint has
        no language model head.

    Raises:
        InputError: If the checkpoint has another kind of attention, or a weight that this model does not have.
    """
    config = _convert_config(config_dict)
    prefix = "model." if any(name.startswith("crit.") for name in state_dict) else ""
    converted = _convert_biases(state_dict, config, prefix)
    for name, weight in state_dict.items():
        own_name = name.removeprefix("transformer.")
        if own_name == "pos_emb.inv_freq" or own_name.endswith(("r_w_bias", "r_r_bias")):
            continue
        if match := re.fullmatch(r"layers\.(\d+)\.dec_attn\.qkv_net\.weight", own_name):
            for kind, part in zip("qkv", weight.chunk(3), strict=True):
                converted[f"{prefix}layers.{match[1]}.attention.{kind}_proj.weight"] = part.clone()
            continue
        new_name = _new_name(own_name)
        converted[new_name if new_name.startswith("lm_head.") else prefix + new_name] = weight
    if prefix:
        _complete_tied_weights(converted, config)
    return config, converted


def load_transfo_xl_checkpoint(folder: str | Path) -> PreTrainedModel:
    """Load a folder that an old release saved; its model has our classes and can be saved.

    Args:
        folder: Has `config.json` and `model.safetensors` or `pytorch_model.bin`.

    Raises:
        InputError: If a file is missing, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not (folder / "config.json").is_file() or not (safe.is_file() or pickled.is_file()):
        raise InputError(f"{str(folder)!r} has no config.json with model.safetensors or pytorch_model.bin beside it")
    state_dict = load_file(safe) if safe.is_file() else torch.load(pickled, map_location="cpu", weights_only=True)
    config, converted = convert_transfo_xl_checkpoint(state_dict, json.loads((folder / "config.json").read_text()))
    has_head = any(name.startswith("lm_head.") for name in converted)
    model = (TransformerXLForCausalLM if has_head else TransformerXLModel)(config)
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        reason = one_line(error, line=1)
        raise InputError(f"{str(folder)!r}: the weights do not fit config.json ({reason})") from error
    return model.eval()


def _convert_config(old: Mapping[str, Any]) -> TransformerXLConfig:
    rest = {name: old.get(name, default) for name, default in _DEFAULTS.items()}
    if rest["attn_type"] != 0:
        raise InputError(f"attn_type={rest['attn_type']}: only 0, the attention of Transformer-XL, can be converted")
    return TransformerXLConfig(
        **{name: old[old_name] for name, old_name in _OPTIONS.items() if old_name in old},
        mem_len=rest["mem_len"] - bool(rest["same_length"]),
        same_length=rest["same_length"],
        clamp_len=rest["clamp_len"] if rest["clamp_len"] > 0 else -1,
        tie_word_embeddings=old.get("tie_word_embeddings", True),
        tie_tail_projections=rest["proj_share_all_but_first"],
    )


def _new_name(name: str) -> str:
    for pattern, replacement in _NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise InputError(f"the checkpoint has a weight {name!r}: it is no TransfoXLModel or TransfoXLLMHeadModel")


def _convert_biases(
    state_dict: Mapping[str, torch.Tensor], config: TransformerXLConfig, prefix: str
) -> dict[str, torch.Tensor]:
    """Stack u and v, of each layer or of the first where all layers share them."""
    own_names = {name.removeprefix("transformer."): weight for name, weight in state_dict.items()}
    layers = range(config.num_hidden_layers if config.untie_r else 1)
    converted = {}
    for new_name, old_name in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias")):
        # Shared ones are the model's; a file that names shared weights once may have kept either name.
        shared = {} if config.untie_r else own_names
        names = [f"layers.{layer}.dec_attn.{old_name}" for layer in layers]
        found = (own_names[name] if name in own_names else shared.get(old_name) for name in names)
        biases = [bias for bias in found if bias is not None]
        if len(biases) < len(names):
            raise InputError(f"the checkpoint has no {old_name}: it is no TransfoXLModel or TransfoXLLMHeadModel")
        converted[prefix + new_name] = torch.stack(biases)
    return converted


def _complete_tied_weights(converted: dict[str, torch.Tensor], config: TransformerXLConfig) -> None:
    """Name weights on both sides that a file with each shared weight once names on one."""
    for target, source in tied_weights(config).items():
        names = [f"lm_head.{target}".rstrip("$"), f"model.embeddings.{source}".rstrip("$")]
        for name, other in (names, reversed(names)):
            if name not in converted and other in converted:
                converted[name] = converted[other]
