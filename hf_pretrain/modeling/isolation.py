"""Several documents in a row that do not see each other, for every attention backend.

A batch says which document each token belongs to. What the attention of a stock model takes instead (a block mask, one for
each kind of layer, or the bounds of sequences) is made here, on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import packed_sequence_mask_function

from hf_pretrain.errors import InputError
from hf_pretrain.modeling import attention_masks
from hf_pretrain.modeling.attention_masks import ALONE_TOLERANCE, EDIT_TOLERANCE, AttentionPlan, arbitrary_tokens


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
        Keyword arguments for the backbone. Without `document_ids`, the arguments as they came, and positions that do not count
        padding on the left where the backbone would. Padding sees only padding.

    Raises:
        InputError: If the backbone cannot isolate documents.
    """
    batch: dict[str, Any] = {"input_ids": input_ids, **inputs}
    if document_ids is None:
        if position_ids is not None:
            positions = {"position_ids": position_ids}
        else:
            positions = attention_masks.row_position_inputs(backbone, attention_mask)
        return batch | {"attention_mask": attention_mask} | positions
    assert position_ids is not None, "the collator gives position_ids along with document_ids"
    plan: AttentionPlan | None = getattr(backbone, "_isolation_plan", None)
    if plan is None or not plan.fits(backbone):
        plan = check_isolation(backbone, length=input_ids.shape[1])
    return batch | _attention_inputs(backbone, plan, document_ids=document_ids, position_ids=position_ids)


@torch.compiler.disable
def check_isolation(backbone: PreTrainedModel, *, length: int = 32) -> AttentionPlan:
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
    try:
        plan = attention_masks.try_out(backbone, lambda body, plan: _try_out(body, plan, max(length, 8)))
    except InputError as error:
        raise InputError(
            f"{type(backbone).__name__} with attn_implementation={backbone.config._attn_implementation!r} cannot isolate "
            f"documents: {error}; use block_mode='doc_sentences', which gives each document rows of its own"
        ) from None
    setattr(backbone, "_isolation_plan", plan)  # noqa: B010 (no attribute that the type knows)
    return plan


def _try_out(body: PreTrainedModel, plan: AttentionPlan, length: int) -> str | None:
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
        if not (before - after).abs().max() <= EDIT_TOLERANCE * before.abs().max():
            return "the states of a document change when another one in its row is edited"
    for document, packed in ((first, states[: len(first)]), (second, states[len(first) :])):
        alone = body(input_ids=document[None], attention_mask=torch.ones_like(document)[None])[0][0].float()
        if not (packed - alone).norm() <= ALONE_TOLERANCE * alone.norm():
            return "the states of a document in a row with others are not those that it has alone"
    return None


def _documents_to_try(body: PreTrainedModel, length: int) -> list[torch.Tensor]:
    """Return two documents that fill a row and an edit of each, of arbitrary tokens that are not padding."""
    third = length // 3
    sizes = (third, length - third, third, length - third)
    return [arbitrary_tokens(body, size, step=step) for size, step in zip(sizes, (3, 2, 7, 5), strict=True)]


def _attention_inputs(
    backbone: PreTrainedModel, plan: AttentionPlan, *, document_ids: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Any]:
    """Return attention mask (or what takes its place) and positions, as the backbone's attention takes them."""
    inputs: dict[str, Any] = attention_masks.position_inputs(plan, position_ids)
    if plan.is_flash:
        return inputs | {"attention_mask": None} | sequence_bounds(document_ids)
    same_document = packed_sequence_mask_function(document_ids)
    return inputs | {"attention_mask": attention_masks.mask_inputs(backbone, plan, same_document, like=document_ids)}


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
