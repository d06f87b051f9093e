"""Embeddings of a stock model: tables shared between two models, and languages instead of segments.

First the stand-ins: each stands for a module in a stock model while it is trained, for tables of another width or with a
difference of their own; `merged_state` gives the stock parameters that are exported. Then the names of parameters that two
models share. Last, the language of each token, which a model takes as language embeddings or as token types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import name_of, position_tables, word_table_name

# A projection differs from a published table by less than this share of the table's norm.
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


def is_stand_in(module: nn.Module) -> bool:
    """Whether a module stands for another in a stock model while that is trained."""
    return isinstance(module, _STAND_INS)


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
    model.set_submodule(name_of(model, old), new)


def shared_embedding_names(target: PreTrainedModel, source: PreTrainedModel) -> dict[str, str]:
    """Return which parameters of one model's embeddings are tied to which of the other's.

    Tables (words, positions, types) and the layer norm are shared, as in the official ELECTRA; a projection from the embedding
    width to the hidden width belongs to each model. A source whose word table was given another width shares that table alone.

    Args:
        target: Model whose parameters are replaced.
        source: Model that keeps its own.

    Returns:
        Names of the target's parameters -> names of the source's.

    Raises:
        InputError: If the two embeddings do not have the same parameters with the same shapes.
    """
    if is_factorized(source):
        return {f"{word_table_name(target)}.weight": f"{word_table_name(source)}.weight"}
    ours, theirs = _embedding_parameters(target), _embedding_parameters(source)
    return _pair(ours, theirs, target, source, "embedding_sharing='tied'", "the same embedding width")


def shared_table_names(target: PreTrainedModel, source: PreTrainedModel) -> dict[str, str]:
    """Return the names of the target's word and position tables -> those of the source's with the same shapes.

    Raises:
        InputError: If the word tables differ in shape.
    """
    words = {word_table_name(target): word_table_name(source)}
    shapes = [tuple(model.get_input_embeddings().weight.shape) for model in (target, source)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"embedding_sharing: {type(target).__name__} has a word table of {shapes[0]} and {type(source).__name__} one of "
            f"{shapes[1]}: use one tokenizer and one embedding width for both, or set embedding_sharing='none'"
        )
    tables = zip(*(position_tables(model, learned=True).items() for model in (target, source)), strict=False)
    same = {name: other for (name, ours), (other, theirs) in tables if ours.weight.shape == theirs.weight.shape}
    return words | same


def shared_body_names(
    target: PreTrainedModel, source: PreTrainedModel, *, option: str = "embedding_sharing='full'"
) -> dict[str, str]:
    """Return the names of all parameters of the target's body -> those of the source's.

    Args:
        target: Model whose parameters are replaced.
        source: Model that keeps its own.
        option: The option that needs equal bodies, for the error.

    Raises:
        InputError: If the two bodies do not have the same parameters with the same shapes.
    """
    ours, theirs = _body_parameters(target), _body_parameters(source)
    return _pair(ours, theirs, target, source, option, "the same sizes")


_Named = dict[str, tuple[str, nn.Parameter]]


def _pair(
    ours: _Named, theirs: _Named, target: PreTrainedModel, source: PreTrainedModel, option: str, remedy: str
) -> dict[str, str]:
    shapes, other_shapes = (
        {name: tuple(parameter.shape) for name, (_, parameter) in side.items()} for side in (ours, theirs)
    )
    if shapes != other_shapes:
        first = next(name for name in [*shapes, *other_shapes] if shapes.get(name) != other_shapes.get(name))
        raise InputError(
            f"{option} needs equal parameters, but {type(target).__name__} has {first} "
            f"{shapes.get(first, 'not at all')} and {type(source).__name__} has it {other_shapes.get(first, 'not at all')}: "
            f"give both {remedy}, or choose another value of the option"
        )
    return {ours[name][0]: theirs[name][0] for name in ours}


def _embedding_parameters(model: PreTrainedModel) -> _Named:
    """Return name within the embeddings -> (name within the model, parameter), for tables and norms."""
    prefix = word_table_name(model).rpartition(".")[0] + "."
    return {
        f"{name}.{parameter_name}"[len(prefix) :]: (f"{name}.{parameter_name}", parameter)
        for name, module in model.named_modules()
        if name.startswith(prefix) and not isinstance(module, nn.Linear)
        for parameter_name, parameter in module.named_parameters(recurse=False)
    }


def _body_parameters(model: PreTrainedModel) -> _Named:
    body = model.base_model
    prefix = name_of(model, body)
    prefix = f"{prefix}." if prefix else ""
    return {name: (f"{prefix}{name}", parameter) for name, parameter in body.named_parameters()}


LanguageInput = Literal["langs", "token_type_ids"]


def language_changes(model_type: str, lang2id: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration values by which a model from scratch has room for languages.

    Args:
        model_type: The architecture.
        lang2id: Numbers of the languages, from 0.

    Returns:
        `n_langs` for XLM and its kin, else `type_vocab_size`; {} for an architecture with neither.
    """
    known, num_languages = CONFIG_MAPPING[model_type](), max(lang2id.values()) + 1
    if hasattr(known, "n_langs"):
        return {"n_langs": num_languages}
    if hasattr(known, "type_vocab_size"):
        return {"type_vocab_size": max(num_languages, known.type_vocab_size)}
    return {}


