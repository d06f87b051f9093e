"""Heads on a stock encoder: which one a stock model has, and those of pre-training that transformers does not have.

The order: the kind of a stock head, and how predictions of spans and entities are compared; the stock classes with a second head;
then the heads of this library, for pairs, for the boundary of spans and for discriminators.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_PRETRAINING_MAPPING
from transformers.utils import ModelOutput

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.backbone import shared_options
from hf_pretrain.modeling.loading import find_file, from_config, read_safetensors, say_once

HeadKind = Literal["none", "masked_lm", "classification", "regression", "token_classification", "question_answering"]

# Low enough for the softmax to be 0, and finite, so that no difference of two is undefined.
_IMPOSSIBLE = -1e9


def head_kind(model: PreTrainedModel) -> HeadKind:
    """Return what a stock model predicts; the head of a classifier of whole sequences with one output is a regression's."""
    name = type(model).__name__
    if "ForQuestionAnswering" in name:
        return "question_answering"
    if "ForTokenClassification" in name:
        return "token_classification"
    if model.get_output_embeddings() is not None:
        return "masked_lm"
    if model.base_model is model:
        return "none"
    return "regression" if model.config.num_labels == 1 else "classification"


@torch.no_grad()
def with_head(model: PreTrainedModel, auto_class: Any, **changes: Any) -> PreTrainedModel:
    """Return a stock model as a class with a head: itself if it has that head, else a copy that begins with a fresh one.

    Args:
        model: Any model of an architecture that the class knows, such as the encoder alone.
        auto_class: The Auto class of the head.
        **changes: Values of the copy's configuration.

    Raises:
        InputError: If the class does not know the architecture, or a weight of the encoder is missing.
    """
    known = auto_class._model_mapping.get(type(model.config), ())
    if isinstance(model, known):
        return model
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    target: PreTrainedModel = from_config(auto_class, config)
    prefix = f"{target.base_model_prefix}." if model.base_model is model else ""
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    own = target.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    target.load_state_dict(fitting, strict=False)
    target.tie_weights()
    tied = target.all_tied_weights_keys
    target.fresh_parameters = tuple(name for name in own if name not in fitting and name not in tied)
    body = next((f"{name}." for name, part in target.named_modules() if part is target.base_model), "")
    # A pooler belongs to a head: encoders come without.
    lost = [name for name in target.fresh_parameters if name.startswith(body) and body and ".pooler." not in name]
    if lost:
        raise InputError(f"{type(model).__name__} has no weight {lost[0]}: give a {type(target).__name__}")
    say_once(
        f"{type(model).__name__} has no such head: a {type(target).__name__} of its weights begins with a fresh one"
    )
    return target


