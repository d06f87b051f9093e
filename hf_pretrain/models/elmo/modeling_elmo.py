"""ELMo: the model, the two language models that it is trained as, and classifiers on its layers.

Each direction has its own stack of LSTMs, which sees nothing of the other one. They share the vectors of words below them and
the softmax above them. A direction is read in its own order: rows are turned round for the backward one, and padding always
comes last.

In the shapes: B rows, T words, K characters of a word, P width of a direction, C cells, L layers, V words of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_elmo import ElmoConfig
from .layers_elmo import CharacterEmbedding, ElmoLSTM, Highway, TokenEmbedding
from .scalar_mix import ScalarMix
from .softmax_elmo import IGNORED, AdaptiveSoftmax, Negatives, WordSoftmax, find_target_rows

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


@dataclass
class ElmoModelOutput(ModelOutput):
    """Output of [`ElmoModel`].

    Attributes:
        last_hidden_state: ``[B, T, 2P]`` the last layer: the forward direction, then the backward one. Zeros at padding.
        hidden_states: The same of the words, which are both halves of the first entry, and of each layer; L + 1 tensors.
        states: ``[L, 2, B, P + C]`` what each LSTM goes on from, if that was asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    states: torch.Tensor | None = None


@dataclass
class ElmoForPreTrainingOutput(ModelOutput):
    """Output of [`ElmoForPreTraining`].

    Attributes:
        loss: Mean of the two directions' mean losses, in nats.
        forward_logits: ``[B, T, V]`` scores of the word after each.
        backward_logits: ``[B, T, V]`` scores of the word before each.
        hidden_states: As of the model.
        states: As of the model.
    """

    loss: torch.Tensor | None = None
    forward_logits: torch.Tensor | None = None
    backward_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    states: torch.Tensor | None = None


class _Rows(NamedTuple):
    """How the words of each row are read: ``[B, T]`` their columns in reading order, and back; ``[B]`` how many there are."""

    order: torch.Tensor
    back: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, direction: Direction) -> _Rows:
        """Words come first in the order of the direction, then padding."""
        is_padding_BT = (attention_mask == 0).long()
        if direction == "forward":
            order = is_padding_BT.argsort(dim=1, stable=True)
        else:
            order = attention_mask.shape[1] - 1 - is_padding_BT.flip(1).argsort(dim=1, stable=True)
        return cls(order, order.argsort(dim=1), (1 - is_padding_BT).sum(1))


class ElmoPreTrainedModel(PreTrainedModel):
    """What the ELMo models share: initialization and the table of words."""

    config_class = ElmoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["ElmoLSTM", "CharacterEmbedding"]  # noqa: RUF012
    _auto_class: str | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ElmoLSTM):
            bound = module.hidden_size**-0.5
            for name, parameter in module.named_parameters():
                if name.startswith("bias_ih"):
                    # As TensorFlow's, the cells forget little in the beginning.
                    forget = torch.zeros(4, module.hidden_size)
                    forget[1] = 1.0
                    init.copy_(parameter, forget.flatten())
                elif name.startswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.uniform_(parameter, -bound, bound)
        elif isinstance(module, Highway):
            for linear in (module.gate, module.transform):
                init.normal_(linear.weight, std=linear.in_features**-0.5)
                init.constant_(linear.bias, -2.0 if linear is module.gate else 0.0)
        elif isinstance(module, CharacterEmbedding):
            init.uniform_(module.table.weight, -1.0, 1.0)
            init.normal_(module.projection.weight, std=module.projection.in_features**-0.5)
            init.zeros_(module.projection.bias)
            for convolution in module.convolutions:
                assert isinstance(convolution, nn.Conv1d)
                init.normal_(convolution.weight, std=(convolution.kernel_size[0] * convolution.in_channels) ** -0.5)
                init.zeros_(convolution.bias)
        elif isinstance(module, TokenEmbedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, ScalarMix):
            init.zeros_(module.weights)
            init.ones_(module.gamma)
        elif isinstance(module, (WordSoftmax, AdaptiveSoftmax)):
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    init.normal_(part.weight, std=part.in_features**-0.5)
                    if part.bias is not None:
                        init.zeros_(part.bias)
        elif isinstance(module, nn.Linear) and module is getattr(self, "classifier", None):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that gives words their vectors."""
        return self.base_model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace what `get_input_embeddings` returns."""
        self.base_model.embeddings = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse: another vocabulary has other characters, and a softmax sorted by frequency.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "resize_token_embeddings: ELMo's vocabulary cannot be resized: build a model of another vocab_size"
        )


