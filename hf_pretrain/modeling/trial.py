"""One step on a few tokens, before any text is read: what fails is refused by name, and what learns nothing is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.loading import first_line
from hf_pretrain.modeling.outputs import PretrainingOutput

TRIAL_ROWS, TRIAL_LENGTH = 2, 8
"""Shape of the batch that is tried, in examples and tokens."""

_Scalar = bool | int | float | str | None


def vocabulary_size(embeddings: nn.Module) -> int:
    """Return how many tokens a stock model's word embeddings hold; not every kind of them is one table."""
    number = getattr(embeddings, "num_embeddings", None)
    return len(embeddings.get_parameter("weight")) if number is None else int(number)


def trial_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Return ``[TRIAL_ROWS, TRIAL_LENGTH]`` tokens spread over the vocabulary; a padding token is not among them."""
    embeddings = model.get_input_embeddings()
    vocab_size = vocabulary_size(embeddings)
    padding, count = getattr(model.config, "pad_token_id", None), TRIAL_ROWS * TRIAL_LENGTH
    # Distinct where there are enough, and some of each cluster of a divided output layer.
    tokens = [(vocab_size - 1) * place // (count - 1) for place in range(count)]
    other = next((token for token in range(vocab_size - 1, -1, -1) if token != padding), 0)
    tokens = [other if token == padding else token for token in tokens]
    device = next(embeddings.parameters()).device
    return torch.tensor(tokens, device=device).view(TRIAL_ROWS, TRIAL_LENGTH)


def masked_trial_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a batch of masked language modelling: tokens, and the first two of each row as targets."""
    ids = trial_tokens(model)
    columns = torch.arange(TRIAL_LENGTH, device=ids.device)
    positions = (torch.arange(TRIAL_ROWS, device=ids.device)[:, None] * TRIAL_LENGTH + columns[:2]).flatten()
    labels = torch.where(columns < 2, ids, torch.full_like(ids, -100))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "target_positions": positions,
    }


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model has parameters without values; some of a stock model's may have values all the same."""
    return any(parameter.is_meta for parameter in model.parameters())


def unused_parameters(model: PreTrainedModel, batch: Mapping[str, Any], *, name: str) -> list[str]:
    """Run one step in evaluation mode, which leaves no trace, and return the parameters that no loss reaches.

    A parameter of one expert among several is never among them while another expert has a gradient: which are chosen depends on
    the tokens.

    Args:
        model: A composite.
        batch: A collated batch with targets of every loss.
        name: What the stock models are called, for the error.

    Returns:
        Names of trainable parameters without a gradient. On the meta device, where a stock model may need values that are not
        there, possibly none.

    Raises:
        InputError: If the step fails.
    """
    named = {key: value for key, value in model.named_parameters() if value.requires_grad}
    try:
        values = _ValuesOnMeta() if is_on_meta(model) else nullcontext()
        with _untouched(model), torch.random.fork_rng(devices=[]), torch.enable_grad(), values:
            output: PretrainingOutput = model(**batch)
            total = torch.stack([loss.sum.float().sum() for loss in output.losses.values()]).sum()
            if not total.requires_grad:
                return []
            gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    except InputError:
        raise
    except Exception as error:  # a stock model may trip over a size anywhere
        if is_on_meta(model) and not _is_of_sizes(error):
            return []
        raise InputError(f"{name} cannot be trained with these options: {_reason(model, error)}") from error
    found = [key for key, gradient in zip(named, gradients, strict=True) if gradient is None]
    experts = {_kind_of_expert(key) for key in named.keys() - set(found)} - {None}
    return [key for key in found if _kind_of_expert(key) not in experts]


def _is_of_sizes(error: Exception) -> bool:
    """Whether an error on the meta device would come with values too; what only lacks values, or a kernel, would not."""
    text = str(error).lower()
    if isinstance(error, NotImplementedError) or "meta" in text:
        return False
    return isinstance(error, ValueError | AssertionError) or any(word in text for word in ("shape", "size", "dim"))


def _reason(model: PreTrainedModel, error: Exception) -> str:
    """Return why a step failed: the width and heads of a model that do not fit, or the error's own words."""
    for module in model.modules():
        config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) else None
        width, heads = (getattr(config, size, None) for size in ("hidden_size", "num_attention_heads"))
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
            return f"hidden_size={width} does not divide into num_attention_heads={heads}"
    kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
    return f"a step on {TRIAL_LENGTH} tokens fails ({kind}{first_line(error)})"


def _kind_of_expert(name: str) -> str | None:
    """Return a parameter's name without the number of its expert; None for one that belongs to no numbered expert."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if "expert" in part.lower()), None)
    if place is None or not any(part.isdigit() for part in parts[place:]):
        return None
    return ".".join([*parts[:place], *("*" if part.isdigit() else part for part in parts[place:])])


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore what a forward may set on its modules.

    BigBird, for one, changes its kind of attention for good when it meets a short row.
    """
    modules = list(model.modules())
    before = [({**_scalars(module)}, dict(module._modules)) for module in modules]
    model.eval()
    try:
        yield
    finally:
        for module, (scalars, children) in zip(modules, before, strict=True):
            vars(module).update(scalars)
            module._modules.clear()
            module._modules.update(children)


def _scalars(module: nn.Module) -> dict[str, _Scalar]:
    return {key: value for key, value in vars(module).items() if isinstance(value, _Scalar)}


class _ValuesOnMeta(TorchDispatchMode):
    """Lets a model on the meta device that asks for a value go on: 1, which is what a mask without padding says."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        return func(*args, **(kwargs or {}))
