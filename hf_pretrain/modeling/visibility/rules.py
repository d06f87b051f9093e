"""Which token sees which in a row: rules, the masks that stock models take, and trials; padding and isolated documents as rules.

A rule says of a query and a key whether the query sees the key; it is written from compact integers, one or two a token, as
transformers writes its mask functions: of row, head, query and key. `mask_inputs` turns it into what the backbone and its
attention backend take, on the device. `try_out` runs the backbone under a rule: nothing is looked up.

First come rules, masks and trials; then padding; then isolated documents, `isolated_inputs`, which every model calls.

- Padding: transformers leaves a mask out where nothing is padded, and reads the mask for that, `padding_mask.all()`: the step
  waits for the device. The host knows the answer before the batch is transferred. So the model gets no mask where nothing is
  padded, and the mask that transformers would have made where something is.
- Isolated documents: a batch says which document each token belongs to. The attention of a stock model takes something else (a
  mask, one for each kind of layer, or the bounds of sequences), which is made here, on the device.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask, sdpa_mask

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.modeling.backbone import (
    DISENTANGLED,
    evaluating,
    given_first_position,
    own_backend,
    row_position_inputs,
    takes_input,
    window_of,
)
from hf_pretrain.modeling.visibility.backends import FLEX, leave_flash, on_own_backends, padded_bounds

MaskFunction = Callable[..., torch.Tensor]

_PADDING, _BOUNDS, _ISOLATION, _FLASH = "padding", "bounds", "isolation", "flash"
# Backends whose masks of padding are known to be those of transformers.
_BACKENDS = ("sdpa", "eager", FLEX)

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
    plans: dict[str, AttentionPlan] = getattr(backbone, f"_plans_for_{rule}", {})
    return plans.get(backbone.config._attn_implementation)


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
        first_position=given_first_position(body),
        takes_masks=takes_masks,
    )
    # A model may have one backend in a step of training, and another elsewhere.
    plans = getattr(backbone, f"_plans_for_{rule}", {}) | {plan.backend: plan}
    setattr(backbone, f"_plans_for_{rule}", plans)
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
        InputError: With what went wrong, whatever the backbone does with a mask that it was not made for. A mistake in a line
            of this library comes through as it is.
    """
    body, plan = backbone.base_model, make_plan(backbone, rule)
    if any(parameter.is_meta for parameter in body.parameters()):
        return plan  # There are no states to compare.
    failure: str | None = "the trial has not ended"
    try:
        with evaluating(backbone):
            failure = trial(body, plan)
    except Exception as error:  # an architecture may trip anywhere over a mask that it does not know
        if is_own_fault(error):
            raise
        failure = f"its forward fails with such a mask ({one_line(error, line=0)})"
    finally:
        if failure:
            getattr(backbone, f"_plans_for_{rule}").pop(plan.backend)
    if failure:
        raise InputError(failure)
    return plan


def plan_or_leave_flash(backbone: PreTrainedModel, rule: str, check: Callable[[], Any]) -> AttentionPlan:
    """Return the plan of a backbone for a rule, which the first batch checks; see [`leave_flash`].

    Args:
        backbone: The stock model.
        rule: Name of the rule.
        check: Makes the plan, and raises InputError if there is none for the backend that the backbone has.

    Raises:
        InputError: If the backbone cannot keep to the rule, on flash attention or on its own backend.
    """
    plan = known_plan(backbone, rule)
    if plan is None:
        try:
            check()
        except InputError as error:
            if not leave_flash(backbone, str(error)):
                raise
            return plan_or_leave_flash(backbone, rule, check)
        plan = known_plan(backbone, rule)
    assert plan is not None, "the check remembers the plan"
    return plan