def known_languages(config: PreTrainedConfig) -> dict[str, int] | None:
    """Return the numbers of the languages that a model was trained with, None if it does not say."""
    lang2id = getattr(config, "lang2id", None)
    return None if lang2id is None else dict(lang2id)


def set_languages(config: PreTrainedConfig, lang2id: Mapping[str, int]) -> LanguageInput | None:
    """Write the numbers of the languages into a configuration, where the model has room for them.

    `lang2id` and `id2lang` are those of XLM's published checkpoints; other architectures hand them through. A model
    without room keeps its configuration, and does not get the languages.

    Args:
        config: Stock configuration, of a new model or of a checkpoint.
        lang2id: Numbers of the languages.

    Returns:
        The input that holds the languages, see [`language_input`].

    Raises:
        InputError: If the model was trained with these languages under other numbers, or without some of them.
    """
    known = known_languages(config)
    if known is not None:
        wrong = [name for name, number in lang2id.items() if known.get(name) != number]
        if wrong:
            raise InputError(
                f"the model numbers its languages {known}, and the data has {wrong[0]!r} as {lang2id[wrong[0]]}: prepare "
                "the data with the numbers of the model"
            )
    elif max(lang2id.values()) < _room(config):
        config.lang2id = dict(lang2id)
        config.id2lang = {str(number): name for name, number in lang2id.items()}
    return language_input(config)


def language_input(config: PreTrainedConfig) -> LanguageInput | None:
    """Return the input that holds the language of each token.

    Returns:
        "langs" for XLM and its kin; "token_type_ids" for models with enough token types, which then stand for languages;
        None for a model without room, or to which no languages were given by [`set_languages`].
    """
    lang2id = known_languages(config)
    if lang2id is None or max(lang2id.values()) >= _room(config):
        return None
    return "langs" if hasattr(config, "n_langs") else "token_type_ids"


def _room(config: PreTrainedConfig) -> int:
    """Return the number of languages that the tables of a model have rows for."""
    if hasattr(config, "n_langs"):
        return int(config.n_langs) if config.n_langs > 1 and config.use_lang_emb else 0
    return int(getattr(config, "type_vocab_size", None) or 0)


def language_inputs(config: PreTrainedConfig, *, langs: torch.Tensor | None = None, **inputs: Any) -> dict[str, Any]:
    """Turn the languages of a batch into what a stock model takes.

    Args:
        config: Configuration of the stock model, after [`set_languages`].
        langs: ``[B, L]`` number of the language of each token, any at padding; None if the batch has none.
        **inputs: Further inputs, handed through.

    Returns:
        The inputs, with the languages under the name that the model has for them. Where that is `token_type_ids`, they
        stand in for segments; a model without room gets nothing.
    """
    name = None if langs is None else language_input(config)
    return inputs if name is None else inputs | {name: langs}


def set_rotary_positions(model: PreTrainedModel, *, theta: float | None = None, length: int | None = None) -> None:
    """Change the base of a model's rotary positions, and the longest sequence in its configuration.

    Where layers with a window have a base of their own, that one stays: it is the others that see far.

    Args:
        model: A stock model with rotary positions, changed in place.
        theta: The base; as it is if None.
        length: Longest sequence, in tokens; as it is if None.

    Raises:
        InputError: If the model has no rotary positions, or other ones that a base does not describe.

    Source: Warner et al. 2024 (ModernBERT): the base of the global layers is raised for long text.
    """
    given = f"rope_theta={theta:g}" if theta is not None else f"max_position_embeddings={length}"
    modules = {
        name: module for name, module in model.named_modules() if hasattr(module, "compute_default_rope_parameters")
    }
    parameters = getattr(model.config, "rope_parameters", None)
    if not modules or not parameters:
        raise InputError(
            f"{given}: {type(model).__name__} has no rotary positions, so a phase cannot change it: leave it out, or choose a "
            "model_type with them, such as modernbert"
        )
    # With layers of several types, a base for each.
    chosen = parameters.get("full_attention", parameters)
    if chosen.get("rope_type", "default") != "default":
        raise InputError(
            f"{given}: the rotary positions are of the type {chosen['rope_type']!r}: give the default type"
        )
    if theta is not None:
        chosen["rope_theta"] = float(theta)
    if length is not None:
        model.config.max_position_embeddings = length
    for name, module in modules.items():
        module.config.rope_parameters = parameters
        module.config.max_position_embeddings = model.config.max_position_embeddings
        device = next(iter(module.buffers())).device
        model.set_submodule(name, type(module)(config=module.config).to(device))
