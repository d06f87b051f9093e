"""Options as fields of dataclasses: how one is declared, and how those of an instance are checked.

A recipe is a flat YAML file of options: `write_recipe` writes one, and `read_recipe` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from hf_pretrain.errors import InputError, check_choice, check_numbers, nearest, one_line, range_of, types_of
from hf_pretrain.files import plain, write_text
from hf_pretrain.names import packaged_recipes
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
    """Read the schedules of a dataclass of options, and refuse unknown words and numbers that are out of range.

    An option takes a schedule if its type is `float | str`, and one of some words if its type is a `Literal`.

    Args:
        options: Instance of the dataclass; text of such options is replaced by a number or a `Schedule`.

    Raises:
        InputError: Naming the option, its value and what it takes.
    """
    for known in fields(options):
        value, kinds = getattr(options, known.name), types_of(options, known.name)
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words and not (value is None and NoneType in kinds):
            check_choice(value, words, name=known.name)
        if isinstance(value, str) and {float, str} <= kinds:
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
            if known.init and _is_saved(known, instance) and not _is_default(known, value):
                options[known.name] = _recipe_value(value)
    return options


def all_options(instances: Iterable[Any]) -> dict[str, Any]:
    """Return every option of dataclass instances, defaults included, as a recipe holds them.

    Left out are what [`resolved_options`] leaves out, and options that have no value and no default either.
    """
    options: dict[str, Any] = {}
    for instance in instances:
        for known in fields(instance):
            value = _recipe_value(getattr(instance, known.name))
            has_value = value is not None or (known.default is not MISSING and known.default is not None)
            if known.init and _is_saved(known, instance) and has_value:
                options[known.name] = value
    return options


def _is_saved(known: Field, instance: Any) -> bool:
    """Whether an option is one of a recipe: not of the machine, and not a number that follows from it."""
    return known.name not in _NOT_SAVED and known.name not in getattr(instance, "chosen", ())


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


# A recipe is flat; a mapping among its values has some depth, never this.
_DEEPEST = 16


class _RecipeLoader(yaml.SafeLoader):
    """Reads flat YAML, and 5e-4 as a number: YAML 1.1 takes it for text, because it has no point."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; refuse nesting without sense or end."""
        if self._depth == _DEEPEST or self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("nested too deeply, or an alias: write the value itself, one `option: value` a line")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def recipe_names(argv: Sequence[str]) -> list[str]:
    """Return what follows ``--config`` on a command line, in order."""
    names = (
        after if word == "--config" else word.removeprefix("--config=")
        for word, after in pairwise([*argv, ""])
        if word == "--config" or word.startswith("--config=")
    )
    return [name for name in names if name]


def read_recipes(names: Sequence[str]) -> list[tuple[Path, dict[str, Any]]]:
    """Read recipes in order, before each one those that its entry `config` names.

    Args:
        names: Paths or names, as `read_recipe` takes them.

    Returns:
        The path and the options of each, without `config`.

    Raises:
        InputError: If one cannot be read, or names itself.
    """
    found: list[tuple[Path, dict[str, Any]]] = []

    def read(name: str, above: tuple[Path, ...]) -> None:
        path, recipe = read_recipe(name)
        inner = recipe.pop("config", None) or []
        if path in above:
            raise InputError(f"--config {path}: config names this recipe itself: leave it out")
        for other in [inner] if isinstance(inner, str) else inner:
            if not isinstance(other, str):
                raise InputError(f"--config {path}: config={other!r} is no name of a recipe")
            beside = path.parent / other
            read(str(beside) if beside.is_file() else other, (*above, path))
        found.append((path, recipe))

    for name in names:
        read(name, ())
    return found


