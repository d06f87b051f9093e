"""Generator and discriminator in one model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig
from hf_pretrain.modeling.gathered import GatheredHead
from hf_pretrain.modeling.losses import IGNORED, binary_token_loss, masked_lm_accuracy, masked_lm_loss
from hf_pretrain.modeling.outputs import PretrainingOutput
from hf_pretrain.modeling.sampling import sample_tokens
from hf_pretrain.modeling.sharing import shared_embedding_names

EMBEDDING_SHARING = ("tied", "none")


@strict
class ReplacedTokenDetectionConfig(CompositeConfig):
    """Configuration of [`ReplacedTokenDetectionForPreTraining`].

    Attributes:
        generator: Configuration of the stock masked language model that proposes replacements.
        discriminator: Configuration of the stock model that finds them.
        embedding_sharing: "tied" (word, position and type tables and their layer norm are one) or "none".
        temperature: Temperature of the sampling.
        excluded_token_ids: Tokens that are never sampled: special ones, and ids that the tokenizer does not have.
        tie_word_embeddings: Lets transformers tie at all; without it no sharing takes effect.
    """

    model_type = "hf_pretrain_replaced_token_detection"
    sub_configs = {"generator": AutoConfig, "discriminator": AutoConfig}  # noqa: RUF012

    generator: SubModelConfig = None
    discriminator: SubModelConfig = None
    embedding_sharing: str = "tied"
    temperature: float = 1.0
    excluded_token_ids: list[int] | None = None
    tie_word_embeddings: bool = True


def build_discriminator(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Build the stock class with a binary decision a token: ELECTRA's own, elsewhere a token classifier with one label."""
    if config.model_type == "electra":
        return ElectraForPreTraining._from_config(config, **options)
    config.num_labels = 1
    return AutoModelForTokenClassification.from_config(config, **options)


class ReplacedTokenDetectionForPreTraining(PretrainingModel):
    """Replaced token detection: a generator fills masked positions, a discriminator finds what was replaced.

    Args:
        config: Configuration with those of both models inside.
        generator: Stock masked language model; built from the configuration, with fresh weights, when not given.
        discriminator: Stock model with one logit a token; built likewise.

    Source: Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", section 2.
    """

    config_class = ReplacedTokenDetectionConfig
    export_parts = {"": "discriminator", "pretraining/generator": "generator"}  # noqa: RUF012

    def __init__(
        self,
        config: ReplacedTokenDetectionConfig,
        generator: PreTrainedModel | None = None,
        discriminator: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.generator = AutoModelForMaskedLM.from_config(config.generator) if generator is None else generator
        self.discriminator = build_discriminator(config.discriminator) if discriminator is None else discriminator
        if config.embedding_sharing not in EMBEDDING_SHARING:
            raise InputError(
                f"embedding_sharing={config.embedding_sharing!r} must be one of {', '.join(EMBEDDING_SHARING)}"
            )
        if config.embedding_sharing == "tied":
            shared = shared_embedding_names(self.discriminator, self.generator)
            self._tied_weights_keys = {
                f"discriminator.{ours}": f"generator.{theirs}" for ours, theirs in shared.items()
            }
        excluded = torch.zeros(config.generator.vocab_size, dtype=torch.bool)
        excluded[config.excluded_token_ids or []] = True
        # Saved with the weights: a buffer that is not would be lost when a checkpoint is opened on the meta device.
        self.register_buffer("excluded_tokens", excluded)
        self.generator_head = GatheredHead(self.generator)
        self.post_init()

    @classmethod
    def from_models(
        cls, generator: PreTrainedModel, discriminator: PreTrainedModel, **options: Any
    ) -> ReplacedTokenDetectionForPreTraining:
        """Pair two stock models; both are trained in place. `options` are fields of [`ReplacedTokenDetectionConfig`]."""
        config = ReplacedTokenDetectionConfig(
            generator=generator.config, discriminator=discriminator.config, **options
        )
        return cls(config, generator, discriminator)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the word embeddings of the generator, which the discriminator shares unless told otherwise."""
        return self.generator.get_input_embeddings()

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the selected positions for the generator and the real tokens for the discriminator."""
        return {"mlm": (batch["labels"] != IGNORED).sum(), "rtd": batch["attention_mask"].sum()}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        target_positions: torch.Tensor,
        sample_uniforms: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> PretrainingOutput:
        """Run one joint step.

        Args:
            input_ids: ``[B, L]`` masked tokens.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]`` original ids at the selected positions, -100 elsewhere.
            target_positions: ``[T]`` flat positions of the targets; one with label -100 is a filler.
            sample_uniforms: ``[T]`` keyed uniforms that decide what the generator puts there.
            **inputs: Further inputs of both models, such as `token_type_ids`.

        Returns:
            The losses "mlm" of the generator over the selected positions and "rtd" of the discriminator over all real tokens
            (nats). In evaluation also the generator's accuracy, of its best guess and of what it sampled, and the
            discriminator's logits (positive = replaced) with their labels.
        """
        logits_TV = self.generator_head(
            self.generator, target_positions, input_ids=input_ids, attention_mask=attention_mask, **inputs
        )
        targets_T = labels.flatten().index_select(0, target_positions)
        accuracy = partial(masked_lm_accuracy, positions=target_positions, shape=labels.shape)
        sampled_T = sample_tokens(
            logits_TV.detach(), sample_uniforms, temperature=self.config.temperature, excluded=self.excluded_tokens
        )
        original_BL = torch.where(labels == IGNORED, input_ids, labels)
        replaced_BL = self._write_samples(original_BL, labels, target_positions, sampled_T)
        rtd_labels_BL = (replaced_BL != original_BL).long()
        rtd_logits_BL = self.discriminator(input_ids=replaced_BL, attention_mask=attention_mask, **inputs).logits
        rtd_logits_BL = rtd_logits_BL.reshape(labels.shape)
        output = PretrainingOutput(
            losses={
                "mlm": masked_lm_loss(logits_TV, targets_T, positions=target_positions, shape=labels.shape),
                "rtd": binary_token_loss(rtd_logits_BL, rtd_labels_BL, mask=attention_mask),
            },
            metrics={},
        )
        if not self.training:
            output.metrics["mlm_accuracy"] = accuracy(logits_TV.argmax(-1), targets_T)
            output.metrics["sampled_accuracy"] = accuracy(sampled_T, targets_T)
            output.scores = rtd_logits_BL.float()
            output.score_labels = rtd_labels_BL.masked_fill(attention_mask == 0, IGNORED)
        return output

    @staticmethod
    def _write_samples(
        original: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor
    ) -> torch.Tensor:
        """Return the discriminator's input: the original ``[B, L]`` with the samples at the selected positions."""
        written = original.flatten().index_copy(0, positions, sampled).view_as(original)
        # Fillers of a fixed shape point at positions that were not selected: those stay as they are.
        return torch.where(labels == IGNORED, original, written)
