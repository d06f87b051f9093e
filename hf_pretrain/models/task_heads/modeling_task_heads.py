"""An encoder with an architecture for a task on top: of texts, or of tokens.

`from_encoder` puts them together. `model.encoder` stays a stock model, which is saved alone by its own `save_pretrained`.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple, logging

from .architectures_task_heads import _REGISTER, Architecture, find_architecture
from .configuration_task_heads import TaskHeadConfig
from .scalar_mix import ScalarMix

_LOGGER = logging.get_logger(__name__)
# Options of a stock configuration that belong to the head, and go from the encoder's to the whole model's.
_OF_TOKENIZER = ("pad_token_id", "bos_token_id", "eos_token_id")


class _EncoderWithArchitecture(PreTrainedModel):
    """What both models share: the encoder, the mean of its layers, and the architecture."""

    config_class = TaskHeadConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _task = "texts"

    def __init__(self, config: TaskHeadConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        options = config.architecture_options or {}
        found = find_architecture(config.architecture, task=self._task, options=options)
        self.num_labels = config.num_labels
        self.encoder: Any = _build(config.encoder, config.add_pooling_layer) if encoder is None else encoder
        # One configuration for both: a new size of the vocabulary is written into it.
        config.encoder_config = self.encoder.config
        self.supports_gradient_checkpointing = self.encoder.supports_gradient_checkpointing
        depth = int(config.encoder.num_hidden_layers) + 1
        self.scalar_mix = ScalarMix(depth) if config.mix_layers or found.mixes_layers else None
        self.architecture: Architecture = found(
            config.hidden_size,
            config.num_labels,
            per_token=self._task == "tokens",
            dropout=config.classifier_dropout,
            **options,
        )
        self._encoder_inputs = frozenset(inspect.signature(self.encoder.forward).parameters)
        if encoder is not None:
            # These weights are no new ones.
            for module in encoder.modules():
                setattr(module, "_is_hf_initialized", True)  # noqa: B010 (no attribute that the type knows)
        self.post_init()
        if config.frozen_encoder:
            self.encoder.requires_grad_(False)

    @classmethod
    def from_encoder(
        cls,
        encoder: PreTrainedModel | str,
        *,
        architecture: str = "mean",
        architecture_options: dict[str, Any] | None = None,
        frozen: bool = False,
        **options: Any,
    ) -> Self:
        """Put an architecture on an encoder.

        Args:
            encoder: A stock encoder, a stock model with a head, which is left out, or the name of a checkpoint.
            architecture: Name of the architecture, see [`TaskHeadConfig`].
            architecture_options: Its options.
            frozen: Whether the encoder stays as it is, and has no dropout.
            **options: Others of a [`TaskHeadConfig`], such as `num_labels`, `id2label`, `problem_type`, `mix_layers`.

        Returns:
            The model, with the dtype and on the device of the encoder. It holds the encoder that was given, no copy.

        Raises:
            ValueError: If the encoder is none of transformers' own without a decoder, or an option is unknown.
            ImportError: If hf_pretrain is not installed. The code of an export opens what was exported without it.
        """
        try:
            from hf_pretrain.modeling.backbone import note_what_is_counted
        except ImportError as error:
            raise ImportError(
                "from_encoder asks hf_pretrain what the encoder is like: pip install hf_pretrain"
            ) from error
        known = {name for name in inspect.signature(TaskHeadConfig).parameters if name not in ("encoder_config",)}
        unknown = sorted(set(options) - known - {"num_labels"})
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: TaskHeadConfig has no such option")
        encoder = AutoModel.from_pretrained(encoder) if isinstance(encoder, str) else encoder
        encoder = encoder.base_model
        add_pooling_layer = _check_encoder(encoder)
        counts, first = note_what_is_counted(encoder)
        of_tokenizer = {name: getattr(encoder.config, name, None) for name in _OF_TOKENIZER}
        settings: dict[str, Any] = {"first_position": first if counts else None} | of_tokenizer
        settings |= {"name_or_path": encoder.config.name_or_path, "frozen_encoder": frozen, "dtype": encoder.dtype}
        settings |= {"add_pooling_layer": add_pooling_layer}
        settings |= {"architecture": architecture, "architecture_options": architecture_options} | options
        # A copy, because a new configuration sets the attention of those in it.
        config = TaskHeadConfig(encoder_config=copy.deepcopy(encoder.config), **settings)
        model = cls(config, encoder)
        for part in (model.scalar_mix, model.architecture):
            if part is not None:
                part.to(device=encoder.device, dtype=encoder.dtype)
        return model.train(encoder.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Open a checkpoint; see `PreTrainedModel.from_pretrained`. A frozen encoder is frozen again."""
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if model.config.frozen_encoder:
            model.encoder.requires_grad_(False)
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if any(module is part for part in self.encoder.modules()):
            # Layers that are drawn anew are drawn as the encoder draws them.
            self.encoder._init_weights(module)
        elif isinstance(module, ScalarMix):
            init.zeros_(module.weights)
            init.ones_(module.gamma)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Conv1d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules; an encoder that is frozen stays without dropout."""
        super().train(mode)
        if self.config.frozen_encoder and not any(weight.requires_grad for weight in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's table of words."""
        module: nn.Module = self.encoder.get_input_embeddings()
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's table of words."""
        self.encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the encoder's table of words; see `PreTrainedModel.resize_token_embeddings`."""
        table: nn.Embedding = self.encoder.resize_token_embeddings(*args, **kwargs)
        return table

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the weights with the code; see `PreTrainedModel.save_pretrained`."""
        module = type(self.architecture).__module__
        if module != Architecture.__module__:
            _LOGGER.warning_once(
                f"architecture={self.config.architecture!r} is registered by the module {module}: import it before this model is "
                "opened, its code is not exported"
            )
        super().save_pretrained(save_directory, **kwargs)

    def _read(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        **inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return what the architecture reads, ``[B, L, D]``, its mask ``[B, L]``, and the encoder's output."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("input_ids is missing: give input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has the shape {tuple(attention_mask.shape)}: give [B, L]")
        mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        offset = self.config.first_position
        if attention_mask is not None:
            mask = attention_mask != 0
            if inputs.get("position_ids") is None and offset is not None:
                columns = torch.arange(mask.shape[1], device=mask.device)
                inputs["position_ids"] = (columns - mask.to(torch.int8).argmax(1, keepdim=True)).clamp(min=0) + offset
        inputs["output_hidden_states"] = bool(inputs.get("output_hidden_states")) or self.scalar_mix is not None
        kept = {
            name: value
            for name, value in inputs.items()
            # A tokenizer may make token types that the encoder knows nothing of: its stock heads do not read them either.
            if value is not None and not (name == "token_type_ids" and name not in self._encoder_inputs)
        }
        text = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        outputs = self.encoder(**text, attention_mask=attention_mask, return_dict=True, **kept)
        if self.scalar_mix is None:
            return outputs.last_hidden_state, mask, outputs
        return self.scalar_mix(outputs.hidden_states), mask, outputs


def _build(config: PreTrainedConfig, add_pooling_layer: bool) -> PreTrainedModel:
    """Return a new encoder; only an encoder that has a pooler can be built without it."""
    return AutoModel.from_config(config, **({} if add_pooling_layer else {"add_pooling_layer": False}))


def _check_encoder(encoder: PreTrainedModel) -> bool:
    """Refuse what an export could not open, or has no states of its own, and return whether the pooler is there.

    Raises:
        ValueError: Naming the encoder and the fix.
    """
    name, config = type(encoder).__name__, encoder.config
    cure = "give a stock encoder, such as AutoModel.from_pretrained('google-bert/bert-base-uncased')"
    if not type(encoder).__module__.startswith("transformers."):
        raise ValueError(f"encoder={name} is no class of transformers, so an export could not open it: {cure}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"encoder={name} has a decoder: {cure}")
    takes = "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters
    for add_pooling_layer in (True, False)[: 1 + takes]:
        with torch.device("meta"):
            opened = _build(copy.deepcopy(config), add_pooling_layer)
        if type(opened) is type(encoder) and opened.state_dict().keys() == encoder.state_dict().keys():
            return add_pooling_layer
    raise ValueError(f"encoder={name}: AutoModel opens its checkpoints as another {type(opened).__name__}: {cure}")


class EncoderForSequenceClassification(_EncoderWithArchitecture):
    """A stock encoder with an architecture that classifies texts, or pairs of texts, or gives them values.

    >>> model = EncoderForSequenceClassification.from_encoder("my-bert", architecture="cnn", num_labels=3)
    """

    _auto_class = "AutoModelForSequenceClassification"
    _task = "texts"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pair_input_ids: torch.Tensor | None = None,
        pair_attention_mask: torch.Tensor | None = None,
        pair_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: ``[B, L]`` ids.
            attention_mask: ``[B, L]``, 0 at padding, which may be on either side.
            token_type_ids: ``[B, L]``; left out where the encoder takes none.
            position_ids: ``[B, L]``; by default a row's first token has the first position.
            inputs_embeds: ``[B, L, D]`` instead of ids.
            pair_input_ids: ``[B, M]`` ids of the second texts, for "pair_encoder" alone.
            pair_attention_mask: ``[B, M]``, the same of these.
            pair_token_type_ids: ``[B, M]``, the same of these.
            labels: ``[B]`` classes, or values ``[B, labels]``, as `problem_type` says.
            output_attentions: Whether to return the encoder's attention.
            output_hidden_states: Whether to return its layers.

        Returns:
            `loss`, `logits` ``[B, C]``, and the encoder's `hidden_states` and `attentions` of the first texts.

        Raises:
            ValueError: If the second texts are missing, or there are some for an architecture that reads one.
        """
        is_pair = pair_input_ids is not None
        if is_pair != self.architecture.reads_pairs:
            names = [name for name, each in _REGISTER.items() if each.reads_pairs]
            raise ValueError(
                f"architecture={self.config.architecture!r} reads one text, but there are pair_input_ids: choose one of "
                f"{', '.join(names)}"
                if is_pair
                else f"pair_input_ids is missing: architecture={self.config.architecture!r} reads two texts apart; give those of "
                "encode_text_pairs and DataCollatorForTextPairs"
            )
        states, mask, outputs = self._read(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        others: tuple[torch.Tensor, ...] = ()
        if is_pair:
            others = self._read(pair_input_ids, pair_attention_mask, token_type_ids=pair_token_type_ids)[:2]
        logits = self.architecture(states, mask, *others)
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.get("attentions"),
        )


class EncoderForTokenClassification(_EncoderWithArchitecture):
    """A stock encoder with an architecture that classifies tokens.

    >>> model = EncoderForTokenClassification.from_encoder("my-bert", architecture="bilstm", num_labels=9)
    """

    _auto_class = "AutoModelForTokenClassification"
    _task = "tokens"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> TokenClassifierOutput:
        """Classify tokens.

        Args:
            input_ids: See [`EncoderForSequenceClassification`], as for the masks, the types and the positions.
            attention_mask: See there.
            token_type_ids: See there.
            position_ids: See there.
            inputs_embeds: See there.
            labels: ``[B, L]`` classes, -100 where there is none.
            output_attentions: Whether to return the encoder's attention.
            output_hidden_states: Whether to return its layers.

        Returns:
            `loss`, `logits` ``[B, L, C]``, and the encoder's `hidden_states` and `attentions`.
        """
        states, mask, outputs = self._read(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.architecture(states, mask)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.get("attentions"),
        )


__all__ = ["EncoderForSequenceClassification", "EncoderForTokenClassification"]
