"""Share embeddings between two stock models."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError


def shared_embedding_names(target: PreTrainedModel, source: PreTrainedModel) -> dict[str, str]:
    """Return which parameters of one model's embeddings are tied to which of the other's.

    Tables (words, positions, types) and the layer norm are shared, as in the official ELECTRA; a projection from the embedding
    width to the hidden width belongs to each model.

    Args:
        target: Model whose parameters are replaced.
        source: Model that keeps its own.

    Returns:
        Names of the target's parameters -> names of the source's.

    Raises:
        InputError: If the two embeddings do not have the same parameters with the same shapes.
    """
    ours, theirs = _embedding_parameters(target), _embedding_parameters(source)
    shapes = {name: tuple(parameter.shape) for name, (_, parameter) in ours.items()}
    other_shapes = {name: tuple(parameter.shape) for name, (_, parameter) in theirs.items()}
    if shapes != other_shapes:
        raise InputError(
            f"embedding_sharing='tied' needs equal embeddings, but {type(target).__name__} has {shapes} and "
            f"{type(source).__name__} has {other_shapes}: give both the same embedding width, or set embedding_sharing='none'"
        )
    return {ours[name][0]: theirs[name][0] for name in ours}


def _embedding_parameters(model: PreTrainedModel) -> dict[str, tuple[str, nn.Parameter]]:
    """Return name within the embeddings -> (name within the model, parameter), for tables and norms."""
    words = model.get_input_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is words).rpartition(".")[0] + "."
    return {
        f"{name}.{parameter_name}"[len(prefix) :]: (f"{name}.{parameter_name}", parameter)
        for name, module in model.named_modules()
        if name.startswith(prefix) and not isinstance(module, nn.Linear)
        for parameter_name, parameter in module.named_parameters(recurse=False)
    }
