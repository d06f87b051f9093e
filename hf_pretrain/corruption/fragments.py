"""Noise that hides fragments of a text: T5's spans, UL2's mixture, prefix language modelling, and MASS.

A target holds the hidden fragments only, not the text. T5 and UL2 put a sentinel in the place of each hidden span, and the target
repeats the sentinel in front of the span. There is no closing sentinel: the collator's end token closes the target. A prefix
language model continues the text. MASS keeps the length of the text, and its decoder goes on from the token before the fragment.

Special tokens inside a text, such as the separator of two documents, are tokens like any others here. All counts round as
`numpy.rint`, `tf.round` and Python's `round` do: a half goes to the even number. A text of one token is hidden whole, so that all
texts but empty ones have a target; only i.i.d. spans may leave a text as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hf_pretrain.corruption.selection import Selection, to_uniforms
from hf_pretrain.corruption.sentinels import below, check_sentinels, hide_spans, rotate_mask, span_mask, take_where
from hf_pretrain.corruption.texts import Noise, NoisedTexts, Texts, lay_out
from hf_pretrain.errors import InputError, check_choice, check_range

MODE_TOKENS = {"R": "[NLU]", "X": "[NLG]", "S": "[S2S]"}
"""The token that begins an input of UL2, by the mode of its denoiser."""

_HALF = np.uint64(32)
_LOW_HALF = np.uint64((1 << 32) - 1)
# Sentinels suffice for i.i.d. spans if there are as many as the mean number of spans and this many standard deviations.
_MOST_DEVIATIONS = 6.0


def span_counts(
    lengths: int | np.ndarray, *, density: float | np.ndarray, mean_length: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens of texts are hidden, and in how many spans.

    `round(n * density)` tokens are hidden, at least 1 and at most `n - 1`. They lie in `round(hidden / mean_length)` spans, at
    least 1 and at most as many as there are kept tokens. A text of one token is hidden whole.

    Args:
        lengths: Tokens of each text, an integer or an array of them.
        density: Share of hidden tokens, in (0, 1), one for all or one a text.
        mean_length: Mean tokens of a span, at least 1, one for all or one a text; infinite for a single span.

    Returns:
        Hidden tokens and spans of each text, int64.

    Source:
        `random_spans_noise_mask` of google-research/text-to-text-transfer-transformer, which keeps a text of one token.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    num_hidden = np.maximum(np.rint(lengths * density).astype(np.int64), 1)
    num_hidden = np.minimum(np.minimum(num_hidden, np.maximum(lengths - 1, 1)), lengths)
    num_spans = np.maximum(np.rint(num_hidden / mean_length).astype(np.int64), 1)
    return num_hidden, np.minimum(np.minimum(num_spans, np.maximum(lengths - num_hidden, 1)), num_hidden)


def sentinels_needed(length: int, *, density: float, mean_length: float, random_roll: bool = False) -> int:
    """Return the most sentinels that a text of up to `length` tokens needs.

    A rotation may cut one span in two, where it has two tokens.

    Args:
        length: Tokens of the text.
        density: Share of hidden tokens.
        mean_length: Mean tokens of a span.
        random_roll: Whether the spans are rotated.
    """
    num_hidden, num_spans = span_counts(length, density=density, mean_length=mean_length)
    return int(num_spans + (random_roll & (num_hidden > num_spans)))


def pair_lengths(length: int, *, density: float, mean_length: float, random_roll: bool = False) -> tuple[int, int]:
    """Return the most tokens that input and target of a text of up to `length` tokens have, without special ones around them."""
    num_hidden = int(span_counts(length, density=density, mean_length=mean_length)[0])
    num_sentinels = sentinels_needed(length, density=density, mean_length=mean_length, random_roll=random_roll)
    return length - num_hidden + num_sentinels, num_hidden + num_sentinels


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Noise):
    """T5's noise: a sentinel replaces each span, and the target lists the spans.

    With `choice="random"`, the number of hidden tokens and that of spans follow from the length of the text (`span_counts`), and
    `span_mask` lays them; every text ends with a hidden token unless `random_roll` rotates the spans. With `choice="iid"`, each
    token is hidden by itself, and hidden tokens that touch are one span: a text may have no target.

    Attributes:
        sentinels: `[S]` int64, the ids of the sentinels in order.
        density: Share of hidden tokens.
        mean_length: Mean tokens of a span; "iid" does not read it.
        choice: "random" or "iid".
        random_roll: Whether the spans of a text are rotated by a uniform offset. Runs are read as they lie then: a span that the
            end of the text cuts is two.

    Raises:
        InputError: If a value is out of range, or a text needs more sentinels than there are.

    Source:
        T5 (Raffel et al. 2020, sections 3.1.4 and 3.3); google-research/text-to-text-transfer-transformer, `preprocessors.py`.
    """

    sentinels: np.ndarray
    density: float = 0.15
    mean_length: float = 3.0
    choice: str = "random"
    random_roll: bool = False

    def __post_init__(self) -> None:
        check_range(self.density, "(0, 1)", name="density")
        check_range(self.mean_length, "[1, inf)", name="mean_length")
        check_choice(self.choice, ("random", "iid"), name="choice")
        if self.random_roll and self.choice == "iid":
            raise InputError("random_roll=True has no effect with choice='iid': leave it out, or use choice='random'")

    def __call__(self, texts: Texts) -> NoisedTexts:
        """Return the pairs of some texts."""
        lengths = texts.lengths
        if self.choice == "iid":
            mask = (to_uniforms(texts.bits("span_tokens")) < self.density) & texts.valid
        else:
            num_hidden, num_spans = span_counts(lengths, density=self.density, mean_length=self.mean_length)
            mask = span_mask(texts, num_hidden=num_hidden, num_spans=num_spans)
            if self.random_roll:
                mask = rotate_mask(mask, lengths=lengths, bits=texts.text_bits("span_roll"))
        num_runs = np.count_nonzero(Selection.merged(mask).unit_starts, axis=1)
        if num_runs.size:
            row = int(num_runs.argmax())
            self._check(int(num_runs[row]), length=int(lengths[row]))
        return hide_spans(texts, mask=mask, sentinels=self.sentinels)

    def check_length(self, length: int) -> None:
        """Refuse texts of up to `length` tokens, before there are any, if they may need more sentinels than there are.

        The number of i.i.d. spans has no bound but half of the tokens; there it is enough if hardly any text needs more.
        """
        if self.choice == "iid":
            hidden_and_kept = self.density * (1 - self.density)
            deviation = math.sqrt(length * hidden_and_kept * max(1 - 3 * hidden_and_kept, 0))
            likely = self.density + length * hidden_and_kept + _MOST_DEVIATIONS * deviation
            self._check(min(math.ceil(likely), (length + 1) // 2), length=length)
        else:
            needed = sentinels_needed(
                length, density=self.density, mean_length=self.mean_length, random_roll=self.random_roll
            )
            self._check(needed, length=length)

    def longest_pair(self, length: int) -> tuple[int, int]:
        """Return the most tokens of input and target that texts of up to `length` tokens have, without the frame around them."""
        if self.choice == "iid":
            return length, length + 1 if length else 0
        return pair_lengths(length, density=self.density, mean_length=self.mean_length, random_roll=self.random_roll)

    def _check(self, needed: int, *, length: int) -> None:
        spans = f"density={self.density:g}"
        spans += " and choice='iid'" if self.choice == "iid" else f" and mean_length={self.mean_length:g}"
        check_sentinels(len(self.sentinels), needed, length=length, spans=spans)


@dataclass(frozen=True)
class Denoiser:
    """One of UL2's ways to hide spans.

    Attributes:
        mode: "R" (regular), "X" (extreme) or "S" (sequential).
        density: Share of hidden tokens.
        mean_length: Mean tokens of a span; infinite for "S", whose one span ends the text.
    """

    mode: str
    density: float
    mean_length: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Denoiser:
        """Read a denoiser as options write it.

        Args:
            text: Mode, mean length and density, such as "R:3:0.15"; for "S" mode and density, such as "S:0.25".

        Returns:
            The denoiser.

        Raises:
            InputError: Naming the text and the right form.
        """
        mode, *numbers = str(text).split(":")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        if mode not in MODE_TOKENS or len(values) != (1 if mode == "S" else 2):
            raise InputError(
                f"denoisers: {text!r} must be R or X, mean length and share of hidden tokens, such as R:3:0.15, "
                "or S and share, such as S:0.25"
            )
        check_range(values[-1], "(0, 1)", name=f"denoisers: share of hidden tokens in {text!r}")
        if len(values) > 1:
            check_range(values[0], "[1, inf)", name=f"denoisers: mean length in {text!r}")
        return cls(mode, values[-1], values[0] if len(values) > 1 else math.inf)

    @property
    def name(self) -> str:
        """Its name in metrics, such as "r_3_15"; "s_25" for "S:0.25"."""
        mean = "" if math.isinf(self.mean_length) else f"_{self.mean_length:g}"
        return f"{self.mode.lower()}{mean}_{100 * self.density:g}".replace(".", "_")

    def __str__(self) -> str:
        """Return it as options write it."""
        mean = "" if math.isinf(self.mean_length) else f":{self.mean_length:g}"
        return f"{self.mode}{mean}:{self.density:g}"


@dataclass(frozen=True, kw_only=True)
class UL2Noise(Noise):
    """UL2's mixture of denoisers: each text gets one of them, and its input begins with the mode token of that one.

    "R" and "X" hide spans as T5 does. "S" hides one span of `round(density * n)` tokens at the end: prefix language modelling,
    where the input ends with the first sentinel and the target begins with it. The input of an empty text is its mode token.

    Attributes:
        kinds: Names of the denoisers, each once; the caller leaves them out.
        denoisers: The denoisers, alike in frequency; one that is given twice is twice as frequent.
        sentinels: `[S]` int64, the ids of the sentinels in order.
        mode_ids: Id of the token of each mode in `MODE_TOKENS` that a denoiser has.

    Raises:
        InputError: If a mode has no id, or a text needs more sentinels than there are.

    Source:
        UL2 (Tay et al. 2022, section 3.1 and table 1).
    """

    denoisers: tuple[Denoiser, ...]
    sentinels: np.ndarray
    mode_ids: Mapping[str, int]

    def __post_init__(self) -> None:
        if not self.denoisers:
            raise InputError("denoisers=[] must name at least one, such as R:3:0.15 or S:0.25")
        for denoiser in self.denoisers:
            if self.mode_ids.get(denoiser.mode) is None:
                raise InputError(
                    f"mode_ids has no id for {denoiser.mode!r}, the mode of {denoiser}: "
                    f"add {MODE_TOKENS[denoiser.mode]} to the tokenizer"
                )
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(denoiser.name for denoiser in self.denoisers)))

    def __call__(self, texts: Texts) -> NoisedTexts:
        """Return the pairs of some texts."""
        lengths = texts.lengths
        drawn = below(texts.text_bits("denoiser"), len(self.denoisers))
        density = np.array([denoiser.density for denoiser in self.denoisers])[drawn]
        mean_length = np.array([denoiser.mean_length for denoiser in self.denoisers])[drawn]
        num_hidden, num_spans = span_counts(lengths, density=density, mean_length=mean_length)
        if num_spans.size:
            row = int(num_spans.argmax())
            self._check(int(num_spans[row]), length=int(lengths[row]), denoiser=self.denoisers[drawn[row]])
        mask = span_mask(texts, num_hidden=num_hidden, num_spans=num_spans)
        pairs = hide_spans(texts, mask=mask, sentinels=self.sentinels)
        modes = np.array([self.mode_ids[denoiser.mode] for denoiser in self.denoisers], dtype=np.int64)[drawn]
        kinds = np.array([self.kinds.index(denoiser.name) for denoiser in self.denoisers])[drawn]
        return replace(
            pairs,
            input_ids=np.concatenate([modes[:, None], pairs.input_ids], axis=1),
            input_valid=np.concatenate([np.ones((len(modes), 1), dtype=np.bool_), pairs.input_valid], axis=1),
            kinds=kinds,
        )

    def check_length(self, length: int) -> None:
        """Refuse texts of up to `length` tokens, before there are any, if they may need more sentinels than there are."""
        for denoiser in self.denoisers:
            needed = sentinels_needed(length, density=denoiser.density, mean_length=denoiser.mean_length)
            self._check(needed, length=length, denoiser=denoiser)

    def longest_pair(self, length: int) -> tuple[int, int]:
        """Return the most tokens of input and target that texts of up to `length` tokens have, without the frame around them."""
        pairs = [pair_lengths(length, density=d.density, mean_length=d.mean_length) for d in self.denoisers]
        return 1 + max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)

    def _check(self, needed: int, *, length: int, denoiser: Denoiser) -> None:
        check_sentinels(len(self.sentinels), needed, length=length, spans=f"the denoiser {denoiser}")


@dataclass(frozen=True, kw_only=True)
class PrefixLM(Noise):
    """Prefix language modelling: the input is the head of a text, the target its tail.

    Attributes:
        share: Share of the tokens that the tail has: `round(share * n)`, at least 1 and at most `n - 1`. None for a tail of 1 to
            `n - 1` tokens, all alike. The tail of a text of one token is that token, and its input is empty.

    Raises:
        InputError: If the share is out of range.

    Source:
        T5 (Raffel et al. 2020, section 3.3.1): the border is drawn anew for each text.
    """

    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None:
            check_range(self.share, "(0, 1)", name="share", hint="leave it out for a uniform border")

    def __call__(self, texts: Texts) -> NoisedTexts:
        """Return the pairs of some texts."""
        lengths, width = texts.lengths, texts.valid.shape[1]
        sizes = _fragment_sizes(lengths, share=self.share, bits=texts.text_bits("prefix"))
        is_head = np.arange(width) < (lengths - sizes)[:, None]
        input_ids, input_valid = take_where(texts.input_ids, is_head)
        targets, target_valid = take_where(texts.input_ids, texts.valid & ~is_head)
        kinds = np.zeros(len(lengths), dtype=np.int64)
        return NoisedTexts(input_ids, input_valid, targets, target_valid, target_valid.copy(), kinds)

    def longest_pair(self, length: int) -> tuple[int, int]:
        """Return the most tokens of input and target that texts of up to `length` tokens have, without the frame around them."""
        if self.share is None:
            return max(length - 1, 0), max(length - 1, min(length, 1))
        size = int(_fragment_sizes(np.array([length]), share=self.share)[0])
        return length - size, size


@dataclass(frozen=True, kw_only=True)
class MassNoise(Noise):
    """MASS: the encoder reads a text with one fragment masked, the decoder writes the fragment.

    The fragment begins at the second token in 20 % of the texts, ends the text in 20 %, and begins anywhere behind the first
    token in 60 %. The first token is never hidden: the decoder goes on from a real token. In the input, 80 % of the fragment's
    tokens become the mask token, 10 % a random ordinary one, and 10 % stay. A special token is masked where another would become
    random. A target that the input shows is not called hidden.

    A text of one token is a fragment with `starts` 0: the token in front of it is what the collator puts around a text, or the
    decoder's first token. No end of a fragment is learned.

    Attributes:
        mask_token_id: Id of the mask token.
        random_ids: `[N]` int64, the ids from which random tokens are drawn: no special token among them.
        share: Share of the tokens that the fragment has: `round(share * n)`, at least 1 and at most `n - 1`.

    Raises:
        InputError: If the share is out of range, or there is nothing to draw random tokens from.

    Source:
        MASS (Song et al. 2019, section 3.2); the rule of MASS-unsupNMT in microsoft/MASS.
    """

    ends_target: bool = False
    mask_token_id: int
    random_ids: np.ndarray
    share: float = 0.5

    def __post_init__(self) -> None:
        check_range(self.share, "(0, 1)", name="share", hint="0.5 is the paper's")
        if not len(self.random_ids):
            raise InputError("random_ids=[] must hold ids of ordinary tokens: train or load a vocabulary")

    def __call__(self, texts: Texts) -> NoisedTexts:
        """Return the pairs of some texts."""
        lengths, (num_rows, width) = texts.lengths, texts.valid.shape
        sizes = _fragment_sizes(lengths, share=self.share)
        starts = _fragment_starts(texts.text_bits("fragment"), lengths=lengths, sizes=sizes)
        columns = np.arange(width)
        mask = (columns >= starts[:, None]) & (columns < (starts + sizes)[:, None])
        originals, draws = texts.input_ids[mask], texts.bits("fragment_tokens")[mask]
        decisions = (draws >> _HALF) * 2.0**-32
        choices = ((draws & _LOW_HALF) * np.uint64(len(self.random_ids))) >> _HALF
        is_random = (decisions >= 0.8) & (decisions < 0.9)
        is_masked = (decisions < 0.8) | (is_random & texts.is_special[mask])
        shown = np.where(is_random, self.random_ids[choices.astype(np.int64)], originals)
        shown[is_masked] = self.mask_token_id
        input_ids = texts.input_ids.copy()
        input_ids[mask] = shown
        rows = np.repeat(np.arange(num_rows), sizes)
        targets, target_valid = lay_out(rows, originals, num_rows=num_rows)
        is_hidden = np.zeros(targets.shape, dtype=np.bool_)
        is_hidden[target_valid] = shown != originals
        kinds = np.zeros(num_rows, dtype=np.int64)
        return NoisedTexts(input_ids, texts.valid, targets, target_valid, is_hidden, kinds, starts=starts)

    def longest_pair(self, length: int) -> tuple[int, int]:
        """Return the most tokens of input and target that texts of up to `length` tokens have, without the frame around them."""
        return length, int(_fragment_sizes(np.array([length]), share=self.share)[0])


def _fragment_sizes(lengths: np.ndarray, *, share: float | None, bits: np.ndarray | None = None) -> np.ndarray:
    """Return the tokens of a fragment of each text, `[P]` int64: a share of them, or, if None, uniform by the bits `[P]`."""
    most = np.maximum(lengths - 1, np.minimum(lengths, 1))
    if share is None:
        assert bits is not None, "a uniform size needs bits"
        return np.minimum(below(bits, most) + 1, most)
    return np.minimum(np.maximum(np.rint(share * lengths).astype(np.int64), 1), most)


def _fragment_starts(bits: np.ndarray, *, lengths: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return where the fragments of MASS start, `[P]` int64: 20 % at 1, 20 % as late as can be, 60 % uniform from 1 on."""
    latest = lengths - sizes
    earliest = np.minimum(latest, 1)
    decisions = (bits & _LOW_HALF) * 2.0**-32
    uniform = np.minimum(earliest + below(bits, latest), latest)
    return np.where(decisions < 0.2, earliest, np.where(decisions < 0.4, latest, uniform))
