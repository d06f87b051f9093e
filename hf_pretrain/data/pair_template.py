"""What a tokenizer puts before, between and behind two sequences, and the token types that it gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.errors import InputError

_Probe = tuple[list[int], list[int], Sequence[int | None]]


@dataclass(frozen=True)
class PairTemplate:
    """Special tokens around two sequences A and B, and the token types of all five parts.

    Attributes:
        prefix: Ids before A.
        middle: Ids between A and B.
        suffix: Ids behind B.
        prefix_types: Token types of the prefix, one an id.
        middle_types: Those of the middle.
        suffix_types: Those of the suffix.
        types: Token type of the tokens of A, and of those of B.
    """

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    prefix_types: tuple[int, ...]
    middle_types: tuple[int, ...]
    suffix_types: tuple[int, ...]
    types: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PairTemplate:
        """Read the template off a tokenizer: by its own method where it has one, else by encoding a pair of texts.

        Args:
            tokenizer: Any transformers tokenizer, Rust-backed or Python.

        Returns:
            The template.

        Raises:
            InputError: If nothing would stand between the sequences, or no text of the vocabulary shows what does.
        """
        expected = tokenizer.num_special_tokens_to_add(pair=True)
        name = type(tokenizer).__name__
        templates = (cls._from_probe(*probe) for probe in _probes(tokenizer)) if expected else iter(())
        template = next((found for found in templates if found and found.num_special_tokens == expected), None)
        if expected and template is None:
            raise InputError(
                f"tokenizer={name} adds {expected} special tokens to a pair, but none around any token of its "
                "vocabulary; give it a post-processor whose template for pairs holds both sequences"
            )
        if template is None or not template.middle:
            raise InputError(
                f"tokenizer={name} puts nothing between the two sequences of a pair; give it a post-processor with a "
                "template for pairs, such as '[CLS] $A [SEP] $B:1 [SEP]:1'"
            )
        return template

    @classmethod
    def _from_probe(cls, ids: list[int], types: list[int], sequences: Sequence[int | None]) -> PairTemplate | None:
        """Return the template that an encoded pair shows; None if A and B are not each in one piece, A first."""
        if 0 not in sequences or 1 not in sequences:
            return None
        a, b = sequences.index(0), sequences.index(1)
        a_stop, b_stop = a + sequences.count(0), b + sequences.count(1)
        if set(sequences[a:a_stop]) != {0} or set(sequences[b:b_stop]) != {1} or b < a:
            return None
        return cls(
            prefix=tuple(ids[:a]),
            middle=tuple(ids[a_stop:b]),
            suffix=tuple(ids[b_stop:]),
            prefix_types=tuple(types[:a]),
            middle_types=tuple(types[a_stop:b]),
            suffix_types=tuple(types[b_stop:]),
            types=(types[a], types[b]),
        )

    @property
    def num_special_tokens(self) -> int:
        """Tokens around and between the two sequences."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def budget(self, block_size: int) -> int:
        """Return how many tokens of A and B together fit into an example.

        Raises:
            InputError: If a token of each does not fit.
        """
        if block_size < self.num_special_tokens + 2:
            raise InputError(
                f"block_size={block_size} leaves no room for a pair: the tokenizer adds {self.num_special_tokens} "
                f"special tokens; use at least {self.num_special_tokens + 2}, usually 128 or 512"
            )
        return block_size - self.num_special_tokens

    def join(self, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        """Return an example of two sequences.

        Args:
            a: Ids, and whether each begins a word: `[n]` each.
            b: The same of the second sequence, `[m]`.

        Returns:
            `input_ids` int32, `word_starts` bool and `token_type_ids` int64, each `[n + m + num_special_tokens]`;
            `source_length`, the tokens up to and with the middle. A special token is a word of its own, and so is what
            was left of a word of which a sequence lacks the beginning.
        """
        a_start, a_stop = len(self.prefix), len(self.prefix) + len(a[0])
        b_start = a_stop + len(self.middle)
        b_stop = b_start + len(b[0])
        length = b_stop + len(self.suffix)
        ids, types = np.empty(length, dtype=np.int32), np.empty(length, dtype=np.int64)
        ids[:a_start], types[:a_start] = self.prefix, self.prefix_types
        ids[a_start:a_stop], types[a_start:a_stop] = a[0], self.types[0]
        ids[a_stop:b_start], types[a_stop:b_start] = self.middle, self.middle_types
        ids[b_start:b_stop], types[b_start:b_stop] = b[0], self.types[1]
        ids[b_stop:], types[b_stop:] = self.suffix, self.suffix_types
        words = np.ones(length, dtype=np.bool_)
        words[a_start + 1 : a_stop] = a[1][1:]
        words[b_start + 1 : b_stop] = b[1][1:]
        return {"input_ids": ids, "word_starts": words, "token_type_ids": types, "source_length": b_start}


def _probes(tokenizer: Any) -> Iterator[_Probe]:  # noqa: ANN401 (what a Python tokenizer has, a fast one has not)
    """Yield encoded pairs as (ids, token types, number of the sequence of each token or None), likely ones first."""
    if hasattr(tokenizer, "build_inputs_with_special_tokens"):
        ids = tokenizer.build_inputs_with_special_tokens([-1], [-2])
        types = tokenizer.create_token_type_ids_from_sequences([-1], [-2])
        yield ids, types, [{-1: 0, -2: 1}.get(token) for token in ids]
        return
    special = set(tokenizer.all_special_tokens)
    for text in ["a", *(token for token in tokenizer.get_vocab() if token not in special)]:
        encoding = tokenizer(text, text, return_token_type_ids=True)
        yield encoding["input_ids"], encoding["token_type_ids"], encoding.sequence_ids(0)