def read_recipe(name: str) -> tuple[Path, dict[str, Any]]:
    """Read a recipe from a file, or from among those that come with the library.

    Args:
        name: Path of a YAML file, or the name of a packaged recipe, with or without ``.yaml``.

    Returns:
        The path, and the options by name in the file's order: text, None, a list of these, or a mapping with YAML's
        own types.

    Raises:
        InputError: If there is no such file, or it is not UTF-8 or not a flat YAML mapping of names.
    """
    path = _find_recipe(name)
    loader, root = _root_of(path, where=f"--config {path}")
    return path, _flat(loader, root, where=f"--config {path}")


def read_plan(path: str | Path, *, entries: str) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Read a YAML file of options in which one key has a list of entries, each with a name and options of its own.

    Args:
        path: The file.
        entries: That key. An entry is `- name: {option: value}`.

    Returns:
        The options beside the entries, and name and options of each entry; values are as [`read_recipe`] returns them.

    Raises:
        InputError: If the file cannot be read, has no entries, or one has another form.
    """
    form = "write `- name: {option: value}`, or the options below the name, indented by four more spaces"
    loader, root = _root_of(Path(path), where=str(path))
    listed = [value for key, value in root.value if key.value == entries]
    root.value = [(key, value) for key, value in root.value if key.value != entries]
    if len(listed) != 1 or not isinstance(listed[0], yaml.SequenceNode) or not listed[0].value:
        raise InputError(f"{path}: {entries} must be one list of at least one entry: {form}")
    found = []
    for number, entry in enumerate(listed[0].value, 1):
        where = f"{path}: entry {number} of {entries}"
        if not isinstance(entry, yaml.MappingNode) or not all(
            isinstance(key, yaml.ScalarNode) for key, _ in entry.value
        ):
            raise InputError(f"{where} is no mapping: {form}")
        if len(entry.value) != 1:
            raise InputError(
                f"{where} has {len(entry.value)} keys, {', '.join(key.value for key, _ in entry.value)}: {form}"
            )
        ((key, value),) = entry.value
        if not isinstance(value, yaml.MappingNode):
            raise InputError(f"{where}, {key.value}, has no options: {form}")
        found.append((key.value, _flat(loader, value, where=f"{where}, {key.value}")))
    return _flat(loader, root, where=str(path)), found


def _root_of(path: Path, *, where: str) -> tuple[yaml.SafeLoader, yaml.MappingNode]:
    """Return the reader of a YAML file, and its outermost mapping."""
    try:
        loader = _RecipeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise InputError(f"{where}: a recipe is a mapping, one `option: value` a line")
    return loader, root


def _flat(loader: yaml.SafeLoader, root: yaml.MappingNode, *, where: str) -> dict[str, Any]:
    """Return the options of a mapping, with values as they were typed."""
    recipe: dict[str, Any] = {}
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if not isinstance(name, str):
            raise InputError(f"{where}: a name of an option is no text")
        if name in recipe:
            raise InputError(f"{where}: {name} is given twice")
        try:
            recipe[name] = _node_value(loader, value)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise InputError(f"{where}: {name} cannot be read: {one_line(error)}") from error
    return recipe


def _find_recipe(name: str) -> Path:
    if Path(name).exists():
        return Path(name)
    packaged = packaged_recipes()
    stem = name.removesuffix(".yaml")
    if stem in packaged:
        return packaged[stem]
    hint = nearest(stem, packaged, otherwise=f"packaged recipes are {', '.join(packaged)}")
    raise InputError(f"--config {name}: no such file or recipe: {hint}")


def _refuse_doubles(node: yaml.MappingNode) -> None:
    """Refuse a mapping that gives a key twice: YAML would take the last one."""
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise yaml.YAMLError(f"{twice} is given twice")


def _node_value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Return a scalar's text (None for null), a list of those, or a mapping with YAML's own types."""
    if isinstance(node, yaml.MappingNode):
        _refuse_doubles(node)
        return loader.construct_object(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return [_node_value(loader, item) for item in node.value]
    return None if node.tag == "tag:yaml.org,2002:null" else node.value
