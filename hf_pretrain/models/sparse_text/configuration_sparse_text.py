"""Configuration of sparse vectors of texts."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_sparse_text.SparseTextConfig",
    "AutoModel": "modeling_sparse_text.SparseTextModel",
}


@strict
class SparseTextConfig(PreTrainedConfig):
    """Configuration of [`SparseTextModel`].

    Args:
        vocab_size: Number of tokens, the special ones included.
        hidden_size: Width of the vectors: a column for each word.
        first_word_id: Token of the first column; those before it are special and have no column.
        num_hidden_layers: Number of layers: none.
        method: "onehot" (1 for each word that a text holds), "counts", or "tfidf" (counts times the weights).
        sublinear_tf: Whether a count n is replaced by 1 + ln n.
        normalize: Whether the vector of a text is divided by its length; None does so for "tfidf" alone.
        idf: Convention of the weights, "sklearn" or "textbook".
        min_df: Documents that held a word at least: their number, or their share as a float.
        max_df: Documents that held a word at most, likewise.
        max_features: Most words that were kept; None for no limit.
        lowercase: Whether the words are lower-cased.
        documents: Documents that the vocabulary and the weights come from.
        pad_token_id: The padding, which has no column.
        unk_token_id: The token of unknown words, which has none either.

    Raises:
        ValueError: If the sizes are below one or contradict each other.
    """

    model_type = "sparse_text"
    # Makes `save_pretrained` write this file next to the weights.
    _auto_class: ClassVar[str | None] = "AutoConfig"

    vocab_size: int = 32002
    hidden_size: int = 32000
    first_word_id: int = 2
    num_hidden_layers: int = 0
    method: Literal["onehot", "counts", "tfidf"] = "tfidf"
    sublinear_tf: bool = False
    normalize: bool | None = None
    idf: Literal["sklearn", "textbook"] = "sklearn"
    min_df: int | float = 1
    max_df: int | float = 1.0
    max_features: int | None = None
    lowercase: bool = True
    documents: int = 0
    pad_token_id: int | None = 0
    unk_token_id: int | None = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the classes of the folder itself, whatever repository the weights came from."""
        kwargs["auto_map"] = dict(_AUTO_MAP)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the sizes."""
        if self.hidden_size < 1 or self.vocab_size != self.first_word_id + self.hidden_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be first_word_id={self.first_word_id} and a token for each column of "
                f"hidden_size={self.hidden_size}"
            )


__all__ = ["SparseTextConfig"]
