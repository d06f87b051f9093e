"""The architectures that read an encoder's states, and the register of them.

Each is a module with `forward(states [B, L, D], mask [B, L])`, which returns logits ``[B, C]`` of texts or ``[B, L, C]`` of
tokens. What it computes of a row depends neither on padding, on whichever side, nor on the other rows.

In the shapes: B rows, L tokens, D width of the states, C labels, W windows of a convolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

_POOLINGS = ("mean", "max", "cls", "last", "attention")
# The arguments of every architecture; the others are its options.
_COMMON = ("self", "hidden_size", "num_labels", "per_token", "dropout")


class Architecture(nn.Module):
    """Base class of what stands on top of an encoder; a subclass has `forward(states, mask)` and maybe options.

    peft wraps every module called `classifier` or `score` by itself, so a subclass gives its last layer another name.

    Args:
        hidden_size: Width of the encoder's states.
        num_labels: Number of labels.
        per_token: Whether each token has logits, or the whole text.
        dropout: Dropout before the last layer.

    Attributes:
        tasks: "texts", "tokens" or both: what it can have logits of.
        reads_pairs: Whether it reads two texts: `forward(states, mask, pair_states, pair_mask)`.
        mixes_layers: Whether it always reads a learned mean of all layers.
        dropout: Module of the dropout.
    """

    tasks: ClassVar[tuple[str, ...]] = ("texts",)
    reads_pairs: ClassVar[bool] = False
    mixes_layers: ClassVar[bool] = False

    def __init__(self, hidden_size: int, num_labels: int, *, per_token: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.hidden_size, self.num_labels, self.per_token = hidden_size, num_labels, per_token
        self.dropout = nn.Dropout(dropout)


_REGISTER: dict[str, type[Architecture]] = {}
_A = TypeVar("_A", bound=type[Architecture])


def register_architecture(name: str) -> Callable[[_A], _A]:
    """Return a decorator that makes a class known by a name.

    A model with such an architecture opens where the module that registers it has been imported: its code is not exported.

        @register_architecture("first_two")
        class FirstTwo(Architecture):
            def __init__(self, hidden_size, num_labels, **options):
                super().__init__(hidden_size, num_labels, **options)
                self.output = nn.Linear(2 * hidden_size, num_labels)

            def forward(self, states, mask):
                return self.output(states[:, :2].flatten(1))

    Args:
        name: The value of `architecture` in a [`TaskHeadConfig`].

    Raises:
        ValueError: If the class is no [`Architecture`], or another class has the name.
    """

    def register(architecture: _A) -> _A:
        if not (isinstance(architecture, type) and issubclass(architecture, Architecture)):
            raise ValueError(f"register_architecture({name!r}): {architecture!r} must be a subclass of Architecture")
        known = _REGISTER.get(name)
        # The same class again is one that a notebook or a reload defines anew.
        if known is not None and known.__qualname__ != architecture.__qualname__:
            raise ValueError(f"register_architecture({name!r}): {known.__qualname__} has this name; choose another")
        _REGISTER[name] = architecture
        return architecture

    return register


def architectures() -> Mapping[str, type[Architecture]]:
    """Return the classes that are registered by their names."""
    return dict(_REGISTER)


def find_architecture(name: str, *, task: str, options: Mapping[str, Any]) -> type[Architecture]:
    """Return the class of a name.

    Args:
        name: A name that is registered.
        task: "texts" or "tokens".
        options: Its options.

    Raises:
        ValueError: If the name is unknown, or the architecture has no logits for the task or not these options.
    """
    usable = sorted(known for known, each in _REGISTER.items() if task in each.tasks)
    if name not in _REGISTER:
        raise ValueError(
            f"architecture={name!r} is unknown: choose one of {', '.join(usable)}, or import the module that registers it"
        )
    found = _REGISTER[name]
    if task not in found.tasks:
        raise ValueError(f"architecture={name!r} has no logits of {task}: choose one of {', '.join(usable)}")
    known = options_of(found)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"architecture_options has {', '.join(unknown)}: {name!r} takes {', '.join(known) or 'no options'}"
        )
    return found


def options_of(architecture: type[Architecture]) -> list[str]:
    """Return the names of the options that a class takes beside the common arguments."""
    parameters = inspect.signature(architecture.__init__).parameters
    return [name for name in parameters if name not in _COMMON and parameters[name].kind.name != "VAR_KEYWORD"]


class Pooling(nn.Module):
    """One vector of a text from its states.

    Args:
        kind: "mean", "max", "cls" (the first token), "last" (the last one) or "attention" (a learned mean).
        hidden_size: Width of the states.
        attention_size: Width of the hidden layer of "attention"; by default that of the states.

    Raises:
        ValueError: If there is no such kind.

    Source: "attention": Yang et al., "Hierarchical Attention Networks for Document Classification" (2016), equations 5 to 7.
    """

    def __init__(self, kind: str, hidden_size: int, *, attention_size: int | None = None) -> None:
        if kind not in _POOLINGS:
            raise ValueError(f"pooling={kind!r}: choose one of {', '.join(_POOLINGS)}")
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.key = nn.Linear(hidden_size, attention_size or hidden_size)
            self.query = nn.Linear(attention_size or hidden_size, 1, bias=False)

    def weights(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the shares ``[B, L]`` of the tokens under "attention": 0 at padding, with the sum 1."""
        scores = self.query(self.key(states).tanh()).squeeze(-1).float()
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors ``[B, D]``; zeros for a row of padding alone, but of "cls" and "last"."""
        if self.kind in ("cls", "last"):
            is_real = mask.to(torch.int8)
            at = is_real.argmax(1) if self.kind == "cls" else mask.shape[1] - 1 - is_real.flip(1).argmax(1)
            return states.take_along_dim(at[:, None, None], dim=1).squeeze(1)
        is_padding = ~mask.unsqueeze(-1)
        if self.kind == "max":
            lowest = torch.finfo(states.dtype).min
            return states.masked_fill(is_padding, lowest).amax(1).masked_fill(~mask.any(1, keepdim=True), 0.0)
        kept = states.masked_fill(is_padding, 0.0)
        if self.kind == "attention":
            return (kept * self.weights(states, mask).unsqueeze(-1)).sum(1).to(states.dtype)
        # Long rows of half precision are summed in single precision.
        total = kept.sum(1, dtype=torch.float32)
        return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)


class _Pooled(Architecture):
    """A linear layer on one vector of the text."""

    pooling: ClassVar[str] = "mean"

    def __init__(self, hidden_size: int, num_labels: int, **common: Any) -> None:
        super().__init__(hidden_size, num_labels, **common)
        self.pool = Pooling(self.pooling, hidden_size)
        self.output = nn.Linear(hidden_size, num_labels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, C]``."""
        logits: torch.Tensor = self.output(self.dropout(self.pool(states, mask)))
        return logits


