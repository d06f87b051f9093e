"""Two-stream attention: every token as content and, where it is to be predicted, once more as a query that hides it.

Both streams are rows of one sequence with the same weights: S content rows, then P query rows, one a target. Only content
rows are keys and values. Two integers a token say which row sees which, so no mask leaves the collator.

`PermutedBatch` is what both classes read. `PositionTwoStreams` runs any stock masked language model that takes its positions as
an input, under a rule of `modeling/visibility`; `XLNetTwoStreams` runs a stock XLNet, whose attention knows two streams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel, XLNetLMHeadModel

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.backbone import takes_input, vocabulary_size
from hf_pretrain.modeling.losses import GatheredHead, RecurrentMemory
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.rules import AttentionPlan, MaskFunction


class PermutedBatch(NamedTuple):
    """A batch with an order of prediction.

    Attributes:
        input_ids: ``[B, S]`` tokens, never corrupted.
        attention_mask: ``[B, S]``, zero at padding.
        key_ranks: ``[B, S]``; row i sees the content of j iff ``key_ranks[j] < thresholds[i]``.
        thresholds: ``[B, S]``; the query of a token has the threshold of the token.
        target_columns: ``[B, P]`` columns of the targets.
        token_type_ids: ``[B, S]`` segments; one segment if not given.
        backward: ``[B]`` bool, rows whose text runs from right to left; none if not given.
        positions: ``[B, S]`` position of each token in its row, below S; if not given, tokens are counted without padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    key_ranks: torch.Tensor
    thresholds: torch.Tensor
    target_columns: torch.Tensor
    token_type_ids: torch.Tensor | None = None
    backward: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def rule(self) -> MaskFunction:
        """Return which of the ``S + P`` rows, content and queries, sees which.

        A content row also sees itself, padding too: a row without any key is a special case for the kernels. No row sees a
        query; but a query that sees nothing else sees itself.
        """
        length, num_queries = self.input_ids.shape[1], self.target_columns.shape[1]
        ranks_BS = self.key_ranks.masked_fill(self.attention_mask == 0, _NEVER)
        ranks_BT = F.pad(ranks_BS, (0, num_queries), value=_NEVER)
        thresholds_BT = self.of_rows(self.thresholds)
        sees_itself_BT = thresholds_BT <= ranks_BS.amin(dim=1, keepdim=True)
        sees_itself_BT[:, :length] = True

        def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (query == key) & sees_itself_BT[row, query]
            return (ranks_BT[row, key] < thresholds_BT[row, query]) | own

        return visible

    def visible(self) -> torch.Tensor:
        """Return ``[B, S + P, S]`` bool: which content each row sees."""
        rows_B, keys_S = (torch.arange(size, device=self.input_ids.device) for size in self.input_ids.shape)
        queries_T = torch.arange(len(keys_S) + self.target_columns.shape[1], device=keys_S.device)
        return self.rule()(rows_B[:, None, None], rows_B[:1], queries_T[None, :, None], keys_S[None, None, :])

    def row_positions(self) -> torch.Tensor:
        """Return ``[B, S]`` the position of each token in its row, however the row is padded."""
        return rules.row_positions(self.attention_mask) if self.positions is None else self.positions

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Extend values of the tokens, ``[B, S]``, to those of all rows, ``[B, S + P]``: a query has its token's."""
        return torch.cat([values, values.gather(1, self.target_columns)], dim=1)


# Above every threshold.
_NEVER = 1 << 30


_RULE = "two_streams"
_INSTEAD = "use one of xlnet, bert, roberta, electra, albert, distilbert, modernbert"


