"""Several documents in a row that do not see each other, for every attention backend.

A batch says which document each token belongs to. What the attention of a stock model takes instead (a block mask, one for
each kind of layer, or the bounds of sequences) is made here, on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_overlay,
)

from hf_pretrain.errors import InputError

# Attention of their own: the mask has three dimensions.
_DISENTANGLED = frozenset({"deberta", "deberta-v2"})

# Of the trial by which a backbone is judged. An edit of one document must not move another at all; against the document
# alone, in another shape and perhaps in bfloat16, sums are rounded differently, but wrong positions move every state.
_EDIT_TOLERANCE = 1e-6
_ALONE_TOLERANCE = 0.05


class _Plan(NamedTuple):
    """What is known of a backbone that was found fit.

    Attributes:
        backend: The attention backend that it was tried out with.
        takes_positions: Whether it can be told where a document starts; one that cannot has relative positions.
        first_position: Number of the first position in its table: RoBERTa and its kin count from `padding_idx + 1`.
    """

    backend: str
    takes_positions: bool
    first_position: int


def isolated_inputs(
    backbone: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    document_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Turn a batch into what a stock model takes, so that the documents of a row do not see each other.

    The first call tries the backbone out, see [`check_isolation`].

    Args:
        backbone: The stock model that the inputs are for, with or without a head.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 0 at padding.
        document_ids: ``[B, L]`` number of the document in its row that a token belongs to, -1 at padding; documents are
            contiguous. None if each row is one document.
        position_ids: ``[B, L]`` place of a token in its document, from 0; needed with `document_ids`.
        **inputs: Further inputs, handed through.

    Returns:
        Keyword arguments for the backbone. Without `document_ids`, the arguments as they came. Padding sees only padding.

    Raises:
        InputError: If the backbone cannot isolate documents.
    """
    batch: dict[str, Any] = {"input_ids": input_ids, **inputs}
    if document_ids is None:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return batch | {"attention_mask": attention_mask} | positions
    assert position_ids is not None, "the collator gives position_ids along with document_ids"
    plan: _Plan | None = getattr(backbone, "_isolation_plan", None)
    if plan is None or plan.backend != backbone.config._attn_implementation:
        plan = check_isolation(backbone, length=input_ids.shape[1])
    return batch | _attention_inputs(backbone, plan, document_ids=document_ids, position_ids=position_ids)


@torch.compiler.disable
def check_isolation(backbone: PreTrainedModel, *, length: int = 32) -> _Plan:
    """Refuse a backbone that cannot keep the documents of a row apart; the others are remembered.

    What a backbone does is seen, not looked up: the states of two documents in a row are compared with those of the same
    documents alone, and while the other one is edited. That holds for its attention backend too, and for what mixes
    tokens elsewhere (convolutions, Fourier layers, statistics of a row).

    Args:
        backbone: A stock model, with or without a head; on a device, and under the autocast that it is trained with.
        length: Tokens of the row to try; some architectures attend in another way to long rows.

    Raises:
        InputError: Naming the architecture and what went wrong.
    """
    body = backbone.base_model
    _let_embeddings_take_block_masks(body)
    plan = _Plan(
        backend=body.config._attn_implementation,
        takes_positions="position_ids" in inspect.signature(body.forward).parameters,
        first_position=_first_position(body),
    )
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with torch.no_grad():
            failure = _try_out(body, plan, max(length, 8))
    except Exception as error:  # Whatever it does with a mask that it was not made for.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = f"its forward fails with a mask of blocks ({reason})"
    finally:
        for module in training:
            module.training = True
    if failure:
        raise InputError(
            f"{type(backbone).__name__} with attn_implementation={backbone.config._attn_implementation!r} cannot isolate "
            f"documents: {failure}; use block_mode='doc_sentences', which gives each document rows of its own"
        )
    setattr(backbone, "_isolation_plan", plan)  # noqa: B010 (no attribute that the type knows)
    return plan


