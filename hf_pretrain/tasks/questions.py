"""Examples of extractive question answering: a question, and windows of a text in which the answer is a span of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.documents.documents import check_offsets
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.tasks.examples import INPUTS, map_texts


def read_squad(path: str) -> datasets.Dataset | None:
    """Read a file of SQuAD's form, articles of paragraphs of questions; None if it has another form.

    Returns:
        Rows of `question`, `context` and, unless no question has any, `answers`: `text` and `answer_start`.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = list(_questions(whole["data"])) if isinstance(whole, dict) else []
    except (ValueError, KeyError, TypeError):
        return None
    if rows and not any(row["answers"] is not None for row in rows):
        rows = [{name: row[name] for name in ("question", "context")} for row in rows]
    return datasets.Dataset.from_list(rows) if rows else None


def _questions(articles: list[Any]) -> Iterator[dict[str, Any]]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                found = asked.get("answers")
                answers = None
                if found is not None:
                    answers = {name: [answer[name] for answer in found] for name in ("text", "answer_start")}
                yield {"question": asked["question"], "context": paragraph["context"], "answers": answers}


def encode_questions(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str],
    answers: str | None,
    max_length: int,
    doc_stride: int,
) -> datasets.Dataset:
    """Tokenize questions with their texts; done once, and found again.

    A text that does not fit is cut into windows, each with the whole question. In a window without the answer, and where there is
    no answer, the span is the tokenizer's token of whole texts (BERT's [CLS]), as in SQuAD 2.0; it is unknown if there is none.

    Args:
        examples: Rows of questions and texts.
        tokenizer: A fast tokenizer that pads.
        columns: Columns of the question and of the text.
        answers: Column of the answers, with `text` and `answer_start`, of which the first counts; None if there are none. In a
            row without a value they are unknown; in a row with an empty list there is none.
        max_length: Most tokens of a window, the question included.
        doc_stride: Tokens that a window shares with the next.

    Returns:
        A row a window: `input_ids`, `token_type_ids` if the tokenizer makes them, `is_target`, true of the text and the special
        token, and `labels` if there are answers: the first and the last token, -100 where they are unknown.

    Raises:
        InputError: If a question leaves no room for the text, or an answer does not stand where it is said to.
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
        sources = found["overflow_to_sample_mapping"]
        windows = [
            _Window(ids, offsets, found.sequence_ids(number), tokenizer.cls_token_id)
            for number, (ids, offsets) in enumerate(zip(found["input_ids"], found["offset_mapping"], strict=True))
        ]
        inputs = {name: found[name] for name in INPUTS if name in found}
        inputs["is_target"] = [window.is_target.tolist() for window in windows]
        if answers is not None:
            spans = [
                _answer_span(answer, text, index)
                for answer, text, index in zip(rows[answers], texts, indices, strict=True)
            ]
            inputs["label_ids"] = [window.label(spans[row]) for window, row in zip(windows, sources, strict=True)]
        return inputs

    key = (list(columns), answers, max_length, doc_stride)
    return map_texts(examples, to_inputs, tokenizer, key=key, with_indices=True)


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
    """Return where the first answer begins and ends in the text; (0, 0) if there is none, None if it is not known."""
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


class _Window:
    """A question with a part of its text, as tokens."""

    def __init__(
        self,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        sequences: Sequence[int | None],
        cls_token_id: int | None,
    ) -> None:
        self.offsets = np.array(offsets)
        self.in_text = np.array([sequence == 1 for sequence in sequences])
        is_nowhere = np.array(ids) == (-1 if cls_token_id is None else cls_token_id)
        is_nowhere &= np.array([sequence is None for sequence in sequences])
        self.nowhere = int(is_nowhere.argmax()) if is_nowhere.any() else IGNORED
        self.is_target = self.in_text.copy()
        if self.nowhere != IGNORED:
            self.is_target[self.nowhere] = True

    def label(self, span: tuple[int, int] | None) -> list[int]:
        """Return the first and the last token of a span of characters."""
        if span is None:
            return [IGNORED, IGNORED]
        begin, end = span
        shown = self.offsets[self.in_text]
        places = np.flatnonzero(self.in_text & (self.offsets[:, 0] < end) & (self.offsets[:, 1] > begin))
        is_whole = len(places) and shown[0, 0] <= begin and shown[-1, 1] >= end
        return [int(places[0]), int(places[-1])] if is_whole else [self.nowhere, self.nowhere]
