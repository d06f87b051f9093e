"""Tokens under two language models, one of each direction: the mean of their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.evaluation.metrics import batches_by_length, stack_characters
from hf_pretrain.evaluation.token_scores import EncodedText, TokenScores
from hf_pretrain.modeling.backbone import evaluating, reads_characters
from hf_pretrain.modeling.kernels import chunk_rows


@dataclass(frozen=True)
class BidirectionalLM:
    """A pair of language models, one for each direction; [`ElmoForPreTraining`] itself needs none.

    Attributes:
        forward: Takes ids and attention mask, ``[B, L]`` each, and returns logits ``[B, L, V]`` of the token that follows on each
            column.
        backward: The same for the token before each column; it reads columns from right to left, and no padding on the right.
        device: Where both take their inputs.
    """

    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    device: torch.device | str = "cpu"


class Directions:
    """How both directions of a model read a batch, and how they predict.

    Args:
        model: A [`BidirectionalLM`], or an `ElmoForPreTraining`.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: BidirectionalLM | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.is_pair = isinstance(model, BidirectionalLM)
        self.spells = not self.is_pair and reads_characters(self.model)

    def read(self, texts: Sequence[EncodedText], batch: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield what predicts the next token, then what predicts the one before: logits or states, ``[B, L, X]``."""
        if self.is_pair:
            for direction in (self.model.forward, self.model.backward):
                yield direction(batch["input_ids"], batch["attention_mask"])
            return
        spelled: dict[str, torch.Tensor] = {}
        if self.spells:
            rows = [self._letters(text) if text.characters is None else text.characters for text in texts]
            spelled["character_ids"] = stack_characters(rows).to(self.model.device)
        states = self.model.base_model(**batch, **spelled).last_hidden_state
        yield from states.chunk(2, dim=-1)

    def log_probabilities(self, found: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of each token of the vocabulary, ``float32 [T, V]``, by what was read, ``[T, X]``."""
        if self.is_pair:
            return found.float().log_softmax(-1)
        log_probabilities: torch.Tensor = self.model.softmax.log_prob(found)
        return log_probabilities

    def _letters(self, text: EncodedText) -> np.ndarray:
        """Return the characters ``[L, K]`` of ids of the vocabulary."""
        return np.array([self.tokenizer.token_characters(int(token)) for token in text.ids], dtype=np.int16)


def bidirectional_scores(
    model: BidirectionalLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[EncodedText],
    *,
    batch_size: int,
) -> Iterator[TokenScores]:
    """Yield the mean of the log-probabilities in both directions of the tokens to score.

    Args:
        model: A [`BidirectionalLM`], or an `ElmoForPreTraining`. ELMo reads an unknown word by its characters. As a target it is
            the unknown word, as in training.
        tokenizer: Its tokenizer.
        texts: The texts; a token that is to be scored is neither the first nor the last one.
        batch_size: Texts in a batch.
    """
    directions = Directions(model, tokenizer)
    with evaluating(*([] if directions.is_pair else [directions.model])):
        for rows, batch in batches_by_length(
            [text.ids for text in texts],
            pad_token_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            device=directions.model.device,
            name="Scoring",
        ):
            part, width = [texts[row] for row in rows], batch["input_ids"].shape[1]
            columns = np.concatenate([row * width + text.scored for row, text in enumerate(part)])
            positions_T = torch.from_numpy(columns).to(batch["input_ids"].device)
            labels_T = batch["input_ids"].flatten()[positions_T]
            found = [
                read_BLX.flatten(0, 1).index_select(0, (positions_T + step).to(read_BLX.device))
                for read_BLX, step in zip(directions.read(part, batch), (-1, 1), strict=True)
            ]
            scores_T, is_greedy_T = _mean_scores(directions, found, labels_T)
            yield TokenScores(np.repeat(rows, [len(text.scored) for text in part]), scores_T, is_greedy_T)


def _mean_scores(
    directions: Directions, found: Sequence[torch.Tensor], labels_T: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean log-probability of each target, ``[T]``, and whether no token has a higher one."""
    scores, is_greedy = [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
    size = 1 if not len(labels_T) else directions.log_probabilities(found[0][:1]).shape[-1]
    rows = chunk_rows(size, None, found[0].device)
    for begin in range(0, len(labels_T), rows):
        part = slice(begin, begin + rows)
        left_TV, right_TV = (directions.log_probabilities(each[part]) for each in found)
        mean_TV = (left_TV + right_TV.to(left_TV.device)) / 2
        wanted_T = labels_T[part].to(mean_TV.device)
        scores.append(mean_TV.gather(1, wanted_T[:, None]).squeeze(1).double().cpu().numpy())
        is_greedy.append((mean_TV.argmax(-1) == wanted_T).cpu().numpy())
    return np.concatenate(scores), np.concatenate(is_greedy)
