"""A cloze model of two towers: the distribution of every token given all the others, in one pass.

One tower reads from left to right, the other from right to left. The rule by which each reads, and the trial, are those of
`modeling/visibility`: a tower is an encoder in one of UniLM's modes, with the documents of a row apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from hf_pretrain.data.examples.lm_modes import LMMode
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating, row_position_inputs
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig
from hf_pretrain.modeling.embeddings import shared_embedding_names
from hf_pretrain.modeling.kernels import chunk_rows, linear_cross_entropy, sums_early
from hf_pretrain.modeling.loading import from_config
from hf_pretrain.modeling.losses import IGNORED, sample_tokens
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.lm_modes import find_fault
from hf_pretrain.modeling.visibility.rules import find_mixing

_RULE = "direction"
# Tokens of the row in which the directions are tried out, few: an architecture that attends sparsely to long rows passes.
_TRIED = 16


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
        self._check_directions()

    def _check_directions(self) -> None:
        """Refuse towers that would show a position its own token, by trying out a row in both directions."""
        tower, backend = self.left_tower, self.left_tower.config._attn_implementation
        if backend not in ("sdpa", "eager"):
            raise InputError(
                f"attn_implementation={backend!r}: the generator reads in one direction at a time, by masks that only "
                "'sdpa' and 'eager' take: choose one of them"
            )
        directions = [LMMode.LEFT_TO_RIGHT, LMMode.RIGHT_TO_LEFT]
        try:
            rules.try_out(tower, _RULE, lambda body, plan: find_fault(body, plan, modes=directions, length=_TRIED))
        except InputError as error:
            raise InputError(
                f"model_type={tower.config.model_type!r} cannot be Electric's generator: {error}; choose bert, roberta, "
                "electra, albert, deberta-v2, modernbert or another encoder of masked attention alone"
            ) from None

    def check_isolation(self, *, length: int) -> None:
        """Refuse towers that cannot keep the documents of a row of this many tokens apart, by trying it out.

        Raises:
            InputError: Naming the architecture and what went wrong.
        """

        def read(ids: torch.Tensor, documents: dict[str, torch.Tensor] | None) -> torch.Tensor:
            return self.context_states(ids, torch.ones_like(ids), **(documents or {}))

        try:
            with evaluating(self):
                rules.try_out(self.left_tower, _RULE, lambda body, plan: find_mixing(read, body, length=length))
        except InputError as error:
            raise InputError(
                f"model_type={self.left_tower.config.model_type!r} as Electric's generator cannot isolate documents: {error}; "
                "use block_mode='doc_sentences', which gives each document rows of its own"
            ) from None

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
            position_ids: ``[B, L]`` position of a token in its document, from 0.
            **inputs: Further inputs of the stock encoder, such as `token_type_ids`.

        Returns:
            ``[B, L, 2 * D]`` states; what stands at padding does not matter.
        """
        documents = attention_mask.long() - 1 if document_ids is None else document_ids
        left_BLD, right_BLD = (
            self._read(tower, sign, documents, attention_mask, position_ids, input_ids=input_ids, **inputs)
            for tower, sign in ((self.left_tower, 1), (self.right_tower, -1))
        )
        is_border = (documents[:, 1:] != documents[:, :-1])[..., None]
        before_BLD = F.pad(left_BLD[:, :-1].masked_fill(is_border, 0), (0, 0, 1, 0))
        behind_BLD = F.pad(right_BLD[:, 1:].masked_fill(is_border, 0), (0, 0, 0, 1))
        return torch.cat([before_BLD, behind_BLD], dim=-1)

    @staticmethod
    def _read(
        tower: PreTrainedModel,
        sign: int,
        documents: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Return the states of a tower that reads from left to right where the sign is 1, from right to left where it is -1."""
        plan = rules.known_plan(tower, _RULE) or rules.make_plan(tower, _RULE)
        columns_BL = sign * torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        mask = rules.mask_inputs(tower, plan, rules.sees_within(documents, columns_BL), like=documents)
        if position_ids is not None:
            inputs |= rules.position_inputs(plan, position_ids)
        else:
            inputs |= row_position_inputs(tower, attention_mask, whatever_the_ids=True)
        states: torch.Tensor = tower(attention_mask=mask, **inputs)[0]
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits over the vocabulary in fp32, minus infinity at excluded tokens: ``[..., V]`` of ``[..., 2 * D]``."""
        logits = F.linear(self._hidden(states), self.get_input_embeddings().weight, self.bias)
        return logits.float().masked_fill(self.excluded_tokens, float("-inf"))

    def _hidden(self, states: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(self.activation(self.dense(states)))
        return hidden

    def log_probs(self, states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Return log q of one token a position; logits over the vocabulary are never held for more than a chunk.

        Args:
            states: ``[T, 2 * D]`` context states.
            token_ids: ``[T]``, -100 for a position without a token.

        Returns:
            ``[T]`` in nats and fp32; minus infinity at excluded tokens, 0 without a token. The gradients of all positions must
            be the same, see [`linear_cross_entropy`].
        """
        weight = self.get_input_embeddings().weight
        if sums_early(weight):
            bias = self.bias.masked_fill(self.excluded_tokens, float("-inf"))
            return -linear_cross_entropy(self._hidden(states), weight, token_ids, bias=bias)
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
        rows = chunk_rows(len(self.bias), None, self.bias.device)
        return zip(*(tensor.split(rows) for tensor in tensors), strict=True)

    def _log_probs(self, states_TD: torch.Tensor, token_ids_T: torch.Tensor) -> torch.Tensor:
        logits_TV = self.logits(states_TD)
        found_T = logits_TV.gather(-1, token_ids_T.clamp(min=0)[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)
        return found_T.masked_fill(token_ids_T == IGNORED, 0.0)

    def _sample(self, states_TD: torch.Tensor, uniforms_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TV = self.logits(states_TD)
        tokens_T = sample_tokens(logits_TV, uniforms_T, excluded=self.excluded_tokens)
        return tokens_T, logits_TV.gather(-1, tokens_T[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)


def _build_body(config: PreTrainedConfig) -> PreTrainedModel:
    body: PreTrainedModel = from_config(AutoModel, config, dtype=config.dtype)
    if getattr(body, "pooler", None) is not None:
        # It is not used, and distributed training waits for the gradients of all parameters.
        body.pooler = None
    return body


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