class PositionTwoStreams:
    """Runs both streams of a stock model as one longer sequence: the text, then a mask token for each target at its position.

    The model's own code runs unchanged. Positions, absolute or rotary, are given by `position_ids`, and a boolean mask says
    which row sees which; no row sees a mask token. A trial shows whether a model honours both.

    Args:
        model: A stock masked language model with SDPA attention; trained in place.
        mask_token_id: The token that stands for a target in the query stream.

    Raises:
        InputError: If the model cannot do this.
    """

    def __init__(self, model: PreTrainedModel, *, mask_token_id: int | None) -> None:
        self.name = type(model).__name__
        if not takes_input(model, "position_ids"):
            raise InputError(
                f"{self.name} takes no position_ids, which permutation language modelling needs: {_INSTEAD}"
            )
        if getattr(model.config, "_attn_implementation", None) != "sdpa":
            raise InputError(
                f"{self.name} runs with attn_implementation={model.config._attn_implementation!r}, but only 'sdpa' can hide "
                f"everything from a token: set it to 'sdpa', or {_INSTEAD}"
            )
        if mask_token_id is None:
            raise InputError(
                f"{self.name} needs a mask_token_id for its query stream: give the tokenizer a mask_token"
            )
        self.model = model
        self.mask_token_id = mask_token_id
        self.head = GatheredHead(model)
        self.plan = rules.make_plan(model, _RULE)

    def __call__(self, batch: PermutedBatch, slots: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[T, V]`` of some targets.

        Args:
            batch: Tokens and their order.
            slots: ``[T]`` flat indices ``row * P + target`` of the targets to predict.
        """
        positions_BT, num_targets = batch.of_rows(batch.row_positions()), batch.target_columns.shape[1]
        length = positions_BT.shape[1]
        queries_BP = torch.full_like(batch.target_columns, self.mask_token_id)
        inputs = {
            "input_ids": torch.cat([batch.input_ids, queries_BP], dim=1),
            "attention_mask": self._masks(batch, positions_BT),
            **rules.position_inputs(self.plan, positions_BT),
        }
        if takes_input(self.model, "token_type_ids"):
            # Given always: some models would look them up by the length of the input.
            types = batch.token_type_ids
            inputs["token_type_ids"] = batch.of_rows(torch.zeros_like(batch.input_ids) if types is None else types)
        rows = torch.div(slots, num_targets, rounding_mode="floor")
        return self.head(self.model, rows * length + (length - num_targets) + slots % num_targets, **inputs)

    def _masks(self, batch: PermutedBatch, positions: torch.Tensor) -> Any:
        """Return the mask of all rows; windows are measured by positions, as the queries are stored behind the text."""
        return rules.mask_inputs(self.model, self.plan, batch.rule(), like=positions, positions=positions)

    def check(self) -> None:
        """Try the model out on a few tokens.

        Raises:
            InputError: If it fails, if a target's own token changes its prediction, if one that is seen does not, or if the
                prediction depends on where tokens are stored.
        """
        try:
            rules.try_out(self.model, _RULE, self._problem)
        except InputError as error:
            raise InputError(
                f"{self.name} cannot be trained by permutation language modelling: {error}; {_INSTEAD}"
            ) from None

    def _problem(self, body: PreTrainedModel, plan: AttentionPlan) -> str | None:
        positions = torch.arange(8, device=self.model.device)[None]
        # Two ordinary tokens by turns; there are special ones at the ends of many vocabularies.
        middle = vocabulary_size(self.model.get_input_embeddings()) // 2
        ids = middle - positions % 3 % 2
        others = 2 * middle - 1 - ids
        batch = PermutedBatch(ids, torch.ones_like(ids), positions, positions, positions[:, 5:6], positions=positions)
        expected = self._first_logits(batch)

        def change(other: PermutedBatch) -> float:
            return float((self._first_logits(other) - expected).abs().max())

        if change(batch._replace(input_ids=ids.where(positions < 5, others))) > 0:
            return "it lets a token be seen that is hidden from it"
        seen = change(batch._replace(input_ids=ids.where(positions != 4, others)))
        if seen == 0:
            return "it does not let a token be seen that is not hidden"
        order = torch.tensor([6, 2, 5, 0, 7, 3, 1, 4], device=ids.device)
        stored = batch._replace(**{name: getattr(batch, name)[:, order] for name in _STORED})
        if change(stored._replace(target_columns=(order == 5).nonzero())) > 1e-2 * seen:
            return "it reads positions off the order of its input, not off position_ids"
        return None

    def _first_logits(self, batch: PermutedBatch) -> torch.Tensor:
        return self(batch, torch.zeros(1, dtype=torch.long, device=batch.input_ids.device))


_STORED = ("input_ids", "attention_mask", "key_ranks", "thresholds", "positions")


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

    def __init__(self, model: XLNetLMHeadModel, *, backend: str = "sdpa") -> None:
        if model.config.attn_type != "bi":
            raise InputError(
                f"attn_type={model.config.attn_type!r} would mask the content by itself: set it to 'bi', the order of "
                "prediction masks it"
            )
        check_choice(backend, BACKENDS, name="attn_implementation")
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
        """Predict targets.

        Args:
            batch: Tokens and their order.
            slots: ``[T]`` flat indices ``row * P + target`` of the targets to predict.
            memory: Content of the segments before, seen by every row.
            num_kept: How many of the first positions the memory is to keep.
            checkpoint: Calls a function with arguments so that its activations are recomputed in the backward pass.

        Returns:
            ``[T, V]`` logits and, with a memory, ``[N, B, num_kept, D]`` what each layer has read there.
        """
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
        if self.backend == "sdpa":
            # One gather serves content and query rows; shifting the content rows by views is no faster.
            bias = position_BHTW.gather(-1, terms.columns[:, None].expand(-1, content.shape[1], -1, -1))
            bias = bias.addcmul_(segment_BHT1, terms.same[:, None] if terms.same.dim() else terms.same)
            bias = bias.masked_fill_(~terms.visible[:, None], float("-inf"))
            dropout = attention.dropout.p if attention.training else 0.0
            read = F.scaled_dot_product_attention(
                content, key, value, attn_mask=bias, dropout_p=dropout, scale=attention.scale
            )
        else:
            read = _flex(content, key, value, position_BHTW, segment_BHT1, terms, attention.scale)
        return read.masked_fill(terms.empty[:, None, :, None], 0.0).transpose(1, 2).flatten(2)

    def _terms(self, batch: PermutedBatch, memory: RecurrentMemory | None, rows: torch.Tensor) -> AttentionTerms:
        num_slots = 0 if memory is None else memory.size
        length, positions_BS, visible = batch.input_ids.shape[1], batch.row_positions(), batch.visible()
        slots_M = torch.arange(-num_slots, 0, device=positions_BS.device)
        if memory is not None:
            filled = memory.mask()[:, None, :].expand(-1, visible.shape[1], -1)
            visible = torch.cat([filled, visible], dim=2)
        keys_BK = torch.cat([slots_M.expand(len(positions_BS), -1), positions_BS], dim=1)
        empty = ~visible.any(dim=2)
        table = self._sinusoids(num_slots + length, length, batch.backward is not None, rows)
        return AttentionTerms(
            table=F.dropout(table, self.model.transformer.dropout.p, self.model.transformer.training),
            directions=None if batch.backward is None else batch.backward.long(),
            # Column 0 is the longest distance, from the last position to the first slot.
            columns=num_slots + length - 1 + keys_BK[:, None, :] - batch.of_rows(positions_BS)[:, :, None],
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
    if kind == "meta":
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    segment: torch.Tensor,
    terms: AttentionTerms,
    scale: float,
) -> torch.Tensor:
    """Attend with the scores of position ``[B, H, T, W]`` and segment ``[B, H, T, 1]`` read inside of the kernel."""
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
