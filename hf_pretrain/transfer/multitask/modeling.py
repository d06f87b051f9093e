"""One encoder and a stock head for each task.

The model of a task is a stock one, such as `BertForSequenceClassification`, whose encoder is the shared one. So its forward pass,
its loss and its checkpoint are transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.evaluation.suite.adapters import open_encoder
from hf_pretrain.files import share_weights
from hf_pretrain.modeling.base import ModelOfModels
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig
from hf_pretrain.modeling.loading import from_config
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec
from hf_pretrain.training.output_folder import is_name_of_a_run
from hf_pretrain.transfer.tuning.heads import ChosenHead, open_for_task

_NAMES = re.compile(r"(?!checkpoint-)[A-Za-z0-9][A-Za-z0-9_-]*")
# Parts of what a task has of its own that are no modules of the stock model itself: DeBERTa has another pooler in its head.
_LOSS_WEIGHT, _OWN_POOLER = "loss_weight", "encoder_pooler"
_POOLER = "pooler"
# transformers' mark of a model whose modules record their outputs.
_RECORDS = "_output_capturing_hooks_installed"


@strict
class MultiTaskConfig(CompositeConfig):
    """Configuration of [`MultiTaskModel`].

    Attributes:
        encoder: Configuration of the shared encoder.
        tasks: Of each task its `name`, the Auto class of its model, `auto_class`, and the configuration of that model, `config`.
        loss_weights: Factor of the loss of each task; 1 where there is none.
        learns_loss_weights: Whether each task has a learned weight.
    """

    model_type = "hf_pretrain_multitask"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012

    encoder: SubModelConfig = None
    tasks: list[dict[str, Any]] | None = None
    loss_weights: dict[str, float] | None = None
    learns_loss_weights: bool = False

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks in their order."""
        return [entry["name"] for entry in self.tasks or ()]


@dataclass
class MultiTaskOutput(ModelOutput):
    """Output of [`MultiTaskModel`].

    Attributes:
        loss: The loss of the task, times its weight in training.
        logits: What the head of the task returns; None of spans.
        start_logits: ``[B, L]`` of spans.
        end_logits: ``[B, L]`` of spans.
        unweighted_loss: In training, the loss without its weight and without a gradient.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    unweighted_loss: torch.Tensor | None = None


class LearnedLossWeight(nn.Module):
    """The weight of a loss by the uncertainty of its task, which is learned: ``c * exp(-s) * loss + s / 2``.

    s is the logarithm of a variance; c is 1/2 for a squared error, and 1 for a cross-entropy.

    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", equations 7 and 10.
    """

    def __init__(self, *, is_regression: bool) -> None:
        super().__init__()
        self.factor = 0.5 if is_regression else 1.0
        self.log_variance = nn.Parameter(torch.zeros(1))

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the weighted loss."""
        s = self.log_variance[0]
        return self.factor * torch.exp(-s) * loss + s / 2


class TaskHeads(nn.Module):
    """The heads of the tasks by name: of each the modules of its stock model that are not the encoder's, and its pooler."""

    def __init__(self, heads: Mapping[str, Mapping[str, nn.Module]]) -> None:
        super().__init__()
        for task, modules in heads.items():
            if hasattr(self, task):
                raise InputError(f"task {task!r}: a module of torch has something of that name: choose another")
            self.add_module(task, nn.ModuleDict(dict(modules)))


