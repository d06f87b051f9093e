"""Attention in one direction for stock encoders, and the proof that no position sees its own token.

A cloze model of two towers: the distribution of every token given all the others, in one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig, from_config
from hf_pretrain.modeling.embeddings import shared_embedding_names
from hf_pretrain.modeling.losses import sample_tokens
from hf_pretrain.modeling.visibility.isolation import row_position_inputs

# Without a backend of transformers' own: they read a mask as truth values, and want one of two dimensions for the embeddings.
MASKS_OF_TRUTH_VALUES = frozenset({"deberta", "deberta-v2"})

# A token that is seen changes states of size one by more.
_NOISE = 1e-5
# Alone a document has another shape, perhaps in bfloat16: sums are rounded differently, but wrong positions move every state.
_ALONE_TOLERANCE = 0.05

Mask = torch.Tensor | dict[str, torch.Tensor]


def directed_mask(documents: torch.Tensor, *, config: PreTrainedConfig, to_the_right: bool) -> Mask:
    """Return the mask by which a stock encoder reads in one direction.

    Every position sees itself and what lies before it in its document; layers with a window see as far as it reaches.

    Args:
        documents: ``[B, L]`` number of the document that each token belongs to; padding is one of its own, so that it is seen
            by no token, and has itself to see: a softmax over nothing is not a number.
        config: Configuration of the encoder: its backend decides how a mask is written.
        to_the_right: Whether it reads from left to right.

    Returns:
        ``[B, 1, L, L]``, or one a kind of layer where the encoder has several.
    """
    steps = torch.arange(documents.shape[1], device=documents.device)
    behind_LL = (steps[:, None] - steps) * (1 if to_the_right else -1)
    visible = ((behind_LL >= 0) & (documents[:, :, None] == documents[:, None, :]))[:, None]
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return _written(visible, config)
    near = visible & (behind_LL <= config.sliding_window)
    return {"full_attention": _written(visible, config), "sliding_attention": _written(near, config)}


def _written(visible: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    if config._attn_implementation == "sdpa" or config.model_type in MASKS_OF_TRUTH_VALUES:
        return visible
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return torch.zeros((), dtype=dtype, device=visible.device).where(visible, torch.finfo(dtype).min)


def given_positions(
    model: PreTrainedModel, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the `position_ids` that a stock model has to be given, if any.

    Left alone, RoBERTa and its kin count the ids that are not padding, so that a token could move all that follow.

    Args:
        model: A stock model.
        attention_mask: ``[B, L]``.
        position_ids: ``[B, L]`` places from 0, where they are not those in the row.
    """
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if hasattr(table, "padding_idx")), None)
    if position_ids is not None:
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        return {"position_ids": position_ids + (0 if padding is None else padding + 1)} if takes_positions else {}
    if padding is None:
        return row_position_inputs(model, attention_mask)
    return {"position_ids": attention_mask.cumsum(dim=1) * attention_mask + padding}


