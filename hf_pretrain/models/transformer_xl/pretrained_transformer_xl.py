"""What the Transformer-XL models share: outputs, initialization, and a vocabulary that can be resized."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_transformer_xl import TransformerXLConfig


@dataclass
class TransformerXLModelOutput(ModelOutput):
    """Output of [`TransformerXLModel`].

    Attributes:
        last_hidden_state: ``[B, S, hidden]``.
        cache: The cache, if one was used.
        hidden_states: ``[B, S, hidden]`` of the embeddings and of each layer, if asked for.
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
