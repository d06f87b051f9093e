"""Which options have an effect: those of transformers that every Trainer here honours, and those that need others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

from transformers.utils import logging

from hf_pretrain.errors import InputError, declared
from hf_pretrain.schedules import Schedule

logger = logging.get_logger(__name__)

_USER_METRICS = "compute_metrics is not used here: a method's metrics come from sums over all held-out examples"
_ALWAYS_TRAINS = "the programs always train, and evaluate as eval_strategy says"
_HALF_EXPORT = "evaluation computes in the training's precision, and the exported weights stay in fp32"
_SAMPLING = "the order of the examples follows from the seed and the epoch alone"
_LIGER = "Liger has no kernels for encoders and their objectives"

REFUSED: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (True, "each loss is divided by its targets on all devices"),
    "batch_eval_metrics": (False, _USER_METRICS),
    "bf16_full_eval": (False, _HALF_EXPORT),
    "do_predict": (False, _ALWAYS_TRAINS),
    "do_train": (False, _ALWAYS_TRAINS),
    "eval_do_concat_batches": (True, _USER_METRICS),
    "eval_use_gather_object": (False, "evaluation gathers tensors of sums and counts"),
    "fp16_full_eval": (False, _HALF_EXPORT),
    "include_for_metrics": ([], _USER_METRICS),
    "include_num_input_tokens_seen": ("no", "num_tokens is in every log row"),
    "label_names": (None, "each objective knows its own labels"),
    "label_smoothing_factor": (0.0, "the losses are those of the objectives, without smoothing"),
    "length_column_name": ("length", _SAMPLING),
    "liger_kernel_config": (None, _LIGER),
    "parallelism_config": (None, "one model is divided by FSDP or ZeRO only: use fsdp, or accelerate launch"),
    "prediction_loss_only": (False, "evaluation never gathers logits"),
    "remove_unused_columns": (False, "it would drop example ids and word boundaries"),
    "train_sampling_strategy": ("random", _SAMPLING),
    "use_cache": (False, "no model keeps a cache in training"),
    "use_liger_kernel": (False, _LIGER),
}
"""Options of `transformers.TrainingArguments` that would have no effect, or a wrong one: the only value allowed, and why."""


_CHECKPOINT = "!model_name_or_path"
# Optimizers without Adam's moments, and with moments but without its epsilon.
_OTHERS = (
    "optim!=sgd|adagrad|adafactor|rmsprop|rmsprop_bnb|rmsprop_bnb_8bit|rmsprop_bnb_32bit|lomo|adalomo|galore_adafactor"
    "|galore_adafactor_layerwise|schedule_free_sgd"
)
_LIONS = "|lion_8bit|lion_32bit|paged_lion_8bit|paged_lion_32bit"
_TRACKIO = "report_to~trackio|all"
_NEEDS: dict[str, tuple[str, ...]] = {
    # Sizes of a model from scratch, beside a checkpoint that has its own.
    **dict.fromkeys(
        """model_type hidden_size num_hidden_layers num_attention_heads intermediate_size embedding_size
        max_position_embeddings config_overrides hidden_dropout_prob attention_probs_dropout_prob cutoffs untie_r
        pre_layer_norm""".split(),
        (_CHECKPOINT,),
    ),
    **dict.fromkeys(("tokenizer_type", "lowercase", "strip_accents", "vocab_size"), ("!tokenizer_name", _CHECKPOINT)),
    "dataset_config_name": ("dataset_name",),
    "dataset_split": ("dataset_name",),
    "validation_split": ("dataset_name",),
    "shuffle_buffer_size": ("streaming",),
    "validation_fraction": ("!streaming", "!validation_file"),
    # Lanes are read in order, and cut the text themselves.
    "data_seed": ("!streaming", "!tgt_len", "!mem_len"),
    "block_mode": ("!tgt_len", "!mem_len"),
    "block_size": ("!tgt_len",),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (_OTHERS,)),
    "adam_epsilon": (_OTHERS + _LIONS,),
    **dict.fromkeys(
        ("dataloader_drop_last", "dataloader_in_order"),
        ("!streaming",),
    ),
    "tokenizer_frame": ("!tokenizer_name", _CHECKPOINT, "language_file or parallel_file"),
    **dict.fromkeys(("language_sampling_alpha", "mixture_unit"), ("language_file or parallel_file",)),
    **dict.fromkeys(("bitext_share", "bitext_frame"), ("parallel_file",)),
    "overwrite_output_dir": ("!resume_from_checkpoint",),
    "ignore_data_skip": ("!streaming", "resume_from_checkpoint"),
    "restore_callback_states_from_checkpoint": ("resume_from_checkpoint",),
    "num_train_epochs": ("max_steps=-1",),
    "warmup_steps": ("lr_scheduler_type!=constant|reduce_lr_on_plateau|greedy",),
    "lr_scheduler_kwargs": ("!decay_during_warmup",),
    "logging_steps": ("logging_strategy=steps",),
    **dict.fromkeys(("do_eval", "eval_delay"), ("eval_strategy!=no",)),
    "eval_steps": ("eval_strategy=steps",),
    "save_steps": ("save_strategy=steps",),
    **dict.fromkeys(("save_total_limit", "save_only_model", "save_on_each_node"), ("save_strategy!=no",)),
    "metric_for_best_model": (
        "load_best_model_at_end or save_strategy=best or lr_scheduler_type=reduce_lr_on_plateau|greedy",
    ),
    "greater_is_better": (
        "load_best_model_at_end or save_strategy=best or lr_scheduler_type=reduce_lr_on_plateau|greedy",
    ),
    "activation_checkpointing_kwargs": ("activation_checkpointing",),
    "gradient_checkpointing_kwargs": ("activation_checkpointing",),
    "fsdp_config": ("fsdp",),
    "dataloader_persistent_workers": ("!streaming", "dataloader_num_workers"),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), ("push_to_hub",)),
    "hub_private_repo": (f"push_to_hub or {_TRACKIO}",),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), (_TRACKIO,)),
}
"""What options need to have an effect; a method says it of its own in the class variable `needs` of its dataclass.

