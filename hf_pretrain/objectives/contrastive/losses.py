"""Losses between the vectors of texts, whose negatives come from the whole step: all micro-batches and all ranks.

A [`VectorBatch`] holds the vectors of one micro-batch, or of several that were joined, or of all ranks: [`gather_batch`].
A [`ContrastiveObjective`] compares each own anchor with its positive and with the negatives of the whole step.
[`cross_encoder_loss`] does so with the scores that a cross-encoder gives to pairs.

A step whose vectors do not fit into memory at once caches gradients: all micro-batches are encoded without gradient,
[`vector_gradients`] finds the gradient of the step's loss with respect to each vector, and each micro-batch is encoded once more
and learns by [`surrogate`]. [`alignment`] and [`uniformity`] say how vectors are spread.

Shapes: B own examples, N examples of all ranks, K texts of each example (its roles: anchor, positive, hard negatives),
C = (K - 1) N candidates, vectors of width D. All is computed in fp32, under autocast too; fp64 stays fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.modeling.backbone import without_autocast
from hf_pretrain.modeling.losses import ExampleSum

NO_DOCUMENT = -1
"""Document of an example that does not count and is nobody's negative."""

LOSSES = ("infonce", "ranking")
SIMILARITIES = ("cosine", "dot")

# Scores of one chunk of anchors: 64 MiB in fp32. Backward needs about five times as much.
_SCORES_AT_ONCE = 1 << 24
# A shorter vector has no direction. The gradient of its cosine, which grows as its length shrinks, would spoil all weights.
_SHORTEST = 1e-6


class VectorBatch(NamedTuple):
    """The vectors of examples of K texts each, role by role: first all anchors, then all positives, then hard negatives.

    Text k of example b is row ``k * B + b``.

    Attributes:
        vectors: ``[K * B, D]`` in any floating type.
        documents: ``[B]`` int64, the document of each example; -1 for an example that does not count.
        text_keys: ``[K * B]`` int64, a hash of each text: equal texts have equal keys.
    """

    vectors: torch.Tensor
    documents: torch.Tensor
    text_keys: torch.Tensor

    @property
    def num_examples(self) -> int:
        """B, the number of examples."""
        return len(self.documents)

    @property
    def num_roles(self) -> int:
        """K, the number of texts of each example."""
        return len(self.text_keys) // len(self.documents)

    @classmethod
    def join(cls, batches: Sequence[VectorBatch]) -> VectorBatch:
        """Return the examples of several batches, in their order, as one batch."""
        roles = {batch.num_roles for batch in batches}
        assert len(roles) == 1, f"the batches have examples of {roles} texts"
        return cls(
            torch.cat([_by_role(batch, batch.vectors) for batch in batches], dim=1).flatten(0, 1),
            torch.cat([batch.documents for batch in batches]),
            torch.cat([_by_role(batch, batch.text_keys) for batch in batches], dim=1).flatten(),
        )

    def take_apart(self, sizes: Sequence[int]) -> list[VectorBatch]:
        """Return batches of so many examples each; the inverse of [`VectorBatch.join`]."""
        vectors, keys = (_by_role(self, rows).split(list(sizes), dim=1) for rows in (self.vectors, self.text_keys))
        documents = self.documents.split(list(sizes))
        return [
            VectorBatch(part.flatten(0, 1), numbers, part_keys.flatten())
            for part, numbers, part_keys in zip(vectors, documents, keys, strict=True)
        ]


def _by_role(batch: VectorBatch, rows: torch.Tensor) -> torch.Tensor:
    """View ``[K * B, ...]`` rows as ``[K, B, ...]``."""
    return rows.unflatten(0, (-1, batch.num_examples))


# All ranks


