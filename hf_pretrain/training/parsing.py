"""Options of a program, from dataclasses: the defaults of the fields, then recipes, then the command line on top.

A recipe is a flat YAML file of options. YAML itself would leave ``5e-4`` a string and turn ``no`` into False. So a value is kept
as it was typed, and each option converts it as it would on the command line. `resolved_options` and `write_recipe` go the other
way: from the options of a run to a recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers.hf_argparser import make_choice_type_function, string_to_bool

from hf_pretrain.errors import InputError, check_numbers, nearest, one_line
from hf_pretrain.files import plain, write_text
from hf_pretrain.options import number_or_text
from hf_pretrain.training.effects import check_needs, check_together

# Names of options elsewhere: in earlier versions of transformers, in its examples, and in everyday speech.
_SYNONYMS = {
    synonym: option
    for option, synonyms in {
        "per_device_train_batch_size": "batch_size train_batch_size per_gpu_train_batch_size bs",
        "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "learning_rate": "lr",
        "num_train_epochs": "epochs num_epochs",
        "max_steps": "steps num_train_steps max_train_steps",
        "warmup_steps": "warmup warmup_ratio num_warmup_steps",
        "lr_scheduler_type": "scheduler",
        "optim": "optimizer",
        "gradient_accumulation_steps": "grad_accum accumulation_steps",
        "block_size": "max_seq_length max_sequence_length max_seq_len seq_length seq_len max_length context_length",
        "document_separator": "line_by_line",
        "masking_unit": "whole_word_mask wwm",
        "mlm_probability": "mlm_prob mask_probability masking_probability",
        "eval_strategy": "evaluation_strategy",
        "eval_accumulation_steps": "eval_accumulation",
        "validation_fraction": "validation_split_percentage max_eval_samples",
        "train_file": "train_data_file data",
        "dataset_name": "dataset",
        "validation_file": "eval_data_file eval_file",
        "max_corpus_bytes": "max_train_samples",
        "model_name_or_path": "model model_name",
        "teacher_name_or_path": "teacher teacher_model",
        "tokenizer_name": "tokenizer tokenizer_name_or_path",
        "lowercase": "do_lower_case uncased",
        "model_type": "config_name architecture",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "hidden_size": "dim",
        "output_dir": "output",
        "resume_from_checkpoint": "resume",
        "dataloader_num_workers": "num_workers",
        "preprocessing_num_workers": "num_proc",
        "use_cpu": "no_cuda no_gpu",
        "fp16": "fp16_backend",
        "bf16": "mixed_precision",
        "max_grad_norm": "gradient_clipping",
        "hub_token": "token use_auth_token",
        "hub_model_id": "push_to_hub_model_id",
        "train_sampling_strategy": "group_by_length",
        "report_to": "wandb_project",
    }.items()
    for synonym in synonyms.split()
}
# Options of other programs that have no counterpart here, and what to do instead.
_WITHOUT_OPTION = {
    "cache_dir": "set the environment variables HF_HOME and HF_DATASETS_CACHE",
    "overwrite_cache": "a cache is found by its text and options, and HF_DATASETS_CACHE names its folder",
    "pad_to_max_length": "batches are padded to their longest example alone",
    "save_safetensors": "weights are always saved as safetensors",
}


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Build one instance a dataclass from recipes (``--config``, given any number of times) and the command line.

    Args:
        dataclass_types: The dataclasses, with option names that differ from each other and from "config".
        argv: The arguments, without the name of the program; those of the process if not given.
        prog: How the program is called, for its help and messages.
        description: What the program does, for its help.
        defaults: Values that replace the defaults of the fields, by option name.

    Returns:
        The instances, in the order of ``dataclass_types``.

    Raises:
        InputError: If a recipe cannot be read, or an option is unknown, missing, of the wrong type or out of range, or one on the
            command line has no effect beside the others.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _OptionParser(dataclass_types, prog=prog, description=description)
    parser.replace_defaults(defaults or {})
    for name in parser.recipe_names(given):
        path, recipe = read_recipe(name)
        parser.replace_defaults({key: parser.convert(key, value, source=path) for key, value in recipe.items()})
    return parser.instances(given)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description with the line breaks that it has."""