@register_architecture("mean")
class MeanHead(_Pooled):
    """A linear layer on the mean of the states."""


@register_architecture("max")
class MaxHead(_Pooled):
    """A linear layer on the maximum of the states."""

    pooling = "max"


@register_architecture("cls")
class ClsHead(_Pooled):
    """A linear layer on the state of the first token."""

    pooling = "cls"


@register_architecture("last")
class LastHead(_Pooled):
    """A linear layer on the state of the last token."""

    pooling = "last"


@register_architecture("attention_pooling")
class AttentionHead(Architecture):
    """A linear layer on a mean of the states whose weights are learned.

    Args:
        hidden_size: See [`Architecture`], as for the other common arguments.
        num_labels: See there.
        attention_size: Width of the layer that the weights come from; by default that of the states.
        **common: See there.
    """

    def __init__(self, hidden_size: int, num_labels: int, *, attention_size: int | None = None, **common: Any) -> None:
        super().__init__(hidden_size, num_labels, **common)
        self.pool = Pooling("attention", hidden_size, attention_size=attention_size)
        self.output = nn.Linear(hidden_size, num_labels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, C]``."""
        logits: torch.Tensor = self.output(self.dropout(self.pool(states, mask)))
        return logits


@register_architecture("linear")
class LinearHead(Architecture):
    """A linear layer on the state of each token."""

    tasks = ("tokens",)

    def __init__(self, hidden_size: int, num_labels: int, **common: Any) -> None:
        super().__init__(hidden_size, num_labels, **common)
        self.output = nn.Linear(hidden_size, num_labels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, L, C]``."""
        logits: torch.Tensor = self.output(self.dropout(states))
        return logits


