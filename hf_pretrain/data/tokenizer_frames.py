"""Special tokens around the texts of a tokenizer that was trained here."""

from __future__ import annotations

from tokenizers import processors
from transformers import PreTrainedTokenizerFast


def frame_by_separators(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let a tokenizer put its separator where XLM does: ``</s> x </s>`` around a text, ``</s> x </s> y </s>`` around two.

    As XLM's, it has then the one token for ``cls_token``, ``sep_token`` and ``eos_token``. What was the classification token
    is the ``bos_token``, as XLM's ``<s>`` that it never puts anywhere. Saved and opened again it is the same.

    Args:
        tokenizer: A tokenizer as `train_tokenizer` returns it, of any kind; changed in place.

    Source:
        `XLMTokenizer` of transformers, which is written in Python and gives no character offsets.
    """
    separator = tokenizer.sep_token
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    tokenizer.cls_token = tokenizer.eos_token = separator
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{separator}:0 $A:0 {separator}:0",
        pair=f"{separator}:0 $A:0 {separator}:0 $B:1 {separator}:1",
        special_tokens=[(separator, tokenizer.sep_token_id)],
    )
