"""How suspicious a discriminator finds each word of a text."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.words import word_starts


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
    starts = [int(start) for start in word_starts(text)]
    highest = [0.0] * len(starts)
    for (begin, end), special, probability in zip(
        encoded["offset_mapping"], encoded["special_tokens_mask"], probabilities, strict=True
    ):
        # A token's word is that of its last character: its first may be the space before the word.
        word = int(np.searchsorted(starts, end, side="left")) - 1
        if not special and end > begin and word >= 0:
            highest[word] = max(highest[word], probability)
    words = [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    return list(zip(words, highest, strict=True))
