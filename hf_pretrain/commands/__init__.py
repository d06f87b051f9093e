"""What ``hf-pretrain`` does beside training: cards, exports, statistics and near-duplicates. Here are the options they share."""

from dataclasses import field
from typing import Any

from hf_pretrain.data.arguments import DataArguments


def of_data(name: str) -> Any:
    """Return a field with the default and the help of an option of `DataArguments`."""
    same = DataArguments.__dataclass_fields__[name]
    return field(default=same.default, metadata=same.metadata)


def text_files() -> Any:
    """Return the field of the text that a command reads; it must be given."""
    help_text = str(DataArguments.__dataclass_fields__["train_file"].metadata["help"])
    return field(metadata={"help": help_text.replace("train on", "read", 1)})
