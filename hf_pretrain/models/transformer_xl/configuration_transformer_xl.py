"""Configuration of Transformer-XL."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_transformer_xl.TransformerXLConfig",
    "AutoModel": "modeling_transformer_xl.TransformerXLModel",
    "AutoModelForCausalLM": "modeling_transformer_xl.TransformerXLForCausalLM",
    "AutoModelForSequenceClassification": "modeling_transformer_xl.TransformerXLForSequenceClassification",
}


@strict
class TransformerXLConfig(PreTrainedConfig):
    """Configuration of [`TransformerXLModel`]; the defaults are the base model of WikiText-103, but for the vocabulary.

    Args:
        vocab_size: Number of tokens. With `cutoffs` they have to be sorted from frequent to rare.
        hidden_size: Width of the layers; even.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads.
        head_dim: Width of a head; by default `hidden_size // num_attention_heads`.
        intermediate_size: Inner width of the feed-forward layers.
        hidden_act: Activation of the feed-forward layers.
        hidden_dropout_prob: Dropout of embeddings, positions, sub-layers and output.
        attention_probs_dropout_prob: Dropout of the attention probabilities ("dropatt").
        mem_len: Number of positions before the segment that the memory holds.
        same_length: Whether every position sees equally many: itself and the `mem_len` before it. Otherwise a position sees
            all of the memory and all that precedes it in its segment. (The paper's PyTorch code counts `mem_len` positions
            *with* the own one, its TensorFlow code counts as here.)
        clamp_len: Distance from which on all distances are represented alike; -1 for none.
        untie_r: Whether each layer has biases u and v of its own, instead of one pair for all layers.
        pre_layer_norm: Whether layer norm is applied to the input of a sub-layer instead of to its output. The memory is then
            normalized too; as in the official code there is no layer norm after the last layer.
        cutoffs: Ids at which a new cluster of the adaptive softmax begins, ascending; none for a plain softmax.
        div_val: Each cluster's embeddings are so many times narrower than those of the one before.
        embedding_size: Width of the first cluster's embeddings; by default `hidden_size`.
        tie_word_embeddings: Whether the output tables are the input tables.
        tie_tail_projections: Whether, where the tables are tied, the projections of all clusters but the first are tied too
            (WikiText-103: yes; One Billion Word: no).
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of the initial weights, and of the layer norms' around 1.
        projection_initializer_range: Standard deviation of the initial embedding projections.
        use_cache: Whether `generate` keeps the keys and values of what it has read.

    Raises:
        ValueError: If sizes or cutoffs do not fit together.

    Source:
        Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (2019), section 3; adaptive input
        embeddings: Baevski and Auli (2019).
    """

    model_type = "transformer_xl"
    keys_to_ignore_at_inference = ["cache", "mems", "mem_lengths"]  # noqa: RUF012
    # Makes `save_pretrained` write this file next to the weights.
    _auto_class: ClassVar[str | None] = "AutoConfig"

    vocab_size: int = 32000
    hidden_size: int = 410
    num_hidden_layers: int = 16
    num_attention_heads: int = 10
    head_dim: int | None = None
    intermediate_size: int = 2100
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    mem_len: int = 150
    same_length: bool = False
    clamp_len: int = -1
    untie_r: bool = False
    pre_layer_norm: bool = False
    cutoffs: list[int] | None = None
    div_val: int = 1
    embedding_size: int | None = None
    tie_word_embeddings: bool = True
    tie_tail_projections: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    projection_initializer_range: float = 0.01
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the rest."""
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.embedding_size = self.embedding_size or self.hidden_size
        self.cutoffs = list(self.cutoffs or [])
        # Every class is named, whichever is saved, and in the folder itself, whatever repository the weights came from.
        kwargs["auto_map"] = dict(_AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def cluster_bounds(self) -> list[tuple[int, int]]:
        """First and one past the last id of each cluster; without cutoffs the one cluster of all tokens."""
        ends = [0, *(self.cutoffs or []), self.vocab_size]
        return list(zip(ends[:-1], ends[1:], strict=True))

    @property
    def cluster_sizes(self) -> list[int]:
        """Width of each cluster's embeddings."""
        assert self.embedding_size is not None
        return [self.embedding_size // self.div_val**cluster for cluster in range(len(self.cluster_bounds))]

    @property
    def sliding_window(self) -> int | None:
        """Number of positions a query sees, its own included, as the caches of transformers count; None for all."""
        return self.mem_len + 1 if self.same_length else None

    def validate_architecture(self) -> None:
        """Check that sizes and cutoffs fit together."""
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd: sines and cosines need an even width")
        if any(start >= end for start, end in self.cluster_bounds):
            raise ValueError(
                f"cutoffs={self.cutoffs} do not divide the {self.vocab_size} tokens: give ascending ids between 1 and "
                f"{self.vocab_size - 1}"
            )
        if self.div_val < 1 or self.cluster_sizes[-1] < 1:
            raise ValueError(
                f"div_val={self.div_val} leaves no width to the last of {len(self.cluster_sizes)} clusters with "
                f"embedding_size={self.embedding_size}: choose a smaller div_val (at least 1) or fewer cutoffs"
            )
        if self.mem_len < (1 if self.same_length else 0):
            raise ValueError(f"mem_len={self.mem_len}: give the length of the memory, at least 1 with same_length")
        if self.clamp_len != -1 and self.clamp_len < 1:
            raise ValueError(f"clamp_len={self.clamp_len}: give a distance of at least 1, or -1 for no clamping")


__all__ = ["TransformerXLConfig"]
