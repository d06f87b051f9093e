"""Configuration of ELMo."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_elmo.ElmoConfig",
    "AutoModel": "modeling_elmo.ElmoModel",
    "AutoModelForPreTraining": "modeling_elmo.ElmoForPreTraining",
    "AutoModelForTokenClassification": "modeling_elmo.ElmoForTokenClassification",
    "AutoModelForSequenceClassification": "modeling_elmo.ElmoForSequenceClassification",
}
# Width and number of the convolutions of every published model.
_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
_CHOICES = {
    "embedding_type": ("characters", "tokens"),
    "character_activation": ("relu", "tanh"),
    "softmax": ("full", "sampled", "adaptive"),
}


@strict
class ElmoConfig(PreTrainedConfig):
    """Configuration of [`ElmoModel`]; the defaults are the published model's, but for vocabulary and clipping.

    Args:
        vocab_size: Number of tokens, the special ones included; 0 for a model that takes `character_ids` alone.
        embedding_type: "characters": convolutions over the characters of a word. "tokens": a table with a row a token, which may
            be a word or a piece of one.
        hidden_size: Width of the states: both directions together, each half as wide.
        cell_size: Width of the cells of an LSTM, before the projection.
        num_hidden_layers: Number of layers of each direction.
        use_skip_connections: Whether each layer but the first adds its input to its output.
        cell_clip: Most that a cell holds, and minus it the least; None for no limit.
        projection_clip: The same of the projected output.
        max_characters: Characters of a word, the marks of its beginning and end included.
        character_embedding_size: Width of the vectors of characters.
        filters: Width and number of each of the convolutions.
        num_highway_layers: Highway layers above them.
        character_activation: "relu" or "tanh", after the maximum over the characters.
        hidden_dropout_prob: Dropout of the input of each layer and of the output of the last one.
        softmax: How the next word is predicted: "full"; "sampled", which is full outside of training; or "adaptive".
        num_samples: Words besides the right one that a sampled softmax compares in a step.
        cutoffs: Ids at which the clusters of the adaptive softmax begin.
        div_value: How much narrower each cluster of the adaptive softmax is than the one before.
        stateful: Whether the model goes on, row by row, from where the last call ended, as the original does. The same text
            read twice then has two results.
        classifier_dropout: Dropout of the weighted mean, before a classifier.
        initializer_range: Standard deviation of the weights of a new classifier.

    Raises:
        ValueError: If sizes or choices do not fit together.

    Source:
        Peters et al., "Deep contextualized word representations" (2018); the code `bilm-tf`.
    """

    model_type = "elmo"
    keys_to_ignore_at_inference = ["states"]  # noqa: RUF012
    # Makes `save_pretrained` write this file next to the weights.
    _auto_class: ClassVar[str | None] = "AutoConfig"

    vocab_size: int = 0
    embedding_type: str = "characters"
    hidden_size: int = 1024
    cell_size: int = 4096
    num_hidden_layers: int = 2
    use_skip_connections: bool = True
    cell_clip: float | int | None = None
    projection_clip: float | int | None = None
    max_characters: int = 50
    character_embedding_size: int = 16
    filters: list[list[int]] | None = None
    num_highway_layers: int = 2
    character_activation: str = "relu"
    hidden_dropout_prob: float | int = 0.1
    softmax: str = "full"
    num_samples: int = 8192
    cutoffs: list[int] | None = None
    div_value: float | int = 4.0
    stateful: bool = False
    classifier_dropout: float | int = 0.5
    initializer_range: float | int = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the filters, and name every class, whichever is saved and whatever repository the weights came from."""
        self.filters = [list(pair) for pair in (self.filters or _FILTERS)]
        self.cutoffs = list(self.cutoffs or [])
        kwargs["auto_map"] = dict(_AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def projection_size(self) -> int:
        """Width of the states of one direction."""
        return self.hidden_size // 2

    def validate_architecture(self) -> None:
        """Check that sizes and choices fit together."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.hidden_size < 2 or self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} must be even: half of it belongs to each direction")
        if self.cell_size <= self.projection_size:
            raise ValueError(
                f"cell_size={self.cell_size} is projected to {self.projection_size} (half of hidden_size): make it larger"
            )
        if self.num_hidden_layers < 1 or self.vocab_size < 0:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers}, vocab_size={self.vocab_size}: too few")
        if not self.vocab_size and self.embedding_type == "tokens":
            raise ValueError("embedding_type='tokens' needs a vocabulary: give vocab_size")
        widest = max(width for width, _ in self.filters or ())
        if not 3 <= self.max_characters <= 50 or widest > self.max_characters:
            raise ValueError(
                f"max_characters={self.max_characters}: give 3 to 50, and at least the width of the filters ({widest})"
            )
        for name in ("cell_clip", "projection_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or None for no limit")
        self._validate_softmax()

    def _validate_softmax(self) -> None:
        cutoffs = self.cutoffs or []
        if (self.softmax == "adaptive") != bool(cutoffs):
            raise ValueError(f"softmax={self.softmax!r} with cutoffs={cutoffs}: give cutoffs for 'adaptive' alone")
        bounds = [0, *cutoffs, self.vocab_size]
        if cutoffs and any(low >= high for low, high in zip(bounds[:-1], bounds[1:], strict=True)):
            raise ValueError(
                f"cutoffs={cutoffs} do not divide the {self.vocab_size} tokens: give ascending ids between 1 and "
                f"{self.vocab_size - 1}"
            )
        if self.num_samples < 1 or self.div_value < 1:
            raise ValueError(f"num_samples={self.num_samples}, div_value={self.div_value}: give at least 1")
        if cutoffs and self.projection_size // self.div_value ** len(cutoffs) < 1:
            raise ValueError(f"div_value={self.div_value} leaves no width to the last cluster: choose a smaller one")


__all__ = ["ElmoConfig"]
