"""Examples of token classification: a class of each word stands at its first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.data.documents import check_offsets
from hf_pretrain.data.words import character_kinds, next_visible
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.distillation.augmentation import TEXT
from hf_pretrain.objectives.distillation.task_examples import INPUTS, label_number, map_texts


def encode_tokens(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str,
    labels: str | None,
    config: PreTrainedConfig,
    max_length: int,
) -> datasets.Dataset:
    """Tokenize texts, or words with their classes; done once, and found again.

    Args:
        examples: Rows of text, or of lists of words, which are joined by spaces.
        tokenizer: A fast tokenizer that pads.
        column: Column of the text or the words.
        labels: Column of the classes of the words, None if there are none.
        config: The teacher's configuration, with its classes.
        max_length: Most tokens of an example; what goes beyond is cut off.

    Returns:
        Rows of `input_ids`, `token_type_ids` if the tokenizer makes them, `is_target`, true of all but special tokens, and
        `labels` if there are any: of each token, -100 but at the first token of a word.

    Raises:
        InputError: If words and classes are not equally many, or a class is none of the teacher's, or there are classes but
            no words.
    """
    check_offsets(tokenizer)
    is_text = getattr(examples.features[column], "dtype", None) in TEXT
    if is_text and labels is not None:
        raise InputError(
            f"text_columns names {column!r}, which holds texts, but label_column={labels!r} has a class for each word: name a "
            "column of lists of words"
        )
    classes = None if labels is None else _Classes(examples, labels, config)

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        words = [[text] if is_text else [str(word).strip() for word in text] for text in rows[column]]
        found = tokenizer(
            [_joined(row) for row in words],
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        inputs = {name: found[name] for name in INPUTS if name in found}
        inputs["is_target"] = [[not flag for flag in row] for row in found["special_tokens_mask"]]
        if classes is not None:
            inputs["label_ids"] = [
                _labels(row, classes(tags, row, index), offsets, targets)
                for row, tags, index, offsets, targets in zip(
                    words, rows[str(labels)], indices, found["offset_mapping"], inputs["is_target"], strict=True
                )
            ]
        return inputs

    key = (column, labels, None if classes is None else classes.key, max_length)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


class _Classes:
    """Numbers the classes of words as the teacher does."""

    def __init__(self, examples: datasets.Dataset, column: str, config: PreTrainedConfig) -> None:
        feature = getattr(examples.features[column], "feature", None)
        if feature is None:
            raise InputError(
                f"label_column={column!r} holds no lists, but each word needs a class: name a column of lists"
            )
        self.column = column
        self.config = config
        self.names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.key = (self.names, config.label2id, config.num_labels)
        self._known: dict[Any, int] = {}

    def __call__(self, tags: Sequence[Any] | None, words: Sequence[str], index: int) -> np.ndarray:
        """Return the number of each word's class."""
        if tags is None:
            return np.full(len(words), IGNORED)
        if len(tags) != len(words):
            raise InputError(
                f"row {index} has {len(words)} words and {len(tags)} {self.column!r}: give a class to each"
            )
        for tag in tags:
            if tag not in self._known:
                self._known[tag] = label_number(tag, self.names, self.config, self.column)
        return np.array([self._known[tag] for tag in tags], dtype=np.int64)


def _joined(words: Sequence[str]) -> str:
    """Return words as a text; words of nothing would only be more spaces."""
    return " ".join(filter(None, words))


def _labels(
    words: Sequence[str],
    classes: np.ndarray,
    offsets: Sequence[tuple[int, int]],
    is_target: Sequence[bool],
) -> list[int]:
    """Return the label of each token of words that were joined by spaces."""
    classes = classes[[bool(word) for word in words]]
    begins, text = np.cumsum([0, *(len(word) + 1 for word in words if word)])[:-1], _joined(words)
    # A token may begin with the space before its word.
    places = next_visible(character_kinds(text), np.array([begin for begin, _ in offsets], dtype=np.int64))
    numbers = np.searchsorted(begins, places, side="right") - 1
    numbers = np.where(is_target, numbers, -1)
    is_first = (numbers >= 0) & (numbers != np.append(-1, numbers)[:-1])
    return np.where(is_first, np.append(classes, IGNORED)[numbers], IGNORED).tolist()
