"""How suspicious a discriminator finds each word of a text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.words import character_kinds, next_visible, word_starts


def word_suspicions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, float]]:
    """Return each word with the probability that it was replaced.

    Args:
        model: A discriminator with one logit a token, such as `ElectraForPreTraining`.
        tokenizer: Its tokenizer, a fast one.
        text: Text that fits the model's positions.

    Returns:
        Pairs of a word and the highest probability among its tokens.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    with torch.no_grad():
        inputs = {name: torch.tensor([encoded[name]], device=model.device) for name in ("input_ids", "attention_mask")}
        probabilities = model.eval()(**inputs).logits.float().sigmoid().flatten().tolist()
    kinds = character_kinds(text)
    starts = word_starts(text, kinds=kinds).tolist()
    places = next_visible(kinds, np.array([begin for begin, _ in encoded["offset_mapping"]]))
    highest = [0.0] * len(starts)
    # A token's word is that of its first visible character: before it may come the space that separates words.
    for word, special, probability in zip(
        np.searchsorted(starts, places, side="right") - 1, encoded["special_tokens_mask"], probabilities, strict=True
    ):
        if not special and word >= 0:
            highest[word] = max(highest[word], probability)
    words = [text[a:b].strip() for a, b in pairwise([*starts, len(text)])]
    return list(zip(words, highest, strict=True))
