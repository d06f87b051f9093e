"""Minimal pairs: does a model score the acceptable sentence above the one that differs in a single point?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.metrics import batches_by_length, check_fast, checked_texts, encode_texts, words_of_tokens
from hf_pretrain.modeling.backbone import evaluating, longest_sequence
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.losses import GatheredHead

# The word of a special token.
_NO_WORD = -2

WithinWord = Literal["visible", "l2r"]


class MinimalPair(NamedTuple):
    """Two sentences, of which the first is acceptable, with the name of their kind and of the field it belongs to."""

    good: str
    bad: str
    paradigm: str
    field: str


class PairAccuracy(NamedTuple):
    """How often the acceptable sentence scores higher.

    Attributes:
        mean: Mean over the paradigms.
        fields: Mean over the paradigms of each field.
        paradigms: Share of the pairs of each paradigm.
    """

    mean: float
    fields: dict[str, float]
    paradigms: dict[str, float]


def read_minimal_pairs(paths: str | Path | Sequence[str | Path], *, limit: int | None = None) -> list[MinimalPair]:
    """Read pairs in the format of BLiMP: JSON lines with `sentence_good`, `sentence_bad`, `UID` and `field`.

    Args:
        paths: Files, folders or globs, as in `hf_pretrain.data.text.files.read_documents`.
        limit: At most so many pairs of each paradigm, the first ones; all by default.

    Raises:
        InputError: If a file cannot be read, or a row lacks an entry.

    Source: Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English".
    """
    names = ("sentence_good", "sentence_bad", "UID", "field")
    columns = {name: list(read_documents(paths, text_column=name)) for name in names}
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{len(column)} of {name}" for name, column in columns.items())
        raise InputError(f"{paths} has empty entries ({counts}): give every row all of them")
    seen: defaultdict[str, int] = defaultdict(int)
    pairs = []
    # BLiMP itself spells one field in two ways.
    columns["field"] = [name.replace("/", "_") for name in columns["field"]]
    for pair in map(MinimalPair, *columns.values()):
        seen[pair.paradigm] += 1
        if limit is None or seen[pair.paradigm] <= limit:
            pairs.append(pair)
    return pairs


def pair_accuracy(score: Callable[[Sequence[str]], np.ndarray], pairs: Sequence[MinimalPair]) -> PairAccuracy:
    """Return how often a score prefers the acceptable sentence; equal scores count one half.

    Args:
        score: Takes texts and returns ``[N]`` scores, such as `pseudo_log_likelihoods` with its first arguments bound.
        pairs: The pairs.

    Raises:
        InputError: If there is none.
    """
    if not pairs:
        raise InputError("pairs is empty: give at least one, as read_minimal_pairs returns them")
    scores = score([pair.good for pair in pairs] + [pair.bad for pair in pairs])
    good, bad = scores[: len(pairs)], scores[len(pairs) :]
    right = ((good > bad) + 0.5 * (good == bad)).tolist()
    paradigms = _means((pair.paradigm, value) for pair, value in zip(pairs, right, strict=True))
    field_of = {pair.paradigm: pair.field for pair in pairs}
    fields = _means((field_of[name], share) for name, share in paradigms.items())
    return PairAccuracy(float(np.mean(list(paradigms.values()))), fields, paradigms)


def _means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of the values of each name."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in values:
        groups[name].append(value)
    return {name: float(np.mean(group)) for name, group in groups.items()}


def pseudo_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    within_word: WithinWord = "visible",
    batch_size: int = 256,
) -> np.ndarray:
    """Score texts by a masked language model: the sum of each token's log-probability where that token alone is masked.

    Args:
        model: A stock masked language model.
        tokenizer: Its tokenizer, a fast one.
        texts: Texts that fit the model's positions.
        within_word: The other tokens of a masked token's word are "visible"; or, with "l2r", those to its right are masked as
            well, so that the end of a word does not give its beginning away.
        batch_size: Masked sequences in a batch.

    Returns:
        ``float64 [N]``, in nats; special tokens are not scored.

    Raises:
        InputError: If there is no mask token, a text is too long, or the model lacks ids of the tokenizer.

    Source: Salazar et al. 2020, "Masked Language Model Scoring"; Kauf and Ivanova 2023, "A Better Way to Do Masked Language Model
        Scoring" ("l2r").
    """
    check_choice(within_word, get_args(WithinWord), name="within_word")
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} has no mask token, which a masked language model needs"
        )
    encoded = _encode(model, tokenizer, checked_texts(texts, batch_size=batch_size))
    if not encoded:
        return np.zeros(0)
    masked = [row for text in encoded for row in _masked_copies(text, tokenizer.mask_token_id, within_word)]
    owner = np.repeat(np.arange(len(encoded)), [len(text.scored) for text in encoded])
    column = np.concatenate([text.scored for text in encoded])
    target = np.concatenate([text.ids[text.scored] for text in encoded])
    scores = np.zeros(len(encoded))
    with evaluating(model), GatheredHead(model) as head:
        for rows, batch in batches_by_length(
            masked, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size, device=model.device, name="Scoring"
        ):
            positions = np.arange(len(rows)) * batch["input_ids"].shape[1] + column[rows]
            logits_BV = head(model, torch.from_numpy(positions).to(model.device), **batch).float()
            target_B = torch.from_numpy(target[rows]).to(model.device)
            log_probability_B = -F.cross_entropy(logits_BV, target_B, reduction="none")
            np.add.at(scores, owner[rows], log_probability_B.double().cpu().numpy())
    return scores


def _masked_copies(text: _Encoded, mask_token_id: int, within_word: WithinWord) -> np.ndarray:
    """Return the ids with one token masked that is not special, for each of them: ``[T, L]``."""
    is_masked = np.arange(len(text.ids)) == text.scored[:, None]
    if within_word == "l2r":
        is_of_word = text.words == text.words[text.scored, None]
        is_masked |= is_of_word & (np.arange(len(text.ids)) > text.scored[:, None])
    return np.where(is_masked, mask_token_id, text.ids)


def originality_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 64
) -> np.ndarray:
    """Score texts by a discriminator: the sum of each token's log-probability of being original.

    Args:
        model: A stock model with one logit a token, positive for "replaced", such as `ElectraForPreTraining`.
        tokenizer: Its tokenizer, a fast one.
        texts: Texts that fit the model's positions.
        batch_size: Texts in a batch.

    Returns:
        ``float64 [N]``, in nats; special tokens are not scored.

    Raises:
        InputError: If a text is too long, or the model lacks ids of the tokenizer.
    """
    encoded = _encode(model, tokenizer, checked_texts(texts, batch_size=batch_size))
    scores = np.zeros(len(encoded))
    with evaluating(model):
        for rows, batch in batches_by_length(
            [text.ids for text in encoded],
            pad_token_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            device=model.device,
            name="Scoring",
        ):
            logits_BL = model(**batch).logits.float().reshape(batch["input_ids"].shape)
            original_BL = F.logsigmoid(-logits_BL).double().cpu().numpy()
            scores[rows] = [original_BL[i, encoded[row].scored].sum() for i, row in enumerate(rows)]
    return scores


class _Encoded(NamedTuple):
    """A text's ids ``[L]``, the positions of those that are not special ``[T]``, and the word of each ``[L]``."""

    ids: np.ndarray
    scored: np.ndarray
    words: np.ndarray


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[_Encoded]:
    check_model_fits(model, tokenizer, block_size=0)
    check_fast(tokenizer)
    if not texts:
        return []
    encoding = encode_texts(tokenizer, texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    longest = longest_sequence(model)
    encoded = []
    for text, ids, is_special, offsets in zip(
        texts, encoding["input_ids"], encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True
    ):
        if longest is not None and len(ids) > longest:
            raise InputError(
                f"a text has {len(ids)} tokens, more than the {longest} positions of {type(model).__name__}: {text[:40]!r}"
            )
        _, words = words_of_tokens(text, offsets)
        is_text = np.array(is_special) == 0
        encoded.append(_Encoded(np.array(ids), np.flatnonzero(is_text), np.where(is_text, words, _NO_WORD)))
    return encoded
