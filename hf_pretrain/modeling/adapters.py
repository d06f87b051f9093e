"""Adapters of PEFT in the stock models of a composite: they are trained, and the weights below them stay as they are.

`AdapterArguments` are the options. [`add_adapters`] puts adapters into the linear layers of each model that was pre-trained
before; the class of the model stays, so that a composite finds body and head as before. An export has the adapters in its
weights ([`without_adapters`]), or is an adapter of PEFT alone ([`save_adapter`]).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, nearest
from hf_pretrain.files import plain
from hf_pretrain.modeling.embeddings import is_stand_in
from hf_pretrain.modeling.surgery.vocabulary import vocabulary_tables
from hf_pretrain.options import option

if TYPE_CHECKING:
    from peft import PeftConfig

    from hf_pretrain.modeling.base import PretrainingModel

ADAPTER = "default"
"""Name of the adapter in a model; PEFT's own."""

_ADAPTED = "adapter=lora|dora"
_NAMES_SHOWN = 8


@dataclass
class AdapterArguments:
    """Options of adapters; without them all weights are trained."""

    needs: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            *("adapter_rank", "adapter_alpha", "adapter_dropout", "adapter_targets", "adapter_modules_to_save"),
            *("adapter_train_embeddings", "adapter_first_new_token", "adapter_export"),
        ),
        _ADAPTED,
    )
    ranges: ClassVar[dict[str, str]] = {
        "adapter_rank": "[1, 65536]",
        "adapter_alpha": "(0, inf)",
        "adapter_dropout": "[0, 1)",
        "adapter_first_new_token": "[1, 16777216]",
    }

    adapter: Literal["none", "lora", "dora"] = option(
        "none", "Train adapters of PEFT beside the weights of a checkpoint, which stay as they are: lora or dora."
    )
    adapter_rank: int = option(16, "Rank of the adapters.")
    adapter_alpha: float | None = option(
        None, "The update of an adapter is multiplied by this number over the rank; by default twice the rank."
    )
    adapter_dropout: float = option(0.0, "Dropout of what an adapter reads.")
    adapter_targets: list[str] | None = option(
        None, "Ends of the names of the linear layers to adapt: query value; by default all of the body."
    )
    adapter_modules_to_save: list[str] | None = option(
        None, "Ends of the names of modules that are trained whole beside the adapters, such as LayerNorm."
    )
    adapter_train_embeddings: bool = option(
        False, "Train the word table, and what is tied to it, beside the adapters."
    )
    adapter_first_new_token: int | None = option(
        None, "Train the rows of the tokens from this id on beside the adapters: those of new words, which adapt adds."
    )
    adapter_export: Literal["merged", "adapter"] = option(
        "merged", "'merged': a stock checkpoint with the adapters in its weights; 'adapter': an adapter of PEFT alone."
    )


@dataclass
class Adapters:
    """The adapters of a composite.

    Attributes:
        parts: Attribute of a stock model in the composite -> configuration of its adapter.
        beside: Attribute -> names of parameters of that model that are trained too.
        export: Whether the root of an export is a whole model, "merged", or an "adapter".
        undecayed: Names of parameters of the composite without weight decay: it would move rows that are not trained.
    """

    parts: dict[str, PeftConfig]
    beside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    export: str = "merged"
    undecayed: tuple[str, ...] = ()


# Putting them in