"name": that option is set; "!name": it is not; "name=a|b" or "name!=a|b": it is or is not one of these; "name~a|b": it holds
one of these. All must hold; of those joined by "or", one.
"""
# Command lines share these from one run to the next, so they are noted and not refused.
_ONLY_NOTED = {"vocab_size", "warmup_steps", "logging_steps", "block_size", "validation_fraction"}


def check_refused(args: Any, allowed: Mapping[str, Collection[Any]]) -> None:
    """Refuse options that a Trainer of this library does not honour.

    Args:
        args: The training arguments, before transformers fills them in.
        allowed: Further values that a method honours, by option.

    Raises:
        InputError: If one is set.
    """
    for name, (value, why) in REFUSED.items():
        given = getattr(args, name)
        given = {False: "no", True: "all"}.get(given, given) if value == "no" else given
        if given != value and given not in allowed.get(name, ()):
            raise InputError(f"{name}={given!r} is not supported: {why}: leave it out")


def check_needs(instances: Iterable[Any], typed: Iterable[str]) -> None:
    """Refuse options on a command line that have no effect beside the others.

    A recipe may hold them: it suits runs with and without them.

    Args:
        instances: The dataclasses of a program, filled in.
        typed: Names of the options on the command line.

    Raises:
        InputError: Naming the option, its value and what it needs.
    """
    instances = list(instances)
    values, needs = _values(instances)
    switched_off = {known.name for instance in instances for known in fields(instance) if known.default is False}
    for name in dict.fromkeys(typed):
        value = values.get(name)
        if value is None or (value is False and name in switched_off):
            continue
        for need in needs.get(name, ()):
            if any(_holds(part, values) for part in need.split(" or ")):
                continue
            message = f"{name}={_shown(value)} has no effect {_reason(need, values)}"
            if name not in _ONLY_NOTED:
                raise InputError(message)
            logger.warning(message)


def _values(instances: Iterable[Any]) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Return all options by name, with the names of a distillation's losses, and what they need."""
    values: dict[str, Any] = {}
    needs: dict[str, tuple[str, ...]] = {}
    for instance in instances:
        own = declared(instance, "needs")
        for field in fields(instance):
            values[field.name] = getattr(instance, field.name)
            needs[field.name] = (own[field.name],) if field.name in own else _NEEDS.get(field.name, ())
        if hasattr(instance, "weights"):
            values["losses"] = list(instance.weights())
    return values, needs


