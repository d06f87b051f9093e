"""Show what a discriminator has learned: held-out sentences with one wrong word each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.packing import BlockDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.data.token_store import TokenStore
from hf_pretrain.data.words import word_starts
from hf_pretrain.evaluation.suspicion import ReplacedTokenScorer
from hf_pretrain.objectives.replaced_token_detection.trainer import ReplacedTokenDetectionTrainer
from hf_pretrain.training.report import coloured_words

_WORDS = range(8, 21)
_SHORTEST = 4


class WrongWord(NamedTuple):
    """A sentence in which one word was exchanged.

    Attributes:
        text: The sentence with the wrong word.
        place: Number of the wrong word among the sentence's words.
        original: The word that stood there.
    """

    text: str
    place: int
    original: str


def wrong_word_sentences(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, *, count: int = 3, seed: int = 0
) -> list[WrongWord]:
    """Take sentences of 8 to 20 words, mostly of letters, and exchange one word of each for one from elsewhere in the text.

    Args:
        store: Tokenized text.
        tokenizer: Its tokenizer.
        count: How many sentences; fewer are returned where the text has fewer.
        seed: Seed of the choice.
    """
    bounds = np.append(np.flatnonzero(store.sent_starts(0, store.num_tokens)), store.num_tokens)
    found: list[WrongWord] = []
    for sentence in draws.permutation(len(bounds) - 1, seed=seed, stream="sentences").tolist():
        keys = draws.row_keys([sentence], seed=seed, stream="wrong word")
        wrong = _exchange(
            store, tokenizer, int(bounds[sentence]), int(bounds[sentence + 1]), draws.uniforms(keys, 2)[0]
        )
        if wrong is not None:
            found.append(wrong)
        if len(found) == count:
            break
    return found


def _exchange(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, start: int, stop: int, uniforms: np.ndarray
) -> WrongWord | None:
    text = tokenizer.decode(store.read(start, stop)[0].tolist()).strip()
    begins = [*word_starts(text).tolist(), len(text)]
    words = [text[a:b].rstrip() for a, b in zip(begins, begins[1:], strict=False)]
    candidates = [i for i, word in enumerate(words) if word.isalpha() and len(word) >= _SHORTEST]
    is_prose = sum(map(str.isalpha, words)) >= 0.8 * len(words)
    if len(words) not in _WORDS or not is_prose or not candidates:
        return None
    index = candidates[int(uniforms[0] * len(candidates))]
    other = _word_at(store, tokenizer, int(uniforms[1] * store.num_tokens))
    if other is None or other.lower() == words[index].lower():
        return None
    begin = begins[index]
    return WrongWord(text[:begin] + other + text[begin + len(words[index]) :], index, words[index])


def _word_at(store: TokenStore, tokenizer: PreTrainedTokenizerBase, position: int) -> str | None:
    """Return the first whole word after a position, if it is one to exchange."""
    ids, starts = store.read(position, min(position + 20, store.num_tokens))
    begins = np.flatnonzero(starts)
    if len(begins) < 2:
        return None
    word = tokenizer.decode(ids[begins[0] : begins[1]].tolist()).strip()
    return word if word.isalpha() and len(word) >= _SHORTEST else None


def print_suspicions(trainer: ReplacedTokenDetectionTrainer, data: PreparedData) -> None:
    """Print held-out sentences with one wrong word each, every word coloured by how suspicious the discriminator finds it."""
    if not isinstance(data.eval_dataset, BlockDataset):
        return
    sentences = wrong_word_sentences(data.eval_dataset.store, data.tokenizer, seed=trainer.args.seed)
    if not sentences:
        return
    print("\nHeld-out sentences with one wrong word each; the redder, the more suspicious:")
    model = trainer.model
    scorer = ReplacedTokenScorer(model.discriminator, data.tokenizer, head=model.discriminator_head)
    for sentence, words in zip(sentences, scorer([sentence.text for sentence in sentences]), strict=True):
        wrong = words[sentence.place]
        rank = 1 + sum(word.score > wrong.score for word in words)
        print(f"  {coloured_words([(word.word, word.score) for word in words])}")
        print(
            f"    {wrong.word!r} instead of {sentence.original!r}: probability {wrong.score:.2f}, rank {rank} of "
            f"{len(words)} words"
        )
