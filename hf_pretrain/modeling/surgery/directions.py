"""A stock model in the other direction: an encoder as a decoder, a decoder as an encoder, with the same weights.

ModernBERT has a class for each direction, with other names for the same weights. Other decoders keep their class: with
`config.is_causal=False`, transformers masks padding alone, and each token sees the whole row. The value is a part of the
checkpoint, so that `AutoModel.from_pretrained` opens an encoder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertDecoderModel,
    ModernBertForMaskedLM,
    ModernBertModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.modeling.backbone import evaluating, layer_modules
from hf_pretrain.modeling.visibility.causal import causal_body
from hf_pretrain.modeling.visibility.rules import arbitrary_tokens, is_alike, is_own_fault

logger = logging.get_logger(__name__)

_DECODER_OF: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    ModernBertForMaskedLM: ModernBertDecoderForCausalLM,
    ModernBertModel: ModernBertDecoderModel,
}
_ENCODER_OF = {decoder: encoder for encoder, decoder in _DECODER_OF.items()}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# What follows from other values, or is the class's own.
_DERIVED = ("model_type", "architectures", "sliding_window", "transformers_version", "dtype")


def to_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return an encoder as a decoder, in which no token sees those that follow.

    [`to_encoder`] undoes it, bit for bit. The stock classes of ModernBERT count a local window in two ways: a token of the
    encoder sees `local_attention // 2` tokens on each side, and one of the decoder sees one fewer on its left.

    Args:
        model: `ModernBertForMaskedLM` or `ModernBertModel`; or a result of [`to_encoder`]. It is not changed.

    Returns:
        `ModernBertDecoderForCausalLM` or `ModernBertDecoderModel`; or the class of the model, as it was before. It is in
        evaluation mode, has the type of the weights, and shares no memory with the model.

    Raises:
        InputError: If the architecture has no decoder of the same weights.

    Source:
        Weller et al. 2025 (Ettin), whose encoders and decoders have one architecture.
    """
    if type(model) in _DECODER_OF:
        state = {name: part for key, value in model.state_dict().items() for name, part in _split(key, value).items()}
        config = _translated(model.config, ModernBertDecoderConfig)
        return _filled(_DECODER_OF[type(model)], config, state, like=model)
    if getattr(model.config, "is_causal", None) is False:
        config = copy.deepcopy(model.config)
        del config.is_causal
        return _filled(type(model), config, model.state_dict(), like=model)
    raise InputError(
        f"model={type(model).__name__} has no decoder of the same weights: give a {_names(_DECODER_OF)}, or a result of "
        "to_encoder; an architecture such as bert reads left to right with is_decoder=True in its configuration"
    )


def to_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return a decoder as an encoder, in which each token sees the whole row; it needs training before it is of use.

    ModernBERT's decoder becomes the encoder of the same weights. Another decoder keeps its class and gets
    `config.is_causal=False`; its head still predicts the next token. Two trials follow: each layer must show a token the one
    after it, and padding must not move the states of tokens.

    Args:
        model: A causal language model such as `LlamaForCausalLM`, or the body of one. It is not changed.

    Returns:
        The encoder, in evaluation mode; it has the type of the weights, and shares no memory with the model.
        `AutoModel.from_pretrained` opens what its `save_pretrained` writes.

    Raises:
        InputError: If a token still does not see the next one, or if the model is an encoder already.

    Source:
        LLM2Vec (BehnamGhader et al. 2024), its first step.
    """
    if type(model) in _ENCODER_OF:
        config = _translated(model.config, ModernBertConfig)
        return _filled(_ENCODER_OF[type(model)], config, _joined(model.state_dict()), like=model)
    name, config = type(model).__name__, copy.deepcopy(model.config)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model={name} is an encoder-decoder: take its encoder, `model.get_encoder()`")
    if getattr(config, "is_decoder", False):
        raise InputError(
            f"model={name} has is_decoder=True: open the checkpoint with AutoModelForMaskedLM and is_decoder=False"
        )
    is_meta = model.device.type == "meta"
    if getattr(config, "is_causal", None) is False or (not is_meta and _find_fault(model) is None):
        raise InputError(f"model={name} is an encoder already, in which tokens see those that follow: use it as it is")
    config.is_causal = False
    encoder = _filled(type(model), config, model.state_dict(), like=model)
    fault = None if is_meta else _find_fault(encoder)
    if fault is not None:
        raise InputError(
            f"model={name} with attn_implementation={config._attn_implementation!r} cannot be an encoder: {fault}; choose an "
            "architecture such as llama, qwen3 or mistral"
        )
    return encoder


def _names(classes: Mapping[type[PreTrainedModel], Any]) -> str:
    return " or ".join(known.__name__ for known in classes)


def _split(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a weight of ModernBERT under the names of its decoder."""
    key = re.sub(r"^head\.", "lm_head.", key)
    if ".Wqkv." not in key:
        return {key: value}
    parts = zip(_PROJECTIONS, value.chunk(3), strict=True)
    return {key.replace("Wqkv", projection): part for projection, part in parts}


