"""Options of a program, from dataclasses: the defaults of the fields, then recipes, then the command line on top.

A recipe is a flat YAML file of options. YAML itself would leave ``5e-4`` a string and turn ``no`` into False. So a value is kept
as it was typed, and each option converts it as it would on the command line. An option on the command line that has no effect
beside the others is refused.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

from hf_pretrain.errors import InputError, check_numbers, declared, nearest, one_line
from hf_pretrain.help import add_help
from hf_pretrain.names import option_hint
from hf_pretrain.options import number_or_text, read_recipes, recipe_names
from hf_pretrain.training.arguments import check_text
from hf_pretrain.training.phases.entries import OF_PHASES, as_typed, check_entries, not_typed, read_own, refuse_fixed

logger = logging.get_logger(__name__)


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
    return parse_run(dataclass_types, argv, prog=prog, description=description, defaults=defaults).options


def parse_run(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    defaults: Mapping[str, Any] | None = None,
) -> ParsedRun:
    """Do as [`parse_arguments`], and build the instances of each phase too, if a recipe has `phases`.

    The options of a phase replace those of the recipe and of the command line.

    Args:
        dataclass_types: See [`parse_arguments`], as of all arguments.
        argv: The arguments.
        prog: How the program is called.
        description: What it does.
        defaults: Values that replace the defaults of the fields.

    Raises:
        InputError: Also if a phase has what it cannot have, or every phase replaces an option on the command line.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _OptionParser(dataclass_types, prog=prog, description=description)
    parser.replace_defaults(defaults or {})
    source = ""
    for path, recipe in read_recipes(recipe_names(given)):
        parser.replace_defaults({key: parser.convert(key, value, source=path) for key, value in recipe.items()})
        source = str(path) if "phases" in recipe else source
    options = parser.instances(given)
    listed = next((found for instance in options if (found := getattr(instance, "phases", None))), None)
    return ParsedRun(options, [] if listed is None else parser.phases(listed, source=Path(source)))


class ParsedPhase(NamedTuple):
    """A phase of a recipe.

    Attributes:
        own: What its entry has, converted: its options, and the keys that only phases have.
        options: The instances, with its options on top of those of the run.
    """

    own: dict[str, Any]
    options: tuple[Any, ...]


class ParsedRun(NamedTuple):
    """What the recipes and the command line of a run say.

    Attributes:
        options: The instances, in the order of the dataclasses.
        phases: The phases; none for most runs.
    """

    options: tuple[Any, ...]
    phases: list[ParsedPhase]


_SHAPES: dict[type, str] = {
    NoneType: "is empty: give a value or remove the line",
    dict: "is a mapping: this option takes a single value",
    list: "is a list: this option takes a single value",
}


