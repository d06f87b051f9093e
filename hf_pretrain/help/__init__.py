"""The help of a program: its options in groups, the objective first, and those of transformers only on demand.

The short help of each method and command is kept in the files beside this one, because the import of torch and transformers takes
seconds. `make docs` writes these files, and a test compares them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_pretrain.names import cut, described_recipes

_WIDTH, _COLUMN = 110, 34
# Options of training by group, the frequent ones: all others of transformers are shown by --help-all alone.
_OF_TRAINING = {
    "optimisation": """max_steps num_train_epochs max_minutes phases branch_from
    per_device_train_batch_size gradient_accumulation_steps
    learning_rate warmup_steps lr_scheduler_type optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed bf16
    activation_checkpointing torch_compile""",
    "adapters": """adapter adapter_rank adapter_alpha adapter_dropout adapter_targets adapter_modules_to_save
    adapter_train_embeddings adapter_export""",
    "logging": """output_dir overwrite_output_dir resume_from_checkpoint logging_steps eval_strategy eval_steps
    max_eval_tokens per_device_eval_batch_size save_strategy save_steps save_total_limit load_best_model_at_end report_to
    run_name""",
    "Hub": "push_to_hub hub_model_id hub_private_repo hub_strategy hub_branches language license datasets tags private_text",
}
_GROUP_OF = {name: group for group, names in _OF_TRAINING.items() for name in names.split()}
_PREFIXES = {
    "hub_": "Hub",
    "push_": "Hub",
    "log": "logging",
    "eval_": "logging",
    "save_": "logging",
    "trackio_": "logging",
}
_ORDER = ("objective", "strategy", "model", "data", "options", *_OF_TRAINING, "advanced")
# Options of this library that few runs need; --help-all has them too.
RARE = set(
    """on_bad_text split_seed max_unknown_share word_segmenter shuffle_buffer_size dataset_split
    dataloader_num_workers profile
    attn_implementation model_dtype teacher_dtype teacher_device teacher_compile decay_during_warmup adam_bias_correction
    augmentation_batch_size""".split()
)
# Long texts of transformers, in one line.
_SHORTER = {
    "max_steps": "Steps to train; -1 takes num_train_epochs.",
    "num_train_epochs": "Epochs to train, where max_steps is not given.",
    "per_device_train_batch_size": "Examples of a batch, on each device.",
    "per_device_eval_batch_size": "Examples of a batch in evaluation, on each device.",
    "gradient_accumulation_steps": "Batches that make one step.",
    "lr_scheduler_type": "Schedule of the learning rate: linear, cosine, constant, polynomial, ...",
    "optim": "Optimizer: adamw_torch_fused, muon, stable_adamw, adamw_rms, adafactor, ...",
    "seed": "Seed of weights, order, masks and dropout.",
    "activation_checkpointing": "Compute activations twice, to save memory.",
    "torch_compile": "Compile the model with torch.compile.",
    "output_dir": "Folder of the model, its card, the record of the run and checkpoints.",
    "logging_steps": "Log each so many steps; below 1, a share of all steps.",
    "eval_strategy": "Evaluate in training: no, steps or epoch.",
    "eval_steps": "Evaluate each so many steps; by default as logging_steps.",
    "save_strategy": "Save checkpoints: no, steps, epoch or best.",
    "save_steps": "Save each so many steps.",
    "save_total_limit": "Keep so many checkpoints.",
    "load_best_model_at_end": "Export the checkpoint with the best evaluation.",
    "report_to": "Where to log too: tensorboard, wandb, trackio, ...",
    "run_name": "Name of the run there.",
    "push_to_hub": "Push the model and its card to the Hub.",
    "hub_model_id": "Repository, such as me/my-bert; by default named as output_dir.",
    "hub_private_repo": "Make the repository private.",
    "hub_strategy": "What is pushed when: end, every_save, checkpoint or all_checkpoints.",
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of an option, its default, and the description with the line breaks that it has."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH, max_help_position=_COLUMN)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        words = "|".join(map(str, action.choices or ()))
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        words = "true|false" if action.type is string_to_bool else words
        value = action.metavar or (f"{{{words}}}" if words and len(words) < 40 else "VALUE")
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs in ('+', '*') else ''}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, "", []) or "%(default" in text or "(default:" in text:
            return text
        default = getattr(action.default, "value", action.default)
        return f"{text.rstrip()} (default: {str(default).replace('%', '%%')})"


def group_of(name: str, owner: type) -> str:
    """Return the group of an option.

    Args:
        name: Name of the option.
        owner: The dataclass of the program that has it.
    """
    if name in RARE:
        return "advanced"
    if issubclass(owner, TrainingArguments):
        if name in _GROUP_OF:
            return _GROUP_OF[name]
        of_all = {field.name for base in owner.__mro__ if _is_for_all(base) for field in dataclasses.fields(base)}
        if name not in of_all:
            return "strategy" if "strategy" in {field.name for field in dataclasses.fields(owner)} else "objective"
        return next((group for prefix, group in _PREFIXES.items() if name.startswith(prefix)), "advanced")
    fields = {field.name for field in dataclasses.fields(owner)}
    if "teacher_name_or_path" in fields or "hidden_size" in fields:
        return "model"
    return "data" if "train_file" in fields and "validation_fraction" in fields else "options"


def _is_for_all(base: type) -> bool:
    return base.__name__ in ("PretrainingArguments", "TrainingArguments")


def help_text(parser: argparse.ArgumentParser, dataclass_types: Sequence[type], *, is_whole: bool) -> str:
    """Return the help of a program.

    Args:
        parser: The parser of the program, with the defaults to show.
        dataclass_types: The dataclasses of its options.
        is_whole: Whether to show the options of transformers that few runs need, too.
    """
    groups: dict[str, list[argparse.Action]] = {group: [] for group in _ORDER}
    has_more = False
    actions = {action.dest: action for action in reversed(parser._actions) if action.option_strings}
    for owner in dataclass_types:
        for field in dataclasses.fields(owner):
            group, action = group_of(field.name, owner), actions.get(field.name)
            is_inherited = issubclass(owner, TrainingArguments) and group not in ("objective", "strategy")
            is_rare = group == "advanced" or (is_inherited and field.name not in _GROUP_OF)
            has_more |= is_rare
            if action is not None and action not in groups[group] and (is_whole or not is_rare):
                if is_inherited:
                    action.help = _SHORTER.get(field.name, action.help)
                groups[group].append(action)
    formatter = _Formatter(parser.prog)
    formatter.add_usage(parser.usage, parser._actions, [])
    formatter.add_text(parser.description)
    for group, found in groups.items():
        if found:
            formatter.start_section(group)
            formatter.add_arguments(found)
            formatter.end_section()
    formatter.start_section("help")
    last = [action for action in parser._actions if isinstance(action, _Show) or action.dest == "config"]
    formatter.add_arguments(last if has_more else [action for action in last if not action.const])
    formatter.end_section()
    more = f"\n`{parser.prog} --help-all` shows every option, also those of transformers.TrainingArguments.\n"
    text = formatter.format_help().rstrip() + "\n" + _recipes(parser.prog)
    return text + (more if has_more and not is_whole else "")


def _recipes(prog: str) -> str:
    """Return the list of the recipes of a method, each with one line."""
    method = prog.removeprefix("hf-pretrain ")
    found = {name: line for name, (owner, line) in described_recipes().items() if owner == method}
    if not found:
        return ""
    lines = [f"  {name:<{_COLUMN - 4}}  {cut(line, _WIDTH - _COLUMN)}" for name, line in found.items()]
    return "\n".join(["\nrecipes, for --config:", *lines]) + "\n"


class _Show(argparse.Action):
    """Prints the help and ends the program."""

    def __init__(self, *args: Any, dataclass_types: Sequence[type] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dataclass_types = dataclass_types

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(help_text(parser, self.dataclass_types, is_whole=bool(self.const)), end="")
        parser.exit()


def add_help(parser: argparse.ArgumentParser, dataclass_types: Sequence[type]) -> None:
    """Add ``--help`` and ``--help-all`` to a parser of the options of dataclasses."""
    options: dict[str, Any] = {"action": _Show, "nargs": 0, "dest": argparse.SUPPRESS}
    options |= {"dataclass_types": dataclass_types, "default": argparse.SUPPRESS}
    parser.add_argument("-h", "--help", const=False, help="Show the options that most runs need.", **options)
    parser.add_argument("--help-all", const=True, help="Show every option.", **options)
