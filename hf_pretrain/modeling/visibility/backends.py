"""Which attention backend a training takes: flash attention where it can run, else the one that transformers gives the model.

transformers gives a model "sdpa" where its architecture has it, and "eager" elsewhere. Flash attention computes in half precision
only, so a model has it while a step runs under autocast, and its own backend otherwise: an evaluation task or an example for the
card runs the same model in float32.

FlexAttention has no backward pass on a CPU, where models are built and tried out. So a model has it while a step runs too, where
the option `attn_implementation` names it; it is never chosen otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from huggingface_hub import is_offline_mode
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.utils import import_utils, logging

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import own_backend

AUTO = "auto"
"""Value of the option `attn_implementation` that leaves the choice to this module."""

FLEX = "flex_attention"
"""Value of the option that asks for FlexAttention in each step."""

OWN_MASKS = "the method has masks of its own"
"""Why a model stays on its own backend, where its method does not say more."""

_HALF = (torch.bfloat16, torch.float16)
# Names of the share of attention probabilities that is dropped; a class has one of them for all of its parts.
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
# Flash attention 3 is made for Hopper GPUs, and drops nothing.
_HOPPER, _AMPERE = 9, 8
# Kernels have no wider heads.
_WIDEST_HEAD = 256
# The kernels of FlexAttention have no narrower ones, and no backward pass on these devices.
_NARROWEST_FLEX_HEAD = 16
_WITHOUT_FLEX_BACKWARD = ("cpu", "mps")
# Graphs of FlexAttention in a run: by kind of mask, shape, and with or without gradients. ModernBERT made 16 in a short run.
_MOST_FLEX_GRAPHS = 64

logger = logging.get_logger(__name__)


class Choice(NamedTuple):
    """The attention backend of a model.

    Attributes:
        backend: Its name; None where there is no flash attention.
        reason: Why it is not flash attention; "" where it is, or where somebody named it.
    """

    backend: str | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})" if self.reason else str(self.backend)


class Attending(NamedTuple):
    """A stock model that attends in a step.

    Attributes:
        model: The model.
        device: Where it runs.
        dtype: Number format of its computation.
        drops: Whether it is trained, and so drops a share of its attention probabilities.
    """

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    drops: bool = True


def flash_backend(device: torch.device, dtype: torch.dtype, *, dropout: float = 0.0) -> Choice:
    """Return the fastest flash attention that can run, or why none can.

    Packages that are installed come first; with the package `kernels`, and unless the Hub is offline, one of the Hub's.

    Args:
        device: Where the model is trained.
        dtype: Number format of the computation.
        dropout: Share of the attention probabilities that is dropped.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return Choice(None, "flash attention needs a GPU")
    if dtype not in _HALF:
        return Choice(None, f"flash attention needs bf16 or fp16, not {str(dtype).removeprefix('torch.')}")
    major, _ = torch.cuda.get_device_capability(device)
    able = [version for version, least in ((3, _HOPPER), (2, _AMPERE)) if major >= least]
    if not able:
        return Choice(None, f"flash attention needs a GPU of compute capability {_AMPERE}.0")
    versions = [version for version in able if not dropout or version == 2]
    for version in versions:
        if getattr(import_utils, f"is_flash_attn_{version}_available")():
            return Choice(f"flash_attention_{version}")
    if import_utils.is_kernels_available() and not is_offline_mode():
        for version in versions:
            name = FLASH_ATTN_KERNEL_FALLBACK[f"flash_attention_{version}"]
            # Whatever a download or an extension that does not fit raises, there is another backend.
            with suppress(Exception):
                lazy_import_flash_attention(name)
                return Choice(name)
    if dropout and import_utils.is_flash_attn_3_available():
        return Choice(None, f"flash attention 3 has no dropout of probabilities ({dropout:g}), 2 is not installed")
    return Choice(None, "flash attention is not installed")


def dropout_of(model: PreTrainedModel) -> float:
    """Return the share of the attention probabilities that a model drops in training, the largest of its parts."""
    return _largest_dropout(model)[0]


def _largest_dropout(model: PreTrainedModel) -> tuple[float, str]:
    """Return the same share, and the name that it has in the configuration."""
    return max((float(getattr(config, name, None) or 0.0), name) for config in _configs(model) for name in _DROPOUTS)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configurations that the modules of a model read their backend from; a part may have a copy of its own."""
    found = {id(model.config): model.config} if isinstance(model, PreTrainedModel) else {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


def _head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head, 0 if it is not known."""
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    own = getattr(config, "head_dim", None)
    if isinstance(own, int):
        return own
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0


