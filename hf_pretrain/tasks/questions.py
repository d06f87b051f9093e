"""Questions with their texts as tokens: windows of texts that are too long, and the span of the answer in each.

[`question_windows`] makes the windows. [`encode_questions`] makes examples to train on, `answers.py` reads answers from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.documents.documents import check_offsets
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.tasks.examples import map_texts, model_inputs


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

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        windows = question_windows(
            rows[columns[0]],
            rows[columns[1]],
            tokenizer,
            max_length=max_length,
            doc_stride=doc_stride,
            indices=indices,
        )
        # By name, all windows' values of an input.
        inputs: dict[str, Any] = {name: [window.inputs[name] for window in windows] for name in windows[0].inputs}
        inputs["is_target"] = [
            (window.in_text | (np.arange(len(window.in_text)) == window.no_answer)).tolist() for window in windows
        ]
        if labels is not None:
            answers = zip(rows[labels], rows[columns[1]], indices, strict=True)
            spans = [_answer_span(*answer) for answer in answers]
            inputs["label_ids"] = [_label_of_window(spans[window.source], window) for window in windows]
        return inputs

    key = (list(columns), labels, max_length, doc_stride)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


@dataclass(frozen=True)
class QuestionWindow:
    """A question and as much of its text as fits beside it.

    Attributes:
        source: Number of the question.
        inputs: What the model reads, by name: `input_ids`, and `token_type_ids` if the tokenizer makes them.
        offsets: Characters of each token, begin and end, ``int64 [L, 2]``.
        in_text: Whether a token is one of the text, ``bool [L]``.
        no_answer: Position of the token of whole texts (BERT's [CLS]), which stands for no answer; -100 if there is none.
    """

    source: int
    inputs: dict[str, list[int]]
    offsets: np.ndarray
    in_text: np.ndarray
    no_answer: int


def question_windows(
    questions: Sequence[Any],
    texts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    doc_stride: int,
    indices: Sequence[int] | None = None,
) -> list[QuestionWindow]:
    """Tokenize questions with their texts; a text that does not fit is cut into windows, each with the whole question.

    Args:
        questions: The questions.
        texts: The text of each.
        tokenizer: A fast tokenizer.
        max_length: Most tokens of a window, the question included.
        doc_stride: Tokens that a window shares with the next.
        indices: Numbers of the rows, for messages.

    Returns:
        The windows, those of a question one after the other.

    Raises:
        InputError: If a question leaves no room for the text, or there is no text.
    """
    check_offsets(tokenizer)
    asked = ["" if question is None else str(question).strip() for question in questions]
    _check_texts(
        asked, texts, range(len(asked)) if indices is None else indices, tokenizer, room=max_length - doc_stride
    )
    found = tokenizer(
        asked,
        list(texts),
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows, columns = [], model_inputs(found, tokenizer)
    for number, source in enumerate(found["overflow_to_sample_mapping"]):
        inputs = {name: column[number] for name, column in columns.items()}
        parts = np.array([-1 if part is None else part for part in found.sequence_ids(number)])
        is_cls = (parts == -1) & (np.array(inputs["input_ids"]) == tokenizer.cls_token_id)
        no_answer = int(is_cls.argmax()) if is_cls.any() else IGNORED
        offsets = np.array(found["offset_mapping"][number], dtype=np.int64)
        windows.append(QuestionWindow(int(source), inputs, offsets, parts == 1, no_answer))
    return windows


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


def gold_answers(answer: Any) -> list[str] | None:
    """Return the right answers of a question; empty if it has none, None if they are not known.

    Args:
        answer: A value of a column of answers: a mapping with `text`, one or a list, or a list of mappings.
    """
    found = _texts_and_starts(answer)
    return None if found is None else [text for text, _ in found if text.strip()]


def _texts_and_starts(answer: Any) -> list[tuple[str, int | None]] | None:
    """Return the answers in any of the forms of a column of answers, None if they are not known."""
    if answer is None:
        return None
    if not isinstance(answer, Mapping):
        return [(part["text"], part.get("answer_start")) for part in answer]
    texts, starts = answer.get("text"), answer.get("answer_start")
    if isinstance(texts, str):
        return [(texts, starts)]
    return list(zip(texts or (), starts or (), strict=True))


def _answer_span(answer: Any, text: str, index: int) -> tuple[int, int] | None:
    """Return begin and end of the first answer in the text; (0, 0) if there is none, None if it is not known."""
    found = _texts_and_starts(answer)
    if found is None:
        return None
    if not found or not found[0][0].strip():
        return 0, 0
    piece, begin = found[0]
    if begin is None or text[begin : begin + len(piece)] != piece:
        raise InputError(
            f"row {index}: the answer {piece!r} does not begin at character {begin} of the text: correct answer_start"
        )
    begin += len(piece) - len(piece.lstrip())
    return begin, begin + len(piece.strip())


def _label_of_window(span: tuple[int, int] | None, window: QuestionWindow) -> list[int]:
    """Return the first and the last token of a span of characters, or twice the token that means no answer."""
    if span is None:
        return [IGNORED, IGNORED]
    begin, end = span
    offsets, in_text = window.offsets, window.in_text
    shown = offsets[in_text]
    tokens = np.flatnonzero(in_text & (offsets[:, 0] < end) & (offsets[:, 1] > begin))
    is_whole = len(tokens) and shown[0, 0] <= begin and shown[-1, 1] >= end
    return [int(tokens[0]), int(tokens[-1])] if is_whole else [window.no_answer, window.no_answer]
