"""What is hidden and what must be found again: masking units, spans, replacements, in NumPy."""

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.corruption.masking import MaskedRows, Vocabulary, mask_rows, select_targets
from hf_pretrain.corruption.rows import ExampleRows, RowKeys
from hf_pretrain.corruption.selection import Selection

__all__ = [
    "ExampleRows",
    "MaskedRows",
    "MaskingArguments",
    "RowKeys",
    "Selection",
    "Vocabulary",
    "mask_rows",
    "select_targets",
]
