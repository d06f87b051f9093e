"""Which number format the machine computes fast."""

from __future__ import annotations

import torch


def bf16_is_fast() -> bool:
    """Return whether the accelerator, or else the CPU, has bf16 matrix units (GPUs with bf16; AVX512-BF16 or AMX)."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if accelerator.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Elsewhere (mps, xpu, ...) bf16 autocast is not known to pay: it has to be asked for.
    return False
