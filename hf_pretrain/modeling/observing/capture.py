"""What the layers of a stock encoder compute, recorded while it runs: queries, keys, values, and hidden states.

The model keeps its fast attention: no attention matrix is made here, and nothing is kept on its modules. A `LayerTrace` follows a
forward through the layers; the attention functions of transformers are wrapped for as long as a block lasts, and those of
DeBERTa-v2, which are its own, are hooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating, layer_modules, longest_sequence, window_of, without_autocast


class LayerTrace:
    """Follows a body through its layers, and keeps the wanted records of the last forward.

    Hooks are functions, not methods, and look at the module that calls them: a copy of the model is another model.

    Attributes:
        layer: Number of the layer that runs, None where the body does not run: a layer that checkpointing runs again is not seen.
        records: What was kept, by layer.
        outputs: What the attention of these layers gave; None if that is not to be kept.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Iterable[int], *, outputs: dict[int, torch.Tensor] | None = None
    ) -> None:
        self.body = model.base_model
        self.wanted = frozenset(layers)
        self.records: dict[int, Any] = {}
        self.outputs = outputs
        self.layer: int | None = None
        self._has_graph = False

    @contextmanager
    def following(
        self,
        *,
        on_input: Callable[[torch.Tensor], None] | None = None,
        on_output: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[None]:
        """Follow the body in the block; call back with what each layer reads, and with what the body returns."""

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is self.body:
                self.records.clear()
                self.layer, self._has_graph = 0, torch.is_grad_enabled()

        def enter_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.layer is not None:
                if on_input is not None:
                    on_input(args[0] if args else kwargs["hidden_states"])
                self.layer += 1

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is self.body:
                if on_output is not None and output is not None:
                    on_output(output[0])
                self.layer = None

        with ExitStack() as stack:
            # First of all hooks: a gathered head's replaces the states.
            stack.enter_context(self.body.register_forward_pre_hook(begin, prepend=True))
            stack.enter_context(self.body.register_forward_hook(end, prepend=True, always_call=True))
            for layer in layer_modules(self.body):
                stack.enter_context(layer.register_forward_pre_hook(enter_layer, prepend=True, with_kwargs=True))
            yield
        self._check_complete()

    def keep(self, make_record: Callable[[], Any], *, output: torch.Tensor) -> None:
        """Keep a record of the attention of the layer that runs, if it is wanted and the layer's first."""
        if self.layer is None or self.layer not in self.wanted or self.layer in self.records:
            return
        if self._has_graph and not torch.is_grad_enabled():
            raise InputError(
                "gradient checkpointing with use_reentrant=True hides the attention from the loss: "
                "set activation_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.records[self.layer] = make_record()
        if self.outputs is not None:
            self.outputs[self.layer] = output

    def _check_complete(self) -> None:
        missing = sorted(self.wanted - self.records.keys())
        if missing:
            raise InputError(
                f"nothing was captured of the layers {', '.join(map(str, missing))} of {type(self.body).__name__}, which has "
                f"{self.body.config.num_hidden_layers}: ask for layers that a forward inside of the block runs"
            )


# Of the trial in `check_capture`, against the largest value: rounding in bfloat16 is below, another kind of attention above.
_TOLERANCE = 0.05


class AttentionRecord(NamedTuple):
    """What a self-attention layer compares: its scores are ``scaling * query @ key.T + bias``, before the softmax.

    Attributes:
        query: ``[B, h, L, d]``, rotated where the model rotates.
        key: ``[B, h, L, d]``.
        value: ``[B, h, L, d]``.
        scaling: Factor of the products.
        bias: Added to the products, ``[B, h, L, L]`` or what broadcasts to it; None if there is none.
        window: Largest distance at which tokens see each other; None if all do.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    window: int | None = None

    @property
    def num_heads(self) -> int:
        """The number of attention heads."""
        return self.query.shape[1]

    def scores(self) -> torch.Tensor:
        """Return the scores of all pairs, ``[B, h, L, L]`` in fp32."""
        with without_autocast(self.query.device):
            scores = self.scaling * (self.query.float() @ self.key.float().mT)
        return scores if self.bias is None else scores + self.bias

    def concatenated(self, name: str) -> torch.Tensor:
        """Return "query", "key" or "value" with its heads side by side, ``[B, L, h * d]``."""
        heads_BHLD: torch.Tensor = getattr(self, name)
        return heads_BHLD.transpose(1, 2).flatten(2)

    def to(self, device: torch.device) -> AttentionRecord:
        """Return the record on another device."""
        parts: Any = (part.to(device) if isinstance(part, torch.Tensor) else part for part in self)
        return AttentionRecord(*parts)

    def of_heads(self, heads: slice) -> AttentionRecord:
        """Return the record of some heads."""
        query, key, value = (states[:, heads] for states in (self.query, self.key, self.value))
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias[:, heads]
        return self._replace(query=query, key=key, value=value, bias=bias)


@contextmanager
def _watching(backend: str, trace: LayerTrace) -> Iterator[None]:
    """Let a trace see the calls of an attention function, which keeps its name: models choose masks and kernels by it."""
    attention = ALL_ATTENTION_FUNCTIONS[backend]

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        result = attention(module, query, key, value, *args, **kwargs)
        trace.keep(lambda: _record(query, key, value, **kwargs), output=result[0])
        return result

    ALL_ATTENTION_FUNCTIONS[backend] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[backend] = attention


def _record(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **further: Any,
) -> AttentionRecord:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None else sliding_window - 1  # Flash attention counts the token itself.
    return AttentionRecord(query, key, value, scaling, position_bias, window)


def _watch(module: Any, trace: LayerTrace, stack: ExitStack) -> None:
    """Let a trace see what DeBERTa's attention compares, for as long as the stack is open."""
    parts: dict[str, torch.Tensor] = {}

    def keep_projection(name: str) -> Callable[..., None]:
        def keep(projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            # The first call is for the content; the same weights may project positions afterwards.
            parts.setdefault(name, output)

        return keep

    def keep_bias(self: Any, *args: Any) -> torch.Tensor:
        bias: torch.Tensor = type(self).disentangled_attention_bias(self, *args)
        if self is module:
            parts["bias"] = bias
        return bias

    def finish(attention: Any, args: tuple[Any, ...], output: Any) -> None:
        record = _compared(module, **parts)
        trace.keep(lambda: record, output=output[0])
        parts.clear()

    for name in ("query", "key", "value"):
        stack.enter_context(getattr(module, f"{name}_proj").register_forward_hook(keep_projection(name)))
    stack.enter_context(module.register_forward_hook(finish))
    # A method: a copy of the model calls it as its own.
    module.disentangled_attention_bias = MethodType(keep_bias, module)
    stack.callback(delattr, module, "disentangled_attention_bias")


def _compared(
    module: Any, *, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> AttentionRecord:
    query, key, value = (
        states.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for states in (query, key, value)
    )
    num_terms = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
    bias = None if bias is None else bias.unflatten(0, query.shape[:2])
    return AttentionRecord(query, key, value, (num_terms * query.shape[-1]) ** -0.5, bias)


@contextmanager
def capture_attention(
    model: PreTrainedModel, layers: Iterable[int], *, outputs: dict[int, torch.Tensor] | None = None
) -> Iterator[dict[int, AttentionRecord]]:
    """Record the self-attention of some layers of each forward in the block; the last forward's remain.

    Args:
        model: A stock encoder, with or without a head, on sdpa or flash attention; DeBERTa-v2 on its own.
        layers: Layers to record, from 1.
        outputs: If given, it is filled with what the attention of these layers gives.

    Yields:
        The records by layer, filled by the forward; part of its graph, and good after the block.

    Raises:
        InputError: If the attention of a layer was not seen, or not its graph (checkpointing in the reentrant way).
    """
    trace, backend = LayerTrace(model, layers, outputs=outputs), model.config._attn_implementation
    with ExitStack() as stack:
        disentangled = [module for module in trace.body.modules() if hasattr(module, "disentangled_attention_bias")]
        if disentangled:
            for module in disentangled:
                _watch(module, trace, stack)
        elif backend in ALL_ATTENTION_FUNCTIONS and model._can_set_attn_implementation():
            stack.enter_context(_watching(backend, trace))
        else:
            raise _refusal(model, "it is none of transformers' attention functions; use attn_implementation='sdpa'")
        stack.enter_context(trace.following())
        yield trace.records


def _refusal(model: PreTrainedModel, reason: str) -> InputError:
    return InputError(
        f"the attention of {type(model).__name__} with attn_implementation={model.config._attn_implementation!r} cannot be "
        f"captured: {reason}, another architecture, or losses without attention"
    )


@contextmanager
def capture_hidden_states(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Record the hidden states of some layers, those of `output_hidden_states=True`, of the last forward in the block.

    Args:
        model: A stock encoder, with or without a head.
        layers: Layers to record: 0 is what the first layer reads, N what the encoder returns (after a final norm, if it has one).

    Yields:
        ``[B, L, D]`` by layer, filled by the forward; part of its graph, and good after the block.

    Raises:
        InputError: If a layer was not seen.
    """
    trace = LayerTrace(model, layers)

    def keep(hidden_BLD: torch.Tensor) -> None:
        assert trace.layer is not None
        if trace.layer in trace.wanted:
            trace.records[trace.layer] = hidden_BLD

    # A state is taken where the next layer reads it: something may stand in between, as DeBERTa's convolution does.
    with trace.following(on_input=keep, on_output=keep):
        yield trace.records


class _DeepEnough(Exception):
    """Ends a forward."""


def run_to_layer(model: PreTrainedModel, depth: int, **inputs: Any) -> None:
    """Run an encoder no further than a layer, for what the open captures record; a head does not run.

    Args:
        model: A stock encoder; of one with a head only the encoder runs.
        depth: The last layer that runs; N runs all that there is.
        **inputs: What the encoder takes.
    """
    num_started = 0

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal num_started
        if num_started == depth:
            raise _DeepEnough
        num_started += 1

    with ExitStack() as stack, suppress(_DeepEnough):
        for layer in layer_modules(model.base_model):
            stack.enter_context(layer.register_forward_pre_hook(stop))
        model.base_model(**inputs)


def check_capture(model: PreTrainedModel) -> None:
    """Refuse a model whose attention cannot be recorded.

    What it does is seen, not looked up: on a few tokens, the values weighted by the softmax of the captured scores have to be
    what the attention gave.

    Args:
        model: A stock encoder, with or without a head, on the device and in the type that it is used in.

    Raises:
        InputError: Naming the architecture and what is wrong.
    """
    body = model.base_model
    if any(parameter.is_meta for parameter in body.parameters()):
        return  # There are no values to compare.
    # So many that a window shows.
    length = max(window_of(body.config) or 0, 6) + 2
    length = min(length, longest_sequence(body) or length)
    input_ids = torch.arange(length, device=body.device)[None] % min(body.config.vocab_size, 100)
    outputs: dict[int, torch.Tensor] = {}
    layers = range(1, body.config.num_hidden_layers + 1)
    with evaluating(model), capture_attention(model, layers, outputs=outputs) as records:
        body(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    for layer, output in outputs.items():
        expected = _attend(records[layer])
        if not (output.reshape(expected.shape) - expected).abs().max() <= _TOLERANCE * expected.abs().max():
            raise _refusal(model, "it is not the softmax of its scores; choose another attn_implementation")


def _attend(record: AttentionRecord) -> torch.Tensor:
    """Return what plain attention gives, ``[B, L, h * d]``."""
    scores = record.scores()
    if record.window is not None:
        positions = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill((positions[:, None] - positions).abs() > record.window, float("-inf"))
    return (scores.softmax(-1) @ record.value.float()).transpose(1, 2).flatten(2)
