"""What stands on a stock encoder, and what two kinds of heads predict: classes of tokens, and spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

HeadKind = Literal["none", "masked_lm", "classification", "regression", "token_classification", "question_answering"]

# Low enough for the softmax to be 0, and finite, so that no difference of two is undefined.
_IMPOSSIBLE = -1e9


def head_kind(model: PreTrainedModel) -> HeadKind:
    """Return what a stock model predicts; the head of a classifier of whole sequences with one output is a regression's."""
    name = type(model).__name__
    if "ForQuestionAnswering" in name:
        return "question_answering"
    if "ForTokenClassification" in name:
        return "token_classification"
    if model.get_output_embeddings() is not None:
        return "masked_lm"
    if model.base_model is model:
        return "none"
    return "regression" if model.config.num_labels == 1 else "classification"


def boundary_logits(logits: torch.Tensor, positions: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return what each text's start and its end are chosen from, where all other places are impossible.

    Args:
        logits: ``[T, 2]`` logits of a start and of an end at each of the places where a span may begin or end.
        positions: ``[T]`` flat row-major positions of these places.
        shape: ``(B, L)`` of the batch.

    Returns:
        ``[2B, L]``: of each text the start, then the end.
    """
    batch, length = shape
    everywhere = logits.new_full((batch * length, 2), _IMPOSSIBLE).index_copy(0, positions, logits)
    return everywhere.view(batch, length, 2).transpose(1, 2).flatten(0, 1)


def span_scores(guesses: torch.Tensor, answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compare spans with those of the labels, the first and the last token each.

    Args:
        guesses: ``[B, 2]`` places of starts and ends; the end may lie before the start, and there is no span then.
        answers: ``[B, 2]``, true spans.

    Returns:
        ``[B]`` by name: `exact_match`, 1 or 0, and `f1`, the overlap: the harmonic mean of the shares of both in common.
    """
    (begins, ends), (first, last) = guesses.unbind(1), answers.unbind(1)
    common = (torch.minimum(ends, last) - torch.maximum(begins, first) + 1).clamp(min=0)
    lengths = (ends - begins + 1).clamp(min=0) + (last - first + 1)
    exact = (guesses == answers).all(dim=1).float()
    return {"exact_match": exact, "f1": 2 * common / lengths.clamp(min=1)}


def entity_counts(guesses: torch.Tensor, labels: torch.Tensor, *, outside: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numerator and denominator of the F1 of tokens of entities, to be summed before they are divided.

    Args:
        guesses: ``[T]`` classes.
        labels: ``[T]`` true classes, none of them missing.
        outside: The class of tokens that belong to no entity, often called "O".

    Returns:
        ``[T]`` twice the hits, and what was guessed to be of an entity plus what is of one.
    """
    is_guess, is_entity = guesses != outside, labels != outside
    return 2 * ((guesses == labels) & is_entity), is_guess.long() + is_entity.long()