@torch.no_grad()
def check_blindness(states: Callable[..., torch.Tensor], model: PreTrainedModel) -> None:
    """Refuse a model that shows a position its own token, by exchanging each token of a few short texts.

    Args:
        states: From `input_ids` and `attention_mask` to ``[B, L, D]`` states that should not know their own token; without
            dropout.
        model: The stock model behind it.

    Raises:
        InputError: Naming the model and its backend.
    """
    backend = model.config._attn_implementation
    if backend not in ("sdpa", "eager"):
        raise InputError(
            f"attn_implementation={backend!r}: the generator reads in one direction at a time, by masks that only "
            "'sdpa' and 'eager' take: choose one of them"
        )
    steps = torch.arange(7, device=model.device)
    # Whole, padded on the right, padded on the left; a row for each token to exchange.
    mask = torch.stack([steps >= 0, steps < 5, steps > 1]).long().repeat_interleave(len(steps), dim=0)
    vocab_size = len(model.get_input_embeddings().weight)
    ids = (vocab_size - 1 - steps).remainder(vocab_size).expand(mask.shape)
    rows, own = torch.arange(len(mask), device=model.device), steps.repeat(3)
    others = ids.index_put((rows, own), (ids[rows, own] + vocab_size // 2) % vocab_size)
    try:
        before, after = (states(input_ids=tokens, attention_mask=mask) for tokens in (ids, others))
        changes = (before - after).abs().amax(dim=-1)
    except Exception as error:  # an encoder may trip anywhere over a mask that it does not know
        problem = f"it fails on a mask of two directions ({type(error).__name__})"
    else:
        whole = changes[: len(steps)]
        if not changes[rows, own].max() <= _NOISE:
            problem = "it mixes positions in other ways than by masked attention, so that each would see its own token"
        elif torch.cat([whole.diagonal(2), whole.diagonal(-2)]).min() == 0:
            # The next but one is seen through the neighbour's attention.
            problem = "its attention does not reach the neighbouring tokens"
        else:
            return
    raise InputError(
        f"model_type={model.config.model_type!r} cannot be Electric's generator: {problem}; choose bert, roberta, electra, "
        "albert, deberta-v2, modernbert or another encoder of masked attention alone"
    )


@torch.no_grad()
def check_separation(states: Callable[..., torch.Tensor], model: PreTrainedModel, *, length: int) -> None:
    """Refuse a model that lets the documents of a row know of each other, by comparing two in a row with each alone.

    Args:
        states: From `input_ids`, `attention_mask`, `document_ids` and `position_ids`, the last two left out for one document,
            to ``[B, L, D]`` states; without dropout.
        model: The stock model behind it.
        length: Tokens of the row to try; some architectures attend in another way to long rows.

    Raises:
        InputError: Naming the model and what went wrong.
    """
    steps = torch.arange(max(length, 8), device=model.device)
    border, vocab_size = len(steps) // 3, len(model.get_input_embeddings().weight)
    documents = (steps >= border).long()
    ids = (vocab_size - 1 - steps).remainder(vocab_size)
    # The row as it is, with an edited first document, and with an edited second one.
    rows = torch.stack([ids.where(documents != edited, ids.flip(0)) for edited in (-1, 0, 1)])
    mask = torch.ones_like(rows)
    inputs = {"document_ids": documents, "position_ids": steps - border * documents}
    try:
        before, *after = states(rows, mask, **{name: value.expand(rows.shape) for name, value in inputs.items()})
        parts = (slice(0, border), slice(border, None))
        alone = torch.cat([states(ids[None, part], mask[:1, part])[0] for part in parts])
    except Exception as error:  # whatever an architecture does with a mask that it was not made for
        problem = f"it fails on a row of {len(steps)} tokens with a mask of documents ({type(error).__name__})"
    else:
        changes = [(row[part] - before[part]).abs().max() for row, part in zip(after, parts[::-1], strict=True)]
        if not max(changes) <= _NOISE:
            problem = "the states of a document change when another one in its row is edited"
        elif not (before - alone).norm() <= _ALONE_TOLERANCE * alone.norm():
            problem = "the states of a document in a row with others are not those that it has alone"
        else:
            return
    raise InputError(
        f"model_type={model.config.model_type!r} as Electric's generator cannot isolate documents: {problem}; use "
        "block_mode='doc_sentences', which gives each document rows of its own"
    )


# 128 MiB in fp32; the softmax over them takes a few times as much.
_LOGITS_AT_ONCE = 2**25


@strict
class TwoTowerClozeConfig(CompositeConfig):
    """Configuration of [`TwoTowerClozeModel`].

    Attributes:
        tower: Configuration of the stock encoder that each tower is.
        excluded_token_ids: Tokens that have no probability: special ones, and ids that the tokenizer does not have.
        tie_word_embeddings: Lets transformers tie at all; without it the towers do not share their embeddings.
    """

    model_type = "hf_pretrain_two_tower_cloze"
    sub_configs = {"tower": AutoConfig}  # noqa: RUF012

    tower: SubModelConfig = None
    excluded_token_ids: list[int] | None = None
    tie_word_embeddings: bool = True


AutoConfig.register(TwoTowerClozeConfig.model_type, TwoTowerClozeConfig, exist_ok=True)


class TwoTowerClozeModel(PreTrainedModel):
    """The noise distribution q(x_t | all other tokens) of Electric.

    One tower reads from left to right, the other from right to left. A position is predicted from the state of the first at
    its left neighbour and of the second at its right neighbour, so its own token is never seen; before the first token and
    behind the last one stands a zero state. The towers share tables and layer norm of their embeddings, and the word table is
    the output layer too.

    Args:
        config: Configuration with the towers' inside.

    Raises:
        InputError: If the stock model would show a position its own token, or its attention takes no mask of two directions.

    Source: Clark et al. 2020, "Pre-Training Transformers as Energy-Based Cloze Models", section 2.
    """

    config_class = TwoTowerClozeConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The towers check their own backends.
    _supports_sdpa = True
    _supports_attention_backend = True

    excluded_tokens: torch.Tensor

    def __init__(self, config: TwoTowerClozeConfig) -> None:
        super().__init__(config)
        self.left_tower, self.right_tower = _build_body(config.tower), _build_body(config.tower)
        shared = shared_embedding_names(self.right_tower, self.left_tower)
        self._tied_weights_keys = {f"right_tower.{ours}": f"left_tower.{theirs}" for ours, theirs in shared.items()}
        vocab_size, width = self.get_input_embeddings().weight.shape
        self.dense = nn.Linear(2 * config.tower.hidden_size, width)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        excluded = torch.zeros(vocab_size, dtype=torch.bool)
        excluded[config.excluded_token_ids or []] = True
        # Saved with the weights: a buffer that is not would be lost when a checkpoint is opened on the meta device.
        self.register_buffer("excluded_tokens", excluded)
        self.post_init()
        # A checkpoint is opened without values; what it holds was checked when it was built.
        if self.bias.device.type != "meta":
            self.eval()
            check_blindness(self.context_states, self.left_tower)
            self.train()

    def check_isolation(self, *, length: int) -> None:
        """Refuse towers that cannot keep the documents of a row of this many tokens apart, by trying it out.

        Raises:
            InputError: Naming the architecture and what went wrong.
        """
        if self.bias.device.type == "meta":
            return
        was_training = self.training
        self.eval()
        try:
            check_separation(self.context_states, self.left_tower, length=length)
        finally:
            self.train(was_training)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings of both towers."""
        return self.left_tower.get_input_embeddings()

    def context_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the towers know of each position from all the others.

        Args:
            input_ids: ``[B, L]`` the text itself, nothing masked.
            attention_mask: ``[B, L]``, one where a token is.
            document_ids: ``[B, L]`` number of the document in its row that a token belongs to, -1 at padding, where the
                documents of a row are not to see each other.
            position_ids: ``[B, L]`` place of a token in its document, from 0.
            **inputs: Further inputs of the stock encoder, such as `token_type_ids`.

        Returns:
            ``[B, L, 2 * D]`` states; what stands at padding does not matter.
        """
        documents = attention_mask.long() - 1 if document_ids is None else document_ids
        inputs = {**inputs, **given_positions(self.left_tower, attention_mask, position_ids), "input_ids": input_ids}
        left_BLD, right_BLD = (
            tower(attention_mask=directed_mask(documents, config=tower.config, to_the_right=to_the_right), **inputs)[0]
            for tower, to_the_right in ((self.left_tower, True), (self.right_tower, False))
        )
        is_border = (documents[:, 1:] != documents[:, :-1])[..., None]
        before_BLD = F.pad(left_BLD[:, :-1].masked_fill(is_border, 0), (0, 0, 1, 0))
        behind_BLD = F.pad(right_BLD[:, 1:].masked_fill(is_border, 0), (0, 0, 0, 1))
        return torch.cat([before_BLD, behind_BLD], dim=-1)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits over the vocabulary in fp32, minus infinity at excluded tokens: ``[..., V]`` of ``[..., 2 * D]``."""
        hidden = self.norm(self.activation(self.dense(states)))
        logits = F.linear(hidden, self.get_input_embeddings().weight, self.bias)
        return logits.float().masked_fill(self.excluded_tokens, float("-inf"))

    def log_probs(self, states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Return log q of one token a position; logits over the vocabulary are never held for more than a chunk.

        Args:
            states: ``[T, 2 * D]`` context states.
            token_ids: ``[T]``.

        Returns:
            ``[T]`` in nats and fp32, differentiable; minus infinity at excluded tokens.
        """
        # The logits of a chunk are computed again in the backward pass; nothing in it is random.
        return torch.cat(
            [
                checkpoint(self._log_probs, *chunk, use_reentrant=False, preserve_rng_state=False)
                for chunk in self._chunks(states, token_ids)
            ]
        )

    @torch.no_grad()
    def sample(self, states: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token a position.

        Args:
            states: ``[T, 2 * D]`` context states.
            uniforms: ``[T]`` in ``[0, 1)``, fp32.

        Returns:
            ``[T]`` token ids, and ``[T]`` their log q in nats and fp32.
        """
        drawn = [self._sample(*chunk) for chunk in self._chunks(states, uniforms)]
        tokens, log_probs = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(log_probs)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> MaskedLMOutput:
        """Return the logits of every position given all the others, ``[B, L, V]``; see [`TwoTowerClozeModel.context_states`]."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return MaskedLMOutput(logits=self.logits(self.context_states(input_ids, attention_mask, **inputs)))

    def _chunks(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        rows = max(1, _LOGITS_AT_ONCE // len(self.bias))
        return zip(*(tensor.split(rows) for tensor in tensors), strict=True)

    def _log_probs(self, states_TD: torch.Tensor, token_ids_T: torch.Tensor) -> torch.Tensor:
        logits_TV = self.logits(states_TD)
        return logits_TV.gather(-1, token_ids_T[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)

    def _sample(self, states_TD: torch.Tensor, uniforms_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TV = self.logits(states_TD)
        tokens_T = sample_tokens(logits_TV, uniforms_T, excluded=self.excluded_tokens)
        return tokens_T, logits_TV.gather(-1, tokens_T[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)


def _build_body(config: PreTrainedConfig) -> PreTrainedModel:
    body: PreTrainedModel = from_config(AutoModel, config, dtype=config.dtype)
    if getattr(body, "pooler", None) is not None:
        # Nothing asks for it, and distributed training waits for the gradients of all parameters.
        body.pooler = None
    if config.model_type in MASKS_OF_TRUTH_VALUES:
        body.embeddings.register_forward_pre_hook(_without_mask, with_kwargs=True)
    return body


def _without_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keep a mask of two dimensions a row from embeddings that zero their padding by it; nobody attends to padding."""
    return args, kwargs | {"mask": None}


def build_two_tower(
    config: PreTrainedConfig, *, excluded_token_ids: list[int] | None = None, attn_implementation: str | None = None
) -> TwoTowerClozeModel:
    """Build a cloze model with fresh weights.

    Args:
        config: Stock configuration of each tower.
        excluded_token_ids: Tokens that have no probability.
        attn_implementation: "sdpa" or "eager"; the stock model's own choice if None.

    Raises:
        InputError: If the stock model cannot be a tower.
    """
    config._attn_implementation = attn_implementation
    return TwoTowerClozeModel(TwoTowerClozeConfig(tower=config, excluded_token_ids=excluded_token_ids))
