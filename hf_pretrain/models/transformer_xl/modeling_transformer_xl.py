"""Transformer-XL: the model, the language model and the sequence classifier.

Two ways lead from one segment of a text to the next:

- The memory (`mems`), for training and for evaluation in a stream: what went into each layer at the last `mem_len` positions,
  without gradient. Its shape is fixed, `[layers, batch, length, hidden]`; it is filled from its end, and `mem_lengths` says how
  many positions are. What is not filled is not attended, so the first segment of a text sees the text alone.
- The `cache`, for `generate`: the keys and values that the segment itself would hold, so that reading a text
  piece by piece is reading it whole. It grows with the text unless `same_length` bounds what a position sees.

In the shapes of the memory: B examples, M positions of the memory, S of the segment, K keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_transformer_xl import TransformerXLConfig
from .layers_transformer_xl import (
    IGNORED,
    AdaptiveEmbedding,
    AdaptiveLogSoftmax,
    TransformerXLLayer,
    distance_table,
    find_target_rows,
    tied_weights,
    visible_keys,
)


@dataclass
class TransformerXLModelOutput(ModelOutput):
    """Output of [`TransformerXLModel`].

    Attributes:
        last_hidden_state: ``[B, S, hidden]``.
        cache: The cache, if one was used.
        hidden_states: ``[B, S, hidden]`` of the embeddings and of each layer, if requested.
        mems: ``[layers, B, M, hidden]``, the new memory, if one was given.
        mem_lengths: ``[B]``, how many of its last positions are filled.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    mems: torch.Tensor | None = None
    mem_lengths: torch.Tensor | None = None


@dataclass
class TransformerXLCausalLMOutput(ModelOutput):
    """Output of [`TransformerXLForCausalLM`]: loss and scores ``[B, S, vocabulary]``, the rest as the model's."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    mems: torch.Tensor | None = None
    mem_lengths: torch.Tensor | None = None


class TransformerXLPreTrainedModel(PreTrainedModel):
    """What the Transformer-XL models share: initialization, and a vocabulary that can be resized."""

    config_class = TransformerXLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerXLLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    # The scores by distance are a bias of the attention, which the flash kernels do not take.
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.LayerNorm):
            init.normal_(module.weight, mean=1.0, std=std)
            init.zeros_(module.bias)
        elif hasattr(module, "content_bias"):
            init.normal_(module.content_bias, std=std)
            init.normal_(module.position_bias, std=std)
        elif isinstance(module, nn.ParameterList):
            for projection in module:
                init.normal_(projection, std=self.config.projection_initializer_range)
        elif hasattr(module, "cluster_weight"):
            init.normal_(module.cluster_weight, std=std)
            init.zeros_(module.cluster_bias)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of embeddings, or the module that maps ids to embeddings where they come from several tables."""
        embeddings = self.base_model.embeddings
        is_one_table = len(embeddings.tables) == 1 and not len(embeddings.projections)
        return embeddings.tables[0] if is_one_table else embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace what `get_input_embeddings` returns."""
        if self.get_input_embeddings() is self.base_model.embeddings:
            self.base_model.embeddings = value
        else:
            self.base_model.embeddings.tables[0] = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Add tokens to the last cluster, or remove its last ones.

        Args:
            new_num_tokens: Tokens of the new vocabulary; as many as now when not given.
            pad_to_multiple_of: Round up to a multiple of this.
            mean_resizing: Whether new vectors are drawn around the mean of the old ones.

        Returns:
            What `get_input_embeddings` returns.

        Raises:
            ValueError: If nothing would be left of the last cluster.
        """
        old_size, bounds = self.config.vocab_size, self.config.cluster_bounds
        new_size = old_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            new_size = math.ceil(new_size / pad_to_multiple_of) * pad_to_multiple_of
        if new_size <= bounds[-1][0]:
            raise ValueError(
                f"new_num_tokens={new_size} leaves no token to the last cluster: keep more than {bounds[-1][0]}"
            )
        if new_size != old_size:
            tables = self.base_model.embeddings.tables
            rows = tables[-1].num_embeddings + new_size - old_size
            tables[-1] = self._get_resized_embeddings(tables[-1], rows, mean_resizing=mean_resizing)
            if hasattr(self, "lm_head"):
                tables = self.lm_head.tables
                tables[-1] = self._get_resized_lm_head(tables[-1], rows, mean_resizing=mean_resizing)
            self.config.vocab_size = new_size
            self.tie_weights()
        return self.get_input_embeddings()