class _OptionParser(argparse.ArgumentParser):
    """A parser with one option a dataclass field, which answers mistakes with an `InputError`."""

    def __init__(self, dataclass_types: Sequence[type], *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [--config RECIPE] [--option value ...]",
            description=description,
            formatter_class=_HelpFormatter,
        )
        self.dataclass_types = dataclass_types
        self.hints: dict[str, Any] = {}
        self.options: dict[str, argparse.Action] = {}
        for cls in dataclass_types:
            self.hints |= get_type_hints(cls)
            for field in dataclasses.fields(cls):
                if field.init:
                    self.options[field.name] = self._add_option(field, self.hints[field.name])
        recipe_help = "YAML file of options, or the name of a recipe that comes with the library"
        self.add_argument("--config", action="append", metavar="RECIPE", help=recipe_help)

    def _add_option(self, field: dataclasses.Field, hint: Any) -> argparse.Action:
        """Add the option of a field, in both spellings; a flag that is on by default gets a `--no_` twin."""
        metadata: dict[str, Any] = {"help": "", **field.metadata}
        metadata["help"] = re.sub(r"%%|%(?!\()", "%%", metadata["help"] or " ")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        how = _conversion(hint) | metadata | {"required": default is dataclasses.MISSING}
        if how["required"] or (how.get("nargs") == "+" and isinstance(default, str)):
            default = None  # argparse would convert text to an item of the list
        how["default"] = default
        spellings = dict.fromkeys((field.name, field.name.replace("_", "-")))
        action = self.add_argument(*(f"--{spelling}" for spelling in spellings), **how)
        if default is True and set(_members(hint, bool)) == {bool}:
            off = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
            self.add_argument(*off, action="store_false", dest=field.name, default=False, help=metadata["help"])
        return action

    def error(self, message: str) -> NoReturn:
        # argparse names all spellings of an option, and all choices; one of each is enough.
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        wrong = re.fullmatch(r"(.+invalid choice: '(.*)') \(choose from (.+)\)", message)
        hint = nearest(wrong[2], re.findall(r"[\w.-]+", wrong[3]), otherwise="") if wrong else ""
        raise InputError(f"{wrong[1]}: {hint}" if wrong and hint else f"{message} (see `{self.prog} --help`)")

    def recipe_names(self, argv: list[str]) -> list[str]:
        """Return what follows ``--config`` on the command line, in order."""
        finder = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        finder.error = self.error  # type: ignore[method-assign]
        finder.add_argument("--config", action="append", default=[])
        return finder.parse_known_args(argv)[0].config

    def replace_defaults(self, values: Mapping[str, Any]) -> None:
        """Replace the defaults of options; an option that was required no longer is."""
        for name, value in values.items():
            self.options[name].required = False
            self.set_defaults(**{name: value})

    def convert(self, name: str, value: Any, *, source: Path) -> Any:
        """Convert a recipe's value as the command line would convert it: text, None, or a list or mapping."""
        if name not in self.options:
            raise InputError(f"{source}: unknown option {name!r}: {self._nearest(name)}")
        action, hint = self.options[name], self.hints[name]
        where = f"{source}: {name}"
        if value is None:
            return _accept(None, _members(hint, NoneType), f"{where} is empty: give a value or remove the line")
        if isinstance(value, dict):
            return _accept(value, _members(hint, dict), f"{where} is a mapping: this option takes a single value")
        if isinstance(value, list):
            _accept(value, _members(hint, list), f"{where} is a list: this option takes a single value")
            return [_convert_text(action, text, where) for text in value]
        if action.nargs == "?" and not _members(hint, bool) and value.lower() in ("true", "false"):
            return action.const if value.lower() == "true" else None
        converted = _convert_text(action, value, where)
        return [converted] if action.nargs == "+" else converted

    def instances(self, argv: list[str]) -> tuple[Any, ...]:
        """Parse the command line and construct the dataclasses."""
        for option in (token.partition("=")[0] for token in argv if token.startswith("--")):
            if " " not in option and option not in ("--", *self._option_string_actions):
                raise InputError(f"unknown option {option!r}: {self._nearest(option)}")
        namespace, leftover = self.parse_known_args(argv)
        if leftover:
            raise InputError(f"unexpected argument {leftover[0]!r}: options are given as --name value")
        instances = tuple(self._construct(cls, vars(namespace)) for cls in self.dataclass_types)
        check_together(instances)
        check_needs(instances, self._typed(argv))
        return instances

    def _typed(self, argv: list[str]) -> list[str]:
        """Return the names of the options on the command line, in order."""
        options = (token.partition("=")[0] for token in argv)
        return [self._option_string_actions[name].dest for name in options if name in self._option_string_actions]

    def _construct(self, cls: type, values: Mapping[str, Any]) -> Any:
        chosen = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.init}
        try:
            instance = cls(**chosen)
            check_numbers(instance)
        except (InputError, torch.distributed.DistError):
            raise
        except Exception as error:
            # transformers and accelerate raise errors of many types: a missing package, a missing file, a wrong key.
            raise InputError(f"{one_line(error)[:500]} (see `{self.prog} --help`)") from error
        return instance

    def _nearest(self, name: str) -> str:
        """Return what to do about an unknown option."""
        dashes, name = "--" if name.startswith("--") else "", name.lstrip("-").replace("-", "_")
        if name in _WITHOUT_OPTION:
            return _WITHOUT_OPTION[name]
        option = name.removesuffix("_schedule")
        if option != name and option in self.options:
            return f"give the schedule to {dashes + option!r}, which takes a number or a schedule"
        if _SYNONYMS.get(name) in self.options:
            return f"did you mean {dashes + _SYNONYMS[name]!r}?"
        known = [dashes + option for option in self.options]
        return nearest(dashes + name, known, otherwise=f"see `{self.prog} --help`")


