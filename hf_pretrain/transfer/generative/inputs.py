"""The inputs of GPT-1's fine-tuning: any task as rows of tokens that a left-to-right model reads.

[`add_transfer_tokens`] gives a tokenizer the three special tokens. [`input_rows`] makes the rows of one example,
[`transform_examples`] those of a data set, and [`DataCollatorForGenerativeTransfer`] a batch of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, get_args

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.evaluation.metrics import encode_texts
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.tasks.examples import encode, map_texts

Transformation = Literal["classification", "entailment", "similarity", "multiple_choice"]

TRANSFER_TOKENS = ("_start_", "_delimiter_", "_classify_")
"""What a row begins with, what lies between its two texts, and what it ends with."""

# The fewest tokens that leave a place for each of two texts.
_SHORTEST = 6
_NUM_TEXTS = {"classification": 1, "entailment": 2, "similarity": 2}


class TransferTokens(NamedTuple):
    """The ids of [`TRANSFER_TOKENS`].

    Attributes:
        start: Id of `_start_`.
        delimiter: Id of `_delimiter_`.
        classify: Id of `_classify_`, whose state the head reads.
    """

    start: int
    delimiter: int
    classify: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TransferTokens:
        """Return the ids that a tokenizer has for them.

        Raises:
            InputError: If it does not have them all.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in TRANSFER_TOKENS if token not in vocabulary]
        if missing:
            raise InputError(
                f"tokenizer={type(tokenizer).__name__} has no {missing[0]!r}: call add_transfer_tokens, or build the model by "
                "GenerativeTransferModel.from_model, which does"
            )
        return cls(*(vocabulary[token] for token in TRANSFER_TOKENS))


