"""What torch does slowly or in much memory: the cross-entropy of a large vocabulary, and dropout and casts on a CPU.

A batch of 32 rows of 1024 tokens has more logits over 50 000 tokens than many devices have memory. Here at most a chunk of them
exists at any time. [`linear_cross_entropy`] is for a linear map: it computes the gradients of a chunk together with its loss,
while the logits are there, so that nothing is computed twice. [`OutputMap`] finds out whether a stock head ends in such a map,
and runs the head without it.

In training steps on a CPU [`fast_dropout`] computes dropout as torch does, at a fraction of its time and memory.
torch draws the number of each entry alone, 13 ns an entry, which is a quarter of a step of a small BERT. Attention with dropout
has no fused kernel on a CPU either: it computes in fp32 whatever the inputs are, and keeps three tensors of
`batch × heads × queries × keys` numbers for backward. Here four entries share one draw of 64 bits and a bit an entry is kept, and
attention works on blocks that stay in the cache of a core. Under autocast, layers that read the same states keep one copy of them
in half precision, where torch makes one for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol, cast
from weakref import ref

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function
from transformers import PreTrainedModel

from hf_pretrain.modeling.backbone import without_autocast
from hf_pretrain.modeling.losses import IGNORED, token_losses

CHUNK_LOGITS = 1 << 22
"""Logits that exist at a time: 16 MiB in fp32; on accelerators, which need larger products, 16 times as many."""

Look = Callable[[slice, torch.Tensor], None]
_ON_ACCELERATORS = 16
# BART and its kin add it to their logits: [1, V], zeros unless a checkpoint says otherwise.
_CONSTANT = "final_logits_bias"
_UNEQUAL = (
    "the losses of the positions are weighted differently: their gradients were added up in the forward pass; add up the losses "
    "and weigh the sum"
)
# Numbers that 16 bits tell apart: a probability is rounded to the next of them, and what is kept is scaled by the rounded one.
_LEVELS = 1 << 16
# Of fewer entries torch draws as fast as a generator is made.
_LEAST_ENTRIES = 1 << 13
# Of the scores of a block: they and the noise stay in the cache of a core, and a product is large enough to be worth a call.
_BLOCK_BYTES = 1 << 20

_Answer = Callable[..., torch.Tensor | None]


# The head


def linear_cross_entropy(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_logits: int | None = None,
    look: Look | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of a linear head without its logits.

    The gradients of states, weight and bias are those of the sum of the losses. They are computed here, and multiplied in the
    backward pass by the gradient of the losses, which must be the same for all positions.

    Args:
        states: ``[T, D]``.
        weight: ``[V, D]`` of the head.
        targets: ``[T]`` token ids, -100 for a position without a target.
        bias: ``[V]`` of the head.
        chunk_logits: Logits that exist at a time, at least those of one position; by default [`CHUNK_LOGITS`], more on
            accelerators.
        look: Called with each chunk, a slice of the positions and their logits, which it must neither change nor keep.

    Returns:
        ``[T]`` fp32, in nats; 0 where there is no target.

    Raises:
        RuntimeError: In the backward pass, if the losses of two positions have different gradients.
    """
    inputs = (states, weight, bias)
    wants_gradients = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)
    rows = chunk_rows(len(weight), chunk_logits, states.device)
    losses: torch.Tensor = _LinearCrossEntropy.apply(states, weight, bias, targets, rows, wants_gradients, look)
    return losses


