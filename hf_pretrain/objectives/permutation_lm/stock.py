"""A batch of permutation language modelling as stock XLNet takes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED


def stock_inputs(batch: Mapping[str, torch.Tensor], *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the arguments with which transformers' `XLNetLMHeadModel` predicts the targets of a batch.

    They take `L` times the memory of the batch: they are for comparison and for code that has only the stock model. Of
    targets that see nothing at all the stock logits are wrong: its softmax then runs over every token.

    Args:
        batch: What `DataCollatorForPermutationLM` made. Lanes and their resets say which `mems` go with it; those are the
            caller's.
        dtype: Type of the masks.

    Returns:
        `input_ids`, `attention_mask` and, if the batch has them, `token_type_ids`, all `[B, L]`; `perm_mask`, `[B, L, L]`,
        1 where `i` does not see `j`; `target_mapping`, `[B, P, L]`, 1 at the column of a target and nowhere for a filler;
        `labels`, `[B, P]`.

    Raises:
        InputError: If some lanes run backwards.
    """
    if "backward" in batch and bool(batch["backward"].any()):
        raise InputError(
            "backward is set for some rows, but stock XLNet tells directions by the place in the batch: convert a batch "
            "without backward lanes"
        )
    is_visible = batch["key_ranks"][:, None, :] < batch["thresholds"][:, :, None]
    target_mapping = is_visible.new_zeros((*batch["labels"].shape, batch["input_ids"].shape[1]), dtype=dtype)
    # A filler must map to no column: all targets of a column would add up there.
    is_target = (batch["labels"] != IGNORED).to(dtype)
    target_mapping.scatter_(2, batch["target_columns"][..., None], is_target[..., None])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    return inputs | {
        "perm_mask": (~is_visible).to(dtype),
        "target_mapping": target_mapping,
        "labels": batch["labels"],
    }