def keeps_flash(backbone: PreTrainedModel, read: Callable[[torch.Tensor], torch.Tensor], *, length: int) -> bool:
    """Whether a backbone runs on flash attention, and there computes what it does on its own backend; tried out once.

    FlexAttention, which takes masks, is tried out in the same way.

    Args:
        backbone: The stock model.
        read: From tokens ``[1, L]`` to states ``[1, L, D]``.
        length: Tokens of the row to try.

    Raises:
        InputError: If the states are others, and the backend was named by somebody.
    """
    backend = own_backend(backbone) or ""
    if "flash" not in backend and backend != FLEX:
        return False

    def trial(body: PreTrainedModel, plan: AttentionPlan) -> str | None:
        row = arbitrary_tokens(body, max(length, 8), shift=1)[None]
        found = read(row).float()
        with on_own_backends():
            expected = read(row).float()
        return None if is_alike(found, expected) else "its states are not those of its own attention"

    def check() -> None:
        try:
            try_out(backbone, _FLASH, trial)
        except InputError as error:
            backend = backbone.config._attn_implementation
            raise InputError(f"{type(backbone).__name__} cannot be trained with {backend}: {error}") from None

    return plan_or_leave_flash(backbone, _FLASH, check).is_flash


def is_own_fault(error: Exception) -> bool:
    """Whether an error of a trial is a mistake in this library: of these types, and raised in a line of it.

    Of other types, such as a RuntimeError over two shapes, a line of ours may raise what a backbone's states cause.
    """
    # A line of ours that reads an attribute which a module does not have fails one frame further, in torch.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name != "__getattr__"]
    module = str(frames[-1].f_globals.get("__name__"))
    is_ours = module.startswith("hf_pretrain.") and not module.startswith("hf_pretrain.models.")
    return is_ours and isinstance(error, AssertionError | AttributeError | KeyError | NameError | TypeError)


class Edit(NamedTuple):
    """A change of some tokens of a row, and the states that must not move.

    Attributes:
        tokens: ``[n]`` the row with some other tokens.
        kept: The tokens that are looked at.
        hiding: Which of the rows of states must not move there; in each of the others something has to.
    """

    tokens: torch.Tensor
    kept: slice
    hiding: Sequence[int]


def find_leak(
    read: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, edits: Sequence[Edit]
) -> tuple[int, bool] | None:
    """Edit a row, and return the first state that moved but must not, or must but did not.

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
    padding = getattr(body.config, "pad_token_id", None)
    # Compared with None, a tensor is one truth, which as an index would add a dimension.
    tokens = tokens if padding is None else tokens[tokens != padding]
    return tokens[(3 * torch.arange(length, device=body.device) + shift) % len(tokens)]


# Padding


def has_padding(batch: Mapping[str, Any], config: Any = None) -> dict[str, Any]:
    """Return, as `is_padded`, whether any row of a batch on the host has padding; nothing without an `attention_mask`.

    It is the `host_inputs` of the models that need to know no more; the configuration makes no difference.
    """
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
    plan = known_plan(backbone, _PADDING)
    if plan is None:
        plan = _try_padding(backbone, attention_mask)
    if not plan.takes_masks:
        return attention_mask
    return _padding_mask(backbone, plan, attention_mask) if is_padded else None


def _asks_its_mask(backbone: PreTrainedModel) -> bool:
    """Whether transformers' shared functions make the backbone's masks; those of older architectures ask nothing."""
    known: bool | None = getattr(backbone, "_asks_its_mask", None)
    return _note_who_masks(backbone) if known is None else known


@torch.compiler.disable
def _note_who_masks(backbone: PreTrainedModel) -> bool:
    """Find out the same and remember it: a graph that is compiled would break at the look into a module."""
    body = backbone.base_model
    makers = vars(sys.modules[type(body).__module__]).values()
    found = create_bidirectional_mask in makers and body.config.model_type not in DISENTANGLED
    setattr(backbone, "_asks_its_mask", found)  # noqa: B010 (no attribute that the type knows)
    return found


def _padding_mask(backbone: PreTrainedModel, plan: AttentionPlan, attention_mask: torch.Tensor) -> Any:
    is_token_BL = attention_mask != 0
    return mask_inputs(backbone, plan, lambda row, head, query, key: is_token_BL[row, key], like=attention_mask)


@torch.compiler.disable
def _try_padding(backbone: PreTrainedModel, attention_mask: torch.Tensor) -> AttentionPlan:
    """Compare the states under the stock model's own mask and under ours, bit for bit; remember whether ours will do."""

    def trial(body: PreTrainedModel, plan: AttentionPlan) -> str | None:
        length = max(attention_mask.shape[1], 4)
        ids = torch.stack([arbitrary_tokens(body, length, shift=shift) for shift in (1, 2)])
        whole, padded = torch.ones_like(ids), torch.ones_like(ids)
        padded[1, length - 2 :] = 0
        for mask, own in ((whole, None), (padded, _padding_mask(body, plan, padded))):
            expected, found = (body(input_ids=ids, attention_mask=one)[0] for one in (mask, own))
            if not torch.equal(expected[mask != 0], found[mask != 0]):
                return "its states change"
        return None

    try:
        return try_out(backbone, _PADDING, trial)
    except InputError:
        return make_plan(backbone, _PADDING, takes_masks=False)


