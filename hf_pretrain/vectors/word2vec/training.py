"""Skip-gram and CBOW: vectors of words that predict their neighbours, with negative sampling or hierarchical softmax.

[`train_word2vec`] reads the corpus in order. `StretchReader` says for a part of it which words are kept, how wide their windows
are and how fast they learn. Two backends learn from that: `kernel` on the CPU, compiled by numba, and `batches`
in large batches on any device. All draws follow from the seed, the epoch and the position in the corpus, so they do not depend on
the size of a stretch. A run on one thread repeats bit for bit, also if it was interrupted. Several threads write to the same
vectors without locks, so their results differ a little from run to run.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
import xxhash
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, RunError, check_choice, check_numbers
from hf_pretrain.files import begin_folder, is_whole, plain, read_marker, share_weights, write_marker
from hf_pretrain.vectors.word2vec.tables import (
    AliasTable,
    HuffmanCodes,
    alias_table,
    huffman_codes,
    keep_probabilities,
    noise_distribution,
)

if TYPE_CHECKING:
    from hf_pretrain.vectors.corpus import WordCorpus

_MODES = ("skipgram", "cbow")
_GRADIENTS = ("mean", "word2vec")
_BACKENDS = ("auto", "numba", "torch")
# Values of the running loss in the result.
_RECORDS = 200
_ROWS = 1 << 14
_HASHED = 1 << 22
_TO_UNIT = 2.0**-53
_CHECKPOINT, _STATE = "word2vec-", "state.safetensors"


@dataclass(frozen=True)
class Word2VecOptions:
    """Options of skip-gram and CBOW.

    Attributes:
        mode: "skipgram": each word in the window predicts the word in its centre. "cbow": their mean does.
        dimensions: Size of a vector.
        window: Most words on each side; the size of each window is drawn from 1 to this.
        negatives: Words of noise a pair.
        hierarchical: Whether a path in a Huffman tree is predicted in place of negative sampling.
        sample: Relative frequency above which words are left out at random; 0 keeps all. Useful values are 1e-3 to 1e-5.
        noise_power: Exponent of the counts in the distribution of the noise.
        epochs: Times that the corpus is read.
        learning_rate: Learning rate at the start. By default .025 for skip-gram, .15 for CBOW with the gradient of the mean,
            .05 with that of word2vec, and .1 in torch, which uses AdaGrad.
        min_learning_rate_share: Share of the learning rate below which its linear decay does not go.
        shared_negatives: Whether all pairs of a centre word have the same noise, and learn in one step: three times as
            fast, as good. CBOW has one pair a centre word in any case.
        cbow_gradient: "mean": the gradient of the mean, divided by the number of words in the window. "word2vec": the one of the
            original program, which is not divided.
        seed: Seed of all draws.
        threads: Threads of the numba backend. With more than one the results differ a little from run to run.
        backend: "numba" on the CPU, "torch" on any device; "auto": numba if it is installed and `device` is the CPU.
        batch_size: Pairs in a batch of the torch backend, about.
        device: Device of the torch backend, such as "cuda"; by default the CPU.

    Raises:
        InputError: Naming an option out of range.

    Source: Mikolov et al. 2013, "Efficient Estimation of Word Representations in Vector Space", section 3; Mikolov et al. 2013,
        "Distributed Representations of Words and Phrases and their Compositionality", section 2; İrsoy, Benton and Stratos 2021,
        "Corrected CBOW Performs as well as Skip-gram", section 3 (gradient of the mean).
    """

    mode: str = "skipgram"
    dimensions: int = 100
    window: int = 5
    negatives: int = 5
    hierarchical: bool = False
    sample: float = 1e-3
    noise_power: float = 0.75
    epochs: int = 5
    learning_rate: float | None = None
    min_learning_rate_share: float = 1e-4
    shared_negatives: bool = True
    cbow_gradient: str = "mean"
    seed: int = 0
    threads: int = 1
    backend: str = "auto"
    batch_size: int = 65_536
    device: str | None = None

    ranges: ClassVar[Mapping[str, str]] = {
        "dimensions": "[1, 65536]",
        "window": "[1, 1000]",
        "negatives": "[1, 1000]",
        "sample": "[0, inf)",
        "noise_power": "[0, 4]",
        "epochs": "[1, 100000]",
        "learning_rate": "(0, inf)",
        "threads": "[1, 1024]",
        "batch_size": "[1, 16777216]",
    }
    # What a run may change when it is resumed.
    of_machine: ClassVar[tuple[str, ...]] = ("threads", "device", "backend")

    def __post_init__(self) -> None:
        check_choice(self.mode, _MODES, name="mode")
        check_choice(self.cbow_gradient, _GRADIENTS, name="cbow_gradient")
        check_choice(self.backend, _BACKENDS, name="backend")
        check_numbers(self)

    @property
    def used_backend(self) -> str:
        """The backend that trains: "numba" or "torch".

        Raises:
            InputError: If numba is wanted but not installed, or wanted for a device that is not the CPU.
        """
        on_cpu = self.device is None or self.device == "cpu"
        has_numba = importlib.util.find_spec("numba") is not None
        if self.backend == "auto":
            return "numba" if has_numba and on_cpu else "torch"
        if self.backend == "numba" and not has_numba:
            raise InputError("backend='numba' needs numba: pip install 'hf-pretrain[fast]', or set backend='torch'")
        if self.backend == "numba" and not on_cpu:
            raise InputError(f"backend='numba' runs on the CPU, not on device={self.device!r}: set backend='torch'")
        return self.backend

    @property
    def initial_learning_rate(self) -> float:
        """Learning rate at the start: the given one, or the default of the mode and the backend."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.used_backend == "torch":
            return 0.1
        if self.mode == "skipgram":
            return 0.025
        return 0.15 if self.cbow_gradient == "mean" else 0.05


