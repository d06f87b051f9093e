"""Options as fields of dataclasses: how one is declared, how those of an instance are checked, and how a run writes its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_pretrain.errors import check_numbers, range_of, types_of
from hf_pretrain.files import plain, write_text
from hf_pretrain.schedules import Schedule


def option(default: Any = MISSING, help: str = "", *, factory: Callable[[], Any] | None = None) -> Any:
    """Declare an option: a dataclass field with a help text.

    Args:
        default: Value of the option where none is given.
        help: What the command line says about it.
        factory: Makes the default, where it is a list or the like.
    """
    if factory is not None:
        return field(default_factory=factory, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def number_or_text(text: str) -> float | str:
    """Return what the command line has for an option that takes a number or a schedule; `check_options` reads the rest."""
    try:
        return float(text)
    except ValueError:
        return text


def check_options(options: Any) -> None:
    """Read the schedules of a dataclass of options, and refuse numbers that are out of range.

    An option takes a schedule if its type is `float | str`.

    Args:
        options: Instance of the dataclass; text of such options is replaced by a number or a `Schedule`.

    Raises:
        InputError: Naming the option, its value and what it takes.
    """
    for known in fields(options):
        value = getattr(options, known.name)
        if isinstance(value, str) and {float, str} <= types_of(options, known.name):
            number = number_or_text(value)
            if isinstance(number, str):
                allowed = range_of(options, known.name)
                number = Schedule.parse(number, name=known.name, allowed=allowed)
            setattr(options, known.name, number)
    check_numbers(options)


def schedules_of(options: Any) -> dict[str, Schedule]:
    """Return the schedules among the options of a dataclass, by name."""
    values = {known.name: getattr(options, known.name) for known in fields(options)}
    return {name: value for name, value in values.items() if isinstance(value, Schedule)}


# Never written to a recipe: a secret, options of the launcher and the machine, and the deprecated twins of
# activation_checkpointing.
_NOT_SAVED = {"hub_token", "local_rank", "use_cpu", "dataloader_pin_memory"}
# Options of one start of a run, and one that follows from eval_strategy.
_NOT_SAVED |= {"resume_from_checkpoint", "do_eval"}
_NOT_SAVED |= {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
# Values that TrainingArguments gives to options that nobody set.
_UNSET = {"output_dir": "trainer_output", "activation_checkpointing": False, "disable_tqdm": False}
_UNSET |= {"report_to": [], "debug": [], "accelerator_config": {"dispatch_batches": False}}


def resolved_options(instances: Iterable[Any]) -> dict[str, Any]:
    """Return the options that differ from their defaults, as a recipe holds them.

    Args:
        instances: Dataclass instances, such as those of a program.

    Returns:
        Options by name: text, numbers, booleans, None, lists and mappings of these, without secrets and without those
        that a launcher sets.
    """
    options: dict[str, Any] = {}
    for instance in instances:
        for known in fields(instance):
            value = getattr(instance, known.name)
            if known.init and known.name not in _NOT_SAVED and not _is_default(known, value):
                options[known.name] = _recipe_value(value)
    return options


def _is_default(known: Field, value: Any) -> bool:
    default = known.default if known.default_factory is MISSING else known.default_factory()
    found = _recipe_value(value)
    if default is None and hasattr(value, "to_dict"):
        return found in ({}, _UNSET.get(known.name))
    return found == _recipe_value(default) or (known.name in _UNSET and value == _UNSET[known.name])


def _recipe_value(value: Any) -> Any:
    """Return a value as a recipe has it: of an object of settings the entries that differ from its defaults."""
    if hasattr(value, "to_dict"):
        unchanged = type(value)().to_dict()
        value = {key: item for key, item in value.to_dict().items() if item != unchanged.get(key)}
    return plain(value)


def write_recipe(options: Mapping[str, Any], path: str | Path, *, program: str) -> None:
    """Write options to a file that ``--config`` reads.

    Args:
        options: Options by name, as `resolved_options` returns them.
        path: The file to write.
        program: The program that the recipe is for, such as "hf-pretrain rtd".
    """
    text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    write_text(Path(path), f"# {program}\n{text}")
