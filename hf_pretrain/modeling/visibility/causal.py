"""Rows of text as a stock causal language model reads them: whole, or as documents that do not see each other.

[`CausalReader`] calls the body of the stock model, without its head. A row may be padded behind its last token. No token sees
what follows, so such a row needs no mask, and attention backends take their fastest path. Where documents are isolated, a mask is
written on the device, from one integer a token, and positions restart with each document.

transformers looks into positions for rows that are packed, and at tokens for padding; the host would wait for the device at each
step. Both looks are left out here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, masking_utils

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.rules import Edit, arbitrary_tokens, find_leak, sees_within
from hf_pretrain.modeling.visibility.sides import Side, causal_masks

_RULE = "causal_isolation"
# Where transformers looks at values, and what it finds in rows as they are read here: nothing.
_LOOKS: tuple[tuple[Any, str], ...] = (
    (masking_utils, "find_packed_sequence_indices"),
    (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
)


def causal_body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal language model whose output its head reads.

    Raises:
        InputError: If the model is an encoder-decoder, or has no such part.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"model={name} is an encoder-decoder: train it with `hf-pretrain denoise`")
    body = body_of_head(model)
    if body is None:
        raise InputError(f"model={name} has no body apart from its head: choose another architecture, such as gpt2")
    return body


def body_of_head(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the part of a causal language model whose output its head reads; None for a class without one, as Llama 4's."""
    decoder = model.get_decoder()
    # OPT and the decoders of BART's kin run this part alone; ModernBERT's decoder calls a layer of its head so.
    body = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    return body if isinstance(body, PreTrainedModel) and body is not model else None


def sees_what_follows(model: PreTrainedModel, read: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Return whether tokens see those that follow: the last one of a row is edited, and the outputs before it may not move.

    Args:
        model: The model, which is put into evaluation mode.
        read: Returns its outputs ``[1, L, ...]`` for a row of tokens ``[1, L]``.
    """
    tokens, others = (arbitrary_tokens(model.base_model, 8, shift=shift) for shift in (1, 2))
    edit = Edit(torch.cat([tokens[:-1], others[-1:]]), slice(0, -1), hiding=[0])
    with evaluating(model):
        return find_leak(lambda row: read(row[None]).float(), tokens, [edit]) is not None


class CausalReader:
    """Runs the body of a stock causal language model on rows of one text, or of documents that do not see each other.

    Its hooks stay on the model, and do nothing between two calls.

    Args:
        model: Any `AutoModelForCausalLM`.

    Raises:
        InputError: If the model has no body apart from its head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.body = model, causal_body(model)
        self._side = Side(self.body)
        takes_cache = "use_cache" in inspect.signature(type(self.body).forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}

    def __call__(
        self,
        input_ids: torch.Tensor,
        *,
        document_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the last states ``[B, L, D]``.

        The first call with documents tries the model out, see [`CausalReader.check_isolation`].

        Args:
            input_ids: ``[B, L]``, padded on the right.
            document_ids: ``[B, L]`` number of the document in its row that a token belongs to, -1 at padding. None if each
                row is one text.
            position_ids: ``[B, L]`` position of a token in its document, from 0; needed with `document_ids`.

        Raises:
            InputError: If the model cannot keep documents apart.
        """
        if document_ids is None:
            rules.keeps_flash(self.body, self._read, length=input_ids.shape[1])
        else:
            rules.plan_or_leave_flash(self.body, _RULE, lambda: self.check_isolation(length=input_ids.shape[1]))
        return self._read(input_ids, document_ids=document_ids, position_ids=position_ids)

    def _read(
        self,
        input_ids: torch.Tensor,
        *,
        document_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": input_ids, **self._options}
        try:
            if document_ids is not None:
                assert position_ids is not None, "the collator gives position_ids along with document_ids"
                inputs |= self._isolating_inputs(document_ids)
            if position_ids is not None:
                self._side.place(position_ids)
            with _without_looks():
                states: torch.Tensor = self.body(**inputs)[0]
            return states
        finally:
            self._side.clear()

    def _isolating_inputs(self, document_ids: torch.Tensor) -> dict[str, Any]:
        """Return the mask of documents, or the bounds of sequences that flash attention takes."""
        if self._side.plan.is_flash:
            return {"attention_mask": None} | rules.sequence_bounds(document_ids)
        columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        visible = sees_within(document_ids, columns)
        return {"attention_mask": causal_masks(self._side, visible, like=document_ids)}

    def check_causal(self) -> None:
        """Refuse a model in which a token sees those that follow.

        Raises:
            InputError: Naming the class and what to do.
        """
        if self.body.device.type == "meta":
            return
        if sees_what_follows(self.body, self._read):
            raise InputError(
                f"model={type(self._model).__name__} sees the tokens that follow: train an encoder with `hf-pretrain mlm` and "
                "XLNet with `hf-pretrain plm`, or set is_decoder=True in the configuration of an encoder that has it"
            )

    def check_isolation(self, *, length: int = 32) -> None:
        """Refuse a model that cannot keep the documents of a row apart; that it can is remembered.

        Args:
            length: Tokens of the row to try; some architectures attend in another way to long rows.

        Raises:
            InputError: Naming the architecture and what went wrong.
        """

        def trial(body: PreTrainedModel, plan: rules.AttentionPlan) -> str | None:
            def read(row: torch.Tensor, documents: dict[str, torch.Tensor] | None) -> torch.Tensor:
                return self._read(row, **(documents or {}))

            return rules.find_mixing(read, self.body, length=length)

        try:
            rules.try_out(self.body, _RULE, trial)
        except InputError as error:
            raise InputError(
                f"{type(self._model).__name__} with attn_implementation={self._side.backend!r} cannot isolate documents: "
                f"{error}; use block_mode='doc_sentences', which gives each document rows of its own"
            ) from None


@contextmanager
def _without_looks() -> Iterator[None]:
    """Let transformers look at no value: rows are not packed, or have a mask of their own, and padding is behind all tokens."""
    if torch.compiler.is_compiling():
        # A graph is traced without values, and transformers leaves both looks out itself.
        yield
        return
    before = [(owner, name, vars(owner).get(name)) for owner, name in _LOOKS]
    try:
        for owner, name, own in before:
            if own is not None:
                setattr(owner, name, _nothing)
        yield
    finally:
        for owner, name, own in before:
            if own is not None:
                setattr(owner, name, own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Find nothing."""
