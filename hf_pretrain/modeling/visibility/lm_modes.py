"""One encoder as several language models: who sees whom in a row is one of four modes, for every attention backend.

Each token of a row gets an order, an integer, and sees the tokens whose order is not above its own. Bidirectional, all orders
are equal; in one direction the order is the place, or its negative; from sequence to sequence, the source has the order 0 and
the target counts on from 1. Padding sees padding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_pretrain.data.examples.lm_modes import LMMode
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.visibility import isolation as attention_masks
from hf_pretrain.modeling.visibility.isolation import (
    ALONE_TOLERANCE,
    EDIT_TOLERANCE,
    AttentionPlan,
    MaskFunction,
    arbitrary_tokens,
)


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
        position_ids: ``[B, L]`` place of each token, from 0; by default its place in the row with padding left out.
        **inputs: Further inputs, handed through.

    Returns:
        Keyword arguments for the backbone.

    Raises:
        InputError: If the backbone cannot keep to the modes.

    Source:
        UniLM (Dong et al. 2019, figure 1).
    """
    plan: AttentionPlan | None = getattr(backbone, "_lm_mode_plan", None)
    if plan is None or not plan.fits(backbone):
        plan = check_lm_modes(backbone, length=input_ids.shape[1])
    visible = mode_visibility(attention_mask, lm_modes=lm_modes, source_lengths=source_lengths)
    positions = _places(attention_mask) if position_ids is None else position_ids
    return {
        "input_ids": input_ids,
        "attention_mask": attention_masks.mask_inputs(backbone, plan, visible, like=input_ids),
        **attention_masks.position_inputs(plan, positions),
        **inputs,
    }


def mode_visibility(
    attention_mask: torch.Tensor, *, lm_modes: torch.Tensor, source_lengths: torch.Tensor
) -> MaskFunction:
    """Return who sees whom: a function of row, head, query and key.

    Args:
        attention_mask: ``[B, L]``, 0 at padding.
        lm_modes: ``[B]`` of [`LMMode`].
        source_lengths: ``[B]``, tokens of the source.
    """
    places_BL, is_token_BL = _places(attention_mask), attention_mask != 0
    after_source_BL = (places_BL - source_lengths[:, None] + 1).clamp(min=0)
    orders_MBL = torch.stack([torch.zeros_like(places_BL), places_BL, -places_BL, after_source_BL])  # as LMMode counts
    orders_BL = orders_MBL[lm_modes, torch.arange(len(lm_modes), device=lm_modes.device)]

    def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        in_order = orders_BL[row, key] <= orders_BL[row, query]
        return in_order & (is_token_BL[row, key] == is_token_BL[row, query])

    return visible


def _places(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the place of each token in its row, ``[B, L]``, however the row is padded."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


@torch.compiler.disable
def check_lm_modes(backbone: PreTrainedModel, *, length: int = 32) -> AttentionPlan:
    """Refuse a backbone in which a token would see what its mode hides; the others are remembered.

    What a backbone does is seen, not looked up: in each mode, parts of a row are edited, and the states that should see them
    move while the others do not. Rows that only a mask of padding tells apart are compared with what the backbone does without
    modes, padding on either side.

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
            f"{type(backbone).__name__} with attn_implementation={backbone.config._attn_implementation!r} cannot read text in "
            f"one direction or from sequence to sequence: {error}; train it bidirectionally, or choose another architecture "
            "such as bert, or attn_implementation='sdpa'"
        ) from None
    setattr(backbone, "_lm_mode_plan", plan)  # noqa: B010 (no attribute that the type knows)
    return plan


_NUM_PADDING = 2


def _try_out(body: PreTrainedModel, plan: AttentionPlan, length: int) -> str | None:
    """Return what goes wrong with rows of some length, one of each mode; None if nothing does."""
    num_tokens = length - _NUM_PADDING
    cut, source_length = 2 * num_tokens // 3, num_tokens // 3
    tokens, others = (arbitrary_tokens(body, num_tokens, step=step) for step in (3, 7))

    def read(row: torch.Tensor, *, left: bool = False) -> torch.Tensor:
        return _read_in_all_modes(body, plan, row, source_length=source_length, left=left)

    states = read(tokens)
    limit = EDIT_TOLERANCE * states.abs().max()
    after = (
        torch.cat([tokens[:cut], others[cut:]]),
        slice(0, cut),
        (LMMode.LEFT_TO_RIGHT, LMMode.SEQUENCE_TO_SEQUENCE),
    )
    before = (torch.cat([others[:cut], tokens[cut:]]), slice(cut, None), (LMMode.RIGHT_TO_LEFT,))
    for edited, kept, hiding in (after, before):
        moved = (read(edited) - states)[:, kept].abs().amax(dim=(1, 2))
        for mode in LMMode:
            if mode in hiding and not moved[mode] <= limit:
                return f"in mode {mode.name.lower()!r} the states of tokens change when one that they must not see is edited"
            if mode not in hiding and not moved[mode] > 0:
                return f"in mode {mode.name.lower()!r} tokens do not see what they should"
    source = tokens[:source_length]
    pairs = (
        (states[LMMode.BIDIRECTIONAL], _read_alone(body, tokens), "a row that sees all of itself"),
        (states[LMMode.SEQUENCE_TO_SEQUENCE, :source_length], _read_alone(body, source), "a source"),
        (states, read(tokens, left=True), "rows with padding on their left"),
    )
    for found, expected, what in pairs:
        if not (found - expected).norm() <= ALONE_TOLERANCE * expected.norm():
            return f"the states of {what} are not those that it has without a mask of modes or padding"
    return None


def _read_in_all_modes(
    body: PreTrainedModel, plan: AttentionPlan, row: torch.Tensor, *, source_length: int, left: bool
) -> torch.Tensor:
    """Return the states ``[4, n, D]`` of the ``[n]`` tokens of a row, one row a mode, with padding on a side."""
    padding = (_NUM_PADDING, 0) if left else (0, _NUM_PADDING)
    attention_mask = torch.nn.functional.pad(torch.ones_like(row), padding).expand(len(LMMode), -1)
    input_ids = torch.nn.functional.pad(row, padding, value=int(row[0])).expand(len(LMMode), -1)
    modes = torch.arange(len(LMMode), device=row.device)
    visible = mode_visibility(attention_mask, lm_modes=modes, source_lengths=torch.full_like(modes, source_length))
    states: torch.Tensor = body(
        input_ids=input_ids,
        attention_mask=attention_masks.mask_inputs(body, plan, visible, like=input_ids),
        **attention_masks.position_inputs(plan, _places(attention_mask)),
    )[0]
    begin = padding[0]
    return states[:, begin : begin + len(row)].float()


def _read_alone(body: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    """Return the states ``[n, D]`` of a row on its own, as the stock model reads it."""
    states: torch.Tensor = body(input_ids=row[None], attention_mask=torch.ones_like(row)[None])[0]
    return states[0].float()
