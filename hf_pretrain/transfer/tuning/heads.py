"""The model of a task: an encoder below transformers' own head, or below an architecture of `models/task_heads/`.

The head is kept from the checkpoint, or drawn anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, nearest, one_line
from hf_pretrain.evaluation.suite.adapters import open_config, open_encoder, read_adapter
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.loading import from_config, from_pretrained, refuse_type
from hf_pretrain.models.task_heads.architectures_task_heads import (
    Architecture,
    architectures,
    find_architecture,
    options_of,
)
from hf_pretrain.models.task_heads.configuration_task_heads import TaskHeadConfig
from hf_pretrain.models.task_heads.modeling_task_heads import (
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
)
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec

_USUAL_LENGTHS = {"span": 384}
_USUAL_LENGTH = 128
GROUP = "hf_pretrain.architectures"
"""Entry points under which installed packages register architectures of their own."""
# The models with an architecture on top, and what its logits are of.
_WITH_ARCHITECTURE: dict[str, tuple[Any, str]] = {
    "classification": (EncoderForSequenceClassification, "texts"),
    "regression": (EncoderForSequenceClassification, "texts"),
    "tokens": (EncoderForTokenClassification, "tokens"),
}
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


@dataclass(frozen=True)
class ChosenHead:
    """The head that is asked for.

    Attributes:
        architecture: Name of an architecture; None for the head that the checkpoint has, or else a stock one.
        options: Its options.
        mix_layers: Whether it reads a learned mean of all layers.
    """

    architecture: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    mix_layers: bool = False

    @classmethod
    def of(
        cls,
        *,
        architecture: str | None = None,
        architecture_options: Mapping[str, Any] | None = None,
        mix_layers: bool = False,
    ) -> ChosenHead:
        """Return the head of three options.

        Raises:
            InputError: If there is no architecture that the others could be of.
        """
        if architecture is None and (architecture_options or mix_layers):
            name = "architecture_options" if architecture_options else "mix_layers"
            raise InputError(
                f"{name}={architecture_options or mix_layers} has no effect without architecture: name one, or leave it out"
            )
        return cls(architecture, dict(architecture_options or {}), mix_layers)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `open_for_task` that ask for it."""
        return {
            "architecture": self.architecture,
            "architecture_options": dict(self.options),
            "mix_layers": self.mix_layers,
        }

    @property
    def reads_apart(self) -> bool:
        """Whether it reads two texts apart, as "pair_encoder" does."""
        known = architectures().get(str(self.architecture))
        return known is not None and known.reads_pairs

    @classmethod
    def of_config(cls, config: TaskHeadConfig) -> ChosenHead:
        """Return the head that a checkpoint has."""
        return cls(config.architecture, dict(config.architecture_options or {}), config.mix_layers)

    def __str__(self) -> str:
        """Return the name with the options."""
        options = [f"{name}={value}" for name, value in self.options.items()] + ["mix_layers"] * self.mix_layers
        return f"{self.architecture}" + (f" ({', '.join(options)})" if options else "")

    def is_same(self, other: ChosenHead) -> bool:
        """Whether two heads are the same, whether or not defaults of options are written out."""
        known = architectures().get(str(self.architecture))
        if known is None or (self.architecture, self.mix_layers) != (other.architecture, other.mix_layers):
            return False
        defaults = {name: inspect.signature(known.__init__).parameters[name].default for name in options_of(known)}
        # A file has lists where a class has tuples.
        mine, others = (
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in (defaults | {**head.options}).items()
            }
            for head in (self, other)
        )
        return mine == others

    def check(self, spec: TaskSpec, *, strategy: str = "") -> None:
        """Refuse what does not fit a task or a strategy, before anything is opened.

        Args:
            spec: The task; columns of texts that it does not name are not looked at.
            strategy: The strategy of the training, if it is known.

        Raises:
            InputError: If the architecture is unknown or has no logits of this kind, an option is unknown, out of range or has
                no effect, or two texts are needed and there is one.
        """
        if self.architecture is None:
            if strategy == "scalar_mix" and not has_architectures(spec.type):
                raise InputError(
                    f"strategy='scalar_mix' does not go with type={spec.type!r}, whose head is stock: choose another strategy"
                )
            return
        begin = f"architecture={self.architecture!r}"
        if spec.type not in _WITH_ARCHITECTURE:
            raise InputError(
                f"{begin} does not go with type={spec.type!r}, whose head is stock: leave it out; architectures are for "
                "classification, regression and tokens"
            )
        import_architecture(self.architecture)
        task = _WITH_ARCHITECTURE[spec.type][1]
        known = architectures()
        if self.architecture not in known:
            raise InputError(
                f"{begin} is unknown: {nearest(self.architecture, sorted(known))}, or register it: a package of yours has an "
                f"entry point of that name under {GROUP}"
            )
        if task == "tokens" and "pooling" in self.options:
            raise InputError(
                f"architecture_options has pooling={self.options['pooling']!r}, which has no effect on tokens: leave it out"
            )
        found = self._tried(task)
        if self.mix_layers and found.mixes_layers:
            raise InputError(f"mix_layers=True has no effect: {begin} reads a mean of all layers anyway; leave it out")
        if strategy == "scalar_mix" and not (self.mix_layers or found.mixes_layers):
            raise InputError(
                f"strategy='scalar_mix' trains a mean of all layers, which {begin} does not read: set mix_layers, or choose "
                "architecture='scalar_mix'"
            )
        if found.reads_pairs and len(spec.text) == 1:
            raise InputError(
                f"{begin} reads two texts apart, and task {spec.name!r} has one, {spec.text[0]}: choose another architecture, or "
                "name two columns of text"
            )

    def _tried(self, task: str) -> type[Architecture]:
        """Return the class, after it was built for a trial."""
        assert self.architecture is not None
        try:
            found = find_architecture(self.architecture, task=task, options=self.options)
            with torch.device("meta"):
                found(8, 2, per_token=task == "tokens", dropout=0.1, **self.options)
        except InputError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            message = one_line(error)
            if not message.startswith("architecture"):
                message = f"architecture_options={dict(self.options)}: {self.architecture!r} refuses them: {message}"
            raise InputError(message) from error
        return found


