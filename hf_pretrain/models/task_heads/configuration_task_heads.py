"""Configuration of an encoder with an architecture for a task on top."""

import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

_AUTO_MAP = {
    "AutoConfig": "configuration_task_heads.TaskHeadConfig",
    "AutoModelForSequenceClassification": "modeling_task_heads.EncoderForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_task_heads.EncoderForTokenClassification",
}


@strict
class TaskHeadConfig(PreTrainedConfig):
    """Configuration of [`EncoderForSequenceClassification`] and [`EncoderForTokenClassification`].

    Args:
        encoder_config: The encoder's own configuration; by default that of a BERT.
        architecture: Name of the architecture on top; see [`register_architecture`].
        architecture_options: Its options, such as `{"lstm_size": 128}` for "bilstm".
        mix_layers: Whether the architecture reads a learned mean of all layers instead of the last one; "scalar_mix" always
            does.
        frozen_encoder: Whether the encoder stays as it is, and has no dropout.
        first_position: Number of the position of a row's first token, for an encoder that counts padding on the left unless it
            is given positions; None for an encoder that has to be given none.
        add_pooling_layer: Whether the encoder has the pooler that its class adds; that of a masked language model has none.
        classifier_dropout: Dropout before the last layer.
        initializer_range: Standard deviation of the weights of new linear layers.

    Raises:
        ValueError: If a value is out of range.
    """

    model_type = "task_head"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")
    }
    # Makes `save_pretrained` write this file next to the weights.
    _auto_class: ClassVar[str | None] = "AutoConfig"

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    architecture: str = "mean"
    architecture_options: dict[str, Any] | None = None
    mix_layers: bool = False
    frozen_encoder: bool = False
    first_position: int | None = None
    add_pooling_layer: bool = True
    classifier_dropout: float | int = 0.1
    initializer_range: float | int = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Name every class, whichever is saved and whatever repository the weights came from."""
        self.architecture_options = dict(self.architecture_options or {})
        kwargs["auto_map"] = dict(_AUTO_MAP)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values of a configuration file; that of an encoder alone is taken for the encoder's own.

        peft reads it so, when it saves an adapter: the model below the adapter is known by the name of its encoder.
        """
        values, rest = super().get_config_dict(*args, **kwargs)
        if values.get("model_type", cls.model_type) != cls.model_type:
            values = {"model_type": cls.model_type, "encoder_config": values}
        return values, rest

    @property
    def encoder(self) -> PreTrainedConfig:
        """The encoder's configuration."""
        assert isinstance(self.encoder_config, PreTrainedConfig)
        return self.encoder_config

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's states."""
        return int(self.encoder.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the encoder."""
        return int(self.encoder.vocab_size)

    def validate_architecture(self) -> None:
        """Check the values that do not depend on the architecture."""
        if not 0 <= self.classifier_dropout < 1:
            raise ValueError(f"classifier_dropout={self.classifier_dropout} must be from 0 to below 1")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range={self.initializer_range} must be positive")

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and the file of the mean of layers, which belongs to ELMo's code.

        A model saves its own code first, then its configuration, then goes to the Hub.

        Args:
            save_directory: The folder.
            push_to_hub: As of `PreTrainedConfig.save_pretrained`.
            **kwargs: As of `PreTrainedConfig.save_pretrained`.
        """
        from .scalar_mix import ScalarMix

        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(str(sys.modules[ScalarMix.__module__].__file__))
        target = Path(save_directory) / "scalar_mix.py"
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)


__all__ = ["TaskHeadConfig"]
