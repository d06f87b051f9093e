"""DeBERTa's enhanced mask decoder: absolute positions enter just before the words are predicted."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_pretrain.errors import InputError


@strict
class EnhancedMaskDecoderConfig(PreTrainedConfig):
    """Configuration of [`EnhancedMaskDecoder`]: the size of its table of positions."""

    model_type = "hf_pretrain_enhanced_mask_decoder"

    max_position_embeddings: int = 512
    hidden_size: int = 768
    initializer_range: float = 0.02


class EnhancedMaskDecoder(PreTrainedModel):
    """Runs an encoder's last layer twice, with queries that start from the states below it plus absolute positions.

    Keys and values of both passes are the states below the last layer. The layer's weights are the encoder's own; only the
    table of positions is here.

    Source: He et al. 2020, "DeBERTa", section 3.2, with the two passes of the official `EnhancedMaskDecoder`.
    """

    config_class = EnhancedMaskDecoderConfig
    main_input_name = "hidden_states"

    def __init__(self, config: EnhancedMaskDecoderConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self._position_ids: torch.Tensor | None = None
        self.post_init()

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> EnhancedMaskDecoder:
        """Build the decoder of a masked language model.

        Raises:
            InputError: If the architecture's layers take no queries of their own, or its input has absolute positions already.
        """
        layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
        takes_queries = layers is not None and "query_states" in inspect.signature(layers[-1].forward).parameters
        if not takes_queries or getattr(model.config, "position_biased_input", True):
            raise InputError(
                f"enhanced_mask_decoder=True needs a DeBERTa without absolute positions in its input, not "
                f'{type(model).__name__}: use model_type deberta-v2 with config_overrides {{"position_biased_input": false}}, '
                "or leave the option out"
            )
        config = model.config
        return cls(
            EnhancedMaskDecoderConfig(
                max_position_embeddings=config.max_position_embeddings,
                hidden_size=config.hidden_size,
                initializer_range=config.initializer_range,
            )
        )

    def attach(self, model: PreTrainedModel) -> None:
        """Make the model's last layer decode in this way from now on."""
        model.base_model.register_forward_pre_hook(self._note_positions, with_kwargs=True)
        model.base_model.encoder.layer[-1].register_forward_pre_hook(self._decode, with_kwargs=True)

    def _note_positions(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the encoder is told of positions, which without absolute ones it has no use for."""
        self._position_ids = kwargs.get("position_ids")

    def _decode(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Run the first pass; the call that this precedes is the second."""
        hidden_BLD = args[0]
        if self._position_ids is None:
            positions = self.position_embeddings.weight[: hidden_BLD.shape[1]]
        else:
            positions = self.position_embeddings(self._position_ids)
        query_BLD = hidden_BLD + positions.to(hidden_BLD.dtype)
        first_BLD, _ = layer.forward(*args, **(kwargs | {"query_states": query_BLD}))
        return args, kwargs | {"query_states": first_BLD}
