"""Static vectors of an encoder: what it makes of each token alone, reduced and weighted.

[`distil_vectors`] runs the encoder once over its own vocabulary, or over given words. The mean of these vectors over a text then
stands for the encoder's vector of it: much faster, and less exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.decomposition import PCA
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.vectors.folder import WordVectors

Weighting = Literal["sif", "zipf", "none"]
WEIGHTINGS = ("sif", "zipf", "none")

# Rows of a vocabulary that no text was ever cut into, such as BERT's [unused0].
_UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")
# A text that every tokenizer cuts into something, to see which special tokens stand around it.
_PROBE = "a"


@dataclass(frozen=True)
class DistilledVectors:
    """What [`distil_vectors`] returns.

    Attributes:
        words: The words; without words of one's own, the encoder's tokens by their ids.
        vectors: ``float32 [V, D]`` a row a word, weights multiplied in. Without words of one's own, row i is token id i; special
            tokens, tokens such as `[unused0]`, and ids without a token have rows of zeros.
        weights: ``float32 [V]`` weight of each word; 0 for rows that are zero.
        explained_variance: Share of the variance that the reduction keeps; 1 without one.
        tokenizer: Cuts a text into the encoder's tokens without special ones; None for words of one's own.
    """

    words: tuple[str, ...]
    vectors: np.ndarray
    weights: np.ndarray
    explained_variance: float
    tokenizer: Tokenizer | None

    def to_word_vectors(self) -> WordVectors:
        """Return the vectors of all tokens but special ones, to be saved; the weights are in the vectors."""
        if self.tokenizer is None:
            return WordVectors(words=self.words, vectors=self.vectors)
        special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        names = self.tokenizer.get_vocab()
        special |= {names[name] for name in ("[PAD]", "[UNK]") if name in names}
        rows = sorted(set(names.values()) - special)
        words = tuple(self.words[row] for row in rows)
        return WordVectors(words=words, vectors=self.vectors[rows], tokenizer=self.tokenizer)


def distil_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    words: Sequence[str] | None = None,
    dimensions: int | None = 256,
    weighting: Weighting = "sif",
    counts: Sequence[int] | np.ndarray | None = None,
    sif_coefficient: float = 1e-4,
    device: str | torch.device | None = None,
    batch_size: int = 256,
) -> DistilledVectors:
    """Make static vectors from an encoder.

    Each token, between the special tokens of its own sequence, goes through the encoder; its vector is the last state at its own
    position. A word is the mean of the states of its tokens. Then follow a principal component analysis and a weight a word:
    frequent words count little in the mean of a text.

    Args:
        model: A stock encoder, with a head or without; the head is not used.
        tokenizer: Its tokenizer.
        words: Words to make vectors of, from frequent to rare. By default all tokens of the tokenizer.
        dimensions: Width D of the vectors; None keeps the encoder's width.
        weighting: "sif" is a / (a + p) with the share p of a word in text; "zipf" is ln(1 + rank); "none" is 1.
        counts: ``[V]`` how often each word, or each token by its id, occurs in text. Without counts, the order of the words
            or ids is their rank r from 1, and p is proportional to 1 / r.
        sif_coefficient: The a of "sif".
        device: Where the encoder is moved to; by default it stays where it is.
        batch_size: Sequences in a batch.

    Returns:
        The vectors, see [`DistilledVectors`].

    Raises:
        InputError: If there are fewer words or states than dimensions, a word is empty or given twice, counts do not fit, or the
            model lacks ids of the tokenizer.

    Source:
        Weights: Arora, Liang and Ma, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017, algorithm 1.
        Vectors of tokens: Tulkens and van Dongen, "Model2Vec", 2024.
    """
    check_choice(weighting, WEIGHTINGS, name="weighting")
    check_range(batch_size, "[1, inf)", name="batch_size")
    check_range(sif_coefficient, "(0, inf)", name="sif_coefficient")
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    check_model_fits(encoder, tokenizer, block_size=1)
    if device is not None:
        encoder.to(device)
    if words is None:
        names, rows = _tokens(tokenizer)
        before, after = _frame(tokenizer)
        sequences = [[*before, token, *after] for token in rows.tolist()]
        inside = [[len(before)]] * len(rows)
    else:
        names, rows = tuple(words), np.arange(len(words))
        sequences, inside = _word_sequences(tokenizer, names)
    weights = np.zeros(len(names), dtype=np.float32)
    weights[rows] = _weights(weighting, counts, names, rows, a=sif_coefficient)
    _check_dimensions(dimensions, len(rows), encoder.config.hidden_size)
    states = _mean_states(encoder, sequences, inside, batch_size=batch_size)
    reduced, explained = _reduced(states, dimensions)
    vectors = np.zeros((len(names), reduced.shape[1]), dtype=np.float32)
    vectors[rows] = reduced * weights[rows, None]
    return DistilledVectors(names, vectors, weights, explained, bare_tokenizer(tokenizer) if words is None else None)


def bare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a tokenizer that cuts a text into the same tokens, and adds no special token, no padding and no cut."""
    specification = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(
        json.dumps(specification | {"post_processor": None, "padding": None, "truncation": None})
    )


