"""Texts that are noised each by itself, and the pairs of input and target that noise makes of them.

An example holds special tokens around one text, or around several that are kept apart. Noise sees the texts alone, one a row;
the collator puts the special tokens around its results. Nothing here depends on the batch: a draw is keyed by the example and the
position in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_pretrain.corruption.rows import RowKeys


@dataclass(frozen=True)
class Texts:
    """The texts of a batch, left-aligned, one a row.

    Attributes:
        input_ids: `[P, W]` int64, without the special tokens around a text.
        valid: `[P, W]` bool, False at padding; a text may have no tokens.
        word_starts: `[P, W]` bool, where a word begins; the first token always begins one, and a special token is one by
            itself. True at each token if the noise needs no words.
        sent_starts: `[P, W]` bool, where a sentence begins; the first token always begins one. None if the noise needs none.
        is_special: `[P, W]` bool, special tokens inside a text, such as the separator of two documents.
        rows: `[P]` int64, the example that a text is of, ascending.
        offsets: `[P]` int64, position of its first token in the example.
        keys: Keys of the draws of the examples.
    """

    input_ids: np.ndarray
    valid: np.ndarray
    word_starts: np.ndarray
    sent_starts: np.ndarray | None
    is_special: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    keys: RowKeys

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, `[P]` int64."""
        return np.count_nonzero(self.valid, axis=1)

    def bits(self, stream: str) -> np.ndarray:
        """Return 64 random bits a position, `uint64` `[P, W]`; those of a text do not depend on the other texts."""
        width = self.valid.shape[1]
        longest = int(self.offsets.max(initial=0)) + width
        bits = self.keys.bits(stream, length=longest)
        if len(self.rows) == len(bits) and not self.offsets.any():
            return bits
        return bits[self.rows[:, None], self.offsets[:, None] + np.arange(width)]

    def text_bits(self, stream: str) -> np.ndarray:
        """Return 64 random bits a text, `uint64` `[P]`."""
        bits = self.keys.bits(stream, length=int(self.offsets.max(initial=0)) + 1)
        return bits[self.rows, self.offsets]


@dataclass(frozen=True)
class NoisedTexts:
    """The pairs of input and target of some texts, left-aligned, without the special tokens around them.

    Attributes:
        input_ids: `[P, I]` int64, what the encoder reads.
        input_valid: `[P, I]` bool.
        targets: `[P, T]` int64, what the decoder writes.
        target_valid: `[P, T]` bool.
        is_hidden: `[P, T]` bool, the targets that the input does not show, True or False at each valid one.
        kinds: `[P]` int64, which of the `kinds` of the noise made a pair.
        starts: `[P]` int64, position in the text of the first target of a fragment; None if a target is read from its beginning.
    """

    input_ids: np.ndarray
    input_valid: np.ndarray
    targets: np.ndarray
    target_valid: np.ndarray
    is_hidden: np.ndarray
    kinds: np.ndarray
    starts: np.ndarray | None = None


@dataclass(frozen=True)
class Noise:
    """How pairs are made of texts; a subclass is called with [`Texts`] and returns [`NoisedTexts`].

    Attributes:
        kinds: Names of the kinds of pairs that it makes, for the metrics.
        needs_words: Whether it reads `word_starts`.
        needs_sentences: Whether it reads `sent_starts`.
        has_whole_target: Whether a target is a whole text, with the special tokens in front of it; otherwise a target begins with
            the first token of the decoder.
        ends_target: Whether the decoder learns to end a target.
    """

    kinds: tuple[str, ...] = ("denoising",)
    needs_words: bool = False
    needs_sentences: bool = False
    has_whole_target: bool = False
    ends_target: bool = True

    def __call__(self, texts: Texts) -> NoisedTexts:
        """Return the pairs of some texts."""
        raise AssertionError("a subclass of Noise makes the pairs")


def lay_out(rows: np.ndarray, values: np.ndarray, *, num_rows: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lay values out in left-aligned rows.

    Args:
        rows: `[N]` int64, the row of each value; ascending.
        values: `[N]`.
        num_rows: Rows, of which some may get no value.
        fill: Value at padding.

    Returns:
        The values `[num_rows, W]` in the type of `values`, W at least 1, and where they are, bool of the same shape.
    """
    lengths = np.bincount(rows, minlength=num_rows)
    width = max(int(lengths.max(initial=0)), 1)
    valid = np.arange(width) < lengths[:, None]
    laid = np.full(valid.shape, fill, dtype=values.dtype)
    laid[valid] = values
    return laid, valid
