"""Text from text with a masked language model that was trained from sequence to sequence.

The target grows by a mask token at its end, which the model predicts and which gives way to the prediction. A stock encoder has
no cache of keys and values, so each step reads the row anew; its head runs at the mask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.masking import Vocabulary
from hf_pretrain.data import draws
from hf_pretrain.data.examples.lm_modes import LMMode, mode_token_types
from hf_pretrain.data.examples.sentence_pairs import PairTemplate
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating, longest_sequence, num_token_types, refuse_shifted
from hf_pretrain.modeling.losses import GatheredHead, sample_tokens
from hf_pretrain.modeling.visibility.lm_modes import lm_mode_inputs

_NEVER = float("-inf")


class GeneratedText(NamedTuple):
    """What a model wrote.

    Attributes:
        text: The text.
        token_ids: Its tokens.
        score: Log-probability of its tokens and, where it ended by itself, of its end; nats.
        has_ended: Whether it ended by itself, before it was cut.
    """

    text: str
    token_ids: list[int]
    score: float
    has_ended: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[GeneratedText]:
    """Write a text for each source: the likeliest token at a time, by beam search, or by sampling.

    What is written for a source does not depend on the other sources, but for rounding; what is sampled depends on the seed and
    the number of the source among them.

    Args:
        model: A stock masked language model, trained with `sequence_to_sequence` among its objectives.
        tokenizer: Its tokenizer. The target ends with what it puts behind the second sequence of a pair.
        sources: Texts to start from; all are read at once.
        max_new_tokens: Most tokens of a target, its end included.
        num_beams: Targets of each source that are followed at once. One of them takes the likeliest token each time, so that no
            search ends worse than without beams; of the others, one that has ended stays until better ones replace it.
        length_penalty: Targets are compared by their log-probability over their length to this power; 0 compares the
            log-probabilities.
        do_sample: Draw each token from the model's distribution instead.
        temperature: Divides the logits of what is sampled.
        seed: Of the sampling.

    Returns:
        The best target of each source, in their order.

    Raises:
        InputError: If an option is out of range, a source is empty or too long, the tokenizer has no mask token or no template
            for pairs, or the model cannot read in this mode, or predicts a masked token at the position before it.

    Source:
        UniLM (Dong et al. 2019).
    """
    _check_options(max_new_tokens, num_beams=num_beams, do_sample=do_sample, temperature=temperature)
    refuse_shifted(model, option="model")
    if not sources:
        return []
    frame = _Frame.of(model, tokenizer)
    rows = _encode(sources, tokenizer, frame.template)
    longest = longest_sequence(model)
    for row, source in zip(rows, sources, strict=True):
        if longest is not None and len(row) + max_new_tokens > longest:
            raise InputError(
                f"source {source[:40]!r} has {len(row)} tokens, which with max_new_tokens={max_new_tokens} is more than the "
                f"{longest} positions of {type(model).__name__}: shorten one of the two"
            )
    uniforms = None
    if do_sample:
        keys = draws.row_keys(np.arange(len(rows)), seed=seed, stream="generate")
        # 24 bits fill a float32 exactly; rounding a finer number could give 1.
        bits = draws.bits(keys, max_new_tokens) >> np.uint64(40)
        uniforms = torch.from_numpy(bits.astype(np.float32) * np.float32(2**-24)).to(model.device)
    with evaluating(model), GatheredHead(model) as head:
        beams = _Beams.start(rows, num_beams=num_beams, room=max_new_tokens, device=model.device)
        for step in tqdm(range(max_new_tokens), desc="Writing", unit=" tokens", delay=2, disable=None, leave=False):
            active = (~beams.has_ended).any(dim=1).nonzero().squeeze(1)
            if not len(active):
                break
            part = beams.of_rows(active)
            log_probs = _next_log_probs(model, head, frame, part)
            if uniforms is not None:
                # The one beam goes on with the drawn token, as if there were no other.
                drawn = sample_tokens(log_probs[:, 0], uniforms[active, step], temperature=temperature)[:, None, None]
                log_probs = torch.full_like(log_probs, _NEVER).scatter(2, drawn, log_probs.gather(2, drawn))
            beams.put(active, part.extend(log_probs, end_id=frame.end_id, length_penalty=length_penalty))
    best = (beams.scores / beams.lengths**length_penalty).argmax(dim=1)
    return [beams.read(number, beam, tokenizer) for number, beam in enumerate(best.tolist())]


def _check_options(max_new_tokens: int, *, num_beams: int, do_sample: bool, temperature: float) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if do_sample and num_beams > 1:
        raise InputError(f"num_beams={num_beams} with do_sample=True: a sample has no beams, choose one of the two")
    if not temperature > 0:
        raise InputError(f"temperature={temperature} must be above 0; without do_sample the likeliest token is taken")


@dataclass(frozen=True)
class _Frame:
    """What stands around source and target.

    Attributes:
        template: Special tokens around the two.
        mask_id: Id of the mask token.
        end_id: Id of the token that ends a target.
        types: Token types of source and target; None if the model has none.
        barred: ``bool [V]``, the tokens that are never written.
    """

    template: PairTemplate
    mask_id: int
    end_id: int
    types: tuple[int, int] | None
    barred: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Frame:
        template = PairTemplate.of(tokenizer)
        # The unknown token stands for text that the tokenizer could not represent.
        vocabulary = Vocabulary.from_tokenizer(tokenizer, mask_unknown=False)
        if not template.suffix:
            raise InputError(
                f"tokenizer={type(tokenizer).__name__} puts nothing behind the second sequence of a pair, so no target "
                "could end; give it a post-processor with such a template, such as '[CLS] $A [SEP] $B:1 [SEP]:1'"
            )
        known = np.zeros(model.config.vocab_size, dtype=np.bool_)
        # Some vocabularies leave numbers out.
        known[[index for index in tokenizer.get_vocab().values() if index < len(known)]] = True
        known[: len(vocabulary.protected)] &= ~vocabulary.protected[: len(known)]
        barred = torch.from_numpy(~known)
        barred[template.suffix[-1]] = False
        num_types = num_token_types(model.config)
        types = mode_token_types(LMMode.SEQUENCE_TO_SEQUENCE, np.arange(2), type_vocab_size=num_types)
        return cls(
            template=template,
            mask_id=vocabulary.mask_id,
            end_id=template.suffix[-1],
            types=None if types is None else (int(types[0]), int(types[1])),
            barred=barred.to(model.device),
        )


def _encode(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: PairTemplate) -> list[list[int]]:
    """Return each source with the special tokens before and behind it."""
    encoded = tokenizer(list(sources), add_special_tokens=False)["input_ids"]
    for number, ids in enumerate(encoded):
        if not ids:
            raise InputError(f"source {number} ({sources[number]!r}) has no tokens to start from: leave it out")
    return [[*template.prefix, *ids, *template.middle] for ids in encoded]


@dataclass(frozen=True)
class _Beams:
    """Targets as they grow, B sources with K beams each; the last beam takes the likeliest token each time.

    Attributes:
        ids: ``[B, K, W]`` source and target, left-aligned.
        source_lengths: ``[B]``.
        lengths: ``[B, K]`` tokens of each target, its end included.
        scores: ``[B, K]`` log-probabilities.
        has_ended: ``bool [B, K]``.
    """

    ids: torch.Tensor
    source_lengths: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor
    has_ended: torch.Tensor

    @classmethod
    def start(cls, rows: Sequence[Sequence[int]], *, num_beams: int, room: int, device: torch.device) -> _Beams:
        """Begin with empty targets; all but the last beam of a source are not there yet."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        ids = F.pad(ids, (0, room))[:, None].repeat(1, num_beams, 1).to(device)
        scores = torch.full(ids.shape[:2], _NEVER, device=device)
        scores[:, -1] = 0
        lengths = torch.zeros_like(scores, dtype=torch.int64)
        source_lengths = torch.tensor([len(row) for row in rows], device=device)
        return cls(ids, source_lengths, lengths, scores, torch.zeros_like(scores, dtype=torch.bool))

    def of_rows(self, rows: torch.Tensor) -> _Beams:
        """Return a copy of some sources' beams."""
        return _Beams(*(tensor[rows] for tensor in self._tensors()))

    def put(self, rows: torch.Tensor, part: _Beams) -> None:
        """Write back what `of_rows` gave."""
        for tensor, new in zip(self._tensors(), part._tensors(), strict=True):
            tensor[rows] = new

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.source_lengths, self.lengths, self.scores, self.has_ended

    def extend(self, log_probs: torch.Tensor, *, end_id: int, length_penalty: float) -> _Beams:
        """Return beams with one more token, or as they are if they have ended: the best ones; log-probs ``[B, K, V]``."""
        # A beam that has ended goes on as it is: as if with its end, once.
        is_end = torch.arange(log_probs.shape[2], device=log_probs.device) == end_id
        log_probs = torch.where(self.has_ended[..., None], torch.where(is_end, 0.0, _NEVER), log_probs)
        totals = self.scores[..., None] + log_probs
        lengths = self.lengths + ~self.has_ended
        ranked = (totals / lengths[..., None] ** length_penalty).flatten(1)
        likeliest = ranked.shape[1] - log_probs.shape[2] + log_probs[:, -1].argmax(dim=1, keepdim=True)
        others = ranked.scatter(1, likeliest, _NEVER).topk(self.lengths.shape[1] - 1, dim=1).indices
        best = torch.cat([others, likeliest], dim=1)
        parents, tokens = best // log_probs.shape[2], best % log_probs.shape[2]
        scores, had_ended = totals.flatten(1).gather(1, best), self.has_ended.gather(1, parents)
        lengths, ids = self.lengths.gather(1, parents), self.ids.gather(1, parents[..., None].expand_as(self.ids))
        # Behind the end of a beam that had ended may be no room.
        columns = (self.source_lengths[:, None] + lengths).clamp(max=ids.shape[2] - 1)
        ids = torch.where(had_ended[..., None], ids, ids.scatter(2, columns[..., None], tokens[..., None]))
        # What is not there cannot be waited for.
        has_ended = had_ended | (tokens == end_id) | scores.isneginf()
        return _Beams(ids, self.source_lengths, lengths + ~had_ended, scores, has_ended)

    def read(self, number: int, beam: int, tokenizer: PreTrainedTokenizerBase) -> GeneratedText:
        """Return one of the targets of a source."""
        begin, has_ended = int(self.source_lengths[number]), bool(self.has_ended[number, beam])
        length = int(self.lengths[number, beam]) - has_ended
        token_ids = self.ids[number, beam, begin : begin + length].tolist()
        text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        return GeneratedText(text, token_ids, float(self.scores[number, beam]), has_ended)