@register_architecture("scalar_mix")
class ScalarMixHead(Architecture):
    """A linear layer on a learned mean of all layers: of each token, or on one vector of the text.

    Args:
        hidden_size: See [`Architecture`], as for the other common arguments.
        num_labels: See there.
        pooling: How a text becomes one vector, see [`Pooling`].
        **common: See there.

    Source: Peters et al., "Deep contextualized word representations" (2018), equation 1.
    """

    tasks = ("texts", "tokens")
    mixes_layers = True

    def __init__(self, hidden_size: int, num_labels: int, *, pooling: str = "mean", **common: Any) -> None:
        super().__init__(hidden_size, num_labels, **common)
        self.pool = None if self.per_token else Pooling(pooling, hidden_size)
        self.output = nn.Linear(hidden_size, num_labels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, C]`` or ``[B, L, C]``."""
        features = states if self.pool is None else self.pool(states, mask)
        logits: torch.Tensor = self.output(self.dropout(features))
        return logits


class BidirectionalLSTM(nn.Module):
    """Layers of LSTMs in both directions, which read the tokens of a row alone, wherever its padding is.

    The tokens of a row are brought to its beginning, in their order or in the opposite one, so no length has to be known on the
    host, as it does for packed sequences.

    Args:
        input_size: Width of the states.
        hidden_size: Width of each direction.
        num_layers: Number of layers.
        dropout: Dropout between layers.
    """

    def __init__(self, input_size: int, hidden_size: int, *, num_layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = [input_size] + [2 * hidden_size] * (num_layers - 1)
        self.forwards = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
        self.backwards = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last layer ``[B, L, 2 * hidden_size]``, zeros at padding."""
        is_padding = (~mask).to(torch.int8)
        order = is_padding.argsort(dim=1, stable=True)
        turned = mask.shape[1] - 1 - is_padding.flip(1).argsort(dim=1, stable=True)
        for number, (ahead, back) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            states = self.dropout(states) if number else states
            states = torch.cat([_read(ahead, states, order), _read(back, states, turned)], dim=-1)
        return states.masked_fill(~mask.unsqueeze(-1), 0.0)


