"""Which attention backend a training takes: flash attention where it can run, else the one that transformers gives the model.

transformers gives a model "sdpa" where its architecture has it, and "eager" elsewhere. Flash attention computes in half precision
only, so a model has it while a step runs under autocast, and its own backend otherwise: an evaluation task or an example for the
card runs the same model in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.utils import import_utils

AUTO = "auto"
"""Value of the option `attn_implementation` that leaves the choice to this module."""

_HALF = (torch.bfloat16, torch.float16)
# Names of the share of attention probabilities that is dropped.
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")
# Flash attention 3 is made for Hopper GPUs, and drops nothing.
_HOPPER, _AMPERE = 9, 8


def flash_backend(device: torch.device, dtype: torch.dtype, *, dropout: float = 0.0) -> str | None:
    """Return the fastest flash attention that can run, None where none can.

    Packages that are installed come first; with the package `kernels`, and unless the Hub is offline, one of the Hub's.

    Args:
        device: Where the model is trained.
        dtype: Number format of the computation.
        dropout: Share of the attention probabilities that is dropped.
    """
    if device.type != "cuda" or dtype not in _HALF or not torch.cuda.is_available():
        return None
    major, _ = torch.cuda.get_device_capability(device)
    versions = [version for version, least in ((3, _HOPPER), (2, _AMPERE)) if major >= least]
    if dropout:
        versions = [version for version in versions if version == 2]
    for version in versions:
        if getattr(import_utils, f"is_flash_attn_{version}_available")():
            return f"flash_attention_{version}"
    if import_utils.is_kernels_available() and not is_offline_mode():
        for version in versions:
            name = FLASH_ATTN_KERNEL_FALLBACK[f"flash_attention_{version}"]
            # Whatever a download or an extension that does not fit raises, there is another backend.
            with suppress(Exception):
                lazy_import_flash_attention(name)
                return name
    return None


def dropout_of(model: PreTrainedModel) -> float:
    """Return the share of the attention probabilities that a model drops in training."""
    return max(float(getattr(model.config, name, None) or 0.0) for name in _DROPOUTS)


class FastAttention:
    """Lets stock models run on flash attention while a step runs.

    Only those whose backend is "sdpa" are changed, and only where their architecture supports flash attention: another backend
    was somebody's choice.

    Args:
        models: The stock models that may be changed.
        device: Where they are trained.
        dtype: Number format of the computation.

    Attributes:
        backends: Name of the backend that each model has in a step, in their order.
        is_faster: Whether any of them is not the model's own.
    """

    def __init__(self, models: Sequence[PreTrainedModel], *, device: torch.device, dtype: torch.dtype) -> None:
        self._changed: list[tuple[PreTrainedModel, str]] = []
        self.backends: list[str] = []
        for model in models:
            body = model.base_model
            own, fast = str(body.config._attn_implementation), None
            if own == "sdpa" and body._supports_flash_attn:
                fast = flash_backend(device, dtype, dropout=dropout_of(body))
            self.backends.append(own if fast is None else fast)
            if fast is not None:
                self._changed.append((model, fast))
        self.is_faster = bool(self._changed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a step, and give the models their own backends again."""
        configs = [
            (config, fast) for model, fast in self._changed for config in (model.base_model.config, model.config)
        ]
        before = [config._attn_implementation for config, _ in configs]
        for config, fast in configs:
            config._attn_implementation_internal = fast
        try:
            yield
        finally:
            # Model and body may have one configuration.
            for (config, _), own in zip(configs, before, strict=True):
                config._attn_implementation_internal = own


def padded_bounds(attention_mask: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments by which flash attention keeps the tokens of each row apart from its padding.

    transformers would take the padding out, for which the step waits for the device at each layer. Here a row is two
    sequences, one of them of padding alone; the shapes are those of any batch, and nothing is read.

    Args:
        attention_mask: ``[B, L]``, 0 at padding, which is on one side of a row.

    Returns:
        `cu_seq_lens_q`, `cu_seq_lens_k` ``int32 [2B + 1]``, `max_length_q` and `max_length_k`, int.
    """
    num_rows, length = attention_mask.shape
    is_token = attention_mask != 0
    count_B = is_token.sum(dim=1)
    first_B = torch.where(is_token[:, 0], count_B, length - count_B)
    starts_B = torch.arange(num_rows, device=attention_mask.device) * length
    bounds = torch.stack([starts_B, starts_B + first_B], dim=1).flatten()
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=num_rows * length).int()
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
