"""Heads of the discriminator that stock transformers does not have for every architecture."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_pretrain.errors import InputError

DISCRIMINATOR_HEADS = ("stock", "electra", "deberta_v3")


@strict
class DiscriminatorHeadConfig(PreTrainedConfig):
    """Configuration of [`DiscriminatorHead`].

    Attributes:
        kind: "electra": dense, activation, linear; "deberta_v3": the state of the first token is added to every other's and the
            sum normalised before that.
        hidden_size: Width of the states.
        hidden_act: Activation.
        layer_norm_eps: Epsilon of the norm.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "hf_pretrain_discriminator_head"

    kind: str = "electra"
    hidden_size: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


class DiscriminatorHead(PreTrainedModel):
    """One logit a token, positive for "replaced", from the states of any encoder.

    Source: `get_discriminator_output` of the official ELECTRA; `LMMaskPredictionHead` of the official DeBERTa.
    """

    config_class = DiscriminatorHeadConfig
    main_input_name = "hidden_states"

    def __init__(self, config: DiscriminatorHeadConfig) -> None:
        super().__init__(config)
        if config.kind not in DISCRIMINATOR_HEADS[1:]:
            raise InputError(f"discriminator_head={config.kind!r} must be one of {', '.join(DISCRIMINATOR_HEADS)}")
        has_norm = config.kind == "deberta_v3"
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else None
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @classmethod
    def of_kind(cls, kind: str, config: PreTrainedConfig) -> DiscriminatorHead:
        """Build a head for an encoder with this configuration."""
        # ModernBERT has names of its own.
        names = {
            "hidden_act": "hidden_activation",
            "layer_norm_eps": "norm_eps",
            "initializer_range": "initializer_range",
        }
        values = {name: getattr(config, name, getattr(config, other, None)) for name, other in names.items()}
        known = {name: value for name, value in values.items() if value is not None}
        return cls(DiscriminatorHeadConfig(kind=kind, hidden_size=config.hidden_size, **known))

    def forward(self, hidden_states: torch.Tensor, first_columns: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits.

        Args:
            hidden_states: `[B, L, D]`.
            first_columns: `[B, L]` (or `[B, 1]`) column of the classification token that a token belongs to, where that is not
                the row's first; only for "deberta_v3".

        Returns:
            `[B, L]` logits.
        """
        if self.LayerNorm is not None:
            first_BLD = hidden_states[:, :1]
            if first_columns is not None:
                first_BLD = hidden_states.gather(1, first_columns[:, :, None].expand(-1, -1, hidden_states.shape[2]))
            hidden_states = self.LayerNorm(hidden_states + first_BLD)
        return self.classifier(self.activation(self.dense(hidden_states))).squeeze(-1)
