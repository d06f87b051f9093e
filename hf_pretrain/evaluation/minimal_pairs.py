"""Minimal pairs: does a model score the acceptable sentence above the one that differs in a single point?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.metrics import batches_by_length, checked_texts
from hf_pretrain.evaluation.token_scores import (
    Continuation,
    EncodedText,
    Hiding,
    HidingFrame,
    WithinWord,
    causal_scores,
    check_causal,
    check_left_to_right,
    check_masked,
    check_shifted,
    denoising_scores,
    encode_words,
    hidden_runs,
    masked_scores,
    sum_scores,
    text_beginning,
)
from hf_pretrain.modeling.backbone import evaluating, is_shifted, longest_sequence, longest_text
from hf_pretrain.modeling.base import check_model_fits


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
    shifted: bool | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Score texts by a masked language model: the sum of each token's log-probability where that token alone is masked.

    Args:
        model: A stock masked language model.
        tokenizer: Its tokenizer, a fast one.
        texts: Texts that fit the model's positions.
        within_word: The other tokens of a masked token's word are "visible"; or, with "l2r", those to its right are masked as
            well, so that the end of a word does not give its beginning away.
        shifted: Whether a masked token is predicted at the position before it (masked next-token prediction); by default as the
            configuration of the model says, which this library writes.
        batch_size: Masked sequences in a batch.

    Returns:
        ``float64 [N]``, in nats; special tokens are not scored.

    Raises:
        InputError: If the model is an encoder-decoder, there is no mask token, a text is too long, the model lacks ids of the
            tokenizer, or nothing stands before the first token of a shifted model.

    Source: Salazar et al. 2020, "Masked Language Model Scoring"; Kauf and Ivanova 2023, "A Better Way to Do Masked Language Model
        Scoring" ("l2r"); Charpentier and Samuel 2024, "BERT or GPT: why not both?" (shifted).
    """
    check_choice(within_word, get_args(WithinWord), name="within_word")
    check_masked(model, tokenizer)
    encoded = _encode(model, tokenizer, checked_texts(texts, batch_size=batch_size))
    shifted = is_shifted(model) if shifted is None else shifted
    if shifted:
        check_shifted(tokenizer, encoded)
    parts = masked_scores(model, tokenizer, encoded, within_word=within_word, shifted=shifted, batch_size=batch_size)
    return sum_scores(parts, len(encoded))[0]


def denoising_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    hiding: Hiding | None = None,
    within_word: WithinWord = "visible",
    mode_token: str | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Score texts by an encoder-decoder: the sum of each token's log-probability where the input does not show that token.

    A token is hidden in the way that the model was trained to find it:

    - "sentinel", as in T5: the input has `<extra_id_0>` in its place, and the decoder reads its start and that sentinel;
    - "mask", as in BART: the input has the mask token in its place, and the decoder reads the text up to it;
    - "fragment", as in MASS: the same input, and the decoder reads the token before it alone, at the position of the hidden one;
    - "rest", as in prefix language modelling: the input ends before it, and the decoder reads its start. The sum is then the
      log-likelihood of the text.

    Args:
        model: A stock encoder-decoder, such as any `AutoModelForSeq2SeqLM`.
        tokenizer: Its tokenizer, a fast one.
        texts: Texts that fit the model's positions.
        hiding: How a token is hidden; by default "sentinel" if the tokenizer has such tokens, else "mask".
        within_word: The other tokens of a hidden token's word are "visible"; or, with "l2r", a word is hidden at once, and the
            decoder reads those to the left, so that the end of a word does not give its beginning away. A hidden word has one
            sentinel or mask, or with "fragment" a mask for each token.
        mode_token: A token that the input has before each text, such as UL2's "[NLU]".
        batch_size: Inputs with something hidden in a batch.

    Returns:
        ``float64 [N]``, in nats; special tokens are not scored.

    Raises:
        InputError: If the model has no decoder or none with a start token, the tokenizer lacks a token that is needed, a text is
            too long, or the model lacks ids of the tokenizer.

    Source: Salazar et al. 2020, "Masked Language Model Scoring", for encoders.
    """
    check_choice(hiding, (None, *get_args(Hiding)), name="hiding")
    check_choice(within_word, get_args(WithinWord), name="within_word")
    if not model.config.is_encoder_decoder:
        raise InputError(f"model={type(model).__name__} has no decoder: score it by pseudo_log_likelihoods")
    frame = HidingFrame.of(model, tokenizer, hiding=hiding, mode_token=mode_token)
    encoded = _encode(model, tokenizer, checked_texts(texts, batch_size=batch_size), more=len(frame.mode))
    found = [
        (owner, frame.hide(text, *run)) for owner, text in enumerate(encoded) for run in hidden_runs(text, within_word)
    ]
    owners, questions = np.array([owner for owner, _ in found], dtype=np.int64), [question for _, question in found]
    only_targets = frame.hiding == "fragment"
    parts = denoising_scores(model, tokenizer, questions, owners, only_targets=only_targets, batch_size=batch_size)
    return sum_scores(parts, len(encoded))[0]


def causal_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    left_to_right: bool = False,
    batch_size: int = 64,
) -> np.ndarray:
    """Score texts by a causal language model: the sum of each token's log-probability after the tokens before it.

    The first token follows on the special tokens that the tokenizer puts before a text, as Llama's does. GPT-2's puts none: the
    first token then follows on `bos_token`, or on `eos_token` where there is no other. A model with a memory has read documents
    in one stream, so the first token follows on what ends a document: `eos_token`, or `sep_token`. With a tokenizer that has none
    of these the first token is not scored.

    Args:
        model: A stock causal language model, such as any `AutoModelForCausalLM`.
        tokenizer: Its tokenizer, a fast one.
        texts: Texts that fit the model's positions.
        left_to_right: Make an encoder read from left to right: one that was trained on next tokens too, such as by
            `hf-pretrain encoder --objectives mlm clm`.
        batch_size: Texts in a batch.

    Returns:
        ``float64 [N]``, in nats; special tokens are not scored.

    Raises:
        InputError: If the model is an encoder-decoder, predicts no next token or sees it, a text is too long, or the model lacks
            ids of the tokenizer.

    Source: Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English".
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise InputError(f"model={name} is an encoder-decoder: score it by denoising_log_likelihoods")
    texts = checked_texts(texts, batch_size=batch_size)
    encoded = _tokenize(model, tokenizer, texts)
    (check_left_to_right if left_to_right else check_causal)(model, tokenizer)
    found = [_continuation(text, *text_beginning(model, tokenizer)) for text in encoded]
    _check_lengths(model, texts, [len(part.ids) for part in found], longest=longest_text(model))
    parts = causal_scores(model, tokenizer, found, batch_size=batch_size, left_to_right=left_to_right)
    return sum_scores(parts, len(encoded))[0]


