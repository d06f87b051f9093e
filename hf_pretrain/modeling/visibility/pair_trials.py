"""Trials of encoder-decoders: pairs of an input and a target in one row, positions of a fragment, and masks that may be left out.

Each trial reads made-up tokens through `hf_pretrain.modeling.visibility.pairs.PairReader` and says what goes wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hf_pretrain.modeling.losses import GatheredOutput
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.backends import on_own_backends
from hf_pretrain.modeling.visibility.rules import ALONE_TOLERANCE, Edit, arbitrary_tokens, find_leak, is_alike

Reading = Callable[..., GatheredOutput]
"""Reads two sides of tokens: `target_positions` and `batch`, and for several pairs a row `documents` and `positions`."""

_SAME_TOLERANCE = 2e-3
"""Relative difference, in fp32, that two forms of the same mask may make to logits: other kernels round differently."""

_LOOKS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive"})
"""Operations for which the host waits until the device has a value."""

_SEES_TOO_MUCH = "the states of a pair change when another one in its row is edited"
_SEES_TOO_LITTLE = "the states of a pair do not change when its own input or target is edited"


class _CountLooks(TorchDispatchMode):
    """Counts how often the host asks for a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += func.overloadpacket.__name__ in _LOOKS
        return func(*args, **(kwargs or {}))


def num_looks(read: Callable[[], object]) -> int:
    """Return how often a reading waits for a value."""
    with _CountLooks() as looks:
        read()
    return looks.number


def serves(read: Callable[[], GatheredOutput], expected: torch.Tensor) -> bool:
    """Whether a reading comes to an end, and to what is expected."""
    try:
        return is_same(read().logits, expected)
    except Exception as error:  # an architecture may trip anywhere over a mask that it does not know
        if rules.is_own_fault(error):
            raise
        return False


