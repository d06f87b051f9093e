"""Pairs of an input and a target that share the rows of a stock encoder-decoder and do not see each other.

[`PairReader`] calls the stock model as it is. Hooks on encoder and decoder give each side its own masks and positions, because
the stock forward has one mask for the encoder and for the attention from decoder to encoder; a third hook runs the head at the
targets only. Between two calls the hooks do nothing.

- Self-attention: a token sees its pair, in the decoder only what is not behind it. Cross-attention: target k sees input k.
- Positions restart with each pair. A side that takes `position_ids` is given them. Where a side has a table of positions but
  takes none, such as BART's, the output of its table is looked up anew. Relative positions need nothing.
- Masks are written on the device from one integer a token, in the form of the attention backend. Where nothing is padded and a
  model gives the same without a mask, and without a look at its inputs, it gets none.

No architecture is looked up by name: the first batch of each kind tries the model out, with the trials of `pair_trials.py`. First
come the two sides, then the reader, then the masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import first_position, position_tables, window_of, without_autocast
from hf_pretrain.modeling.losses import GatheredHead, GatheredOutput
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.pair_trials import (
    find_misplacing,
    find_mixing,
    is_same,
    num_looks,
    serves,
    two_rows,
)
from hf_pretrain.modeling.visibility.rules import AttentionPlan, MaskFunction, sees_within

_RULE = "pairs"

_CANNOT_ISOLATE = (
    "{name} cannot keep the pairs of a row apart: {error}; use block_mode='doc_sentences', which gives each pair rows of its "
    "own"
)
_CANNOT_PLACE = (
    "{name} cannot be given the positions of a fragment: {error}; choose an architecture with relative positions or a plain "
    "table of positions, such as t5 or bart, or another noise than 'mass'"
)
_CANNOT_GATHER = (
    "{name} cannot be trained on chosen positions: {error}; choose another architecture, such as t5 or bart"
)


class _Table:
    """A table of positions without an input for them; its output is looked up anew while its side has positions.

    Attributes:
        offset: Row of position 0: BART's is 2, M2M-100's the one after the padding id's.
    """

    def __init__(self, side: _Side, module: nn.Module) -> None:
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


class _Side:
    """Encoder or decoder of a stock model, with hooks that hand it what a run has for it.

    Attributes:
        body: The stock module.
        inputs: Arguments that replace those that the stock forward hands it; empty between two runs.
        positions: ``[B, L]`` for tables of positions; None between two runs.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        self.body = body
        self.inputs: dict[str, Any] = {}
        self.positions: torch.Tensor | None = None
        self._order = tuple(inspect.signature(type(body).forward).parameters)[1:]
        self._takes_positions, self._first = "position_ids" in self._order, first_position(body)
        modules = dict(body.named_modules())
        names = [] if self._takes_positions else [*position_tables(body), *_with_buffers(modules)]
        self.tables = [_Table(self, modules[name]) for name in names]
        hook = body.register_forward_pre_hook(self._hand_over, with_kwargs=True)
        self.hooks: list[RemovableHandle] = [hook, *(table.hook for table in self.tables)]

    @property
    def backend(self) -> str:
        """Name of the attention backend."""
        return str(self.body.config._attn_implementation)

    @property
    def plan(self) -> AttentionPlan:
        """What the side's attention takes."""
        known = rules.known_plan(self.body, _RULE)
        return rules.make_plan(self.body, _RULE) if known is None else known

    def place(self, position_ids: torch.Tensor) -> None:
        """Give the side positions ``[B, L]``, counted from 0, for the next call."""
        if self._takes_positions:
            self.inputs["position_ids"] = position_ids + self._first
        elif self.tables:
            self.positions = position_ids

    def clear(self) -> None:
        """Make the hooks inert."""
        self.inputs, self.positions = {}, None

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
                    f"{type(model).__name__}: its {type(part).__name__} is no model of its own, so that it cannot be given masks; "
                    "choose another architecture, such as t5 or bart"
                )
        self._model = model
        self._encoder, self._decoder = (_Side(part.base_model) for part in parts)
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
        documents, masks = _both(document_ids, decoder_document_ids), self._masks(**lengths)
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
    ) -> GatheredOutput:
        """Run the stock model once, with masks of documents, with other masks of padding, or with the stock ones."""
        try:
            if documents is not None:
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
        decoder.inputs["attention_mask"] = _causal_masks(decoder, earlier, like=decoder_document_ids)

        def own_input(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            # Padding sees all: the encoder row may have none, and a softmax over nothing is no number.
            ids = decoder_document_ids[row, query]
            return (ids == document_ids[row, key]) | (ids < 0)

        decoder.inputs["encoder_attention_mask"] = _write(
            decoder, own_input, like=decoder_document_ids, num_keys=document_ids.shape[1]
        )

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
            "encoder": lambda: rules.mask_inputs(encoder.body, encoder.plan, tokens, like=mask_BL),
            "decoder": lambda: _causal_masks(decoder, earlier, like=decoder_mask_BT),
            "cross": lambda: _write(decoder, tokens, like=decoder_mask_BT, num_keys=mask_BL.shape[1]),
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
        masks = self._masks(*sizes)
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
        with without_autocast(self._encoder.body.device), _quiet():
            stock = self._model(**padded["batch"], use_cache=False).logits.flatten(0, 1)[padded["target_positions"]]
            expected, expected_whole = (self._read(**rows).logits for rows in (padded, whole))
            if expected.shape != stock.shape or not is_same(expected, stock):
                return "its head does not treat each position on its own"
            found = _Masks(serves(partial(self._read, **padded, masks=_Masks()), expected))
            fewest = num_looks(partial(self._read, **whole, masks=found))
            for kind in ("encoder", "cross", "decoder"):
                fewer = _Masks(found.are_written, found.left_out | {kind})
                read = partial(self._read, **whole, masks=fewer, padded=(False, False))
                if serves(read, expected_whole) and (looks := num_looks(read)) <= fewest:
                    found, fewest = fewer, looks
        self._found[self._key("masks")] = found
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out warnings of transformers, such as that a mask is missing: it is meant to be."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _both(first: torch.Tensor | None, second: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return two tensors that come together, or None."""
    assert (first is None) == (second is None), "documents are given for both sides or for none"
    return None if first is None or second is None else (first, second)


def _columns(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


# Masks


def _causal_masks(side: _Side, visible: MaskFunction, *, like: torch.Tensor) -> Any:
    """Write the mask of a decoder's self-attention; where layers differ, one for each kind of layer."""
    mask = _write(side, visible, like=like, num_keys=like.shape[1])
    window = window_of(side.body.config)
    if window is None:
        return mask

    def near(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # A window of a decoder counts the token itself; an encoder's counts the tokens on each side.
        return visible(row, head, query, key) & (query - key < window)

    near_mask = _write(side, near, like=like, num_keys=like.shape[1])
    return {"full_attention": mask, "sliding_attention": near_mask}


def _write(side: _Side, visible: MaskFunction, *, like: torch.Tensor, num_keys: int) -> Any:
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