def add_adapters(
    model: PretrainingModel, args: AdapterArguments, *, seed: int, peft_config: PeftConfig | None = None
) -> None:
    """Put adapters into the stock models of a composite, and freeze what was pre-trained before.

    Trained are the adapters, parameters that the checkpoint did not have, the modules that the options name, and heads of the
    composite that no stock model has. A generator that was drawn anew is trained as it is, without adapters.

    Args:
        model: The composite, changed in place. Without `adapter` and `peft_config` it stays as it is.
        args: The options.
        seed: Seed of the adapters' first values.
        peft_config: Configuration of any method of PEFT that adapts linear layers, in place of the options that describe one.

    Raises:
        InputError: If the composite takes no adapters, a name fits no module, or no loss reaches an adapter.
    """
    if args.adapter == "none" and peft_config is None:
        return
    if args.adapter != "none" and peft_config is not None:
        raise InputError(
            f"adapter={args.adapter!r} beside peft_config={type(peft_config).__name__}: leave out one of the two"
        )
    if model.refuses_adapters:
        raise InputError(
            f"adapter={args.adapter!r}: {type(model).__name__} {model.refuses_adapters}: leave it out, and train all weights"
        )
    if args.adapter_first_new_token is not None and args.adapter_export == "adapter":
        raise InputError(
            f"adapter_first_new_token={args.adapter_first_new_token}: an adapter alone has no rows for new words in its base "
            "model: set adapter_export='merged'"
        )
    model.try_out()
    unreached = set(model._frozen)
    parts = {name: part for name, part in model.backbones.items() if part is model.root or _was_loaded(part)}
    chosen = {name: _targets(model, name, part, args, unreached=unreached) for name, part in parts.items()}
    adapters = Adapters({}, export=args.adapter_export)
    # Their names are those of the stock class.
    tables = {name: vocabulary_tables(part) for name, part in parts.items()} if args.adapter_first_new_token else {}
    for name, part in parts.items():
        adapters.parts[name] = _inject(part, _config(args, peft_config, chosen[name], part), seed=seed, name=name)
        adapters.beside[name] = _beside(part, args)
    _set_trained(parts, adapters, unreached={_base_name(name) for name in unreached})
    if args.adapter_first_new_token:
        adapters.undecayed = _train_new_rows(model, tables, adapters, args.adapter_first_new_token)
    setattr(model.root, "exports_adapter", args.adapter_export == "adapter")  # noqa: B010 (no field of the stock class)
    # The configuration of a checkpoint has what `restore_adapters` needs.
    model.config.adapters = {name: plain(config.to_dict()) for name, config in adapters.parts.items()}
    model.adapters, model._frozen = adapters, ()
    _check_reached(model)


def restore_adapters(model: PretrainingModel) -> None:
    """Put the adapters back that the configuration of a checkpoint names; their values are those of its weights."""
    found: Mapping[str, Mapping[str, Any]] = getattr(model.config, "adapters", None) or {}
    if not found:
        return
    from peft import get_peft_config

    configs = {name: get_peft_config(dict(values)) for name, values in found.items()}
    for name, config in configs.items():
        config.inference_mode = False
        _inject(_part(model, name), config, seed=0, name=name)
    model.adapters = Adapters(configs)


def _was_loaded(part: PreTrainedModel) -> bool:
    """Whether a stock model was opened from a checkpoint; the loaders say then what it did not have."""
    return getattr(part, "fresh_parameters", None) is not None


def _part(model: PretrainingModel, name: str) -> PreTrainedModel:
    part = model.get_submodule(name)
    assert isinstance(part, PreTrainedModel), "backbones are stock models"
    return part


def _linear_layers(part: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers of a stock model by name; those of a stand-in for a table are no layers of the model."""
    inside = tuple(f"{name}." for name, module in part.named_modules() if is_stand_in(module))
    return {
        name: module
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_stand_in(module) and not name.startswith(inside)
    }


def _targets(
    model: PretrainingModel, attribute: str, part: PreTrainedModel, args: AdapterArguments, *, unreached: set[str]
) -> list[str]:
    """Return the names of the linear layers to adapt: those that are named, or all of the body that a loss reaches."""
    layers, tables = _linear_layers(part), _table_ids(part)
    if args.adapter_targets:
        named = [name for name in layers if any(_ends_with(name, end) for end in args.adapter_targets)]
        _check_ends(args.adapter_targets, layers, part, option="adapter_targets")
    else:
        body = {id(module) for module in part.base_model.modules()}
        named = [name for name, layer in layers.items() if id(layer) in body]
        named = [name for name in named if f"{attribute}.{name}.weight" not in unreached]
    found = [name for name in named if id(layers[name].weight) not in tables]
    if len(found) < len(named) and args.adapter_targets:
        lost = next(name for name in named if name not in found)
        raise InputError(
            f"adapter_targets={args.adapter_targets}: {lost} is the word table too: leave it out, and set "
            "adapter_train_embeddings=True to train the table"
        )
    if not found:
        raise InputError(
            f"adapter={args.adapter!r}: {type(part).__name__} has no linear layer to adapt: train all weights instead"
        )
    others = {
        id(parameter)
        for name, other in model.backbones.items()
        if name != attribute
        for parameter in other.parameters()
    }
    shared = next((name for name in found if id(layers[name].weight) in others), None)
    if shared is not None:
        raise InputError(
            f"adapter={args.adapter!r}: {shared} of {type(part).__name__} is a layer of two models, such as with "
            "embedding_sharing='full': set embedding_sharing='tied'"
        )
    return found


def _table_ids(part: PreTrainedModel) -> set[int]:
    """Return the ids of the word table and of the output layer's."""
    tables = (part.get_input_embeddings(), part.get_output_embeddings())
    return {id(table.weight) for table in tables if isinstance(getattr(table, "weight", None), nn.Parameter)}


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _check_ends(ends: Collection[str], names: Collection[str], part: PreTrainedModel, *, option: str) -> None:
    """Refuse an end of a name that fits none."""
    for end in ends:
        if not any(_ends_with(name, end) for name in names):
            last = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
            hint = nearest(end, last, otherwise=f"its names end with {', '.join(last[:_NAMES_SHOWN])}")
            raise InputError(f"{option}={end!r} is no module of {type(part).__name__}: {hint}")


def _short_names(names: Collection[str], others: Collection[str]) -> list[str]:
    """Return the ends of names behind the number of a layer, where they fit no other module, else the names themselves."""
    ends = list(dict.fromkeys(re.split(r"\.\d+\.", name)[-1] for name in names))
    if any(_ends_with(other, end) for other in others for end in ends):
        return list(names)
    return ends


def _config(
    args: AdapterArguments, given: PeftConfig | None, names: Collection[str], part: PreTrainedModel
) -> PeftConfig:
    """Return the configuration of the adapter of one stock model."""
    from peft import LoraConfig

    others = [name for name, _ in part.named_modules() if name and name not in names]
    if given is None:
        alpha = 2 * args.adapter_rank if args.adapter_alpha is None else args.adapter_alpha
        config: PeftConfig = LoraConfig(
            r=args.adapter_rank,
            # PEFT annotates an integer and divides by the rank.
            lora_alpha=cast(int, int(alpha) if float(alpha).is_integer() else alpha),
            lora_dropout=args.adapter_dropout,
            use_dora=args.adapter == "dora",
            target_modules=_short_names(names, others),
            fan_in_fan_out=any(isinstance(part.get_submodule(name), Conv1D) for name in names),
        )
    else:
        config = copy.deepcopy(given)
        for lost in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, lost, None):
                ours = "adapter_modules_to_save or adapter_train_embeddings"
                raise InputError(
                    f"peft_config: {lost} would hide tables from the heads: set {ours} of the options instead"
                )
        if getattr(config, "target_modules", None) is None:
            setattr(config, "target_modules", _short_names(names, others))  # noqa: B010 (no field of the base class)
    config.base_model_name_or_path = part.config.name_or_path or None
    return config


