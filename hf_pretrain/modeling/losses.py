"""The way from a stock model's states to a loss.

[`GatheredHead`] runs a head at the target positions only. A loss is a pure function of logits, targets and positions, and returns
a sum for each example with its count, never a mean: [`ExampleSum`]. A model returns its losses in a [`PretrainingOutput`], along
with the [`RecurrentMemory`] that the next segment reads; [`SumAccumulator`] adds them up for the log. [`sample_tokens`] draws
tokens from the logits of a generator, one keyed uniform a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

IGNORED = -100
"""Label of a position, or of a slot, without a target."""


class RecurrentMemory(NamedTuple):
    """Every layer's newest inputs, as keys and values for the next segment; always detached.

    A memory starts empty and grows from its end: slots that hold nothing yet must never be attended, so a result does not
    depend on how much room the memory has left. It has the same shape at every step.

    Attributes:
        states: ``[N, B, M, D]`` the inputs of N layers; the newest token is at the end of M.
        lengths: ``[B]`` int64, number of filled slots of each lane: the last ``lengths[b]`` of M.
    """

    states: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def empty(
        cls,
        num_layers: int,
        batch: int,
        size: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RecurrentMemory:
        """Return a memory of `size` slots for each of `batch` lanes with nothing in it."""
        states = torch.zeros(num_layers, batch, size, width, dtype=dtype, device=device)
        return cls(states, torch.zeros(batch, dtype=torch.long, device=device))

    @property
    def size(self) -> int:
        """M, the number of slots of a lane."""
        return self.states.shape[2]

    def mask(self) -> torch.Tensor:
        """Return ``[B, M]`` bool, true at the filled slots."""
        slots = torch.arange(self.size, device=self.lengths.device)
        return slots >= self.size - self.lengths[:, None]

    def reset(self, lanes: torch.Tensor) -> RecurrentMemory:
        """Return the memory with some lanes emptied.

        Args:
            lanes: ``[B]`` bool, true for the lanes to empty.
        """
        # Written over, not just masked: what a document left behind is gone, infinities included.
        states = self.states.masked_fill(lanes[None, :, None, None], 0.0)
        return RecurrentMemory(states, self.lengths.masked_fill(lanes, 0))

    def append(self, new: torch.Tensor) -> RecurrentMemory:
        """Return the memory after another segment: the last M of what was there and what is new, without gradient.

        Args:
            new: ``[N, B, S, D]`` the inputs of the layers for S tokens.
        """
        size = self.size
        states = torch.cat([self.states, new.detach().to(self.states.dtype)], dim=2)
        lengths = (self.lengths + new.shape[2]).clamp(max=size)
        return RecurrentMemory(states[:, :, states.shape[2] - size :].contiguous(), lengths)


class ExampleSum(NamedTuple):
    """A quantity summed over each example's targets, beside the number of those targets.

    Means are the Trainer's business: only it knows how many targets the whole step has, over accumulation and ranks. Sums are
    kept by example because distributed evaluation repeats examples to fill the last batch and has to drop them again.

    Attributes:
        sum: ``[B]``, in fp32.
        count: ``[B]``, number of targets of each example, in fp32.
    """

    sum: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]


@dataclass
class PretrainingOutput(ModelOutput):
    """Output of every [`PretrainingModel`].

    Attributes:
        losses: Differentiable loss sums by name.
        metrics: Further sums by name (such as numbers of right answers); in training only those that cost nothing.
        scores: ``[B, L]`` logits of a binary decision a token; only in evaluation.
        score_labels: ``[B, L]`` its labels, -100 where there is none.
        memory: What a recurrent model reads in the next segment, detached.
    """

    # Give both: a ModelOutput takes a lone dictionary for its own fields.
    losses: dict[str, ExampleSum] = None  # type: ignore[assignment]
    metrics: dict[str, ExampleSum] = None  # type: ignore[assignment]
    scores: torch.Tensor | None = None
    score_labels: torch.Tensor | None = None
    memory: RecurrentMemory | None = None

    def count_nothing(self) -> None:
        """Make all sums and counts zero, and their gradients too."""
        for sums in (self.losses, self.metrics):
            sums.update({name: ExampleSum(value.sum * 0, value.count * 0) for name, value in sums.items()})


class SumAccumulator:
    """Adds up sums and counts by name; nothing is copied to the host before [`SumAccumulator.means`]."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, sums: Mapping[str, ExampleSum]) -> None:
        """Add one micro-batch."""
        for name, value in sums.items():
            total = torch.stack([value.sum.detach().sum(), value.count.detach().sum()]).double()
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the mean of each quantity since the last call, over all ranks.

        Args:
            reduce: Sums a tensor over the ranks; called once, on every rank.
        """
        if not self._totals:
            return {}
        names = sorted(self._totals)
        sums, counts = reduce(torch.stack([self._totals[name] for name in names])).T.tolist()
        self._totals.clear()
        return {name: s / c for name, s, c in zip(names, sums, counts, strict=True) if c > 0}


def sum_by_example(values: torch.Tensor, positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Add up values that belong to flat positions of a ``[B, L]`` batch.

    Args:
        values: ``[T]``.
        positions: ``[T]`` flat row-major positions.
        shape: ``(B, L)``.

    Returns:
        ``[B]`` sums in fp32.
    """
    rows = torch.div(positions, shape[1], rounding_mode="floor")
    return torch.zeros(shape[0], device=values.device).index_add(0, rows, values.float())


