"""One forward pass of a stock model that returns only the requested outputs: logits, hidden states, attention.

A [`ModelRunner`] opens the captures of `capture.py`, runs the model no deeper than the request needs, and its head
only at the positions of the batch that have a prediction.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_pretrain.modeling.backbone import num_token_types, without_autocast
from hf_pretrain.modeling.losses import GatheredHead
from hf_pretrain.modeling.observing.capture import (
    AttentionRecord,
    capture_attention,
    capture_hidden_states,
    run_to_layer,
)
from hf_pretrain.modeling.visibility.rules import isolated_inputs


class TopKTargets(NamedTuple):
    """A teacher's predictions at the targets of a batch, in the order of its `target_positions`, without fillers.

    Attributes:
        ids: ``[T, k]`` int64, its k likeliest tokens, the likeliest first.
        log_probs: ``[T, k]`` fp32, their log-probabilities.
        tail: ``[T]`` fp32, the log-probability of all other tokens together; -inf if there are none.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    tail: torch.Tensor


def top_k_targets(logits: torch.Tensor, *, k: int, temperature: float = 1.0) -> TopKTargets:
    """Return the k likeliest tokens of ``[T, V]`` logits and the mass of the others, in fp32."""
    log_probs_TV = (logits.float() / temperature).log_softmax(dim=-1)
    log_probs_TK, ids_TK = log_probs_TV.topk(min(k, log_probs_TV.shape[1]))
    # Summed over the others. 1 less the sum of the k would be lost to rounding where the teacher is sure.
    tail_T = log_probs_TV.scatter(1, ids_TK, float("-inf")).logsumexp(dim=-1)
    return TopKTargets(ids_TK, log_probs_TK, tail_T)


@dataclass(frozen=True)
class OutputRequest:
    """The outputs that a forward pass has to return.

    Attributes:
        logits: Whether the head runs.
        hidden: Layers whose hidden states are returned; 0 is the embeddings.
        attention: Layers whose attention is returned, from 1.
    """

    logits: bool = False
    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """The last layer that has to run where the head does not."""
        return max((*self.hidden, *self.attention), default=0)


@dataclass
class ModelOutputs:
    """The requested outputs of a forward pass.

    Attributes:
        logits: ``[T, V]`` at the positions of the batch, of spans ``[T, 2]`` of starts and ends; or ``[B, C]`` of
            sequences; None if not requested.
        top_k: In place of logits, the likeliest tokens at these positions, from a cache.
        hidden: ``[B, L, D]`` by layer.
        attention: Records by layer.
    """

    logits: torch.Tensor | None = None
    top_k: TopKTargets | None = None
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionRecord] = field(default_factory=dict)

    def to(self, device: torch.device) -> ModelOutputs:
        """Return the outputs on another device."""
        return ModelOutputs(
            logits=None if self.logits is None else self.logits.to(device),
            hidden={layer: states.to(device) for layer, states in self.hidden.items()},
            attention={layer: record.to(device) for layer, record in self.attention.items()},
        )


class ModelRunner:
    """Runs a stock model for the requested outputs.

    Logits are in fp32: the last linear layer of the head computes in fp32 from the constructor on. As a context
    manager, the runner leaves the model as it was.

    Args:
        model: A stock encoder, with or without a head.
        request: The outputs.
        gathers: Whether its head runs on chosen positions.
    """

    def __init__(self, model: PreTrainedModel, request: OutputRequest, *, gathers: bool) -> None:
        self.request = request
        self.takes_types = num_token_types(model.config) > 1
        self.gathered: GatheredHead | None = None
        self._changed: nn.Linear | None = None
        if request.logits:
            self._changed = keep_logits_in_fp32(model)
            self.gathered = GatheredHead(model) if gathers else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.gathered is not None:
            self.gathered.remove()
        if self._changed is not None:
            del self._changed.forward

    def __call__(
        self, model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor | None = None
    ) -> ModelOutputs:
        """Run a forward pass.

        Args:
            model: The model of the constructor.
            inputs: Its inputs; token types are left out for a model that has none.
            positions: ``[T]`` flat positions of the batch where the head runs, or where a span may begin and end.
        """
        if not self.takes_types:
            inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        # Before any capture: the first call tries the model out for documents in one row.
        inputs = isolated_inputs(model, **inputs)
        outputs = ModelOutputs()
        with ExitStack() as stack:
            if self.request.hidden:
                outputs.hidden = stack.enter_context(capture_hidden_states(model, self.request.hidden))
            if self.request.attention:
                outputs.attention = stack.enter_context(capture_attention(model, self.request.attention))
            if self.gathered is not None:
                assert positions is not None, "a head of tokens runs at positions"
                outputs.logits = self.gathered(model, positions, **inputs)
            elif self.request.logits:
                outputs.logits = _logits(model(**inputs), positions)
            else:
                run_to_layer(model, self.request.depth, **inputs)
        return outputs


def _logits(output: ModelOutput, positions: torch.Tensor | None) -> torch.Tensor:
    """Return the logits of sequences ``[B, C]``, or those of starts and ends at some positions ``[T, 2]``."""
    if "start_logits" not in output:
        logits: torch.Tensor = output.logits
        return logits
    assert positions is not None, "a span begins and ends at positions"
    spans_BL2 = torch.stack([output.start_logits, output.end_logits], dim=-1)
    return spans_BL2.flatten(0, 1).index_select(0, positions)


def keep_logits_in_fp32(model: PreTrainedModel) -> nn.Linear | None:
    """Let a model's last linear layer compute in fp32, under autocast and with weights of 16 bits too.

    A small divergence between two predictions is lost in the rounding of 16-bit logits, which no later cast restores.

    Returns:
        The layer, whose `forward` is new; None if there is none, or it computed in fp32 before.
    """
    body = set(model.base_model.modules())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in body]
    layer = model.get_output_embeddings() or (linear[-1] if linear else None)
    if not isinstance(layer, nn.Linear) or isinstance(layer.forward, _LinearInFp32):
        return None
    layer.forward = _LinearInFp32(layer)  # type: ignore[assignment,method-assign]
    return layer


class _LinearInFp32:
    """The forward of a linear layer, in fp32; an object, so that a copy of the model gets its own."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layer
        bias = None if layer.bias is None else layer.bias.float()
        with without_autocast(states.device):
            return F.linear(states.float(), layer.weight.float(), bias)
