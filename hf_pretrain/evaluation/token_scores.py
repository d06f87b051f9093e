"""The probability of single tokens under each kind of model: masked, encoder-decoder and causal.

`encode_words` makes texts into tokens with their words. `masked_scores`, `denoising_scores` and `causal_scores` yield the
log-probabilities of tokens, batch by batch, and `sum_scores` adds them up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.corruption.sentinels import SENTINEL_NAMES, sentinel_ids
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.metrics import batches_by_length, check_fast, encode_texts, words_of_tokens
from hf_pretrain.modeling.backbone import decoder_start_id, evaluating, takes_input
from hf_pretrain.modeling.losses import GatheredHead
from hf_pretrain.modeling.visibility.causal import body_of_head, sees_what_follows
from hf_pretrain.modeling.visibility.lm_modes import check_lm_modes, left_to_right_inputs
from hf_pretrain.modeling.visibility.rules import arbitrary_tokens

WithinWord = Literal["visible", "l2r"]
Hiding = Literal["sentinel", "mask", "fragment", "rest"]

# Texts that are tokenized at once.
_TOKENIZED = 4096
NO_WORD = -2
"""The word of a special token."""


class TokenScores(NamedTuple):
    """How a model predicted some tokens.

    Attributes:
        owner: ``[T]`` which of the texts each token belongs to.
        log_probabilities: ``float64 [T]``, in nats.
        is_greedy: ``[T]`` whether no token is more probable there.
    """

    owner: np.ndarray
    log_probabilities: np.ndarray
    is_greedy: np.ndarray

    @classmethod
    def of(cls, owner: np.ndarray, logits: torch.Tensor, targets: np.ndarray) -> TokenScores:
        """Read the scores of targets ``[T]`` off their logits ``[T, V]``."""
        labels_T = torch.from_numpy(targets).to(logits.device)
        nll_T = F.cross_entropy(logits.float(), labels_T, reduction="none")
        return cls(owner, -nll_T.double().cpu().numpy(), (logits.argmax(-1) == labels_T).cpu().numpy())


def sum_scores(parts: Iterable[TokenScores], num_texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-likelihood of each text, ``float64 [N]`` in nats, and whether all its tokens are greedy, ``[N]``."""
    scores, is_greedy = np.zeros(num_texts), np.ones(num_texts, dtype=np.bool_)
    for part in parts:
        np.add.at(scores, part.owner, part.log_probabilities)
        np.logical_and.at(is_greedy, part.owner, part.is_greedy)
    return scores, is_greedy


class EncodedText(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: ``[L]``.
        scored: ``[T]`` positions of those to score.
        words: ``[L]`` the word of each, `NO_WORD` if it is special.
        characters: ``int16 [L, K]`` the characters of each, where the tokenizer makes them.
    """

    ids: np.ndarray
    scored: np.ndarray
    words: np.ndarray
    characters: np.ndarray | None = None


def encode_words(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[EncodedText]:
    """Return the ids and words of texts as a tokenizer alone makes them; all that are not special are to be scored."""
    check_fast(tokenizer)
    if not texts:
        return []
    encoded = []
    for begin in range(0, len(texts), _TOKENIZED):
        part = texts[begin : begin + _TOKENIZED]
        encoding = encode_texts(tokenizer, part, return_offsets_mapping=True, return_special_tokens_mask=True)
        spelled = encoding.get("character_ids") or [None] * len(part)
        for text, ids, is_special, offsets, characters in zip(
            part,
            encoding["input_ids"],
            encoding["special_tokens_mask"],
            encoding["offset_mapping"],
            spelled,
            strict=True,
        ):
            _, words = words_of_tokens(text, offsets)
            is_text = np.array(is_special) == 0
            word_of_token = np.where(is_text, words, NO_WORD)
            letters = None if characters is None else np.array(characters, dtype=np.int16)
            encoded.append(EncodedText(np.array(ids, dtype=np.int64), np.flatnonzero(is_text), word_of_token, letters))
    return encoded


def check_masked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an encoder-decoder, and a tokenizer without a mask token."""
    # Some of them open as masked language models too, and would read the masks on both sides.
    if model.config.is_encoder_decoder:
        raise InputError(f"model={type(model).__name__} is an encoder-decoder: score it by denoising_log_likelihoods")
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} has no mask token, which a masked language model needs"
        )


def check_shifted(tokenizer: PreTrainedTokenizerBase, encoded: Iterable[EncodedText]) -> None:
    """Refuse texts that begin with a token to score: with `shifted` it is predicted at the position before it."""
    if any(len(text.scored) and text.scored[0] == 0 for text in encoded):
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} puts no special token before a text, so that nothing predicts the first one "
            "with shifted=True: give it a post-processor that does"
        )