def import_architecture(name: str) -> None:
    """Import the installed package that registers an architecture of a name, if there is one and it is not known yet."""
    if name not in architectures():
        for point in entry_points(group=GROUP, name=name):
            point.load()


def option_names(architecture: str | None) -> list[str]:
    """Return the options that an architecture takes; none of one that is not known."""
    if architecture is not None:
        import_architecture(architecture)
    found = architectures().get(str(architecture))
    return [] if found is None else options_of(found)


def reads_apart(model: PreTrainedModel) -> bool:
    """Return whether a model reads two texts apart, as "pair_encoder" does."""
    return bool(getattr(getattr(model, "architecture", None), "reads_pairs", False))


def open_for_task(
    name_or_path: str,
    data: TaskData,
    *,
    seed: int = 0,
    architecture: str | None = None,
    architecture_options: Mapping[str, Any] | None = None,
    mix_layers: bool = False,
) -> OpenedModel:
    """Open a checkpoint with the stock head of a task, or with an architecture on top.

    A head that the checkpoint has for the same labels in the same order is kept. Otherwise its encoder alone is taken, and the
    head is drawn anew: so the output of one task is the beginning of another. An adapter alone goes into the weights of the
    encoder below it. If an architecture is named, only the same one
    with the same options is kept.

    Args:
        name_or_path: The checkpoint: a folder, or a name on the Hub.
        data: The task.
        seed: Seed of a fresh head: the same weights in every process.
        architecture: Name of an architecture, see [`TaskHeadConfig`]; by default the head that is kept, or else the stock one.
        architecture_options: Its options.
        mix_layers: Whether it reads a learned mean of all layers.

    Returns:
        The model, its weights in float32.

    Raises:
        InputError: If the checkpoint cannot be opened, its architecture has no head of this kind, or the named architecture does
            not fit.
    """
    wanted = ChosenHead.of(architecture=architecture, architecture_options=architecture_options, mix_layers=mix_layers)
    wanted.check(data.spec)
    config = open_config(name_or_path)
    # The head below an adapter is not the one that it was trained with.
    is_same_class = _has_head(config, data, wanted) and read_adapter(name_or_path) is None
    if is_same_class and _labels_agree(config, data):
        model = from_pretrained(data.auto_class, name_or_path, **data.head_options())
        if isinstance(config, TaskHeadConfig):
            # What moves is the strategy's to say.
            model.config.frozen_encoder = False
            model.encoder.requires_grad_(True)
            model.config.add_pooling_layer &= not _drops_pooler(model.encoder)
        fresh = tuple(getattr(model, "fresh_parameters", ()))
        if not fresh:
            return OpenedModel(model, f"{_called(model)}, with the head that the checkpoint has", ())
        return OpenedModel(model, _fresh_note(model, fresh), fresh)
    encoder = _encoder_of(name_or_path, config)
    if wanted.architecture is None:
        model, fresh = _with_fresh_head(name_or_path, encoder, data, seed=seed)
    else:
        model, fresh = _with_architecture(name_or_path, encoder, data, wanted, seed=seed)
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
    config = open_config(name_or_path)
    wanted = data.labels or (["values"] if data.spec.type == "regression" else [data.spec.type])
    if not (_can_have_head(config, data) and _has_head(config, data, ChosenHead()) and _labels_agree(config, data)):
        had = next(iter(getattr(config, "architectures", None) or ()), "no class that its configuration names")
        raise InputError(
            f"model={name_or_path!r} has no head for task {data.spec.name!r}: it is {had} of {_shown(_names(config))}, and the "
            f"task has {_shown(wanted)}: name a model that was fine-tuned on it, or list its labels in a YAML file of the task"
        )


