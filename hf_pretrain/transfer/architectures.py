"""Examples and batches of two texts that go through an encoder apart, for the architecture "pair_encoder".

The architectures themselves are in `models/task_heads/`, whose code is exported with a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.tasks.augmentation import SOURCE_ID
from hf_pretrain.tasks.batches import DataCollatorForTask
from hf_pretrain.tasks.examples import INPUTS, encode

_PAIR = "pair_"


def encode_text_pairs(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str],
    labels: str | None,
    config: PreTrainedConfig,
    max_length: int,
) -> datasets.Dataset:
    """Tokenize two texts of each row apart, each with the special tokens of one text; done once, and found again.

    Args:
        examples: Rows of text.
        tokenizer: A tokenizer that pads.
        columns: Columns of the first and of the second text.
        labels: Column of the labels, None if there are none.
        config: The model's configuration, with its labels.
        max_length: Most tokens of each text; the rest is cut off.

    Returns:
        Rows of `input_ids` and `pair_input_ids`, both with token types if the tokenizer makes them, and `labels` if wanted.

    Raises:
        InputError: If there are not two columns, or a label is none of the model's.
    """
    if len(columns) != 2:
        raise InputError(f"columns={list(columns)}: name two columns, of the first and of the second text")
    first = encode(examples, tokenizer, columns=columns[:1], labels=labels, config=config, max_length=max_length)
    second = encode(examples, tokenizer, columns=columns[1:], labels=None, config=config, max_length=max_length)
    second = second.remove_columns([name for name in second.column_names if name == SOURCE_ID])
    second = second.rename_columns({name: f"{_PAIR}{name}" for name in second.column_names})
    return datasets.concatenate_datasets([first, second], axis=1)


@dataclass
class DataCollatorForTextPairs(DataCollatorForTask):
    """Pads first and second texts, each to the longest of them.

    A batch has `input_ids` and `attention_mask` ``[B, L]``, `pair_input_ids` and `pair_attention_mask` ``[B, M]``, and `labels`
    ``[B]``; both texts have token types if the examples have them.

    Args:
        tokenizer: A tokenizer with a padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        if f"{_PAIR}input_ids" not in examples[0]:
            raise InputError("pair_input_ids is missing from the examples: make them with encode_text_pairs")
        collate = super().__call__
        first = [{name: each[name] for name in (*INPUTS, "labels") if name in each} for each in examples]
        names = [name for name in INPUTS if f"{_PAIR}{name}" in examples[0]]
        second = collate([{name: each[f"{_PAIR}{name}"] for name in names} for each in examples])
        return collate(first) | {f"{_PAIR}{name}": values for name, values in second.items()}
