"""The model of a task: an encoder with transformers' own head, kept from the checkpoint or drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.loading import from_config, from_pretrained, refuse_type
from hf_pretrain.tasks.labelled import TaskData

_USUAL_LENGTHS = {"span": 384}
_USUAL_LENGTH = 128
_OF_A_HEAD = ("id2label", "label2id", "num_labels", "problem_type", "architectures")


class OpenedModel(NamedTuple):
    """A model with the head of a task.

    Attributes:
        model: The model.
        note: What became of the head, in one line.
        fresh: Names of the parameters that were drawn anew.
    """

    model: PreTrainedModel
    note: str
    fresh: tuple[str, ...]


def open_for_task(name_or_path: str, data: TaskData, *, seed: int = 0) -> OpenedModel:
    """Open a checkpoint with the stock head of a task.

    A head that the checkpoint has for the same labels in the same order is kept. Otherwise its encoder alone is taken, and the
    head is drawn anew: so the output of one task is the beginning of another.

    Args:
        name_or_path: The checkpoint: a folder, or a name on the Hub.
        data: The task.
        seed: Seed of a fresh head: the same weights in every process.

    Returns:
        The model, its weights in float32.

    Raises:
        InputError: If the checkpoint cannot be opened, or its architecture has no head of this kind.
    """
    config = from_pretrained(AutoConfig, name_or_path)
    mapping = data.auto_class._model_mapping
    if type(config) not in mapping:
        raise refuse_type(config.model_type, data.auto_class)
    wanted = mapping[type(config)]
    classes = wanted if isinstance(wanted, Sequence) else [wanted]
    had = next(iter(getattr(config, "architectures", None) or ()), "")
    is_same_class = had in [each.__name__ for each in classes]
    if _has_head(config, data):
        model = from_pretrained(data.auto_class, name_or_path, **data.head_options())
        fresh = tuple(getattr(model, "fresh_parameters", ()))
        if not fresh:
            return OpenedModel(model, f"{type(model).__name__}, with the head that the checkpoint has", ())
        return OpenedModel(model, _fresh_note(model, fresh), fresh)
    model, fresh = _with_fresh_head(name_or_path, config, data, seed=seed)
    note = _fresh_note(model, fresh)
    if is_same_class:
        note += f": the checkpoint's is for {_shown(_names(config))}, not for {_shown(data.labels or ['values'])}"
    return OpenedModel(model, note, fresh)


def check_head(name_or_path: str, data: TaskData) -> None:
    """Refuse a checkpoint whose head is not for the labels of a task, in the same order.

    Args:
        name_or_path: The checkpoint.
        data: The task.

    Raises:
        InputError: Naming the labels of both.
    """
    config = from_pretrained(AutoConfig, name_or_path)
    wanted = data.labels or (["values"] if data.spec.type == "regression" else [data.spec.type])
    if not _has_head(config, data):
        had = next(iter(getattr(config, "architectures", None) or ()), "no class that its configuration names")
        raise InputError(
            f"model={name_or_path!r} has no head for task {data.spec.name!r}: it is {had} of {_shown(_names(config))}, and the "
            f"task has {_shown(wanted)}: name a model that was fine-tuned on it, or list its labels in a YAML file of the task"
        )


def _has_head(config: PreTrainedConfig, data: TaskData) -> bool:
    """Whether a checkpoint has the stock head of a task, for the same labels in the same order."""
    mapping = data.auto_class._model_mapping
    wanted = mapping[type(config)] if type(config) in mapping else ()
    classes = wanted if isinstance(wanted, Sequence) else [wanted]
    had = next(iter(getattr(config, "architectures", None) or ()), "")
    return had in [each.__name__ for each in classes] and _labels_agree(config, data)


def _labels_agree(config: PreTrainedConfig, data: TaskData) -> bool:
    if data.spec.type in ("choice", "span"):
        return True
    is_regression = getattr(config, "problem_type", None) == "regression"
    if data.spec.type == "regression":
        return config.num_labels == 1 and is_regression
    return not is_regression and _names(config) == data.labels


def _names(config: PreTrainedConfig) -> list[str]:
    """Return the names of the classes of a checkpoint's head in their order."""
    if getattr(config, "problem_type", None) == "regression":
        return ["values"]
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _fresh_note(model: PreTrainedModel, fresh: Sequence[str]) -> str:
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in fresh))
    return f"{type(model).__name__}, with a fresh head ({_shown(modules)})"


def _with_fresh_head(
    name_or_path: str, config: PreTrainedConfig, data: TaskData, *, seed: int
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the encoder of a checkpoint below a fresh head, and the names of what is fresh."""
    encoder = from_pretrained(AutoModel, name_or_path, announce=False)
    options = data.head_options()
    # The names of another head would contradict the number of this one's classes.
    known = {name: value for name, value in config.to_dict().items() if name not in _OF_A_HEAD}
    config = type(config).from_dict(known | options)
    with torch.random.fork_rng():
        torch.manual_seed(draws.generator_seed(seed=seed, stream="fresh head"))
        model: PreTrainedModel = from_config(data.auto_class, config)
    base = model.base_model
    weights, lost = encoder.state_dict(), set(getattr(encoder, "fresh_parameters", ()))
    weights = {name: tensor for name, tensor in weights.items() if name not in lost}
    own = base.state_dict()
    body = {name for name in own if name in weights}
    if not body or any(own[name].shape != weights[name].shape for name in body):
        raise InputError(
            f"{name_or_path!r}: {type(base).__name__} below {type(model).__name__} is not the {type(encoder).__name__} of the "
            "checkpoint: name a checkpoint of an encoder"
        )
    base.load_state_dict({name: weights[name] for name in body}, strict=False)
    taken = {id(tensor) for name, tensor in base.named_parameters(remove_duplicate=False) if name in body}
    fresh = tuple(name for name, tensor in model.named_parameters() if id(tensor) not in taken)
    model.config.name_or_path = name_or_path
    return model, fresh


def name_labels(model: PreTrainedModel, data: TaskData) -> None:
    """Let a live model's configuration name the labels of a task, so that its export does.

    Raises:
        InputError: If its head is for another number of labels.
    """
    options = data.head_options()
    if options and getattr(model.config, "num_labels", options["num_labels"]) != options["num_labels"]:
        raise InputError(
            f"model={type(model).__name__} has num_labels={model.config.num_labels}, and task {data.spec.name!r} has "
            f"{options['num_labels']}: open it with num_labels={options['num_labels']}"
        )
    for name, value in options.items():
        setattr(model.config, name, value)


def settle_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a decoder know the padding token, by which it finds the last token of a text.

    Raises:
        InputError: If the tokenizer has none.
    """
    if tokenizer.pad_token_id is None:
        raise InputError(
            "the tokenizer has no padding token: set one, such as tokenizer.pad_token = tokenizer.eos_token, and save it with "
            "the model"
        )
    if getattr(model.config, "pad_token_id", None) is None:
        cast(Any, model.config).pad_token_id = tokenizer.pad_token_id


def settle_length(max_length: int | None, model: PreTrainedModel, data: TaskData) -> int:
    """Return the most tokens of an example: what is asked, or what is usual and the model takes.

    Raises:
        InputError: If the model takes fewer than are asked.
    """
    longest = longest_sequence(model.base_model)
    if max_length is None:
        usual = _USUAL_LENGTHS.get(data.spec.type, _USUAL_LENGTH)
        return usual if longest is None else min(usual, longest)
    if longest is not None and max_length > longest:
        raise InputError(f"max_length={max_length}: {type(model).__name__} takes at most {longest} tokens; lower it")
    return max_length
