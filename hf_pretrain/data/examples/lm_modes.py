"""Examples of the four attention modes of a unified language model, and causal examples, as views of other datasets."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np

from hf_pretrain.data.examples.epochs import EpochDataset, ExampleView
from hf_pretrain.errors import InputError, check_choice

NUM_MODE_TYPES = 6
"""Token types that tell modes and segments apart."""


class LMMode(IntEnum):
    """Who sees whom in a row: the values of `lm_mode`."""

    BIDIRECTIONAL = 0
    LEFT_TO_RIGHT = 1
    RIGHT_TO_LEFT = 2
    SEQUENCE_TO_SEQUENCE = 3

    @classmethod
    def of(cls, mode: LMMode | str) -> LMMode:
        """Return a mode by its name, such as "left_to_right".

        Raises:
            InputError: If there is none of that name.
        """
        if isinstance(mode, cls):
            return mode
        check_choice(mode, [known.name.lower() for known in cls], name="mode")
        return cls[str(mode).upper()]


# By the value of the mode.
_FIRST_TYPES = (0, 2, 3, 4)


def mode_token_types(mode: LMMode, segments: np.ndarray, *, type_vocab_size: int) -> np.ndarray | None:
    """Return the token types by which a model tells the mode and the segment of a token.

    With six types or more: 0 and 1 for the segments of a bidirectional example, 2 left to right, 3 right to left, 4 and 5 for
    source and target. A model with two to five types has these modulo 2: the segments stay apart, and the directions
    differ. One with fewer types has none.

    Args:
        mode: The mode.
        segments: ``[n]`` of 0 and 1. A row of one direction is one segment, whatever they are.
        type_vocab_size: Token types of the model.

    Returns:
        ``int64 [n]``, or None.

    Source:
        UniLM (Dong et al. 2019).
    """
    if type_vocab_size < 2:
        return None
    has_segments = mode in (LMMode.BIDIRECTIONAL, LMMode.SEQUENCE_TO_SEQUENCE)
    types = _FIRST_TYPES[mode] + np.asarray(segments, dtype=np.int64) * has_segments
    return types if type_vocab_size >= NUM_MODE_TYPES else types % 2


def stop_candidates(valid: np.ndarray, *, lm_modes: np.ndarray) -> np.ndarray:
    """Mark the special tokens that may be selected as targets: those that end a target, by which a model learns to stop.

    Args:
        valid: ``bool [B, L]``, False at padding, which follows the tokens.
        lm_modes: ``[B]``, the mode of each row.

    Returns:
        ``bool [B, L]``: the last token of each row from sequence to sequence.

    Source:
        UniLM (Dong et al. 2019): the token at the end is hidden like any other.
    """
    is_last = np.zeros_like(valid)
    rows = np.flatnonzero(lm_modes == LMMode.SEQUENCE_TO_SEQUENCE)
    is_last[rows, np.count_nonzero(valid[rows], axis=1) - 1] = True
    return is_last


class LMModeView(ExampleView):
    """The examples of a dataset as examples of one attention mode.

    To those of the dataset, the examples add or change:

    - `lm_mode`: the mode, an int;
    - `source_length`: from sequence to sequence, the tokens of the source with the special tokens around it; else 0;
    - `token_type_ids`, see [`mode_token_types`]; none if the model has too few types. The second segment begins at the
      `source_length` of the dataset; without one there is one segment;
    - `pair_label`: -100 in all modes but the bidirectional, where there is one.

    Args:
        dataset: Bidirectional: pairs or single segments. From sequence to sequence: pairs of connected text, with
            `source_length`. In one direction: single segments, such as blocks.
        mode: The mode or its name in lower case.
        type_vocab_size: Token types of the model: `config.type_vocab_size`, 0 where the model has none.

    Raises:
        InputError: If there is no such mode. When read: if an example lacks what the mode needs, or holds isolated
            documents.
    """

    def __init__(self, dataset: EpochDataset, *, mode: LMMode | str, type_vocab_size: int) -> None:
        super().__init__(dataset)
        self.mode = LMMode.of(mode)
        self.type_vocab_size = type_vocab_size

    def __repr__(self) -> str:
        """Show the mode and the dataset."""
        return f"{type(self).__name__}({self.mode.name.lower()}, {self.base!r})"

    def view(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return an example with its mode and the token types of the mode."""
        if "document_ids" in example:
            raise InputError(
                f"mode={self.mode.name.lower()!r} orders the tokens of a row, but its documents are isolated; "
                "use block_mode='doc_sentences'"
            )
        length = len(example["input_ids"])
        second = self._start_of_second(example, length)
        source_length = second if self.mode is LMMode.SEQUENCE_TO_SEQUENCE else 0
        segments = np.arange(length) >= (second or length)
        viewed = example | {"lm_mode": int(self.mode), "source_length": source_length}
        viewed.pop("token_type_ids", None)
        types = mode_token_types(self.mode, segments, type_vocab_size=self.type_vocab_size)
        if types is not None:
            viewed["token_type_ids"] = types
        if "pair_label" in viewed and self.mode is not LMMode.BIDIRECTIONAL:
            viewed["pair_label"] = -100
        return viewed

    def _start_of_second(self, example: Mapping[str, Any], length: int) -> int:
        """Return where the second segment begins, 0 if there is none."""
        source_length = int(example.get("source_length", 0))
        if self.mode is LMMode.SEQUENCE_TO_SEQUENCE and not 0 < source_length < length:
            raise InputError(
                f"source_length={source_length} of an example of {length} tokens leaves no source or no target: "
                "mode='sequence_to_sequence' needs a dataset of pairs"
            )
        return source_length


class CausalView(ExampleView):
    """The examples of a dataset, marked as causal or not: `is_causal` is added, a bool.

    Of a causal example nothing is hidden, each token sees those before it, and each but the first is predicted. Token types stay
    as they are, so that they do not tell the kind of an example.

    Args:
        dataset: Single segments, such as blocks; of examples that are not causal, also pairs.
        is_causal: Whether they are. Examples that are mixed with causal ones are marked too: batches then have the same entries.

    Raises:
        InputError: When read: if an example holds isolated documents.

    Source:
        GPT-BERT (Charpentier and Samuel 2024).
    """

    def __init__(self, dataset: EpochDataset, *, is_causal: bool) -> None:
        super().__init__(dataset)
        self.is_causal = is_causal

    def __repr__(self) -> str:
        """Show the dataset and whether its examples are causal."""
        return f"{type(self).__name__}({self.base!r}, is_causal={self.is_causal})"

    def view(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return an example with its mark."""
        if "document_ids" in example:
            raise InputError(
                "is_causal orders the tokens of a row, but its documents are isolated; use block_mode='doc_sentences'"
            )
        return example | {"is_causal": self.is_causal}