def chunk_rows(vocab_size: int, chunk_logits: int | None, device: torch.device) -> int:
    """Return the positions of a chunk of so many logits, at least one; by default [`CHUNK_LOGITS`], more on accelerators."""
    if chunk_logits is None:
        chunk_logits = CHUNK_LOGITS * (1 if device.type == "cpu" else _ON_ACCELERATORS)
    return max(1, chunk_logits // vocab_size)


def sums_early(weight: torch.Tensor) -> bool:
    """Return whether [`linear_cross_entropy`] does for a weight.

    In float16 it does not: a gradient has to be scaled there before it is multiplied, or it vanishes. A compiler makes one kernel
    of logits and losses by itself.
    """
    return compute_dtype(weight) != torch.float16 and not torch.compiler.is_compiling()


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the number format in which a linear map computes: that of autocast, or the weight's."""
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each position; its gradients are there when the forward pass is over."""

    @staticmethod
    def forward(
        ctx: Any,
        states_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_T: torch.Tensor,
        rows: int,
        wants_gradients: bool,
        look: Look | None,
    ) -> torch.Tensor:
        dtype = compute_dtype(weight_VD)
        needed = [wants_gradients and need for need in ctx.needs_input_grad[:3]]
        sums = _GradientSums.of((states_TD, weight_VD, bias_V), needed)
        nll_T = torch.empty(len(states_TD), dtype=torch.float32, device=states_TD.device)
        with without_autocast(states_TD.device):
            # One copy for all chunks, which autocast would keep too.
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for begin in range(0, len(states_TD), rows):
                part = slice(begin, begin + rows)
                nll_T[part] = _chunk_losses(
                    part, states_TD[part].to(dtype), targets_T[part], weight, bias, sums if any(needed) else None, look
                )
        ctx.sums = sums
        return nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.sums is None:
            raise RuntimeError("the gradients of linear_cross_entropy are gone: run backward once for a forward pass")
        gradients, ctx.sums = ctx.sums.gradients(), None
        if not len(grad_T):
            return *gradients, None, None, None, None
        lowest, highest = grad_T.aminmax()
        # No wait for the device; on a GPU an assertion fails there.
        torch._assert_async(lowest == highest, _UNEQUAL)
        scaled = [None if gradient is None else gradient.mul_(lowest.to(gradient.dtype)) for gradient in gradients]
        return *scaled, None, None, None, None


def _chunk_losses(
    part: slice,
    chunk_CD: torch.Tensor,
    targets_C: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sums: _GradientSums | None,
    look: Look | None,
) -> torch.Tensor:
    """Return the losses of a chunk, and add its gradients to the sums; what it needs is free again afterwards."""
    logits_CV = F.linear(chunk_CD, weight, bias)
    if look is not None:
        look(part, logits_CV)
    log_probs_CV = _log_softmax(logits_CV)
    del logits_CV
    ids_C1 = targets_C.clamp(min=0)[:, None]
    is_target_C = targets_C != IGNORED
    nll_C = -log_probs_CV.gather(1, ids_C1).squeeze(1)
    if sums is not None:
        errors_CV = log_probs_CV.exp_()
        errors_CV.scatter_add_(1, ids_C1, errors_CV.new_full(ids_C1.shape, -1.0))
        sums.add(part, errors_CV, chunk_CD, weight, is_target_C[:, None])
    return nll_C.masked_fill(~is_target_C, 0.0)


def _log_softmax(logits_CV: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities in fp32; fp32 logits are overwritten."""
    if logits_CV.device.type != "cpu":
        return F.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    # On a CPU the conversion is a copy of its own.
    wide = logits_CV.float()
    return torch.log_softmax(wide, -1, out=wide)


class _GradientSums(NamedTuple):
    """Gradients of states, weight and bias while they are added up; None for what has none. Sums are in fp32."""

    states: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]

    @classmethod
    def of(cls, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], needed: list[bool]) -> _GradientSums:
        states, weight, bias = inputs
        return cls(
            torch.empty_like(states) if needed[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None,
            torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None,
            (states.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype),
        )

    def add(
        self,
        part: slice,
        errors_CV: torch.Tensor,
        chunk_CD: torch.Tensor,
        weight_VD: torch.Tensor,
        is_target_C1: torch.Tensor,
    ) -> None:
        """Add a chunk of positions: its probabilities less the targets, ``[C, V]`` fp32."""
        if self.bias is not None:
            self.bias.addmv_(errors_CV.T, is_target_C1[:, 0].float())
        errors = errors_CV.to(chunk_CD.dtype)
        if self.states is not None:
            self.states[part] = (errors @ weight_VD).masked_fill_(~is_target_C1, 0.0)
        if self.weight is not None:
            seen_CD = chunk_CD.masked_fill(~is_target_C1, 0.0)
            if seen_CD.dtype == torch.float32:
                # Not addmm_, which no counter of operations knows.
                torch.addmm(self.weight, errors.T, seen_CD, out=self.weight)
            else:
                self.weight.add_(errors.T @ seen_CD)

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the sums in the number formats of what they are the gradients of."""
        sums = (self.states, self.weight, self.bias)
        return [None if one is None else one.to(dtype) for one, dtype in zip(sums, self.dtypes, strict=True)]


class Judge(Protocol):
    """Turns what a model returns into the losses of its targets, see [`OutputMap.losses`]."""

    def __call__(self, read: torch.Tensor, targets: torch.Tensor, *, look: Look | None = None) -> torch.Tensor:
        """Return the cross-entropy ``[T]`` of the targets ``[T]``, -100 for none; `look` as in [`linear_cross_entropy`]."""


class OutputMap:
    """The linear map that ends the head of a stock language model, such as the decoder of BERT's.

    Args:
        model: A stock model with a table of output embeddings.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._ends_head: bool | None = None
        self._adds_constant = False

    @contextmanager
    def losses(self, *, in_chunks: bool) -> Iterator[Judge]:
        """Run the model inside; the [`Judge`] turns what it returns into the losses of the targets.

        Where the head ends in the map, the model returns what the map would read, and the logits never exist together. Whether
        it does is seen in the first run, which makes logits. A compiler makes one kernel of logits and loss anyway, so what it
        traces makes logits too.

        Args:
            in_chunks: Whether to do so. All targets must then weigh the same in the gradient, and there are no logits.
        """
        found = self.find() if in_chunks and torch.is_grad_enabled() else None
        if found is None or torch.compiler.is_compiling():
            with self.watched() as watch:
                yield partial(_judge_logits, watch)
            return
        with self.left_out():
            yield partial(_judge_states, found)

    @contextmanager
    def watched(self) -> Iterator[Callable[[torch.Tensor], None] | None]:
        """Find out whether what the head returns is what the table returns, with nothing done to it.

        Gives a function to call with the logits that the model returned inside; None if some were seen before. What a compiler
        traces is not watched.
        """
        table = self._model.get_output_embeddings()
        if torch.compiler.is_compiling() or self._ends_head is not None or not isinstance(table, nn.Module):
            yield None
            return
        made = list[tuple[torch.Tensor, tuple[int, int, int]]]()
        hook = table.register_forward_hook(lambda module, args, output: made.append((output, _state(output))))

        def watch(logits: torch.Tensor) -> None:
            # A reader may have tried the model out before.
            output, state = made.pop() if made else (None, None)
            is_alone = state == _state(logits)
            self._adds_constant = output is not None and not is_alone and self._is_sum(output, logits)
            self._ends_head = is_alone or self._adds_constant
            made.clear()

        try:
            yield watch
        finally:
            hook.remove()

    def find(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Return its weight ``[V, D]`` and bias ``[V]``; None if the head does not end in a linear map, or was not tried.

        None, too, where the map computes in float16: a gradient has to be scaled there before it is multiplied, or it vanishes.
        """
        table = self._model.get_output_embeddings()
        if not self._ends_head or type(table) is not nn.Linear or table._forward_hooks or table._forward_pre_hooks:
            return None
        if compute_dtype(table.weight) == torch.float16:
            return None
        if not self._adds_constant:
            return table.weight, table.bias
        constant = cast(torch.Tensor, self._model._buffers[_CONSTANT])[0]
        return table.weight, constant if table.bias is None else table.bias + constant

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Let the model return what the map would read, ``[..., D]``, in the place of its logits."""
        own, buffers = vars(self._model.get_output_embeddings()), self._model._buffers
        constant = buffers.get(_CONSTANT) if self._adds_constant else None
        own["forward"] = lambda states: states
        if constant is not None:
            buffers[_CONSTANT] = constant.new_zeros(())
        try:
            yield
        finally:
            del own["forward"]
            if constant is not None:
                buffers[_CONSTANT] = constant

    def _is_sum(self, output: torch.Tensor, logits: torch.Tensor) -> bool:
        """Return whether the head adds the constant to what the map returns, and does nothing else."""
        constant = self._model._buffers.get(_CONSTANT)
        if constant is None or logits.is_meta or constant.shape != (1, logits.shape[-1]):
            return False
        return torch.equal((output + constant).view(-1, logits.shape[-1]), logits.view(-1, logits.shape[-1]))


def _judge_logits(
    watch: Callable[[torch.Tensor], None] | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    look: Look | None = None,
) -> torch.Tensor:
    if watch is not None:
        watch(logits)
    if look is not None:
        look(slice(None), logits.detach())
    return token_losses(logits, targets)


def _judge_states(
    found: tuple[torch.Tensor, torch.Tensor | None],
    states: torch.Tensor,
    targets: torch.Tensor,
    *,
    look: Look | None = None,
) -> torch.Tensor:
    weight, bias = found
    return linear_cross_entropy(states, weight, targets, bias=bias, look=look)


def _state(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return where the numbers of a tensor are, how often they were changed there, and how many there are."""
    return tensor.untyped_storage()._cdata, tensor._version, tensor.numel()


# Dropout on a CPU


@contextmanager
def fast_dropout(device: torch.device, *, is_compiled: bool = False) -> Iterator[None]:
    """Let dropout, attention with dropout and the casts of linear layers be computed as here.

    A forward pass and its backward pass belong into one block: what checkpoints of activations compute again must drop the same.
    All numbers follow from torch's default generator, so that its state is enough to repeat them. They are not torch's own.

    Args:
        device: Device of the step; on another one than a CPU nothing changes.
        is_compiled: Whether the model is compiled, which does the same by itself; nothing changes either.
    """
    if device.type != "cpu" or is_compiled:
        yield
        return
    # By name, where models and layers look them up: a mode of torch's functions would not be there in a backward pass.
    names: dict[str, _Answer] = {
        "dropout": _dropped,
        "scaled_dot_product_attention": _attended,
        "linear": _Casts().linear,
    }
    before = {name: getattr(F, name) for name in names}
    for name, ours in names.items():
        setattr(F, name, _first(ours, before[name]))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _first(ours: _Answer, other: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function that asks ours, and the other one where that has no answer."""

    @wraps(other)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        # Modes of torch's functions see it as they see the other one.
        if has_torch_function(args):
            found: torch.Tensor = handle_torch_function(call, args, *args, **kwargs)
            return found
        answer = ours(*args, **kwargs)
        return other(*args, **kwargs) if answer is None else answer

    return call


def _dropped(
    input: torch.Tensor,  # noqa: A002
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor | None:
    """Return the input with dropout; None where torch has to do it. The arguments are those of `torch.nn.functional.dropout`."""
    if not training or inplace or not _is_ours(input, p) or input.numel() < _LEAST_ENTRIES:
        return None
    found: torch.Tensor = _Dropout.apply(input, p)
    return found


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """Return attention with dropout; None where torch has to compute it.

    The arguments are those of `torch.nn.functional.scaled_dot_product_attention`.
    """
    is_usual = query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    # A mask beside `is_causal` is refused there.
    is_other = attn_mask is not None and (attn_mask.requires_grad or is_causal)
    if not is_usual or is_other or enable_gqa or not all(_is_ours(x, dropout_p) for x in (query, key, value)):
        return None
    if math.prod(query.shape[:3]) * key.shape[2] < _LEAST_ENTRIES:
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (each.to(dtype) for each in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query.dtype)
    if is_causal:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        bias = _bias(visible, query.dtype)
    found: torch.Tensor = _Attention.apply(
        query, key, value, bias, dropout_p, query.shape[-1] ** -0.5 if scale is None else scale
    )
    return found


def _is_ours(tensor: torch.Tensor, p: float) -> bool:
    return _is_dense(tensor) and tensor.is_floating_point() and 0 < _dropped_levels(p) < _LEVELS


def _is_dense(tensor: torch.Tensor) -> bool:
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return is_plain and tensor.device.type == "cpu"


def _dropped_levels(p: float) -> int:
    return round(p * _LEVELS)


def _scale(p: float) -> float:
    """Return by what the entries that are kept are multiplied, so that none is expected to change."""
    return _LEVELS / (_LEVELS - _dropped_levels(p))


def _draw_kept(shape: torch.Size, p: float) -> torch.Tensor:
    """Return which entries are kept, as 1 and 0: `int8` of this shape."""
    size = math.prod(shape)
    seed = int(torch.randint(1 << 62, ()))
    drawn = np.random.SFC64(seed).random_raw(-(-size // 4)).view(np.uint16)[:size]
    return torch.from_numpy((drawn >= _dropped_levels(p)).view(np.int8)).view(shape)


def _packed(kept: torch.Tensor) -> torch.Tensor:
    """Return 1 and 0 as a bit each: `uint8`, in one dimension."""
    return torch.from_numpy(np.packbits(kept.numpy().view(np.bool_)))


def _unpacked(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return 1 and 0 of bits: `int8` of this shape."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).view(np.int8)).view(shape)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to the scores: -inf where a boolean mask hides."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)


class _Dropout(torch.autograd.Function):
    """Dropout that keeps a bit an entry."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        """Return the input with some entries set to zero and the others scaled."""
        kept = _draw_kept(x.shape, p)
        ctx.save_for_backward(_packed(kept))
        ctx.scale = _scale(p)
        return (x * kept.to(x.dtype)).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the input."""
        (bits,) = ctx.saved_tensors
        kept = _unpacked(bits, gradient.shape)
        return (gradient * kept.to(gradient.dtype)).mul_(ctx.scale), None


class _Attention(torch.autograd.Function):
    """Attention with dropout, a block of heads at a time; backward computes the probabilities again.

    Products are in the format of the inputs, as the eager attention of transformers has them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        p: float,
        scale: float,
    ) -> torch.Tensor:
        """Return `dropout(softmax(scale · query · keyᵀ + bias)) · value`: `[batch, heads, queries, size of values]`."""
        batch, heads = query.shape[:2]
        with torch.autocast("cpu", enabled=False):
            query, key, value = (_flat(query) * scale, _flat(key), _flat(value))
            kept = _draw_kept(torch.Size((len(query), query.shape[1], key.shape[1])), p)
            blocks = _Blocks(kept, query.dtype, bias, heads)
            result = value.new_empty(*query.shape[:2], value.shape[2])
            for block in blocks:
                weights = blocks.weights(query, key, block)
                weights *= blocks.noise(block)
                torch.bmm(weights, value[block], out=result[block])
            result *= _scale(p)
        ctx.save_for_backward(query, key, value, bias, _packed(kept))
        ctx.p, ctx.scale, ctx.heads = p, scale, heads
        return result.view(batch, heads, *result.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        query, key, value, bias, bits = ctx.saved_tensors
        kept = _unpacked(bits, torch.Size((*query.shape[:2], key.shape[1])))
        of_query, of_key, of_value = map(torch.empty_like, (query, key, value))
        blocks = _Blocks(kept, query.dtype, bias, ctx.heads)
        room = blocks.room()
        with torch.autocast("cpu", enabled=False):
            outer = _flat(gradient) * _scale(ctx.p)
            for block in blocks:
                weights, noise = blocks.weights(query, key, block), blocks.noise(block)
                inner = torch.mul(weights, noise, out=room[: len(weights)])
                torch.bmm(inner.mT, outer[block], out=of_value[block])
                torch.bmm(outer[block], value[block].mT, out=inner)
                inner *= noise
                of_scores = torch._softmax_backward_data(inner, weights, -1, weights.dtype)
                torch.bmm(of_scores, key[block], out=of_query[block])
                torch.bmm(of_scores.mT, query[block], out=of_key[block])
            of_query *= ctx.scale
        found = (each.view(-1, ctx.heads, *each.shape[1:]) for each in (of_query, of_key, of_value))
        return *found, None, None, None


class _Blocks:
    """Some heads at a time, and room for their probabilities and their noise that all blocks share.

    Args:
        kept: The entries that are kept: `[batch · heads, queries, keys]`.
        dtype: Number format of the products.
        bias: Added to the scores `[batch, heads, queries, keys]`, if its shape is that or is stretched to it.
        heads: Heads of an example.
    """

    def __init__(self, kept: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None, heads: int) -> None:
        self._kept, self._heads = kept, heads
        self._size = min(len(kept), max(1, _BLOCK_BYTES // (math.prod(kept.shape[1:]) * dtype.itemsize)))
        self._dtype = dtype
        self._weights, self._noise = self.room(), self.room()
        self._bias = self._hidden = None
        if bias is not None:
            # Stretched over examples and heads alone: a mask of keys has one row for all queries.
            rows = (1,) * (4 - bias.dim()) + bias.shape
            self._bias = bias.expand(len(kept) // heads, heads, *rows[2:])
            hidden = self._bias.amax(-1, keepdim=True) == -math.inf
            self._hidden = hidden if bool(hidden.any()) else None

    def room(self) -> torch.Tensor:
        """Return an empty tensor for the scores of a block."""
        return torch.empty(self._size, *self._kept.shape[1:], dtype=self._dtype)

    def __iter__(self) -> Iterator[slice]:
        """Yield the heads of each block, as places among those of all examples."""
        for low in range(0, len(self._kept), self._size):
            yield slice(low, min(low + self._size, len(self._kept)))

    def weights(self, query: torch.Tensor, key: torch.Tensor, block: slice) -> torch.Tensor:
        """Return the probabilities of a block before dropout; those of a query that sees nothing are 0, as torch has them."""
        weights = self._weights[: block.stop - block.start]
        torch.bmm(query[block], key[block].mT, out=weights)
        if self._bias is None:
            return torch.softmax(weights, -1, out=weights)
        places = torch.arange(block.start, block.stop)
        at = (places // self._heads, places % self._heads)
        weights += self._bias[at]
        torch.softmax(weights, -1, out=weights)
        return weights if self._hidden is None else weights.masked_fill_(self._hidden[at], 0.0)

    def noise(self, block: slice) -> torch.Tensor:
        """Return the kept entries of a block in the number format of the products."""
        return self._noise[: block.stop - block.start].copy_(self._kept[block])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return `[batch, heads, positions, size]` as `[batch · heads, positions, size]`, one after the other in memory."""
    return tensor.contiguous().flatten(0, 1)


class _Casts:
    """The states that were last read under autocast, in its format: queries, keys and values read the same."""

    def __init__(self) -> None:
        self._read: Callable[[], torch.Tensor | None] = lambda: None
        self._version = -1
        self._cast: torch.Tensor | None = None

    def linear(
        self,
        input: torch.Tensor,  # noqa: A002
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return the linear map of fp32 states under autocast, to the same bits; None where torch has to compute it."""
        if not torch.is_autocast_enabled("cpu") or input.dtype != torch.float32 or not input.requires_grad:
            return None
        if not _is_dense(input) or not torch.is_grad_enabled():
            return None
        if self._read() is not input or self._version != input._version:
            self._cast = input.detach().to(torch.get_autocast_dtype("cpu"))
            self._read, self._version = ref(input), input._version
        return torch._C._nn.linear(_SharedCast.apply(input, self._cast), weight, bias)


class _SharedCast(torch.autograd.Function):
    """A cast that was made before; gradients of all that read it are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cast_states: torch.Tensor) -> torch.Tensor:
        """Return the cast of the states."""
        return cast_states.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the states."""
        return gradient.float(), None
