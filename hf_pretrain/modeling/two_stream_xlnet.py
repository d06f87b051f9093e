"""The two streams of a stock XLNet, on its own parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import XLNetLMHeadModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.memory import RecurrentMemory
from hf_pretrain.modeling.two_stream import PermutedBatch

BACKENDS = ("sdpa", "flex_attention")


class AttentionTerms(NamedTuple):
    """What all layers share: T rows (S content, P queries) against K keys (M slots of memory, S tokens).

    Attributes:
        table: ``[1, W, D]`` sinusoids of all distances, or ``[2, W, D]`` with those of backward rows second.
        directions: ``[B]`` which of the tables a row of the batch uses; None if there is one.
        columns: ``[B, T, K]`` column of the table for each pair.
        same: ``[B, T, K]`` one where both are in the same segment; a scalar one if there is only one segment.
        visible: ``[B, T, K]`` bool; all true in rows that see nothing.
        empty: ``[B, T]`` bool, the rows that see nothing.
    """

    table: torch.Tensor
    directions: torch.Tensor | None
    columns: torch.Tensor
    same: torch.Tensor
    visible: torch.Tensor
    empty: torch.Tensor

    def of_queries(self, length: int) -> AttentionTerms:
        """Return the terms of the query rows alone, those from `length` on."""
        cut = {name: getattr(self, name)[:, length:] for name in ("columns", "visible", "empty")}
        return self._replace(**cut, same=self.same[:, length:] if self.same.dim() else self.same)


class XLNetTwoStreams:
    """Runs both streams of an `XLNetLMHeadModel` in one attention call a layer.

    Equal to the stock model with the same visibility, and its parameters are used in place. Query rows exist at the targets
    only, and the last layer is run for them alone. A row that sees nothing attends to nothing: the stock model would then
    attend to everything. One dropout mask of the distances serves the whole batch, where the stock model draws one a row.

    Args:
        model: The stock model; trained in place.
        backend: "sdpa", or "flex_attention": on GPUs, and without dropout in training.

    Raises:
        InputError: If the model is causal by itself, or the backend is unknown.

    Source: Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding", sections 2.3 to 2.5.
    """

    supports_memory = True

    def __init__(self, model: XLNetLMHeadModel, *, backend: str = "sdpa") -> None:
        if model.config.attn_type != "bi":
            raise InputError(
                f"attn_type={model.config.attn_type!r} would mask the content by itself: set it to 'bi', the order of "
                "prediction masks it"
            )
        if backend not in BACKENDS:
            raise InputError(f"attn_implementation={backend!r} must be one of {', '.join(BACKENDS)} for XLNet")
        self.model = model
        self.backend = backend

    def __call__(
        self,
        batch: PermutedBatch,
        slots: torch.Tensor,
        *,
        memory: RecurrentMemory | None = None,
        num_kept: int = 0,
        checkpoint: Callable[..., torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict targets; see [`TwoStreams`]."""
        self._check_backend(batch.input_ids.device)
        body, length = self.model.transformer, batch.input_ids.shape[1]
        content_BSD = body.word_embedding(batch.input_ids)
        queries_BPD = body.mask_emb.expand(*batch.target_columns.shape, -1)
        rows_BTD = body.dropout(torch.cat([content_BSD, queries_BPD.to(content_BSD.dtype)], dim=1))
        terms, kept = self._terms(batch, memory, rows_BTD), []
        for number, layer in enumerate(body.layer):
            states = None if memory is None else memory.states[number].to(rows_BTD.dtype)
            kept.append(rows_BTD[:, :num_kept].detach())
            is_last = number == len(body.layer) - 1
            inputs = (layer, rows_BTD, states, terms.of_queries(length) if is_last else terms, length, is_last)
            rows_BTD = self._layer(*inputs) if checkpoint is None else checkpoint(self._layer, *inputs)
        chosen_TD = body.dropout(rows_BTD).flatten(0, 1).index_select(0, slots)
        return self.model.lm_loss(chosen_TD), None if memory is None else torch.stack(kept)

    def _layer(
        self,
        layer: Any,
        rows: torch.Tensor,
        memory: torch.Tensor | None,
        terms: AttentionTerms,
        length: int,
        only_queries: bool,
    ) -> torch.Tensor:
        """Run one stock layer on all rows, or on the query rows alone."""
        content = rows[:, :length]
        keys = content if memory is None else torch.cat([memory, content], dim=1)
        if only_queries:
            rows = rows[:, length:]
        attention = layer.rel_attn
        mixed = F.linear(self._attend(attention, rows, keys, terms), attention.o.flatten(1))
        return layer.ff(attention.layer_norm(attention.dropout(mixed) + rows))

    def _attend(self, attention: Any, rows: torch.Tensor, keys: torch.Tensor, terms: AttentionTerms) -> torch.Tensor:
        """Return what each row reads from the keys, ``[B, T, H * E]`` for H heads of width E."""
        query, key, value = (
            _heads(states, weight)
            for states, weight in ((rows, attention.q), (keys, attention.k), (keys, attention.v))
        )
        content, position, segment = (
            query + bias.to(query.dtype)[:, None]
            for bias in (attention.r_w_bias, attention.r_r_bias, attention.r_s_bias)
        )
        # What is added for another segment is the same for all keys of a row but those of its own.
        contrast = (attention.seg_embed[0] - attention.seg_embed[1]).to(query.dtype)
        segment_BHT1 = torch.matmul(segment, contrast[..., None]) * attention.scale
        distance = _heads(terms.table, attention.r)
        if terms.directions is not None:
            distance = distance.index_select(0, terms.directions)
        position_BHTW = torch.matmul(position * attention.scale, distance.transpose(-1, -2))
        attend = _sdpa if self.backend == "sdpa" else _flex
        dropout = attention.dropout.p if attention.training else 0.0
        read = attend(content, key, value, position_BHTW, segment_BHT1, terms, scale=attention.scale, dropout=dropout)
        return read.masked_fill(terms.empty[:, None, :, None], 0.0).transpose(1, 2).flatten(2)

    def _terms(self, batch: PermutedBatch, memory: RecurrentMemory | None, rows: torch.Tensor) -> AttentionTerms:
        num_slots = 0 if memory is None else memory.size
        length, places_BS, visible = batch.input_ids.shape[1], batch.places(), batch.visible()
        slots_M = torch.arange(-num_slots, 0, device=places_BS.device)
        if memory is not None:
            filled = memory.mask()[:, None, :].expand(-1, visible.shape[1], -1)
            visible = torch.cat([filled, visible], dim=2)
        keys_BK = torch.cat([slots_M.expand(len(places_BS), -1), places_BS], dim=1)
        empty = ~visible.any(dim=2)
        table = self._sinusoids(num_slots + length, length, batch.backward is not None, rows)
        return AttentionTerms(
            table=F.dropout(table, self.model.transformer.dropout.p, self.model.transformer.training),
            directions=None if batch.backward is None else batch.backward.long(),
            # Column 0 is the longest distance, from the last position to the first slot.
            columns=num_slots + length - 1 + keys_BK[:, None, :] - batch.of_rows(places_BS)[:, :, None],
            same=self._same_segment(batch, num_slots, rows),
            visible=visible | empty[:, :, None],
            empty=empty,
        )

    @staticmethod
    def _same_segment(batch: PermutedBatch, num_slots: int, rows: torch.Tensor) -> torch.Tensor:
        if batch.token_type_ids is None:
            return torch.ones((), dtype=_compute_dtype(rows), device=rows.device)
        # The memory counts as segment 0, as in the official code.
        keys_BK = F.pad(batch.token_type_ids, (num_slots, 0))
        same_BTK = batch.of_rows(batch.token_type_ids)[:, :, None] == keys_BK[:, None, :]
        return same_BTK.to(_compute_dtype(rows))

    def _sinusoids(self, num_keys: int, length: int, both_ways: bool, rows: torch.Tensor) -> torch.Tensor:
        """Return ``[1 or 2, W, D]`` sinusoids of the distances from ``num_keys - 1`` down to ``1 - length``."""
        config = self.model.config
        distances = torch.arange(num_keys - 1, -length, -1, dtype=torch.float32, device=rows.device)
        if config.clamp_len > 0:
            distances = distances.clamp(-config.clamp_len, config.clamp_len)
        steps = torch.arange(0, config.d_model, 2, dtype=torch.float32, device=rows.device)
        angles = distances[:, None] * 10000.0 ** (-steps / config.d_model)
        signs = (1, -1) if both_ways else (1,)
        table = torch.stack([torch.cat([sign * angles.sin(), angles.cos()], dim=1) for sign in signs])
        return table.to(rows.dtype)

    def _check_backend(self, device: torch.device) -> None:
        if self.backend == "sdpa" or not torch.is_grad_enabled():
            return
        if device.type == "cpu":
            raise InputError("attn_implementation='flex_attention' has no backward pass on CPUs: train with 'sdpa'")
        if self.model.training and self.model.config.dropout > 0:
            raise InputError(
                f"attn_implementation='flex_attention' has no dropout of probabilities, but dropout={self.model.config.dropout}: "
                "train with 'sdpa', or with config_overrides '{\"dropout\": 0.0}'"
            )


