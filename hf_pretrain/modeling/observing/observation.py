"""What is read off a stock model in one forward pass: predictions, hidden states, attention; each only where it is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_pretrain.modeling.backbone import num_token_types
from hf_pretrain.modeling.losses import GatheredHead
from hf_pretrain.modeling.observing.capture import (
    AttentionRecord,
    capture_attention,
    capture_hidden_states,
    run_to_layer,
)
from hf_pretrain.modeling.visibility.isolation import isolated_inputs


class TopKTargets(NamedTuple):
    """What a teacher predicted at the targets of a batch, in the order of its `target_positions`, fillers left out.

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
    # From what is left, not 1 less the sum, which would be lost to rounding where the teacher is sure.
    tail_T = log_probs_TV.scatter(1, ids_TK, float("-inf")).logsumexp(dim=-1)
    return TopKTargets(ids_TK, log_probs_TK, tail_T)


@dataclass(frozen=True)
class Wanted:
    """What is read off a model.

    Attributes:
        predictions: Whether the head runs.
        hidden: Layers whose hidden states are wanted; 0 is the embeddings.
        attention: Layers whose attention is wanted, from 1.
    """

    predictions: bool = False
    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """The last layer that has to run where the head does not."""
        return max((*self.hidden, *self.attention), default=0)


@dataclass
class Observation:
    """What was read off a model.

    Attributes:
        logits: ``[T, V]`` at the positions asked for, of spans ``[T, 2]`` of starts and ends; or ``[B, C]`` of sequences; None if
            not wanted.
        top_k: In place of logits, the likeliest tokens at these positions, as they were found before.
        hidden: ``[B, L, D]`` by layer.
        attention: Records by layer.
    """

    logits: torch.Tensor | None = None
    top_k: TopKTargets | None = None
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionRecord] = field(default_factory=dict)

    def to(self, device: torch.device) -> Observation:
        """Return what was read off a model on another device."""
        return Observation(
            logits=None if self.logits is None else self.logits.to(device),
            hidden={layer: states.to(device) for layer, states in self.hidden.items()},
            attention={layer: record.to(device) for layer, record in self.attention.items()},
        )


class Observer:
    """Runs a stock model and reads off what is wanted, no deeper than that lies.

    Args:
        model: A stock encoder, with or without a head. Its logits are computed in fp32 from now on.
        wanted: What to read.
        gathers: Whether its head runs on chosen positions.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted, *, gathers: bool) -> None:
        self.wanted = wanted
        self.takes_types = num_token_types(model.config) > 1
        self.gathered: GatheredHead | None = None
        if wanted.predictions:
            keep_logits_in_fp32(model)
            self.gathered = GatheredHead(model) if gathers else None

    def __call__(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], positions: torch.Tensor | None = None
    ) -> Observation:
        """Run a forward pass.

        Args:
            model: The model of the constructor.
            inputs: What it takes; token types are left out for a model that has none.
            positions: ``[T]`` flat positions of a batch where the head is to run, or where a span may begin and end.
        """
        if not self.takes_types:
            inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        # Before anything is recorded: the first time, a model is tried out for documents in one row.
        inputs = isolated_inputs(model, **inputs)
        seen = Observation()
        with ExitStack() as stack:
            if self.wanted.hidden:
                seen.hidden = stack.enter_context(capture_hidden_states(model, self.wanted.hidden))
            if self.wanted.attention:
                seen.attention = stack.enter_context(capture_attention(model, self.wanted.attention))
            if self.gathered is not None:
                assert positions is not None, "a head of tokens runs at positions"
                seen.logits = self.gathered(model, positions, **inputs)
            elif self.wanted.predictions:
                seen.logits = _logits(model(**inputs), positions)
            else:
                run_to_layer(model, self.wanted.depth, **inputs)
        return seen


def _logits(output: ModelOutput, positions: torch.Tensor | None) -> torch.Tensor:
    """Return the logits of sequences ``[B, C]``, or those of starts and ends at some positions ``[T, 2]``."""
    if "start_logits" not in output:
        logits: torch.Tensor = output.logits
        return logits
    assert positions is not None, "a span begins and ends at positions"
    spans_BL2 = torch.stack([output.start_logits, output.end_logits], dim=-1)
    return spans_BL2.flatten(0, 1).index_select(0, positions)


def keep_logits_in_fp32(model: PreTrainedModel) -> None:
    """Let a model's last linear layer compute in fp32, under autocast and with weights of 16 bits too.

    A small divergence between two predictions is lost in the rounding of 16-bit logits, which no later cast restores.
    """
    body = set(model.base_model.modules())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in body]
    layer = model.get_output_embeddings() or (linear[-1] if linear else None)
    if isinstance(layer, nn.Linear):
        layer.forward = _LinearInFp32(layer)  # type: ignore[assignment,method-assign]


class _LinearInFp32:
    """The forward of a linear layer, in fp32; an object, so that a copy of the model gets its own."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layer
        bias = None if layer.bias is None else layer.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), layer.weight.float(), bias)
