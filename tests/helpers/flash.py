"""Flash attention on a CPU: its functions as plain loops, behind transformers' own code for the package."""

import torch
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flash_attention

from hf_pretrain.modeling.visibility import backends


def flash_attn_varlen_func(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    dropout_p=0.0,
):
    """What the package's function of this name computes; queries ``[T, h, d]``, keys and values ``[S, k, d]``."""
    assert len(cu_seqlens_q) == len(cu_seqlens_k) and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q[-1]) == len(query) and int(cu_seqlens_k[-1]) == len(key) and dropout_p == 0.0
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q and int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    parts = []
    for own, other in zip(_slices(cu_seqlens_q), _slices(cu_seqlens_k), strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", query[own], key[other])
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        # Counted from the last key, as the package does.
        ahead = torch.arange(scores.shape[2]) - torch.arange(scores.shape[1])[:, None]
        ahead = ahead - (scores.shape[2] - scores.shape[1])
        hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
        for side, distance in zip(window_size, (-ahead, ahead), strict=True):
            hidden = hidden | (distance > side) if side >= 0 else hidden
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        # A query without a key gets 0.
        parts.append(torch.einsum("hqk,khd->qhd", weights.nan_to_num(), value[other]))
    return torch.cat(parts)


def flash_attn_func(query, key, value, **options):
    """What the package's function of this name computes, of ``[B, L, h, d]``."""
    rows, bounds = len(query), []
    for states in (query, key):
        bounds.append(torch.arange(rows + 1, dtype=torch.int32) * states.shape[1])
    flat = (states.flatten(0, 1) for states in (query, key, value))
    found = flash_attn_varlen_func(*flat, *bounds, query.shape[1], key.shape[1], **options)
    return found.unflatten(0, (rows, -1))


def _slices(bounds):
    return [slice(*pair) for pair in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def install(monkeypatch, *, version=2):
    """Let models on "flash_attention_2" compute by these functions, and steps in fp32 on a CPU choose it.

    Returns:
        The list of calls, "varlen" or "plain" each, which grows.
    """
    calls = []

    def varlen(*args, **options):
        calls.append("varlen")
        return flash_attn_varlen_func(*args, **options)

    def plain(*args, **options):
        calls.append("plain")
        return flash_attn_func(*args, **options)

    process = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    pads = flash_utils._pad_input, flash_utils._unpad_input
    functions = (plain, varlen, None, *pads), (process, process)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda name, *args, **options: functions)
    # It asks for the 16 bits that a step has on a GPU.
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda query, module: None)
    real = backends.flash_backend

    def choose(device, dtype, **options):
        return (
            backends.Choice(f"flash_attention_{version}") if device.type == "cpu" else real(device, dtype, **options)
        )

    monkeypatch.setattr(backends, "flash_backend", choose)
    return calls
