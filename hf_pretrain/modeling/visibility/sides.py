"""One side of a stock encoder-decoder, with hooks that hand it masks and positions, and the masks that a decoder takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import first_position, given_first_position, position_tables, window_of
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.rules import AttentionPlan, MaskFunction

_PART = "pairs"


class Table:
    """A table of positions without an input for them; its output is looked up anew while its side has positions.

    Attributes:
        offset: Row of position 0: BART's is 2, M2M-100's the one after the padding id's.
    """

    def __init__(self, side: Side, module: nn.Module) -> None:
        self.module, self._side = module, side
        # Trials look closer; where there are no values to look at, only shapes count.
        self.offset = int(getattr(module, "offset", first_position(side.body)))
        self.hook = module.register_forward_hook(self._look_up)

    @property
    def rows(self) -> torch.Tensor:
        """The table itself, ``[P, D]``; M2M-100 has a name of its own for it."""
        name = "weights" if hasattr(self.module, "weights") else "weight"
        rows: torch.Tensor = getattr(self.module, name)
        return rows

    def _look_up(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        positions_BL = self._side.positions
        return None if positions_BL is None else F.embedding(positions_BL + self.offset, self.rows)

    def find_offset(self, output: torch.Tensor) -> bool:
        """Read the offset off what the table gave a row ``[L]`` without positions; false if its rows are not in order."""
        length = output.shape[-2]
        given_LD, rows_PD = output.reshape(-1, *output.shape[-2:])[0].float().cpu(), self.rows.detach().float().cpu()
        starts = range(len(rows_PD) - length + 1)
        # A table may hold the same rows twice, for example nothing but zeros.
        for start in sorted(starts, key=lambda start: start != self.offset):
            if torch.equal(rows_PD[start : start + length], given_LD):
                self.offset = start
                return True
        return False


class Side:
    """Encoder or decoder of a stock model, with hooks that hand it what a run has for it.

    Attributes:
        body: The stock module.
        inputs: Arguments that replace those that the stock forward hands it; empty between two runs.
        positions: ``[B, L]`` for tables of positions; None between two runs.
        cross_bounds: Bounds of sequences for the attention to the encoder, in place of those in `inputs`; empty between two runs.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        self.body = body
        self.inputs: dict[str, Any] = {}
        self.positions: torch.Tensor | None = None
        self.cross_bounds: dict[str, Any] = {}
        self._order = tuple(inspect.signature(type(body).forward).parameters)[1:]
        self._takes_positions, self._first = "position_ids" in self._order, given_first_position(body)
        modules = dict(body.named_modules())
        names = [] if self._takes_positions else [*position_tables(body), *_with_buffers(modules)]
        self.tables = [Table(self, modules[name]) for name in names]
        hook = body.register_forward_pre_hook(self._hand_over, with_kwargs=True)
        self.hooks: list[RemovableHandle] = [hook, *(table.hook for table in self.tables)]
        if "encoder_hidden_states" in self._order:
            # One argument goes to all attention of a decoder, of which only that to the encoder is not causal.
            others = [module for module in modules.values() if getattr(module, "is_causal", None) is False]
            self.hooks += [one.register_forward_pre_hook(self._swap_bounds, with_kwargs=True) for one in others]

    @property
    def backend(self) -> str:
        """Name of the attention backend."""
        return str(self.body.config._attn_implementation)

    @property
    def plan(self) -> AttentionPlan:
        """What the side's attention takes."""
        known = rules.known_plan(self.body, _PART)
        return rules.make_plan(self.body, _PART) if known is None else known

    def place(self, position_ids: torch.Tensor) -> None:
        """Give the side positions ``[B, L]``, counted from 0, for the next call."""
        if self._takes_positions:
            self.inputs["position_ids"] = position_ids + self._first
        elif self.tables:
            self.positions = position_ids

    def clear(self) -> None:
        """Make the hooks inert."""
        self.inputs, self.positions, self.cross_bounds = {}, None, {}

    def _swap_bounds(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return (args, kwargs | self.cross_bounds) if self.cross_bounds else None

    def _hand_over(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.inputs:
            return None
        given, named = list(args), dict(kwargs)
        for name, value in self.inputs.items():
            if name in self._order[: len(given)]:
                given[self._order.index(name)] = value
            else:
                named[name] = value
        return tuple(given), named


def _with_buffers(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of tables whose rows are a buffer `weights`: sinusoids of M2M-100 and its kin."""
    return [
        name for name, module in modules.items() if name.endswith("embed_positions") and hasattr(module, "weights")
    ]


def causal_masks(side: Side, visible: MaskFunction, *, like: torch.Tensor) -> Any:
    """Write the mask of a decoder's self-attention; where layers differ, one for each kind of layer."""
    mask = write_mask(side, visible, like=like, num_keys=like.shape[1])
    window = window_of(side.body.config)
    if window is None:
        return mask

    def near(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # A window of a decoder counts the token itself; an encoder's counts the tokens on each side.
        return visible(row, head, query, key) & (query - key < window)

    near_mask = write_mask(side, near, like=like, num_keys=like.shape[1])
    return {"full_attention": mask, "sliding_attention": near_mask}


def write_mask(side: Side, visible: MaskFunction, *, like: torch.Tensor, num_keys: int) -> Any:
    """Let transformers write a mask of queries ``[B, T]`` and a number of keys in the form of a side's attention backend."""
    if side.plan.is_flash or side.backend not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise InputError(f"no mask is known for attn_implementation={side.backend!r}")
    return ALL_MASK_ATTENTION_FUNCTIONS[side.backend](
        batch_size=like.shape[0],
        q_length=like.shape[1],
        kv_length=num_keys,
        mask_function=visible,
        allow_is_causal_skip=False,
        dtype=side.body.dtype,
        device=like.device,
        config=side.body.config,
    )