def add_transfer_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Add the three special tokens to a tokenizer, in place, and a padding token if it has none.

    Padding is hidden from the model, so any token but these three will do: `eos_token`, `unk_token` or `bos_token`.

    Args:
        tokenizer: The tokenizer of the model.

    Returns:
        The ids of those that it did not have yet.

    Raises:
        InputError: If no token can be used for padding.
    """
    if tokenizer.pad_token is None:
        known = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        token = next((token for token in known if token is not None), None)
        if token is None:
            raise InputError(f"tokenizer={type(tokenizer).__name__} has no token for padding: set its pad_token")
        tokenizer.pad_token = token
    vocabulary = tokenizer.get_vocab()
    added = [token for token in TRANSFER_TOKENS if token not in vocabulary]
    tokenizer.add_tokens(added, special_tokens=True)
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in added]


def input_rows(
    segments: Sequence[Sequence[int]], *, transformation: Transformation, tokens: TransferTokens, max_length: int
) -> list[list[int]]:
    """Return the rows of one example.

    A text alone has `max_length - 2` tokens at most. Where two texts share a row, each has `max_length // 2 - 2` at most,
    however short the other one is. Texts are cut at their end.

    Args:
        segments: Tokens of the texts: of a text alone for "classification"; of premise and hypothesis for "entailment"; of two
            texts for "similarity"; of a context and of its answers for "multiple_choice".
        transformation: The form of the task.
        tokens: The special tokens.
        max_length: Most tokens of a row.

    Returns:
        One row; for "similarity" one row for each order of the texts; for "multiple_choice" one row for each answer.

    Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.3 and figure 1; the
    official `train.py`, `transform_roc`.
    """
    start, delimiter, classify = tokens
    if transformation == "classification":
        (text,) = segments
        return [[start, *text[: max_length - 2], classify]]
    room = max_length // 2 - 2
    first, *others = (list(segment[:room]) for segment in segments)
    rows = [[start, *first, delimiter, *other, classify] for other in others]
    if transformation == "similarity":
        rows += [[start, *other, delimiter, *first, classify] for other in others]
    return rows


def transform_examples(
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: PreTrainedConfig,
    text_columns: Sequence[str],
    label_column: str | None = None,
    max_length: int = 512,
) -> datasets.Dataset:
    """Turn the examples of a task into rows of tokens; done once, and found again.

    Args:
        examples: Rows of text.
        tokenizer: A tokenizer with the three special tokens.
        config: Configuration of a [`GenerativeTransferModel`], with its transformation and its labels.
        text_columns: Column of the text; of premise and hypothesis; of two texts; or of a context and of each answer. For
            "multiple_choice" the last column may hold lists of answers, as many as there are; there may be a column of questions
            before it. A question follows on its context, which is cut so that the question stays.
        label_column: Column of the labels: classes by name or number, values of a regression, or numbers of right answers, from
            0. Without a label an example still counts for the language-model loss.
        max_length: Most tokens of a row.

    Returns:
        Examples with `input_ids`, a list of rows, and `labels` if there are any.

    Raises:
        InputError: If columns or labels do not fit the task.

    Source: as [`input_rows`].
    """
    transformation: Transformation = config.transformation
    check_range(max_length, f"[{_SHORTEST}, inf)", name="max_length", hint="GPT-1 has 512")
    columns = list(text_columns)
    has_lists = _check_columns(examples, columns, transformation)
    tokens = TransferTokens.of(tokenizer)

    def to_inputs(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        texts = [_texts(values, index, has_lists) for values, index in zip(_rows(rows, columns), indices, strict=True)]
        flat = ["" if text is None else str(text) for row in texts for text in row]
        ids = iter(encode_texts(tokenizer, flat, add_special_tokens=False)["input_ids"] if flat else [])
        found = []
        for row in texts:
            segments = [next(ids) for _ in row]
            if has_lists and len(columns) == 3:
                segments[:2] = [_with_question(*segments[:2], room=max_length // 2 - 2)]
            made = input_rows(segments, transformation=transformation, tokens=tokens, max_length=max_length)
            found.append(made)
        return {"input_ids": found}

    encoded = map_texts(
        examples, to_inputs, tokenizer, key=(columns, transformation, max_length, tokens), with_indices=True
    )
    if label_column is None:
        return encoded
    return encoded.add_column("labels", _labels(examples, label_column, encoded, tokenizer, config))


def _check_columns(examples: datasets.Dataset, columns: Sequence[str], transformation: Transformation) -> bool:
    """Refuse columns that do not fit, and return whether the last one holds lists of answers."""
    check_choice(transformation, get_args(Transformation), name="transformation")
    missing = next((name for name in columns if name not in examples.column_names), None)
    if missing is not None:
        raise InputError(
            f"text_columns={list(columns)}: the examples have no {missing!r}, but {', '.join(examples.column_names)}"
        )
    number = _NUM_TEXTS.get(transformation)
    if number is not None and len(columns) != number:
        raise InputError(f"text_columns={list(columns)}: {transformation} needs {number} of them")
    lists = [getattr(examples.features[name], "feature", None) is not None for name in columns]
    has_lists = number is None and bool(lists) and lists[-1]
    allowed = (2, 3) if has_lists else range(3, len(columns) + 1)
    if number is None and len(columns) not in allowed:
        raise InputError(
            f"text_columns={list(columns)}: multiple_choice needs a context and two answers or more, or a context, perhaps a "
            "question, and a column of lists of answers"
        )
    if any(lists[:-1] if has_lists else lists):
        raise InputError(f"text_columns={list(columns)}: {columns[lists.index(True)]!r} holds lists: name one of text")
    return has_lists


def _rows(rows: Mapping[str, list[Any]], columns: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[name] for name in columns), strict=True))


def _texts(values: Sequence[Any], index: int, has_lists: bool) -> list[Any]:
    """Return the texts of an example; answers of a list are texts like the others."""
    if not has_lists:
        return list(values)
    if not values[-1]:
        raise InputError(f"row {index} has no answers: leave such rows out")
    return [*values[:-1], *values[-1]]


def _with_question(document: Sequence[int], question: Sequence[int], *, room: int) -> list[int]:
    """Return a document that a question follows on, cut so that the question stays."""
    return [*document[: max(0, room - len(question))], *question]


def _labels(
    examples: datasets.Dataset,
    column: str,
    encoded: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> np.ndarray:
    """Return classes, values, or numbers of answers; -100 or NaN where there is none."""
    if column not in examples.column_names:
        raise InputError(f"label_column={column!r}: the examples have {', '.join(examples.column_names)}")
    if config.transformation != "multiple_choice":
        # The texts are those of the labels: what is wanted is how labels are numbered.
        numbered = encode(
            examples.select_columns([column]), tokenizer, columns=[column], labels=column, config=config, max_length=8
        )
        return np.asarray(numbered["labels"][:])
    choices = _row_counts(encoded)
    labels = np.array([_answer(value, column) for value in examples[column][:]], dtype=np.int64)
    wrong = np.flatnonzero((labels >= choices) | ((labels < 0) & (labels != IGNORED)))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"label_column={column!r}: row {row} has the label {labels[row]} and {choices[row]} answers: number them from 0"
        )
    return labels


def _answer(value: Any, column: str) -> int:
    """Return the number of a right answer, -100 where it is not known."""
    if value in (None, "", -1, "-1", IGNORED):
        return IGNORED
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"label_column={column!r} holds {value!r}: give numbers of answers, from 0") from None


def _row_counts(encoded: datasets.Dataset) -> np.ndarray:
    """Return the number of rows of each example, ``int64 [N]``."""
    return np.asarray(pc.list_value_length(_column_of_rows(encoded)).to_numpy(zero_copy_only=False))


def longest_row(encoded: datasets.Dataset) -> int:
    """Return the number of tokens of the longest row of transformed examples, 0 if there are none."""
    lengths = pc.list_value_length(pc.list_flatten(_column_of_rows(encoded)))
    return pc.max(lengths).as_py() or 0


def _column_of_rows(encoded: datasets.Dataset) -> Any:
    return encoded.select_columns("input_ids").with_format("arrow")[:]["input_ids"].combine_chunks()


def positions_before_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Return the flat positions of a ``[R, L]`` mask whose next token is real as well, ``[T]``; a device is waited for."""
    is_real = mask.bool()
    is_before = torch.zeros_like(is_real)
    is_before[:, :-1] = is_real[:, :-1] & is_real[:, 1:]
    return is_before.flatten().nonzero().squeeze(1)


