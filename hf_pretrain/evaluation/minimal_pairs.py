"""Minimal pairs: does a model score the acceptable sentence above the one that differs in a single point?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.corruption.sentinels import SENTINEL_NAMES, sentinel_ids
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.metrics import batches_by_length, check_fast, checked_texts, encode_texts, words_of_tokens
from hf_pretrain.modeling.backbone import decoder_start_id, evaluating, longest_sequence, takes_input
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.losses import GatheredHead
from hf_pretrain.modeling.visibility.rules import Edit, arbitrary_tokens, find_leak

# The word of a special token.
_NO_WORD = -2

WithinWord = Literal["visible", "l2r"]
Hiding = Literal["sentinel", "mask", "fragment", "rest"]


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
        InputError: If the model is an encoder-decoder, there is no mask token, a text is too long, or the model lacks ids of the
            tokenizer.

    Source: Salazar et al. 2020, "Masked Language Model Scoring"; Kauf and Ivanova 2023, "A Better Way to Do Masked Language Model
        Scoring" ("l2r").
    """
    check_choice(within_word, get_args(WithinWord), name="within_word")
    # Some of them open as masked language models too, and would read the masks on both sides.
    if model.config.is_encoder_decoder:
        raise InputError(f"model={type(model).__name__} is an encoder-decoder: score it by denoising_log_likelihoods")
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
            logits_BV = head(model, torch.from_numpy(positions).to(model.device), **batch)
            np.add.at(scores, owner[rows], _log_probabilities(logits_BV, target[rows]))
    return scores


