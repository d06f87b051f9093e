"""The draws of [`hf_pretrain.data.draws`] on a device, bit by bit, for what is drawn inside a model."""

from __future__ import annotations

import torch

from hf_pretrain.data import draws


def _signed(number: int) -> int:
    """Return the 64-bit integer of the same bits that torch can hold."""
    return number - 2**64 if number >= 2**63 else number


_GOLDEN, _MIX_1, _MIX_2 = (_signed(int(number)) for number in (draws.GOLDEN, draws.MIX_1, draws.MIX_2))


def bits(keys: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return 64 random bits for each key and number: what `draws.bits` has at that position.

    Args:
        keys: ``int64``, the bits of keys.
        numbers: ``int64`` positions from 0; both are broadcast.

    Returns:
        ``int64``.
    """
    mixed = keys + (numbers + 1) * _GOLDEN
    for count, factor in ((30, _MIX_1), (27, _MIX_2)):
        mixed = (mixed ^ shifted(mixed, count)) * factor
    return mixed ^ shifted(mixed, 31)


def shifted(values: torch.Tensor, count: int) -> torch.Tensor:
    """Shift to the right and fill with zeros; torch alone would fill with the sign."""
    return (values >> count) & (2 ** (64 - count) - 1)