def check_past(cache: Cache | None, mems: torch.Tensor | None, *, num_layers: int) -> None:
    """Raise ValueError where the past is given twice, or in a form that does not fit."""
    if cache is not None and mems is not None:
        raise ValueError("cache, mems: give one of the two, the cache in generation and mems in a stream")
    if cache is not None and cache.is_compileable:
        raise ValueError("cache: a static cache does not fit; use the default cache_implementation")
    if mems is not None and (mems.dim() != 4 or len(mems) != num_layers):
        raise ValueError(f"mems has shape {tuple(mems.shape)}: give [{num_layers}, batch, length, hidden]")


def filled_lengths(mems: torch.Tensor, mem_lengths: torch.Tensor | None) -> torch.Tensor:
    """Return how many positions of each example's memory are filled, ``[B]``."""
    return torch.full((mems.shape[1],), mems.shape[2], device=mems.device) if mem_lengths is None else mem_lengths


def key_mask(
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    mems: torch.Tensor | None,
    mem_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor | None, int]:
    """Return which keys there are to see, ``bool [B, K]`` or None for all, and K."""
    batch, num_queries, _ = hidden.shape
    if mems is not None:
        # Padding of the segment has been moved to its end, where no token sees it.
        length = mems.shape[2]
        slots = torch.arange(length, device=hidden.device)
        filled = slots >= length - filled_lengths(mems, mem_lengths)[:, None]
        return torch.cat([filled, filled.new_ones(batch, num_queries)], dim=1), length + num_queries
    seen, num_keys = 0, num_queries
    if cache is not None:
        seen, num_keys = cache.get_seq_length(), cache.get_mask_sizes(num_queries, 0)[0]
    if attention_mask is None:
        return None, num_keys
    if attention_mask.shape != (batch, seen + num_queries):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give {(batch, seen + num_queries)}, all that was "
            "read before included"
        )
    return attention_mask[:, -num_keys:].bool(), num_keys


