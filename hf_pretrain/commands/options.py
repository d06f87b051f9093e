"""Options that the commands share with the programs that train."""

from dataclasses import field
from typing import Any

from hf_pretrain.data.arguments import DataArguments


def of_data(name: str) -> Any:
    """Return a field with the default and the help of an option of `DataArguments`."""
    same = DataArguments.__dataclass_fields__[name]
    return field(default=same.default, metadata=same.metadata)
