"""What ``hf-pretrain`` does beside training: cards, exports, statistics and near-duplicates. Here are the options they share."""

import sys
from typing import Any

from transformers.utils import logging as transformers_logging

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.options import option
from hf_pretrain.training.parsing import parse_arguments


def parse_command(
    arguments: tuple[type, ...],
    argv: list[str] | None,
    *,
    name: str,
    description: str | None,
    first: str | None = None,
) -> Any:
    """Return the options of a command: an instance of its dataclass, or of several a tuple.

    Args:
        arguments: A tuple of their dataclasses.
        argv: The arguments, without the name of the program; those of the process if None.
        name: Name of the command.
        description: What it does, for its help.
        first: The option that may be given first without its name.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if first is not None and given and not given[0].startswith("-"):
        given.insert(0, f"--{first}")
    found = parse_arguments(arguments, given, prog=f"hf-pretrain {name}", description=description or "")
    # Bars of saving and loading a model would bury what a command says.
    transformers_logging.disable_progress_bar()
    return found[0] if len(found) == 1 else found


def of_data(name: str) -> Any:
    """Return a field with the default and the help of an option of `DataArguments`."""
    same = DataArguments.__dataclass_fields__[name]
    return option(same.default, same.metadata["help"])


def text_files() -> Any:
    """Return the field of the text that a command reads; it must be given."""
    help_text = str(DataArguments.__dataclass_fields__["train_file"].metadata["help"])
    return option(help=help_text.replace("train on", "read", 1))
