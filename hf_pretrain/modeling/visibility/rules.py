"""Who sees whom in a row: a rule becomes the mask that a stock model takes, and a trial shows whether the model keeps to it.

A rule says of a query and a key whether the query sees the key; it is written from compact integers, one or two a token, as
transformers writes its mask functions: of row, head, query and key. `mask_inputs` turns it into what the backbone and its
attention backend take, on the device. `try_out` runs the backbone under a rule: nothing is looked up.

Isolated documents, the modes of UniLM, Electric's towers and the two streams of permutation language modelling all come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import DISENTANGLED, evaluating, first_position, takes_input, window_of

MaskFunction = Callable[..., torch.Tensor]

EDIT_TOLERANCE = 1e-6
"""Of the greatest state, by how much a token may move when one is edited that it must not see: not at all."""

ALONE_TOLERANCE = 0.05
"""Relative difference to the same tokens in another row. In another shape and perhaps in bfloat16 sums are rounded
differently, but wrong positions or masks move every state."""


class AttentionPlan(NamedTuple):
    """What a backbone's attention takes.

    Attributes:
        backend: Name of the attention backend.
        takes_positions: Whether the backbone can be given the position of a token; one that cannot has relative positions.
        first_position: Number of the first position in its table: RoBERTa and its kin count from `padding_idx + 1`.
        takes_masks: Whether a mask made here has been found to serve.
    """

    backend: str
    takes_positions: bool
    first_position: int
    takes_masks: bool = True

    @property
    def is_flash(self) -> bool:
        """Whether the backend is flash attention, which takes bounds of sequences and no mask."""
        return "flash" in self.backend


def known_plan(backbone: PreTrainedModel, rule: str) -> AttentionPlan | None:
    """Return the plan of a backbone that was made for a rule, None if there is none for the backend that it has now."""
    plan: AttentionPlan | None = getattr(backbone, f"_plan_for_{rule}", None)
    return plan if plan is not None and plan.backend == backbone.config._attn_implementation else None


@torch.compiler.disable
def make_plan(backbone: PreTrainedModel, rule: str, *, takes_masks: bool = True) -> AttentionPlan:
    """Read what a backbone takes, and remember it for a rule. DeBERTa's embeddings are made to take square masks."""
    body = backbone.base_model
    if body.config.model_type in DISENTANGLED and not hasattr(body, "_takes_square_masks"):
        body.embeddings.register_forward_pre_hook(_take_diagonal, with_kwargs=True)
        setattr(body, "_takes_square_masks", True)  # noqa: B010 (no attribute that the type knows)
    plan = AttentionPlan(
        backend=body.config._attn_implementation,
        takes_positions=takes_input(body, "position_ids"),
        first_position=first_position(body),
        takes_masks=takes_masks,
    )
    setattr(backbone, f"_plan_for_{rule}", plan)
    return plan