def _choose(part: Attending) -> Choice:
    """Return the backend of a model that a method gives nothing but padding, documents and causality."""
    own = own_backend(part.model)
    bodies = [module for module in part.model.base_model.modules() if isinstance(module, PreTrainedModel)]
    if not all(module._supports_flash_attn for module in bodies):
        return Choice(own, f"{type(part.model).__name__} has no flash attention")
    # Of an architecture without SDPA, transformers chose the plain attention.
    if own != ("sdpa" if part.model.base_model._supports_sdpa else "eager"):
        return Choice(own)
    if max(_head_width(config) for config in _configs(part.model)) > _WIDEST_HEAD:
        return Choice(own, f"flash attention has no heads wider than {_WIDEST_HEAD}")
    found = flash_backend(part.device, part.dtype, dropout=dropout_of(part.model) if part.drops else 0.0)
    return Choice(own, found.reason) if found.backend is None else found


def _why_no_flex(part: Attending) -> str | None:
    """Return why a model cannot run on FlexAttention, None if it can."""
    name = type(part.model).__name__
    if own_backend(part.model) is None:
        return f"{name} has an attention of its own"
    bodies = [module for module in part.model.base_model.modules() if isinstance(module, PreTrainedModel)]
    if not all(module._supports_flex_attn for module in bodies):
        return f"{name} has no {FLEX}"
    if any(getattr(module, "has_relative_attention_bias", False) for module in part.model.modules()):
        # T5 and its kin: the function that adds it asks for as many biases as rows.
        return f"{name} adds a bias of positions to its scores, which transformers gives {FLEX} for one row alone"
    narrowest = min(filter(None, map(_head_width, _configs(part.model))), default=_NARROWEST_FLEX_HEAD)
    if narrowest < _NARROWEST_FLEX_HEAD:
        return f"it has no heads narrower than {_NARROWEST_FLEX_HEAD}, and those of {name} have {narrowest}"
    share, option = _largest_dropout(part.model)
    if part.drops and share:
        return (
            f"it drops no attention probabilities, and {name} has {option}={share:g} (config_overrides, or config.json of a "
            "checkpoint, can set it to 0)"
        )
    if part.device.type in _WITHOUT_FLEX_BACKWARD:
        return f"it has no backward pass on the device {part.device.type!r}"
    return None


def _flex_choices(parts: Mapping[str, Attending], allowed: Collection[str], why_not: str) -> dict[str, Choice]:
    """Return FlexAttention for each model, or the own backend of a frozen one; refuse a trained one that cannot run on it."""
    # What no option can mend comes first.
    faults = {name: f"the {name} keeps its own attention, as {why_not}" for name in parts if name not in allowed}
    faults |= {name: fault for name in parts if name in allowed and (fault := _why_no_flex(parts[name]))}
    for name, fault in faults.items():
        if parts[name].drops:
            raise InputError(f"attn_implementation={FLEX!r}: {fault}; choose 'auto'")
    return {
        name: Choice(own_backend(part.model), faults[name]) if name in faults else Choice(FLEX)
        for name, part in parts.items()
    }