def masked_lm_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, positions: torch.Tensor, shape: torch.Size
) -> ExampleSum:
    """Cross-entropy at the target positions.

    Args:
        logits: ``[T, V]`` in any floating type; the loss is taken in fp32.
        targets: ``[T]`` token ids, -100 for a slot that only fills up a fixed shape.
        positions: ``[T]`` flat positions of the targets in the batch.
        shape: ``(B, L)`` of the batch.

    Returns:
        Negative log-likelihood in nats and number of targets, by example.
    """
    return sum_of_targets(token_losses(logits, targets), targets, positions=positions, shape=shape)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each target, ``[T]`` fp32 in nats; 0 where there is none. See [`masked_lm_loss`]."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")


def sum_of_targets(
    values: torch.Tensor, targets: torch.Tensor, *, positions: torch.Tensor, shape: torch.Size
) -> ExampleSum:
    """Add up ``[T]`` values that are 0 where there is no target; see [`masked_lm_loss`] for the other arguments."""
    is_target = targets != IGNORED
    return ExampleSum(sum_by_example(values, positions, shape), sum_by_example(is_target, positions, shape))


def masked_lm_accuracy(
    predictions: torch.Tensor, targets: torch.Tensor, *, positions: torch.Tensor, shape: torch.Size
) -> ExampleSum:
    """Count right predictions: ``[T]`` ids against ``[T]`` targets; see [`masked_lm_loss`] for the other arguments."""
    is_target = targets != IGNORED
    return ExampleSum(
        sum_by_example(predictions == targets, positions, shape), sum_by_example(is_target, positions, shape)
    )


def binary_token_loss(logits: torch.Tensor, labels: torch.Tensor, *, mask: torch.Tensor) -> ExampleSum:
    """Binary cross-entropy over the real tokens.

    Args:
        logits: ``[B, L]`` in any floating type; the loss is taken in fp32.
        labels: ``[B, L]`` zeros and ones; what stands under a zero of the mask does not matter.
        mask: ``[B, L]``, one where a token counts.

    Returns:
        Negative log-likelihood in nats and number of tokens, by example.
    """
    mask_BL = mask.to(torch.float32)
    nll_BL = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return ExampleSum((nll_BL * mask_BL).sum(dim=1), mask_BL.sum(dim=1))


# Vocabularies are searched in two steps: for the block, then for the token in it. Near the root of their size costs least.
_BLOCK = 256
# What a CPU's cache holds of the logits while they are gone through several times.
_CACHED_LOGITS = 1 << 20
_LARGEST_BELOW_ONE = 1 - 2**-24


@torch.no_grad()
def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    excluded: torch.Tensor | None = None,
    disallowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample one token a row from the softmax of the logits, by inverting its cumulative distribution.

    One uniform a row decides, so the draw is keyed like every other and needs no generator state on the device. The distribution
    is taken in fp32 whatever the logits' type: in bf16 a Gumbel draw is the argmax 99.7 times out of 100 where it should be so 50
    times.

    Args:
        logits: ``[T, V]`` in any floating type.
        uniforms: ``[T]`` in ``[0, 1)``, fp32.
        temperature: Divides the logits; towards 0 the argmax is drawn, towards infinity all tokens alike. A tensor ``[]`` where
            it changes in training: a compiled model would be compiled anew for each number.
        excluded: ``[V]``, true for tokens that are never drawn.
        disallowed: ``[T]`` ids of a token of each row that is not drawn there; its mass goes to the others. With the true tokens
            it is `disallow_correct` of the official ELECTRA.

    Returns:
        ``[T]`` token ids.
    """
    rows = max(1, _CACHED_LOGITS // logits.shape[1])
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or len(logits) <= rows:
        return _sample(logits, uniforms, temperature, excluded, disallowed)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        barred = None if disallowed is None else disallowed[part]
        tokens[part] = _sample(logits[part], uniforms[part], temperature, excluded, barred)
    return tokens


def _sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float | torch.Tensor,
    excluded: torch.Tensor | None,
    disallowed: torch.Tensor | None,
) -> torch.Tensor:
    scaled_TV = logits.float() / temperature
    if excluded is not None:
        scaled_TV.masked_fill_(excluded, float("-inf"))
    if disallowed is not None:
        scaled_TV.scatter_(1, disallowed[:, None], float("-inf"))
    masses_TV = F.pad(scaled_TV.softmax(dim=-1), (0, -logits.shape[1] % _BLOCK))
    masses_TNK = masses_TV.unflatten(1, (-1, _BLOCK))
    block_T1, inside_T1 = _locate(masses_TNK.sum(dim=-1), uniforms[:, None])
    masses_TK = masses_TNK.take_along_dim(block_T1[..., None], dim=1).squeeze(1)
    return (block_T1 * _BLOCK + _locate(masses_TK, inside_T1)[0]).squeeze(1)


def _locate(masses: torch.Tensor, fraction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the entry at which the running sum of the masses first exceeds a fraction of their total.

    Args:
        masses: ``[T, N]``, not negative.
        fraction: ``[T, 1]`` fp32, at most 1 - 2**-24, whose product with a total is always below it.

    Returns:
        The entry, ``[T, 1]``, never one without mass; and at which fraction of its own mass the sum is met, ``[T, 1]``.
    """
    sums = masses.cumsum(dim=-1)
    wanted = fraction * sums[:, -1:]
    entry = (sums <= wanted).sum(dim=-1, keepdim=True).clamp(max=masses.shape[1] - 1)
    # A parallel prefix sum need not be monotonic, so it can step up at an entry without mass.
    entry = torch.where(masses.gather(-1, entry) > 0, entry, masses.argmax(dim=-1, keepdim=True))
    mass = masses.gather(-1, entry)
    return entry, ((wanted - sums.gather(-1, entry) + mass) / mass).clamp(0, _LARGEST_BELOW_ONE)


