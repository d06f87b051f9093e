"""What masking must know of a tokenizer, as lookup tables over ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_pretrain.errors import InputError


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
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special_ids = [*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)]
        special = np.zeros(1 + max(len(tokenizer) - 1, *tokenizer.get_vocab().values()), dtype=np.bool_)
        special[special_ids] = True
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
        """Tell which tokens may never be selected.

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