class ElmoModel(ElmoPreTrainedModel):
    """ELMo without the softmax: all layers of both directions.

    A row of words is read as `character_ids`, which know every word, or as `input_ids`, ids of the vocabulary. [`ElmoTokenizer`]
    makes both. Words that stand at the border of a sentence should have the marks that it puts there beside them.

    Source: Peters et al., "Deep contextualized word representations" (2018), section 3.
    """

    _auto_class = "AutoModel"
    # A checkpoint of the language models has a softmax too.
    _keys_to_ignore_on_load_unexpected = [r"^softmax\."]  # noqa: RUF012

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config)
        self.embeddings = (CharacterEmbedding if config.embedding_type == "characters" else TokenEmbedding)(config)
        self.forward_layers = nn.ModuleList([ElmoLSTM(config) for _ in range(config.num_hidden_layers)])
        self.backward_layers = nn.ModuleList([ElmoLSTM(config) for _ in range(config.num_hidden_layers)])
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # Of a stateful model, the states of as many rows as the largest batch had.
        self._kept: torch.Tensor | None = None
        self.post_init()

    def empty_states(self, batch_size: int) -> torch.Tensor:
        """Return the states with which a text begins: zeros ``[L, 2, B, P + C]``."""
        config = self.config
        shape = (config.num_hidden_layers, 2, batch_size, config.projection_size + config.cell_size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def reset_states(self) -> None:
        """Let a stateful model begin anew."""
        self._kept = None

    def read(
        self,
        words: torch.Tensor,
        direction: Direction,
        states: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run the layers of one direction.

        Args:
            words: ``[B, T, P]`` vectors of words in the order of the direction, padding last.
            direction: "forward" or "backward"; only the weights differ.
            states: ``[L, B, P + C]``; zeros if None.
            lengths: ``[B]`` words of each row; None if all are T long, or the new states are of no use.

        Returns:
            ``[B, T, P]`` of each layer, and the new states.
        """
        layers = self.forward_layers if direction == "forward" else self.backward_layers
        hidden, found, new = words, [], []
        for number, layer in enumerate(layers):
            assert isinstance(layer, ElmoLSTM)
            inputs = self.dropout(hidden)
            hidden, state = layer.read(inputs, None if states is None else states[number], lengths)
            if number and self.config.use_skip_connections:
                hidden = hidden + inputs
            found.append(hidden)
            new.append(state)
        return found, torch.stack(new)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        character_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        return_states: bool = False,
        output_hidden_states: bool | None = None,
    ) -> ElmoModelOutput:
        """Read rows of words in both directions.

        Args:
            input_ids: ``[B, T]``; not read where characters are given.
            attention_mask: ``[B, T]``, 0 at padding, which is as if it were not there, on either side. Without it, a word whose
                `character_ids` are all 0 is padding.
            character_ids: ``[B, T, K]``.
            inputs_embeds: ``[B, T, P]`` vectors of words instead.
            states: ``[L, 2, B, P + C]`` what to go on from. The backward direction goes on at the end of the row.
            return_states: Whether to return the new states too; they are, where `states` are given.
            output_hidden_states: Whether to return all layers, which is the default.

        Raises:
            ValueError: If nothing or the wrong thing is given to read.
        """
        words = self._words(input_ids, character_ids, inputs_embeds)
        if attention_mask is None and character_ids is not None:
            attention_mask = (character_ids != 0).any(-1).long()
        is_kept = self.config.stateful and states is None
        if is_kept:
            states = self._take(len(words))
        wants_states = return_states or states is not None
        both, new = [], []
        for number, direction in enumerate(DIRECTIONS):
            rows = None if attention_mask is None else _Rows.of(attention_mask, direction)
            layers, state = self._read_rows(
                words, direction, rows, None if states is None else states[:, number], wants_states
            )
            both.append(layers)
            new.append(state)
        hidden_states = tuple(torch.cat(pair, dim=-1) for pair in ((words, words), *zip(*both, strict=True)))
        if attention_mask is not None:
            hidden_states = tuple(layer * (attention_mask != 0).unsqueeze(-1) for layer in hidden_states)
        found = torch.stack(new, dim=1) if wants_states else None
        if is_kept:
            assert found is not None
            self._keep(found)
        return ElmoModelOutput(
            last_hidden_state=self.dropout(hidden_states[-1]),
            hidden_states=None if output_hidden_states is False else hidden_states,
            states=found if not is_kept or return_states else None,
        )

    def _words(
        self, input_ids: torch.Tensor | None, character_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the vectors of the words ``[B, T, P]``."""
        if inputs_embeds is not None:
            if input_ids is not None or character_ids is not None:
                raise ValueError("inputs_embeds: leave input_ids and character_ids out")
            return inputs_embeds
        reads_characters = self.config.embedding_type == "characters" and character_ids is not None
        if input_ids is None and not reads_characters:
            raise ValueError("input_ids, character_ids: give one of them; a table of tokens needs input_ids")
        if not reads_characters and not self.config.vocab_size:
            raise ValueError("input_ids: this model has no vocabulary (vocab_size=0): give character_ids")
        vectors: torch.Tensor = self.embeddings(input_ids, character_ids if reads_characters else None)
        return vectors

    def _read_rows(
        self,
        words: torch.Tensor,
        direction: Direction,
        rows: _Rows | None,
        states: torch.Tensor | None,
        wants_states: bool,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run one direction on rows as they are written; return its layers in that order, and its states."""
        if rows is None:
            turned = words.flip(1) if direction == "backward" else words
            layers, new = self.read(turned, direction, states)
            return [layer.flip(1) for layer in layers] if direction == "backward" else layers, new
        turned = words.take_along_dim(rows.order.unsqueeze(-1), dim=1)
        layers, new = self.read(turned, direction, states, rows.lengths if wants_states else None)
        return [layer.take_along_dim(rows.back.unsqueeze(-1), dim=1) for layer in layers], new

    def _take(self, batch_size: int) -> torch.Tensor:
        """Return the states that were kept for the first rows, zeros for rows that are new."""
        states = self.empty_states(batch_size)
        if self._kept is not None:
            known = min(batch_size, self._kept.shape[2])
            states[:, :, :known] = self._kept[:, :, :known].to(states)
        return states

    def _keep(self, states: torch.Tensor) -> None:
        rest = None if self._kept is None else self._kept[:, :, states.shape[2] :]
        kept = states.detach()
        self._kept = kept if rest is None else torch.cat([kept, rest.to(kept)], dim=2)


class ElmoForPreTraining(ElmoPreTrainedModel):
    """ELMo with its softmax: the word after each from those before it, and the word before each from those after it."""

    _auto_class = "AutoModelForPreTraining"
    accepts_loss_kwargs = False

    def __init__(self, config: ElmoConfig) -> None:
        if not config.vocab_size:
            raise ValueError("vocab_size=0: a model that predicts words needs a vocabulary")
        super().__init__(config)
        self.model = ElmoModel(config)
        self.softmax = (AdaptiveSoftmax if config.softmax == "adaptive" else WordSoftmax)(config)
        self.post_init()

    def token_losses(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        target_rows: list[torch.Tensor] | None = None,
        negatives: Negatives | None = None,
    ) -> torch.Tensor:
        """Return minus the log-probability of each target.

        Args:
            states: ``[B, T, P]`` of the last layer of one direction.
            targets: ``[B, T]`` ids, -100 for none.
            target_rows: What `find_target_rows` returns; called here, which waits for the device, if not given.
            negatives: Compare with these words alone, if the softmax is sampled.

        Returns:
            ``float32 [B, T]`` in nats; 0 where there is no target.
        """
        rows, *tails = find_target_rows(targets, self.config) if target_rows is None else target_rows
        found = states.flatten(0, 1).index_select(0, rows)
        losses = self.softmax.nll(found, targets.flatten().index_select(0, rows), tails, negatives)
        return losses.new_zeros(targets.numel()).index_copy(0, rows, losses).view(targets.shape)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        character_ids: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_states: bool = False,
    ) -> ElmoForPreTrainingOutput:
        """Score the neighbours of each word.

        Args:
            input_ids: See [`ElmoModel`], as for the others not named here.
            attention_mask: See there.
            character_ids: See there.
            states: See there.
            labels: ``[B, T]``, the inputs, -100 where a word is not to be predicted; shifted here, one way for each direction.
                In training there are no scores beside the loss.
            return_states: See there.

        Raises:
            ValueError: If nothing is given to read.
        """
        outputs = self.model(
            input_ids, attention_mask, character_ids, states=states, return_states=return_states, return_dict=True
        )
        halves = outputs.last_hidden_state.chunk(2, dim=-1)
        loss, logits = None, (None, None)
        if labels is not None:
            losses = []
            for half, targets in zip(halves, shifted_labels(labels), strict=True):
                count = (targets != IGNORED).sum().clamp(min=1)
                losses.append(self.token_losses(half, targets).sum() / count)
            loss = torch.stack(losses).mean()
        if labels is None or not self.training:
            logits = tuple(self.softmax.log_prob(half.flatten(0, 1)).unflatten(0, half.shape[:2]) for half in halves)
        return ElmoForPreTrainingOutput(
            loss=loss,
            forward_logits=logits[0],
            backward_logits=logits[1],
            hidden_states=outputs.hidden_states,
            states=outputs.states,
        )


def shifted_labels(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels of the forward and of the backward direction, ``[B, T]`` each: the next one and the one before."""
    none = torch.full_like(labels[:, :1], IGNORED)
    return torch.cat([labels[:, 1:], none], dim=1), torch.cat([none, labels[:, :-1]], dim=1)


class _ElmoClassifier(ElmoPreTrainedModel):
    """ELMo with a weighted mean of its layers and a linear layer."""

    accepts_loss_kwargs = False
    # The class of the output, and the name by which the loss of transformers takes the logits.
    _output: Any = TokenClassifierOutput
    _logits = "logits"

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ElmoModel(config)
        self.mix = ScalarMix(config.num_hidden_layers + 1, dropout=config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _pool(self, mixed: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return mixed

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        character_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Classify words or texts.

        Args:
            input_ids: See [`ElmoModel`], as for the masks and the characters.
            attention_mask: See there.
            character_ids: See there.
            labels: Of words, ``[B, T]`` classes, -100 where there is none. Of texts, ``[B]`` classes, or values ``[B, labels]``,
                as `problem_type` says.
        """
        if attention_mask is None and character_ids is not None:
            attention_mask = (character_ids != 0).any(-1).long()
        hidden_states = self.model(input_ids, attention_mask, character_ids, return_dict=True).hidden_states
        logits = self.classifier(self._pool(self.mix(hidden_states, attention_mask), attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, config=self.config, **{self._logits: logits})
        return self._output(loss=loss, logits=logits, hidden_states=hidden_states)


class ElmoForTokenClassification(_ElmoClassifier):
    """ELMo with a classifier of words."""

    _auto_class = "AutoModelForTokenClassification"


class ElmoForSequenceClassification(_ElmoClassifier):
    """ELMo with a classifier of texts, on the mean of their words."""

    _auto_class = "AutoModelForSequenceClassification"
    _output = SequenceClassifierOutput
    _logits = "pooled_logits"

    def _pool(self, mixed: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is None:
            return mixed.mean(1)
        weights = (attention_mask != 0).unsqueeze(-1).to(mixed.dtype)
        return (mixed * weights).sum(1) / weights.sum(1).clamp(min=1)


__all__ = [
    "ElmoForPreTraining",
    "ElmoForSequenceClassification",
    "ElmoForTokenClassification",
    "ElmoModel",
    "ElmoPreTrainedModel",
]
