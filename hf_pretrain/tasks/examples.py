"""Tokenized examples of a task: one function for each kind, texts, words and questions.

Each takes rows of text and returns a dataset of `input_ids`, of `is_target` where tokens have predictions, and of
`labels` with the numbers of the teacher. [`map_texts`] does it once: the same rows, tokenizer and options find the
result in the cache of `datasets`.
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
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.modeling.observing.cache import tokenizer_fingerprint
from hf_pretrain.tasks.augmentation import SOURCE_ID, TEXT

INPUTS = ("input_ids", "token_type_ids")


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
        config: The teacher's configuration, with its labels.
        max_length: Most tokens of an example; of a pair, the longer text is cut first.

    Returns:
        Rows of `input_ids`, `token_type_ids` if the tokenizer makes them, and `labels` if there are any.

    Raises:
        InputError: If a label is none of the teacher's.
    """

    def to_inputs(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [["" if text is None else str(text) for text in rows[name]] for name in columns]
        found = tokenizer(*texts, truncation=True, max_length=max_length)
        return {name: found[name] for name in INPUTS if name in found}

    if labels is None:
        return map_texts(examples, to_inputs, tokenizer, key=(list(columns), max_length))
    if config.num_labels == 1:
        numbers = _values(examples, labels)
    else:
        classes = _Classes(examples.features[labels], labels, config)
        numbers = np.array([classes[value] for value in examples[labels][:]], dtype=np.int64)
    encoded = map_texts(examples, to_inputs, tokenizer, key=(list(columns), max_length))
    return encoded.add_column("labels", numbers)


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
        max_length: Most tokens of an example; the rest is cut off.

    Returns:
        Rows of `input_ids`, `token_type_ids` if the tokenizer makes them, `is_target`, true of all but special tokens,
        and `labels` if there are any: of each token, -100 but at the first token of a word.

    Raises:
        InputError: If words and classes are not equally many, or a class is none of the teacher's, or there are
            classes but no words.
    """
    check_offsets(tokenizer)
    is_text = getattr(examples.features[column], "dtype", None) in TEXT
    if is_text and labels is not None:
        raise InputError(
            f"text_columns names {column!r}, which holds texts, but label_column={labels!r} has a class for each word: name a "
            "column of lists of words"
        )
    classes = None
    if labels is not None:
        feature = getattr(examples.features[labels], "feature", None)
        if feature is None:
            raise InputError(
                f"label_column={labels!r} holds no lists, but each word needs a class: name a column of lists"
            )
        classes = _Classes(feature, labels, config)

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        words = [[text] if is_text else [str(word).strip() for word in text] for text in rows[column]]
        found = tokenizer(
            [" ".join(filter(None, row)) for row in words],
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        inputs = {name: found[name] for name in INPUTS if name in found}
        inputs["is_target"] = [[not flag for flag in row] for row in found["special_tokens_mask"]]
        if classes is not None:
            tags = map(classes.of_words, rows[classes.column], words, indices)
            inputs["label_ids"] = list(
                map(_labels_of_tokens, words, tags, found["offset_mapping"], inputs["is_target"])
            )
        return inputs

    numbering = None if classes is None else (classes.names, config.label2id, config.num_labels)
    key = (column, labels, numbering, max_length)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


def encode_questions(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str],
    labels: str | None,
    max_length: int,
    doc_stride: int,
) -> datasets.Dataset:
    """Tokenize questions with their texts; done once, and found again.

    A text that does not fit is cut into windows, each with the whole question. In a window without the answer, and
    where there is no answer, the span is the tokenizer's token of whole texts (BERT's [CLS]), as in SQuAD 2.0; it is
    unknown if there is none.

    Args:
        examples: Rows of questions and texts.
        tokenizer: A fast tokenizer that pads.
        columns: Columns of the question and of the text.
        labels: Column of the answers, with `text` and `answer_start`, of which the first counts; None if there are
            none. In a row without a value they are unknown; in a row with an empty list there is none.
        max_length: Most tokens of a window, the question included.
        doc_stride: Tokens that a window shares with the next.

    Returns:
        A row a window: `input_ids`, `token_type_ids` if the tokenizer makes them, `is_target`, true of the text and
        the special token, and `labels` if there are answers: the first and the last token, -100 where they are
        unknown.

    Raises:
        InputError: If a question leaves no room for the text, or an answer is not at its `answer_start`.
    """
    check_offsets(tokenizer)

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        questions, texts = (["" if text is None else str(text).strip() for text in rows[columns[0]]], rows[columns[1]])
        _check_texts(questions, texts, indices, tokenizer, room=max_length - doc_stride)
        found = tokenizer(
            questions,
            list(texts),
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        inputs: dict[str, Any] = {name: found[name] for name in INPUTS if name in found} | {"is_target": []}
        if labels is not None:
            answers = zip(rows[labels], texts, indices, strict=True)
            spans, inputs["label_ids"] = [_answer_span(*answer) for answer in answers], []
        for number, source in enumerate(found["overflow_to_sample_mapping"]):
            parts = np.array([-1 if part is None else part for part in found.sequence_ids(number)])
            is_cls = (parts == -1) & (np.array(found["input_ids"][number]) == tokenizer.cls_token_id)
            no_answer = int(is_cls.argmax()) if is_cls.any() else IGNORED
            inputs["is_target"].append(((parts == 1) | (np.arange(len(parts)) == no_answer)).tolist())
            if labels is not None:
                offsets = np.array(found["offset_mapping"][number])
                inputs["label_ids"].append(_label_of_window(spans[source], offsets, parts == 1, no_answer))
        return inputs

    key = (list(columns), labels, max_length, doc_stride)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


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
        raise InputError(
            f"label_column={column!r} holds what is no number, for a teacher of values: {error}"
        ) from None
    return np.array(values, dtype=np.float32)


class _Classes(dict[Any, int]):
    """The teacher's number of each label in a column: by its name, or by its number; -100 for none, also written -1."""

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
                f"label_column={self.column!r} holds {value!r}, but the teacher's labels are "
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


