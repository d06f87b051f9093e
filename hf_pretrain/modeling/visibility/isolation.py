"""Several documents in a row that do not see each other, for every attention backend.

A batch says which document each token belongs to. The attention of a stock model takes something else (a mask, one for each
kind of layer, or the bounds of sequences), which is made here, on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import row_position_inputs
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.padding import padding_inputs
from hf_pretrain.modeling.visibility.rules import AttentionPlan, Edit, find_leak, is_alike, known_plan

_RULE = "isolation"


def isolated_inputs(
    backbone: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    document_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    is_padded: bool | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Turn a batch into what a stock model takes, so that the documents of a row do not see each other.

    The first batch with documents tries the backbone out, see [`check_isolation`].

    Args:
        backbone: The stock model that the inputs are for, with or without a head.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 0 at padding.
        document_ids: ``[B, L]`` number of the document in its row that a token belongs to, -1 at padding; documents are
            contiguous. None if each row is one document.
        position_ids: ``[B, L]`` position of a token in its document, from 0; needed with `document_ids`.
        is_padded: Whether any row has padding; None if it is not known, so that a stock model may look at the mask and wait for
            the device.
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
            positions = row_position_inputs(backbone, attention_mask)
        return batch | {"attention_mask": padding_inputs(backbone, attention_mask, is_padded)} | positions
    assert position_ids is not None, "the collator gives position_ids along with document_ids"
    plan = known_plan(backbone, _RULE)
    if plan is None:
        plan = check_isolation(backbone, length=input_ids.shape[1])
    return batch | _attention_inputs(backbone, plan, document_ids=document_ids, position_ids=position_ids)


def check_isolation(backbone: PreTrainedModel, *, length: int = 32) -> AttentionPlan:
    """Refuse a backbone that cannot keep the documents of a row apart; the others are remembered.

    The states of two documents in a row are compared with those of the same documents alone, and while the other one is edited.
    That covers its attention backend too, and whatever mixes tokens elsewhere: convolutions, Fourier layers, statistics.

    Args:
        backbone: A stock model, with or without a head; on a device, and under the autocast that it is trained with.
        length: Tokens of the row to try; some architectures attend in another way to long rows.

    Raises:
        InputError: Naming the architecture and what went wrong.
    """

    def trial(body: PreTrainedModel, plan: AttentionPlan) -> str | None:
        def read(row: torch.Tensor, documents: dict[str, torch.Tensor] | None) -> torch.Tensor:
            own = {"attention_mask": torch.ones_like(row)}
            states: torch.Tensor = body(
                input_ids=row, **(own if documents is None else _attention_inputs(body, plan, **documents))
            )[0]
            return states

        return find_mixing(read, body, length=length)

    try:
        return rules.try_out(backbone, _RULE, trial)
    except InputError as error:
        raise InputError(
            f"{type(backbone).__name__} with attn_implementation={backbone.config._attn_implementation!r} cannot isolate "
            f"documents: {error}; use block_mode='doc_sentences', which gives each document rows of its own"
        ) from None


def find_mixing(
    read: Callable[[torch.Tensor, dict[str, torch.Tensor] | None], torch.Tensor], body: PreTrainedModel, *, length: int
) -> str | None:
    """Return what goes wrong with two documents in a row of some length, None if nothing does.

    Args:
        read: From tokens ``[1, L]`` and `document_ids` and `position_ids` ``[1, L]``, None for one document, to states
            ``[1, L, D]``.
        body: The stock model without a head that reads.
        length: Tokens of the row.
    """
    length = max(length, 8)
    third = length // 3
    sizes = (third, length - third, third, length - third)
    # Two documents that fill a row, and an edit of each.
    first, second, edited_first, edited_second = (
        rules.arbitrary_tokens(body, size, shift=shift) for size, shift in zip(sizes, (1, 2, 2, 1), strict=True)
    )
    positions_L = torch.arange(length, device=first.device)
    ids_L = (positions_L >= third).long()
    documents = {"document_ids": ids_L[None], "position_ids": (positions_L - third * ids_L)[None]}

    def together(row: torch.Tensor) -> torch.Tensor:
        return read(row[None], documents).float()

    row, parts = torch.cat([first, second]), (slice(0, third), slice(third, None))
    edits = [
        Edit(torch.cat([first, edited_second]), parts[0], [0]),
        Edit(torch.cat([edited_first, second]), parts[1], [0]),
    ]
    if find_leak(together, row, edits) is not None:
        return "the states of a document change when another one in its row is edited"
    states = together(row)[0]
    if not all(is_alike(states[part], read(row[None, part], None)[0].float()) for part in parts):
        return "the states of a document in a row with others are not those that it has alone"
    return None


def _attention_inputs(
    backbone: PreTrainedModel, plan: AttentionPlan, *, document_ids: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Any]:
    """Return attention mask (or what takes its place) and positions, as the backbone's attention takes them."""
    inputs: dict[str, Any] = rules.position_inputs(plan, position_ids)
    if plan.is_flash:
        return inputs | {"attention_mask": None} | sequence_bounds(document_ids)
    mask = rules.mask_inputs(backbone, plan, rules.sees_within(document_ids), like=document_ids)
    return inputs | {"attention_mask": mask}


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