def ids_of_special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special tokens, those that were added as such included."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], np.ndarray]:
    """Return all tokens by their ids, and the ids that get a vector, ``int64 [N]``."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    left_out = ids_of_special_tokens(tokenizer) | {
        number for number, token in names.items() if _UNUSED.fullmatch(token)
    }
    every = tuple(names.get(number, f"<no token {number}>") for number in range(max(names) + 1))
    return every, np.array(sorted(names.keys() - left_out), dtype=np.int64)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a text."""
    encoding = tokenizer(_PROBE, return_special_tokens_mask=True)
    inside = [place for place, special in enumerate(encoding["special_tokens_mask"]) if not special]
    return encoding["input_ids"][: inside[0]], encoding["input_ids"][inside[-1] + 1 :]


def _word_sequences(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of each word with special tokens, and the places of its own tokens."""
    seen: set[str] = set()
    for number, word in enumerate(words):
        if word in seen:
            raise InputError(f"words[{number}]={word!r} is given twice: leave one out")
        seen.add(word)
    encoding = tokenizer(list(words), return_special_tokens_mask=True) if words else {}
    masks = encoding.get("special_tokens_mask", [])
    inside = [[place for place, special in enumerate(mask) if not special] for mask in masks]
    empty = next((number for number, places in enumerate(inside) if not places), None)
    if empty is not None:
        raise InputError(f"words[{empty}]={words[empty]!r} has no token, and so no vector: leave it out")
    return encoding.get("input_ids", []), inside


def _mean_states(
    encoder: PreTrainedModel, sequences: Sequence[Sequence[int]], inside: Sequence[Sequence[int]], *, batch_size: int
) -> np.ndarray:
    """Return the mean of the last states at the places `inside` of each sequence, ``float32 [N, H]``."""
    lengths = np.array([len(sequence) for sequence in sequences])
    # A batch is of one length: nothing is padded.
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    means = np.empty((len(sequences), encoder.config.hidden_size), dtype=np.float32)
    with evaluating(encoder):
        for batch in tqdm(batches, desc="Encoding words", unit=" batches", delay=2, disable=None):
            input_ids = torch.tensor([sequences[number] for number in batch], device=encoder.device)
            is_inside = np.zeros(input_ids.shape, dtype=np.float32)
            for row, number in enumerate(batch):
                is_inside[row, inside[number]] = 1 / len(inside[number])
            states = encoder(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
            share = torch.from_numpy(is_inside).to(encoder.device)
            means[batch] = torch.einsum("bld,bl->bd", states.float(), share).cpu().numpy()
    return means


def _check_dimensions(dimensions: int | None, num_words: int, width: int) -> None:
    if dimensions is None:
        return
    check_range(dimensions, "[1, inf)", name="dimensions")
    most = min(num_words, width)
    if dimensions > most:
        which = f"the encoder is {width} wide" if width <= num_words else f"there are {num_words} words"
        raise InputError(f"dimensions={dimensions} must be at most {most}, because {which}")


def _reduced(states: np.ndarray, dimensions: int | None) -> tuple[np.ndarray, float]:
    """Return the states on their first principal components, and the share of variance that these keep."""
    if dimensions is None:
        return states, 1.0
    analysis = PCA(n_components=dimensions, svd_solver="covariance_eigh")
    reduced = analysis.fit_transform(states.astype(np.float64))
    return reduced.astype(np.float32), float(analysis.explained_variance_ratio_.sum())


def _weights(
    weighting: str, counts: Sequence[int] | np.ndarray | None, names: Sequence[str], rows: np.ndarray, *, a: float
) -> np.ndarray:
    """Return the weight of each word that gets a vector, ``float64 [N]``."""
    ranks = np.arange(1, len(rows) + 1, dtype=np.float64)
    shares = 1 / ranks
    if counts is not None:
        counted = np.asarray(counts, dtype=np.float64)
        if counted.shape != (len(names),) or counted.min(initial=0) < 0 or not counted[rows].sum():
            raise InputError(
                f"counts of shape {counted.shape} must be {len(names)} numbers of at least 0, one a word, and not all 0"
            )
        shares = counted[rows]
        ranks[np.argsort(-shares, kind="stable")] = np.arange(1, len(rows) + 1)
    if weighting == "sif":
        return a / (a + shares / shares.sum())
    return np.log1p(ranks) if weighting == "zipf" else np.ones(len(rows))
