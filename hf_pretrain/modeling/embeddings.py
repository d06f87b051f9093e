"""Embedding tables that are shared between models of different widths, or with a difference of their own.

Each class here stands in a stock model for one of its modules while it is trained, and knows the stock parameters that it amounts
to: `merged_state` is what gets exported.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError

# A projection is told apart from noise in a published table by this share of the table's norm.
_TIED_TOLERANCE = 1e-3


class FactorizedEmbedding(nn.Embedding):
    """A word table of another width than the model's, followed by a projection to it.

    Args:
        table: `[V, E]` the table.
        projection: `[D, E]` weight of the projection.
        padding_idx: Row that gets no gradient.
    """

    def __init__(self, table: nn.Parameter, projection: torch.Tensor, padding_idx: int | None = None) -> None:
        super().__init__(table.shape[0], table.shape[1], padding_idx=padding_idx, device="meta")
        self.weight = table
        self.projection = _linear(projection)
        self._is_hf_initialized = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the projected rows, `[..., D]`."""
        return self.projection(super().forward(input))

    @staticmethod
    def merge(state: dict[str, torch.Tensor], prefix: str) -> None:
        """Replace table and projection in a state by their product."""
        state[f"{prefix}weight"] = state[f"{prefix}weight"] @ state.pop(f"{prefix}projection.weight").T


