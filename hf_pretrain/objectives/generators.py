"""What ELECTRA's and Electric's objectives share: a generator that is trained beside a discriminator.

The discriminator is exported at the root, the generator below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.configuration import CompositeConfig, ModelArguments, SubModelConfig, scaled_config
from hf_pretrain.modeling.heads import with_head
from hf_pretrain.modeling.loading import from_config, from_pretrained
from hf_pretrain.modeling.visibility.rules import has_padding
from hf_pretrain.objectives.masking import MaskedLMTrainingArguments
from hf_pretrain.options import option


@strict
class PairConfig(CompositeConfig):
    """Configuration of a [`PairForPreTraining`].

    Attributes:
        generator: Configuration of the model that proposes tokens.
        discriminator: Configuration of the stock model that judges them.
        embedding_sharing: Which parameters the two share; a subclass names the kinds.
        tie_word_embeddings: Lets transformers tie at all; without it no sharing takes effect.
    """

    sub_configs = {"generator": AutoConfig, "discriminator": AutoConfig}  # noqa: RUF012

    generator: SubModelConfig = None
    discriminator: SubModelConfig = None
    embedding_sharing: str = "tied"
    tie_word_embeddings: bool = True


class PairForPreTraining(PretrainingModel):
    """A generator and a discriminator in one model; a subclass trains them."""

    generator: PreTrainedModel
    discriminator: PreTrainedModel
    host_inputs = staticmethod(has_padding)

    @classmethod
    def from_models(cls, generator: PreTrainedModel, discriminator: PreTrainedModel, **options: Any) -> Self:
        """Pair two models; both are trained in place.

        Args:
            generator: The model that proposes tokens. Where parameters are shared, its own are kept.
            discriminator: The stock model that judges them.
            **options: Fields of the configuration.

        Raises:
            InputError: If a step on a few tokens fails; see [`PretrainingModel.try_out`].
        """
        config = cls.config_class(generator=generator.config, discriminator=discriminator.config, **options)
        model = cls(config, generator, discriminator)
        model.try_out()
        return model

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the word embeddings of the generator, which the discriminator may share."""
        return self.generator.get_input_embeddings()


@dataclass
class GeneratorArguments(ModelArguments):
    """The discriminator, given as in [`ModelArguments`], and its generator. The defaults are ELECTRA-Small's.

    A subclass says in `choices` what its options of words may be.
    """

    ranges: ClassVar[dict[str, str]] = {"generator_size": "(0, 16]", "generator_layers": "(0, 16]"}
    needs: ClassVar[dict[str, str]] = dict.fromkeys(("generator_size", "generator_layers"), "!generator_name_or_path")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    model_type: str = option("electra", "Architecture of both models when built from scratch.")
    embedding_size: int | None = option(
        None, "Width of the embedding tables, where the architecture has one of its own (128 for electra)."
    )
    generator_name_or_path: str | None = option(
        None, "Checkpoint of the generator; by default what an export has in pretraining/generator."
    )
    generator_size: float = option(
        0.25, "Width of the generator as a share of the discriminator's (heads and layers' width too)."
    )
    generator_layers: float = option(1.0, "Layers of the generator as a share of the discriminator's.")

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, known in self.choices.items():
            check_choice(getattr(self, name), (*known, None), name=name)
        super().__post_init__()


@dataclass
class GeneratorTrainingArguments(MaskedLMTrainingArguments):
    """Options of a Trainer of such a pair; the defaults of the optimizer are the official code's."""

    adam_bias_correction: bool = option(False, "Adam's bias correction; the official optimizer has none.")
    adam_epsilon: float = option(1e-6, "Adam's epsilon.")
    decay_during_warmup: bool = option(True, "Multiply the linear decay and the warm-up, as the official code does.")


def stock_width(args: ModelArguments, model_type: str) -> dict[str, int]:
    """Return the width of ELECTRA's tables where none is given: that of its small and base models is 128 and 768."""
    return {"embedding_size": 128} if model_type == "electra" and args.embedding_size is None else {}


def generator_config(config: PreTrainedConfig, args: GeneratorArguments) -> PreTrainedConfig:
    """Return the discriminator's configuration, scaled to the generator: width, heads and feed-forward alike, and depth.

    Raises:
        InputError: If the share leaves no whole heads.
    """
    scaled = scaled_config(config, width=args.generator_size, depth=args.generator_layers)
    if scaled.hidden_size % scaled.num_attention_heads:
        raise InputError(
            f"generator_size={args.generator_size} makes {scaled.hidden_size} wide states with "
            f"{scaled.num_attention_heads} heads, which do not divide: choose a share that gives whole heads"
        )
    return scaled


def build_discriminator(config: PreTrainedConfig, head: str = "stock", **options: Any) -> PreTrainedModel:
    """Build the stock model that detects.

    With the stock head that is the class with a binary decision a token: ELECTRA's own, elsewhere a token classifier with one
    label. For another head it is the encoder alone, without a pooler.
    """
    if config.model_type == "electra" and head != "deberta_v3":
        return from_config(ElectraForPreTraining, config, **options)
    config.num_labels = 1
    classifier = from_config(AutoModelForTokenClassification, config, **options)
    return classifier if head == "stock" else classifier.base_model


def load_discriminator(name: str, head: str = "stock", **options: Any) -> PreTrainedModel:
    """Open the same from a checkpoint; see [`build_discriminator`]."""
    if from_pretrained(AutoConfig, name).model_type == "electra" and head != "deberta_v3":
        return from_pretrained(ElectraForPreTraining, name, **options)
    # The head of a token classifier is new with every checkpoint that had another one; one that is dropped is not worth a line.
    classifier = from_pretrained(
        AutoModelForTokenClassification, name, num_labels=1, announce=head == "stock", **options
    )
    return classifier if head == "stock" else classifier.base_model


def stock_discriminator(model: PreTrainedModel, head: str = "stock") -> PreTrainedModel:
    """Return a given stock model as one that detects; see [`build_discriminator`]."""
    if model.config.model_type == "electra" and head != "deberta_v3":
        return with_head(model, AutoModelForPreTraining)
    classifier = model
    if head == "stock" and not ("ForTokenClassification" in type(model).__name__ and model.config.num_labels == 1):
        classifier = with_head(model.base_model, AutoModelForTokenClassification, num_labels=1)
    return classifier if head == "stock" else classifier.base_model


@torch.no_grad()
def copy_parameters(source: PreTrainedModel, target: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Copy parameters of one model over those of another.

    Args:
        source: Model that is read.
        target: Model that is written to.
        names: Names in the target -> names in the source.
    """
    for ours, theirs in names.items():
        target.get_parameter(ours).copy_(source.get_parameter(theirs))
