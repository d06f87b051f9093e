"""Pairs of an input and a target that share the rows of a stock encoder-decoder and do not see each other.

[`PairReader`] calls the stock model as it is. Hooks on encoder and decoder give each side its own masks and positions, because
the stock forward has one mask for the encoder and for the attention from decoder to encoder; a third hook runs the head at the
targets only. Between two calls the hooks do nothing.

- Self-attention: a token sees its pair, in the decoder only what is not behind it. Cross-attention: target k sees input k.
- Positions restart with each pair. A side that takes `position_ids` is given them. Where a side has a table of positions but
  takes none, such as BART's, the output of its table is looked up anew. Relative positions need nothing.
- Masks are written on the device from one integer a token, in the form of the attention backend. Where nothing is padded and a
  model gives the same without a mask, and without a look at its inputs, it gets none.
- Flash attention takes the bounds of pairs, or of rows and their padding: those of the encoder, of the decoder, and of both for
  cross-attention.

No architecture is looked up by name: the first batch of each kind tries the model out, with the trials of `pair_trials.py`. The
hooks are in `sides.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import without_autocast
from hf_pretrain.modeling.loading import quiet
from hf_pretrain.modeling.losses import GatheredHead, GatheredOutput
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.backends import FLEX, leave_flash, paired_bounds
from hf_pretrain.modeling.visibility.pair_trials import (
    find_misplacing,
    find_mixing,
    find_padding,
    is_same,
    num_looks,
    serves,
    two_rows,
)
from hf_pretrain.modeling.visibility.rules import sees_within
from hf_pretrain.modeling.visibility.sides import Side, causal_masks, write_mask

_RULE = "pairs"

_CANNOT_ISOLATE = (
    "{name} cannot keep the pairs of a row apart: {error}; use block_mode='doc_sentences', which gives each pair rows of its "
    "own"
)
_CANNOT_PLACE = (
    "{name} cannot be given the positions of a fragment: {error}; choose an architecture with relative positions or a plain "
    "table of positions, such as t5 or bart, or another noise than 'mass'"
)
_CANNOT_PAD = "{name} cannot be trained on padded rows: {error}; use attn_implementation='sdpa'"
_CANNOT_GATHER = (
    "{name} cannot be trained on chosen positions: {error}; choose another architecture, such as t5 or bart"
)


class _Masks(NamedTuple):
    """What has been found out about the masks of a model for rows with one pair each.

    Attributes:
        are_written: Whether masks made here serve in place of the two-dimensional ones, in which a model would have to look.
        left_out: Which of `encoder`, `decoder` and `cross` need no mask where nothing is padded.
    """

    are_written: bool = True
    left_out: frozenset[str] = frozenset()


class PairReader:
    """Runs a stock encoder-decoder on pairs, one or several a row, with its head at the targets only.

    The hooks stay on the model for as long as it is trained. Who only borrows a model takes them off again, with `remove` or by
    using the reader in a `with` statement. They add no parameter and no buffer.

    Args:
        model: Any `AutoModelForSeq2SeqLM`, `EncoderDecoderModel` among them.

    Raises:
        InputError: If the model is no encoder-decoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not getattr(model.config, "is_encoder_decoder", False):
            raise InputError(
                f"{type(model).__name__} is no encoder-decoder: give an AutoModelForSeq2SeqLM, or join an encoder and a decoder "
                "in an EncoderDecoderModel"
            )
        # The second call goes into a causal language model, as which an EncoderDecoderModel has its decoder.
        parts = (model.get_encoder(), getattr(model.get_decoder(), "get_decoder", model.get_decoder)())
        for part in parts:
            if not isinstance(part, PreTrainedModel) or part is model:
                raise InputError(
                    f"{type(model).__name__}: its {type(part).__name__} is no model of its own and cannot be given masks; "
                    "choose another architecture, such as t5 or bart"
                )
        self._model = model
        self._encoder, self._decoder = (Side(part.base_model) for part in parts)
        self._sides, self._bodies = (self._encoder, self._decoder), (self._encoder.body, self._decoder.body)
        self._head = GatheredHead(model, body=self._decoder.body)
        # By rule and attention backends, what trials have found.
        self._found: dict[tuple[str, str, str], _Masks] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model; the reader cannot be used any more."""
        self._head.remove()
        for hook in (hook for side in self._sides for hook in side.hooks):
            hook.remove()

    def run(
        self,
        target_positions: torch.Tensor,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        decoder_attention_mask: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_document_ids: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        is_padded: bool | None = None,
        decoder_is_padded: bool | None = None,
        num_documents: int | None = None,
    ) -> torch.Tensor:
        """Return the logits at the targets.

        The first call of each kind tries the model out: with one pair a row, with several, and with positions for one.

        Args:
            target_positions: ``[N]`` flat row-major positions in the ``[B, T]`` grid of the decoder.
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]``, 0 at padding.
            decoder_input_ids: ``[B, T]``.
            decoder_attention_mask: ``[B, T]``, 0 at padding.
            document_ids: ``[B, L]`` number of the pair in its row that an input token belongs to, -1 at padding. None if each row
                is one pair.
            position_ids: ``[B, L]`` position of a token in its input, from 0; needed with `document_ids`.
            decoder_document_ids: ``[B, T]`` as `document_ids`, for the targets; each of its pairs has an input in the same row.
            decoder_position_ids: ``[B, T]`` position of a token in its target, from 0; needed with `decoder_document_ids`.
                Without documents, positions that are not those of the columns, such as those of a fragment in its text.
            is_padded: Whether any encoder row has padding; None if it is not known.
            num_documents: The most pairs in a row, or more; read from `document_ids` where it is needed and not given.
            decoder_is_padded: Whether any decoder row has padding; None if it is not known.

        Returns:
            ``[N, V]`` logits. With one pair a row, those of the stock model. With several, those that each pair has alone.

        Raises:
            InputError: If the architecture, or its attention backend, cannot do what is asked.
        """
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        lengths = {"length": input_ids.shape[1], "decoder_length": decoder_input_ids.shape[1]}
        documents = _both(document_ids, decoder_document_ids)
        kinds = (
            ["isolation"] if documents is not None else ["bounds", *["positions"] * (decoder_position_ids is not None)]
        )
        on_flash = self._is_on_flash and self._keeps_flash(kinds, **lengths)
        masks = None if on_flash else self._masks(**lengths)
        if documents is not None:
            assert position_ids is not None and decoder_position_ids is not None, "the collator gives positions too"
            if self._key("isolation") not in self._found:
                self.check_isolation(**lengths)
        elif decoder_position_ids is not None and self._key("positions") not in self._found:
            self.check_positions(**lengths)
        return self._read(
            target_positions,
            batch,
            masks=masks,
            documents=documents,
            positions=(position_ids, decoder_position_ids),
            padded=(is_padded is not False, decoder_is_padded is not False),
            num_documents=num_documents,
        ).logits

    def _read(
        self,
        target_positions: torch.Tensor,
        batch: dict[str, torch.Tensor],
        *,
        masks: _Masks | None = None,
        documents: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        padded: tuple[bool, bool] = (True, True),
        num_documents: int | None = None,
    ) -> GatheredOutput:
        """Run the stock model once, with masks of documents, with other masks of padding, or with the stock ones."""
        try:
            if self._is_on_flash:
                self._bound(documents, batch, padded=any(padded), num_documents=num_documents)
            elif documents is not None:
                self._isolate(*documents)
            elif masks is not None:
                self._mask_padding(masks, batch, padded)
            for side, position_ids in zip(self._sides, positions, strict=True):
                if position_ids is not None:
                    side.place(position_ids)
            return self._head.run(self._model, target_positions, **batch, use_cache=False)
        finally:
            for side in self._sides:
                side.clear()

    # Masks

    def _isolate(self, document_ids: torch.Tensor, decoder_document_ids: torch.Tensor) -> None:
        """Write the masks of rows with several pairs."""
        encoder, decoder = self._encoder, self._decoder
        encoder.inputs["attention_mask"] = rules.mask_inputs(
            encoder.body, encoder.plan, sees_within(document_ids), like=document_ids
        )
        earlier = sees_within(decoder_document_ids, _columns(decoder_document_ids))
        decoder.inputs["attention_mask"] = causal_masks(decoder, earlier, like=decoder_document_ids)

        def own_input(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            # Padding sees all: the encoder row may have none, and a softmax over nothing is no number.
            ids = decoder_document_ids[row, query]
            return (ids == document_ids[row, key]) | (ids < 0)

        decoder.inputs["encoder_attention_mask"] = write_mask(
            decoder, own_input, like=decoder_document_ids, num_keys=document_ids.shape[1]
        )

    @property
    def _is_on_flash(self) -> bool:
        return "flash" in self._encoder.backend and "flash" in self._decoder.backend

    def _bound(
        self,
        documents: tuple[torch.Tensor, torch.Tensor] | None,
        batch: dict[str, torch.Tensor],
        *,
        padded: bool,
        num_documents: int | None,
    ) -> None:
        """Give flash attention the bounds of pairs, or of rows without their padding; none where rows are full."""
        encoder, decoder = self._encoder, self._decoder
        encoder.inputs["attention_mask"] = decoder.inputs["attention_mask"] = None
        decoder.inputs["encoder_attention_mask"] = None
        if documents is None and not padded:
            return
        if documents is None:
            first, second = ((batch[name] != 0).long() - 1 for name in ("attention_mask", "decoder_attention_mask"))
            documents, num_documents = (first, second), 1
        if num_documents is None:
            num_documents = 1 + int(torch.stack([ids.max() for ids in documents]).max())
        bounds = paired_bounds(*documents, num_documents=num_documents)
        (own, decoder_own), (length, decoder_length) = bounds, (ids.shape[1] for ids in documents)
        keys = {"cu_seq_lens_k": own, "max_length_k": length}
        decoder_queries = {"cu_seq_lens_q": decoder_own, "max_length_q": decoder_length}
        encoder.inputs |= keys | {"cu_seq_lens_q": own, "max_length_q": length}
        decoder.inputs |= decoder_queries | {"cu_seq_lens_k": decoder_own, "max_length_k": decoder_length}
        decoder.cross_bounds = decoder_queries | keys

    def _mask_padding(self, masks: _Masks, batch: dict[str, torch.Tensor], padded: tuple[bool, bool]) -> None:
        """Write the masks of rows with one pair, or leave them out; where neither serves, the stock ones stay."""
        encoder, decoder = self._encoder, self._decoder
        mask_BL, decoder_mask_BT = batch["attention_mask"], batch["decoder_attention_mask"]
        is_token_BL = mask_BL != 0
        # A row of nothing but padding sees all of it.
        is_key_BL = is_token_BL | ~is_token_BL.any(dim=1, keepdim=True)

        def tokens(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return is_key_BL[row, key]

        earlier = sees_within(decoder_mask_BT != 0, _columns(decoder_mask_BT))
        writers: dict[str, Callable[[], Any]] = {
            "encoder": lambda: rules.mask_inputs(encoder.body, encoder.plan, sees_within(is_token_BL), like=mask_BL),
            "decoder": lambda: causal_masks(decoder, earlier, like=decoder_mask_BT),
            "cross": lambda: write_mask(decoder, tokens, like=decoder_mask_BT, num_keys=mask_BL.shape[1]),
        }
        for kind, write in writers.items():
            inputs = encoder.inputs if kind == "encoder" else decoder.inputs
            name = "encoder_attention_mask" if kind == "cross" else "attention_mask"
            if kind in masks.left_out and not padded[kind == "decoder"]:
                inputs[name] = None
            elif masks.are_written:
                inputs[name] = write()

    # Trials

    def check_isolation(self, *, length: int = 32, decoder_length: int | None = None) -> None:
        """Refuse a model that cannot keep pairs apart that share a row; that it can is remembered.

        Two pairs in a row are compared with each alone, and while a part of the other is edited. Later tokens of a target are
        edited too, and where something must be seen, it has to move.

        Args:
            length: Tokens of the encoder row to try; some architectures attend in another way to long rows.
            decoder_length: Tokens of the decoder row, by default as many.

        Raises:
            InputError: Naming the architecture and what went wrong.
        """
        sizes = (length, length if decoder_length is None else decoder_length)
        self._try(
            "isolation",
            lambda: self._find_offsets(sizes) or find_mixing(self._read, self._bodies, sizes),
            _CANNOT_ISOLATE,
        )

    def check_positions(self, *, length: int = 32, decoder_length: int | None = None) -> None:
        """Refuse a decoder that cannot be given positions; that it can is remembered.

        A fragment at its original positions is compared with the same fragment at the end of a longer decoder row, whose
        beginning is masked.

        Args:
            length: Tokens of the encoder row to try.
            decoder_length: Tokens of the longer decoder row, by default as many.

        Raises:
            InputError: Naming the architecture and what went wrong.
        """
        sizes = (length, length if decoder_length is None else decoder_length)
        masks = None if self._is_on_flash else self._masks(*sizes)
        self._try(
            "positions",
            lambda: (
                self._find_offsets(sizes) or find_misplacing(partial(self._read, masks=masks), self._bodies, sizes)
            ),
            _CANNOT_PLACE,
        )

    def _masks(self, length: int, decoder_length: int) -> _Masks:
        """Return what masks the model may be given for rows of one pair; refuse one whose head cannot be run at the targets."""
        key = self._key("masks")
        if key not in self._found:
            self._try("masks", lambda: self._find_masks((length, decoder_length)), _CANNOT_GATHER)
        return self._found[key]

    def _keeps_flash(self, kinds: Sequence[str], *, length: int, decoder_length: int) -> bool:
        """Whether the model does on flash attention what it is to do; the first batch of each kind tries it out.

        Raises:
            InputError: If it does not, and its backend was named by somebody.
        """
        sizes = (length, decoder_length)
        checks: dict[str, Callable[[], None]] = {
            "isolation": lambda: self.check_isolation(length=length, decoder_length=decoder_length),
            "positions": lambda: self.check_positions(length=length, decoder_length=decoder_length),
            "bounds": lambda: self._try("bounds", lambda: find_padding(self._read, self._bodies, sizes), _CANNOT_PAD),
        }
        try:
            for kind in kinds:
                if self._key(kind) not in self._found:
                    checks[kind]()
        except InputError as error:
            if not leave_flash(self._encoder.body, str(error)):
                raise
            return False
        return True

    def _key(self, rule: str) -> tuple[str, str, str]:
        return rule, self._encoder.backend, self._decoder.backend

    @torch.compiler.disable
    def _try(self, rule: str, trial: Callable[[], str | None], refusal: str) -> None:
        key = self._key(rule)
        try:
            rules.try_out(self._model, f"{_RULE}_{rule}", lambda body, plan: trial())
        except InputError as error:
            self._found.pop(key, None)
            backends = " and ".join(dict.fromkeys(repr(backend) for backend in key[1:]))
            name = f"{type(self._model).__name__} with attn_implementation={backends}"
            raise InputError(refusal.format(name=name, error=error)) from None
        self._found.setdefault(key, _Masks())

    def _find_offsets(self, sizes: tuple[int, int]) -> str | None:
        """Look at the rows that tables of positions give to a row without positions."""
        tables = [(table, size) for side, size in zip(self._sides, sizes, strict=True) for table in side.tables]
        for table, size in tables:
            if len(table.rows) - table.offset < size:
                return f"its {type(table.module).__name__} has {len(table.rows)} rows, too few for the {size} tokens of a row"
        outputs: list[list[Any]] = [[] for _ in tables]
        hooks = [
            table.module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            for (table, _), seen in zip(tables, outputs, strict=True)
        ]
        try:
            self._read(**two_rows(self._bodies, sizes))
        finally:
            for hook in hooks:
                hook.remove()
        for (table, _), seen in zip(tables, outputs, strict=True):
            if len(seen) != 1 or not isinstance(seen[0], torch.Tensor) or not table.find_offset(seen[0]):
                return f"its {type(table.module).__name__} does not give column after column a row after the other"
        return None

    def _find_masks(self, sizes: tuple[int, int]) -> str | None:
        """Compare gathered logits with the stock ones, and find the masks that serve and look at nothing."""
        padded, whole = (two_rows(self._bodies, sizes, odd_tokens=True, num_padding=n) for n in (2, 0))
        with without_autocast(self._encoder.body.device), quiet():
            stock = self._model(**padded["batch"], use_cache=False).logits.flatten(0, 1)[padded["target_positions"]]
            expected, expected_whole = (self._read(**rows).logits for rows in (padded, whole))
            if expected.shape != stock.shape or not is_same(expected, stock):
                return "its head does not treat each position on its own"
            found = _Masks(serves(partial(self._read, **padded, masks=_Masks()), expected))
            # FlexAttention cannot run while looks are counted. It needs none for a mask that is left out.
            count = num_looks if FLEX not in self._key("masks") else lambda read: 0
            fewest = count(partial(self._read, **whole, masks=found))
            for kind in ("encoder", "cross", "decoder"):
                fewer = _Masks(found.are_written, found.left_out | {kind})
                read = partial(self._read, **whole, masks=fewer, padded=(False, False))
                if serves(read, expected_whole) and (looks := count(read)) <= fewest:
                    found, fewest = fewer, looks
        self._found[self._key("masks")] = found
        return None


def _both(first: torch.Tensor | None, second: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return two tensors that come together, or None."""
    assert (first is None) == (second is None), "documents are given for both sides or for none"
    return None if first is None or second is None else (first, second)


def _columns(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