def _conversion(hint: Any) -> dict[str, Any]:
    """Return how argparse reads an option of a type: its converter, and what else it needs to know."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    kinds = [member for member in members if member is not NoneType]
    if bool in kinds:
        return {"type": _flag_or_word if str in kinds else string_to_bool, "nargs": "?", "const": True}
    if {float, str} <= set(kinds):
        return {"type": number_or_text}
    if str in kinds and len(kinds) > 1:
        # Of an option that may be None, transformers reads the text itself.
        kinds = [str] if NoneType in members else [kind for kind in kinds if kind is not str]
    kind = kinds[0]
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        choices = list(get_args(kind)) or [member.value for member in kind]
        return {"choices": choices, "type": make_choice_type_function(choices)}
    if get_origin(kind) is list:
        return {"type": get_args(kind)[0], "nargs": "+"}
    return {"type": _json_mapping if _members(kind, dict) else kind}


def _flag_or_word(text: str) -> bool | str:
    return string_to_bool(text) if text.lower() in ("true", "false") else text


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, not {text!r}")
    return value


def _members(hint: Any, kind: type) -> list[Any]:
    """Return those members of a union, or the type itself, that are ``kind`` or made from it."""
    candidates = [hint] if isinstance(hint, type) or get_origin(hint) in (list, dict) else list(get_args(hint))
    origins = [(member, get_origin(member) or member) for member in candidates]
    return [member for member, origin in origins if isinstance(origin, type) and issubclass(origin, kind)]


def _accept(value: Any, allowed: object, message: str) -> Any:
    if not allowed:
        raise InputError(message)
    return value


def _convert_text(action: argparse.Action, text: Any, where: str) -> Any:
    convert = action.type if callable(action.type) else str
    if not isinstance(text, str):
        raise InputError(f"{where}: {text!r} is nested too deeply: a recipe is flat")
    try:
        value = convert(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{where} is {text!r}: {error}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is {text!r}: not a valid {getattr(convert, '__name__', convert)}") from error
    if action.choices is not None and value not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise InputError(f"{where} is {text!r}: {nearest(text, choices)}")
    return value


# A recipe is flat; a mapping among its values has some depth, never this.
_DEEPEST, _MOST_VALUES = 16, 100_000


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
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except RecursionError as error:
        raise InputError(
            f"--config {path}: nested too deeply: a recipe is flat, one `option: value` a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise InputError(f"--config {path}: a recipe is a mapping, one `option: value` a line")
    recipe: dict[str, Any] = {}
    for key, value in root.value:
        if key.value in recipe:
            raise InputError(f"--config {path}: {key.value} is given twice")
        where = f"--config {path}: {key.value}"
        _check_size(value, where)
        try:
            recipe[key.value] = _node_value(loader, value)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise InputError(f"{where} cannot be read: {one_line(error)}") from error
    return path, recipe


def _check_size(root: yaml.Node, where: str) -> None:
    """Refuse a value that is nested too deeply or without end (an alias within its own anchor), or too large."""
    waiting, found = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        found += 1
        if depth > _DEEPEST or found > _MOST_VALUES:
            raise InputError(f"{where} is nested too deeply, or without end: give a value, a list or a mapping")
        if not isinstance(node, yaml.ScalarNode):
            parts = (part for child in node.value for part in (child if isinstance(child, tuple) else (child,)))
            waiting.extend((part, depth + 1) for part in parts)


def _find_recipe(name: str) -> Path:
    if Path(name).exists():
        return Path(name)
    folder = Path(str(files("hf_pretrain.trainers") / "recipes"))
    packaged = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in packaged:
        return packaged[stem]
    hint = nearest(stem, packaged, otherwise=f"packaged recipes are {', '.join(packaged)}")
    raise InputError(f"--config {name}: no such file or recipe: {hint}")


def _node_value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Return a scalar's text (None for null), a list of those, or a mapping with YAML's own types."""
    if isinstance(node, yaml.MappingNode):
        _retype_exponents(node)
        return loader.construct_object(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return [_node_value(loader, item) for item in node.value]
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _retype_exponents(node: yaml.Node) -> None:
    # YAML 1.1 takes 5e-4 for text, because it has no point.
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", node.value):
            node.tag = "tag:yaml.org,2002:float"
        return
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _retype_exponents(part)


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
        instances: Dataclass instances, as `parse_arguments` returns them.

    Returns:
        Options by name: text, numbers, booleans, None, lists and mappings of these, without secrets and without those
        that a launcher sets.
    """
    options: dict[str, Any] = {}
    for instance in instances:
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            if field.init and field.name not in _NOT_SAVED and not _is_default(field, value):
                options[field.name] = _recipe_value(value)
    return options


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    if default is None and hasattr(value, "to_dict"):
        return _recipe_value(value) in ({}, _UNSET.get(field.name))
    return _recipe_value(value) == _recipe_value(default) or (field.name in _UNSET and value == _UNSET[field.name])


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