def gather_batch(batch: VectorBatch, *, largest: int | None = None) -> tuple[VectorBatch, int]:
    """Return the examples of all ranks, and the number of the first own one among them.

    Gradients flow back to the own vectors from the losses of all ranks: each rank's own vectors get the gradient of the sum of
    all ranks' losses. Backward is a collective call too, so every rank has to go through it.

    Args:
        batch: The own examples; their number may differ between the ranks, K and D may not.
        largest: A number of examples that no rank exceeds, the same on all ranks. Without it the ranks ask one another, and
            wait for the device once.

    Returns:
        The examples rank by rank, with examples that do not count where a rank has fewer than the largest; and the offset. In
        one process, the batch itself and 0.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return batch, 0
    size = _largest(batch) if largest is None else largest
    missing = size - batch.num_examples
    assert missing >= 0, f"largest={size}, but this rank has {batch.num_examples} examples"
    vectors_KBD = F.pad(_by_role(batch, _exact(batch.vectors)), (0, 0, 0, missing))
    # One call for all integers: keys role by role, then documents.
    integers = torch.cat([_by_role(batch, batch.text_keys), batch.documents[None]])
    integers_KN = _all_gathered(F.pad(integers, (0, missing), value=NO_DOCUMENT))
    vectors_KND = _GatheredExamples.apply(vectors_KBD)
    everyone = VectorBatch(vectors_KND.flatten(0, 1), integers_KN[-1], integers_KN[:-1].flatten())
    return everyone, dist.get_rank() * size


def _largest(batch: VectorBatch) -> int:
    size = torch.tensor(batch.num_examples, device=batch.documents.device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    return int(size)


def _all_gathered(rows: torch.Tensor) -> torch.Tensor:
    """Return ``[K, ranks * B, ...]`` of all ranks' ``[K, B, ...]``."""
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered, dim=1)


class _GatheredExamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_KBD: torch.Tensor) -> torch.Tensor:
        ctx.num_examples = rows_KBD.shape[1]
        return _all_gathered(rows_KBD)

    @staticmethod
    def backward(ctx: Any, gradient_KND: torch.Tensor) -> torch.Tensor:
        # What is reduced in place may belong to others.
        summed_KND = gradient_KND.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed_KND)
        return summed_KND.narrow(1, dist.get_rank() * ctx.num_examples, ctx.num_examples)


# Losses


