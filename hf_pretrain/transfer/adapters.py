"""Adapters of peft on a stock model with a head: how they are added for fine-tuning, and merged for export."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, nearest, one_line
from hf_pretrain.files import plain
from hf_pretrain.modeling.backbone import layer_modules
from hf_pretrain.transfer.layers import head_names, head_parameters
from hf_pretrain.transfer.strategies import is_adapted

# Methods of peft that choose their modules in a way of their own.
_CHOOSE_THEMSELVES = {"IA3", "LN_TUNING", "TRAINABLE_TOKENS"}
# They need calls in training that a Trainer does not make.
_NEED_CALLS = {"ADALORA"}
# What peft calls the task of a class; it wraps the model for it, and reads it when an adapter is loaded. Its wrapper for
# questions (QUESTION_ANS) loses token types and positions, so such models have the plain one.
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers inside the layers of a model's encoder; all its linear layers in an encoder-decoder.

    Args:
        model: A stock model, with or without a head.

    Raises:
        InputError: If the encoder does not show its layers, or they have no linear layers.
    """
    base = model.base_model
    parts = [base] if getattr(model.config, "is_encoder_decoder", False) else layer_modules(base)
    inside = {id(module) for part in parts for module in part.modules()}
    names = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    ]
    if not names:
        raise InputError(f"{type(base).__name__} has no linear layers to adapt: choose another strategy")
    return names


def add_adapters(model: PreTrainedModel, args: Any) -> Any:
    """Return a model with the adapters of a strategy, inside a `peft.PeftModel`; the head is trained as a whole.

    Args:
        model: A stock model with a head.
        args: A `FineTuningArguments` with the strategy "lora", "dora" or "peft"; its `seed` draws the new weights.

    Raises:
        InputError: If the model has adapters already, peft does not take the options, or the head would not be trained.
    """
    import peft  # not at module level: it takes a second to import

    if is_adapted(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"strategy={args.strategy!r}: the model has adapters already; give the model below them")
    config = _config(model, args)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks for an old name of transformers.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        torch.manual_seed(draws.generator_seed(seed=args.seed, stream="adapters"))
        try:
            adapted = peft.get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InputError(f"strategy={args.strategy!r}: peft refuses the options: {one_line(error)}") from error
    still = [name for name in head_names(model) if not _is_trained(adapted, name)]
    if still:
        raise InputError(
            f"peft_type={config.peft_type.value} does not train the head ({', '.join(still)}): name it in modules_to_save, or "
            "choose another method"
        )
    if args.export == "merged" and not hasattr(adapted.base_model, "merge_and_unload"):
        raise InputError(
            f"export='merged': {config.peft_type.value} cannot be merged into the model's weights: set export to 'adapter'"
        )
    return adapted


def _is_trained(adapted: Any, name: str) -> bool:
    """Return whether an adapted model trains all parameters of a module, named as it was before the adapters came."""
    inner = adapted.get_base_model()
    module = inner.get_submodule(name)
    copies = getattr(module, "modules_to_save", None)
    parameters = list((module if copies is None else copies).parameters())
    return bool(parameters) and all(parameter.requires_grad for parameter in parameters)


def _config(model: PreTrainedModel, args: Any) -> Any:
    """Return peft's configuration of a strategy, with the head among what is trained as a whole."""
    import peft

    values: dict[str, Any]
    if args.strategy == "peft":
        values = _read(args.peft_config)
    else:
        values = {
            "peft_type": "LORA",
            "r": args.lora_rank,
            "lora_alpha": args.lora_alpha,
            "lora_dropout": args.lora_dropout,
        }
        values |= {"use_dora": args.strategy == "dora", "target_modules": args.lora_target_modules}
    kind = values.pop("peft_type", None)
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if str(kind) not in list(known):
        raise InputError(
            f"peft_config: peft_type={kind!r} is no method of peft: {nearest(kind, [str(plain(name)) for name in known])}"
        )
    if kind in _NEED_CALLS:
        raise InputError(
            f"peft_config: peft_type={kind!r} needs calls in training that this Trainer does not make: choose LORA"
        )
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    own = {"task_type": task, "modules_to_save": _modules_of_head(model)}
    if kind not in _CHOOSE_THEMSELVES:
        own["target_modules"] = linear_names(model)
    options = known[kind].__dataclass_fields__
    for name, value in own.items():
        if name in options and values.get(name) is None:
            values[name] = value
    try:
        return known[kind](**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"peft_config: {kind} refuses the options: {one_line(error)}") from error


def _read(config: dict[str, Any] | str) -> dict[str, Any]:
    """Return options of peft from a mapping, its JSON, or the path of a file with it."""
    if isinstance(config, dict):
        return dict(config)
    try:
        text = config if config.lstrip().startswith("{") else Path(config).read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"peft_config={config!r} is no JSON and no file with JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(
            f'peft_config={config!r} must be a mapping with a peft_type, such as \'{{"peft_type": "IA3"}}\''
        )
    return values


def _modules_of_head(model: PreTrainedModel) -> list[str]:
    """Return the names by which peft finds the head's modules: it takes every module whose name ends with one of them."""
    names, head = head_names(model), head_parameters(model)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise InputError(
                f"{type(model).__name__} has the parameter {name!r} beside its modules, which peft cannot train"
            )
        found = {inner: module for inner, module in modules.items() if inner.endswith(name)}
        inside = [other for other, module in found.items() if not head.issuperset(module.parameters())]
        if inside:
            raise InputError(
                f"peft would take {inside[0]!r} for the head's module {name!r}: name modules_to_save in peft_config"
            )
    return names


def merge_for_export(model: Any) -> PreTrainedModel:
    """Return a stock model with the adapters in its weights; the adapted model stays as it is.

    Args:
        model: A `peft.PeftModel` whose method can be merged.

    Returns:
        A copy of the model below, with the trained head.

    Raises:
        InputError: If there are no adapters, or they cannot be merged.
    """
    if not is_adapted(model):
        raise InputError(f"model={type(model).__name__} has no adapters to merge: save it as it is")
    if not hasattr(model.base_model, "merge_and_unload"):
        raise InputError(
            "the adapters cannot be merged into the model's weights: save them alone, by model.save_pretrained"
        )
    import peft

    adapted = copy.deepcopy(model)
    inner, adapter = adapted.get_base_model(), adapted.active_adapter
    # Not every method of peft puts back the modules that it trains as a whole.
    for name, module in list(inner.named_modules()):
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            inner.set_submodule(name, module.modules_to_save[adapter])
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
