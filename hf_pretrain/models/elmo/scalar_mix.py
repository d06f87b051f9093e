"""The weighted mean of layers, which ELMo's classifiers read, and the heads on top of any encoder.

The file is exported with the code of both, so it imports nothing of this library.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


class ScalarMix(nn.Module):
    """A learned mean of the layers of any model: `gamma * sum(softmax(weights)[j] * layer[j])`.

    Args:
        num_layers: Number of layers, the embeddings included: L + 1 for the `hidden_states` of a model of L layers.
        do_layer_norm: Whether each layer is normalized before, by mean and variance of all numbers that are not padding.
        dropout: Dropout of the mean.

    Attributes:
        weights: ``[num_layers]``, zeros in the beginning, so that all layers count alike.
        gamma: ``[]``, one in the beginning.

    Source: Peters et al. (2018), equation 1.
    """

    def __init__(self, num_layers: int, *, do_layer_norm: bool = False, dropout: float = 0.0) -> None:
        if num_layers < 1 or not 0 <= dropout < 1:
            raise ValueError(f"num_layers={num_layers}, dropout={dropout}: give at least one layer, and 0 to 1")
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_layers))
        self.gamma = nn.Parameter(torch.ones(()))
        self.do_layer_norm = do_layer_norm
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean.

        Args:
            hidden_states: ``[B, T, D]`` of each layer, such as the `hidden_states` of a model's output.
            attention_mask: ``[B, T]``, 0 at padding; read only for the layer norm.

        Returns:
            ``[B, T, D]``.

        Raises:
            ValueError: If the layers are not as many as the weights.
        """
        if len(hidden_states) != len(self.weights):
            raise ValueError(
                f"hidden_states has {len(hidden_states)} layers: this mean has {len(self.weights)} weights"
            )
        shares = self.weights.softmax(0)
        layers = [self._normed(layer, attention_mask) if self.do_layer_norm else layer for layer in hidden_states]
        mixed = sum(share * layer for share, layer in zip(shares, layers, strict=True))
        return cast(torch.Tensor, self.dropout(self.gamma * mixed))

    def _normed(self, layer: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is None:
            return (layer - layer.mean()) / (layer.var(correction=0) + 1e-12).sqrt()
        is_word = (attention_mask != 0).unsqueeze(-1)
        count = is_word.sum() * layer.shape[-1]
        mean = layer.masked_fill(~is_word, 0.0).sum() / count
        variance = (layer - mean).masked_fill(~is_word, 0.0).square().sum() / count
        return (layer - mean) / (variance + 1e-12).sqrt()


__all__ = ["ScalarMix"]
