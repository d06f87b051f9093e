"""The entries of `phases` in a recipe: the keys that only phases have, and the options that a phase cannot change."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from hf_pretrain.errors import InputError, Range, check_choice
from hf_pretrain.options import number_or_text
from hf_pretrain.schedules import Schedule
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.phases.course import SHAPES

OF_PHASES = {
    "name": "Name of the phase.",
    "share": "Its share of max_steps, such as 70%.",
    "steps": "Its steps, in place of a share.",
    "rate": "Factor of learning_rate: a number, or a schedule over the phase such as '0%:0, 5%:1'.",
    "shape": "How the rate goes from point to point: linear, cosine or 1-sqrt.",
    "rope_theta": "Base of the rotary positions.",
    "max_position_embeddings": "Longest sequence of a model with rotary positions.",
}
"""The keys that only phases have, and what they say; all others are options."""

# Options of training that every method has and a phase may change.
_CHANGE = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "activation_checkpointing", "neftune_noise_alpha"),
    *(
        "activation_checkpointing_kwargs",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
    ),
}
_TOKENIZER = ("tokenizer_", "vocab_size", "lowercase", "strip_accents", "max_unknown_share")
_RATES = ("learning_rate", "generator_learning_rate", "lr_scheduler_", "warmup_", "decay_during_warmup")
_COURSE = {"max_steps", "num_train_epochs", "max_minutes", "phases", "branch_from", "generator_steps", "training_mode"}


def not_typed(text: str) -> NoReturn:
    """Refuse phases on a command line."""
    raise argparse.ArgumentTypeError(
        f"{text!r} is no list of phases: write them in a recipe, and name that with --config"
    )


def check_entries(value: Any, *, source: Path) -> list[dict[str, Any]]:
    """Return the value of `phases`, a list of mappings.

    Raises:
        InputError: If it is none.
    """
    form = "give a list, one `- {name: ..., share: 70%, option: value}` a phase"
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise InputError(f"{source}: phases is no list of mappings: {form}")
    for entry in value:
        if not all(isinstance(name, str) for name in entry):
            raise InputError(f"{source}: phases has an entry whose names are no text: {form}")
    return value


def as_typed(value: Any) -> Any:
    """Return a value of YAML as it would be typed, to be converted as on the command line: text, or a list of texts."""
    if isinstance(value, list):
        return [as_typed(item) for item in value]
    return value if value is None or isinstance(value, str | dict) else str(value)


def refuse_fixed(name: str, owner: type, *, is_of_model: bool, where: str) -> None:
    """Refuse an option that a phase cannot change.

    Args:
        name: Name of the option.
        owner: The dataclass that has it.
        is_of_model: Whether that is the one of the model.
        where: The recipe and the phase, for the message.

    Raises:
        InputError: With the reason.
    """
    is_common = name in {known.name for known in dataclasses.fields(PretrainingArguments)}
    is_training = issubclass(owner, PretrainingArguments)
    if name.startswith(_RATES):
        why = "a phase gives the learning rate as a factor of the run's: give rate"
    elif name in _COURSE:
        why = "it is of the whole run: the length of a phase is its share or its steps"
    elif name.startswith(_TOKENIZER):
        why = "the whole run has one tokenizer"
    elif is_training and is_common and name not in _CHANGE:
        why = "it is of the whole run: give it outside of the phases"
    elif is_of_model:
        why = "the model is the same in all phases; they may change rope_theta and max_position_embeddings"
    else:
        return
    raise InputError(f"{where}: {name} cannot change with a phase: {why}")


def read_own(name: str, value: Any, *, where: str) -> Any:
    """Return the value of a key that only phases have.

    Args:
        name: The key.
        value: Its value as YAML has it.
        where: The recipe and the phase, for the message.

    Returns:
        Text; a `Schedule` for `rate`; a share from 0 to 1; or a number.

    Raises:
        InputError: If it cannot be read.
    """
    text, key = str(value).strip(), f"{where}: {name}"
    if name == "name":
        if value is None or not text or "\n" in text:
            raise InputError(f"{key}={value!r} must be a line of text")
        return text
    if name == "shape":
        check_choice(text, list(SHAPES), name=key)
        return text
    if name == "rate":
        number = number_or_text(text)
        if isinstance(number, str):
            return Schedule.parse(number, name=key)
        allowed = Range(0.0)
        if not allowed.holds(number):
            raise InputError(f"{key}={value!r} must be a number {allowed}, or a schedule such as '0%:0, 5%:1'")
        return Schedule((0.0,), (number,), False, text)
    return _number(name, value, key=key)


def _number(name: str, value: Any, *, key: str) -> float | int:
    """Return a share, a number of steps, or one of the positions."""
    text = str(value).strip()
    number = number_or_text(text.removesuffix("%") if name == "share" else text)
    form = {"share": "a share such as 70%", "steps": "a whole number of steps"}.get(name, "a positive number")
    if isinstance(number, str) or not 0 < number < 2**53 or (name != "share" and text.endswith("%")):
        raise InputError(f"{key}={value!r} must be {form}")
    if name == "share":
        number = number / 100 if text.endswith("%") else number
        if number > 1:
            raise InputError(f"{key}={value!r} is more than the whole run: give {form}")
        return number
    if name in ("steps", "max_position_embeddings"):
        if number != int(number):
            raise InputError(f"{key}={value!r} must be a whole number")
        return int(number)
    return float(number)