def _take_diagonal(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give embeddings that clear padding by the mask the diagonal of a square one, which says the same."""
    mask = kwargs.get("mask")
    if mask is not None and mask.dim() == 3:
        kwargs = kwargs | {"mask": mask.diagonal(dim1=1, dim2=2)}
    return args, kwargs


def sees_within(groups: torch.Tensor, orders: torch.Tensor | None = None) -> MaskFunction:
    """Return the rule by which a token sees the tokens of its group whose order is not above its own.

    Args:
        groups: ``[B, L]`` integers; padding is a group of its own: a softmax over nothing is no number.
        orders: ``[B, L]`` integers; all are equal if not given.
    """

    def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same = groups[row, query] == groups[row, key]
        return same if orders is None else same & (orders[row, key] <= orders[row, query])

    return visible


def position_inputs(plan: AttentionPlan, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return positions ``[B, L]``, counted from 0, as the backbone takes them."""
    return {"position_ids": position_ids + plan.first_position} if plan.takes_positions else {}


def row_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token in its row, ``[B, L]``, however the row is padded."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def mask_inputs(
    backbone: PreTrainedModel,
    plan: AttentionPlan,
    visible: MaskFunction,
    *,
    like: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> Any:
    """Write the mask of a rule as the backbone takes it.

    Args:
        backbone: The stock model.
        plan: What it takes.
        visible: Of row, head, query and key, each an index that broadcasts against the others: whether the query sees the key.
        like: ``[B, L]``, a tensor of the shape and on the device of the batch.
        positions: ``[B, L]`` positions by which windows are measured; by default columns, which between tokens that see each
            other are as far apart.

    Returns:
        The `attention_mask`: boolean for sdpa, added to the scores for eager, blocks for flex attention; where layers differ,
        one for each kind of layer.

    Raises:
        InputError: If the backend takes no mask.
    """
    if backbone.config.model_type in DISENTANGLED:
        return _write(sdpa_mask, backbone, visible, like=like)[:, 0]
    if plan.is_flash or plan.backend not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise InputError(f"no mask is known for attn_implementation={plan.backend!r}")
    make_mask, window = ALL_MASK_ATTENTION_FUNCTIONS[plan.backend], window_of(backbone.config)
    if window is None:
        return _write(make_mask, backbone, visible, like=like)

    def near(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        distance = query - key if positions is None else positions[row, query] - positions[row, key]
        return visible(row, head, query, key) & (distance.abs() <= window)

    return {
        "full_attention": _write(make_mask, backbone, visible, like=like),
        "sliding_attention": _write(make_mask, backbone, near, like=like),
    }


def _write(
    make_mask: Callable[..., Any], backbone: PreTrainedModel, visible: MaskFunction, *, like: torch.Tensor
) -> Any:
    """Let transformers write a mask in the form of one backend."""
    num_rows, length = like.shape
    return make_mask(
        batch_size=num_rows,
        q_length=length,
        kv_length=length,
        mask_function=visible,
        allow_is_causal_skip=False,
        dtype=backbone.dtype,
        device=like.device,
        config=backbone.config,
    )


@torch.compiler.disable
def try_out(
    backbone: PreTrainedModel, rule: str, trial: Callable[[PreTrainedModel, AttentionPlan], str | None]
) -> AttentionPlan:
    """Try a backbone out under a rule in evaluation, which leaves no trace, and remember that it keeps to it.

    Args:
        backbone: A stock model, with or without a head; on a device, and under the autocast that it is trained with.
        rule: Name of the rule.
        trial: Of the body without a head and what it takes: what goes wrong, None if nothing does.

    Returns:
        What the backbone takes.

    Raises:
        InputError: With what went wrong, whatever the backbone does with a mask that it was not made for.
    """
    body, plan = backbone.base_model, make_plan(backbone, rule)
    if any(parameter.is_meta for parameter in body.parameters()):
        return plan  # There are no states to compare.
    try:
        with evaluating(backbone):
            failure = trial(body, plan)
    except Exception as error:  # an architecture may trip anywhere over a mask that it does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = f"its forward fails with such a mask ({reason})"
    if failure:
        delattr(backbone, f"_plan_for_{rule}")
        raise InputError(failure)
    return plan


class Edit(NamedTuple):
    """A change of some tokens of a row, and who must not notice it.

    Attributes:
        tokens: ``[n]`` the row with other tokens in places.
        kept: The tokens that are looked at.
        hiding: Which of the rows of states must not move there; in each of the others something has to.
    """

    tokens: torch.Tensor
    kept: slice
    hiding: Sequence[int]


def find_leak(
    read: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, edits: Sequence[Edit]
) -> tuple[int, bool] | None:
    """Edit a row, and return who noticed what it must not see, or did not notice what it should.

    Args:
        read: From tokens ``[n]`` to states ``[R, n, D]``, one row for each rule.
        tokens: ``[n]``.
        edits: What is edited.

    Returns:
        The row of states, and whether it saw too much; None if all is as it should be.
    """
    states = read(tokens)
    limit = EDIT_TOLERANCE * states.abs().max()
    for edit in edits:
        moved = (read(edit.tokens) - states)[:, edit.kept].abs().amax(dim=(1, 2))
        for row in range(len(states)):
            if row in edit.hiding and not moved[row] <= limit:
                return row, True
            if row not in edit.hiding and not moved[row] > 0:
                return row, False
    return None


def is_alike(states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether states of the same tokens in two rows differ by no more than rounding."""
    return bool((states - expected).norm() <= ALONE_TOLERANCE * expected.norm())


def arbitrary_tokens(body: PreTrainedModel, length: int, *, shift: int) -> torch.Tensor:
    """Return ``[length]`` tokens that are not padding; those of neighbouring shifts differ everywhere, in any vocabulary."""
    tokens = torch.arange(min(body.config.vocab_size, 100), device=body.device)
    tokens = tokens[tokens != getattr(body.config, "pad_token_id", None)]
    return tokens[(3 * torch.arange(length, device=body.device) + shift) % len(tokens)]