def masked_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedText],
    *,
    within_word: WithinWord,
    batch_size: int,
    shifted: bool = False,
) -> Iterator[TokenScores]:
    """Yield the scores of tokens where each alone is masked; see `pseudo_log_likelihoods`.

    Args:
        model: A masked language model.
        tokenizer: Its tokenizer.
        encoded: Texts with the tokens to score.
        within_word: What is seen of a token's word.
        batch_size: Masked sequences in a batch.
        shifted: Whether a masked token is predicted at the position before it; see [`check_shifted`].
    """
    assert tokenizer.mask_token_id is not None, "check_masked comes first"
    if not encoded:
        return
    masked = [row for text in encoded for row in _masked_copies(text, tokenizer.mask_token_id, within_word)]
    owner = np.repeat(np.arange(len(encoded)), [len(text.scored) for text in encoded])
    column = np.concatenate([text.scored for text in encoded])
    target = np.concatenate([text.ids[text.scored] for text in encoded])
    with evaluating(model), GatheredHead(model) as head:
        for rows, batch in batches_by_length(
            masked, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size, device=model.device, name="Scoring"
        ):
            positions = np.arange(len(rows)) * batch["input_ids"].shape[1] + column[rows] - shifted
            logits_TV = head(model, torch.from_numpy(positions).to(model.device), **batch)
            yield TokenScores.of(owner[rows], logits_TV, target[rows])


def _masked_copies(text: EncodedText, mask_token_id: int, within_word: WithinWord) -> np.ndarray:
    """Return the ids with one token masked that is not special, for each of them: ``[T, L]``."""
    is_masked = np.arange(len(text.ids)) == text.scored[:, None]
    if within_word == "l2r":
        is_of_word = text.words == text.words[text.scored, None]
        is_masked |= is_of_word & (np.arange(len(text.ids)) > text.scored[:, None])
    return np.where(is_masked, mask_token_id, text.ids)


def denoising_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    owners: np.ndarray,
    *,
    only_targets: bool,
    batch_size: int,
) -> Iterator[TokenScores]:
    """Yield the scores of the tokens that an encoder-decoder writes; see `denoising_log_likelihoods`.

    Args:
        model: An encoder-decoder.
        tokenizer: Its tokenizer.
        questions: What the encoder and the decoder read.
        owners: ``[Q]`` which of the texts each question belongs to.
        only_targets: Whether the decoder sees nothing but the columns of the targets' logits.
        batch_size: Questions in a batch.
    """
    with evaluating(model), GatheredHead(model.get_decoder()) as head:
        for rows, batch in batches_by_length(
            [question.input_ids for question in questions],
            pad_token_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            device=model.device,
            name="Scoring",
        ):
            asked = [questions[row] for row in rows]
            decoder_inputs, positions, targets = _decoder_side(asked, only_targets=only_targets)
            batch |= {name: torch.from_numpy(value).to(model.device) for name, value in decoder_inputs.items()}
            logits_TV = head(model, torch.from_numpy(positions).to(model.device), **batch)
            owner_of_target = np.repeat(owners[rows], [len(question.targets) for question in asked])
            yield TokenScores.of(owner_of_target, logits_TV, targets)


class Question(NamedTuple):
    """An input that does not show some tokens, and what the decoder reads; the logits at its last ``T`` columns are theirs.

    `input_ids` is ``[L]``, `decoder_ids` ``[D]`` and `targets`, the hidden tokens, ``[T]``.
    """

    input_ids: np.ndarray
    decoder_ids: np.ndarray
    targets: np.ndarray


class HidingFrame(NamedTuple):
    """How tokens are hidden, with the ids that this takes."""

    hiding: Hiding
    start: int
    sentinel: int | None
    mask: int | None
    mode: list[int]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        hiding: Hiding | None,
        mode_token: str | None,
    ) -> HidingFrame:
        """Find the ids in a tokenizer; see `denoising_log_likelihoods`."""
        known = tokenizer.get_vocab()
        sentinel = next(iter(sentinel_ids(tokenizer).tolist()), None)
        frame = cls(
            hiding=hiding or ("mask" if sentinel is None else "sentinel"),
            start=decoder_start_id(model),
            sentinel=sentinel,
            mask=tokenizer.mask_token_id,
            mode=[] if mode_token is None else [known.get(mode_token)],
        )
        frame.check(tokenizer, mode_token)
        return frame

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

    def hide(self, text: EncodedText, begin: int, end: int) -> Question:
        """Return the question after the tokens in the columns from `begin` to `end`, exclusive."""
        # What is scored may be the end of a text only.
        first, last = int((text.words != NO_WORD).argmax()), text.scored[-1] + 1
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
        return Question(input_ids, decoder_ids, run)


