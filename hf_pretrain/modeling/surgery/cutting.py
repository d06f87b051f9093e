"""Students that are cut from their teacher: some of its layers, and all that stands before and after them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import DistilBertConfig, PreTrainedConfig, PreTrainedModel

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.modeling.backbone import feed_forward_name, layers_name, per_layer_values

_State = Mapping[str, torch.Tensor]


def cut_student(
    teacher: PreTrainedModel,
    layers: Sequence[int],
    *,
    model_type: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Return a student made of some layers of the teacher and all that stands before and after them.

    With all layers it computes what the teacher computes. What the configuration says of each layer, such as whether its
    attention is global (ModernBERT), goes with the layer. ALBERT runs one layer several times: its student runs it
    `len(layers)` times.

    Args:
        teacher: Stock encoder with any head; not changed.
        layers: Indices of its layers from 0, ascending.
        model_type: "distilbert" makes a DistilBERT of a BERT; see [`convert_to_distilbert`].
        overrides: Further values for the student's configuration, such as dropout.

    Returns:
        A stock model of the teacher's class (or its DistilBERT counterpart), in float32 and evaluation mode, that shares no
        memory with the teacher.

    Raises:
        InputError: If the layers are not there, or cannot be taken out of this architecture.
    """
    check_layers(layers, teacher_layers=teacher.config.num_hidden_layers)
    converts = model_type not in (None, teacher.config.model_type)
    if converts and (teacher.config.model_type, model_type) != ("bert", "distilbert"):
        raise InputError(
            f"student_type={model_type!r}: only a bert can become a distilbert, and {type(teacher).__name__} is a "
            f"{teacher.config.model_type}; leave student_type out, or give model_type for a new student"
        )
    config = teacher.config
    changes: dict[str, Any] = {name: [value[n] for n in layers] for name, value in per_layer_values(config).items()}
    changes |= {"num_hidden_layers": len(layers)} | (dict(overrides or {}) if not converts else {})
    state = _state_of_layers(teacher, layers)
    student = _build(type(teacher), changed_config(config, changes), state, starts_at=layers[0])
    return convert_to_distilbert(student, overrides=overrides) if converts else student


def check_layers(layers: Sequence[int], *, teacher_layers: int) -> None:
    """Raise InputError unless the layers ascend and are the teacher's."""
    ascends = bool(layers) and list(layers) == sorted(set(layers))
    if not ascends or layers[0] < 0 or layers[-1] >= teacher_layers:
        raise InputError(
            f"student_layers={','.join(map(str, layers))!r} must ascend within 0 to {teacher_layers - 1}: "
            f"the teacher has {teacher_layers} layers"
        )


def changed_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of a configuration with other values, under the names of `ModelArguments` or the configuration's own.

    Raises:
        InputError: If the architecture has no such option, or not with such a value.
    """
    values = config.to_dict()
    for name, value in changes.items():
        own_name = config.attribute_map.get(name, name)
        if own_name == "intermediate_size":
            own_name = feed_forward_name(config.model_type)
        if own_name not in values and not hasattr(config, own_name):
            raise InputError(f"{name}={value!r}: {config.model_type} has no such option; leave it out")
        values[own_name] = value
    try:
        changed: PreTrainedConfig = type(config).from_dict(values)
    except (ValueError, StrictDataclassError) as error:
        raise InputError(f"{config.model_type} cannot have {dict(changes)}: {one_line(error, line=-1)}") from error
    changed.name_or_path = config.name_or_path
    return changed


def _state_of_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the teacher's state with the layers that stay numbered anew, and without the others."""
    state, config = teacher.state_dict(), teacher.config
    groups = getattr(config, "num_hidden_groups", None)
    if groups == 1:
        return state
    if groups is not None:
        raise InputError(
            f"student_layers: {type(teacher).__name__} shares its {config.num_hidden_layers} layers in {groups} groups, "
            "which cannot be cut: give the sizes of a new student instead"
        )
    name = layers_name(teacher)
    if name is None:
        raise InputError(
            f"student_layers: {type(teacher).__name__} keeps its {config.num_hidden_layers} layers in no single list that "
            "could be cut: give the sizes of a new student instead"
        )
    new_number = {old: new for new, old in enumerate(layers)}
    kept = {}
    for key, value in state.items():
        match = re.match(rf"({re.escape(name)}\.)(\d+)(.*)", key)
        if match is None:
            kept[key] = value
        elif int(match[2]) in new_number:
            kept[f"{match[1]}{new_number[int(match[2])]}{match[3]}"] = value
    return kept


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: _State, *, starts_at: int = 0
) -> PreTrainedModel:
    # The weights that are drawn here are all overwritten; float32, because they are to be trained.
    model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32)
    if getattr(model, "pooler", None) is not None and not any(name.startswith("pooler.") for name in state):
        # The teacher is the encoder below a head that takes no pooler, or its pooler was taken out.
        cast(Any, model).pooler = None
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    odd = next((name for name in needed | given if needed.get(name) != given.get(name)), None)
    if odd is not None:
        remedy = "a cut student has the teacher's sizes, so leave them out of config_overrides"
        if starts_at:
            remedy = "the teacher's first layer is unlike the others, so let student_layers begin with 0"
        raise InputError(
            f"student_layers: {odd} is {needed.get(odd, 'not')} in the student and {given.get(odd, 'not')} in the "
            f"teacher's layers; {remedy}"
        )
    model.load_state_dict(state)
    return model.eval()