def _can_have_head(config: PreTrainedConfig, data: TaskData) -> bool:
    return isinstance(config, TaskHeadConfig) or type(config) in data.auto_class._model_mapping


def _has_head(config: PreTrainedConfig, data: TaskData, wanted: ChosenHead) -> bool:
    """Whether the head of a checkpoint is of the kind that is wanted, for whichever labels.

    Raises:
        InputError: If its architecture has no stock head of that kind, and one is wanted.
    """
    had = next(iter(getattr(config, "architectures", None) or ()), "")
    if isinstance(config, TaskHeadConfig):
        import_architecture(config.architecture)
        own = _WITH_ARCHITECTURE.get(data.spec.type)
        found = architectures().get(config.architecture)
        fits = found is None or not found.reads_pairs or len(data.spec.text) == 2
        is_same = wanted.architecture is None or wanted.is_same(ChosenHead.of_config(config))
        if own is not None and own[0].__name__ == had and fits and is_same:
            return True
        config = config.encoder
    elif wanted.architecture is not None:
        return False
    if wanted.architecture is None:
        mapping = data.auto_class._model_mapping
        if type(config) not in mapping:
            raise refuse_type(config.model_type, data.auto_class)
        classes = mapping[type(config)]
        return had in [each.__name__ for each in (classes if isinstance(classes, Sequence) else [classes])]
    return False