def hidden_runs(text: EncodedText, within_word: WithinWord) -> list[tuple[int, int]]:
    """Return the columns, begin and end, that are hidden at once: each token that is not special, or each word."""
    if not len(text.scored):
        return []
    is_first = np.ones(len(text.scored), dtype=np.bool_)
    if within_word == "l2r":
        is_first[1:] = (np.diff(text.words[text.scored]) != 0) | (np.diff(text.scored) != 1)
    last = np.append(np.flatnonzero(is_first)[1:], len(text.scored)) - 1
    return list(zip(text.scored[is_first].tolist(), (text.scored[last] + 1).tolist(), strict=True))


def _decoder_side(
    questions: Sequence[Question], *, only_targets: bool
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


def causal_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Continuation],
    *,
    batch_size: int,
    left_to_right: bool = False,
) -> Iterator[TokenScores]:
    """Yield the scores of tokens that follow on others; see `causal_log_likelihoods`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        parts: What is read and what is to follow; equal tokens are read once.
        batch_size: Sequences in a batch.
        left_to_right: Whether the model is an encoder that has to be made to read from left to right.
    """
    readers: defaultdict[bytes, list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        if len(part.targets):
            readers[part.ids.astype(np.int64).tobytes()].append(index)
    groups = list(readers.values())
    # Nothing is read further.
    options = {"use_cache": False} if takes_input(model, "use_cache") else {}
    gathered = _gathered_left_to_right if left_to_right else _gathered
    with evaluating(model), gathered(model) as logits_at:
        for rows, batch in batches_by_length(
            [parts[group[0]].ids for group in groups],
            pad_token_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            device=model.device,
            name="Scoring",
        ):
            width = batch["input_ids"].shape[1]
            asked = [
                (row * width + len(parts[index].ids), index) for row, of in enumerate(rows) for index in groups[of]
            ]
            targets = [parts[index].targets for _, index in asked]
            positions = np.concatenate([np.arange(end - len(parts[index].targets), end) for end, index in asked])
            logits_TV = logits_at(torch.from_numpy(positions).to(model.device), **batch, **options)
            owner = np.repeat([index for _, index in asked], [len(tokens) for tokens in targets])
            yield TokenScores.of(owner, logits_TV, np.concatenate(targets))


class Continuation(NamedTuple):
    """What a model reads, ``[L]``, and the tokens that follow on the last ``T`` columns of it, ``[T]``."""

    ids: np.ndarray
    targets: np.ndarray


def text_beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, bool]:
    """Return the token that a text follows on, and whether special tokens that the tokenizer puts before it come first."""
    if takes_input(model, "mems"):
        separators = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        return next((token for token in separators if token is not None), None), False
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id, True


def check_left_to_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that is no encoder with a head for tokens, or that cannot read from left to right."""
    if not sees_what_follows(model.base_model, lambda ids: model.base_model(input_ids=ids)[0]):
        raise InputError(f"left_to_right=True is for encoders, and {type(model).__name__} is causal: leave it out")
    check_lm_modes(model)
    with evaluating(model), GatheredHead(model) as head:
        ids = arbitrary_tokens(model.base_model, 4, shift=0)[None]
        positions = torch.zeros(1, dtype=torch.long, device=ids.device)
        try:
            width = head(model, positions, input_ids=ids).shape[-1]
        except AttributeError:
            width = 0
    if width < len(tokenizer):
        raise InputError(f"model={type(model).__name__} does not predict tokens: open it by AutoModelForMaskedLM")


def check_causal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that does not predict the next token, or that sees it."""
    name = type(model).__name__
    with evaluating(model):
        logits = getattr(model(input_ids=arbitrary_tokens(model.base_model, 4, shift=0)[None]), "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[-1] < len(tokenizer):
        raise InputError(
            f"model={name} does not predict tokens: open it by AutoModelForCausalLM, or score a discriminator by "
            "originality_scores"
        )
    if sees_what_follows(model, lambda ids: model(input_ids=ids).logits):
        raise InputError(
            f"model={name} sees the tokens that follow: score it by pseudo_log_likelihoods (XLNet by score_permutations), "
            "set left_to_right=True for an encoder that was trained on next tokens too, or is_decoder=True in the configuration "
            "of one that was trained as a decoder"
        )


@contextmanager
def _gathered_left_to_right(model: PreTrainedModel) -> Iterator[Callable[..., torch.Tensor]]:
    """Give the function that `_gathered` gives, for an encoder that is made to read from left to right."""
    with GatheredHead(model) as head:
        yield lambda positions, **inputs: head(model, positions, **left_to_right_inputs(model, **inputs))


@contextmanager
def _gathered(model: PreTrainedModel) -> Iterator[Callable[..., torch.Tensor]]:
    """Give a function from flat positions ``[T]`` and a model's inputs to the logits there, ``[T, V]``."""
    body = body_of_head(model)
    if body is None:
        yield lambda positions, **inputs: model(**inputs).logits.flatten(0, 1).index_select(0, positions)
        return
    with GatheredHead(model, body=body) as head:
        yield partial(head, model)
