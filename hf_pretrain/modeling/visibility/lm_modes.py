"""One encoder as several language models: a row is read in one of four modes, for every attention backend.

Each token of a row gets an order, an integer, and sees the tokens whose order is not above its own. Bidirectional, all orders
are equal; in one direction the order is the position, or its negative; from sequence to sequence, the source has the order 0
and the target counts on from 1. Padding sees padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_pretrain.data.examples.lm_modes import LMMode
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.rules import AttentionPlan, Edit, MaskFunction, find_leak, is_alike, row_positions

_RULE = "lm_modes"


def lm_mode_inputs(
    backbone: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    lm_modes: torch.Tensor,
    source_lengths: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Turn a batch into what a stock model takes, so that each row is read in its mode.

    The first call tries the backbone out, see [`check_lm_modes`].

    Args:
        backbone: The stock model that the inputs are for, with or without a head.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 0 at padding, on either side.
        lm_modes: ``[B]`` of [`LMMode`].
        source_lengths: ``[B]``, from sequence to sequence the tokens of the source with the special tokens around it; not read
            in the other modes.
        position_ids: ``[B, L]`` position of each token, from 0; by default its position in the row with padding left out.
        **inputs: Further inputs, handed through.

    Returns:
        Keyword arguments for the backbone.

    Raises:
        InputError: If the backbone cannot keep to the modes.

    Source:
        UniLM (Dong et al. 2019, figure 1).
    """
    plan = rules.known_plan(backbone, _RULE)
    if plan is None:
        plan = check_lm_modes(backbone, length=input_ids.shape[1])
    visible = mode_visibility(attention_mask, lm_modes=lm_modes, source_lengths=source_lengths)
    positions = row_positions(attention_mask) if position_ids is None else position_ids
    return {
        "input_ids": input_ids,
        "attention_mask": rules.mask_inputs(backbone, plan, visible, like=input_ids),
        **rules.position_inputs(plan, positions),
        **inputs,
    }