def _encoder_of(name_or_path: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the encoder of a checkpoint, with the names of what it lacks as `fresh_parameters`."""
    if not isinstance(config, TaskHeadConfig):
        return open_encoder(name_or_path)
    had = next(iter(config.architectures or ()), "")
    model_class = next((known for known, _ in _WITH_ARCHITECTURE.values() if known.__name__ == had), None)
    if model_class is None:
        raise InputError(
            f"{name_or_path!r}: config.json names the class {had!r}, which is none of models with architectures"
        )
    model = from_pretrained(model_class, name_or_path, announce=False)
    encoder: Any = model.encoder
    begin = "encoder."
    encoder.fresh_parameters = tuple(
        name.removeprefix(begin) for name in model.fresh_parameters if name.startswith(begin)
    )
    return cast(PreTrainedModel, encoder.requires_grad_(True))


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


def chosen_head(model: PreTrainedModel) -> ChosenHead:
    """Return which architecture a model has on top; none of a stock one."""
    config = model.config
    return ChosenHead.of_config(config) if isinstance(config, TaskHeadConfig) else ChosenHead()


def fresh_modules(model: PreTrainedModel, fresh: Sequence[str]) -> list[str]:
    """Return the modules of parameters that were drawn anew; an architecture is one module, whatever is in it."""
    whole = ("architecture", "scalar_mix") if isinstance(model.config, TaskHeadConfig) else ()
    modules = (name.partition(".")[0] if name.startswith(whole) else name.rpartition(".")[0] for name in fresh)
    return list(dict.fromkeys(module or name for module, name in zip(modules, fresh, strict=True)))


def _called(model: PreTrainedModel) -> str:
    head = chosen_head(model)
    return type(model).__name__ + ("" if head.architecture is None else f" of {head}")


def _fresh_note(model: PreTrainedModel, fresh: Sequence[str]) -> str:
    return f"{_called(model)}, with a fresh head ({_shown(fresh_modules(model, fresh))})"


def _drops_pooler(encoder: PreTrainedModel) -> bool:
    """Take the pooler from an encoder that can do without it: nothing reads it, and processes would wait for its gradient."""
    can = "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters
    if can:
        cast(Any, encoder).pooler = None
    return can


def _with_architecture(
    name_or_path: str, encoder: PreTrainedModel, data: TaskData, wanted: ChosenHead, *, seed: int
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return an encoder below a fresh architecture, and the names of what is fresh."""
    _drops_pooler(encoder)
    options: dict[str, Any] = {"architecture": wanted.architecture, "architecture_options": dict(wanted.options)}
    options |= {"mix_layers": wanted.mix_layers} | data.head_options()
    with torch.random.fork_rng():
        torch.manual_seed(draws.generator_seed(seed=seed, stream="fresh head"))
        try:
            model = _WITH_ARCHITECTURE[data.spec.type][0].from_encoder(encoder, **options)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"architecture={wanted.architecture!r} on {name_or_path!r}: {one_line(error)}") from error
    own = {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    lost = {f"encoder.{name}" for name in getattr(encoder, "fresh_parameters", ())} & own
    fresh = tuple(name for name, _ in model.named_parameters() if name not in own or name in lost)
    model.config.name_or_path = name_or_path
    return model, fresh


def has_architectures(task_type: str) -> bool:
    """Return whether a type of tasks has models with an architecture on top of an encoder."""
    return task_type in _WITH_ARCHITECTURE


def architecture_of(strategy: str, name_or_path: str, spec: TaskSpec) -> str | None:
    """Return the architecture that a strategy needs on a checkpoint; None if the checkpoint's or the stock head will do.

    Raises:
        InputError: If the type of the task has a stock head only.
    """
    if strategy != "scalar_mix":
        return None
    ChosenHead().check(spec, strategy=strategy)
    config = open_config(name_or_path)
    has_mix = isinstance(config, TaskHeadConfig) and (config.mix_layers or config.architecture == "scalar_mix")
    return None if has_mix else "scalar_mix"


def _with_fresh_head(
    name_or_path: str, encoder: PreTrainedModel, data: TaskData, *, seed: int
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the encoder of a checkpoint below a fresh stock head, and the names of what is fresh."""
    options = data.head_options()
    # The names of another head would contradict the number of this one's classes.
    config = encoder.config
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