class FastAttention:
    """Chooses the attention backend of each stock model, and lets some run on flash or FlexAttention while a step runs.

    Flash attention is given only to a model on the backend that transformers gives it, and only where its architecture supports
    it: another backend was somebody's choice. FlexAttention is given to all models, if it is wanted. A frozen model that cannot
    run on it keeps its own backend.

    Args:
        parts: The stock models that attend in a step, by name.
        allowed: Names of those that may be changed.
        why_not: Why the others may not be; "" where the options name a backend.
        wanted: "flex_attention" if the models are to have that in each step.

    Raises:
        InputError: If FlexAttention is wanted, and a model that is trained cannot run on it.

    Attributes:
        choices: The backend of each model that attends, and the reason, by name.
        is_faster: Whether any of them is not the model's own now.
    """

    def __init__(
        self,
        parts: Mapping[str, Attending],
        *,
        allowed: Collection[str],
        why_not: str = OWN_MASKS,
        wanted: str = AUTO,
    ) -> None:
        self._wanted = wanted
        flex = _flex_choices(parts, allowed, why_not) if wanted == FLEX else None
        own = {name: backend for name, part in parts.items() if (backend := own_backend(part.model)) is not None}
        self.choices: dict[str, Choice] = {}
        for name, backend in own.items():
            if flex is not None:
                self.choices[name] = flex[name]
            else:
                self.choices[name] = _choose(parts[name]) if name in allowed else Choice(backend, why_not)
        self._changed = {name: parts[name].model for name, one in self.choices.items() if one.backend != own[name]}
        self.is_faster = bool(self._changed)
        self._own = {name: own[name] for name in self._changed}
        # Other parts of a model, such as one of images, may have a backend of their own.
        self._configs = {
            name: [config for config in _configs(model) if config._attn_implementation == self._own[name]]
            for name, model in self._changed.items()
        }

    @property
    def names(self) -> str | None:
        """The names of the backends, each once; None if no model chooses one."""
        return ", ".join(dict.fromkeys(str(choice.backend) for choice in self.choices.values())) or None

    def __str__(self) -> str:
        """Return which attention each model has and why: "sdpa (flash attention is not installed)"."""
        if len(set(self.choices.values())) > 1:
            return ", ".join(f"{choice} of the {name}" for name, choice in self.choices.items())
        return "".join(str(choice) for choice in set(self.choices.values()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a step, and give the models their own backends again."""
        running = list(self._changed)
        for name in running:
            self._set(name, self.choices[name].backend)
        _RUNNING.append(self)
        try:
            with _more_graphs() if self._wanted == FLEX else nullcontext():
                yield
        finally:
            _RUNNING.remove(self)
            for name in running:
                self._set(name, self._own[name])

    def _set(self, name: str, backend: str | None) -> None:
        for config in self._configs[name]:
            config._attn_implementation_internal = backend

    def drop(self, body: nn.Module, reason: str) -> bool:
        """Put the model that a body belongs to back on its own backend, for good.

        Returns:
            Whether that was done; not if it has no such model, or its backend was named in the options.
        """
        if self._wanted == FLEX:
            return False
        for name, model in list(self._changed.items()):
            if any(module is body for module in model.modules()):
                self._set(name, self._own[name])
                del self._changed[name]
                self.is_faster = bool(self._changed)
                self.choices[name] = Choice(self._own[name], reason)
                logger.warning(f"attention of the {name}: {self.choices[name]}")
                return True
        return False


def _more_graphs() -> AbstractContextManager[None]:
    """Let torch keep as many graphs of a function as FlexAttention needs; past its own limit it would compile no more."""
    # It takes a second to import.
    import torch._dynamo

    limit: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=_MOST_FLEX_GRAPHS)
    return limit


# Those whose steps run now.
_RUNNING: list[FastAttention] = []


def leave_flash(body: PreTrainedModel, reason: str) -> bool:
    """Put a model on its own backend that cannot do on flash attention what a batch asks, and say so.

    Args:
        body: The model, or a part of it.
        reason: What went wrong.

    Returns:
        Whether it has another backend now; false if the one that it has was named by somebody.
    """
    return any(fast.drop(body, reason) for fast in list(_RUNNING))


@contextmanager
def on_own_backends() -> Iterator[None]:
    """Run in a step what its attention is compared with: models have their own backends in the block."""
    left = [(fast, name) for fast in _RUNNING for name in fast._changed]
    for fast, name in left:
        fast._set(name, fast._own[name])
    try:
        yield
    finally:
        for fast, name in left:
            fast._set(name, fast.choices[name].backend)


def paired_bounds(
    document_ids: torch.Tensor, decoder_document_ids: torch.Tensor, *, num_documents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of the sequences of an encoder and of a decoder, as many on both sides; nothing is read.

    Each row has one sequence for the padding before its tokens, one for each document, and one for the padding behind. That of
    the decoder sees the one of the encoder that has its number; either may be empty.

    Args:
        document_ids: ``[B, L]`` number of the document that a token belongs to, ascending in a row, negative at padding.
        decoder_document_ids: ``[B, T]`` the same of the decoder.
        num_documents: The most documents in a row, or more.

    Returns:
        Bounds in the ``B * L`` and in the ``B * T`` tokens, ``int32 [B * (num_documents + 2) + 1]`` each.
    """
    first, second = (_bounds_by_number(ids, num_documents) for ids in (document_ids, decoder_document_ids))
    return first, second


def _bounds_by_number(ids_BL: torch.Tensor, num_documents: int) -> torch.Tensor:
    is_token_BL = ids_BL >= 0
    behind_BL = torch.where(is_token_BL.cumsum(dim=1) > 0, num_documents + 1, 0)
    number_BL = torch.where(is_token_BL, ids_BL.long() + 1, behind_BL)
    counts = torch.zeros(len(ids_BL), num_documents + 2, dtype=torch.long, device=ids_BL.device)
    counts = counts.scatter_add(1, number_BL, torch.ones_like(number_BL))
    return nn.functional.pad(counts.flatten().cumsum(0), (1, 0)).int()


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
