"""The likelihood of a continuation after a context, under every kind of language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, XLNetLMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.evaluation.likelihood.directions import BidirectionalLM, bidirectional_scores
from hf_pretrain.evaluation.metrics import batches_by_length, checked_texts, encode_texts
from hf_pretrain.evaluation.token_scores import (
    NO_WORD,
    Continuation,
    EncodedText,
    Hiding,
    HidingFrame,
    TokenScores,
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
from hf_pretrain.modeling.backbone import is_shifted, longest_sequence, longest_text
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.objectives.permutation_lm.modeling import PermutationLMForPreTraining
from hf_pretrain.objectives.permutation_lm.scoring import continuation_logits

logger = logging.get_logger(__name__)

Kind = Literal["causal", "masked", "permutation", "encoder-decoder", "bidirectional"]

# Tokens of all masked copies that are held at once.
_MOST_COPIED = 1 << 22
# Tokens read at a time by a model that has no longest input.
_USUAL_WINDOW = 1024
_NO_TOKENS = np.zeros(0, dtype=np.int64)


class ContinuationScores(NamedTuple):
    """How probable some continuations are.

    Attributes:
        log_likelihoods: ``float64 [N]``, the sum over the tokens of each, in nats.
        is_greedy: ``[N]``, whether each of its tokens is the most probable one.
        num_tokens: ``[N]``, tokens that were scored.
    """

    log_likelihoods: np.ndarray
    is_greedy: np.ndarray
    num_tokens: np.ndarray


class Request(NamedTuple):
    """Tokens to score and the tokens before them.

    Attributes:
        context: ``[C]`` tokens before.
        continuation: ``[T]`` tokens to score.
        words: ``[T]`` number of the word of each.
        characters: ``[C + T, K]`` characters of all, where they are read; by default those of the ids.
    """

    context: np.ndarray
    continuation: np.ndarray
    words: np.ndarray
    characters: np.ndarray | None = None


class LikelihoodScorer:
    """Scores continuations of contexts by any language model.

    - "causal": the log-likelihood of the continuation; also of an encoder that was trained on next tokens, with `left_to_right`.
    - "masked": its pseudo-log-likelihood: each token alone is masked, and the model sees the context and the other tokens.
    - "permutation": its log-likelihood from left to right; the context is seen in both directions.
    - "encoder-decoder": its log-likelihood in the decoder, with the context in the encoder. With `hiding` the encoder reads both
      as one text, and each token is hidden in turn as `denoising_log_likelihoods` does.
    - "bidirectional": the mean of its log-likelihoods in both directions; the backward model reads nothing of the context.

    Context and continuation are cut as lm-evaluation-harness does it, and the log-likelihoods of causal models are those of the
    harness. Spaces at the end of the context belong to the continuation. Both are tokenized in one piece, and the context has as
    many tokens as it has alone; an encoder-decoder reads two pieces. A context that is too long loses its first tokens.

    Args:
        model: A stock model, a `PermutationLMForPreTraining`, an `ElmoForPreTraining`, or a `BidirectionalLM`.
        tokenizer: Its tokenizer, a fast one. Names of special tokens in texts are text like any other.
        kind: The kind of model; found from its class by default.
        within_word: For masked tokens: whether the other tokens of a word are "visible", or with "l2r" those to the left alone.
        hiding: For an encoder-decoder: how a token is hidden in a text; by default the decoder writes the whole continuation.
        mode_token: For an encoder-decoder: a token that its input has before the text, such as UL2's "[S2S]".
        left_to_right: Make an encoder read from left to right, as a causal model.
        shifted: For masked tokens: whether one is predicted at the position before it; by default as the configuration says.
        batch_size: Sequences in a batch.

    Attributes:
        kind: The kind of model.
        longest: Tokens that the model reads at most; None if there is no end.

    Raises:
        InputError: If the model is not of this kind, an option has no effect on it, or a token that it needs is missing.

    Source: Brown et al. 2020, section 2.4 (causal); Salazar et al. 2020, "Masked Language Model Scoring"; Kauf and Ivanova 2023
        ("l2r"); Yang et al. 2019, section 2.2 (permutation); Peters et al. 2018, section 3.1 (both directions).
    """

    def __init__(
        self,
        model: PreTrainedModel | PermutationLMForPreTraining | BidirectionalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kind: Kind | None = None,
        within_word: WithinWord = "visible",
        hiding: Hiding | None = None,
        mode_token: str | None = None,
        left_to_right: bool = False,
        shifted: bool | None = None,
        batch_size: int = 64,
    ) -> None:
        check_choice(kind, (None, *get_args(Kind)), name="kind")
        check_choice(within_word, get_args(WithinWord), name="within_word")
        check_choice(hiding, (None, *get_args(Hiding)), name="hiding")
        check_range(batch_size, "[1, inf)", name="batch_size")
        if left_to_right and kind not in (None, "causal"):
            raise InputError(
                f"left_to_right=True reads as a causal model, but kind={kind!r}: leave out one of the two"
            )
        self.kind: Kind = kind or ("causal" if left_to_right else _kind_of(model))
        for name, value in (("hiding", hiding), ("mode_token", mode_token)):
            if value is not None and self.kind != "encoder-decoder":
                raise InputError(
                    f"{name}={value!r} is for an encoder-decoder, but the model is {self.kind}: leave it out"
                )
        if within_word == "l2r" and self.kind != "masked" and hiding is None:
            raise InputError("within_word='l2r' is for masked tokens: leave it out, or give an encoder-decoder hiding")
        if shifted is not None and self.kind != "masked":
            raise InputError(f"shifted={shifted} is for masked tokens, but the model is {self.kind}: leave it out")
        self.tokenizer, self.within_word, self.batch_size = tokenizer, within_word, batch_size
        self.left_to_right, self.shifted = left_to_right, shifted
        self._is_apart = self.kind == "encoder-decoder" and hiding is None
        self._prefix, self._suffix = _frame(tokenizer)
        # What the first token follows on, and whether a context is put behind it too.
        self._start, self._starts_always = _NO_TOKENS, False
        self._is_hidden_at_once = hiding is None
        self.model: Any = model
        self._set_up(hiding, mode_token)

    def _set_up(self, hiding: Hiding | None, mode_token: str | None) -> None:
        """Check the model, and find how long its inputs may be."""
        model, tokenizer = self.model, self.tokenizer
        self.longest: int | None = None
        num_special, self._read = (
            len(self._prefix) + len(self._suffix),
            getattr(self, f"_{self.kind.replace('-', '_')}"),
        )
        if self.kind == "bidirectional":
            self._set_up_directions()
            return
        if isinstance(model, BidirectionalLM) or _is_elmo(model):
            raise InputError(
                f"kind={self.kind!r} does not fit {type(model).__name__}, which has two directions: leave it out"
            )
        if self.kind == "permutation":
            if not isinstance(model, PermutationLMForPreTraining):
                mask_token_id = tokenizer.mask_token_id
                self.model = PermutationLMForPreTraining.from_model(model, mask_token_id=mask_token_id)
            model = self.model.model
        if (self.kind == "encoder-decoder") != bool(model.config.is_encoder_decoder):
            is_one = "is an" if model.config.is_encoder_decoder else "is no"
            raise InputError(
                f"kind={self.kind!r}, but {type(model).__name__} {is_one} encoder-decoder: leave kind out"
            )
        check_model_fits(model, tokenizer, block_size=0)
        parts = (model.get_encoder(), model.get_decoder()) if self.kind == "encoder-decoder" else (model,)
        self.longest = min((found for part in parts if (found := longest_sequence(part)) is not None), default=None)
        if self.kind == "masked":
            check_masked(model, tokenizer)
            self.shifted = is_shifted(model) if self.shifted is None else self.shifted
        elif self.kind == "encoder-decoder":
            hiding = hiding or "rest"
            self._hiding_frame = HidingFrame.of(model, tokenizer, hiding=hiding, mode_token=mode_token)
            num_special += len(self._hiding_frame.mode)
        elif self.kind == "causal":
            (check_left_to_right if self.left_to_right else check_causal)(model, tokenizer)
            self.longest = longest_text(model)
            begin, is_framed = text_beginning(model, tokenizer)
            self._starts_always = not is_framed or len(self._prefix) > 0
            own = np.array([] if begin is None else [begin], dtype=np.int64)
            self._start = self._prefix if is_framed and len(self._prefix) else own
            # The last token is not read.
            num_special = -1
        self._special = num_special

    def _set_up_directions(self) -> None:
        """Check a model of two directions; each end of a text needs a token."""
        if not isinstance(self.model, BidirectionalLM):
            if not _is_elmo(self.model):
                raise InputError(
                    f"model={type(self.model).__name__} has one direction: give a BidirectionalLM, or another kind"
                )
            check_model_fits(self.model, self.tokenizer, block_size=0)
        self._prefix, self._suffix = (
            part if len(part) else _separator(self.tokenizer) for part in (self._prefix, self._suffix)
        )
        self._special = len(self._prefix) + len(self._suffix)

    def score(self, pairs: Sequence[tuple[str, str]]) -> ContinuationScores:
        """Score texts.

        Args:
            pairs: Context and continuation of each; the context may be empty. Equal pairs are scored once.

        Returns:
            Their scores, in this order.

        Raises:
            InputError: If a continuation has no token of its own or is too long, or nothing stands before it.
        """
        known = {pair: number for number, pair in enumerate(dict.fromkeys(map(tuple, pairs)))}
        scores = self.score_tokens(self.requests(list(known)))  # type: ignore[arg-type]
        chosen = np.array([known[tuple(pair)] for pair in pairs], dtype=np.int64)
        return ContinuationScores(*(value[chosen] for value in scores))

    def requests(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Cut pairs of texts into tokens; see [`score`]."""
        moved = [_move_spaces(context, continuation) for context, continuation in pairs]
        contexts = checked_texts([context for context, _ in moved])
        continuations = checked_texts([continuation for _, continuation in moved])
        distinct = list(dict.fromkeys(contexts))
        encoded = encode_texts(self.tokenizer, distinct, add_special_tokens=False)["input_ids"] if distinct else []
        ids_of = {text: np.array(ids, dtype=np.int64) for text, ids in zip(distinct, encoded, strict=True)}
        joined = continuations if self._is_apart else [context + text for context, text in moved]
        found = []
        for context, continuation, text in zip(
            contexts, continuations, encode_words(self.tokenizer, joined), strict=True
        ):
            tokens, words = text.ids[text.scored], text.words[text.scored]
            cut = 0 if self._is_apart else len(ids_of[context])
            if len(tokens) <= cut:
                raise InputError(
                    f"continuation {continuation!r} has no token of its own: begin it with a space, or leave it out"
                )
            before = ids_of[context] if self._is_apart else tokens[:cut]
            before = self.begun(before)
            if self.kind == "causal" and not len(before):
                self._refuse_no_start()
            characters = None if text.characters is None or self._is_apart else text.characters[text.scored]
            found.append(Request(before, tokens[cut:], words[cut:], characters))
        return found

    def begun(self, context: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return a context ``[C]`` with what begins a text under a causal model, if anything does."""
        ids = np.asarray(context, dtype=np.int64)
        return np.concatenate([self._start, ids]) if self._starts_always or not len(ids) else ids

    def most_stride(self, window: int) -> int:
        """Return the tokens that a window can score at most."""
        return window if self.kind == "causal" else window - self._special

    def _refuse_no_start(self) -> None:
        """Refuse to score the first token of a text that follows on nothing."""
        name = type(self.tokenizer).__name__
        raise InputError(f"tokenizer={name} has no token that begins a text: set its bos_token, or give a context")

    def score_tokens(self, requests: Sequence[Request]) -> ContinuationScores:
        """Score tokens; see [`score`].

        Args:
            requests: What to score. The context of a causal model has what begins a text, if anything; other special tokens are
                added here.
        """
        requests = self._shortened(requests)
        log_likelihoods, is_greedy = sum_scores(self._read(requests), len(requests))
        num_tokens = np.array([len(request.continuation) for request in requests], dtype=np.int64)
        return ContinuationScores(log_likelihoods, is_greedy, num_tokens)

    def _shortened(self, requests: Sequence[Request]) -> list[Request]:
        """Return what fits the model: the first tokens of contexts are left out, with a warning."""
        if self.longest is None:
            return list(requests)
        room, kept, num_cut = self.longest - self._special, [], 0
        for request in requests:
            length = len(request.continuation)
            if length > (self.longest if self._is_apart or self.kind == "causal" else room):
                raise InputError(
                    f"a continuation has {length} tokens, more than the model reads at once ({self.longest} with special ones): "
                    "score it by rolling_perplexity"
                )
            first = max(0, len(request.context) - room + (0 if self._is_apart else length))
            num_cut += first > 0
            kept.append(request._replace(context=request.context[first:]))
        if num_cut:
            logger.warning(
                f"{num_cut} of {len(kept)} contexts are too long for the {self.longest} positions of the model: they lose their "
                "first tokens; give fewer shots or shorter contexts"
            )
        return kept

    def _framed(self, requests: Sequence[Request]) -> list[EncodedText]:
        """Return whole texts with their special tokens, of which the continuations are to be scored."""
        texts = []
        for context, continuation, words, characters in requests:
            parts = (self._prefix, context, continuation, self._suffix)
            begin, end = len(parts[0]) + len(context), len(parts[0]) + len(context) + len(continuation)
            known = np.full(end + len(self._suffix), NO_WORD)
            known[len(self._prefix) : begin], known[begin:end] = -1, words
            letters = None if characters is None else self._spelled(characters)
            texts.append(EncodedText(np.concatenate(parts), np.arange(begin, end), known, letters))
        return texts

    def _spelled(self, characters: np.ndarray) -> np.ndarray:
        """Return the characters of a text with those of the special tokens around it."""
        ends = (
            [self.tokenizer.token_characters(int(token)) for token in part] for part in (self._prefix, self._suffix)
        )
        prefix, suffix = (np.array(rows, dtype=np.int16).reshape(len(rows), characters.shape[1]) for rows in ends)
        return np.concatenate([prefix, characters, suffix])

    def _causal(self, requests: Sequence[Request]) -> Iterator[TokenScores]:
        parts = [
            Continuation(np.concatenate([request.context, request.continuation[:-1]]), request.continuation)
            for request in requests
        ]
        return causal_scores(
            self.model, self.tokenizer, parts, batch_size=self.batch_size, left_to_right=self.left_to_right
        )

    def _masked(self, requests: Sequence[Request]) -> Iterator[TokenScores]:
        texts = self._framed(requests)
        if self.shifted:
            check_shifted(self.tokenizer, texts)
        order = np.argsort([-len(text.ids) for text in texts], kind="stable")
        copied = np.cumsum([len(texts[index].ids) * len(texts[index].scored) for index in order])
        for portion in np.split(order, np.flatnonzero(np.diff(copied // _MOST_COPIED)) + 1):
            for scores in masked_scores(
                self.model,
                self.tokenizer,
                [texts[index] for index in portion],
                within_word=self.within_word,
                batch_size=self.batch_size,
                shifted=bool(self.shifted),
            ):
                yield scores._replace(owner=portion[scores.owner])

    def _permutation(self, requests: Sequence[Request]) -> Iterator[TokenScores]:
        texts = self._framed(requests)
        for rows, _ in self._batches(texts):
            part = [texts[row] for row in rows]
            logits_TV = continuation_logits(self.model, [text.ids for text in part], [text.scored for text in part])
            targets = np.concatenate([text.ids[text.scored] for text in part])
            yield TokenScores.of(np.repeat(rows, [len(text.scored) for text in part]), logits_TV, targets)

    def _encoder_decoder(self, requests: Sequence[Request]) -> Iterator[TokenScores]:
        owners, questions = [], []
        for owner, text in enumerate(self._framed(requests)):
            whole = [(int(text.scored[0]), int(text.scored[-1]) + 1)]
            for run in whole if self._is_hidden_at_once else hidden_runs(text, self.within_word):
                owners.append(owner)
                questions.append(self._hiding_frame.hide(text, *run))
        return denoising_scores(
            self.model,
            self.tokenizer,
            questions,
            np.array(owners, dtype=np.int64),
            only_targets=self._hiding_frame.hiding == "fragment",
            batch_size=self.batch_size,
        )

    def _bidirectional(self, requests: Sequence[Request]) -> Iterator[TokenScores]:
        return bidirectional_scores(self.model, self.tokenizer, self._framed(requests), batch_size=self.batch_size)

    def _batches(self, texts: Sequence[EncodedText]) -> Iterator[tuple[np.ndarray, Any]]:
        pad_token_id = self.tokenizer.pad_token_id
        return batches_by_length(
            [text.ids for text in texts],
            pad_token_id=pad_token_id,
            batch_size=self.batch_size,
            name="Scoring",
        )

    def rolling(
        self, texts: Sequence[str], *, window: int | None = None, stride: int | None = None
    ) -> ContinuationScores:
        """Score whole texts in windows; see `rolling_perplexity`.

        Args:
            texts: The texts.
            window: Tokens read at once.
            stride: Tokens by which the window moves.
        """
        window = window or self.longest or _USUAL_WINDOW
        least = max(1, len(self._start)) if self.kind == "causal" else self._special + 1
        check_range(window, f"[{least}, {self.longest or 'inf'}{']' if self.longest else ')'}", name="window")
        room = window - self._special
        most = self.most_stride(window)
        stride = min(max(1, window // 2), most) if stride is None else stride
        check_range(stride, f"[1, {most}]", name="stride", hint="each token is to be read in some window")
        owners, requests = [], []
        for number, text in enumerate(encode_words(self.tokenizer, checked_texts(texts))):
            ids, words = np.concatenate([self._start, text.ids[text.scored]]), text.words[text.scored]
            first = len(self._start)
            characters = None if text.characters is None or first else text.characters[text.scored]
            if self.kind == "causal" and not first:
                self._refuse_no_start()
            for read, begin, end in _windows(first, len(ids), room=room, stride=stride):
                owners.append(number)
                part = slice(begin - first, end - first)
                letters = None if characters is None else characters[read:end]
                requests.append(Request(ids[read:begin], ids[begin:end], words[part], letters))
        found = self.score_tokens(requests)
        sums, is_greedy, num_tokens = np.zeros(len(texts)), np.ones(len(texts), bool), np.zeros(len(texts), np.int64)
        np.add.at(sums, owners, found.log_likelihoods)
        np.logical_and.at(is_greedy, owners, found.is_greedy)
        np.add.at(num_tokens, owners, found.num_tokens)
        return ContinuationScores(sums, is_greedy, num_tokens)


def _kind_of(model: Any) -> Kind:
    """Return the kind of a model by its class."""
    name = type(model).__name__
    if isinstance(model, BidirectionalLM) or _is_elmo(model):
        return "bidirectional"
    if isinstance(model, (PermutationLMForPreTraining, XLNetLMHeadModel)):
        return "permutation"
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    return "masked" if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM") else "causal"


def _is_elmo(model: Any) -> bool:
    """Whether a model is ELMo with its softmax, whose class may come from the code of an export."""
    return type(model).__name__ == "ElmoForPreTraining"


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Return the special tokens that a tokenizer puts before and behind a text."""
    (text,) = encode_words(tokenizer, ["a"])
    ids = text.ids.astype(np.int64)
    return (ids[: text.scored[0]], ids[text.scored[-1] + 1 :]) if len(text.scored) else (ids, ids[:0])


def _separator(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return what stands at an end of a text where the tokenizer puts nothing."""
    known = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    found = next((token for token in known if token is not None), None)
    if found is None:
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} has no token for the ends of a text: set its eos_token"
        )
    return np.array([found], dtype=np.int64)


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move the spaces at the end of a context to the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _windows(first: int, length: int, *, room: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield where each window begins, where what it scores begins, and where it ends."""
    begin, end = first, min(length, room)
    while begin < length:
        yield max(0, end - room), begin, end
        begin, end = end, min(length, end + stride)
