"""Attention in one direction for stock encoders, and the proof that no position sees its own token."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.attention_masks import row_position_inputs

# Without a backend of transformers' own: they read a mask as truth values, and want one of two dimensions for the embeddings.
MASKS_OF_TRUTH_VALUES = frozenset({"deberta", "deberta-v2"})

# A token that is seen changes states of size one by more.
_NOISE = 1e-5
# Alone a document has another shape, perhaps in bfloat16: sums are rounded differently, but wrong positions move every state.
_ALONE_TOLERANCE = 0.05

Mask = torch.Tensor | dict[str, torch.Tensor]


def directed_mask(documents: torch.Tensor, *, config: PreTrainedConfig, to_the_right: bool) -> Mask:
    """Return the mask by which a stock encoder reads in one direction.

    Every position sees itself and what lies before it in its document; layers with a window see as far as it reaches.

    Args:
        documents: ``[B, L]`` number of the document that each token belongs to; padding is one of its own, so that it is seen
            by no token, and has itself to see: a softmax over nothing is not a number.
        config: Configuration of the encoder: its backend decides how a mask is written.
        to_the_right: Whether it reads from left to right.

    Returns:
        ``[B, 1, L, L]``, or one a kind of layer where the encoder has several.
    """
    steps = torch.arange(documents.shape[1], device=documents.device)
    behind_LL = (steps[:, None] - steps) * (1 if to_the_right else -1)
    visible = ((behind_LL >= 0) & (documents[:, :, None] == documents[:, None, :]))[:, None]
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return _written(visible, config)
    near = visible & (behind_LL <= config.sliding_window)
    return {"full_attention": _written(visible, config), "sliding_attention": _written(near, config)}


def _written(visible: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    if config._attn_implementation == "sdpa" or config.model_type in MASKS_OF_TRUTH_VALUES:
        return visible
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return torch.zeros((), dtype=dtype, device=visible.device).where(visible, torch.finfo(dtype).min)


def given_positions(
    model: PreTrainedModel, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the `position_ids` that a stock model has to be given, if any.

    Left alone, RoBERTa and its kin count the ids that are not padding, so that a token could move all that follow.

    Args:
        model: A stock model.
        attention_mask: ``[B, L]``.
        position_ids: ``[B, L]`` places from 0, where they are not those in the row.
    """
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if hasattr(table, "padding_idx")), None)
    if position_ids is not None:
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        return {"position_ids": position_ids + (0 if padding is None else padding + 1)} if takes_positions else {}
    if padding is None:
        return row_position_inputs(model, attention_mask)
    return {"position_ids": attention_mask.cumsum(dim=1) * attention_mask + padding}


@torch.no_grad()
def check_blindness(states: Callable[..., torch.Tensor], model: PreTrainedModel) -> None:
    """Refuse a model that shows a position its own token, by exchanging each token of a few short texts.

    Args:
        states: From `input_ids` and `attention_mask` to ``[B, L, D]`` states that should not know their own token; without
            dropout.
        model: The stock model behind it.

    Raises:
        InputError: Naming the model and its backend.
    """
    backend = model.config._attn_implementation
    if backend not in ("sdpa", "eager"):
        raise InputError(
            f"attn_implementation={backend!r}: the generator reads in one direction at a time, by masks that only "
            "'sdpa' and 'eager' take: choose one of them"
        )
    steps = torch.arange(7, device=model.device)
    # Whole, padded on the right, padded on the left; a row for each token to exchange.
    mask = torch.stack([steps >= 0, steps < 5, steps > 1]).long().repeat_interleave(len(steps), dim=0)
    vocab_size = len(model.get_input_embeddings().weight)
    ids = (vocab_size - 1 - steps).remainder(vocab_size).expand(mask.shape)
    rows, own = torch.arange(len(mask), device=model.device), steps.repeat(3)
    others = ids.index_put((rows, own), (ids[rows, own] + vocab_size // 2) % vocab_size)
    try:
        before, after = (states(input_ids=tokens, attention_mask=mask) for tokens in (ids, others))
        changes = (before - after).abs().amax(dim=-1)
    except Exception as error:  # an encoder may trip anywhere over a mask that it does not know
        problem = f"it fails on a mask of two directions ({type(error).__name__})"
    else:
        whole = changes[: len(steps)]
        if not changes[rows, own].max() <= _NOISE:
            problem = "it mixes positions in other ways than by masked attention, so that each would see its own token"
        elif torch.cat([whole.diagonal(2), whole.diagonal(-2)]).min() == 0:
            # The next but one is seen through the neighbour's attention.
            problem = "its attention does not reach the neighbouring tokens"
        else:
            return
    raise InputError(
        f"model_type={model.config.model_type!r} cannot be Electric's generator: {problem}; choose bert, roberta, electra, "
        "albert, deberta-v2, modernbert or another encoder of masked attention alone"
    )


@torch.no_grad()
def check_separation(states: Callable[..., torch.Tensor], model: PreTrainedModel, *, length: int) -> None:
    """Refuse a model that lets the documents of a row know of each other, by comparing two in a row with each alone.

    Args:
        states: From `input_ids`, `attention_mask`, `document_ids` and `position_ids`, the last two left out for one document,
            to ``[B, L, D]`` states; without dropout.
        model: The stock model behind it.
        length: Tokens of the row to try; some architectures attend in another way to long rows.

    Raises:
        InputError: Naming the model and what went wrong.
    """
    steps = torch.arange(max(length, 8), device=model.device)
    border, vocab_size = len(steps) // 3, len(model.get_input_embeddings().weight)
    documents = (steps >= border).long()
    ids = (vocab_size - 1 - steps).remainder(vocab_size)
    # The row as it is, with an edited first document, and with an edited second one.
    rows = torch.stack([ids.where(documents != edited, ids.flip(0)) for edited in (-1, 0, 1)])
    mask = torch.ones_like(rows)
    inputs = {"document_ids": documents, "position_ids": steps - border * documents}
    try:
        before, *after = states(rows, mask, **{name: value.expand(rows.shape) for name, value in inputs.items()})
        parts = (slice(0, border), slice(border, None))
        alone = torch.cat([states(ids[None, part], mask[:1, part])[0] for part in parts])
    except Exception as error:  # whatever an architecture does with a mask that it was not made for
        problem = f"it fails on a row of {len(steps)} tokens with a mask of documents ({type(error).__name__})"
    else:
        changes = [(row[part] - before[part]).abs().max() for row, part in zip(after, parts[::-1], strict=True)]
        if not max(changes) <= _NOISE:
            problem = "the states of a document change when another one in its row is edited"
        elif not (before - alone).norm() <= _ALONE_TOLERANCE * alone.norm():
            problem = "the states of a document in a row with others are not those that it has alone"
        else:
            return
    raise InputError(
        f"model_type={model.config.model_type!r} as Electric's generator cannot isolate documents: {problem}; use "
        "block_mode='doc_sentences', which gives each document rows of its own"
    )