def _flash_takes_bounds(backbone: PreTrainedModel, attention_mask: torch.Tensor) -> bool:
    """Whether a backbone on flash attention takes bounds of rows in place of their mask; the first batch tries it out."""
    if not _asks_its_mask(backbone):
        return False
    plan = known_plan(backbone, _BOUNDS)
    return (_try_bounds(backbone, attention_mask) if plan is None else plan).takes_masks


@torch.compiler.disable
def _try_bounds(backbone: PreTrainedModel, attention_mask: torch.Tensor) -> AttentionPlan:
    """Compare the states of a padded row with those of the same row alone, without padding."""

    def trial(body: PreTrainedModel, plan: AttentionPlan) -> str | None:
        length = max(attention_mask.shape[1], 4)
        ids = torch.stack([arbitrary_tokens(body, length, shift=shift) for shift in (1, 2)])
        padded = torch.ones_like(ids)
        padded[1, length - 2 :] = 0
        found = body(input_ids=ids, attention_mask=None, **padded_bounds(padded))[0].float()
        for row, size in enumerate((length, length - 2)):
            with on_own_backends():
                alone = body(input_ids=ids[row : row + 1, :size])[0][0].float()
            if not is_alike(found[row, :size], alone):
                return "its states change"
        return None

    try:
        return try_out(backbone, _BOUNDS, trial)
    except InputError:
        return make_plan(backbone, _BOUNDS, takes_masks=False)


# Isolated documents