def append_segment(
    mems: torch.Tensor, lengths: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the memory after a segment, ``[layers, B, M, hidden]``, and how much of it is filled, ``[B]``.

    Args:
        mems: The memory before it.
        lengths: How much of that is filled.
        states: ``[layers, B, S, hidden]``, padding last.
        attention_mask: ``[B, S]``, or None where nothing is padding.
    """
    length, segment = mems.shape[2], states.shape[2]
    joined = torch.cat([mems, states.to(mems.dtype)], dim=2).detach()
    if attention_mask is None:
        return joined[:, :, segment:], (lengths + segment).clamp(max=length)
    read = (attention_mask != 0).sum(1)
    kept = read[:, None] + torch.arange(length, device=mems.device)
    return joined.take_along_dim(kept[None, :, :, None], dim=2), (lengths + read).clamp(max=length)


class TransformerXLModel(TransformerXLPreTrainedModel):
    """Transformer-XL without a head.

    Source:
        Dai et al. (2019), section 3. Unlike the models of older transformers releases, the memory starts empty: those attended to
        vectors of zeros.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__(config)
        self.embeddings = AdaptiveEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([TransformerXLLayer(config, index) for index in range(config.num_hidden_layers)])
        assert config.head_dim is not None
        # u and v of the paper, for each layer or for all of them.
        shape = (config.num_hidden_layers if config.untie_r else 1, config.num_attention_heads, config.head_dim)
        self.content_bias = nn.Parameter(torch.empty(shape))
        self.position_bias = nn.Parameter(torch.empty(shape))
        self.gradient_checkpointing = False
        self.post_init()

    def empty_mems(self, batch_size: int, *, mem_len: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory with which a text begins.

        Args:
            batch_size: B.
            mem_len: Number of positions; by default the configuration's.

        Returns:
            `mems` ``[layers, B, mem_len, hidden]`` and `mem_lengths` ``[B]``, all zeros.
        """
        length = self.config.mem_len if mem_len is None else mem_len
        shape = (self.config.num_hidden_layers, batch_size, length, self.config.hidden_size)
        mems = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return mems, torch.zeros(batch_size, dtype=torch.int64, device=self.device)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mems: torch.Tensor | None = None,
        mem_lengths: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> TransformerXLModelOutput:
        """Read a segment.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, or ``[B, past + S]`` with a cache; 0 at padding. Padding before or after the tokens is as
                if it were not there; what is read further with a cache needs it before them.
            cache: Cache of what came before.
            inputs_embeds: ``[B, S, hidden]``, unscaled embeddings instead of `input_ids`.
            mems: ``[layers, B, M, hidden]``, memory of what came before; M need not be the configuration's.
            mem_lengths: ``[B]``, how many of the last positions of `mems` are filled; all when not given.
            use_cache: Whether to begin a cache.
            output_hidden_states: Whether to return the states of every layer.

        Raises:
            ValueError: If the inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give one of the two")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        check_past(cache, mems, num_layers=len(self.layers))
        embedded = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = embedded * self.config.hidden_size**0.5
        order = None
        if attention_mask is not None and mems is not None:
            # Padding goes to the end: it must not part the segment from the memory.
            order = (attention_mask == 0).long().argsort(dim=1, stable=True)
            hidden = hidden.take_along_dim(order[..., None], dim=1)
        seen, num_keys = key_mask(hidden, attention_mask, cache, mems, mem_lengths)
        states = self._run_layers(hidden, seen, num_keys, mems, cache)
        if mems is not None:
            filled = filled_lengths(mems, mem_lengths)
            mems, mem_lengths = append_segment(mems, filled, torch.stack(states[:-1]), attention_mask)
        if order is not None:
            back = order.argsort(dim=1)[..., None]
            states = [state.take_along_dim(back, dim=1) for state in states[0 if output_hidden_states else -1 :]]
        return TransformerXLModelOutput(
            last_hidden_state=self.dropout(states[-1]),
            cache=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
            mems=mems,
            mem_lengths=None if mems is None else mem_lengths,
        )

    def _run_layers(
        self,
        hidden: torch.Tensor,
        seen: torch.Tensor | None,
        num_keys: int,
        mems: torch.Tensor | None,
        cache: Cache | None,
    ) -> list[torch.Tensor]:
        """Return the input of each layer and the output of the last one."""
        visible = visible_keys(
            hidden.shape[1], num_keys, window=self.config.sliding_window, key_mask=seen, device=hidden.device
        )
        table = self.dropout(distance_table(num_keys, self.config, hidden))
        states = [self.dropout(hidden)]
        for index, layer in enumerate(self.layers):
            biases = index if self.config.untie_r else 0
            memory = None if mems is None else mems[index].detach()
            terms = (table, visible, self.content_bias[biases], self.position_bias[biases], cache)
            states.append(layer(states[-1], memory, *terms))
        return states


class TransformerXLForCausalLM(TransformerXLPreTrainedModel, GenerationMixin):
    """Transformer-XL with an adaptive softmax, or a plain one without cutoffs.

    The labels of `forward` are the inputs themselves, shifted inside as in all causal models of transformers, so the first token
    of a segment is not predicted. For streams there is `token_nll`: its targets are shifted already, over the border between two
    segments too, and no token is lost.
    """

    _auto_class = "AutoModelForCausalLM"
    # `forward` divides by num_items_in_batch.
    accepts_loss_kwargs = True

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__(config)
        self.model = TransformerXLModel(config)
        self.lm_head = AdaptiveLogSoftmax(config)
        tied = tied_weights(config)
        self._tied_weights_keys = {f"lm_head.{name}": f"model.embeddings.{source}" for name, source in tied.items()}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer where it is a single one."""
        head = self.lm_head
        return None if len(head.tables) > 1 or len(head.projections) or head.num_tails else head.tables[0]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer where it is a single one."""
        assert self.get_output_embeddings() is not None
        self.lm_head.tables[0] = value

    def token_losses(
        self, hidden: torch.Tensor, targets: torch.Tensor, target_rows: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return minus the log-probability of each target.

        Args:
            hidden: ``[B, S, hidden]``, the model's last states.
            targets: ``[B, S]``, the token that follows each position; -100 for none.
            target_rows: What `find_target_rows` returns; called here, which waits for the device, if not given.

        Returns:
            ``float32 [B, S]`` in nats; 0 where there is no target.
        """
        rows, *tails = find_target_rows(targets, self.config) if target_rows is None else target_rows
        targets_T = targets.flatten().index_select(0, rows)
        losses = self.lm_head.nll(hidden.flatten(0, 1).index_select(0, rows), targets_T, tails)
        return losses.new_zeros(targets.numel()).index_copy(0, rows, losses).view(targets.shape)

    def token_nll(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        *,
        mems: torch.Tensor | None = None,
        mem_lengths: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_rows: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read a segment of a stream and score the tokens that follow.

        Args:
            input_ids: ``[B, S]``.
            targets: ``[B, S]``, the token that follows each position, the last one's in the next segment; -100 for none.
            mems: ``[layers, B, M, hidden]``; empty when not given.
            mem_lengths: ``[B]``, how many of the last positions of `mems` are filled; all when not given.
            attention_mask: ``[B, S]``, 0 at padding.
            target_rows: See `token_losses`.

        Returns:
            Minus the log-probability of each target, ``float32 [B, S]`` in nats, 0 where there is none; the new `mems` and
            `mem_lengths`.
        """
        if mems is None:
            mems, mem_lengths = self.model.empty_mems(len(input_ids))
        outputs = self.model(input_ids, attention_mask, mems=mems, mem_lengths=mem_lengths, return_dict=True)
        losses = self.token_losses(outputs.last_hidden_state, targets, target_rows)
        return losses, outputs.mems, outputs.mem_lengths

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mems: torch.Tensor | None = None,
        mem_lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> TransformerXLCausalLMOutput:
        """Score the tokens that follow.

        Args:
            input_ids: See [`TransformerXLModel`], as for the others not named here.
            attention_mask: See there.
            cache: See there.
            inputs_embeds: See there.
            mems: See there.
            mem_lengths: See there.
            labels: ``[B, S]``, the inputs, -100 where a token is not to be predicted; shifted inside. In training there are no
                logits beside the loss: a tail of the softmax is computed for its own tokens alone.
            use_cache: See there.
            output_hidden_states: See there.
            logits_to_keep: Number of last positions to score, 0 for all, or the indices of the positions.
            num_items_in_batch: What the loss is divided by; the number of labels in this batch when not given.
        """
        past = {"cache": cache, "mems": mems, "mem_lengths": mem_lengths, "use_cache": use_cache, "return_dict": True}
        outputs = self.model(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, output_hidden_states=output_hidden_states, **past
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            losses = self.token_losses(hidden[:, :-1], labels[:, 1:])
            count = (labels[:, 1:] != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / count
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return TransformerXLCausalLMOutput(loss=loss, logits=logits, **rest)


class TransformerXLForSequenceClassification(TransformerXLPreTrainedModel):
    """Transformer-XL with a linear layer on the state of the last token."""

    _auto_class = "AutoModelForSequenceClassification"
    accepts_loss_kwargs = False

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransformerXLModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutputWithPast:
        """Classify sequences.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 at padding; when not given, what equals `pad_token_id` is padding.
            inputs_embeds: ``[B, S, hidden]``, unscaled embeddings instead of `input_ids`.
            labels: ``[B]`` classes, or values ``[B, labels]``, as `problem_type` says.
            output_hidden_states: Whether to return the states of every layer.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        options = {"output_hidden_states": output_hidden_states, "return_dict": True}
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **options)
        hidden = outputs.last_hidden_state
        last = torch.full((hidden.shape[0],), hidden.shape[1] - 1, device=hidden.device)
        if attention_mask is not None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            last = torch.where(attention_mask != 0, positions, 0).argmax(1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLModel",
    "TransformerXLPreTrainedModel",
]
