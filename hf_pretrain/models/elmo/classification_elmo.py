"""Classifiers of words and of texts on the weighted mean of ELMo's layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_elmo import ElmoConfig
from .modeling_elmo import ElmoModel, ElmoPreTrainedModel
from .scalar_mix import ScalarMix


class _ElmoClassifier(ElmoPreTrainedModel):
    """ELMo with a weighted mean of its layers and a linear layer."""

    accepts_loss_kwargs = False

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ElmoModel(config)
        self.mix = ScalarMix(config.num_hidden_layers + 1, dropout=config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _mixed(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        character_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the mean ``[B, T, D]`` and the layers."""
        hidden_states = self.model(input_ids, attention_mask, character_ids, return_dict=True).hidden_states
        return self.mix(hidden_states, attention_mask), hidden_states


class ElmoForTokenClassification(_ElmoClassifier):
    """ELMo with a classifier of words."""

    _auto_class = "AutoModelForTokenClassification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        character_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> TokenClassifierOutput:
        """Classify words.

        Args:
            input_ids: See [`ElmoModel`], as for the masks and the characters.
            attention_mask: See there.
            character_ids: See there.
            labels: ``[B, T]`` classes, -100 where there is none.
        """
        mixed, hidden_states = self._mixed(input_ids, attention_mask, character_ids)
        logits = self.classifier(mixed)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)


class ElmoForSequenceClassification(_ElmoClassifier):
    """ELMo with a classifier of texts, on the mean of their words."""

    _auto_class = "AutoModelForSequenceClassification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        character_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: See [`ElmoModel`], as for the masks and the characters.
            attention_mask: See there.
            character_ids: See there.
            labels: ``[B]`` classes, or values ``[B, labels]``, as `problem_type` says.
        """
        if attention_mask is None and character_ids is not None:
            attention_mask = (character_ids != 0).any(-1).long()
        mixed, hidden_states = self._mixed(input_ids, attention_mask, character_ids)
        if attention_mask is None:
            pooled = mixed.mean(1)
        else:
            weights = (attention_mask != 0).unsqueeze(-1).to(mixed.dtype)
            pooled = (mixed * weights).sum(1) / weights.sum(1).clamp(min=1)
        logits = self.classifier(pooled)
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)


__all__ = ["ElmoForSequenceClassification", "ElmoForTokenClassification"]
