"""Masking in NumPy: which tokens are selected as targets, and what replaces them.

arguments -> rows (a batch as arrays) -> selection, spans (units to select) -> masking (targets and replacements);
permutation and word_order are the corruptions of XLNet and StructBERT.
"""

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
