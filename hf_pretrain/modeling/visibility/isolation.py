"""Who sees whom in a row, as the attention of a stock model takes it, and how to find out whether a model keeps to it.

A rule of visibility is written once, as the mask functions of transformers are: of row, head, query and key. Here it becomes
what the backbone and its attention backend take, on the device. What a backbone does with it is seen, not looked up: those who
ask for a rule try the backbone out.

Several documents in a row that do not see each other, for every attention backend.

A batch says which document each token belongs to. What the attention of a stock model takes instead (a block mask, one for
each kind of layer, or the bounds of sequences) is made here, on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
)

from hf_pretrain.errors import InputError

MaskFunction = Callable[..., torch.Tensor]

# Attention of their own: the mask has three dimensions.
_DISENTANGLED = frozenset({"deberta", "deberta-v2"})

EDIT_TOLERANCE = 1e-6
"""Of the greatest state, by how much a token may move when one is edited that it must not see: not at all."""

ALONE_TOLERANCE = 0.05
"""Relative difference to the same tokens in another row. In another shape and perhaps in bfloat16 sums are rounded
differently, but wrong positions or masks move every state."""


class AttentionPlan(NamedTuple):
    """What is known of a backbone that was found fit.

    Attributes:
        backend: The attention backend that it was tried out with.
        takes_positions: Whether it can be told the place of a token; one that cannot has relative positions.
        first_position: Number of the first position in its table: RoBERTa and its kin count from `padding_idx + 1`.
    """

    backend: str
    takes_positions: bool
    first_position: int

    @classmethod
    def of(cls, body: PreTrainedModel) -> AttentionPlan:
        """Read what a body without a head says of itself."""
        return cls(
            backend=body.config._attn_implementation,
            takes_positions="position_ids" in inspect.signature(body.forward).parameters,
            first_position=first_position(body),
        )

    def fits(self, backbone: PreTrainedModel) -> bool:
        """Tell whether the backbone still has the backend that it was tried out with."""
        backend: str = backbone.config._attn_implementation
        return self.backend == backend

    @property
    def is_flash(self) -> bool:
        """Whether the backend is flash attention, which takes bounds of sequences and no mask."""
        return "flash" in self.backend


def first_position(body: PreTrainedModel) -> int:
    """Return the number of the first position in a body's table."""
    for name, module in body.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def row_position_inputs(model: PreTrainedModel, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the positions of rows that may begin with padding, for a model that would count it.

    A stock model with a table of positions numbers the columns, so that the same text has other positions in a longer batch with
    padding on the left. RoBERTa and its kin leave padding out by themselves, and distances are the same on either side.

    Args:
        model: A stock model, with or without a head.
        attention_mask: ``[B, L]``, 0 at padding.

    Returns:
        `position_ids` ``[B, L]``, 0 at the first token of each row, where the model has to be given them; else nothing. Rows that
        begin with a token have the positions that the model gives them by itself.
    """
    counts_columns: bool | None = getattr(model, "_counts_columns", None)
    if counts_columns is None:
        counts_columns = find_out_what_is_counted(model)
    if not counts_columns:
        return {}
    columns_L = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    first_B1 = (attention_mask != 0).to(torch.int8).argmax(dim=1, keepdim=True)
    return {"position_ids": (columns_L - first_B1).clamp(min=0)}


@torch.compiler.disable
def find_out_what_is_counted(model: PreTrainedModel) -> bool:
    """Return, and remember, whether a model numbers the columns of its input and can be given other numbers."""
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    # DeBERTa's mask decoder has a table that is not part of the model.
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    has_table = bool(tables) or model_type in _DISENTANGLED
    counts = has_table and first_position(model) == 0 and "position_ids" in inspect.signature(model.forward).parameters
    setattr(model, "_counts_columns", counts)  # noqa: B010 (no attribute that the type knows)
    return counts


def position_inputs(plan: AttentionPlan, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return places ``[B, L]``, counted from 0, as the backbone takes them."""
    return {"position_ids": position_ids + plan.first_position} if plan.takes_positions else {}


def mask_inputs(backbone: PreTrainedModel, plan: AttentionPlan, visible: MaskFunction, *, like: torch.Tensor) -> Any:
    """Write the mask of a rule as the backbone takes it.

    Args:
        backbone: The stock model.
        plan: What is known of it.
        visible: Of row, head, query and key, each an index that broadcasts against the others: whether the query sees the key.
        like: ``[B, L]``, a tensor of the shape and on the device of the batch.

    Returns:
        The `attention_mask`: boolean for sdpa, added to the scores for eager, blocks for flex attention; where layers differ,
        one for each kind of layer.

    Raises:
        InputError: If the backend takes no mask.
    """
    if backbone.config.model_type in _DISENTANGLED:
        return _write(sdpa_mask, backbone, visible, like=like)[:, 0]
    if plan.is_flash or plan.backend not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise InputError(f"no mask is known for attn_implementation={plan.backend!r}")
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[plan.backend]
    if "sliding_attention" not in (getattr(backbone.config, "layer_types", None) or ()):
        return _write(make_mask, backbone, visible, like=like)
    # A window counts places in the row: between tokens that see each other, those are as far apart as places in the text.
    in_window = and_masks(visible, sliding_window_bidirectional_overlay(backbone.config.sliding_window))
    return {
        "full_attention": _write(make_mask, backbone, visible, like=like),
        "sliding_attention": _write(make_mask, backbone, in_window, like=like),
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


def try_out(backbone: PreTrainedModel, trial: Callable[[PreTrainedModel, AttentionPlan], str | None]) -> AttentionPlan:
    """Try a backbone out in evaluation, which leaves no trace.

    Args:
        backbone: A stock model, with or without a head; on a device, and under the autocast that it is trained with.
        trial: Of the body without a head and what it says of itself: what goes wrong, None if nothing does.

    Returns:
        What is known of the backbone.

    Raises:
        InputError: With what went wrong, whatever the backbone does with a mask that it was not made for.
    """
    body = backbone.base_model
    _let_embeddings_take_square_masks(body)
    plan = AttentionPlan.of(body)
    if any(parameter.is_meta for parameter in body.parameters()):
        return plan  # There are no states to compare.
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with torch.no_grad():
            failure = trial(body, plan)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = f"its forward fails with such a mask ({reason})"
    finally:
        for module in training:
            module.training = True
    if failure:
        raise InputError(failure)
    return plan


def arbitrary_tokens(body: PreTrainedModel, length: int, *, step: int) -> torch.Tensor:
    """Return ``[length]`` tokens that are not padding, others for each step."""
    tokens = torch.arange(min(body.config.vocab_size, 100), device=body.device)
    tokens = tokens[tokens != getattr(body.config, "pad_token_id", None)]
    return tokens[(step * torch.arange(length, device=body.device) + 1) % len(tokens)]


def _let_embeddings_take_square_masks(body: PreTrainedModel) -> None:
    """Let DeBERTa's embeddings, which clear padding by the mask, take a square one: its diagonal says the same."""
    if body.config.model_type not in _DISENTANGLED:
        return

    def take_diagonal(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("mask")
        if mask is not None and mask.dim() == 3:
            kwargs = kwargs | {"mask": mask.diagonal(dim1=1, dim2=2)}
        return args, kwargs

    body.embeddings.register_forward_pre_hook(take_diagonal, with_kwargs=True)


def isolated_inputs(
    backbone: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    document_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Turn a batch into what a stock model takes, so that the documents of a row do not see each other.

    The first call tries the backbone out, see [`check_isolation`].

    Args:
        backbone: The stock model that the inputs are for, with or without a head.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 0 at padding.
        document_ids: ``[B, L]`` number of the document in its row that a token belongs to, -1 at padding; documents are
            contiguous. None if each row is one document.
        position_ids: ``[B, L]`` place of a token in its document, from 0; needed with `document_ids`.
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
        return batch | {"attention_mask": attention_mask} | positions
    assert position_ids is not None, "the collator gives position_ids along with document_ids"
    plan: AttentionPlan | None = getattr(backbone, "_isolation_plan", None)
    if plan is None or not plan.fits(backbone):
        plan = check_isolation(backbone, length=input_ids.shape[1])
    return batch | _attention_inputs(backbone, plan, document_ids=document_ids, position_ids=position_ids)


@torch.compiler.disable
def check_isolation(backbone: PreTrainedModel, *, length: int = 32) -> AttentionPlan:
    """Refuse a backbone that cannot keep the documents of a row apart; the others are remembered.

    What a backbone does is seen, not looked up: the states of two documents in a row are compared with those of the same
    documents alone, and while the other one is edited. That holds for its attention backend too, and for what mixes
    tokens elsewhere (convolutions, Fourier layers, statistics of a row).

    Args:
        backbone: A stock model, with or without a head; on a device, and under the autocast that it is trained with.
        length: Tokens of the row to try; some architectures attend in another way to long rows.

    Raises:
        InputError: Naming the architecture and what went wrong.
    """
    try:
        plan = try_out(backbone, lambda body, plan: _try_out(body, plan, max(length, 8)))
    except InputError as error:
        raise InputError(
            f"{type(backbone).__name__} with attn_implementation={backbone.config._attn_implementation!r} cannot isolate "
            f"documents: {error}; use block_mode='doc_sentences', which gives each document rows of its own"
        ) from None
    setattr(backbone, "_isolation_plan", plan)  # noqa: B010 (no attribute that the type knows)
    return plan


def _try_out(body: PreTrainedModel, plan: AttentionPlan, length: int) -> str | None:
    """Return what goes wrong with two documents in a row of some length, None if nothing does."""
    first, second, edited_first, edited_second = _documents_to_try(body, length)

    def together(*documents: torch.Tensor) -> torch.Tensor:
        row = torch.cat(documents)[None]
        lengths = torch.tensor([len(document) for document in documents], device=row.device)
        ids = torch.arange(len(documents), device=row.device).repeat_interleave(lengths)[None]
        positions = torch.cat([torch.arange(len(document), device=row.device) for document in documents])[None]
        states: torch.Tensor = body(
            input_ids=row, **_attention_inputs(body, plan, document_ids=ids, position_ids=positions)
        )[0]
        return states[0].float()

    states = together(first, second)
    edits = [(states[: len(first)], together(first, edited_second)[: len(first)])]
    edits += [(states[len(first) :], together(edited_first, second)[len(first) :])]
    for before, after in edits:
        if not (before - after).abs().max() <= EDIT_TOLERANCE * before.abs().max():
            return "the states of a document change when another one in its row is edited"
    for document, packed in ((first, states[: len(first)]), (second, states[len(first) :])):
        alone = body(input_ids=document[None], attention_mask=torch.ones_like(document)[None])[0][0].float()
        if not (packed - alone).norm() <= ALONE_TOLERANCE * alone.norm():
            return "the states of a document in a row with others are not those that it has alone"
    return None


def _documents_to_try(body: PreTrainedModel, length: int) -> list[torch.Tensor]:
    """Return two documents that fill a row and an edit of each, of arbitrary tokens that are not padding."""
    third = length // 3
    sizes = (third, length - third, third, length - third)
    return [arbitrary_tokens(body, size, step=step) for size, step in zip(sizes, (3, 2, 7, 5), strict=True)]


def _attention_inputs(
    backbone: PreTrainedModel, plan: AttentionPlan, *, document_ids: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Any]:
    """Return attention mask (or what takes its place) and positions, as the backbone's attention takes them."""
    inputs: dict[str, Any] = position_inputs(plan, position_ids)
    if plan.is_flash:
        return inputs | {"attention_mask": None} | sequence_bounds(document_ids)
    same_document = packed_sequence_mask_function(document_ids)
    return inputs | {"attention_mask": mask_inputs(backbone, plan, same_document, like=document_ids)}


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