def _try_out(body: PreTrainedModel, plan: _Plan, length: int) -> str | None:
    """Return what goes wrong with two documents in a row of some length, None if nothing does."""
    first, second, edited_first, edited_second = _documents_to_try(body, length)

    def together(*documents: torch.Tensor) -> torch.Tensor:
        row = torch.cat(documents)[None]
        lengths = torch.tensor([len(document) for document in documents], device=row.device)
        ids = torch.arange(len(documents), device=row.device).repeat_interleave(lengths)[None]
        positions = torch.cat([torch.arange(len(document), device=row.device) for document in documents])[None]
        states: torch.Tensor = body(
            input_ids=row, **_attention_inputs(body, plan, document_ids=ids, position_ids=positions)
        )[0]
        return states[0].float()

    states = together(first, second)
    edits = [(states[: len(first)], together(first, edited_second)[: len(first)])]
    edits += [(states[len(first) :], together(edited_first, second)[len(first) :])]
    for before, after in edits:
        if not (before - after).abs().max() <= _EDIT_TOLERANCE * before.abs().max():
            return "the states of a document change when another one in its row is edited"
    for document, packed in ((first, states[: len(first)]), (second, states[len(first) :])):
        alone = body(input_ids=document[None], attention_mask=torch.ones_like(document)[None])[0][0].float()
        if not (packed - alone).norm() <= _ALONE_TOLERANCE * alone.norm():
            return "the states of a document in a row with others are not those that it has alone"
    return None


def _documents_to_try(body: PreTrainedModel, length: int) -> list[torch.Tensor]:
    """Return two documents that fill a row and an edit of each, of arbitrary tokens that are not padding."""
    tokens = torch.arange(min(body.config.vocab_size, 100), device=body.device)
    tokens = tokens[tokens != getattr(body.config, "pad_token_id", None)]
    places, third = torch.arange(length, device=body.device), length // 3
    sizes = (third, length - third, third, length - third)
    return [tokens[(step * places[:size] + 1) % len(tokens)] for size, step in zip(sizes, (3, 2, 7, 5), strict=True)]


def _attention_inputs(
    backbone: PreTrainedModel, plan: _Plan, *, document_ids: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Any]:
    """Return attention mask (or what takes its place) and positions, as the backbone's attention takes them."""
    inputs = {"position_ids": position_ids + plan.first_position} if plan.takes_positions else {}
    if backbone.config.model_type in _DISENTANGLED:
        return inputs | {"attention_mask": document_ids[:, :, None] == document_ids[:, None, :]}
    if "flash" in plan.backend:
        return inputs | {"attention_mask": None} | sequence_bounds(document_ids)
    if plan.backend not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise InputError(f"no mask is known for attn_implementation={plan.backend!r}")
    return inputs | {"attention_mask": _block_masks(backbone, document_ids)}


def _block_masks(backbone: PreTrainedModel, document_ids: torch.Tensor) -> Any:
    """Return the mask of the backend: one, or where layers differ, one for each kind of layer."""
    same_document = packed_sequence_mask_function(document_ids)
    if "sliding_attention" not in (getattr(backbone.config, "layer_types", None) or ()):
        return _block_mask(backbone, document_ids, same_document)
    # A window counts places in the row: inside a document, those are as far apart as places in the document.
    in_window = and_masks(same_document, sliding_window_bidirectional_overlay(backbone.config.sliding_window))
    return {
        "full_attention": _block_mask(backbone, document_ids, same_document),
        "sliding_attention": _block_mask(backbone, document_ids, in_window),
    }


def _block_mask(backbone: PreTrainedModel, document_ids: torch.Tensor, visible: Callable[..., torch.Tensor]) -> Any:
    """Let transformers write a mask as the backend takes it: boolean for sdpa, added to the scores for eager."""
    num_rows, length = document_ids.shape
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[backbone.config._attn_implementation]
    return make_mask(
        batch_size=num_rows,
        q_length=length,
        kv_length=length,
        mask_function=visible,
        allow_is_causal_skip=False,
        dtype=backbone.dtype,
        device=document_ids.device,
        config=backbone.config,
    )


def sequence_bounds(document_ids: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments by which flash attention isolates sequences that lie one after the other.

    Args:
        document_ids: ``[B, L]``; each run of padding is a sequence of its own, so that rows need not be flattened.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, ``int32 [S + 1]``, the bounds of the sequences in the ``B * L`` tokens, and
        `max_length_q` and `max_length_k`, int. The longest sequence is taken to be a whole row: an upper bound, which
        spares a wait for the device.
    """
    num_rows, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    bounds = nn.functional.pad(starts, (0, 1), value=num_rows * length).int()
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


def _first_position(body: PreTrainedModel) -> int:
    for name, module in body.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def _let_embeddings_take_block_masks(body: PreTrainedModel) -> None:
    """Let DeBERTa's embeddings, which clear padding by the mask, take a block mask: its diagonal says the same."""
    if body.config.model_type not in _DISENTANGLED:
        return

    def take_diagonal(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("mask")
        if mask is not None and mask.dim() == 3:
            kwargs = kwargs | {"mask": mask.diagonal(dim1=1, dim2=2)}
        return args, kwargs

    body.embeddings.register_forward_pre_hook(take_diagonal, with_kwargs=True)
