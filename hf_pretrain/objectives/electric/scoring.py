"""Pseudo-log-likelihoods of whole texts, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.batches import batches_by_length, evaluating
from hf_pretrain.modeling.base import longest_sequence


def score_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 32
) -> list[float]:
    """Return the pseudo-log-likelihood of each text, for example to choose among several.

    An energy estimates -log p of its token given all the others, so their sum, negated, is what masking the tokens one by one
    would give, in one pass instead of as many as there are tokens. Special tokens, the unknown one among them, add nothing:
    training gives them no energy.

    Args:
        model: The exported discriminator, with one logit a token.
        tokenizer: Its tokenizer.
        texts: The texts; each must fit the model.
        batch_size: Texts a pass; those of similar length go together.

    Returns:
        Sums of log p in nats, in the order of the texts: the higher, the likelier.

    Raises:
        InputError: If the model has more than one logit a token, or a text is longer than the model's positions.

    Source: Clark et al. 2020, "Pre-Training Transformers as Energy-Based Cloze Models", section 3.
    """
    rows = [tokenizer(text, truncation=False, verbose=False)["input_ids"] for text in texts]
    longest = longest_sequence(model)
    for number, row in enumerate(rows):
        if longest is not None and len(row) > longest:
            raise InputError(
                f"texts[{number}] has {len(row)} tokens, more than the {longest} that the model takes: split it"
            )
    special = torch.tensor(tokenizer.all_special_ids, device=model.device)
    scores = np.zeros(len(rows))
    options = {"pad_token_id": tokenizer.pad_token_id, "batch_size": batch_size, "device": model.device}
    with evaluating(model):
        for numbers, batch in batches_by_length(rows, **options, name="Scoring"):
            logits = model(**batch).logits.float()
            if logits.numel() != batch["input_ids"].numel():
                raise InputError(
                    f"model={type(model).__name__} gives {logits.shape[-1]} logits a token: Electric has one"
                )
            counted_BL = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], special)
            scores[numbers] = -(logits.view_as(counted_BL) * counted_BL).sum(dim=1).cpu().numpy()
    return scores.tolist()