class _OptionParser(HfArgumentParser):
    """The parser of transformers, which answers mistakes with an `InputError` and reads more types.

    It also reads flags that may be None or a word, numbers that may be a schedule, and mappings as JSON.
    """

    def __init__(self, dataclass_types: Sequence[type], *, prog: str, description: str) -> None:
        super().__init__(
            dataclass_types,
            prog=prog,
            usage="%(prog)s [--config RECIPE] [--option value ...]",
            description=description,
            add_help=False,
        )
        self.hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
        self.owners = {known.name: cls for cls in dataclass_types for known in dataclasses.fields(cls)}
        self.options: dict[str, argparse.Action] = {}
        self._values: dict[str, Any] = {}
        self._typed: list[str] = []
        for action in self._actions:
            # argparse would take a percent sign for a placeholder.
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help or " ")
            if action.dest in self.hints and action.dest not in self.options:
                self.options[action.dest] = action
                _read_by_hint(action, self.hints[action.dest])
        recipe_help = "YAML file of options, or the name of a recipe that comes with the library"
        self.add_argument("--config", action="append", metavar="RECIPE", help=recipe_help)
        add_help(self, dataclass_types)

    def error(self, message: str) -> NoReturn:
        # argparse names all spellings of an option, and all choices; one of each is enough.
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        wrong = re.fullmatch(r"(.+invalid choice: '(.*)') \(choose from (.+)\)", message)
        hint = nearest(wrong[2], re.findall(r"[\w.-]+", wrong[3]), otherwise="") if wrong else ""
        raise InputError(f"{wrong[1]}: {hint}" if wrong and hint else f"{message} (see `{self.prog} --help`)")

    def replace_defaults(self, values: Mapping[str, Any]) -> None:
        """Replace the defaults of options; an option that was required no longer is."""
        for name, value in values.items():
            self.options[name].required = False
            self.set_defaults(**{name: value})

    def convert(self, name: str, value: Any, *, source: Path) -> Any:
        """Convert a recipe's value as the command line would convert it: text, None, or a list or mapping."""
        if name not in self.options:
            raise InputError(f"{source}: unknown option {name!r}: {self._nearest(name)}")
        if name == "phases":
            return check_entries(value, source=source)
        action, hint = self.options[name], self.hints[name]
        where = f"{source}: {name}"
        for kind, problem in _SHAPES.items():
            if isinstance(value, kind) and not _members(hint, kind):
                raise InputError(f"{where} {problem}")
        if value is None or isinstance(value, dict):
            return value
        if isinstance(value, list):
            return [_convert_text(action, text, where) for text in value]
        if action.nargs == "?" and not _members(hint, bool) and value.lower() in ("true", "false"):
            return action.const if value.lower() == "true" else None
        converted = _convert_text(action, value, where)
        return [converted] if action.nargs == "+" else converted

    def instances(self, argv: list[str]) -> tuple[Any, ...]:
        """Parse the command line and construct the dataclasses."""
        options = [token.partition("=")[0] for token in argv]
        for option in options:
            if option.startswith("--") and " " not in option and option not in ("--", *self._option_string_actions):
                raise InputError(f"unknown option {option!r}: {self._nearest(option)}")
        namespace, leftover = self.parse_known_args(argv)
        if leftover:
            raise InputError(f"unexpected argument {leftover[0]!r}: options are given as --name value")
        self._values = vars(namespace)
        known = self._option_string_actions
        self._typed = [known[option].dest for option in options if option in known]
        instances = self._construct(self._values, is_whole=not self._values.get("phases"))
        check_needs(instances, self._typed)
        return instances

    def phases(self, entries: Sequence[Mapping[str, Any]], *, source: Path) -> list[ParsedPhase]:
        """Return the phases of a run; `instances` has parsed the command line.

        Args:
            entries: The phases as a recipe has them.
            source: The recipe.
        """
        found = []
        # The steps of the phases say how many there are; only that there is an end counts here.
        values = self._values | ({} if self._values.get("max_steps", -1) > 0 else {"max_steps": 1})
        for number, entry in enumerate(entries, 1):
            where = Path(f"{source}: phase {entry.get('name', number)}")
            own = {name: read_own(name, value, where=str(where)) for name, value in entry.items() if name in OF_PHASES}
            options = {name: value for name, value in entry.items() if name not in OF_PHASES}
            for name in options:
                if name not in self.options:
                    known = [*OF_PHASES, *self.options]
                    raise InputError(
                        f"{where}: unknown option {name!r}: {option_hint(name, known, prog=self.prog, dashes='')}"
                    )
                # A method has options of data, model and training, in this order.
                owner, of_model = self.owners[name], [*dict.fromkeys(self.owners.values())][1:2]
                refuse_fixed(name, owner, is_of_model=owner in of_model, where=str(where))
            options = {name: self.convert(name, as_typed(value), source=where) for name, value in options.items()}
            try:
                instances = self._construct(values | options)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            found.append(ParsedPhase(own | options, instances))
        for name in dict.fromkeys(self._typed):
            if all(name in phase.own for phase in found):
                raise InputError(
                    f"{name}={self._values[name]!r} has no effect: every phase of {source} has its own; change it there"
                )
        return found

    def _construct(self, values: Mapping[str, Any], *, is_whole: bool = True) -> tuple[Any, ...]:
        """Return the dataclasses; they are checked together where no phase adds to them."""
        try:
            instances: tuple[Any, ...] = self.parse_dict(copy.deepcopy(dict(values)), allow_extra_keys=True)
        except (InputError, torch.distributed.DistError):
            raise
        except Exception as error:
            # transformers and accelerate raise errors of many types: a missing package, a missing file, a wrong key.
            raise InputError(f"{one_line(error)[:500]} (see `{self.prog} --help`)") from error
        for instance in instances:
            check_numbers(instance)
        if is_whole:
            check_together(instances)
        return instances

    def _nearest(self, name: str) -> str:
        """Return what to do about an unknown option."""
        dashes, name = "--" if name.startswith("--") else "", name.lstrip("-").replace("-", "_")
        return option_hint(name, self.options, prog=self.prog, dashes=dashes)