class GatheredOutput(NamedTuple):
    """What a stock model returns when its head sees only chosen positions.

    Attributes:
        logits: ``[T, V]`` of the masked-LM head.
        states: ``[B, L, D]`` last hidden states, at all positions.
        output: The stock output, where further heads left their logits.
    """

    logits: torch.Tensor
    states: torch.Tensor
    output: ModelOutput


class GatheredHead:
    """Calls a stock model so that its head sees only chosen positions.

    A masked-LM head costs as much as the encoder of a small model, and 85 % of its work is thrown away. The body's output is
    swapped for the gathered rows by a forward hook, so the head's own code runs unchanged, whatever its architecture: any model
    whose head treats each position on its own gives the same logits as the dense call, up to the order of floating-point sums.

    The hook stays on the model for as long as it is trained. Who only borrows a model takes it off again:

        with GatheredHead(model) as head:
            logits = head(model, positions, **inputs)

    Args:
        model: A model with a body (`model.base_model`) and a head, such as any `AutoModelForMaskedLM`.
        body: The module whose output the head reads, where it is not `model.base_model`: the decoder of an encoder-decoder.
    """

    def __init__(self, model: PreTrainedModel, *, body: nn.Module | None = None) -> None:
        self._positions: torch.Tensor | None = None
        self._states: torch.Tensor | None = None
        body = model.base_model if body is None else body
        self._hook: RemovableHandle = body.register_forward_hook(self._gather)
        # Read in each call instead of the handle, at which a compiled graph would break.
        self._is_attached = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hook off the model, which is then as it was before; the head cannot be called any more."""
        self._hook.remove()
        self._is_attached = False

    def __call__(self, model: PreTrainedModel, positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Return the head's output at ``positions``.

        Args:
            model: The model the hook was set on.
            positions: ``[T]`` flat row-major positions of a ``[B, L]`` batch.
            **inputs: What the model's forward takes, without labels.

        Returns:
            ``[T, V]`` logits.
        """
        return self.run(model, positions, **inputs).logits

    def run(self, model: PreTrainedModel, positions: torch.Tensor, **inputs: Any) -> GatheredOutput:
        """Return what the call returns, along with the states that heads of another kind start from."""
        assert self._is_attached, "without the hook the head would see all positions"
        self._positions = positions
        try:
            output = model(**inputs)
            assert self._states is not None, "the hook ran with the body"
            # The classes with a second head have two kinds of logits.
            logits = output.prediction_logits if "prediction_logits" in output else output.logits
            return GatheredOutput(logits.squeeze(0), self._states, output)
        finally:
            self._positions = self._states = None

    def _gather(self, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> ModelOutput | None:
        if self._positions is None:
            return None
        hidden_BLD = self._states = output[0]
        output.last_hidden_state = hidden_BLD.flatten(0, 1).index_select(0, self._positions).unsqueeze(0)
        return output


def begin_in_column_0(
    inputs: Mapping[str, torch.Tensor], flat: Sequence[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Move padding from the left to the right: heads on the first token read column 0.

    Args:
        inputs: What a stock model takes; entries of the shape of `attention_mask`, ``[B, L]``, are moved.
        flat: Flat positions, which move along.

    Returns:
        The inputs and the flat positions. Rows that begin in column 0 stay as they are.
    """
    mask_BL = inputs["attention_mask"]
    length, first_B1 = mask_BL.shape[1], mask_BL.argmax(dim=1, keepdim=True)
    columns_BL = (torch.arange(length, device=mask_BL.device) + first_B1) % length
    moved = {
        name: value.gather(1, columns_BL) if getattr(value, "shape", None) == mask_BL.shape else value
        for name, value in inputs.items()
    }
    rows = [torch.div(positions, length, rounding_mode="floor") for positions in flat]
    return moved, [
        row * length + (positions - row * length - first_B1[row, 0]) % length
        for row, positions in zip(rows, flat, strict=True)
    ]