def convert_to_distilbert(model: PreTrainedModel, *, overrides: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return the DistilBERT that computes what a BERT does with token type 0 everywhere.

    DistilBERT has no token types; that of type 0 is added to every position, so that the embeddings stay the same, where the
    published script dropped it. It has no pooler either: the head of a masked language model and those of tokens and spans
    are exact, but a sequence classifier's hidden layer has a ReLU instead of BERT's tanh. Its weights are taken over as a
    start, and the logits are others until they are trained.

    Args:
        model: Stock BERT with any head that DistilBERT has too.
        overrides: Further values for the new configuration.

    Raises:
        InputError: If DistilBERT has no such head.
    """
    name = type(model).__name__.replace("Bert", "DistilBert", 1)
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise InputError(f"student_type='distilbert': {type(model).__name__} has no counterpart {name}; leave it out")
    config = changed_config(_distilbert_config(model.config), overrides or {})
    config.name_or_path = model.config.name_or_path
    state = {_distilbert_name(name): value for name, value in model.state_dict().items()}
    types, positions = (
        next(key for key in state if key.endswith(f"embeddings.{table}.weight"))
        for table in ("token_type_embeddings", "position_embeddings")
    )
    state[positions] = state[positions] + state[types][0]
    with torch.device("meta"):
        known = model_class._from_config(config).state_dict()
    return _build(model_class, config, {name: value for name, value in state.items() if name in known})


def _distilbert_config(config: PreTrainedConfig) -> DistilBertConfig:
    same = """vocab_size max_position_embeddings initializer_range tie_word_embeddings pad_token_id bos_token_id eos_token_id
        id2label label2id problem_type""".split()
    dropout = config.hidden_dropout_prob
    return DistilBertConfig(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        hidden_dim=config.intermediate_size,
        activation=config.hidden_act,
        dropout=dropout,
        attention_dropout=config.attention_probs_dropout_prob,
        seq_classif_dropout=dropout if config.classifier_dropout is None else config.classifier_dropout,
        qa_dropout=dropout,
        attn_implementation=config._attn_implementation,
        **{name: getattr(config, name) for name in same},
    )


# BERT's names, as regular expressions, and DistilBERT's; the first that fits is taken.
_DISTILBERT_NAMES = (
    (r"^bert\.", "distilbert."),
    (r"encoder\.layer\.", "transformer.layer."),
    (r"attention\.self\.query", "attention.q_lin"),
    (r"attention\.self\.key", "attention.k_lin"),
    (r"attention\.self\.value", "attention.v_lin"),
    (r"attention\.output\.dense", "attention.out_lin"),
    (r"attention\.output\.LayerNorm", "sa_layer_norm"),
    (r"intermediate\.dense", "ffn.lin1"),
    (r"(\d)\.output\.dense", r"\1.ffn.lin2"),
    (r"(\d)\.output\.LayerNorm", r"\1.output_layer_norm"),
    (r"^cls\.predictions\.transform\.dense", "vocab_transform"),
    (r"^cls\.predictions\.transform\.LayerNorm", "vocab_layer_norm"),
    (r"^cls\.predictions\.decoder\.weight", "vocab_projector.weight"),
    (r"^cls\.predictions\.bias", "vocab_projector.bias"),
    (r"^(?:distil)?bert\.pooler\.dense", "pre_classifier"),
)


def _distilbert_name(name: str) -> str:
    for pattern, replacement in _DISTILBERT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