class MultiTaskModel(ModelOfModels):
    """A shared encoder with a stock head for each task.

    The layers and the embeddings are the same for all tasks. A pooler is made for a task, as that of BERT, so each task whose
    stock model has one has its own; the encoder keeps the one it came with.

    Build it by `from_tasks`. `from_pretrained` opens what a checkpoint of a run holds; `export` writes stock checkpoints.

    Args:
        config: The configuration.
        encoder: The encoder; built from the configuration when not given.
        models: The stock model of each task, whose head is taken; built from the configuration when not given.

    Attributes:
        encoder: The shared encoder, as `AutoModel` opens it.
        heads: What each task has of its own.

    Raises:
        InputError: If the name of a task cannot be that of a folder, or the model of a task has another encoder.
    """

    config_class = MultiTaskConfig
    base_model_prefix = "encoder"

    def __init__(
        self,
        config: MultiTaskConfig,
        encoder: PreTrainedModel | None = None,
        models: Mapping[str, PreTrainedModel] | None = None,
    ) -> None:
        super().__init__(config)
        if not config.tasks:
            raise InputError("tasks is empty: a multi-task model needs one task or more")
        for task in config.task_names:
            if _NAMES.fullmatch(task) is None:
                raise InputError(f"task {task!r} names a folder of the export: use letters, digits, _ and -")
            if is_name_of_a_run(task):
                raise InputError(f"task {task!r} has the name of a folder that each run writes: call it otherwise")
        self.encoder = from_config(AutoModel, cast(Any, config.encoder)) if encoder is None else encoder
        if models is None:
            models = {entry["name"]: _build(entry) for entry in config.tasks}
        if list(models) != config.task_names:
            raise InputError(f"models={list(models)} must be those of the tasks, {', '.join(config.task_names)}")
        self._check_weights()
        self.heads = TaskHeads({task: self._head_of(task, model) for task, model in models.items()})
        # Not registered: their modules are those above.
        self._models: dict[str, PreTrainedModel] = dict(models)
        for model in models.values():
            setattr(model.base_model, _RECORDS, getattr(self.encoder, _RECORDS, False))
        pooler = getattr(self.encoder, _POOLER, None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)
        for task in self._models:
            self.task_model(task)
        self.post_init()

    @classmethod
    def from_tasks(
        cls,
        name_or_path: str,
        tasks: Mapping[str, TaskData],
        *,
        seed: int = 0,
        loss_weights: Mapping[str, float] | None = None,
        learns_loss_weights: bool = False,
        architecture: str | None = None,
        architecture_options: Mapping[str, Any] | None = None,
        mix_layers: bool = False,
        task_architectures: Mapping[str, Any] | None = None,
    ) -> MultiTaskModel:
        """Open an encoder, and give it a head for each task: the one that it came with, or a fresh one for other labels.

        Args:
            name_or_path: Folder or repository of the encoder.
            tasks: The tasks by name.
            seed: Seed of the heads; that of a task depends on its name, not on the other tasks.
            loss_weights: Factor of the loss of each task; 1 where there is none.
            learns_loss_weights: Learn them instead, see [`LearnedLossWeight`].
            architecture: What stands on top of the encoder for each task, such as "bilstm", see [`TaskHeadConfig`]; by default a
                stock head.
            architecture_options: Its options.
            mix_layers: Whether it reads a learned mean of all layers; each task has a mean of its own.
            task_architectures: Other architectures of some tasks, see [`check_heads`].

        Raises:
            InputError: If the encoder cannot be opened, a task has no stock head for it, or an architecture does not fit one.
        """
        heads = check_heads(
            {task: data.spec for task, data in tasks.items()},
            architecture=architecture,
            architecture_options=architecture_options,
            mix_layers=mix_layers,
            task_architectures=task_architectures,
        )
        encoder = open_encoder(name_or_path)
        models = {}
        for task, data in tasks.items():
            own = draws.generator_seed(seed=seed, stream=f"head of {task}")
            with torch.random.fork_rng():
                torch.manual_seed(own)
                models[task] = open_for_task(name_or_path, data, seed=own, **heads[task].arguments()).model
        config = MultiTaskConfig(
            encoder=encoder.config,
            tasks=[
                {"name": task, "auto_class": tasks[task].auto_class.__name__, "config": model.config.to_dict()}
                for task, model in models.items()
            ],
            loss_weights=dict(loss_weights or {}),
            learns_loss_weights=learns_loss_weights,
        )
        return cls(config, encoder, models)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self._models)

    def task_model(self, task: str) -> PreTrainedModel:
        """Return the stock model of a task; its weights are those of this model.

        Raises:
            InputError: If there is no such task.
        """
        if task not in self._models:
            raise InputError(f"task={task!r} must be one of {', '.join(self._models)}")
        model, head = self._models[task], self.head(task)
        body: Any = model.base_model
        for name, module in head.items():
            if name not in (_LOSS_WEIGHT, _OWN_POOLER):
                model._modules[name] = module
        # An adapter may have replaced modules since.
        for name, module in self.encoder._modules.items():
            body._modules[name] = body._modules.get(name) if name == _POOLER else module
        if _OWN_POOLER in head:
            body._modules[_POOLER] = head[_OWN_POOLER]
        body._parameters, body._buffers = self.encoder._parameters, self.encoder._buffers
        # The layers are shared: one model after the other would make each record its output once more.
        records = any(getattr(each, _RECORDS, False) for each in (self.encoder, *self._bodies()))
        setattr(body, _RECORDS, records)
        model.training, body.training = self.training, self.encoder.training
        return model

    def _bodies(self) -> list[PreTrainedModel]:
        return [model.base_model for model in self._models.values()]

    def head(self, task: str) -> nn.ModuleDict:
        """Return the modules that a task has of its own; those that are trained, where an adapter has made copies."""
        heads: Any = self.heads
        copies = getattr(heads, "modules_to_save", None)
        if copies is not None:
            heads = copies[heads.active_adapter if isinstance(heads.active_adapter, str) else heads.active_adapter[0]]
        return cast(nn.ModuleDict, heads.get_submodule(task))

    def forward(self, task: str, **inputs: Any) -> MultiTaskOutput:
        """Return the loss and the logits of a task.

        Args:
            task: Name of the task.
            **inputs: Inputs of its stock model.
        """
        outputs = self.task_model(task)(**inputs)
        found = {name: outputs.get(name) for name in ("logits", "start_logits", "end_logits")}
        loss = outputs.get("loss")
        if loss is None or not self.training:
            return MultiTaskOutput(loss=loss, **found)
        head, weight = self.head(task), (self.config.loss_weights or {}).get(task, 1.0)
        weighted = head[_LOSS_WEIGHT](loss) if _LOSS_WEIGHT in head else loss if weight == 1.0 else weight * loss
        return MultiTaskOutput(loss=weighted, unweighted_loss=loss.detach(), **found)

    def export(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write stock checkpoints: the encoder into a folder, and the model of each task into a folder of its name below.

        Args:
            folder: Made if need be.
            tokenizer: Written beside each.
        """
        parts = {"": self.encoder} | {task: self.task_model(task) for task in self._models}
        for name, part in parts.items():
            part.save_pretrained(Path(folder, name))
            share_weights(Path(folder, name))
            if tokenizer is not None:
                tokenizer.save_pretrained(Path(folder, name))

    def _head_of(self, task: str, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the modules of a stock model that are a task's own."""
        body = model.base_model
        if type(body) is not type(self.encoder) or body is model:
            raise InputError(
                f"task {task!r}: {type(model).__name__} has a {type(body).__name__} inside, and the shared encoder is a "
                f"{type(self.encoder).__name__}: leave this type of task out, or choose another architecture"
            )
        own = [name for name, _ in model.named_parameters(recurse=False)]
        if own:
            raise InputError(f"task {task!r}: {type(model).__name__} has the parameter {own[0]} beside its modules")
        head = {name: module for name, module in model.named_children() if module is not body}
        pooler = getattr(body, _POOLER, None)
        if isinstance(pooler, nn.Module):
            head[_OWN_POOLER] = pooler
        if cast(MultiTaskConfig, self.config).learns_loss_weights:
            is_regression = getattr(model.config, "problem_type", None) == "regression"
            head[_LOSS_WEIGHT] = LearnedLossWeight(is_regression=is_regression)
        return head

    def _check_weights(self) -> None:
        config = cast(MultiTaskConfig, self.config)
        for task, weight in (config.loss_weights or {}).items():
            if task not in config.task_names:
                raise InputError(f"loss_weights names {task!r}, which is none of {', '.join(config.task_names)}")
            check_range(weight, "(0, inf)", name=f"loss_weights of {task}")
        if config.loss_weights and config.learns_loss_weights:
            raise InputError(
                f"loss_weights={config.loss_weights} has no effect where weights are learned: leave it out"
            )

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module anew in the encoder's way."""
        if not isinstance(module, LearnedLossWeight):
            cast(Any, self.encoder)._init_weights(module)


def check_heads(
    specs: Mapping[str, TaskSpec],
    *,
    strategy: str = "",
    task_architectures: Mapping[str, Any] | None = None,
    **head: Any,
) -> dict[str, ChosenHead]:
    """Return the head of each task, and refuse an architecture that does not fit its task.

    Args:
        specs: The tasks by name.
        strategy: The strategy of the training, if it is known.
        task_architectures: The heads of some tasks by their names: the name of an architecture, such as "pair_encoder", or a
            mapping with `architecture`, `architecture_options` and `mix_layers`, or None for a stock head.
        **head: `architecture`, `architecture_options` and `mix_layers` of all other tasks, as of `open_for_task`.

    Returns:
        The head of each task by its name.

    Raises:
        InputError: If a task is unknown, an architecture does not fit its task, or one is left without a task.
    """
    common, own = ChosenHead.of(**head), dict(task_architectures or {})
    for task in own:
        check_choice(task, specs, name="the task of task_architectures")
    if common.architecture is not None and specs and set(own) == set(specs):
        raise InputError(
            f"architecture={common.architecture!r} has no effect: task_architectures names all tasks; leave one of the two out"
        )
    heads = {}
    for task, spec in specs.items():
        try:
            heads[task] = _head_from(own[task]) if task in own else common
            heads[task].check(spec, strategy=strategy if heads[task].architecture is not None else "")
        except InputError as error:
            # One architecture for all is the wrong option where tasks need different ones.
            others = len(specs) > 1 and task not in own
            cure = "; --task_architectures gives one to some tasks alone" if others else ""
            raise InputError(f"task {task!r}: {error}{cure}") from error
    return heads


def _head_from(value: Any) -> ChosenHead:
    """Return a head from its entry in `task_architectures`."""
    if value is None or isinstance(value, str):
        return ChosenHead.of(architecture=value)
    kinds: dict[str, Any] = {"architecture": str, "architecture_options": Mapping, "mix_layers": bool}
    is_known = isinstance(value, Mapping) and "architecture" in value and not set(value) - set(kinds)
    if not is_known or not all(isinstance(entry, kinds[name]) for name, entry in value.items()):
        raise InputError(
            f"task_architectures has {value!r}: give the name of an architecture, null for the stock head, or "
            '{"architecture": NAME, "architecture_options": {...}, "mix_layers": true}'
        )
    return ChosenHead.of(**value)


def _build(entry: Mapping[str, Any]) -> PreTrainedModel:
    """Return the stock model of a task from its configuration, with random weights."""
    config = AutoConfig.for_model(**entry["config"])
    return cast(PreTrainedModel, from_config(getattr(transformers, entry["auto_class"]), config))