@dataclass
class DataCollatorForGenerativeTransfer:
    """Pads transformed examples, and keeps the rows of an example together.

    A batch has `input_ids` and `attention_mask` ``[B, C, L]``, C rows an example; `target_positions` ``[T]``, the flat positions
    in ``[B * C, L]`` at which the language-model loss predicts the next token; and `labels` ``[B]`` if the examples have them. An
    example with fewer rows than another gets rows that count for nothing: `row_mask` ``[B, C]`` is then false there.

    Args:
        tokenizer: A tokenizer with the three special tokens and a padding token, which pads on either side.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        """Refuse a tokenizer without the special tokens, or without one for padding."""
        self.tokens = TransferTokens.of(self.tokenizer)
        if self.tokenizer.pad_token_id in (None, self.tokens.classify):
            raise InputError(f"tokenizer: pad_token={self.tokenizer.pad_token!r} cannot pad: give it another")

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        most = max(len(example["input_ids"]) for example in examples)
        rows, is_row = [], []
        for example in examples:
            own = [list(row) for row in example["input_ids"]]
            self._check(own)
            missing = most - len(own)
            rows += own + [[self.tokens.start, self.tokens.classify]] * missing
            is_row.append([True] * len(own) + [False] * missing)
        pad = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
        padded = pad([{"input_ids": row} for row in rows])
        row_mask, shape = torch.tensor(is_row), (len(examples), most, -1)
        is_real = padded["attention_mask"].bool() & row_mask.flatten()[:, None]
        batch = {name: padded[name].view(shape) for name in ("input_ids", "attention_mask")}
        batch["target_positions"] = positions_before_tokens(is_real)
        if not row_mask.all():
            batch["row_mask"] = row_mask
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        if not rows or any(not row or row[-1] != self.tokens.classify for row in rows):
            raise InputError(
                "an example's input_ids is no list of rows that end with '_classify_': use transform_examples"
            )