def _read_by_hint(action: argparse.Action, hint: Any) -> None:
    """Let an option read what its type allows and the parser of transformers does not."""
    if action.dest == "phases":
        action.type, action.nargs = not_typed, None
        return
    if _members(hint, bool):
        action.nargs, action.const = "?", True
        action.type = _flag_or_word if _members(hint, str) else string_to_bool
    elif _members(hint, float) and _members(hint, str):
        action.type = number_or_text
    elif _members(hint, dict) and not _members(hint, str):
        action.type = _json_mapping


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


# Optimizers without Adam's moments, and with moments but without its epsilon.
_OTHERS = (
    "optim!=sgd|adagrad|adafactor|rmsprop|rmsprop_bnb|rmsprop_bnb_8bit|rmsprop_bnb_32bit|lomo|adalomo|galore_adafactor"
    "|galore_adafactor_layerwise|schedule_free_sgd"
)
_LIONS = "|lion_8bit|lion_32bit|paged_lion_8bit|paged_lion_32bit"
_BEST = "load_best_model_at_end or save_strategy=best or lr_scheduler_type=reduce_lr_on_plateau|greedy"
_NEEDS = {
    option: need
    for options, need in {
        # Sizes of a model from scratch, beside a checkpoint that has its own.
        """model_type hidden_size num_hidden_layers num_attention_heads intermediate_size embedding_size
        max_position_embeddings config_overrides hidden_dropout_prob attention_probs_dropout_prob cutoffs untie_r
        pre_layer_norm""": "!model_name_or_path",
        "tokenizer_type lowercase strip_accents vocab_size": "!prepared_data and !tokenizer_name and !model_name_or_path",
        # Text that is prepared has them already.
        """text_column document_separator on_bad_text split_seed max_corpus_bytes word_segmenter
        preprocessing_num_workers""": "!prepared_data",
        "tokenizer_frame": "!tokenizer_name and !model_name_or_path and language_file or parallel_file",
        "language_sampling_alpha mixture_unit": "language_file or parallel_file",
        "bitext_share bitext_frame": "parallel_file",
        "branch_from": "phases",
        "dataset_config_name dataset_split validation_split": "dataset_name",
        "demo_corpus": "!train_file and !dataset_name",
        "shuffle_buffer_size": "streaming",
        "dataloader_drop_last dataloader_in_order": "!streaming",
        "dataloader_persistent_workers": "!streaming and dataloader_num_workers",
        "validation_fraction": "!prepared_data and !streaming and !validation_file",
        # Lanes are read in order, and cut the text themselves.
        "data_seed": "!streaming and !tgt_len and !mem_len",
        "block_mode": "!tgt_len and !mem_len",
        "block_size": "!tgt_len",
        "adam_beta1 adam_beta2": _OTHERS,
        "adam_epsilon": _OTHERS + _LIONS,
        "overwrite_output_dir": "!resume_from_checkpoint",
        "ignore_data_skip": "!streaming and resume_from_checkpoint",
        "restore_callback_states_from_checkpoint": "resume_from_checkpoint",
        "num_train_epochs": "max_steps=-1",
        "warmup_steps": "lr_scheduler_type!=constant|reduce_lr_on_plateau|greedy",
        "lr_scheduler_kwargs": "!decay_during_warmup",
        "logging_steps": "logging_strategy=steps",
        "do_eval eval_delay": "eval_strategy!=no",
        "eval_steps": "eval_strategy=steps",
        "save_steps": "save_strategy=steps",
        "save_total_limit save_only_model save_on_each_node": "save_strategy!=no",
        "metric_for_best_model greater_is_better": _BEST,
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs": "activation_checkpointing",
        "fsdp_config": "fsdp",
        "hub_strategy hub_always_push hub_revision": "push_to_hub",
        "evaluation_data_dir evaluation_max_examples": "evaluation_tasks",
        "hub_branch_name": "hub_branches",
        "hub_private_repo": "push_to_hub or report_to~trackio|all",
        "project trackio_space_id trackio_bucket_id trackio_static_space_id": "report_to~trackio|all",
    }.items()
    for option in options.split()
}
"""What options need to have an effect; a method says it of its own in the class variable `needs` of its dataclass.

"name": that option is set; "!name": it is not; "name=a|b" or "name!=a|b": it is or is not one of these; "name~a|b": it holds
one of these. All that are joined by "and" must hold; of those joined by "or", which binds closer, one.
"""
# Command lines share these from one run to the next, so they are noted and not refused.
_ONLY_NOTED = {"vocab_size", "warmup_steps", "logging_steps", "block_size", "validation_fraction"}