def _log_probabilities(logits: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """Return the log-probability of each target ``[T]`` under its logits ``[T, V]``: ``float64 [T]``, in nats."""
    nll_T = F.cross_entropy(logits.float(), torch.from_numpy(targets).to(logits.device), reduction="none")
    return -nll_T.double().cpu().numpy()


def _masked_copies(text: _Encoded, mask_token_id: int, within_word: WithinWord) -> np.ndarray:
    """Return the ids with one token masked that is not special, for each of them: ``[T, L]``."""
    is_masked = np.arange(len(text.ids)) == text.scored[:, None]
    if within_word == "l2r":
        is_of_word = text.words == text.words[text.scored, None]
        is_masked |= is_of_word & (np.arange(len(text.ids)) > text.scored[:, None])
    return np.where(is_masked, mask_token_id, text.ids)


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
    known = tokenizer.get_vocab()
    sentinel = next(iter(sentinel_ids(tokenizer).tolist()), None)
    frame = _Frame(
        hiding=hiding or ("mask" if sentinel is None else "sentinel"),
        start=decoder_start_id(model),
        sentinel=sentinel,
        mask=tokenizer.mask_token_id,
        mode=[] if mode_token is None else [known.get(mode_token)],
    )
    frame.check(tokenizer, mode_token)
    encoded = _encode(model, tokenizer, checked_texts(texts, batch_size=batch_size), more=len(frame.mode))
    found = [(owner, frame.hide(text, *run)) for owner, text in enumerate(encoded) for run in _runs(text, within_word)]
    owners, questions = np.array([owner for owner, _ in found], dtype=np.int64), [question for _, question in found]
    scores = np.zeros(len(encoded))
    with evaluating(model), GatheredHead(model.get_decoder()) as head:
        for rows, batch in batches_by_length(
            [question.input_ids for question in questions],
            pad_token_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            device=model.device,
            name="Scoring",
        ):
            asked = [questions[row] for row in rows]
            decoder_inputs, positions, targets = _decoder_side(asked, only_targets=frame.hiding == "fragment")
            batch |= {name: torch.from_numpy(value).to(model.device) for name, value in decoder_inputs.items()}
            logits_TV = head(model, torch.from_numpy(positions).to(model.device), **batch)
            owner_of_target = np.repeat(owners[rows], [len(question.targets) for question in asked])
            np.add.at(scores, owner_of_target, _log_probabilities(logits_TV, targets))
    return scores


class _Question(NamedTuple):
    """An input that does not show some tokens, and what the decoder reads; the logits at its last ``T`` columns are theirs.

    `input_ids` is ``[L]``, `decoder_ids` ``[D]`` and `targets`, the hidden tokens, ``[T]``.
    """

    input_ids: np.ndarray
    decoder_ids: np.ndarray
    targets: np.ndarray


class _Frame(NamedTuple):
    """How tokens are hidden, with the ids that this takes."""

    hiding: Hiding
    start: int
    sentinel: int | None
    mask: int | None
    mode: list[int]

    def check(self, tokenizer: PreTrainedTokenizerBase, mode_token: str | None) -> None:
        """Refuse a tokenizer without a token that is needed."""
        name = type(tokenizer).__name__
        if self.hiding == "sentinel" and self.sentinel is None:
            raise InputError(
                f"tokenizer={name} has no {SENTINEL_NAMES[0].format(0)}, which hiding='sentinel' needs: choose another"
            )
        if self.hiding in ("mask", "fragment") and self.mask is None:
            raise InputError(
                f"tokenizer={name} has no mask token, which hiding={self.hiding!r} needs: give it one, or choose another"
            )
        if self.hiding == "rest" and not tokenizer.num_special_tokens_to_add() and not self.mode:
            raise InputError(
                f"tokenizer={name} adds no special token, so that with hiding='rest' the first input would be empty: give it one"
            )
        if None in self.mode:
            raise InputError(f"mode_token={mode_token!r} is no token of the tokenizer: name one, or leave it out")

    def hide(self, text: _Encoded, begin: int, end: int) -> _Question:
        """Return the question after the tokens in the columns from `begin` to `end`, exclusive."""
        first, last = text.scored[0], text.scored[-1] + 1
        run = text.ids[begin:end]
        rest = text.ids[last:] if self.hiding == "rest" else text.ids[end:]
        hole = {
            "sentinel": [self.sentinel],
            "mask": [self.mask],
            "fragment": [self.mask] * len(run),
            "rest": [],
        }[self.hiding]
        read = {
            "sentinel": [self.start, self.sentinel],
            "mask": [self.start, *text.ids[:begin]],
            # What is before the last token is there for the positions alone.
            "fragment": [self.start, *text.ids[:begin]],
            "rest": [self.start],
        }[self.hiding]
        parts = (text.ids[:first], self.mode, text.ids[first:begin], hole, rest)
        input_ids, decoder_ids = (
            np.concatenate([np.asarray(part, dtype=np.int64) for part in side]) for side in (parts, (read, run[:-1]))
        )
        return _Question(input_ids, decoder_ids, run)


def _runs(text: _Encoded, within_word: WithinWord) -> list[tuple[int, int]]:
    """Return the columns, begin and end, that are hidden at once: each token that is not special, or each word."""
    if not len(text.scored):
        return []
    is_first = np.ones(len(text.scored), dtype=np.bool_)
    if within_word == "l2r":
        is_first[1:] = (np.diff(text.words[text.scored]) != 0) | (np.diff(text.scored) != 1)
    last = np.append(np.flatnonzero(is_first)[1:], len(text.scored)) - 1
    return list(zip(text.scored[is_first].tolist(), (text.scored[last] + 1).tolist(), strict=True))


def _decoder_side(
    questions: Sequence[_Question], *, only_targets: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return what the decoder reads, ``[B, D]``, the flat positions of the hidden tokens' logits, ``[T]``, and those tokens.

    With `only_targets` the decoder sees nothing but the columns of these logits.
    """
    rows = [{"ids": question.decoder_ids} for question in questions]
    decoder_ids, valid = stack_column(rows, "ids")
    columns = np.arange(valid.shape[1])
    lengths = np.array([len(question.decoder_ids) for question in questions])[:, None]
    numbers = np.array([len(question.targets) for question in questions])[:, None]
    is_asked = valid & (columns >= lengths - numbers)
    inputs = {
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": (is_asked if only_targets else valid).astype(np.int64),
    }
    return inputs, np.flatnonzero(is_asked), np.concatenate([question.targets for question in questions])


def causal_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 64
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
    _check_causal(model, tokenizer)
    found = [_continuation(text, *_beginning(model, tokenizer)) for text in encoded]
    # Positions that are no table have an end too: what was read in training.
    longest = longest_sequence(model) or getattr(model.config, "max_position_embeddings", None)
    _check_lengths(model, texts, [len(part.ids) for part in found], longest=longest)
    chosen = np.flatnonzero([len(part.targets) for part in found])
    scores = np.zeros(len(encoded))
    # Nothing is read further.
    options = {"use_cache": False} if takes_input(model, "use_cache") else {}
    with evaluating(model), _gathered(model) as logits_at:
        for rows, batch in batches_by_length(
            [found[index].ids for index in chosen],
            pad_token_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            device=model.device,
            name="Scoring",
        ):
            parts, width = [found[index] for index in chosen[rows]], batch["input_ids"].shape[1]
            columns = [np.arange(len(part.ids) - len(part.targets), len(part.ids)) for part in parts]
            positions = np.concatenate([row * width + of_row for row, of_row in enumerate(columns)])
            logits_TV = logits_at(torch.from_numpy(positions).to(model.device), **batch, **options)
            owner = np.repeat(chosen[rows], [len(part.targets) for part in parts])
            np.add.at(scores, owner, _log_probabilities(logits_TV, np.concatenate([part.targets for part in parts])))
    return scores


class _Continuation(NamedTuple):
    """What a model reads, ``[L]``, and the tokens that follow on the last ``T`` columns of it, ``[T]``."""

    ids: np.ndarray
    targets: np.ndarray


def _beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, bool]:
    """Return the token that a text follows on, and whether special tokens that the tokenizer puts before it come first."""
    if takes_input(model, "mems"):
        separators = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        return next((token for token in separators if token is not None), None), False
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id, True


def _continuation(text: _Encoded, begin: int | None, is_framed: bool) -> _Continuation:
    """Return what is read of a text and what is to follow; special tokens behind it are neither."""
    if not len(text.scored):
        return _Continuation(text.ids[:0], text.ids[:0])
    first, last = int(text.scored[0]), int(text.scored[-1])
    before = text.ids[:first] if is_framed and first else np.array([] if begin is None else [begin], dtype=np.int64)
    ids = np.concatenate([before, text.ids[first : last + 1]])
    return _Continuation(ids[:-1], ids[max(1, len(before)) :])


def _check_causal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that does not predict the next token, or that sees it: another last token moves the logits before it."""
    name = type(model).__name__
    tokens, others = (arbitrary_tokens(model.base_model, 4, shift=shift) for shift in range(2))
    edit = Edit(torch.cat([tokens[:-1], others[-1:]]), slice(0, -1), hiding=[0])
    with evaluating(model):
        logits = getattr(model(input_ids=tokens[None]), "logits", None)
        if logits is None or logits.dim() != 3 or logits.shape[-1] < len(tokenizer):
            raise InputError(
                f"model={name} does not predict tokens: open it by AutoModelForCausalLM, or score a discriminator by "
                "originality_scores"
            )
        if find_leak(lambda ids: model(input_ids=ids[None]).logits, tokens, [edit]) is not None:
            raise InputError(
                f"model={name} sees the tokens that follow: score it by pseudo_log_likelihoods (XLNet by score_permutations), "
                "or set is_decoder=True in the configuration of an encoder that was trained as a decoder"
            )


@contextmanager
def _gathered(model: PreTrainedModel) -> Iterator[Callable[..., torch.Tensor]]:
    """Give a function from flat positions ``[T]`` and a model's inputs to the logits there, ``[T, V]``."""
    decoder = model.get_decoder()
    # OPT and the decoders of BART's kin run this part alone; ModernBERT's decoder calls a layer of its head so.
    body = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    if body is model:
        # The classes without a base model, such as Llama 4's.
        yield lambda positions, **inputs: model(**inputs).logits.flatten(0, 1).index_select(0, positions)
        return
    with GatheredHead(model, body=body) as head:
        yield partial(head, model)


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


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, more: int = 0
) -> list[_Encoded]:
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


def _tokenize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[_Encoded]:
    """Return the ids and words of texts, whatever their length."""
    check_model_fits(model, tokenizer, block_size=0)
    check_fast(tokenizer)
    if not texts:
        return []
    encoding = encode_texts(tokenizer, texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    encoded = []
    for text, ids, is_special, offsets in zip(
        texts, encoding["input_ids"], encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True
    ):
        _, words = words_of_tokens(text, offsets)
        is_text = np.array(is_special) == 0
        encoded.append(_Encoded(np.array(ids), np.flatnonzero(is_text), np.where(is_text, words, _NO_WORD)))
    return encoded
