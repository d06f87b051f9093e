"""The mask of padding, written so that a stock model need not look into it.

transformers leaves a mask out where nothing is padded, and asks the mask itself, `padding_mask.all()`: the step waits for the
device. The host knows the answer before the batch is transferred. So the model gets no mask where nothing is padded, and the
mask that transformers would have made where something is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import DISENTANGLED
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.rules import AttentionPlan

_RULE = "padding"
_BACKENDS = ("sdpa", "eager")


def has_padding(batch: Mapping[str, Any]) -> dict[str, bool]:
    """Return, as `is_padded`, whether any row of a batch on the host has padding; nothing without an `attention_mask`."""
    mask = batch.get("attention_mask")
    return {} if mask is None else {"is_padded": not bool(mask.all())}


def padding_inputs(backbone: PreTrainedModel, attention_mask: torch.Tensor, is_padded: bool | None) -> Any:
    """Return the `attention_mask` for a backbone that reads whole rows.

    The first batch tries the backbone out, whether it is padded or not: all ranks do it at the same step.

    Args:
        backbone: The stock model, with or without a head.
        attention_mask: ``[B, L]``, 0 at padding.
        is_padded: Whether there is any padding; None if it is not known.

    Returns:
        None where nothing is padded. Where something is, the mask that the stock model would make of `attention_mask`. The
        latter itself where `is_padded` is not known, or where the backbone's results would change.
    """
    if is_padded is None or not _asks_its_mask(backbone):
        return attention_mask
    if "flash" in backbone.config._attn_implementation:
        return attention_mask if is_padded else None
    if backbone.config._attn_implementation not in _BACKENDS:
        return attention_mask
    plan = rules.known_plan(backbone, _RULE)
    if plan is None:
        plan = _try_out(backbone, attention_mask)
    if not plan.takes_masks:
        return attention_mask
    return _mask(backbone, plan, attention_mask) if is_padded else None


def _asks_its_mask(backbone: PreTrainedModel) -> bool:
    """Whether transformers' shared functions make the backbone's masks; those of older architectures ask nothing."""
    body = backbone.base_model
    makers = vars(sys.modules[type(body).__module__]).values()
    return create_bidirectional_mask in makers and body.config.model_type not in DISENTANGLED


def _mask(backbone: PreTrainedModel, plan: AttentionPlan, attention_mask: torch.Tensor) -> Any:
    is_token_BL = attention_mask != 0

    def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return is_token_BL[row, key]

    return rules.mask_inputs(backbone, plan, visible, like=attention_mask)


@torch.compiler.disable
def _try_out(backbone: PreTrainedModel, attention_mask: torch.Tensor) -> AttentionPlan:
    """Compare the states under the stock model's own mask and under ours, bit for bit; remember whether ours will do."""

    def trial(body: PreTrainedModel, plan: AttentionPlan) -> str | None:
        length = max(attention_mask.shape[1], 4)
        ids = torch.stack([rules.arbitrary_tokens(body, length, shift=shift) for shift in (1, 2)])
        whole, padded = torch.ones_like(ids), torch.ones_like(ids)
        padded[1, length - 2 :] = 0
        for mask, own in ((whole, None), (padded, _mask(body, plan, padded))):
            expected, found = (body(input_ids=ids, attention_mask=one)[0] for one in (mask, own))
            if not torch.equal(expected[mask != 0], found[mask != 0]):
                return "its states change"
        return None

    try:
        return rules.try_out(backbone, _RULE, trial)
    except InputError:
        return rules.make_plan(backbone, _RULE, takes_masks=False)