class Word2VecResult(NamedTuple):
    """What a run has learnt.

    Attributes:
        vectors: ``float32 [V, D]``, the vector of each word.
        outputs: ``float32 [V, D]`` of the words as they are predicted; hierarchical: ``[V - 1, D]`` of the tree's nodes.
        loss: Words seen, over all epochs, and the mean loss a pair since the last entry, in nats.
    """

    vectors: np.ndarray
    outputs: np.ndarray
    loss: list[tuple[int, float]]


class Stretch(NamedTuple):
    """A part of the corpus as it is trained on: kept words, and the windows of those that are centres.

    Attributes:
        words: ``int32 [M]``, the kept words, with neighbours outside of the stretch.
        first: Where the centres begin in `words`; they follow each other.
        before: ``int32 [C]``, words in the window before each centre.
        after: ``int32 [C]``, words in it after the centre.
        keys: ``uint64 [C]`` of the draws of noise.
        rates: ``float32 [C]``, learning rates.
    """

    words: np.ndarray
    first: int
    before: np.ndarray
    after: np.ndarray
    keys: np.ndarray
    rates: np.ndarray


class StretchReader:
    """Cuts a corpus into stretches, with all draws but those of the noise.

    Args:
        corpus: The corpus.
        options: The options.
    """

    def __init__(self, corpus: WordCorpus, options: Word2VecOptions) -> None:
        counts = corpus.vocabulary.counts
        self.tokens, self.lines = np.asarray(corpus.tokens), np.asarray(corpus.lines)
        self.keep = keep_probabilities(counts, int(counts.sum()), options.sample)
        self.options = options

    def pairs_per_word(self) -> float:
        """Return about how many pairs of skip-gram there are for a word of the corpus."""
        kept = self.keep[self.tokens[: 1 << 20]].mean() if len(self.tokens) else 0.0
        return float(kept) * (self.options.window + 1)

    def stretch(self, epoch: int, begin: int, end: int) -> Stretch:
        """Return the stretch whose centres are at positions from `begin` to `end` of the corpus."""
        seed = self.options.seed
        low, before = self._margin(epoch, begin, step=-1)
        high, after = self._margin(epoch, end, step=1)
        own = begin + np.flatnonzero(self._kept(epoch, begin, end))
        positions = np.concatenate([before, own, after])
        bounds = self.lines[np.searchsorted(self.lines, low, "right") : np.searchsorted(self.lines, high, "left")]
        bounds = np.searchsorted(positions, np.concatenate([[low], bounds, [high]]))
        sizes = np.diff(bounds)
        starts, ends = np.repeat(bounds[:-1], sizes), np.repeat(bounds[1:], sizes)
        centres = slice(len(before), len(before) + len(own))
        index = np.arange(centres.start, centres.stop)
        spans = self._spans(epoch, own)
        return Stretch(
            words=np.asarray(self.tokens[positions], dtype=np.int32),
            first=len(before),
            before=np.minimum(spans, index - starts[centres]).astype(np.int32),
            after=np.minimum(spans, ends[centres] - 1 - index).astype(np.int32),
            keys=draws.row_keys(own, seed=seed, epoch=epoch, stream="word2vec noise"),
            rates=self.learning_rates(epoch, own).astype(np.float32),
        )

    def learning_rates(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the learning rate at each position: it falls linearly over the words of all epochs."""
        options = self.options
        progress = (epoch * len(self.tokens) + positions) / (options.epochs * len(self.tokens))
        return options.initial_learning_rate * np.maximum(options.min_learning_rate_share, 1 - progress)

    def _kept(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """Return which of the positions are kept: ``bool``."""
        # A key is 64 random bits itself.
        keys = draws.row_keys(np.arange(begin, end), seed=self.options.seed, epoch=epoch, stream="word2vec keep")
        return (keys >> np.uint64(11)) * _TO_UNIT < self.keep[self.tokens[begin:end]]

    def _spans(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the size of the window at each position, uniform on 1 to `window`: ``int64``."""
        keys = draws.row_keys(positions, seed=self.options.seed, epoch=epoch, stream="word2vec window")
        return ((keys >> np.uint64(32)) * np.uint64(self.options.window) >> np.uint64(32)).astype(np.int64) + 1

    def _margin(self, epoch: int, position: int, *, step: int) -> tuple[int, np.ndarray]:
        """Return how far the line was searched before or after a position for the words of a window, and the kept positions."""
        line = int(np.searchsorted(self.lines, position, "right")) - 1
        if self.lines[line] == position:
            return position, np.empty(0, dtype=np.int64)
        edge, width = int(self.lines[line if step < 0 else line + 1]), 4 * self.options.window
        while True:
            low, high = (
                (max(edge, position - width), position) if step < 0 else (position, min(edge, position + width))
            )
            found = low + np.flatnonzero(self._kept(epoch, low, high))
            outer = low if step < 0 else high
            if len(found) >= self.options.window or outer == edge:
                return outer, found
            width *= 4


class Backend(Protocol):
    """What learns from stretches: `KernelBackend` or `TorchBackend`."""

    positions: int
    """Positions of the corpus in a stretch."""

    def learn(self, stretch: Stretch) -> tuple[float, int]:
        """Learn from a stretch; return the sum of the losses and the number of pairs."""

    def state(self) -> dict[str, np.ndarray]:
        """Return all arrays that a resumed run needs, `inputs` and `outputs` among them."""


def initial_state(num_words: int, num_outputs: int, options: Word2VecOptions) -> dict[str, np.ndarray]:
    """Return the vectors before training: `inputs` uniform on -.5 / D to .5 / D, and `outputs` zero."""
    inputs = np.empty((num_words, options.dimensions), dtype=np.float32)
    for begin in range(0, num_words, _ROWS):
        rows = inputs[begin : begin + _ROWS]
        keys = draws.row_keys(np.arange(begin, begin + len(rows)), seed=options.seed, stream="word2vec vectors")
        rows[:] = (draws.uniforms(keys, options.dimensions) - 0.5) / options.dimensions
    return {"inputs": inputs, "outputs": np.zeros((num_outputs, options.dimensions), dtype=np.float32)}


def make_backend(
    reader: StretchReader, counts: np.ndarray, options: Word2VecOptions, state: Mapping[str, np.ndarray]
) -> Backend:
    """Return what learns, from the vectors of a state on; numba or torch's part is imported here."""
    table: HuffmanCodes | AliasTable
    table = (
        huffman_codes(counts) if options.hierarchical else alias_table(noise_distribution(counts, options.noise_power))
    )
    if options.used_backend == "numba":
        from hf_pretrain.vectors.word2vec.kernel import KernelBackend

        return KernelBackend(state, table, options)
    from hf_pretrain.vectors.word2vec.batches import TorchBackend

    return TorchBackend(state, table, options, pairs_per_word=reader.pairs_per_word())


def train_word2vec(
    corpus: WordCorpus,
    options: Word2VecOptions,
    *,
    checkpoint_folder: str | Path | None = None,
    checkpoint_words: int | None = None,
    progress: bool = True,
) -> Word2VecResult:
    """Train vectors of words by skip-gram or CBOW.

    Args:
        corpus: The corpus; windows do not cross its lines.
        options: The options.
        checkpoint_folder: Where the run is kept; a run that finds its own checkpoint there goes on from it.
        checkpoint_words: Least words of the corpus between two checkpoints; by default there is one after each epoch.
        progress: Whether a bar is shown on a terminal.

    Raises:
        InputError: If the corpus has no two words, or the checkpoint is of other options or another corpus.
        RunError: If the loss is not finite.
    """
    counts, num_tokens = corpus.vocabulary.counts, len(corpus.tokens)
    if len(counts) < 2 or num_tokens < 2:
        raise InputError(f"corpus has {len(counts)} known words: give more text, or a lower min_count")
    folder, identity = None if checkpoint_folder is None else Path(checkpoint_folder), _identity(corpus, options)
    run = _Run() if folder is None else _Run.load(folder, identity)
    if not run.state:
        run.state = initial_state(len(counts), len(counts) - options.hierarchical, options)
    reader = StretchReader(corpus, options)
    backend, total = make_backend(reader, counts, options, run.state), options.epochs * num_tokens
    saved = seen = run.epoch * num_tokens + run.position
    with tqdm(
        total=total,
        initial=seen,
        desc="Training",
        unit=" words",
        unit_scale=True,
        delay=2,
        disable=None if progress else True,
    ) as bar:
        while run.epoch < options.epochs:
            end = min(run.position + backend.positions, num_tokens)
            loss, pairs = backend.learn(reader.stretch(run.epoch, run.position, end))
            bar.update(end - run.position)
            seen += end - run.position
            run.epoch, run.position = (run.epoch + 1, 0) if end == num_tokens else (run.epoch, end)
            if run.record(loss, pairs, seen=seen, total=total):
                bar.set_postfix(loss=f"{run.loss[-1][1]:.4f}", refresh=False)
            is_due = run.position == 0 if checkpoint_words is None else seen - saved >= checkpoint_words
            if folder is not None and (is_due or seen == total):
                run.state, saved = backend.state(), seen
                run.save(folder, identity)
    state = backend.state()
    return Word2VecResult(state["inputs"], state["outputs"], run.loss)


@dataclass
class _Run:
    """How far a run is, and its vectors where they are on the disk or not yet trained."""

    epoch: int = 0
    position: int = 0
    loss: list[tuple[int, float]] = field(default_factory=list)
    # Since the last entry of `loss`.
    loss_sum: float = 0.0
    num_pairs: int = 0
    state: dict[str, np.ndarray] = field(default_factory=dict)

    def record(self, loss: float, pairs: int, *, seen: int, total: int) -> bool:
        """Add the loss of a stretch, and return whether there is a new mean."""
        if not math.isfinite(loss):
            raise RunError(f"the loss is not finite after {seen} words: lower learning_rate")
        self.loss_sum, self.num_pairs = self.loss_sum + loss, self.num_pairs + pairs
        last = self.loss[-1][0] if self.loss else 0
        if not self.num_pairs or (seen - last) * _RECORDS < total and seen < total:
            return False
        self.loss.append((seen, self.loss_sum / self.num_pairs))
        self.loss_sum, self.num_pairs = 0.0, 0
        return True

    def save(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Write a new checkpoint, and then remove older ones: one of them is whole at any time."""
        target = folder / f"{_CHECKPOINT}{self.epoch:05}-{self.position:015}"
        begin_folder(target)
        save_file({name: np.ascontiguousarray(array) for name, array in self.state.items()}, target / _STATE)
        share_weights(target)
        facts = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "state"}
        write_marker(target, run=facts, identity=plain(identity))
        for other in folder.glob(f"{_CHECKPOINT}*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, identity: Mapping[str, Any]) -> _Run:
        """Return the run of the newest whole checkpoint; a new one if there is none."""
        found = next((path for path in sorted(folder.glob(f"{_CHECKPOINT}*"), reverse=True) if is_whole(path)), None)
        if found is None:
            return cls()
        facts = read_marker(found) or {}
        for name, value in plain(identity).items():
            if facts["identity"].get(name) != value:
                was = facts["identity"].get(name)
                raise InputError(
                    f"checkpoint_folder={str(folder)!r} is of a run with {name}={was!r}, not {value!r}: "
                    "give the same, or another folder"
                )
        run = cls(**facts["run"], state=load_file(found / _STATE))
        run.loss = [(int(words), float(loss)) for words, loss in run.loss]
        return run


def _identity(corpus: WordCorpus, options: Word2VecOptions) -> dict[str, Any]:
    """Return what a resumed run must have in common with the one that it goes on with."""
    digest = xxhash.xxh3_128("\n".join(corpus.vocabulary.words).encode(errors="surrogatepass"))
    for array in (corpus.vocabulary.counts, corpus.lines, corpus.tokens):
        for begin in range(0, len(array), _HASHED):
            digest.update(np.ascontiguousarray(array[begin : begin + _HASHED]).tobytes())
    known = {name.name: getattr(options, name.name) for name in fields(options) if name.name not in options.of_machine}
    used = {"learning_rate": options.initial_learning_rate, "backend": options.used_backend}
    return known | used | {"corpus": digest.hexdigest(), "draws": draws.VERSION}