def _parts(need: str) -> tuple[str, str, list[str]]:
    name, relation, choices = re.fullmatch(r"!?(\w+?)(?:(!=|=|~)(.+))?", need).groups()  # type: ignore[union-attr]
    return name, relation or need[: need.startswith("!")], (choices or "").split("|")


def _holds(need: str, values: Mapping[str, Any]) -> bool:
    name, relation, choices = _parts(need)
    if name not in values:
        return True
    value = values[name]
    if relation == "~":
        return bool(set(choices) & set([value] if isinstance(value, str) else value or ()))
    if relation in ("=", "!="):
        return (_text(value) in choices) == (relation == "=")
    return bool(value) != (relation == "!")


def _reason(need: str, values: Mapping[str, Any]) -> str:
    """Return beside or without what, and the way on, in the words of a message."""
    said = []
    for part in need.split(" or "):
        name, relation, choices = _parts(part)
        value, one_of = _shown(values[name]), " or ".join(choices)
        said.append(
            {
                "": f"without {name}: set it too, or leave this out",
                "!": f"beside {name}={value}: leave one of them out",
                "=": f"with {name}={value}: it is for {name}={one_of}",
                "!=": f"with {name}={value}: leave one of them out",
                "~": f"with {name}={value}: it is for {one_of}",
            }[relation]
        )
    return ", and ".join(said)


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _shown(value: Any) -> str:
    return repr(getattr(value, "value", value))


def check_together(instances: Iterable[Any]) -> None:
    """Refuse options of different dataclasses that contradict each other, whatever the text is.

    Raises:
        InputError: Naming both.
    """
    values = _values(instances)[0]
    held_out = ("validation_file", "validation_split")
    if (
        _text(values.get("eval_strategy", "no")) != "no"
        and (values.get("validation_fraction") == 0 or values.get("streaming"))
        and not any(values.get(name) for name in held_out)
    ):
        why = "streaming holds none out" if values.get("streaming") else "validation_fraction=0"
        raise InputError(
            f"eval_strategy={_text(values['eval_strategy'])!r} without held-out text ({why}): name a validation_file, or set "
            "it to 'no'"
        )
    if values.get("streaming"):
        if values.get("max_steps", 1) <= 0:
            raise InputError(
                f"max_steps={values['max_steps']}: a stream has no known end, say how many steps to train"
            )
        if isinstance(values.get("mlm_probability"), Schedule):
            raise InputError(
                f"mlm_probability={values['mlm_probability']!r} needs each example's step, which a stream does not know: "
                "leave out streaming, or give one number"
            )
        if values.get("tgt_len") or values.get("mem_len"):
            raise InputError("streaming=True: a memory needs stored text, to cut into lanes; leave streaming out")
    for name, column in (("masking_unit", "spans"), ("target_unit", "targets")):
        if values.get(name) == "given":
            raise InputError(
                f"{name}='given' needs examples with the column {column}, which no program makes: use it in Python"
            )
    if values.get("training_mode") == "two_stage" and values.get("embedding_sharing") != "none":
        raise InputError(
            "training_mode='two_stage' starts the discriminator from the whole generator, which shares nothing with it "
            "afterwards: set embedding_sharing='none'"
        )