class FactorizedDecoder(nn.Linear):
    """An output layer over a word table of another width than the model's: a projection, then the table.

    Args:
        table: `[V, E]` the table.
        projection: `[E, D]` weight of the projection.
        bias: `[V]`, or None.
    """

    def __init__(self, table: nn.Parameter, projection: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(table.shape[1], table.shape[0], bias=bias is not None, device="meta")
        self.weight = table
        self.register_parameter("bias", bias)
        self.projection = _linear(projection)
        self._is_hf_initialized = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits, `[..., V]`."""
        return super().forward(self.projection(input))

    @staticmethod
    def merge(state: dict[str, torch.Tensor], prefix: str) -> None:
        """Replace table and projection in a state by their product."""
        state[f"{prefix}weight"] = state[f"{prefix}weight"] @ state.pop(f"{prefix}projection.weight")


class DisentangledEmbedding(nn.Embedding):
    """Another model's table, held constant, plus a difference of its own: `E = stopgrad(E_base) + Δ`.

    The two tables are gathered and then added, so that no table-sized sum is made in a step. `weight` is Δ.

    Args:
        base: `[V, E]` the other model's table; no gradient reaches it from here.
        difference: `[V, E]` initial Δ.
        padding_idx: Row of Δ that gets no gradient.

    Source: He et al. 2021, "DeBERTaV3", section 3.2.
    """

    def __init__(self, base: nn.Parameter, difference: torch.Tensor, padding_idx: int | None = None) -> None:
        super().__init__(base.shape[0], base.shape[1], padding_idx=padding_idx, device="meta")
        self.weight = nn.Parameter(difference)
        self.base_weight = base
        self._is_hf_initialized = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows, `[..., E]`."""
        return F.embedding(input, self.base_weight.detach()) + super().forward(input)

    @staticmethod
    def merge(state: dict[str, torch.Tensor], prefix: str) -> None:
        """Replace base and difference in a state by their sum."""
        state[f"{prefix}weight"] = state.pop(f"{prefix}base_weight") + state[f"{prefix}weight"]


_STAND_INS = (FactorizedEmbedding, FactorizedDecoder, DisentangledEmbedding)


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    setattr(layer, "_is_hf_initialized", True)  # noqa: B010 (transformers would draw the weight anew)
    return layer


def merged_state(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor] | None:
    """Return the stock parameters that a model with stand-ins amounts to, or None if it has none.

    Args:
        model: The model.
        state: Its full state, where the parameters in memory are shards; otherwise taken from the model.
    """
    stand_ins = {name: module for name, module in model.named_modules() if isinstance(module, _STAND_INS)}
    if not stand_ins:
        return None
    merged = dict(model.state_dict() if state is None else state)
    for name, module in stand_ins.items():
        module.merge(merged, f"{name}.")
    return merged


def is_factorized(model: PreTrainedModel) -> bool:
    """Return whether the model's word table is followed by a projection that is not part of the stock model."""
    return isinstance(model.get_input_embeddings(), FactorizedEmbedding)


def factorize_embeddings(model: PreTrainedModel, width: int, *, table: torch.Tensor | None = None) -> None:
    """Give a masked language model a word table of another width, with a projection before its layers and one after.

    Args:
        model: Stock masked language model whose output layer is tied to its word table.
        width: Width of the new table.
        table: `[V, width]` the table that the model's own is a projection of, as in an export of this library; the projections
            are then found again. Without it, table and projections are drawn anew.

    Raises:
        InputError: If the output layer is none over the vocabulary, or the model's table is no projection of `table`.
    """
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    fits = isinstance(words, nn.Embedding) and isinstance(decoder, nn.Linear)
    if not fits or decoder.out_features != words.num_embeddings:
        raise InputError(
            f"{type(model).__name__} has no output layer that a table of another width could stand in for: "
            "give both models the same width, or set embedding_sharing='none'"
        )
    if table is None:
        std = getattr(model.config, "initializer_range", 0.02)
        new_table = nn.Parameter(torch.randn(words.num_embeddings, width) * std)
        # Keeps the standard deviation that the model's own table would have.
        enter = torch.randn(words.embedding_dim, width) * width**-0.5
        leave = torch.randn(width, decoder.in_features) * std
    else:
        new_table = nn.Parameter(table.detach().clone())
        enter = _projection_of(table, words.weight)
        leave = _projection_of(table, decoder.weight).T.contiguous()
    _replace(model, words, FactorizedEmbedding(new_table, enter, words.padding_idx))
    _replace(model, decoder, FactorizedDecoder(new_table, leave, decoder.bias))
    _tie_again(model)


@torch.no_grad()
def _tie_again(model: PreTrainedModel) -> None:
    """Tie what an export had to untie: a bias beside the output layer's would have no gradient."""
    if model.config.tie_word_embeddings:
        return
    model.config.tie_word_embeddings = True
    tied = model.get_expanded_tied_weights_keys(all_submodels=False)
    for used, source in tied.items():
        if used.endswith("bias"):
            model.get_parameter(source).copy_(model.get_parameter(used))
    model.all_tied_weights_keys = tied
    model.tie_weights()


def _projection_of(table: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """Return `[D, E]` P with ``table @ P.T = projected``."""
    if table.is_meta:
        return torch.empty(projected.shape[1], table.shape[1], device="meta")
    table, projected = table.detach().double(), projected.detach().double()
    solution = torch.linalg.lstsq(table, projected).solution
    if (table @ solution - projected).norm() > _TIED_TOLERANCE * projected.norm():
        raise InputError(
            "embedding_sharing: the generator's word table is not a projection of the discriminator's, so the two were "
            "not trained with shared tables: set embedding_sharing='none'"
        )
    return solution.T.float().contiguous()


def disentangle_embedding(model: PreTrainedModel, name: str, base: nn.Parameter, *, is_trained: bool) -> None:
    """Make one table of a model the sum of another model's and a difference.

    Args:
        model: Stock model.
        name: Name of the embedding module in it.
        base: The other model's table, of the same shape.
        is_trained: Whether the model's own table holds values to keep: then Δ starts as what makes the sum equal to them,
            otherwise as zero.
    """
    old: nn.Embedding = model.get_submodule(name)
    if not isinstance(old, nn.Embedding):
        raise InputError(
            f"embedding_sharing='gdes': {type(model).__name__} has a {type(old).__name__} for its table, which takes no "
            "difference: set embedding_sharing='none'"
        )
    difference = old.weight.detach() - base.detach() if is_trained else torch.zeros_like(base)
    _replace(model, old, DisentangledEmbedding(base, difference, old.padding_idx))


def _replace(model: PreTrainedModel, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    model.set_submodule(name, new)
