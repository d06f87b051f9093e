"""Configuration of static vectors."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_static_embedding.StaticEmbeddingConfig",
    "AutoModel": "modeling_static_embedding.StaticEmbeddingModel",
}


@strict
class StaticEmbeddingConfig(PreTrainedConfig):
    """Configuration of [`StaticEmbeddingModel`].

    Args:
        vocab_size: Number of tokens, the special ones included.
        hidden_size: Width of the vectors.
        num_hidden_layers: Number of layers above the vectors: none.
        normalize: Whether the vector of a text is divided by its length. model2vec reads this name too.
        method: How the vectors were made, such as "ppmi" or "skipgram"; None if nobody said.
        lowercase: Whether the words are lower-cased; None if nobody said.
        training: Options and facts of the training, as plain data.
        max_length: Most tokens of a text that model2vec reads; None for all, as the other readers of the folder do.
        initializer_range: Standard deviation of new vectors.
        pad_token_id: The padding, which never counts in a mean; None for none.
        unk_token_id: The token of unknown words; its vector is zero unless it was trained. None for none.

    Raises:
        ValueError: If a size is below one.
    """

    model_type = "static_embedding"
    # Makes `save_pretrained` write this file next to the weights.
    _auto_class: ClassVar[str | None] = "AutoConfig"

    vocab_size: int = 32000
    hidden_size: int = 100
    num_hidden_layers: int = 0
    normalize: bool = False
    method: str | None = None
    lowercase: bool | None = None
    training: dict[str, Any] | None = None
    max_length: int | None = None
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 0
    unk_token_id: int | None = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the classes of the folder itself, whatever repository the weights came from."""
        kwargs["auto_map"] = dict(_AUTO_MAP)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the sizes."""
        for name in ("vocab_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number of at least 1")


__all__ = ["StaticEmbeddingConfig"]
