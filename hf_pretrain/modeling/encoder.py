"""An encoder with its pre-training heads, all run on gathered positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.configuration import (
    CompositeConfig,
    ModelArguments,
    SubModelConfig,
    attention_options,
    build_config,
    from_config,
    from_pretrained,
)
from hf_pretrain.modeling.gathered import GatheredHead
from hf_pretrain.modeling.isolation import isolated_inputs
from hf_pretrain.modeling.losses import IGNORED, masked_lm_accuracy, masked_lm_loss
from hf_pretrain.modeling.outputs import PretrainingOutput


@strict
class EncoderForPreTrainingConfig(CompositeConfig):
    """Configuration of [`EncoderForPreTraining`]: that of the stock model inside."""

    model_type = "hf_pretrain_encoder"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None


class EncoderForPreTraining(PretrainingModel):
    """Any stock masked language model, trained on gathered targets.

    Args:
        config: Configuration with the stock model's inside.
        model: The stock model to train, such as one from `AutoModelForMaskedLM.from_pretrained`; built from the configuration,
            with fresh weights, when not given.
    """

    config_class = EncoderForPreTrainingConfig
    export_parts = {"": "model"}  # noqa: RUF012

    def __init__(self, config: EncoderForPreTrainingConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.model = AutoModelForMaskedLM.from_config(config.model) if model is None else model
        self.mlm_head = GatheredHead(self.model)
        self.post_init()

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> EncoderForPreTraining:
        """Wrap a stock masked language model; it is trained in place."""
        return cls(EncoderForPreTrainingConfig(model=model.config), model)

    @classmethod
    def from_arguments(cls, args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> EncoderForPreTraining:
        """Load the checkpoint that the arguments name, or build the model that they describe."""
        if args.model_name_or_path is not None:
            model = from_pretrained(AutoModelForMaskedLM, args.model_name_or_path, **attention_options(args))
        else:
            model = from_config(AutoModelForMaskedLM, build_config(args, tokenizer), **attention_options(args))
        return cls.from_model(model)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the word embeddings of the stock model."""
        return self.model.get_input_embeddings()

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of selected positions."""
        return {"mlm": (batch["labels"] != IGNORED).sum()}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        target_positions: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> PretrainingOutput:
        """Return the masked-LM loss summed over the targets.

        Args:
            input_ids: ``[B, L]`` corrupted tokens.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]`` original ids at the selected positions, -100 elsewhere.
            target_positions: ``[T]`` flat positions of the targets; one with label -100 is a filler.
            **inputs: Further inputs of the stock model, such as `token_type_ids`. With `document_ids` and `position_ids`, the
                documents of a row do not see each other.

        Returns:
            The loss "mlm" (nats), and in evaluation the metric "mlm_accuracy".
        """
        inputs = isolated_inputs(self.model, input_ids=input_ids, attention_mask=attention_mask, **inputs)
        logits_TV = self.mlm_head(self.model, target_positions, **inputs)
        targets_T = labels.flatten().index_select(0, target_positions)
        loss = masked_lm_loss(logits_TV, targets_T, positions=target_positions, shape=labels.shape)
        output = PretrainingOutput(losses={"mlm": loss}, metrics={})
        if not self.training:
            output.metrics["mlm_accuracy"] = masked_lm_accuracy(
                logits_TV.argmax(-1), targets_T, positions=target_positions, shape=labels.shape
            )
        return output
