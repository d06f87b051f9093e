"""Share parameters between two stock models."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.embeddings import is_factorized


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
        return {f"{_words(target)}.weight": f"{_words(source)}.weight"}
    ours, theirs = _embedding_parameters(target), _embedding_parameters(source)
    return _pair(ours, theirs, target, source, "embedding_sharing='tied'", "the same embedding width")


def shared_table_names(target: PreTrainedModel, source: PreTrainedModel) -> dict[str, str]:
    """Return the names of the target's word and position tables -> those of the source's with the same shapes.

    Raises:
        InputError: If the word tables differ in shape.
    """
    words = {_words(target): _words(source)}
    shapes = [tuple(model.get_input_embeddings().weight.shape) for model in (target, source)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"embedding_sharing: {type(target).__name__} has a word table of {shapes[0]} and {type(source).__name__} one of "
            f"{shapes[1]}: use one tokenizer and one embedding width for both, or set embedding_sharing='none'"
        )
    tables = zip(_position_tables(target).items(), _position_tables(source).items(), strict=False)
    same = {name: other for (name, ours), (other, theirs) in tables if ours.weight.shape == theirs.weight.shape}
    return words | same


def shared_body_names(
    target: PreTrainedModel, source: PreTrainedModel, *, option: str = "embedding_sharing='full'"
) -> dict[str, str]:
    """Return the names of all parameters of the target's body -> those of the source's.

    Args:
        target: Model whose parameters are replaced.
        source: Model that keeps its own.
        option: What asks for equal bodies, for the error.

    Raises:
        InputError: If the two bodies do not have the same parameters with the same shapes.
    """
    ours, theirs = _body_parameters(target), _body_parameters(source)
    return _pair(ours, theirs, target, source, option, "the same sizes")


_Named = dict[str, tuple[str, nn.Parameter]]


def _pair(
    ours: _Named, theirs: _Named, target: PreTrainedModel, source: PreTrainedModel, option: str, remedy: str
) -> dict[str, str]:
    shapes = {name: tuple(parameter.shape) for name, (_, parameter) in ours.items()}
    other_shapes = {name: tuple(parameter.shape) for name, (_, parameter) in theirs.items()}
    if shapes != other_shapes:
        first = next(name for name in [*shapes, *other_shapes] if shapes.get(name) != other_shapes.get(name))
        raise InputError(
            f"{option} needs equal parameters, but {type(target).__name__} has {first} "
            f"{shapes.get(first, 'not at all')} and {type(source).__name__} has it {other_shapes.get(first, 'not at all')}: "
            f"give both {remedy}, or choose another value of the option"
        )
    return {ours[name][0]: theirs[name][0] for name in ours}


def _words(model: PreTrainedModel) -> str:
    words = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is words)


def _position_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
    }


def _embedding_parameters(model: PreTrainedModel) -> _Named:
    """Return name within the embeddings -> (name within the model, parameter), for tables and norms."""
    prefix = _words(model).rpartition(".")[0] + "."
    return {
        f"{name}.{parameter_name}"[len(prefix) :]: (f"{name}.{parameter_name}", parameter)
        for name, module in model.named_modules()
        if name.startswith(prefix) and not isinstance(module, nn.Linear)
        for parameter_name, parameter in module.named_parameters(recurse=False)
    }


def _body_parameters(model: PreTrainedModel) -> _Named:
    body = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is body)
    prefix = f"{prefix}." if prefix else ""
    return {name: (f"{prefix}{name}", parameter) for name, parameter in body.named_parameters()}