def _continuation(text: EncodedText, begin: int | None, is_framed: bool) -> Continuation:
    """Return what is read of a text and what is to follow; special tokens behind it are neither."""
    if not len(text.scored):
        return Continuation(text.ids[:0], text.ids[:0])
    first, last = int(text.scored[0]), int(text.scored[-1])
    before = text.ids[:first] if is_framed and first else np.array([] if begin is None else [begin], dtype=np.int64)
    ids = np.concatenate([before, text.ids[first : last + 1]])
    return Continuation(ids[:-1], ids[max(1, len(before)) :])


def originality_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    head: PreTrainedModel | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Score texts by a discriminator: the sum of each token's log-probability of being original.

    Args:
        model: A stock model with one logit a token, positive for "replaced", such as `ElectraForPreTraining`.
        tokenizer: Its tokenizer, a fast one.
        texts: Texts that fit the model's positions.
        head: What turns the states of an encoder, ``[B, L, D]``, into such logits, if the model is one.
        batch_size: Texts in a batch.

    Returns:
        ``float64 [N]``, in nats; special tokens are not scored.

    Raises:
        InputError: If a text is too long, or the model lacks ids of the tokenizer.
    """
    encoded = _encode(model, tokenizer, checked_texts(texts, batch_size=batch_size))
    scores = np.zeros(len(encoded))
    with evaluating(model), evaluating(model if head is None else head):
        for rows, batch in batches_by_length(
            [text.ids for text in encoded],
            pad_token_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            device=model.device,
            name="Scoring",
        ):
            output = model(**batch)
            logits = output.logits if head is None else head(output.last_hidden_state)
            logits_BL = logits.float().reshape(batch["input_ids"].shape)
            original_BL = F.logsigmoid(-logits_BL).double().cpu().numpy()
            scores[rows] = [original_BL[i, encoded[row].scored].sum() for i, row in enumerate(rows)]
    return scores


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, more: int = 0
) -> list[EncodedText]:
    """Return the ids and words of texts; each must fit the model's positions with some `more` tokens."""
    encoded = _tokenize(model, tokenizer, texts)
    parts = (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else (model,)
    longest = min((found for part in parts if (found := longest_sequence(part)) is not None), default=None)
    _check_lengths(model, texts, [len(text.ids) + more for text in encoded], longest=longest)
    return encoded


def _check_lengths(model: PreTrainedModel, texts: list[str], lengths: list[int], *, longest: int | None) -> None:
    """Refuse a text of which a model would have to read more tokens than it has positions."""
    for text, length in zip(texts, lengths, strict=True):
        if longest is not None and length > longest:
            raise InputError(
                f"a text has {length} tokens, more than the {longest} positions of {type(model).__name__}: {text[:40]!r}"
            )


def _tokenize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[EncodedText]:
    """Return the ids and words of texts, whatever their length."""
    check_model_fits(model, tokenizer, block_size=0)
    return encode_words(tokenizer, texts)
