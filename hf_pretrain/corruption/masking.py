"""Masking of a batch: from rows and options to targets and corrupted ids.

`mask_rows` selects targets (`select_targets`) and replaces them (`replace_tokens`). `Vocabulary` holds what both need
of a tokenizer, as lookup tables over ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.corruption.rows import ExampleRows
from hf_pretrain.corruption.selection import (
    Selection,
    WordTable,
    partition_words,
    select_tokens,
    select_tokens_independently,
    select_words,
    select_words_independently,
    token_budgets,
)
from hf_pretrain.corruption.spans import (
    geometric_lengths,
    select_given,
    select_given_independently,
    select_ngrams,
    select_spans,
)
from hf_pretrain.errors import InputError

_HALF = np.uint64(32)
_LOW_HALF = np.uint64((1 << 32) - 1)


def special_table(tokenizer: Any) -> np.ndarray:
    """Return which ids of a tokenizer are special tokens, `[V]` bool."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special_ids = [*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)]
    special = np.zeros(1 + max(len(tokenizer) - 1, *tokenizer.get_vocab().values()), dtype=np.bool_)
    special[special_ids] = True
    return special


@dataclass(frozen=True)
class Vocabulary:
    """Lookup tables over token ids, built once for a tokenizer.

    Attributes:
        mask_id: Id of the mask token.
        protected: `[V]` bool, the ids that are never selected.
        ordinary_ids: `[N]` int64, the ids from which random replacements are drawn: no special token among them.
    """

    mask_id: int
    protected: np.ndarray
    ordinary_ids: np.ndarray

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, mask_unknown: bool = True) -> Vocabulary:
        """Read the tables from a tokenizer.

        Args:
            tokenizer: A transformers tokenizer with a mask token.
            mask_unknown: Whether the unknown token may be selected. As a random replacement it never comes.

        Returns:
            The tables.

        Raises:
            InputError: If the tokenizer has no mask token or no ordinary token.
        """
        if tokenizer.mask_token_id is None:
            raise InputError(
                f"tokenizer={type(tokenizer).__name__} has no mask token: "
                "add one with tokenizer.add_special_tokens({'mask_token': '[MASK]'}) and resize the embeddings"
            )
        special = special_table(tokenizer)
        ordinary_ids = np.flatnonzero(~special[: len(tokenizer)])
        if not ordinary_ids.size:
            raise InputError(
                f"tokenizer={type(tokenizer).__name__} has special tokens only: train or load a vocabulary"
            )
        protected = special.copy()
        if mask_unknown and tokenizer.unk_token_id is not None:
            # Some tokenizers let one token be both the unknown one and another: that one stays protected.
            others = (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
            protected[tokenizer.unk_token_id] = tokenizer.unk_token_id in others
        return cls(mask_id=tokenizer.mask_token_id, protected=protected, ordinary_ids=ordinary_ids)

    def is_protected(self, input_ids: np.ndarray) -> np.ndarray:
        """Return which tokens may never be selected.

        Args:
            input_ids: Integers of any shape.

        Returns:
            Bool of the same shape.

        Raises:
            InputError: If an id is not the tokenizer's.
        """
        try:
            return self.protected[input_ids]
        except IndexError:
            raise InputError(
                f"input_ids holds the id {input_ids.max()}, but the tokenizer ends at {len(self.protected) - 1}: "
                "prepare the data with this tokenizer"
            ) from None


def replace_tokens(
    input_ids: np.ndarray,
    *,
    positions: np.ndarray,
    deciders: np.ndarray,
    bits: np.ndarray,
    vocabulary: Vocabulary,
    mask_share: float,
    random_share: float,
) -> np.ndarray:
    """Replace the selected tokens by the mask token, by random tokens, or not at all.

    One draw of 64 bits a position serves both questions: its upper half decides, its lower half names the random
    token, uniform over the ordinary tokens. Tokens with one decider share the decision, but not the random token.

    Args:
        input_ids: `[B, L]` int64; left as it is.
        positions: `[T]` int64, flat indices of the selected tokens.
        deciders: `[T]` int64, flat indices of the positions whose draws decide for them.
        bits: `[B, L]` uint64 random bits.
        vocabulary: The mask token and the ordinary tokens.
        mask_share: Probability of the mask token.
        random_share: Probability of a random token.

    Returns:
        The corrupted ids, `[B, L]` int64.

    Source:
        BERT (Devlin et al. 2019, section 3.1); decisions a word in fairseq's RoBERTa; decisions a span in SpanBERT
        (Joshi et al. 2020, section 3.1).
    """
    flat_bits = bits.ravel()
    decisions = (flat_bits[deciders] >> _HALF) * 2.0**-32
    corrupted = input_ids.copy()
    flat_ids = corrupted.ravel()
    is_masked = decisions < mask_share
    flat_ids[positions[is_masked]] = vocabulary.mask_id
    randomised = positions[~is_masked & (decisions < mask_share + random_share)]
    num_ordinary = np.uint64(len(vocabulary.ordinary_ids))
    choice = ((flat_bits[randomised] & _LOW_HALF) * num_ordinary) >> _HALF
    flat_ids[randomised] = vocabulary.ordinary_ids[choice.view(np.int64)]
    return corrupted


@dataclass(frozen=True)
class MaskedRows:
    """Rows with masked tokens.

    Attributes:
        input_ids: `[B, L]` int64, corrupted.
        selection: Which positions are targets, and the units they form.
        positions: `[T]` int64, flat indices `row * L + column` of the targets, ascending.
    """

    input_ids: np.ndarray
    selection: Selection
    positions: np.ndarray


def needs_word_starts(arguments: MaskingArguments) -> bool:
    """Whether the examples must say where words start."""
    unit = arguments.ngram_unit if arguments.masking_unit == "ngram" else arguments.masking_unit
    return unit in ("word", "span") or arguments.replacement_unit == "word"


def mask_rows(
    rows: ExampleRows,
    *,
    arguments: MaskingArguments,
    vocabulary: Vocabulary,
    probability: float | np.ndarray | None = None,
) -> MaskedRows:
    """Mask tokens of a batch.

    Args:
        rows: The examples.
        arguments: The options of masking.
        vocabulary: Special and ordinary tokens.
        probability: Share of the tokens to select, one for all rows or `[B]`; `arguments.mlm_probability` by default.

    Returns:
        The masked rows. They depend on each row alone: neither padding nor the other rows change them. A word, an n-gram or a
        span lies in one isolated document, also where no special token parts it from the next.
    """
    maskable = rows.valid & ~vocabulary.is_protected(rows.input_ids)
    if rows.also_maskable is not None:
        maskable |= rows.also_maskable
    if rows.not_maskable is not None:
        maskable &= ~rows.not_maskable
    words = None
    if needs_word_starts(arguments):
        assert rows.word_starts is not None, "the rows were stacked without words"
        words = partition_words(rows.word_starts, maskable=maskable, borders=rows.document_starts())
    probability = float(arguments.mlm_probability) if probability is None else probability
    selection = select_targets(rows, maskable=maskable, words=words, arguments=arguments, probability=probability)
    borders = rows.document_starts()
    if borders is not None:
        # Units that touch at the border of two documents are two.
        selection = replace(selection, unit_starts=selection.unit_starts | (selection.mask & borders))
    positions = np.flatnonzero(selection.mask)
    input_ids = replace_tokens(
        rows.input_ids,
        positions=positions,
        deciders=_deciders(positions, selection=selection, words=words, unit=arguments.replacement_unit),
        bits=rows.bits("replace"),
        vocabulary=vocabulary,
        mask_share=arguments.mask_share,
        random_share=arguments.random_share,
    )
    return MaskedRows(input_ids=input_ids, selection=selection, positions=positions)


def select_targets(
    rows: ExampleRows,
    *,
    maskable: np.ndarray,
    words: WordTable | None,
    arguments: MaskingArguments,
    probability: float | np.ndarray,
) -> Selection:
    """Choose the targets of a batch by the unit that the options name.

    Args:
        rows: The examples.
        maskable: `[B, L]` bool, the candidates.
        words: The words, for the units that are made of words.
        arguments: The options of masking.
        probability: Share of the tokens to select, one for all rows or `[B]`.

    Returns:
        The selection.
    """
    unit = arguments.masking_unit
    if unit == "given":
        return _select_given(rows, maskable=maskable, count=arguments.masking_count, probability=probability)
    if unit == "ngram" and arguments.ngram_unit == "token":
        words = partition_words(np.ones_like(maskable), maskable=maskable, borders=rows.document_starts())
    bits = rows.bits("select")
    if arguments.masking_count == "bernoulli":
        if unit == "token":
            return select_tokens_independently(bits, maskable=maskable, probability=probability)
        assert words is not None, "this unit is made of words"
        return select_words_independently(bits, words=words, probability=probability)
    budgets = token_budgets(maskable, lengths=np.count_nonzero(rows.valid, axis=1), probability=probability)
    if unit == "token":
        return select_tokens(bits, maskable=maskable, budgets=budgets)
    assert words is not None, "this unit is made of words"
    if unit == "word":
        return select_words(bits, words=words, budgets=budgets)
    length_bits = rows.bits("length")
    if unit == "ngram":
        return select_ngrams(
            bits,
            length_bits,
            words=words,
            budgets=budgets,
            max_ngram=arguments.max_ngram,
            shares=arguments.ngram_shares,
        )
    lengths = geometric_lengths(
        arguments.span_geometric_p, longest=arguments.max_span_length, mode=arguments.span_length_mode
    )
    return select_spans(bits, length_bits, words=words, maskable=maskable, probability=probability, lengths=lengths)


def _select_given(
    rows: ExampleRows, *, maskable: np.ndarray, count: str, probability: float | np.ndarray
) -> Selection:
    assert rows.spans is not None, "the rows were stacked without spans"
    most = np.bincount(rows.spans[:, 0], minlength=1).max()
    bits = rows.keys.bits("select", length=int(most))
    spans = _in_one_document(rows, rows.spans)
    if count == "bernoulli":
        return select_given_independently(bits, spans=spans, maskable=maskable, probability=probability)
    budgets = token_budgets(maskable, lengths=np.count_nonzero(rows.valid, axis=1), probability=probability)
    return select_given(bits, spans=spans, maskable=maskable, budgets=budgets)


def _in_one_document(rows: ExampleRows, spans: np.ndarray) -> np.ndarray:
    """Return given spans, `[S, 3]`, without those that lie in several isolated documents."""
    if rows.document_ids is None:
        return spans
    row, start, end = spans.T
    return spans[rows.document_ids[row, start] == rows.document_ids[row, end - 1]]


def _deciders(positions: np.ndarray, *, selection: Selection, words: WordTable | None, unit: str) -> np.ndarray:
    """Return the flat position whose draw decides for each target: its own, or its word's or unit's first."""
    if unit == "token":
        return positions
    if unit == "word":
        assert words is not None, "decisions a word need words"
        return words.first_positions(positions)
    starts = selection.unit_starts.ravel()[positions]
    return positions[starts][np.cumsum(starts) - 1]
