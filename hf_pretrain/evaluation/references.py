"""What a language model must beat: counts of tokens and of pairs of neighbours, and for denoising models a rule that copies.

`reference_losses` reads collated batches of pairs. `TokenCounts` holds the counts of the training targets, by token and by pair
of neighbours, and gives probabilities that sum to one. `copied_tokens` is the rule. The counts of pairs and the rule read the
previous target, as the decoder does. The counts do not read the input, and the rule knows nothing of the training text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_range
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.training.program import print_table

MOST_COUNTED, MOST_SCORED = 1_000_000, 200_000
"""Targets of the training text that are counted, and of the held-out text that are scored."""
# Examples that are collated at once.
_READ = 64
# Pairs that wait to be merged into the counts; they bound the memory beside the distinct pairs themselves.
_MOST_WAITING = 1 << 20


def reference_losses(
    train_batches: Iterable[Mapping[str, Any]], held_out_batches: Iterable[Mapping[str, Any]], *, vocab_size: int
) -> dict[str, float]:
    """Return what counts of tokens and a rule that copies reach on held-out pairs.

    Each number is over all targets, and under the same name with `hidden_` before it over those that the input does not show.
    The counts are always of all training targets: a model too does not know which targets are hidden, and spends probability
    on the others.

    Args:
        train_batches: Batches of pairs to count, each read once. A batch has `decoder_input_ids` and `labels`, ``[B, T]``, as
            NumPy arrays or tensors on the CPU. A label of -100 is no target; a decoder input of -1 is the model's start token.
        held_out_batches: Batches to score, each read once, which have `is_hidden` ``[B, T]``, `input_ids` and `attention_mask`
            ``[B, L]`` besides. Where `document_ids` ``[B, L]`` and `decoder_document_ids` ``[B, T]`` say that a row holds several
            pairs, a target is copied from its own input alone.
        vocab_size: Number of token ids.

    Returns:
        `unigram_nll`: mean of -log p(target) in nats, by the counts of tokens; `bigram_nll`: of -log p(target | previous token),
        by the counts of pairs, see [`TokenCounts`]; `copy_accuracy`: share of the targets that the rule guesses, see
        [`copied_tokens`]. Then the three with `hidden_`, unless no target is hidden.

    Raises:
        InputError: If there are no targets to count or to score, or an id is not below `vocab_size`.
    """
    counts = TokenCounts(vocab_size)
    for batch in train_batches:
        counts.add(*_targets(batch, vocab_size)[:2])
    if not counts.num_targets:
        raise InputError("train_batches has no target to count: give at least one batch with a label")
    unigram = counts.unigram()
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in held_out_batches:
        previous, targets, is_hidden = _targets(batch, vocab_size, with_hidden=True)
        scores = {
            "unigram_nll": -np.log(unigram[targets]),
            "bigram_nll": -np.log(counts.bigram(previous, targets)),
            "copy_accuracy": _is_copied(batch),
        }
        for name, values in scores.items():
            sums[name] += float(values.sum())
            sums[f"hidden_{name}"] += float(values[is_hidden].sum())
        sums["targets"] += len(targets)
        sums["hidden targets"] += int(is_hidden.sum())
    if not sums["targets"]:
        raise InputError("held_out_batches has no target to score: give at least one batch with a label")
    names = ("unigram_nll", "bigram_nll", "copy_accuracy")
    means = {name: sums[name] / sums["targets"] for name in names}
    if sums["hidden targets"]:
        means |= {f"hidden_{name}": sums[f"hidden_{name}"] / sums["hidden targets"] for name in names}
    return means


class TokenCounts:
    """Counts of tokens and of pairs of neighbours, and the probabilities that they give; memory grows with the distinct pairs.

    The unigram adds one to each count: p(w) = (c(w) + 1) / (n + V). The bigram is Witten's and Bell's: with c(v, w) the count of
    w behind v, c(v) the sum over w, and t(v) the number of different tokens behind v,

        p(w | v) = (c(v, w) + t(v) p(w)) / (c(v) + t(v)),

    and p(w) behind a token that was never seen before another. Both sum to one over the vocabulary, whatever was counted; there
    is no weight to choose.

    Args:
        vocab_size: V, the number of token ids.

    Source: Witten and Bell 1991, "The Zero-Frequency Problem: Estimating the Probabilities of Novel Events in Adaptive Text
        Compression", method C.
    """

    def __init__(self, vocab_size: int) -> None:
        check_range(vocab_size, "[1, inf)", name="vocab_size")
        self.vocab_size = vocab_size
        self._tokens = np.zeros(vocab_size, dtype=np.int64)
        # Of each pair that was seen, its code in ascending order, and its count.
        self._codes = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []

    @property
    def num_targets(self) -> int:
        """Tokens that were counted."""
        return int(self._tokens.sum())

    def add(self, previous: np.ndarray, targets: np.ndarray) -> None:
        """Count targets, ``int64 [N]``, and the token before each, ``int64 [N]``, -1 at the beginning."""
        self._tokens += np.bincount(targets, minlength=self.vocab_size)
        self._waiting.append(self._codes_of(previous, targets))
        if sum(map(len, self._waiting)) > _MOST_WAITING:
            self._merge()

    def unigram(self) -> np.ndarray:
        """Return the probability of each token, ``float64 [V]``."""
        return (self._tokens + 1) / (self.num_targets + self.vocab_size)

    def bigram(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the probability of each target behind the token before it, ``float64 [N]``."""
        self._merge()
        contexts = self._codes // self.vocab_size
        total = np.bincount(contexts, weights=self._counts, minlength=self.vocab_size + 1)[previous + 1]
        different = np.bincount(contexts, minlength=self.vocab_size + 1)[previous + 1]
        codes = self._codes_of(previous, targets)
        at = np.searchsorted(self._codes, codes)
        # Behind the last code is none.
        found = np.append(self._codes, -1)[at] == codes
        seen = np.where(found, np.append(self._counts, 0)[at], 0)
        unigram = self.unigram()[targets]
        return np.where(total > 0, (seen + different * unigram) / np.maximum(total + different, 1), unigram)

    def _codes_of(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return a number for each pair, that of the token before it times V and the target's."""
        return (previous + 1) * self.vocab_size + targets

    def _merge(self) -> None:
        if not self._waiting:
            return
        codes, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting = []
        self._codes, at = np.unique(np.concatenate([self._codes, codes]), return_inverse=True)
        # Whole numbers are exact in these sums.
        self._counts = np.bincount(at, weights=np.concatenate([self._counts, counts])).astype(np.int64)


def copied_tokens(input_ids: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Return the targets of one pair as a reader would guess them who moves a finger along the input.

    The first guess is the first token of the input. For each further one, the finger looks for the previous target token: in the
    place of the last guess, then to its right, then from the beginning. It moves to the token behind the first one that it finds,
    behind the last token of the input to the first. Where the input has no such token it stays. The guess is the token under it.

    A text that is only cut into parts and put into another order is guessed but for the beginnings of the parts, as long as no
    token is there twice.

    Args:
        input_ids: ``[L]`` what the encoder reads of this pair, without padding.
        previous: ``[T]`` the true token before each target; the first is not used.

    Returns:
        ``[T]`` guesses.
    """
    tokens = input_ids.tolist()
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, token in enumerate(tokens):
        places[token].append(place)
    guesses, finger = [], 0
    for number, token in enumerate(previous.tolist()):
        found = places.get(token) if number else None
        if found:
            nearest = bisect_left(found, finger)
            finger = (found[nearest if nearest < len(found) else 0] + 1) % len(tokens)
        guesses.append(tokens[finger])
    return np.array(guesses, dtype=np.int64)


class _Targets(NamedTuple):
    """The targets of a batch in the order of its rows, the token before each, and whether the input does not show it: ``[N]``."""

    previous: np.ndarray
    targets: np.ndarray
    is_hidden: np.ndarray


def _targets(batch: Mapping[str, Any], vocab_size: int, *, with_hidden: bool = False) -> _Targets:
    labels = np.asarray(batch["labels"])
    is_target = labels != IGNORED
    previous = np.asarray(batch["decoder_input_ids"])[is_target].astype(np.int64)
    targets = labels[is_target].astype(np.int64)
    is_hidden = np.asarray(batch["is_hidden"])[is_target] if with_hidden else np.zeros(len(targets), dtype=np.bool_)
    for name, ids, least in (("labels", targets, 0), ("decoder_input_ids", previous, -1)):
        if len(ids) and not least <= ids.min() <= ids.max() < vocab_size:
            wrong = ids.min() if ids.min() < least else ids.max()
            raise InputError(
                f"{name} holds the id {wrong}, and vocab_size={vocab_size}: give the size of the vocabulary"
            )
    return _Targets(previous, targets, is_hidden.astype(np.bool_))


def _is_copied(batch: Mapping[str, Any]) -> np.ndarray:
    """Return whether the rule guesses each target of a batch, ``bool [N]`` in the order of its rows."""
    labels, previous = np.asarray(batch["labels"]), np.asarray(batch["decoder_input_ids"])
    is_copied = np.zeros(labels.shape, dtype=np.bool_)
    for row, written, tokens in _pairs(batch):
        if len(tokens):
            is_copied[row, written] = copied_tokens(tokens, previous[row, written]) == labels[row, written]
    return is_copied[labels != IGNORED]


def _pairs(batch: Mapping[str, Any]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the row of each pair, the columns of its targets, and the tokens of its input."""
    input_ids, mask = np.asarray(batch["input_ids"]), np.asarray(batch["attention_mask"]) != 0
    is_target = np.asarray(batch["labels"]) != IGNORED
    if "decoder_document_ids" not in batch:
        for row in range(len(input_ids)):
            yield row, np.flatnonzero(is_target[row]), input_ids[row, mask[row]]
        return
    sources, documents = np.asarray(batch["document_ids"]), np.asarray(batch["decoder_document_ids"])
    for row in range(len(input_ids)):
        for document in np.unique(documents[row, is_target[row]]):
            written = np.flatnonzero(is_target[row] & (documents[row] == document))
            yield row, written, input_ids[row, mask[row] & (sources[row] == document)]


def neighbour_losses(
    collate: Callable[[list[Any]], Mapping[str, Any]],
    train: Any,
    held_out: Any,
    *,
    vocab_size: int,
    seed: int,
    prefix: str = "",
) -> dict[str, float]:
    """Return the losses that counts of tokens and of pairs of neighbours reach on held-out text; see [`TokenCounts`].

    Args:
        collate: Makes a batch with `labels` and `input_ids`, ``[B, L]``.
        train: Examples to count, up to a million targets.
        held_out: Examples to score, up to 200,000 targets.
        vocab_size: Number of tokens.
        seed: Key of the choice of examples.
        prefix: What stands before the names of the entries, such as "backward_"; inputs without it are those of all directions.

    Returns:
        `unigram_nll` and `bigram_nll`, in nats; {} if there is no target.
    """

    def count(batch: Mapping[str, Any]) -> int:
        return int((batch[f"{prefix}labels"] != IGNORED).sum())

    def targets_of(dataset: Any, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = draws.permutation(len(dataset), seed=seed).tolist()
        for batch in first_batches(collate, dataset, order, most=most, count=count):
            labels = batch[f"{prefix}labels"].numpy()
            inputs = batch.get(f"{prefix}input_ids", batch["input_ids"]).numpy()
            is_target = labels != IGNORED
            yield inputs[is_target], labels[is_target]

    counts, sums = TokenCounts(vocab_size), np.zeros(3)
    for previous, targets in targets_of(train, MOST_COUNTED):
        counts.add(previous, targets)
    for previous, targets in targets_of(held_out, MOST_SCORED):
        scores = (counts.unigram()[targets], counts.bigram(previous, targets))
        sums += [-np.log(scores[0]).sum(), -np.log(scores[1]).sum(), len(targets)]
    return {"unigram_nll": sums[0] / sums[2], "bigram_nll": sums[1] / sums[2]} if sums[2] else {}


def first_batches(
    collate: Callable[[list[Any]], Mapping[str, Any]],
    dataset: Any,
    order: Sequence[int],
    *,
    most: int,
    count: Callable[[Mapping[str, Any]], int],
) -> Iterator[Mapping[str, Any]]:
    """Yield batches of examples until they have as many targets as are wanted.

    Args:
        collate: Makes a batch.
        dataset: The examples.
        order: Their rows, in the order in which they are read.
        most: The targets that are wanted.
        count: Returns the number of targets of a batch.
    """
    for begin in range(0, len(order), _READ):
        batch = collate([dataset[row] for row in order[begin : begin + _READ]])
        yield batch
        most -= count(batch)
        if most <= 0:
            return


def reference_rows(references: Mapping[str, float], *, title: str = "held-out text") -> tuple[tuple[str, str], ...]:
    """Return the rows of a card's table of references, its header first; none where nothing was counted."""
    rows = ((name, f"{value:.4g}") for name, value in references.items())
    return (("", title), *rows) if references else ()


def print_references(references: Mapping[str, float], *, counted: str, title: str = "held-out text") -> None:
    """Print what counting reaches on the held-out text; `counted` begins the line above the table."""
    if references:
        print(f"\n{counted} on the same held-out text:")
        print_table([(name, f"{value:.4f}") for name, value in references.items()], header=("", title))
