"""Replaced token detection: generator and discriminator in one model, and DeBERTa's enhanced mask decoder.

With the decoder absolute positions enter just before the generator predicts the words.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.backbone import layer_modules
from hf_pretrain.modeling.base import GENERATOR_FOLDER, masked_trial_batch
from hf_pretrain.modeling.embeddings import (
    disentangle_embedding,
    factorize_embeddings,
    is_factorized,
    merged_state,
    shared_body_names,
    shared_embedding_names,
    shared_table_names,
)
from hf_pretrain.modeling.heads import DISCRIMINATOR_HEAD_FOLDER, DISCRIMINATOR_HEADS, DiscriminatorHead
from hf_pretrain.modeling.kernels import OutputMap
from hf_pretrain.modeling.losses import (
    IGNORED,
    ExampleSum,
    GatheredHead,
    PretrainingOutput,
    binary_token_loss,
    masked_lm_accuracy,
    sample_tokens,
    sum_of_targets,
)
from hf_pretrain.modeling.visibility.rules import isolated_inputs
from hf_pretrain.objectives.generators import PairConfig, PairForPreTraining, build_discriminator


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
        takes_queries = "query_states" in inspect.signature(layer_modules(model.base_model)[-1].forward).parameters
        if not takes_queries or getattr(model.config, "position_biased_input", True):
            raise InputError(
                f"enhanced_mask_decoder=True needs a DeBERTa without absolute positions in its input, not "
                f'{type(model).__name__}: use model_type deberta-v2 with config_overrides {{"position_biased_input": false}}, '
                "or leave the option out"
            )
        names = ("max_position_embeddings", "hidden_size", "initializer_range")
        return cls(EnhancedMaskDecoderConfig(**{name: getattr(model.config, name) for name in names}))

    def attach(self, model: PreTrainedModel) -> None:
        """Make the model's last layer decode in this way from now on."""
        model.base_model.register_forward_pre_hook(self._note_positions, with_kwargs=True)
        layer_modules(model.base_model)[-1].register_forward_pre_hook(self._decode, with_kwargs=True)

    def _note_positions(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the encoder's `position_ids`, which it does not read itself without absolute positions."""
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


EMBEDDING_SHARING = ("tied", "gdes", "full", "none")

Stage = Literal["joint", "generator", "discriminator"]


@strict
class ReplacedTokenDetectionConfig(PairConfig):
    """Configuration of [`ReplacedTokenDetectionForPreTraining`].

    The generator is a stock masked language model. `embedding_sharing` is "tied": word, position and type tables and their layer
    norm are one; "gdes": the discriminator's word and position tables are the generator's, held constant, plus a difference;
    "full": one encoder for both; or "none".

    Attributes:
        generator_embedding_size: Width of the generator's word table where it is not the stock one, to share it with a
            discriminator of another width.
        discriminator_head: "stock": that of `ElectraForPreTraining` or of the token classifier; "electra" or "deberta_v3": that
            head on any encoder.
        enhanced_mask_decoder: Whether the generator decodes with absolute positions, as DeBERTa's.
        temperature: Temperature of the sampling.
        disallow_correct: Whether the true token is never drawn.
        excluded_token_ids: Tokens that are never sampled: special ones, and ids that the tokenizer does not have.
    """

    model_type = "hf_pretrain_replaced_token_detection"

    generator_embedding_size: int | None = None
    discriminator_head: str = "stock"
    enhanced_mask_decoder: bool = False
    temperature: float = 1.0
    disallow_correct: bool = False
    excluded_token_ids: list[int] | None = None


@dataclass
class ReplacedTokenDetectionOutput(PretrainingOutput):
    """Output of [`ReplacedTokenDetectionForPreTraining`].

    Attributes:
        replaced_ids: ``[B, L]`` what the discriminator reads: the text with the generator's samples in it.
    """

    replaced_ids: torch.Tensor | None = None


class ReplacedTokenDetectionForPreTraining(PairForPreTraining):
    """Replaced token detection: a generator fills masked positions, a discriminator finds what was replaced.

    Args:
        config: Configuration with those of both models inside.
        generator: Stock masked language model; built from the configuration, with fresh weights, when not given.
        discriminator: Stock model with one logit a token, or the encoder below another head; built likewise.

    Raises:
        InputError: If an option is unknown, or the two models cannot share what they are to share.

    Source: Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", section 2; He et
    al. 2021, "DeBERTaV3".
    """

    config_class = ReplacedTokenDetectionConfig

    def __init__(
        self,
        config: ReplacedTokenDetectionConfig,
        generator: PreTrainedModel | None = None,
        discriminator: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        for name, known in (("embedding_sharing", EMBEDDING_SHARING), ("discriminator_head", DISCRIMINATOR_HEADS)):
            check_choice(getattr(config, name), known, name=name)
        self.export_parts = {"": "discriminator", GENERATOR_FOLDER: "generator"}
        is_trained = discriminator is not None
        self.generator = AutoModelForMaskedLM.from_config(config.generator) if generator is None else generator
        if discriminator is None:
            discriminator = build_discriminator(config.discriminator, config.discriminator_head)
        self.discriminator = discriminator
        self.discriminator_head = self._build_head()
        if config.generator_embedding_size is not None and not is_factorized(self.generator):
            factorize_embeddings(self.generator, config.generator_embedding_size)
        self._share_parameters(is_trained=is_trained)
        excluded = torch.zeros(config.generator.vocab_size, dtype=torch.bool)
        excluded[config.excluded_token_ids or []] = True
        # Saved with the weights: a buffer that is not would be lost when a checkpoint is opened on the meta device.
        self.register_buffer("excluded_tokens", excluded)
        self.generator_decoder: EnhancedMaskDecoder | None = None
        if config.enhanced_mask_decoder:
            self.generator_decoder = EnhancedMaskDecoder.for_model(self.generator)
            self.generator_decoder.attach(self.generator)
            self.export_parts[f"{GENERATOR_FOLDER}_decoder"] = "generator_decoder"
        self.generator_head = GatheredHead(self.generator)
        self.output_map = OutputMap(self.generator)
        self.post_init()

    def _build_head(self) -> DiscriminatorHead | None:
        kind, config = self.config.discriminator_head, self.config.discriminator
        if kind == "stock" or (kind == "electra" and config.model_type == "electra"):
            return None
        self.export_parts[DISCRIMINATOR_HEAD_FOLDER] = "discriminator_head"
        return DiscriminatorHead.of_kind(kind, config)

    def _share_parameters(self, *, is_trained: bool) -> None:
        """Name what is tied; `post_init` ties it."""
        sharing, names = self.config.embedding_sharing, {}
        if sharing == "tied":
            names = shared_embedding_names(self.discriminator, self.generator)
        elif sharing == "full":
            names = shared_body_names(self.discriminator, self.generator)
        elif sharing == "gdes":
            for ours, theirs in shared_table_names(self.discriminator, self.generator).items():
                base = self.generator.get_submodule(theirs).weight
                disentangle_embedding(self.discriminator, ours, base, is_trained=is_trained)
                names[f"{ours}.base_weight"] = f"{theirs}.weight"
        self._tied_weights_keys = {f"discriminator.{ours}": f"generator.{theirs}" for ours, theirs in names.items()}

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens with targets of both models; see [`PretrainingModel.trial_batch`]."""
        batch = masked_trial_batch(self.generator)
        return batch | {"sample_uniforms": torch.full(batch["target_positions"].shape, 0.5, device=self.device)}

    def stock_part(
        self, attribute: str, state: Mapping[str, torch.Tensor] | None
    ) -> tuple[PreTrainedModel, Mapping[str, torch.Tensor] | None]:
        """Return a sub-model with its stock parameters: tables merged, projections multiplied out."""
        part, state = super().stock_part(attribute, state)
        merged = merged_state(part, state)
        if merged is None:
            return part, state
        config = type(part.config).from_dict(part.config.to_dict())
        if is_factorized(part):
            # A table that was projected in two ways is two tables; then no parameter of a stock model is tied, not even a bias.
            config.tie_word_embeddings = False
            merged = {name: value.clone() for name, value in merged.items()}
        with torch.device("meta"):
            return type(part)(config), merged

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the selected positions for the generator and the real tokens for the discriminator."""
        return {"mlm": (batch["labels"] != IGNORED).sum(), "rtd": batch["attention_mask"].sum()}

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return generator and discriminator."""
        return self.backbones.keys()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        target_positions: torch.Tensor,
        sample_uniforms: torch.Tensor,
        *,
        stage: Stage = "joint",
        replaced_ids: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        **inputs: Any,
    ) -> ReplacedTokenDetectionOutput:
        """Run a step, or one of its halves.

        Args:
            input_ids: ``[B, L]`` masked tokens.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]`` original ids at the selected positions, -100 elsewhere.
            target_positions: ``[T]`` flat positions of the targets; one with label -100 is a filler.
            sample_uniforms: ``[T]`` keyed uniforms that decide what the generator puts there.
            stage: "joint": both losses; "generator": its loss alone, and the samples; "discriminator": its loss alone, on
                `replaced_ids` or, without them, on samples of a generator that is left as it is.
            replaced_ids: ``[B, L]`` samples of an earlier call for the same batch.
            temperature: ``[]``, in place of the configuration's.
            **inputs: Further inputs of both models, such as `token_type_ids`, or `document_ids` for isolated documents.

        Returns:
            The losses "mlm" of the generator over the selected positions and "rtd" of the discriminator over all real tokens
            (nats), and the metric "fake_rate". In evaluation also the generator's accuracy, of its best guess and of what it
            sampled, and the discriminator's logits (positive = replaced) with their labels.
        """
        output = ReplacedTokenDetectionOutput(losses={}, metrics={}, replaced_ids=replaced_ids)
        original_BL = torch.where(labels == IGNORED, input_ids, labels)
        if replaced_ids is None:
            targets_T = labels.flatten().index_select(0, target_positions)
            sampled_T = torch.empty_like(targets_T)
            where: dict[str, Any] = {"positions": target_positions, "shape": labels.shape}

            def draw(part: slice, logits: torch.Tensor) -> None:
                sampled_T[part] = self._sample(logits, targets_T[part], sample_uniforms[part], temperature)

            with torch.set_grad_enabled(torch.is_grad_enabled() and stage != "discriminator"):
                given = isolated_inputs(self.generator, input_ids=input_ids, attention_mask=attention_mask, **inputs)
                with self.output_map.losses(in_chunks=self.training and stage != "discriminator") as judge:
                    read_TX = self.generator_head(self.generator, target_positions, **given)
                if stage == "discriminator":
                    draw(slice(None), read_TX)
                else:
                    nll_T = judge(read_TX, targets_T, look=draw)
                    output.losses["mlm"] = sum_of_targets(nll_T, targets_T, **where)
            written = original_BL.flatten().index_copy(0, target_positions, sampled_T).view_as(original_BL)
            # Fillers of a fixed shape point at positions that were not selected: those stay as they are.
            output.replaced_ids = torch.where(labels == IGNORED, original_BL, written)
            if not self.training:
                output.metrics["mlm_accuracy"] = masked_lm_accuracy(read_TX.argmax(-1), targets_T, **where)
                output.metrics["sampled_accuracy"] = masked_lm_accuracy(sampled_T, targets_T, **where)
        if stage != "generator":
            self._detect(output, original_BL, attention_mask, inputs)
        return output

    def _sample(
        self, logits: torch.Tensor, targets: torch.Tensor, uniforms: torch.Tensor, temperature: torch.Tensor | None
    ) -> torch.Tensor:
        """Draw what stands at the targets in the discriminator's input, ``[T]``."""
        return sample_tokens(
            logits,
            uniforms,
            temperature=self.config.temperature if temperature is None else temperature,
            excluded=self.excluded_tokens,
            disallowed=targets.clamp(min=0) if self.config.disallow_correct else None,
        )

    def _detect(
        self,
        output: ReplacedTokenDetectionOutput,
        original: torch.Tensor,
        attention_mask: torch.Tensor,
        inputs: dict[str, Any],
    ) -> None:
        """Run the discriminator on the samples."""
        assert output.replaced_ids is not None, "they are given, or the generator has just drawn them"
        is_replaced_BL = output.replaced_ids.ne(original)
        model_inputs = isolated_inputs(
            self.discriminator, input_ids=output.replaced_ids, attention_mask=attention_mask, **inputs
        )
        states = self.discriminator(**model_inputs)
        if self.discriminator_head is None:
            logits_BL = states.logits.reshape(original.shape)
        else:
            first = _first_columns(attention_mask, inputs.get("position_ids"))
            logits_BL = self.discriminator_head(states.last_hidden_state, first)
        output.losses["rtd"] = binary_token_loss(logits_BL, is_replaced_BL, mask=attention_mask)
        replaced_B = (is_replaced_BL & (attention_mask != 0)).sum(dim=1).float()
        output.metrics["fake_rate"] = ExampleSum(replaced_B, output.losses["rtd"].count)
        if not self.training:
            output.scores = logits_BL.float()
            output.score_labels = is_replaced_BL.long().masked_fill(attention_mask == 0, IGNORED)


def _first_columns(attention_mask: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return the column of the first token of each token's document, ``[B, L]``, or of each row, ``[B, 1]``."""
    if position_ids is None:
        return attention_mask.argmax(dim=1, keepdim=True)
    columns_L = torch.arange(position_ids.shape[1], device=position_ids.device)
    return (columns_L - position_ids).clamp(min=0)
