"""The parts of a model that are tuned apart: the embeddings, each layer, and the head.

`parameter_depths` numbers them, `layerwise_parameter_groups` gives each a learning rate, `reinitialise_layers` draws the last
ones anew, and `head_names` says which modules are the head.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.modeling.backbone import layers_name, module_lists

DecayMode = Literal["paper", "official"]

_CURE = "set layerwise_learning_rate_decay to 1, and choose a strategy that treats the encoder as one"


def layerwise_parameter_groups(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    decay: float,
    mode: DecayMode = "paper",
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return parameter groups whose learning rate falls by a factor a layer, from the head down to the embeddings.

    With L layers the head, and what the base model has behind its layers, learns at the full rate. In the mode "paper" the last
    layer's rate is multiplied by `decay`, the one's below by `decay ** 2`, ..., the embeddings' by `decay ** (L + 1)`. The mode
    "official" is what the code of ELECTRA does: one power more for all but the head (0.64, not 0.8, for the last layer).

    Each trainable parameter is in exactly one group; one that is shared, such as a tied output matrix, goes with the lowest
    layer that it serves. Norms and biases are not decayed.

    Args:
        model: A stock model with a head.
        learning_rate: The head's rate.
        decay: Factor from one layer to the one below, above 0 and at most 1.
        mode: "paper" or "official".
        weight_decay: Weight decay of all but norms and biases.

    Returns:
        Groups for an optimizer, with `params`, `lr` and `weight_decay`; the head's come first, because a Trainer logs the rate
        of the first.

    Raises:
        InputError: If a value is out of range, or the model's layers are not one list of modules with weights of their own.

    Source: Clark et al. 2020, "ELECTRA", appendix B; `_get_layer_lrs` in `model/optimization.py` of the official code.
    """
    check_decay(decay, mode)
    depths, top = parameter_depths(model)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and not name.endswith("bias")
            members.setdefault((depths[parameter], is_decayed), []).append(parameter)
    skipped = 1 if mode == "official" else 0
    return [
        {
            "params": parameters,
            "lr": learning_rate * (1.0 if depth == top else decay ** (top - depth + skipped)),
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for (depth, is_decayed), parameters in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]


def check_decay(decay: float, mode: str) -> None:
    """Raise InputError if there is no such decay or mode."""
    usual = "0.8 is usual, 1 is one rate for all"
    check_range(decay, "(0, 1]", name="layerwise_learning_rate_decay", hint=usual)
    check_choice(mode, get_args(DecayMode), name="layerwise_decay_mode")


def parameter_depths(model: PreTrainedModel) -> tuple[dict[nn.Parameter, int], int]:
    """Return the depth of each parameter, 0 for the embeddings and 1 to L for the layers, and the head's, L + 1.

    What the base model has behind its layers, such as a pooler or a last norm, has the head's depth.

    Args:
        model: A stock model, with or without a head; its layers may hold adapters.

    Raises:
        InputError: If the layers are not one list of modules with weights of their own.
    """
    base = model.base_model
    layers = layers_name(base)
    if layers is None:
        lists = [f"{name} of {len(modules)}" for name, modules in module_lists(base).items()]
        raise InputError(f"{_refusal(base)}; this one has {', '.join(lists) or 'no list of modules'}: {_CURE}")
    top = len(base.get_submodule(layers)) + 1
    below = _names_below_layers(base, layers)
    depths: dict[nn.Parameter, int] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        is_in_layer = name.startswith(f"{layers}.")
        depth = int(name[len(layers) + 1 :].split(".")[0]) + 1 if is_in_layer else 0 if name in below else top
        if is_in_layer and depths.get(parameter, depth) not in (0, depth):
            raise InputError(f"{_refusal(base)}, but these share the weight {name!r}: {_CURE}")
        depths[parameter] = min(depth, depths.get(parameter, depth))
    return {parameter: depths.get(parameter, top) for parameter in model.parameters()}, top


def has_layers(model: PreTrainedModel) -> bool:
    """Return whether a model's layers are one list of modules with weights of their own, as rates by layer need them."""
    try:
        parameter_depths(model)
    except InputError:
        return False
    return True


def _refusal(base: PreTrainedModel) -> str:
    count = base.config.num_hidden_layers
    return f"what is set for each layer needs the {count} layers of {type(base).__name__} as {count} modules in a list"


def _names_below_layers(base: PreTrainedModel, layers: str) -> set[str]:
    """Return the names of the parameters that serve the layers' input: embeddings, projections, relative positions.

    They are registered before the layers. A table that comes after them, such as that of relative positions, belongs here as
    well, and so does what stands beside it in a module of the base model's: its norm in DeBERTa.
    """
    outside = [name for name, _ in base.named_modules() if not f"{name}.".startswith(f"{layers}.")]
    tables = [name for name in outside if isinstance(base.get_submodule(name), nn.Embedding)]
    names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    first = next(index for index, name in enumerate(names) if name.startswith(f"{layers}."))
    later = [name for name in names[first:] if not name.startswith(f"{layers}.")]
    late_tables = [table for table in tables if f"{table}.weight" in later]
    modules = tuple(f"{table.rpartition('.')[0] or table}." for table in late_tables)
    return {*names[:first], *(name for name in later if name.startswith(modules))}


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules and parameters that are a model's head: what is not its encoder.

    That is all beside the base model, and the base model's pooler, which is made for a task.

    Args:
        model: A stock model.

    Returns:
        Names of modules with parameters, the outermost ones, and of parameters that stand by themselves; none without a head.
    """
    base = model.base_model
    names = [name for name, module in model.named_children() if module is not base and _has_parameters(module)]
    names += [name for name, _ in model.named_parameters(recurse=False)] if base is not model else []
    if base is model:
        names = []
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Module) and _has_parameters(pooler):
        names.append(next(name for name, module in model.named_modules() if module is pooler))
    return names


def head_parameters(model: PreTrainedModel) -> set[nn.Parameter]:
    """Return the parameters of the head; a parameter that both have, such as a tied word table, belongs to the encoder."""
    names = tuple(f"{name}." for name in head_names(model))
    named = [(f"{name}.".startswith(names), each) for name, each in model.named_parameters(remove_duplicate=False)]
    encoder = {parameter for is_head, parameter in named if not is_head}
    return {parameter for is_head, parameter in named if is_head} - encoder


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def reinitialise_layers(model: PreTrainedModel, number: int, *, seed: int) -> None:
    """Draw the weights of the last layers anew, in the way that the architecture draws those of a new model.

    The last layers of a pre-trained encoder serve its pre-training; with few examples, fresh ones often do better.

    Args:
        model: A stock model.
        number: How many layers, from the last one down.
        seed: Seed of the draws: the same weights in every process.

    Raises:
        InputError: If the model has fewer layers, or its layers are not one list of modules.

    Source: Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning", section 5.
    """
    depth = parameter_depths(model)[1] - 1
    if not 1 <= number <= depth:
        raise InputError(f"reinit_layers={number} must be from 1 to {depth}, the number of the model's layers")
    layers = list(model.base_model.get_submodule(str(layers_name(model.base_model))).children())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(draws.generator_seed(seed=seed, stream="reinitialised layers"))
        for layer in layers[depth - number :]:
            for parameter in layer.parameters():
                # transformers leaves weights with this mark as they are: those that were read from a file.
                setattr(parameter, "_is_hf_initialized", False)  # noqa: B010 (no attribute that the type knows)
            layer.apply(cast(Any, model)._init_weights)