def boundary_logits(logits: torch.Tensor, positions: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return what each text's start and its end are chosen from, where all other positions are impossible.

    Args:
        logits: ``[T, 2]`` logits of a start and of an end at each of the positions where a span may begin or end.
        positions: ``[T]`` flat row-major positions of the logits.
        shape: ``(B, L)`` of the batch.

    Returns:
        ``[2B, L]``: of each text the start, then the end.
    """
    batch, length = shape
    everywhere = logits.new_full((batch * length, 2), _IMPOSSIBLE).index_copy(0, positions, logits)
    return everywhere.view(batch, length, 2).transpose(1, 2).flatten(0, 1)


def span_scores(guesses: torch.Tensor, answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compare spans with those of the labels, the first and the last token each.

    Args:
        guesses: ``[B, 2]`` positions of starts and ends; the end may lie before the start, and there is no span then.
        answers: ``[B, 2]``, true spans.

    Returns:
        ``[B]`` by name: `exact_match`, 1 or 0, and `f1`, the overlap: the harmonic mean of the shares of both in common.
    """
    (begins, ends), (first, last) = guesses.unbind(1), answers.unbind(1)
    common = (torch.minimum(ends, last) - torch.maximum(begins, first) + 1).clamp(min=0)
    lengths = (ends - begins + 1).clamp(min=0) + (last - first + 1)
    exact = (guesses == answers).all(dim=1).float()
    return {"exact_match": exact, "f1": 2 * common / lengths.clamp(min=1)}


def entity_counts(guesses: torch.Tensor, labels: torch.Tensor, *, outside: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numerator and denominator of the F1 of tokens of entities, to be summed before they are divided.

    Args:
        guesses: ``[T]`` classes.
        labels: ``[T]`` true classes, none of them missing.
        outside: The class of tokens that belong to no entity, often called "O".

    Returns:
        ``[T]`` twice the hits, and what was guessed to be of an entity plus what is of one.
    """
    is_guess, is_entity = guesses != outside, labels != outside
    return 2 * ((guesses == labels) & is_entity), is_guess.long() + is_entity.long()


# What the stock classes with a second head call its labels.
_PAIR_LABELS = frozenset({"next_sentence_label", "sentence_order_label"})


def takes_pair_labels(model_class: type[PreTrainedModel]) -> bool:
    """Return whether a stock class has a head for two segments beside its masked-LM head, as BERT's and ALBERT's have."""
    return not _PAIR_LABELS.isdisjoint(inspect.signature(model_class.forward).parameters)


def stock_class(config: PreTrainedConfig, *, heads: Sequence[str], pair_classes: int = 2) -> Any:
    """Return the Auto class that has the most of the heads for an architecture.

    Args:
        config: Configuration of the encoder.
        heads: Names of the heads.
        pair_classes: Relations between two segments; the stock heads know two.
    """
    known = MODEL_FOR_PRETRAINING_MAPPING.get(type(config), None)
    has_pair_head = known is not None and takes_pair_labels(known)
    wants_it = "pair" in heads and pair_classes == 2
    return AutoModelForPreTraining if wants_it and has_pair_head else AutoModelForMaskedLM


def pair_logits(output: ModelOutput) -> torch.Tensor:
    """Return the logits ``[B, 2]`` that the pair head of a stock class left beside those of its masked-LM head."""
    (name,) = (name for name in output if name.endswith("_logits") and name != "prediction_logits")
    logits: torch.Tensor = output[name]
    return logits


def load_head(head: PreTrainedModel, name: str, *, folder: str) -> bool:
    """Fill a head with the weights that an export of this library holds, if they are of its form.

    Args:
        head: The head.
        name: Folder or repository of the export.
        folder: Folder in it.

    Returns:
        Whether it was filled; otherwise it is as it was.
    """
    path = find_file(name, "model.safetensors", subfolder=folder)
    if path is None:
        return False
    state = read_safetensors(path)
    shapes = {key: value.shape for key, value in state.items()}
    if shapes != {key: value.shape for key, value in head.state_dict().items()}:
        return False
    head.load_state_dict(state)
    return True


@strict
class PairHeadConfig(PreTrainedConfig):
    """Configuration of [`PairHead`].

    Attributes:
        num_classes: Number of relations between two segments.
        hidden_size: Width of the states.
        hidden_dropout_prob: Dropout before the last layer.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "hf_pretrain_pair_head"

    num_classes: int = 2
    hidden_size: int = 256
    hidden_dropout_prob: float = 0.0
    initializer_range: float = 0.02


class PairHead(PreTrainedModel):
    """Tells from the state of the first token how the two segments of a sequence belong together."""

    config_class = PairHeadConfig
    main_input_name = "hidden_states"

    def __init__(self, config: PairHeadConfig) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)
        self.post_init()

    @classmethod
    def for_encoder(cls, config: PreTrainedConfig, *, num_classes: int) -> PairHead:
        """Build a head for an encoder with this configuration."""
        options = shared_options(config, "hidden_size", "hidden_dropout_prob", "initializer_range")
        return cls(PairHeadConfig(num_classes=num_classes, **options))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return ``[B, C]`` logits from the first tokens' states, ``[B, D]``."""
        pooled_BD = torch.tanh(self.dense(hidden_states))
        return self.classifier(self.dropout(pooled_BD))


@strict
class SpanBoundaryHeadConfig(PreTrainedConfig):
    """Configuration of [`SpanBoundaryHead`].

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: Width of the states.
        embedding_size: Width of the word table.
        span_positions: Positions in a span that have an embedding.
        position_size: Width of those embeddings.
        layer_norm_eps: Epsilon of the norms.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "hf_pretrain_span_boundary_head"

    vocab_size: int = 30522
    hidden_size: int = 256
    embedding_size: int = 256
    span_positions: int = 20
    position_size: int = 200
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


class SpanBoundaryHead(PreTrainedModel):
    """Predicts a token of a hidden span from the states of the two tokens around it and its position in the span.

    The states and an embedding of the position, joined, go through two layers (linear, GELU, norm). The output layer is the word
    table of the encoder, which is handed over in each call, so that it is neither trained nor saved twice, and a bias. Where
    the word table is narrower than the states, the second layer leads down to its width.

    Source: Joshi et al. 2020, "SpanBERT: Improving Pre-training by Representing and Predicting Spans", section 3.2; the width
    and the number of the positions are those of the published training.
    """

    config_class = SpanBoundaryHeadConfig
    main_input_name = "left_states"

    def __init__(self, config: SpanBoundaryHeadConfig) -> None:
        super().__init__(config)
        width, table_width = config.hidden_size, config.embedding_size
        self.position_embeddings = nn.Embedding(config.span_positions, config.position_size)
        self.dense_in = nn.Linear(2 * width + config.position_size, width)
        self.norm_in = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dense_out = nn.Linear(width, table_width)
        self.norm_out = nn.LayerNorm(table_width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    @classmethod
    def for_encoder(cls, encoder: PreTrainedModel, *, span_positions: int) -> SpanBoundaryHead:
        """Build a head for a stock model."""
        vocab_size, table_width = encoder.get_input_embeddings().weight.shape
        options = shared_options(encoder.config, "hidden_size", "layer_norm_eps", "initializer_range")
        sizes = {"vocab_size": vocab_size, "embedding_size": table_width, "span_positions": span_positions}
        return cls(SpanBoundaryHeadConfig(**sizes, **options))

    def forward(
        self, left_states: torch.Tensor, right_states: torch.Tensor, offsets: torch.Tensor, word_table: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of the hidden tokens.

        Args:
            left_states: ``[S, D]`` states of the last tokens before the spans.
            right_states: ``[S, D]`` states of the first tokens after them.
            offsets: ``[S]`` positions in the spans, from 0.
            word_table: ``[V, E]`` word embeddings of the encoder.

        Returns:
            ``[S, V]`` logits.
        """
        around = torch.cat([left_states, right_states, self.position_embeddings(offsets)], dim=-1)
        hidden_SD = self.norm_in(F.gelu(self.dense_in(around)))
        hidden_SE = self.norm_out(F.gelu(self.dense_out(hidden_SD)))
        return F.linear(hidden_SE, word_table, self.bias)


DISCRIMINATOR_HEAD_FOLDER = "pretraining/discriminator_head"
DISCRIMINATOR_HEADS = ("stock", "electra", "deberta_v3")


@strict
class DiscriminatorHeadConfig(PreTrainedConfig):
    """Configuration of [`DiscriminatorHead`].

    Attributes:
        kind: "electra": dense, activation, linear; "deberta_v3": the state of the first token is added to every other's and the
            sum normalised before that.
        hidden_size: Width of the states.
        hidden_act: Activation.
        layer_norm_eps: Epsilon of the norm.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "hf_pretrain_discriminator_head"

    kind: str = "electra"
    hidden_size: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


class DiscriminatorHead(PreTrainedModel):
    """One logit a token, positive for "replaced", from the states of any encoder.

    Source: `get_discriminator_output` of the official ELECTRA; `LMMaskPredictionHead` of the official DeBERTa.
    """

    config_class = DiscriminatorHeadConfig
    main_input_name = "hidden_states"

    def __init__(self, config: DiscriminatorHeadConfig) -> None:
        super().__init__(config)
        check_choice(config.kind, DISCRIMINATOR_HEADS[1:], name="discriminator_head")
        has_norm = config.kind == "deberta_v3"
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else None
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @classmethod
    def of_kind(cls, kind: str, config: PreTrainedConfig) -> DiscriminatorHead:
        """Build a head for an encoder with this configuration."""
        options = shared_options(config, "hidden_size", "hidden_act", "layer_norm_eps", "initializer_range")
        return cls(DiscriminatorHeadConfig(kind=kind, **options))

    def forward(self, hidden_states: torch.Tensor, first_columns: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits.

        Args:
            hidden_states: `[B, L, D]`.
            first_columns: `[B, L]` (or `[B, 1]`) column of the classification token that a token belongs to, where that is not
                the row's first; only for "deberta_v3".

        Returns:
            `[B, L]` logits.
        """
        if self.LayerNorm is not None:
            first_BLD = hidden_states[:, :1]
            if first_columns is not None:
                first_BLD = hidden_states.gather(1, first_columns[:, :, None].expand(-1, -1, hidden_states.shape[2]))
            hidden_states = self.LayerNorm(hidden_states + first_BLD)
        return self.classifier(self.activation(self.dense(hidden_states))).squeeze(-1)