def _inject(part: PreTrainedModel, config: PeftConfig, *, seed: int, name: str) -> PeftConfig:
    """Put an adapter into a stock model, with first values that depend on the seed and the model's name alone."""
    from peft import inject_adapter_in_model

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws.generator_seed(0, seed=seed, stream=f"adapter/{name}"))
            inject_adapter_in_model(config, part, adapter_name=ADAPTER)
    except ValueError as error:
        raise InputError(f"{type(config).__name__} cannot adapt {type(part).__name__}: {error}") from error
    injected: PeftConfig = part.peft_config[ADAPTER]
    return injected


def _base_name(name: str) -> str:
    """Return the name of a parameter as it is without adapters."""
    return name.replace(".base_layer.", ".")


def adapter_parameters(part: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' own parameters of a model by name."""
    return {name: parameter for name, parameter in part.named_parameters() if f".{ADAPTER}" in name}


def stock_parameters(part: PreTrainedModel) -> int:
    """Return the number of parameters of a stock model, without its adapters."""
    return part.num_parameters() - sum(parameter.numel() for parameter in adapter_parameters(part).values())


def _beside(part: PreTrainedModel, args: AdapterArguments) -> tuple[str, ...]:
    """Return the names of parameters of a stock model that are trained beside its adapters."""
    modules = [name for name, _ in part.named_modules() if name]
    ends = args.adapter_modules_to_save or []
    _check_ends(ends, modules, part, option="adapter_modules_to_save")
    owners = [f"{name}." for name in modules if any(_ends_with(name, end) for end in ends)]
    fresh = set(getattr(part, "fresh_parameters", None) or ())
    table = part.get_input_embeddings()
    whole = {id(parameter) for parameter in table.parameters()} if args.adapter_train_embeddings else set()
    own = adapter_parameters(part)
    return tuple(
        name
        for name, parameter in part.named_parameters()
        if name not in own and (_base_name(name) in fresh or id(parameter) in whole or name.startswith(tuple(owners)))
    )


def _set_trained(parts: Mapping[str, PreTrainedModel], adapters: Adapters, *, unreached: set[str]) -> None:
    """Freeze the stock models but for their adapters and what is trained beside these."""
    for name, part in parts.items():
        trained = {*adapter_parameters(part), *adapters.beside[name]}
        for key, parameter in part.named_parameters():
            parameter.requires_grad_(key in trained and f"{name}.{_base_name(key)}" not in unreached)


def _train_new_rows(
    model: PretrainingModel, tables: Mapping[str, Mapping[str, int]], adapters: Adapters, first: int
) -> tuple[str, ...]:
    """Train the rows of each table over the vocabulary from the first one on; return the tables' names in the composite."""
    names: dict[int, str] = {id(parameter): key for key, parameter in model.named_parameters()}
    found = []
    for name, axes in tables.items():
        part = _part(model, name)
        parameters = dict(part.named_parameters())
        for key, axis in axes.items():
            table = parameters.get(key)
            if table is None or key in adapters.beside[name] or names[id(table)] in found:
                continue
            rows = table.shape[axis]
            if first >= rows:
                raise InputError(
                    f"adapter_first_new_token={first}: {key} of {type(part).__name__} has {rows} rows: add the words first, with "
                    "hf-pretrain adapt"
                )
            keep = torch.zeros(rows, *[1] * (table.dim() - 1 - axis), dtype=torch.bool)
            keep[first:] = True
            table.requires_grad_(True)
            table.register_hook(_Rows(keep))
            found.append(names[id(table)])
    return tuple(found)


class _Rows:
    """A hook that keeps the gradient of some rows; Adam then moves no other, where there is no weight decay."""

    def __init__(self, keep: torch.Tensor) -> None:
        self.keep = keep

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.keep.device != gradient.device:
            self.keep = self.keep.to(gradient.device)
        return torch.where(self.keep, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))