class ContrastiveResult(NamedTuple):
    """What an objective says of each own example.

    Attributes:
        losses: ``[B]`` in nats (InfoNCE) or in units of the score (ranking); 0 where the example does not count.
        counts: ``[B]`` fp32, 1 where it counts. Known from `documents` alone, before any vector: an anchor without a negative
            counts too, with the loss 0.
        correct: ``[B]`` fp32, 1 where the example counts and its positive scores higher than all its negatives. A tie is wrong.
    """

    losses: torch.Tensor
    counts: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class ContrastiveObjective:
    """Compares anchors with their positives and with the positives and hard negatives of all other examples.

    No negative of an anchor is: a candidate of the same document, but for the anchor's own hard negatives; a text equal to the
    anchor or to its positive; a candidate of an example that does not count. An anchor that has no negative left has the loss 0
    and gives no gradient.

    Args:
        loss: "infonce" is minus the log-probability of the positive in the softmax over it and the negatives. "ranking" is the
            mean over the negatives of ``max(0, margin - s+ + s-)``.
        similarity: How two vectors are scored: "cosine" or "dot". The cosine with a vector of zeros is 0.
        temperature: InfoNCE divides scores by it.
        margin: By which the positive has to be ahead, for "ranking".
        hard_negative_weight: Is added to the logits of an anchor's own hard negatives, for "infonce".
        same_document_counts: Whether candidates of the same document are negatives, as in InfoWord.

    Raises:
        InputError: If a value is unknown, out of range, or without effect.

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding" (InfoNCE); official SimCSE,
        `simcse/models.py` (weight of hard negatives); Kong et al. 2020, "A Mutual Information Maximization Perspective of
        Language Representation Learning" (InfoWord).
    """

    loss: Literal["infonce", "ranking"] = "infonce"
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = 0.05
    margin: float = 0.2
    hard_negative_weight: float = 0.0
    same_document_counts: bool = False

    def __post_init__(self) -> None:
        check_choice(self.loss, LOSSES, name="loss")
        check_choice(self.similarity, SIMILARITIES, name="similarity")
        check_range(self.temperature, "(0, inf)", name="temperature", hint="0.05 is usual")
        check_range(self.margin, "[0, inf)", name="margin", hint="0.2 is usual")
        check_range(self.hard_negative_weight, "(-inf, inf)", name="hard_negative_weight", hint="0 is usual")
        if self.loss == "ranking" and self.hard_negative_weight:
            raise InputError(
                f"hard_negative_weight={self.hard_negative_weight} has no effect with loss='ranking': set it to 0, or choose "
                "loss='infonce'"
            )

    def __call__(self, own: VectorBatch, everyone: VectorBatch, offset: int = 0) -> ContrastiveResult:
        """Return the losses of the own anchors.

        Anchors go through in chunks of 16.8 million scores, and scores are computed again in backward: no matrix of scores is
        held in between. Of one chunk, about five matrices of scores live at once, 320 MiB, whatever the number of anchors.

        Args:
            own: The own examples.
            everyone: The examples of all ranks, of as many texts each; `own` itself in one process.
            offset: Number of the first own example in `everyone`.

        Returns:
            Losses and right answers by own example. What the vectors of an example that does not count are, does not matter.
        """
        assert own.num_roles == everyone.num_roles > 1, (
            "each example has an anchor and a positive, and as many texts as all"
        )
        counts_B = own.documents != NO_DOCUMENT
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        with without_autocast(own.vectors.device):
            anchors_BD = self._comparable(own, slice(0, 1))
            candidates_CD = self._comparable(everyone, slice(1, None))
            rows = max(1, _SCORES_AT_ONCE // len(candidates_CD))
            parts = [
                checkpoint(
                    self._compare,
                    anchors_BD[first : first + rows],
                    candidates_CD,
                    own,
                    everyone,
                    first,
                    offset,
                    **again,
                )
                for first in range(0, own.num_examples, rows)
            ]
        losses_B, correct_B = (torch.cat(values) for values in zip(*parts, strict=True))
        return _counted(losses_B, correct_B, counts_B)

    def _comparable(self, batch: VectorBatch, roles: slice) -> torch.Tensor:
        """Return the vectors of some roles, zero where the example does not count, with the length that they are compared at."""
        is_filler_B = batch.documents == NO_DOCUMENT
        vectors_KBD = _exact(_by_role(batch, batch.vectors)[roles]).masked_fill(is_filler_B[None, :, None], 0)
        vectors_RD = vectors_KBD.flatten(0, 1)
        return _unit(vectors_RD) if self.similarity == "cosine" else vectors_RD

    def _compare(
        self,
        anchors_AD: torch.Tensor,
        candidates_CD: torch.Tensor,
        own: VectorBatch,
        everyone: VectorBatch,
        first: int,
        offset: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and right answers of A anchors, of which the first is example `first` of the own ones."""
        if self.loss == "infonce":
            anchors_AD = anchors_AD / self.temperature
        scores_AC = anchors_AD @ candidates_CD.T
        num_anchors, column = len(anchors_AD), offset + first
        right_A = scores_AC.narrow(1, column, num_anchors).diagonal().clone()
        if self.hard_negative_weight:
            for role in range(1, everyone.num_roles - 1):
                own_A = scores_AC.narrow(1, role * everyone.num_examples + column, num_anchors).diagonal()
                own_A.add_(self.hard_negative_weight)
        is_negative_AC = self._negatives(own, everyone, slice(first, first + num_anchors), offset)
        # Not minus infinity: without a negative, backward would go through what is not a number.
        wrong_AC = scores_AC.masked_fill_(~is_negative_AC, torch.finfo(scores_AC.dtype).min / 2)
        return _contrasted(right_A, wrong_AC, is_negative_AC.sum(1), loss=self.loss, margin=self.margin)

    def _negatives(self, own: VectorBatch, everyone: VectorBatch, part: slice, offset: int) -> torch.Tensor:
        """Return which candidates are negatives of a part of the own anchors, ``[A, C]``."""
        numbers_B = torch.arange(own.num_examples, device=own.documents.device) + offset
        numbers_A1, documents_A1 = numbers_B[part, None], own.documents[part, None]
        anchor_keys_A1, positive_keys_A1 = (keys_B[part, None] for keys_B in _by_role(own, own.text_keys)[:2])
        num_candidate_roles = everyone.num_roles - 1
        keys_C = everyone.text_keys[everyone.num_examples :]
        documents_C = everyone.documents.repeat(num_candidate_roles)
        numbers_C = torch.arange(everyone.num_examples, device=keys_C.device).repeat(num_candidate_roles)
        # An example's own candidates are not of another text of the document; the positive has its own key.
        is_negative_AC = (keys_C != anchor_keys_A1) & (keys_C != positive_keys_A1)
        if not self.same_document_counts:
            is_negative_AC &= (documents_C != documents_A1) | (numbers_C == numbers_A1)
        return is_negative_AC.logical_and_(documents_C != NO_DOCUMENT)


def cross_encoder_loss(
    scores: torch.Tensor,
    *,
    documents: torch.Tensor,
    loss: Literal["infonce", "ranking"] = "infonce",
    margin: float = 0.2,
) -> ContrastiveResult:
    """Compare the score of each true pair with those of the false ones.

    Args:
        scores: ``[B, K]`` in any floating type, K > 1; the first is that of the true pair.
        documents: ``[B]`` int64; -1 for an example that does not count.
        loss: "infonce", without a temperature, or "ranking"; see [`ContrastiveObjective`].
        margin: By which the true pair has to be ahead, for "ranking".

    Raises:
        InputError: If the loss is unknown.
    """
    check_choice(loss, LOSSES, name="loss")
    assert scores.shape[1] > 1, "there is a false pair to compare with"
    counts_B = documents != NO_DOCUMENT
    scores_BK = _exact(scores).masked_fill(~counts_B[:, None], 0)
    num_negatives_B = torch.full_like(documents, scores.shape[1] - 1)
    losses_B, correct_B = _contrasted(scores_BK[:, 0], scores_BK[:, 1:], num_negatives_B, loss=loss, margin=margin)
    return _counted(losses_B, correct_B, counts_B)


def _contrasted(
    right_A: torch.Tensor, wrong_AC: torch.Tensor, num_negatives_A: torch.Tensor, *, loss: str, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each right score against wrong ones, of which those that do not count are very low, and who wins."""
    is_highest_A = right_A.detach() > wrong_AC.detach().amax(1)
    if loss == "infonce":
        # The same as minus the log of the softmax, without a difference of nearly equal numbers.
        return F.softplus(wrong_AC.logsumexp(1) - right_A), is_highest_A
    hinges_AC = (wrong_AC + (margin - right_A)[:, None]).relu()
    return hinges_AC.sum(1) / num_negatives_A.clamp(min=1), is_highest_A


def _counted(losses_B: torch.Tensor, correct_B: torch.Tensor, counts_B: torch.Tensor) -> ContrastiveResult:
    return ContrastiveResult(losses_B.masked_fill(~counts_B, 0), counts_B.float(), (correct_B & counts_B).float())


# Cached gradients


class VectorGradients(NamedTuple):
    """What the vectors of each micro-batch have to learn, without gradient.

    Attributes:
        gradients: For each micro-batch ``[K * B, D]``, the gradient of the sum of all ranks' losses.
        losses: For each ``[B]``, its own anchors' losses.
        correct: For each ``[B]``, its own anchors' right answers; see [`ContrastiveResult`].
    """

    gradients: list[torch.Tensor]
    losses: list[torch.Tensor]
    correct: list[torch.Tensor]


def vector_gradients(
    objective: ContrastiveObjective, batches: Sequence[VectorBatch], *, largest: int | None = None
) -> VectorGradients:
    """Return losses and their gradients by vector, where each anchor meets the candidates of all micro-batches and ranks.

    Args:
        objective: The loss.
        batches: The micro-batches of the step on this rank, encoded without gradient.
        largest: A number of examples in all micro-batches that no rank exceeds; see [`gather_batch`].

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
    """
    joined = VectorBatch.join(batches)
    sizes = [batch.num_examples for batch in batches]
    # Backward runs here, where autocast would round its products.
    with torch.enable_grad(), without_autocast(joined.vectors.device):
        own = joined._replace(vectors=_exact(joined.vectors.detach()).requires_grad_())
        result = objective(own, *gather_batch(own, largest=largest))
        (gradient,) = torch.autograd.grad(result.losses.sum(), own.vectors)
    parts = joined._replace(vectors=gradient).take_apart(sizes)
    return VectorGradients(
        [part.vectors for part in parts],
        list(result.losses.detach().split(sizes)),
        list(result.correct.split(sizes)),
    )


def surrogate(losses: torch.Tensor, vectors: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return losses whose sum sends known gradients into the vectors.

    Args:
        losses: ``[B]``, the values.
        vectors: ``[K * B, D]``, encoded once more, with gradient.
        gradients: ``[K * B, D]``; see [`VectorGradients`].

    Returns:
        ``[B]``, exactly the values. Each example carries the gradients of its own vectors, so that a weight of an example
        scales those too.
    """
    products_KBD = (_exact(vectors) * gradients).unflatten(0, (-1, len(losses)))
    carried_B = products_KBD.sum(dim=(0, 2))
    return losses.detach() + (carried_B - carried_B.detach())


# How vectors are spread


def alignment(anchors: torch.Tensor, positives: torch.Tensor, *, documents: torch.Tensor) -> ExampleSum:
    """Return the squared distance of each anchor to its positive, both of length 1; 0 is best.

    Args:
        anchors: ``[B, D]``.
        positives: ``[B, D]``.
        documents: ``[B]`` int64; -1 for an example that does not count.

    Source: Wang and Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", with the exponent 2.
    """
    counts_B = documents != NO_DOCUMENT
    distances_B = (_unit(_exact(anchors)) - _unit(_exact(positives))).square().sum(1)
    return ExampleSum(distances_B.masked_fill(~counts_B, 0), counts_B.float())


def uniformity(vectors: torch.Tensor, *, documents: torch.Tensor) -> ExampleSum:
    """Return the log of the mean of ``exp(-2 d^2)`` over all pairs of a batch, at length 1; lower is more uniform, 0 is worst.

    It is one number of a batch: each example that counts carries it, so that the mean over the examples of a batch is that
    number. A mean over batches is the mean of their numbers, and not the number of all texts together. It holds two matrices
    of B x B.

    Args:
        vectors: ``[B, D]``, one of each example.
        documents: ``[B]`` int64; -1 for an example that does not count.

    Returns:
        The sums and counts; nothing is counted in a batch of less than two examples that count.

    Source: as [`alignment`], with t = 2.
    """
    counts_B = documents != NO_DOCUMENT
    with without_autocast(vectors.device):
        unit_BD = _unit(_exact(vectors).masked_fill(~counts_B[:, None], 0))
        # Two vectors of length 1: d^2 = 2 - 2 cos. A vector without direction has the length 0.
        squares_B = unit_BD.square().sum(1)
        distances_BB = (squares_B[:, None] + squares_B - 2 * unit_BD @ unit_BD.T).clamp(min=0)
    is_pair_BB = (counts_B[:, None] & counts_B).fill_diagonal_(False)
    num_pairs = is_pair_BB.sum()
    mean = distances_BB.mul(-2).exp().masked_fill(~is_pair_BB, 0).sum() / num_pairs.clamp(min=1)
    is_counted_B = counts_B & (num_pairs > 0)
    value = torch.where(num_pairs > 0, mean, 1).log()
    return ExampleSum(value * is_counted_B, is_counted_B.float())


def _exact(values: torch.Tensor) -> torch.Tensor:
    """Return values in fp32, or in fp64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _unit(vectors_RD: torch.Tensor) -> torch.Tensor:
    """Return vectors of length 1; one that is too short for a direction becomes zero, without gradient."""
    squares_R1 = vectors_RD.square().sum(1, keepdim=True)
    is_short_R1 = squares_R1 < _SHORTEST**2
    return vectors_RD * squares_R1.masked_fill(is_short_R1, math.inf).rsqrt()