def left_to_right_inputs(
    backbone: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Turn a batch into what a stock model takes, so that each row is read from left to right; see [`lm_mode_inputs`]."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    modes = torch.full_like(input_ids[:, 0], LMMode.LEFT_TO_RIGHT)
    source_lengths = torch.zeros_like(modes)
    return lm_mode_inputs(
        backbone, input_ids=input_ids, attention_mask=mask, lm_modes=modes, source_lengths=source_lengths, **inputs
    )


def mode_visibility(
    attention_mask: torch.Tensor, *, lm_modes: torch.Tensor, source_lengths: torch.Tensor
) -> MaskFunction:
    """Return the rule of each row's mode.

    Args:
        attention_mask: ``[B, L]``, 0 at padding.
        lm_modes: ``[B]`` of [`LMMode`].
        source_lengths: ``[B]``, tokens of the source.
    """
    positions_BL = row_positions(attention_mask)
    after_source_BL = (positions_BL - source_lengths[:, None] + 1).clamp(min=0)
    orders_MBL = torch.stack(
        [torch.zeros_like(positions_BL), positions_BL, -positions_BL, after_source_BL]
    )  # as LMMode
    orders_BL = orders_MBL[lm_modes, torch.arange(len(lm_modes), device=lm_modes.device)]
    return rules.sees_within(attention_mask != 0, orders_BL)


def check_lm_modes(backbone: PreTrainedModel, *, length: int = 32) -> AttentionPlan:
    """Refuse a backbone in which a token would see what its mode hides; the others are remembered.

    In each mode, parts of a row are edited: the states that should see them move, the others do not. Rows that differ only by
    their mask of padding are compared with what the backbone does without modes, padding on either side.

    Args:
        backbone: A stock model, with or without a head; on a device, and under the autocast that it is trained with.
        length: Tokens of the row to try, or as many as the backbone has positions for; some architectures attend in another way
            to long rows.

    Raises:
        InputError: Naming the architecture and what went wrong.
    """
    length = min(length, longest_sequence(backbone) or length)
    try:
        return rules.try_out(
            backbone, _RULE, lambda body, plan: find_fault(body, plan, modes=list(LMMode), length=length)
        )
    except InputError as error:
        raise InputError(
            f"{type(backbone).__name__} with attn_implementation={backbone.config._attn_implementation!r} cannot read text in "
            f"one direction or from sequence to sequence: {error}; train it bidirectionally, or choose another architecture "
            "such as bert, or attn_implementation='sdpa'"
        ) from None


_NUM_PADDING = 2


def find_fault(body: PreTrainedModel, plan: AttentionPlan, *, modes: Sequence[LMMode], length: int) -> str | None:
    """Return what goes wrong with rows of some length, one of each mode; None if nothing does."""
    num_tokens = max(length, 8) - _NUM_PADDING
    cut, source_length = 2 * num_tokens // 3, num_tokens // 3
    tokens, others = (rules.arbitrary_tokens(body, num_tokens, shift=shift) for shift in (1, 2))

    def read(row: torch.Tensor, *, left: bool = False) -> torch.Tensor:
        return _read_in_modes(body, plan, row, modes=modes, source_length=source_length, left=left)

    def hiding(*names: LMMode) -> list[int]:
        return [row for row, mode in enumerate(modes) if mode in names]

    after = torch.cat([tokens[:cut], others[cut:]])
    before = torch.cat([others[:cut], tokens[cut:]])
    edits = [
        Edit(after, slice(0, cut), hiding(LMMode.LEFT_TO_RIGHT, LMMode.SEQUENCE_TO_SEQUENCE)),
        Edit(before, slice(cut, None), hiding(LMMode.RIGHT_TO_LEFT)),
    ]
    leak = find_leak(read, tokens, edits)
    if leak is not None:
        name = modes[leak[0]].name.lower()
        if leak[1]:
            return f"in mode {name!r} the states of tokens change when one that they must not see is edited"
        return f"in mode {name!r} tokens do not see what they should"
    states, source = read(tokens), tokens[:source_length]
    pairs = [(states, read(tokens, left=True), "rows with padding on their left")]
    for row in hiding(LMMode.BIDIRECTIONAL):
        pairs.append((states[row], _read_alone(body, tokens), "a row that sees all of itself"))
    for row in hiding(LMMode.SEQUENCE_TO_SEQUENCE):
        pairs.append((states[row, :source_length], _read_alone(body, source), "a source"))
    for found, expected, what in pairs:
        if not is_alike(found, expected):
            return f"the states of {what} are not those that it has without a mask of modes or padding"
    return None


def _read_in_modes(
    body: PreTrainedModel,
    plan: AttentionPlan,
    row: torch.Tensor,
    *,
    modes: Sequence[LMMode],
    source_length: int,
    left: bool,
) -> torch.Tensor:
    """Return the states ``[M, n, D]`` of the ``[n]`` tokens of a row, one row a mode, with padding on a side."""
    padding = (_NUM_PADDING, 0) if left else (0, _NUM_PADDING)
    attention_mask = torch.nn.functional.pad(torch.ones_like(row), padding).expand(len(modes), -1)
    input_ids = torch.nn.functional.pad(row, padding, value=int(row[0])).expand(len(modes), -1)
    numbers = torch.tensor([int(mode) for mode in modes], device=row.device)
    visible = mode_visibility(attention_mask, lm_modes=numbers, source_lengths=torch.full_like(numbers, source_length))
    states: torch.Tensor = body(
        input_ids=input_ids,
        attention_mask=rules.mask_inputs(body, plan, visible, like=input_ids),
        **rules.position_inputs(plan, row_positions(attention_mask)),
    )[0]
    begin = padding[0]
    return states[:, begin : begin + len(row)].float()


def _read_alone(body: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    """Return the states ``[n, D]`` of a row on its own, as the stock model reads it."""
    states: torch.Tensor = body(input_ids=row[None], attention_mask=torch.ones_like(row)[None])[0]
    return states[0].float()