def is_same(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits of the same tokens differ by no more than the rounding of kernels."""
    tolerance = _SAME_TOLERANCE if expected.dtype in (torch.float32, torch.float64) else ALONE_TOLERANCE
    return bool((logits - expected).norm() <= tolerance * expected.norm())


def two_rows(
    bodies: tuple[PreTrainedModel, PreTrainedModel],
    sizes: tuple[int, int],
    *,
    odd_tokens: bool = False,
    num_padding: int = 0,
) -> dict[str, Any]:
    """Return two rows of one pair each, all of whose tokens are targets.

    Args:
        bodies: Encoder and decoder.
        sizes: Tokens of the rows of each.
        odd_tokens: Whether every other token is that of padding although the mask says that it is none: a model that gets no
            mask must not make its own by the tokens.
        num_padding: Padding at the end of the second rows.
    """
    batch: dict[str, torch.Tensor] = {}
    for prefix, body, size in zip(("", "decoder_"), bodies, sizes, strict=True):
        tokens = torch.stack([arbitrary_tokens(body, max(size, 8), shift=shift) for shift in (1, 2)])
        padding = getattr(body.config, "pad_token_id", None)
        if odd_tokens and padding is not None:
            tokens[:, ::2] = padding
        mask = torch.ones_like(tokens)
        mask[1, tokens.shape[1] - num_padding :] = 0
        batch |= {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": mask}
    return {"batch": batch, "target_positions": mask.flatten().nonzero().flatten()}


def one_row(source: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    """Return one row of tokens ``[n]`` for each side without padding, all of whose tokens are targets."""
    batch = {"input_ids": source[None], "decoder_input_ids": target[None]}
    batch |= {name.replace("input_ids", "attention_mask"): torch.ones_like(ids) for name, ids in batch.items()}
    return {"batch": batch, "target_positions": torch.arange(len(target), device=target.device)}


def find_mixing(read: Reading, bodies: tuple[PreTrainedModel, PreTrainedModel], sizes: tuple[int, int]) -> str | None:
    """Return what goes wrong with two pairs in a row, None if nothing does; the decoder row ends with padding."""
    length, decoder_length = (max(size, 12) for size in sizes)
    # Inputs and targets end in other columns, so that one cannot be taken for the other.
    bounds = ((0, length // 3, length), (0, 2 * decoder_length // 3, decoder_length - 2))
    parts = [[slice(*pair) for pair in itertools.pairwise(bound)] for bound in bounds]
    tokens, others = (
        [
            arbitrary_tokens(body, size, shift=shift)
            for body, size in zip(bodies, (length, decoder_length), strict=True)
        ]
        for shift in (1, 2)
    )
    documents, positions = zip(
        *(_documents(bound, like=row) for bound, row in zip(bounds, tokens, strict=True)), strict=True
    )

    def states_of(source: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        output = read(**one_row(source, target), documents=documents, positions=positions)
        return [output.output.encoder_last_hidden_state.float(), output.states.float()]

    readings = [
        (0, 0, lambda row: states_of(row, tokens[1])[0]),
        (0, 1, lambda row: states_of(row, tokens[1])[1]),
        (1, 1, lambda row: states_of(tokens[0], row)[1]),
    ]
    for edited, seen, states in readings:
        edits = []
        for own, other in ((0, 1), (1, 0)):
            row = tokens[edited].clone()
            row[parts[edited][own]] = others[edited][parts[edited][own]]
            edits += [Edit(row, parts[seen][other], [0]), Edit(row, parts[seen][own], [])]
        leak = find_leak(states, tokens[edited], edits)
        if leak is not None:
            return _SEES_TOO_MUCH if leak[1] else _SEES_TOO_LITTLE
    begin, end = parts[1][1].start, parts[1][1].stop
    middle, row = (begin + end) // 2, tokens[1].clone()
    row[middle:] = others[1][middle:]
    if find_leak(readings[2][2], tokens[1], [Edit(row, slice(begin, middle), [0])]) is not None:
        return "the states of a target change when a later token of it is edited"
    together = states_of(*tokens)
    for source_part, target_part in zip(*parts, strict=True):
        with on_own_backends():
            alone = read(**one_row(tokens[0][source_part], tokens[1][target_part]))
        pairs = (
            (together[0][:, source_part], alone.output.encoder_last_hidden_state),
            (together[1][:, target_part], alone.states),
        )
        if not all(is_alike(found, expected.float()) for found, expected in pairs):
            return "the states of a pair in a row with others are not those that it has alone"
    return None


def _documents(bounds: tuple[int, ...], *, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return documents and positions ``[1, n]`` of a row with a document from each bound to the next, then padding."""
    ids, positions = torch.full_like(like, -1), torch.zeros_like(like)
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        ids[begin:end] = number
        positions[begin:end] = torch.arange(end - begin, device=like.device)
    return ids[None], positions[None]


def find_padding(read: Reading, bodies: tuple[PreTrainedModel, PreTrainedModel], sizes: tuple[int, int]) -> str | None:
    """Return what goes wrong with the shorter of two rows, whose end is padding on both sides; None if nothing does."""
    rows = two_rows(bodies, sizes, num_padding=2)
    batch, ends = rows["batch"], {}
    for name in ("input_ids", "decoder_input_ids"):
        ends[name] = slice(0, batch[name].shape[1] - 2)
    found = read(**rows).states[1, ends["decoder_input_ids"]].float()
    edited = {name: ids.clone() for name, ids in batch.items()}
    for name, end in ends.items():
        edited[name][1, end.stop :] = batch[name][1, :2]
    other = read(batch=edited, target_positions=rows["target_positions"]).states[1, ends["decoder_input_ids"]]
    if not (other.float() - found).abs().max() <= rules.EDIT_TOLERANCE * found.abs().max():
        return "the states of a row change when its padding is edited"
    source, target = (batch[name][1, end] for name, end in ends.items())
    with on_own_backends():
        alone = read(**one_row(source, target)).states[0].float()
    if not is_alike(found, alone):
        return "the states of a padded row are not those that it has without padding"
    return None


def find_misplacing(
    read: Reading, bodies: tuple[PreTrainedModel, PreTrainedModel], sizes: tuple[int, int]
) -> str | None:
    """Return what goes wrong with the second half of a decoder row and its positions, None if nothing does."""
    source, target = (arbitrary_tokens(body, max(size, 8), shift=1) for body, size in zip(bodies, sizes, strict=True))
    middle = len(target) // 2
    whole = one_row(source, target)
    whole["batch"]["decoder_attention_mask"][:, :middle] = 0
    positions = torch.arange(middle, len(target), device=target.device)[None]
    expected = read(**whole).states[:, middle:]
    found = read(**one_row(source, target[middle:]), positions=(None, positions)).states
    if not is_alike(found.float(), expected.float()):
        return "the states of a fragment are not those that it has at the end of a longer row"
    return None
