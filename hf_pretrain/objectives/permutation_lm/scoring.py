"""The probability of a text under a permutation language model, by the chain rule in any order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.objectives.permutation_lm.modeling import PermutationLMForPreTraining
from hf_pretrain.objectives.permutation_lm.two_stream import PermutedBatch

Order = str | Sequence[Sequence[int]]


class TextScore(NamedTuple):
    """How probable a text is.

    Attributes:
        num_tokens: Tokens that were predicted; special tokens are given, not predicted.
        by_order: Log-likelihood of the text in nats in each of the orders.
    """

    num_tokens: int
    by_order: list[float]

    @property
    def log_likelihood(self) -> float:
        """Mean over the orders, what training maximises; in nats."""
        return math.fsum(self.by_order) / len(self.by_order)

    @property
    def mixture_log_likelihood(self) -> float:
        """Log of the mean probability over the orders, which is never less; in nats."""
        most = max(self.by_order)
        return most + math.log(math.fsum(math.exp(value - most) for value in self.by_order) / len(self.by_order))


def score_permutations(
    model: PermutationLMForPreTraining | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    order: Order = "left_to_right",
    num_orders: int = 1,
    seed: int = 0,
    batch_size: int = 16,
) -> list[TextScore]:
    """Return the joint log-likelihood of each text: the sum over its tokens of ``log p(token | tokens before it)``.

    Every order gives a probability distribution over texts of a length. Special tokens that the tokenizer adds are seen by all
    and see each other alone.

    Args:
        model: What was trained, or the stock model that was exported.
        tokenizer: Its tokenizer.
        texts: The texts.
        order: "left_to_right", "random", or a list for each text with the numbers of its tokens, special ones not counted, in
            the order of prediction.
        num_orders: How many random orders to score each text in.
        seed: Seed of the random orders, which do not depend on the batch.
        batch_size: Texts, each counted once an order, that are run at a time.

    Raises:
        InputError: If an order does not fit its text, or a text has no tokens.
    """
    if num_orders < 1 or (num_orders > 1 and order != "random"):
        raise InputError(f"num_orders={num_orders} must be 1, or more with order='random'")
    if not isinstance(model, PermutationLMForPreTraining):
        model = PermutationLMForPreTraining.from_model(model, mask_token_id=tokenizer.mask_token_id)
    encoded = [tokenizer(text, return_special_tokens_mask=True) for text in texts]
    ids = [np.asarray(one["input_ids"]) for one in encoded]
    columns = [np.flatnonzero(np.asarray(one["special_tokens_mask"]) == 0) for one in encoded]
    for text, own in zip(texts, columns, strict=True):
        if not len(own):
            raise InputError(f"text {text!r} has no tokens to score: leave it out")
    jobs = [(i, number) for i in range(len(texts)) for number in range(num_orders)]
    jobs.sort(key=lambda job: len(ids[job[0]]))
    found = np.zeros((len(texts), num_orders))
    with evaluating(model):
        for begin in tqdm(
            range(0, len(jobs), batch_size), desc="Scoring texts", unit=" batches", delay=2, disable=None
        ):
            part = jobs[begin : begin + batch_size]
            ranks = [_ranks(order, text, len(columns[text]), number=number, seed=seed) for text, number in part]
            batch = _batch([ids[text] for text, _ in part], [columns[text] for text, _ in part], ranks)
            for job, value in zip(part, _log_likelihoods(model, batch), strict=True):
                found[job] = value
    return [TextScore(len(columns[i]), found[i].tolist()) for i in range(len(texts))]


def log_likelihood(
    model: PermutationLMForPreTraining | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    **options: Any,
) -> torch.Tensor:
    """Return the log-likelihoods of texts, ``[N]`` in nats, averaged over orders; see [`score_permutations`]."""
    scores = score_permutations(model, tokenizer, texts, **options)
    return torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64)


def _ranks(order: Order, text: int, num_tokens: int, *, number: int, seed: int) -> np.ndarray:
    """Return the rank of each token of a text in an order."""
    if isinstance(order, str):
        if order == "left_to_right":
            return np.arange(num_tokens)
        if order == "random":
            keys = draws.row_keys([text], seed=seed, epoch=number, stream="factorisation order")
            return draws.uniforms(keys, num_tokens)[0].argsort().argsort()
        raise InputError(f"order={order!r} must be 'left_to_right', 'random' or a list for each text")
    given = np.asarray(order[text] if text < len(order) else [])
    if not np.array_equal(np.sort(given), np.arange(num_tokens)):
        raise InputError(f"order of text {text} must hold each of its {num_tokens} token numbers, from 0, once")
    return given.argsort()


def _batch(ids: Sequence[np.ndarray], columns: Sequence[np.ndarray], ranks: Sequence[np.ndarray]) -> PermutedBatch:
    """Put texts into a batch: special tokens are ordinary context, all other tokens are targets."""
    shape = (len(ids), max(map(len, ids)))
    mask = np.arange(shape[1]) < np.array([len(row) for row in ids])[:, None]
    tokens, key_ranks, thresholds = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    targets = np.zeros((len(ids), max(map(len, columns))), dtype=np.int64)
    for row, (text, own, order) in enumerate(zip(ids, columns, ranks, strict=True)):
        tokens[row, : len(text)] = text
        thresholds[row, : len(text)] = 1
        key_ranks[row, own] = thresholds[row, own] = order + 1
        targets[row, : len(own)] = own
    return PermutedBatch(*map(torch.from_numpy, (tokens, mask.astype(np.int64), key_ranks, thresholds, targets)))


@torch.no_grad()
def logits_at(model: PermutationLMForPreTraining, ids: Sequence[int], position: int) -> torch.Tensor:
    """Return the logits ``[V]`` of the token at a position of a text, of which all others are seen.

    Args:
        model: The model as it is trained.
        ids: Token ids of the text.
        position: Position of the token, which is not read.
    """
    batch = _batch([np.array(ids)], [np.array([position])], [np.array([0])])
    on_device = PermutedBatch(*(value.to(model.device) for value in batch[:5]))
    return model.predict(on_device, torch.tensor([0], device=model.device))[0][0]


def continuation_logits(
    model: PermutationLMForPreTraining, ids: Sequence[np.ndarray], columns: Sequence[np.ndarray]
) -> torch.Tensor:
    """Return the logits of some tokens of texts, each predicted after those to its left; all other tokens are seen.

    Args:
        model: The model as it is trained.
        ids: Token ids of each text.
        columns: Columns of the tokens to predict in each text, from left to right.

    Returns:
        ``[T, V]``, one text after the other.
    """
    with evaluating(model):
        return _target_logits(model, _batch(ids, columns, [np.arange(len(own)) for own in columns]))[0]


def _log_likelihoods(model: PermutationLMForPreTraining, batch: PermutedBatch) -> list[float]:
    """Return the log-likelihood of each row."""
    logits_TV, labels_T, rows_T = _target_logits(model, batch)
    nll_T = torch.nn.functional.cross_entropy(logits_TV.float(), labels_T.to(model.device), reduction="none")
    sums = torch.zeros(len(batch.input_ids), dtype=torch.float64)
    return sums.index_add(0, rows_T, -nll_T.double().cpu()).tolist()


@torch.no_grad()
def _target_logits(
    model: PermutationLMForPreTraining, batch: PermutedBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the logits of all targets ``[T, V]``, and on the host their tokens and rows, ``[T]`` each."""
    num_targets = (batch.key_ranks > 0).sum(dim=1)
    is_target = torch.arange(batch.target_columns.shape[1]) < num_targets[:, None]
    slots = is_target.flatten().nonzero().squeeze(1)
    labels_T = batch.input_ids.gather(1, batch.target_columns).flatten()[slots]
    on_device = PermutedBatch(*(value.to(model.device) for value in batch[:5]))
    logits_TV, _ = model.predict(on_device, slots.to(model.device))
    return logits_TV, labels_T, slots // batch.target_columns.shape[1]
