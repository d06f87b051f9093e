"""What stands in the place of a selected token: the mask token, a random token, or the token itself."""

from __future__ import annotations

import numpy as np

from hf_pretrain.corruption.vocabulary import Vocabulary

_HALF = np.uint64(32)
_LOW_HALF = np.uint64((1 << 32) - 1)


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