def isolated_inputs(
    backbone: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    document_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    is_padded: bool | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Turn a batch into what a stock model takes, so that the documents of a row do not see each other.

    The first batch with documents tries the backbone out, see [`check_isolation`].

    Args:
        backbone: The stock model that the inputs are for, with or without a head.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 0 at padding.
        document_ids: ``[B, L]`` number of the document in its row that a token belongs to, -1 at padding; documents are
            contiguous. None if each row is one document.
        position_ids: ``[B, L]`` position of a token in its document, from 0; needed with `document_ids`.
        is_padded: Whether any row has padding; None if it is not known, so that a stock model may look at the mask and wait for
            the device.
        **inputs: Further inputs, handed through.

    Returns:
        Keyword arguments for the backbone. Without `document_ids`, the arguments as they came, and positions that do not count
        padding on the left where the backbone would. Padding sees only padding.

    Raises:
        InputError: If the backbone cannot isolate documents.
    """
    batch: dict[str, Any] = {"input_ids": input_ids, **inputs}
    if document_ids is None:
        if position_ids is not None:
            positions = {"position_ids": position_ids}
        else:
            positions = row_position_inputs(backbone, attention_mask)
        length = input_ids.shape[1]
        on_flash = keeps_flash(backbone, lambda row: backbone.base_model(input_ids=row)[0], length=length)
        if is_padded and on_flash and _flash_takes_bounds(backbone, attention_mask):
            return batch | {"attention_mask": None} | padded_bounds(attention_mask) | positions
        return batch | {"attention_mask": padding_inputs(backbone, attention_mask, is_padded)} | positions
    assert position_ids is not None, "the collator gives position_ids along with document_ids"
    plan = plan_or_leave_flash(backbone, _ISOLATION, lambda: check_isolation(backbone, length=input_ids.shape[1]))
    return batch | _attention_inputs(backbone, plan, document_ids=document_ids, position_ids=position_ids)


def check_isolation(backbone: PreTrainedModel, *, length: int = 32) -> AttentionPlan:
    """Refuse a backbone that cannot keep the documents of a row apart; the others are remembered.

    The states of two documents in a row are compared with those of the same documents alone, and while the other one is edited.
    That covers its attention backend too, and whatever mixes tokens elsewhere: convolutions, Fourier layers, statistics.

    Args:
        backbone: A stock model, with or without a head; on a device, and under the autocast that it is trained with.
        length: Tokens of the row to try; some architectures attend in another way to long rows.

    Raises:
        InputError: Naming the architecture and what went wrong.
    """

    def trial(body: PreTrainedModel, plan: AttentionPlan) -> str | None:
        def read(row: torch.Tensor, documents: dict[str, torch.Tensor] | None) -> torch.Tensor:
            own = {"attention_mask": torch.ones_like(row)}
            inputs = own if documents is None else _attention_inputs(body, plan, **documents)
            states: torch.Tensor = body(input_ids=row, **inputs)[0]
            return states

        return find_mixing(read, body, length=length)

    try:
        return try_out(backbone, _ISOLATION, trial)
    except InputError as error:
        raise InputError(
            f"{type(backbone).__name__} with attn_implementation={backbone.config._attn_implementation!r} cannot isolate "
            f"documents: {error}; use block_mode='doc_sentences', which gives each document rows of its own"
        ) from None


def find_mixing(
    read: Callable[[torch.Tensor, dict[str, torch.Tensor] | None], torch.Tensor], body: PreTrainedModel, *, length: int
) -> str | None:
    """Return what goes wrong with two documents in a row of some length, None if nothing does.

    Args:
        read: From tokens ``[1, L]`` and `document_ids` and `position_ids` ``[1, L]``, None for one document, to states
            ``[1, L, D]``.
        body: The stock model without a head that reads.
        length: Tokens of the row.
    """
    length = max(length, 8)
    third = length // 3
    sizes = (third, length - third, third, length - third)
    # Two documents that fill a row, and an edit of each.
    first, second, edited_first, edited_second = (
        arbitrary_tokens(body, size, shift=shift) for size, shift in zip(sizes, (1, 2, 2, 1), strict=True)
    )
    positions_L = torch.arange(length, device=first.device)
    ids_L = (positions_L >= third).long()
    documents = {"document_ids": ids_L[None], "position_ids": (positions_L - third * ids_L)[None]}

    def together(row: torch.Tensor) -> torch.Tensor:
        return read(row[None], documents).float()

    row, parts = torch.cat([first, second]), (slice(0, third), slice(third, None))
    edits = [
        Edit(torch.cat([first, edited_second]), parts[0], [0]),
        Edit(torch.cat([edited_first, second]), parts[1], [0]),
    ]
    if find_leak(together, row, edits) is not None:
        return "the states of a document change when another one in its row is edited"
    states = together(row)[0]
    with on_own_backends():
        alone = [read(row[None, part], None)[0].float() for part in parts]
    if not all(is_alike(states[part], expected) for part, expected in zip(parts, alone, strict=True)):
        return "the states of a document in a row with others are not those that it has alone"
    return None


def _attention_inputs(
    backbone: PreTrainedModel, plan: AttentionPlan, *, document_ids: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Any]:
    """Return attention mask (or bounds of sequences) and positions, as the backbone's attention takes them."""
    inputs: dict[str, Any] = position_inputs(plan, position_ids)
    if plan.is_flash:
        return inputs | {"attention_mask": None} | sequence_bounds(document_ids)
    mask = mask_inputs(backbone, plan, sees_within(document_ids), like=document_ids)
    return inputs | {"attention_mask": mask}


def sequence_bounds(document_ids: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments by which flash attention isolates sequences that lie one after the other.

    Args:
        document_ids: ``[B, L]``; each run of padding is a sequence of its own, so that rows need not be flattened.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, ``int32 [S + 1]``, the bounds of the sequences in the ``B * L`` tokens, and
        `max_length_q` and `max_length_k`, int. The longest sequence is taken to be a whole row: an upper bound, which
        spares a wait for the device.
    """
    num_rows, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    bounds = nn.functional.pad(starts, (0, 1), value=num_rows * length).int()
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