def _read(lstm: nn.Module, states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Run an LSTM over the columns in an order, and put its outputs back to where they belong."""
    outputs: torch.Tensor = lstm(states.take_along_dim(order.unsqueeze(-1), dim=1))[0]
    return outputs.take_along_dim(order.argsort(dim=1).unsqueeze(-1), dim=1)


@register_architecture("bilstm")
class BiLSTMHead(Architecture):
    """A bidirectional LSTM and a linear layer: on each token, or on one vector of the text.

    Args:
        hidden_size: See [`Architecture`], as for the other common arguments.
        num_labels: See there.
        lstm_size: Width of each direction.
        num_layers: Number of layers.
        pooling: How a text becomes one vector, see [`Pooling`].
        **common: See there.

    Source: the maximum over a bidirectional LSTM: Conneau et al., "Supervised Learning of Universal Sentence Representations from
        Natural Language Inference Data" (2017), section 3.2.
    """

    tasks = ("texts", "tokens")

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        lstm_size: int = 256,
        num_layers: int = 1,
        pooling: str = "max",
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_labels, **common)
        if lstm_size < 1 or num_layers < 1:
            raise ValueError(f"lstm_size={lstm_size}, num_layers={num_layers}: give at least 1")
        self.lstm = BidirectionalLSTM(hidden_size, lstm_size, num_layers=num_layers, dropout=self.dropout.p)
        self.pool = None if self.per_token else Pooling(pooling, 2 * lstm_size)
        self.output = nn.Linear(2 * lstm_size, num_labels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, C]`` or ``[B, L, C]``."""
        features = self.lstm(states, mask)
        features = features if self.pool is None else self.pool(features, mask)
        logits: torch.Tensor = self.output(self.dropout(features))
        return logits


@register_architecture("cnn")
class CNNHead(Architecture):
    """Convolutions of several widths: the maximum over a text of each, or their values around each token.

    As in the paper's code, a text has zeros before and after it, as many as the width less one. A window counts that has at least
    one token.

    Args:
        hidden_size: See [`Architecture`], as for the other common arguments.
        num_labels: See there.
        widths: Widths of the windows, in tokens.
        num_filters: Filters of each width.
        **common: See there.

    Source: Kim, "Convolutional Neural Networks for Sentence Classification" (2014).
    """

    tasks = ("texts", "tokens")

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        widths: list[int] | tuple[int, ...] = (3, 4, 5),
        num_filters: int = 100,
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_labels, **common)
        if not widths or min(widths) < 1 or num_filters < 1:
            raise ValueError(
                f"widths={list(widths)}, num_filters={num_filters}: give at least one width, and at least 1"
            )
        self.widths = tuple(widths)
        self.convolutions = nn.ModuleList(nn.Conv1d(hidden_size, num_filters, width) for width in widths)
        self.output = nn.Linear(num_filters * len(widths), num_labels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, C]`` or ``[B, L, C]``."""
        columns_BDL = states.masked_fill(~mask.unsqueeze(-1), 0.0).transpose(1, 2)
        around = self._around_tokens if self.per_token else self._in_text
        parts = [around(columns_BDL, mask, *each) for each in zip(self.widths, self.convolutions, strict=True)]
        logits: torch.Tensor = self.output(self.dropout(torch.cat(parts, dim=-1)))
        return logits

    def _in_text(self, columns: torch.Tensor, mask: torch.Tensor, width: int, convolution: nn.Module) -> torch.Tensor:
        values_BFW = convolution(F.pad(columns, (width - 1, width - 1))).relu()
        padded = F.pad(mask.float(), (width - 1, width - 1)).unsqueeze(1)
        has_token_B1W = F.max_pool1d(padded, width, stride=1) > 0
        # No value is below 0.
        return values_BFW.masked_fill(~has_token_B1W, 0.0).amax(-1)

    def _around_tokens(
        self, columns: torch.Tensor, mask: torch.Tensor, width: int, convolution: nn.Module
    ) -> torch.Tensor:
        values_BFL: torch.Tensor = convolution(F.pad(columns, ((width - 1) // 2, width // 2))).relu()
        return values_BFL.transpose(1, 2)


@register_architecture("pair_encoder")
class PairHead(Architecture):
    """Two texts, each through the encoder alone: a linear layer on u, v, |u - v| and u * v.

    Args:
        hidden_size: See [`Architecture`], as for the other common arguments.
        num_labels: See there.
        pooling: How a text becomes one vector, u or v, see [`Pooling`].
        symmetric: Whether the order of the texts makes no difference: u + v stands in the place of u and v.
        cross_attention: Whether each token is first compared with a mean of the other text's tokens, by their similarity.
        **common: See there.

    Source: Conneau et al. (2017), section 3.1; comparison: Chen et al., "Enhanced LSTM for Natural Language Inference" (2017),
        equations 11 to 15, with a product that is divided by the root of the width.
    """

    reads_pairs = True

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        pooling: str = "mean",
        symmetric: bool = False,
        cross_attention: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_labels, **common)
        self.symmetric = symmetric
        self.compare = nn.Linear(4 * hidden_size, hidden_size) if cross_attention else None
        self.pool = Pooling(pooling, hidden_size)
        self.output = nn.Linear((3 if symmetric else 4) * hidden_size, num_labels)

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, pair_states: torch.Tensor, pair_mask: torch.Tensor
    ) -> torch.Tensor:
        """Return logits ``[B, C]``.

        Args:
            states: ``[B, L, D]`` of the first texts.
            mask: ``[B, L]``, true at their tokens.
            pair_states: ``[B, M, D]`` of the second texts.
            pair_mask: ``[B, M]``, true at their tokens.
        """
        if self.compare is not None:
            first = self._compared(states, pair_states, pair_mask)
            states, pair_states = first, self._compared(pair_states, states, mask)
        u, v = self.pool(states, mask), self.pool(pair_states, pair_mask)
        own = [u + v] if self.symmetric else [u, v]
        logits: torch.Tensor = self.output(self.dropout(torch.cat([*own, (u - v).abs(), u * v], dim=-1)))
        return logits

    def _compared(self, states: torch.Tensor, other: torch.Tensor, other_mask: torch.Tensor) -> torch.Tensor:
        assert self.compare is not None
        scores_BLM = (states @ other.transpose(1, 2)).float() * self.hidden_size**-0.5
        scores_BLM = scores_BLM.masked_fill(~other_mask.unsqueeze(1), torch.finfo(scores_BLM.dtype).min)
        found = scores_BLM.softmax(-1).to(other.dtype) @ other
        joined: torch.Tensor = self.compare(torch.cat([states, found, states - found, states * found], dim=-1))
        return joined.relu()


__all__ = ["Architecture", "architectures", "register_architecture"]