def _check_reached(model: PretrainingModel) -> None:
    """Refuse adapters that no loss reaches: the model reads the weights of a layer without calling it."""
    model.try_out()
    adapted = {f"{name}.{key}" for name in model.adapters.parts for key in adapter_parameters(_part(model, name))}
    lost = sorted(adapted & set(model._frozen))
    if lost:
        layer = lost[0].partition(f".{ADAPTER}")[0].rpartition(".")[0]
        raise InputError(
            f"adapter: {type(model).__name__} reads the weights of {layer} without its adapter: leave that layer out of "
            "adapter_targets, or train all weights"
        )


# Writing them


def without_adapters(
    part: PreTrainedModel, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the state of a stock model with its adapters in the weights, under the stock names.

    Args:
        part: The model, which stays as it is.
        state: Its full state, where the parameters in memory are shards; otherwise taken from the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = dict(part.state_dict() if state is None else state)
    for name, layer in part.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        prefix = f"{name}."
        own = {key.removeprefix(prefix): merged.pop(key) for key in [key for key in merged if key.startswith(prefix)]}
        # The copy has the values of the state in place of those in memory.
        values = {
            id(parameter): nn.Parameter(own[key].detach().clone(), requires_grad=False)
            for key, parameter in cast(nn.Module, layer).named_parameters()
        }
        whole: Any = copy.deepcopy(layer, values)
        whole.merge(adapter_names=[ADAPTER])
        merged |= {f"{prefix}{key}": value for key, value in whole.get_base_layer().state_dict().items()}
    return merged


def save_adapter(
    part: PreTrainedModel, config: PeftConfig, folder: str | Path, *, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter of a stock model as `peft.PeftModel.from_pretrained` and `load_adapter` read it.

    Args:
        part: The model.
        config: Configuration of its adapter.
        folder: Folder to write to.
        state: Full state of the model, where the parameters in memory are shards.
    """
    from peft import get_peft_model_state_dict

    whole = dict(part.state_dict() if state is None else state)
    tensors = get_peft_model_state_dict(part, state_dict=whole, adapter_name=ADAPTER, save_embedding_layers=False)
    modules = _whole_modules(part)
    for module in modules:
        tensors |= {key: value for key, value in whole.items() if key.startswith(f"{module}.")}
    saved = copy.deepcopy(config)
    saved.inference_mode = True
    if modules:
        setattr(saved, "modules_to_save", modules)  # noqa: B010 (no field of the base class)
    Path(folder).mkdir(parents=True, exist_ok=True)
    saved.save_pretrained(str(folder))
    # Tied tensors would be one in the file.
    copies = {f"base_model.model.{key}": value.detach().cpu().clone() for key, value in tensors.items()}
    save_file(copies, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def _whole_modules(part: PreTrainedModel) -> list[str]:
    """Return the modules of which an adapter holds all parameters: those trained beside it, and those tied to them."""
    own = adapter_parameters(part)
    trained = [name for name, parameter in part.named_parameters() if parameter.requires_grad and name not in own]
    tied = [target for target, source in part.all_tied_weights_keys.items() if source in trained]
    owners = {name.rpartition(".")[0] for name in (*trained, *tied)}
    return sorted(
        name for name in owners if not any(name.startswith(f"{other}.") for other in owners if other != name)
    )
