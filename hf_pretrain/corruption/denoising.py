"""The five noises of BART, one after the other on one list of tokens.

Each token carries its position in the untouched text, and a mask has none. So the draw of a word does not depend on the
noises before, a mask is never selected again, and a target is hidden if no token of its position is left.

`_Tokens` is that list. Masking and deletion choose words, infilling places spans in slots, and `_replace` carries out all three;
sentence permutation and rotation only reorder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hf_pretrain.corruption.selection import order_keys, partition_words, sorted_positions, take_smallest, to_uniforms
from hf_pretrain.corruption.spans import draw_lengths
from hf_pretrain.corruption.texts import Noise, NoisedTexts, Texts, lay_out
from hf_pretrain.errors import InputError, check_choice, check_range

BART_STEPS = ("sentence_permutation", "token_masking", "token_deletion", "infilling", "rotation")
"""The noises of BART, in the order in which its code applies them."""

LONGEST_SPAN = 128
"""Most words of a span that infilling draws."""

# More empty spans than fit into any text.
_MANY = 1 << 24


@dataclass(frozen=True, kw_only=True)
class BartNoise(Noise):
    """The noises of BART; the target is always the untouched text.

    Each noise works on the result of the one before. Words are those of `word_starts`. Special tokens and masks are no words:
    they are never masked or deleted, and no span covers them. A share of words is rounded up.

    - "token_masking" replaces whole words by one mask each. "token_deletion" removes whole words.
    - "infilling" replaces spans of words by one mask each. Lengths are drawn from a Poisson distribution until their sum reaches
      the share of words; the last one is cut to meet it. Spans do not touch, and every such layout is as likely. If a text has
      no room for that, some spans are joined. An empty span puts a mask between two words that stay; it is left out if there is
      no such place, or no room in `longest_input`. A special token or an earlier mask divides a span, and each part gets a mask.
    - "sentence_permutation" permutes sentences of a text among themselves. Every order is as likely, the old one too. A special
      token belongs to the sentence before it, and moves along.
    - "rotation" makes a text begin with one of its other tokens, each as likely, and puts the tokens before it at the end.

    Attributes:
        steps: Names of noises from `BART_STEPS`, in the order in which they are applied, each at most once.
        mask_token_id: Id of the mask.
        token_masking_probability: Share of the words of a text that are masked.
        token_deletion_probability: Share of the words of a text that are deleted.
        infilling_probability: Share of the words of a text that lie in spans.
        infilling_mean_length: Mean of the Poisson distribution, in words.
        sentence_permutation_probability: Share of the sentences of a text that are permuted, rounded up.
        rotation_probability: Share of the texts that are rotated.
        longest_input: Most tokens of an input, at least those of a text; None for no limit.

    Raises:
        InputError: If a step is unknown or comes twice, or a number is out of range.

    Source:
        BART (Lewis et al. 2020, section 2.2). The paper counts tokens; whole words, shares rounded up, and the cut of the last
        span are those of `DenoisingDataset` of fairseq. Its spans may overlap, so they cover fewer words than the share; its
        sentences end only at the token "."; its empty spans may lie inside a word; and its rotation may change nothing.
    """

    steps: Sequence[str]
    mask_token_id: int
    token_masking_probability: float = 0.15
    token_deletion_probability: float = 0.15
    infilling_probability: float = 0.3
    infilling_mean_length: float = 3.0
    sentence_permutation_probability: float = 1.0
    rotation_probability: float = 1.0
    longest_input: int | None = None
    kinds: tuple[str, ...] = field(default=("denoising",), init=False)
    needs_words: bool = field(default=False, init=False)
    needs_sentences: bool = field(default=False, init=False)
    has_whole_target: bool = field(default=True, init=False)
    ends_target: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        """Check the options."""
        for number, step in enumerate(self.steps):
            check_choice(step, BART_STEPS, name="noise_steps")
            if step in self.steps[:number]:
                raise InputError(f"noise_steps={list(self.steps)!r} has {step!r} twice: give each noise once")
        for step in BART_STEPS:
            check_range(getattr(self, f"{step}_probability"), "[0, 1]", name=f"{step}_probability")
        check_range(
            self.infilling_mean_length, f"(0, {LONGEST_SPAN}]", name="infilling_mean_length", hint="3 is usual"
        )
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(
            self, "needs_words", not {"token_masking", "token_deletion", "infilling"}.isdisjoint(self.steps)
        )
        object.__setattr__(self, "needs_sentences", "sentence_permutation" in self.steps)

    def __call__(self, texts: Texts) -> NoisedTexts:
        """Return the pairs of some texts.

        Args:
            texts: The texts; `sent_starts` is read by sentence permutation alone.

        Returns:
            The pairs. A target is hidden if its token was masked, deleted or covered by a span.
        """
        tokens = _Tokens.of(texts, with_sentences=self.needs_sentences)
        apply = {
            "sentence_permutation": self._permute,
            "token_masking": self._mask,
            "token_deletion": self._delete,
            "infilling": self._infill,
            "rotation": self._rotate,
        }
        for step in self.steps:
            if tokens.rows.size:
                tokens = apply[step](tokens, texts)
        is_mask = tokens.origins < 0
        ids = np.where(is_mask, np.int64(self.mask_token_id), texts.input_ids.ravel()[tokens.origins])
        input_ids, input_valid = lay_out(tokens.rows, ids, num_rows=len(texts.rows))
        is_hidden = texts.valid.copy()
        is_hidden.ravel()[tokens.origins[~is_mask]] = False
        return NoisedTexts(
            input_ids=input_ids,
            input_valid=input_valid,
            targets=texts.input_ids,
            target_valid=texts.valid,
            is_hidden=is_hidden,
            kinds=np.zeros(len(texts.rows), dtype=np.int64),
        )

    def _mask(self, tokens: _Tokens, texts: Texts) -> _Tokens:
        words = _Words.of(tokens, num_rows=len(texts.rows))
        chosen = words.choose(texts.bits("bart_token_masking"), probability=self.token_masking_probability)
        return _replace(tokens, words, hidden=chosen, masked=chosen)

    def _delete(self, tokens: _Tokens, texts: Texts) -> _Tokens:
        words = _Words.of(tokens, num_rows=len(texts.rows))
        chosen = words.choose(texts.bits("bart_token_deletion"), probability=self.token_deletion_probability)
        return _replace(tokens, words, hidden=chosen, masked=np.zeros_like(chosen))

    def _infill(self, tokens: _Tokens, texts: Texts) -> _Tokens:
        words = _Words.of(tokens, num_rows=len(texts.rows))
        budgets = _share_of(words.counts, self.infilling_probability)
        most = int(budgets.max())
        if not most:
            return tokens
        lengths, empty = draw_spans(
            texts.bits("bart_infilling_lengths")[:, :most],
            texts.bits("bart_infilling_empty")[:, :most],
            mean=self.infilling_mean_length,
        )
        lengths = np.diff(np.minimum(np.cumsum(lengths, axis=1), budgets[:, None]), axis=1, prepend=0)
        # The draws end with the span that reaches the budget.
        num_empty = (empty * (lengths > 0)).sum(axis=1)
        if self.longest_input is not None:
            # A word has a token or more, and a special token divides one span at most.
            masks = np.count_nonzero(lengths, axis=1) + np.count_nonzero(texts.is_special, axis=1)
            room = self.longest_input - texts.lengths + budgets - masks
            num_empty = np.minimum(num_empty, np.maximum(room, 0))
        hidden, masked, follows = _lay_spans(
            texts.bits("bart_infilling_slots"), words=words, lengths=lengths, num_empty=num_empty
        )
        return _replace(tokens, words, hidden=hidden, masked=masked, follows=follows)

    def _permute(self, tokens: _Tokens, texts: Texts) -> _Tokens:
        assert tokens.sent_starts is not None, "sentence permutation needs the sentences of the texts"
        num_rows = len(texts.rows)
        firsts = np.flatnonzero(tokens.sent_starts)
        sizes = np.diff(firsts, append=len(tokens.rows))
        rows = tokens.rows[firsts]
        counts = np.bincount(rows, minlength=num_rows)
        numbers = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        # One more sentence than tokens is possible, behind a rotation; it shares a draw rather than take one of the next text.
        drawn = np.minimum(numbers, np.maximum(texts.lengths[rows] - 1, 0))
        bits, exists = lay_out(rows, texts.bits("bart_sentence_permutation")[rows, drawn], num_rows=num_rows)
        keys = order_keys(bits, candidates=exists)
        num_moved = _share_of(counts, self.sentence_permutation_probability)
        # The order of the smallest keys is uniform whichever sentences have them: it fills their positions from left to right.
        order = np.tile(np.arange(keys.shape[1]), (num_rows, 1))
        is_first = np.arange(keys.shape[1]) < num_moved[:, None]
        order[take_smallest(keys, counts=num_moved)] = sorted_positions(keys)[is_first]
        order += (np.cumsum(counts) - counts)[:, None]
        return tokens.take(_ranges(firsts, sizes, order=order[exists]))

    def _rotate(self, tokens: _Tokens, texts: Texts) -> _Tokens:
        sizes = np.bincount(tokens.rows, minlength=len(texts.rows))
        offsets = 1 + np.floor(to_uniforms(texts.text_bits("bart_rotation_offset")) * (sizes - 1)).astype(np.int64)
        is_rotated = to_uniforms(texts.text_bits("bart_rotation")) < self.rotation_probability
        offsets = np.where(is_rotated & (sizes > 1), offsets, 0)
        firsts = np.cumsum(sizes) - sizes
        pieces = np.column_stack([firsts + offsets, firsts]).ravel()
        rotated = tokens.take(_ranges(pieces, np.column_stack([sizes - offsets, offsets]).ravel()))
        # The cut may lie inside a word; then both pieces are words.
        for starts in (rotated.word_starts, rotated.sent_starts):
            if starts is not None:
                starts[firsts[sizes > 0]] = True
        return rotated


def poisson_shares(mean: float) -> np.ndarray:
    """Return the probabilities of 0 to `LONGEST_SPAN` words in a span: `[LONGEST_SPAN + 1]` float64.

    Args:
        mean: Mean of the Poisson distribution, of which longer spans are dropped.

    Returns:
        The probabilities; their sum is 1.

    Source:
        BART (Lewis et al. 2020, section 2.2); the limit is that of fairseq.
    """
    sizes = np.arange(LONGEST_SPAN + 1)
    logs = sizes * np.log(mean) - np.cumsum(np.log(np.maximum(sizes, 1)))
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def draw_spans(length_bits: np.ndarray, empty_bits: np.ndarray, *, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw spans from a Poisson distribution, those with words one by one, and how many empty ones came before each.

    The result has the distribution of independent draws in a row. A budget of n words needs n entries at most, however small the
    mean is, because empty spans take none.

    Args:
        length_bits: uint64, of any shape.
        empty_bits: uint64, of the same shape.
        mean: Mean of the distribution.

    Returns:
        Words of each span, from 1 to `LONGEST_SPAN`, and the number of empty spans drawn before it; int64 of the same shape.
    """
    shares = poisson_shares(mean)
    cumulative = np.cumsum(shares[1:])
    lengths = draw_lengths(to_uniforms(length_bits), cumulative=cumulative / cumulative[-1])
    # The number of empty spans is geometric: k or more with probability shares[0] ** k.
    rate = max(-np.log(shares[0]), 1e-16)
    empty = np.minimum(-np.log1p(-to_uniforms(empty_bits)) / rate, _MANY)
    return lengths, empty.astype(np.int64)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of some texts between two noises, text after text.

    Attributes:
        rows: `[N]` int64, the text of each token; ascending.
        origins: `[N]` int64, flat position `row * W + column` in the untouched texts, -1 at a mask.
        word_starts: `[N]` bool; True at the first token of each text.
        sent_starts: `[N]` bool, likewise; None if no noise needs them.
        is_special: `[N]` bool.
    """

    rows: np.ndarray
    origins: np.ndarray
    word_starts: np.ndarray
    sent_starts: np.ndarray | None
    is_special: np.ndarray

    @classmethod
    def of(cls, texts: Texts, *, with_sentences: bool) -> _Tokens:
        """Return the untouched tokens; a special token starts a sentence only where it is the first of a text."""
        origins = np.flatnonzero(texts.valid)
        rows, columns = np.divmod(origins, max(texts.valid.shape[1], 1))
        is_special = texts.is_special.ravel()[origins]
        word_starts = texts.word_starts.ravel()[origins] | (columns == 0)
        sent_starts = None
        if with_sentences and texts.sent_starts is not None:
            sent_starts = (texts.sent_starts.ravel()[origins] & ~is_special) | (columns == 0)
            word_starts |= sent_starts  # Otherwise a sentence that moves could join the last word of another.
        return cls(rows, origins, word_starts, sent_starts, is_special)

    def take(self, index: np.ndarray) -> _Tokens:
        """Return the tokens at `index`, in that order."""
        return _Tokens(
            rows=self.rows[index],
            origins=self.origins[index],
            word_starts=self.word_starts[index],
            sent_starts=None if self.sent_starts is None else self.sent_starts[index],
            is_special=self.is_special[index],
        )


@dataclass(frozen=True)
class _Words:
    """The words of some tokens that may be selected, in reading order.

    Attributes:
        firsts: `[M]` int64, index of the first token of each word.
        sizes: `[M]` int64, tokens of each word.
        rows: `[M]` int64, the text of each word.
        counts: `[P]` int64, words of each text.
        origins: `[M]` int64, flat position of its first token in the untouched texts.
        begins_run: `[M]` bool, whether a word follows a special token or a mask, or is the first of its text.
    """

    firsts: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    origins: np.ndarray
    begins_run: np.ndarray

    @classmethod
    def of(cls, tokens: _Tokens, *, num_rows: int) -> _Words:
        """Return the words of tokens, of which there is at least one."""
        table = partition_words(tokens.word_starts[None], maskable=((tokens.origins >= 0) & ~tokens.is_special)[None])
        firsts = table.bounds[:-1][table.is_candidate]
        sizes = table.sizes[table.is_candidate]
        rows = tokens.rows[firsts]
        begins_run = np.ones(len(firsts), dtype=np.bool_)
        begins_run[1:] = (firsts[1:] != (firsts + sizes)[:-1]) | (rows[1:] != rows[:-1])
        counts = np.bincount(rows, minlength=num_rows)
        return cls(firsts, sizes, rows, counts, tokens.origins[firsts], begins_run)

    def choose(self, bits: np.ndarray, *, probability: float) -> np.ndarray:
        """Choose a share of the words of each text by the bits at their origins, `[P, W]` uint64: `[M]` bool."""
        laid, exists = lay_out(self.rows, bits.ravel()[self.origins], num_rows=len(self.counts))
        keys = order_keys(laid, candidates=exists)
        return take_smallest(keys, counts=_share_of(self.counts, probability))[exists]


def _share_of(counts: np.ndarray, probability: float) -> np.ndarray:
    """Return `ceil(p * n)` for each number n; a product just above a whole number is one with an error."""
    return np.maximum(np.ceil(probability * counts - 1e-9), np.sign(probability * counts)).astype(np.int64)


def _ranges(firsts: np.ndarray, sizes: np.ndarray, *, order: np.ndarray | None = None) -> np.ndarray:
    """Return the indices of ranges one after the other, `[sizes.sum()]` int64; in the given order of the ranges, if any."""
    if order is not None:
        firsts, sizes = firsts[order], sizes[order]
    ends = np.cumsum(sizes)
    return np.repeat(firsts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)


def _lay_spans(
    bits: np.ndarray, *, words: _Words, lengths: np.ndarray, num_empty: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay the spans of each text out so that they do not touch.

    The words that stay leave slots: one in front of each, and one behind the last. Spans take slots in random order, so every
    layout is as likely. If there are more spans than slots, the slots are taken again in that order, and spans that share a slot
    are joined. Then empty spans take some of the slots that are left, in the same order.

    Args:
        bits: `[P, W]` uint64 random bits for the slots.
        words: The words of the texts.
        lengths: `[P, K]` int64, words of each span; 0 behind the last one.
        num_empty: `[P]` int64, empty spans of each text.

    Returns:
        Which words lie in spans, in the place of which a mask comes, and in front of which an empty span lies; `[M]` bool each.
    """
    slots = words.counts - lengths.sum(axis=1) + 1
    columns = np.arange(slots.max())
    keys = order_keys(bits[:, : len(columns)], candidates=columns < slots[:, None])
    taken = np.take_along_axis(sorted_positions(keys), np.arange(lengths.shape[1]) % slots[:, None], axis=1)
    taken += np.arange(len(slots))[:, None] * len(columns)
    sizes = (
        np.bincount(taken.ravel(), weights=lengths.ravel(), minlength=keys.size).astype(np.int64).reshape(keys.shape)
    )
    # In front of slot s are s words that stay, and the words of the spans before it.
    ends = np.cumsum(sizes, axis=1) + columns + (np.cumsum(words.counts) - words.counts)[:, None]
    spans = sizes > 0
    hidden, masked, follows = (np.zeros(len(words.firsts), dtype=np.bool_) for _ in range(3))
    masked[(ends - sizes)[spans]] = True
    hidden[_ranges((ends - sizes)[spans], sizes[spans])] = True
    is_open = ~spans & (columns < slots[:, None] - 1)
    is_open[is_open] = ~words.begins_run[ends[is_open]]
    num_empty = np.minimum(num_empty, np.count_nonzero(is_open, axis=1))
    follows[ends[take_smallest(order_keys(bits[:, : len(columns)], candidates=is_open), counts=num_empty)]] = True
    return hidden, hidden & (masked | words.begins_run), follows


