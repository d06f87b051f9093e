"""Fine-tuning a stock model with layer-wise learning rates: the nearer a layer is to the input, the less it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.modeling.backbone import layers_name, module_lists
from hf_pretrain.options import option

DecayMode = Literal["paper", "official"]


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
    depths, top = _parameter_depths(model)
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


def _parameter_depths(model: PreTrainedModel) -> tuple[dict[nn.Parameter, int], int]:
    """Return the depth of each parameter, 0 for the embeddings and 1 to L for the layers, and the head's, L + 1."""
    base = model.base_model
    layers = layers_name(base)
    if layers is None:
        lists = [f"{name} of {len(modules)}" for name, modules in module_lists(base).items()]
        raise InputError(f"{_refusal(base)}; this one has {', '.join(lists) or 'no list of modules'}: set it to 1")
    top = len(base.get_submodule(layers)) + 1
    below = _names_below_layers(base, layers)
    depths: dict[nn.Parameter, int] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        is_in_layer = name.startswith(f"{layers}.")
        depth = int(name[len(layers) + 1 :].split(".")[0]) + 1 if is_in_layer else 0 if name in below else top
        if is_in_layer and depths.get(parameter, depth) not in (0, depth):
            raise InputError(f"{_refusal(base)}, but these share the weight {name!r}: set it to 1")
        depths[parameter] = min(depth, depths.get(parameter, depth))
    return {parameter: depths.get(parameter, top) for parameter in model.parameters()}, top


def _refusal(base: PreTrainedModel) -> str:
    count = base.config.num_hidden_layers
    return (
        f"layerwise_learning_rate_decay needs the {count} layers of {type(base).__name__} as {count} modules in a list"
    )


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


@dataclass
class FineTuningArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the learning rates of each layer, and ELECTRA's defaults.

    Those are the ones of its small and base models; the large one takes a learning rate of 5e-5 and a decay of 0.9. Ten epochs
    instead of three where there are few examples (RTE, STS-B).

    Source: `configure_finetuning.py` of the official ELECTRA code.
    """

    layerwise_learning_rate_decay: float = option(
        0.8, "Factor of the learning rate from one layer to the one below; 1 for none."
    )
    layerwise_decay_mode: DecayMode = option(
        "paper", "'paper': the last layer's rate is the head's times the factor; 'official': times its square."
    )
    learning_rate: float = option(1e-4, "Peak learning rate, that of the head.")
    weight_decay: float = option(0.01, "Decoupled weight decay of all but biases and norms.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or their share of all steps if below 1.")
    num_train_epochs: float = option(3.0, "Passes over the examples.")
    per_device_train_batch_size: int = option(32, "Examples a step and device.")

    def __post_init__(self) -> None:
        """Check the decay, then let transformers check the rest."""
        check_decay(self.layerwise_learning_rate_decay, self.layerwise_decay_mode)
        super().__post_init__()


class FineTuningTrainer(Trainer):
    """The stock Trainer with a learning rate for each layer.

    The gradient is the mean over micro-batches and processes, however many they are: stock heads return a mean, which the stock
    Trainer takes for one that is divided by the whole step's count already.

    Args:
        model: A stock model with a head.
        args: A [`FineTuningArguments`].
        **kwargs: Other arguments of `transformers.Trainer`; an optimizer that is passed here keeps the rates that it has.
    """

    def __init__(self, model: nn.Module, args: FineTuningArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return the stock optimizer, to be made with the groups of the layers."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.layerwise_learning_rate_decay == 1:
            return optimizer, kwargs
        if {"params", "model", "optimizer_dict"} & set(kwargs):
            raise InputError(
                f"optim={args.optim.value} groups parameters in a way of its own: take another, such as adamw_torch, or set "
                "layerwise_learning_rate_decay to 1"
            )
        # A Trainer takes these for its own two groups.
        kwargs["params"] = layerwise_parameter_groups(
            model,
            learning_rate=args.learning_rate,
            decay=args.layerwise_learning_rate_decay,
            mode=args.layerwise_decay_mode,
            weight_decay=args.weight_decay,
        )
        return optimizer, kwargs