def _joined(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of ModernBERT's decoder under the names of the encoder."""
    joined = {}
    for key, value in state.items():
        key = re.sub(r"^lm_head\.", "head.", key)
        if f".{_PROJECTIONS[0]}." in key:
            parts = [state[key.replace(_PROJECTIONS[0], projection)] for projection in _PROJECTIONS]
            joined[key.replace(_PROJECTIONS[0], "Wqkv")] = torch.cat(parts)
        elif not any(f".{projection}." in key for projection in _PROJECTIONS):
            joined[key] = value
    return joined


def _translated(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a configuration of ModernBERT as one of the other direction, and name the values that have no effect there."""
    values = {name: value for name, value in config.to_dict().items() if name not in _DERIVED}
    values.pop("is_causal", None)
    known = {field.name for field in fields(config_class)}
    own = {field.name: field.default for field in fields(config) if field.name not in known}
    idle = sorted(name for name, default in own.items() if values.get(name, default) != default)
    if idle:
        logger.warning(f"{config_class.model_type} does not read {', '.join(idle)}: kept in the configuration")
    try:
        translated: PreTrainedConfig = config_class.from_dict(values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"{config_class.model_type} cannot have these values: {one_line(error, line=-1)}") from error
    translated.name_or_path = config.name_or_path
    return translated


def _filled(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: Mapping[str, torch.Tensor], *, like: Any
) -> PreTrainedModel:
    """Build a model and load all of a state into it."""
    backend = like.config._attn_implementation
    model: PreTrainedModel = model_class._from_config(config, dtype=like.dtype, attn_implementation=backend)
    odd = model.state_dict().keys() ^ state.keys()
    if odd:
        raise InputError(
            f"model={type(like).__name__} has other weights than its class, such as {min(odd)}: merge them"
        )
    model.load_state_dict(state)
    return model.to(like.device).eval()


_TRIAL_TOKENS, _PADDING = 6, 2


def _find_fault(model: PreTrainedModel) -> str | None:
    """Return what keeps a model from being an encoder; None if nothing does."""
    body = causal_body(model) if model.base_model is not model else model
    tokens, others = (arbitrary_tokens(body, _TRIAL_TOKENS, shift=shift) for shift in (1, 2))
    edited = torch.cat([tokens[:1], others[1:2], tokens[2:]])
    padded = nn.functional.pad(tokens, (0, _PADDING), value=int(tokens[0]))
    mask = nn.functional.pad(torch.ones_like(tokens), (0, _PADDING))
    try:
        with evaluating(body):
            pairs = zip(_by_layer(body, tokens), _by_layer(body, edited), strict=True)
            blind = [n for n, (states, moved) in enumerate(pairs) if not (moved[:, 0] - states[:, 0]).abs().max() > 0]
            alone = body(input_ids=tokens[None])[0].float()
            beside = body(input_ids=padded[None], attention_mask=mask[None])[0].float()
    except Exception as error:
        if is_own_fault(error):
            raise
        return one_line(error)
    if blind:
        return f"in layer {blind[0]} a token does not see the next one"
    if not is_alike(beside[:, :_TRIAL_TOKENS], alone):
        return "the states of tokens change with padding"
    return None


def _by_layer(body: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return the states ``[1, n, D]`` of each layer, where each reads the input of the first.

    What a layer adds is then its own: no later layer sees ahead because an earlier one did.
    """
    states: list[torch.Tensor] = []
    with _same_input(layer_modules(body), states):
        body(input_ids=tokens[None])
    return states


@contextmanager
def _same_input(layers: list[nn.Module], states: list[torch.Tensor]) -> Iterator[None]:
    """Feed each layer the input of the first, and note its output."""
    first: list[torch.Tensor] = []

    def feed(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        first.append(args[0] if args else kwargs["hidden_states"])
        return ((first[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": first[0]})

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple | list) else output).float())

    handles = [layer.register_forward_pre_hook(feed, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