def _next_log_probs(model: PreTrainedModel, head: GatheredHead, frame: _Frame, beams: _Beams) -> torch.Tensor:
    """Return the log-probabilities of each beam's next token, ``[B, K, V]``, among those that may be written."""
    num_rows, num_beams, _ = beams.ids.shape
    source_lengths_N = beams.source_lengths.repeat_interleave(num_beams)
    # The prediction at a beam that has ended is not used; its position must lie in the row.
    masked_N = (source_lengths_N + beams.lengths.flatten()).clamp(max=beams.ids.shape[2] - 1)
    width = int(masked_N.max()) + 1
    columns_W = torch.arange(width, device=masked_N.device)
    input_ids = beams.ids.flatten(0, 1)[:, :width].scatter(1, masked_N[:, None], frame.mask_id)
    types = {}
    if frame.types is not None:
        source_type, target_type = frame.types
        is_source_NW = columns_W < source_lengths_N[:, None]
        types["token_type_ids"] = torch.where(is_source_NW, source_type, target_type)
    inputs = lm_mode_inputs(
        model,
        input_ids=input_ids,
        attention_mask=(columns_W <= masked_N[:, None]).long(),
        lm_modes=torch.full_like(source_lengths_N, LMMode.SEQUENCE_TO_SEQUENCE),
        source_lengths=source_lengths_N,
        **types,
    )
    logits_NV = head(model, torch.arange(len(masked_N), device=masked_N.device) * width + masked_N, **inputs)
    log_probs_NV = logits_NV.float().masked_fill(frame.barred, _NEVER).log_softmax(dim=-1)
    return log_probs_NV.unflatten(0, (num_rows, num_beams))