def check_needs(instances: Iterable[Any], typed: Iterable[str]) -> None:
    """Refuse options on a command line that have no effect beside the others.

    A recipe may hold them: it suits runs with and without them.

    Args:
        instances: The dataclasses of a program, filled in.
        typed: Names of the options on the command line.

    Raises:
        InputError: Naming the option, its value and what it needs.
    """
    values: dict[str, Any] = {}
    needs, switched_off = dict(_NEEDS), set()
    for instance in instances:
        needs |= declared(instance, "needs")
        values |= {known.name: getattr(instance, known.name) for known in dataclasses.fields(instance)}
        switched_off |= {known.name for known in dataclasses.fields(instance) if known.default is False}
        if hasattr(instance, "weights"):
            values["losses"] = list(instance.weights())
    for name in dict.fromkeys(typed):
        value = values.get(name)
        if value is None or (value is False and name in switched_off):
            continue
        for need in needs[name].split(" and ") if name in needs else ():
            reasons = [_lack(part, values) for part in need.split(" or ")]
            if not all(reasons):
                continue
            message = f"{name}={_text(value)!r} has no effect {', and '.join(map(str, reasons))}"
            if name not in _ONLY_NOTED:
                raise InputError(message)
            logger.warning(message)


def check_changed(instance: Any) -> None:
    """Refuse options of a dataclass that are not its defaults and have no effect beside the others; see [`check_needs`].

    Raises:
        InputError: Naming the option, its value and what it needs.
    """
    changed = []
    for known in dataclasses.fields(instance):
        make = known.default_factory
        default = known.default if make is dataclasses.MISSING else make()
        if getattr(instance, known.name) != default:
            changed.append(known.name)
    check_needs([instance], [name for name in changed if name in declared(instance, "needs")])


def _lack(need: str, values: Mapping[str, Any]) -> str | None:
    """Return beside or without what an option has no effect, and the way on; None where the need is met."""
    negation, name, relation, choices = re.fullmatch(r"(!?)(\w+)(!=|=|~)?(.*)", need).groups()  # type: ignore[union-attr]
    if name not in values:
        return None
    value, words = _text(values[name]), choices.split("|")
    if relation is None:
        if bool(value) == (not negation):
            return None
        beside = f"beside {name}={value!r}: leave one of them out"
        return beside if negation else f"without {name}: set it too, or leave this out"
    held = set(value or ()) if relation == "~" and not isinstance(value, str) else {str(value)}
    if bool(held & set(words)) == (relation != "!="):
        return None
    wanted = " or ".join(words) if relation == "~" else f"{name}={' or '.join(words)}"
    return f"with {name}={value!r}: " + ("leave one of them out" if relation == "!=" else f"it is for {wanted}")


def _text(value: Any) -> Any:
    return getattr(value, "value", value)


def check_together(instances: Iterable[Any]) -> None:
    """Refuse options of different dataclasses that contradict each other, whatever the text is.

    Raises:
        InputError: Naming both.
    """
    values: dict[str, Any] = {}
    training = None
    for instance in instances:
        values |= {known.name: getattr(instance, known.name) for known in dataclasses.fields(instance)}
        training = instance if isinstance(instance, TrainingArguments) else training
    is_stream = bool(values.get("streaming"))
    if training is not None:
        holds_out = not is_stream and values.get("validation_fraction") != 0
        holds_out |= bool(values.get("validation_file") or values.get("validation_split"))
        why = " (streaming holds none out)" if is_stream else " (validation_fraction=0)"
        check_text(training, is_stream=is_stream, holds_out=holds_out, why=why)
    if is_stream and (values.get("tgt_len") or values.get("mem_len")):
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