def _labels_of_tokens(
    words: Sequence[str], classes: np.ndarray, offsets: Sequence[tuple[int, int]], is_target: Sequence[bool]
) -> list[int]:
    """Return the label of each token of words that were joined by spaces."""
    classes, words = classes[[bool(word) for word in words]], list(filter(None, words))
    begins, text = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1], " ".join(words)
    # A token may begin with the space before its word.
    begins_of_tokens = next_visible(character_kinds(text), np.array([begin for begin, _ in offsets], dtype=np.int64))
    numbers = np.searchsorted(begins, begins_of_tokens, side="right") - 1
    numbers = np.where(is_target, numbers, -1)
    is_first = (numbers >= 0) & (numbers != np.append(-1, numbers)[:-1])
    return np.where(is_first, np.append(classes, IGNORED)[numbers], IGNORED).tolist()


def _check_texts(
    questions: Sequence[str],
    texts: Sequence[Any],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    room: int,
) -> None:
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    lengths = [len(ids) for ids in tokenizer(list(questions), add_special_tokens=False)["input_ids"]]
    for text, length, index in zip(texts, lengths, indices, strict=True):
        if text is None or not str(text).strip():
            raise InputError(f"row {index} has no text to find the answer in: leave such rows out")
        if length + specials >= room:
            raise InputError(
                f"row {index}: a question of {length} tokens leaves no room for the text: raise max_length, or lower doc_stride"
            )


def _answer_span(answer: Any, text: str, index: int) -> tuple[int, int] | None:
    """Return begin and end of the first answer in the text; (0, 0) if there is none, None if it is not known."""
    if answer is None:
        return None
    if isinstance(answer, Mapping):
        texts, starts = answer.get("text"), answer.get("answer_start")
        first = (texts, starts) if isinstance(texts, str) else next(zip(texts or (), starts or (), strict=True), None)
    else:
        first = (answer[0]["text"], answer[0]["answer_start"]) if answer else None
    if first is None or not first[0].strip():
        return 0, 0
    found, begin = first
    if begin is None or text[begin : begin + len(found)] != found:
        raise InputError(
            f"row {index}: the answer {found!r} does not begin at character {begin} of the text: correct answer_start"
        )
    begin += len(found) - len(found.lstrip())
    return begin, begin + len(found.strip())


def _label_of_window(
    span: tuple[int, int] | None, offsets: np.ndarray, in_text: np.ndarray, no_answer: int
) -> list[int]:
    """Return the first and the last token of a span of characters, or twice the token that means no answer."""
    if span is None:
        return [IGNORED, IGNORED]
    begin, end = span
    shown = offsets[in_text]
    tokens = np.flatnonzero(in_text & (offsets[:, 0] < end) & (offsets[:, 1] > begin))
    is_whole = len(tokens) and shown[0, 0] <= begin and shown[-1, 1] >= end
    return [int(tokens[0]), int(tokens[-1])] if is_whole else [no_answer, no_answer]