def _replace(
    tokens: _Tokens, words: _Words, *, hidden: np.ndarray, masked: np.ndarray, follows: np.ndarray | None = None
) -> _Tokens:
    """Take words out and put masks in.

    A mask in the place of words belongs to the sentence of the first of them. A mask between two words belongs to the sentence of
    the word before.

    Args:
        tokens: The tokens.
        words: Their words.
        hidden: `[M]` bool, the words that go.
        masked: `[M]` bool, those of them in the place of which a mask comes.
        follows: `[M]` bool, words in front of which a mask is put in; None for none.

    Returns:
        The tokens that are left, and the masks.
    """
    copies = np.ones(len(tokens.rows), dtype=np.int64)
    copies[_ranges(words.firsts[hidden], words.sizes[hidden])] = 0
    replaced = words.firsts[masked]
    copies[replaced] = 1
    inserted = words.firsts[:0] if follows is None else words.firsts[follows]
    copies[inserted] += 1
    # A token with a mask in front of it is taken twice; the first of the two becomes the mask.
    source = np.repeat(np.arange(len(copies)), copies)
    at = np.cumsum(copies) - copies
    at_mask = np.concatenate([at[replaced], at[inserted]])
    result = tokens.take(source)
    result.origins[at_mask] = -1
    if tokens.sent_starts is None:
        return result
    sentences = np.cumsum(tokens.sent_starts)[source]
    sentences[at[inserted]] = sentences[at[inserted] - 1]
    return replace(result, sent_starts=np.diff(sentences, prepend=0) != 0)