def _heads(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Project ``[B, L, D]`` by a stock weight ``[D, H, E]`` to ``[B, H, L, E]``."""
    return F.linear(states, weight.flatten(1).T).unflatten(-1, weight.shape[1:]).transpose(1, 2)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the type that a projection of a tensor will have."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    segment: torch.Tensor,
    terms: AttentionTerms,
    *,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Attend with the scores of position ``[B, H, T, W]`` and segment ``[B, H, T, 1]`` as an additive mask."""
    num_heads = query.shape[1]
    # One gather serves content and query rows; shifting the content rows by views is no faster.
    bias = position.gather(-1, terms.columns[:, None].expand(-1, num_heads, -1, -1))
    bias = bias.addcmul_(segment, terms.same[:, None] if terms.same.dim() else terms.same)
    bias = bias.masked_fill_(~terms.visible[:, None], float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    segment: torch.Tensor,
    terms: AttentionTerms,
    *,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Attend with those scores read inside the kernel; see [`_sdpa`]."""
    from torch.nn.attention.flex_attention import create_block_mask

    columns, same, visible = terms.columns, terms.same.expand(terms.columns.shape), terms.visible
    position, segment = position.contiguous(), segment.squeeze(-1)

    def score(
        scores: torch.Tensor, b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return scores + position[b, h, t, columns[b, t, k]] + segment[b, h, t] * same[b, t, k]

    def mask(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return visible[b, t, k]

    blocks = create_block_mask(mask, len(query), None, query.shape[2], key.shape[2], device=str(query.device))
    return _flex_kernel(query.device.type)(query, key, value, score_mod=score, block_mask=blocks, scale=scale)


@cache
def _flex_kernel(kind: str) -> Any:
    """Return FlexAttention for a kind of device: compiled into one kernel, but on CPUs as it is."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if kind == "cpu" else torch.compile(flex_attention)
