"""Tokenized examples of a task: one function for each kind: texts, words, choices (and `questions.py`).

Each takes rows of text and returns a dataset of `input_ids` and what else the tokenizer makes, of `is_target` where tokens
have predictions, and of `labels` with the numbers of the model. [`map_texts`] does it once: the same rows, tokenizer and
options find the result in the cache of `datasets`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.data.documents.documents import check_offsets
from hf_pretrain.data.documents.words import character_kinds, next_visible
from hf_pretrain.errors import InputError, nearest
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.modeling.observing.cache import tokenizer_fingerprint
from hf_pretrain.tasks.augmentation import SOURCE_ID, TEXT

CHARACTERS = "character_ids"
PAIR = "pair_"
"""What the names of the inputs of second texts begin with, where two texts are encoded apart."""


def input_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the names of a model's inputs that examples keep: all that the tokenizer makes but the mask, which padding makes."""
    others = (name for name in tokenizer.model_input_names if name != "attention_mask")
    return tuple(dict.fromkeys(("input_ids", "token_type_ids", *others)))


def model_inputs(found: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """Return the inputs among what a tokenizer made of several texts, a row a text, by name.

    ELMo's are `character_ids` too, ``[L, K]`` of a text: its words by their characters, in two bytes each.
    """
    inputs = {name: found[name] for name in input_names(tokenizer) if name in found}
    if CHARACTERS in inputs:
        inputs[CHARACTERS] = [np.asarray(row, dtype=np.int16) for row in inputs[CHARACTERS]]
    return inputs


def encode(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str],
    labels: str | None,
    config: PreTrainedConfig,
    max_length: int,
) -> datasets.Dataset:
    """Tokenize examples and number their labels; done once, and found again.

    Args:
        examples: Rows of text.
        tokenizer: A tokenizer that pads.
        columns: Column of the text, or of a pair of texts.
        labels: Column of the labels, None if there are none.
        config: The model's configuration, with its labels.
        max_length: Most tokens of an example; of a pair, the longer text is cut first.

    Returns:
        Rows of `input_ids`, of what else the tokenizer makes (`token_type_ids`, ELMo's `character_ids`), and of `labels` if there
        are any.

    Raises:
        InputError: If a label is none of the model's.
    """

    def to_inputs(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [["" if text is None else str(text) for text in rows[name]] for name in columns]
        found = tokenizer(*texts, truncation=True, max_length=max_length)
        return model_inputs(found, tokenizer)

    if labels is None:
        return map_texts(examples, to_inputs, tokenizer, key=(list(columns), max_length))
    if config.num_labels == 1:
        numbers = _values(examples, labels)
    else:
        classes = _Classes(examples.features[labels], labels, config)
        numbers = np.array([classes[value] for value in examples[labels][:]], dtype=np.int64)
    encoded = map_texts(examples, to_inputs, tokenizer, key=(list(columns), max_length))
    return encoded.add_column("labels", numbers)


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
    second = second.rename_columns({name: f"{PAIR}{name}" for name in second.column_names})
    return datasets.concatenate_datasets([first, second], axis=1)


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
        config: The model's configuration, with its classes.
        max_length: Most tokens of an example; the rest is cut off.

    Returns:
        Rows of `input_ids`, `token_type_ids` if the tokenizer makes them, `is_target`, true of all but special tokens,
        and `labels` if there are any: of each token, -100 but at the first token of a word.

    Raises:
        InputError: If words and classes are not equally many, or a class is none of the model's, or there are
            classes but no words.
    """
    check_offsets(tokenizer)
    is_text = getattr(examples.features[column], "dtype", None) in TEXT
    if is_text and labels is not None:
        raise InputError(
            f"text_columns names {column!r}, which holds texts, but label_column={labels!r} has a class for each word: name a "
            "column of lists of words"
        )
    classes: _Classes | None = None
    if labels is not None:
        feature = getattr(examples.features[labels], "feature", None)
        if feature is None:
            raise InputError(
                f"label_column={labels!r} holds no lists, but each word needs a class: name a column of lists"
            )
        classes = _Classes(feature, labels, config)

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        words = [[text] if is_text else [str(word).strip() for word in text] for text in rows[column]]
        inputs, found = _words_of_tokens(words, tokenizer, max_length=max_length)
        if classes is not None:
            tags = map(classes.of_words, rows[classes.column], words, indices)
            inputs["label_ids"] = [
                np.append(numbers, IGNORED)[word_of_token].tolist()
                for numbers, word_of_token in zip(tags, found, strict=True)
            ]
        return inputs

    numbering = None if classes is None else (classes.names, config.label2id, config.num_labels)
    key = (column, labels, numbering, max_length)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


def first_tokens(
    sentences: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[np.ndarray]:
    """Return the word that begins at each token, -1 at other tokens, as [`encode_tokens`] has them.

    Args:
        sentences: Words of each sentence.
        tokenizer: A fast tokenizer.
        max_length: Most tokens of an example.

    Returns:
        ``int64 [tokens]`` of each sentence. A word that is cut off or leaves no token is not in it.
    """
    check_offsets(tokenizer)
    words = [[str(word).strip() for word in sentence] for sentence in sentences]
    return _words_of_tokens(words, tokenizer, max_length=max_length)[1] if words else []


def _words_of_tokens(
    sentences: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Tokenize words that are joined by spaces; return the inputs, and the word that begins at each token, else -1."""
    found = tokenizer(
        [" ".join(filter(None, row)) for row in sentences],
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    inputs: dict[str, Any] = model_inputs(found, tokenizer)
    inputs["is_target"] = [[not flag for flag in row] for row in found["special_tokens_mask"]]
    return inputs, list(map(_first_tokens, sentences, found["offset_mapping"], inputs["is_target"]))


def encode_choices(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str],
    choices: Sequence[str],
    labels: str | None,
    max_length: int,
) -> datasets.Dataset:
    """Tokenize a context with each of its choices; done once, and found again.

    Args:
        examples: Rows of text.
        tokenizer: A tokenizer that pads.
        columns: Column of the context, and perhaps one of a beginning that all choices continue, after a space.
        choices: Columns of the choices, or one column of lists.
        labels: Column of the numbers of the right choices, from 0, as [`chosen_answer`] finds them; None if there are none.
        max_length: Most tokens of a context with a choice; the longer of the two is cut first.

    Returns:
        Rows of `input_ids` and `token_type_ids` if the tokenizer makes them, a list for each choice, and `labels` if there
        are any, -100 where there is none.

    Raises:
        InputError: If a row has another number of choices than the first one.
    """
    number = len(choices_of(examples[0], choices)) if len(examples) else 0

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        firsts, seconds = [], []
        for position, index in enumerate(indices):
            row = {name: values[position] for name, values in rows.items()}
            context, *beginning = ("" if row[name] is None else str(row[name]) for name in columns)
            answers = choices_of(row, choices)
            if len(answers) != number:
                raise InputError(
                    f"row {index} has {len(answers)} choices, the first row {number}: give all rows as many"
                )
            firsts += [context] * number
            seconds += [" ".join(filter(None, (*beginning, answer))) for answer in answers]
        found = tokenizer(firsts, seconds, truncation=True, max_length=max_length)
        inputs: dict[str, Any] = {
            name: [rows_of_input[begin : begin + number] for begin in range(0, len(firsts), number)]
            for name, rows_of_input in model_inputs(found, tokenizer).items()
        }
        if labels is not None:
            inputs["label_ids"] = [IGNORED if label is None else label for label in rows[labels]]
        return inputs

    key = (list(columns), list(choices), labels, max_length)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


def choices_of(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the choices of a row: of several columns, or of one column of lists."""
    values = row[columns[0]] if len(columns) == 1 else [row[name] for name in columns]
    if len(columns) == 1 and not isinstance(values, list):
        raise InputError(
            f"choices={list(columns)}: {columns[0]!r} holds no lists: name the column of each choice, or one of lists"
        )
    return ["" if value is None else str(value) for value in values]


def chosen_answer(label: Any, row: Mapping[str, Any], *, columns: Sequence[str], where: str) -> int | None:
    """Return the number of the right choice, from 0.

    Args:
        label: A whole number; or text: the name of a column of choices, the text of a choice, or a number.
        row: The row with its choices.
        columns: Columns of the choices, or one column of lists.
        where: Beginning of messages.

    Returns:
        The number, or None where there is no label, also written -1.

    Raises:
        InputError: If the label is no choice, or two choices have its text.
    """
    if label in (None, "", -1, "-1", IGNORED):
        return None
    choices = choices_of(row, columns)
    if isinstance(label, str) and len(columns) > 1 and label in columns:
        return columns.index(label)
    if isinstance(label, str) and label in choices:
        if choices.count(label) > 1:
            raise InputError(f"{where}: the label {label!r} is the text of two choices: give a number, from 0")
        return choices.index(label)
    is_number = isinstance(label, (int, float)) or str(label).isdecimal()
    number = float(label) if is_number and not isinstance(label, bool) else -1.0
    if number not in range(len(choices)):
        known = [*(columns if len(columns) > 1 else ()), *choices]
        raise InputError(
            f"{where}: the label {label!r} is none of its {len(choices)} choices: give a number from 0 to {len(choices) - 1}, "
            f"or a text; {nearest(label, known, otherwise=f'the choices are {choices}')}"
        )
    return int(number)


def map_texts(
    examples: datasets.Dataset,
    function: Callable[..., Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: Any,
    with_indices: bool = False,
) -> datasets.Dataset:
    """Make inputs of texts, once; a second call finds them in the cache of `datasets`.

    Args:
        examples: Rows of text. Only the column `source_id` stays; variants of one row share it.
        function: Takes rows, with their numbers if `with_indices`, and returns inputs, with `label_ids` for `labels`:
            an overwritten column would keep its type.
        tokenizer: Tokenizer of the function.
        key: All else that decides the result.
        with_indices: Whether the function takes numbers.
    """
    known = (examples._fingerprint, tokenizer_fingerprint(tokenizer), tokenizer.model_input_names)
    encoded = examples.map(
        function,
        with_indices=with_indices,
        batched=True,
        remove_columns=[name for name in examples.column_names if name != SOURCE_ID],
        new_fingerprint=Hasher.hash(("encode", *known, function.__qualname__, key)),
        desc="Tokenizing",
    )
    return encoded.rename_column("label_ids", "labels") if "label_ids" in encoded.column_names else encoded


def _values(examples: datasets.Dataset, column: str) -> np.ndarray:
    """Return the values of a regression, NaN where there is none."""
    try:
        # An empty field of a table of text is a label that is missing.
        values = [math.nan if value in (None, "") else float(value) for value in examples[column][:]]
    except (TypeError, ValueError) as error:
        raise InputError(f"label_column={column!r} holds what is no number, for a model of values: {error}") from None
    return np.array(values, dtype=np.float32)


class _Classes(dict[Any, int]):
    """The model's number of each label in a column: by its name, or by its number; -100 for none, also written -1."""

    def __init__(self, feature: Any, column: str, config: PreTrainedConfig) -> None:
        self.names: Sequence[str] | None = getattr(feature, "names", None)
        self.column = column
        self.config = config

    def __missing__(self, value: Any) -> int:
        self[value] = number = self._number(value)
        return number

    def _number(self, value: Any) -> int:
        if value in (None, "", -1, "-1", IGNORED):
            return IGNORED
        name, by_name = value if self.names is None else self.names[value], self.config.label2id or {}
        if name in by_name:
            return int(by_name[name])
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < self.config.num_labels or number != float(value):
            raise InputError(
                f"label_column={self.column!r} holds {value!r}, but the model's labels are "
                f"{', '.join(map(str, by_name))}: use these names, or numbers below {self.config.num_labels}"
            )
        return number

    def of_words(self, tags: Sequence[Any] | None, words: Sequence[str], row: int) -> np.ndarray:
        """Return the number of each word's class."""
        if tags is None:
            return np.full(len(words), IGNORED)
        if len(tags) != len(words):
            raise InputError(f"row {row} has {len(words)} words and {len(tags)} {self.column!r}: give a class to each")
        return np.array([self[tag] for tag in tags], dtype=np.int64)


def _first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]], is_target: Sequence[bool]) -> np.ndarray:
    """Return the word that begins at each token of words that were joined by spaces, -1 at other tokens."""
    rows, shown = np.flatnonzero([bool(word) for word in words]), list(filter(None, words))
    begins, text = np.cumsum([0, *(len(word) + 1 for word in shown)])[:-1], " ".join(shown)
    # A token may begin with the space before its word.
    begins_of_tokens = next_visible(character_kinds(text), np.array([begin for begin, _ in offsets], dtype=np.int64))
    numbers = np.searchsorted(begins, begins_of_tokens, side="right") - 1
    numbers = np.where(is_target, numbers, -1)
    is_first = (numbers >= 0) & (numbers != np.append(-1, numbers)[:-1])
    return np.where(is_first, np.append(rows, -1)[numbers], -1)
