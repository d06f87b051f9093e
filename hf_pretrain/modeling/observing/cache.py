"""Digests of models, examples and tokenizers, by which what was computed from them is known again.

A teacher that was asked once: its answers on disk, by example id, and refused to any other teacher, data or tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.errors import InputError
from hf_pretrain.files import is_whole, read_marker, write_marker
from hf_pretrain.modeling.observing.observation import TopKTargets, top_k_targets

# What of a configuration does not change what the model computes.
_IRRELEVANT = ("_name_or_path", "architectures", "dtype", "transformers_version")
# What of an example decides what a teacher is asked, and where.
_COLUMNS = ("input_ids", "token_type_ids", "is_target", "document_ids", "word_starts", "spans")
_ROWS = 4096
_SIZE = 16


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of a model's class, configuration and weights."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=_SIZE)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_fingerprint(
    teacher: PreTrainedModel, dataset: Any, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> dict[str, str]:
    """Return what a cache belongs to: digests of the teacher, of the examples' tokens, of the tokenizer and of options.

    Args:
        teacher: The teacher; another dtype is another teacher.
        dataset: Map-style examples with `input_ids`, in the order of their ids; `is_target` says which tokens are asked for.
        tokenizer: What made them.
        **options: Whatever else decides the answers, such as the options of masking, the seed or the temperature.
    """
    return {
        "teacher": weights_fingerprint(teacher),
        "data": _data_fingerprint(EpochDataset.wrap(dataset)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **{name: _digest(json.dumps(value, sort_keys=True, default=str)) for name, value in options.items()},
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what decides the tokens of a text: not how the tokenizer was last called."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    return _digest(json.dumps(backend, sort_keys=True))


def _data_fingerprint(dataset: EpochDataset) -> str:
    digest = hashlib.blake2b(digest_size=_SIZE)
    for begin in range(0, len(dataset), _ROWS):
        examples = dataset.__getitems__(range(begin, min(begin + _ROWS, len(dataset))))
        for column in _COLUMNS:
            if column in examples[0]:
                rows = [np.asarray(example[column], dtype=np.int64).ravel() for example in examples]
                digest.update(np.array([len(row) for row in rows]).tobytes())
                digest.update(np.concatenate(rows).tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_SIZE).hexdigest()


Examples = list[dict[str, Any]]
Fingerprint = Mapping[str, str]

# Written last: a folder without it, or without a file that it names, was not finished.
_HEADER = "cache.json"
# Batches read at a time, so that those of one length come together.
_WINDOW = 64
# Of log-probabilities on disk.
_HALF = np.float16


def _windows(dataset: EpochDataset, *, size: int, epoch: int = 0) -> Iterator[Examples]:
    for begin in range(0, len(dataset), size):
        rows = range(begin, min(begin + size, len(dataset)))
        yield dataset.__getitems__([epoch * EPOCH_STRIDE + row for row in rows])


def has_cache(folder: str | Path) -> bool:
    """Whether a folder holds a finished cache, of whatever teacher, with all of its files."""
    return is_whole(folder, name=_HEADER)


def _write_header(folder: Path, kind: str, fingerprint: Fingerprint, **facts: Any) -> None:
    write_marker(folder, name=_HEADER, kind=kind, fingerprint=dict(fingerprint), **facts)


def _read_header(folder: Path, kind: str, fingerprint: Fingerprint) -> Mapping[str, Any]:
    header = read_marker(folder, name=_HEADER)
    if header is None or not has_cache(folder):
        raise InputError(
            f"cache folder {str(folder)!r} holds no finished cache: build it first, or name another folder"
        )
    if header["kind"] != kind:
        raise InputError(f"cache folder {str(folder)!r} holds {header['kind']}, not {kind}: name another folder")
    found = header["fingerprint"]
    names = sorted(name for name in {*found, *fingerprint} if found.get(name) != fingerprint.get(name))
    if names:
        raise InputError(
            f"cache folder {str(folder)!r} was made with another {' and another '.join(names)}: remove it, or name another folder"
        )
    return header


def _fresh_folder(folder: str | Path) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / _HEADER).unlink(missing_ok=True)
    return path


class TaskLogitsCache:
    """The teacher's logits for every example of a task, in fp32: a few bytes a prediction.

    Args:
        logits: ``[R, C]``, one row a prediction; those of an example come together, in the order of the examples.
        starts: ``[N + 1]`` first row of each example, and the number of rows.
    """

    kind = "task logits"

    def __init__(self, logits: np.ndarray, starts: np.ndarray) -> None:
        self.logits = logits
        self.starts = starts

    @classmethod
    def open(cls, folder: str | Path, *, fingerprint: Fingerprint) -> TaskLogitsCache:
        """Map a cache into memory.

        Args:
            folder: Where it was built.
            fingerprint: What it must belong to; see [`cache_fingerprint`].

        Raises:
            InputError: If it is not finished, or belongs to another teacher, other data or another tokenizer.
        """
        _read_header(Path(folder), cls.kind, fingerprint)
        path = Path(folder)
        return cls(np.load(path / "logits.npy", mmap_mode="r"), np.load(path / "starts.npy"))

    def lookup(self, example_ids: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the logits of examples: ``[B]`` ids in, one row a prediction ``[R, C]`` in fp32 out, on the CPU."""
        ids = _checked_ids(example_ids, len(self.starts) - 1)
        return torch.from_numpy(np.array(self.logits[_rows_of(self.starts, ids)]))

    def lookup_each(self, example_ids: Sequence[int] | np.ndarray) -> list[torch.Tensor]:
        """Return the logits of each example by itself, ``[predictions, C]``."""
        ids = np.asarray(example_ids)
        return list(self.lookup(ids).split((self.starts[ids + 1] - self.starts[ids]).tolist()))


def build_task_logits(
    teacher_forward: Callable[[Examples], torch.Tensor],
    dataset: Any,
    folder: str | Path,
    *,
    fingerprint: Fingerprint,
    counts: np.ndarray | None = None,
    batch_size: int = 64,
) -> TaskLogitsCache:
    """Ask a teacher for its logits of every example and keep them.

    Args:
        teacher_forward: Takes examples, with `example_id`, and returns their logits, one row a prediction ``[R, C]``, one
            example after the other.
        dataset: Map-style examples with `input_ids`; the row is the id. Those of one batch are of about one length.
        folder: Where to write; an older cache in it is replaced.
        fingerprint: What the cache belongs to; see [`cache_fingerprint`].
        counts: ``[N]`` predictions of each example; one by default.
        batch_size: Examples the teacher is asked for at a time.

    Returns:
        The cache, opened.
    """
    path, examples, logits = _fresh_folder(folder), EpochDataset.wrap(dataset), None
    starts = np.append(0, np.cumsum(np.ones(len(examples), dtype=np.int64) if counts is None else counts))
    with tqdm(total=len(examples), desc="Asking the teacher", unit=" examples", delay=2, disable=None) as bar:
        for window in _windows(examples, size=_WINDOW * batch_size):
            window.sort(key=lambda example: -len(example["input_ids"]))
            for begin in range(0, len(window), batch_size):
                batch = window[begin : begin + batch_size]
                answers = teacher_forward(batch).detach().float().cpu().numpy()
                if logits is None:
                    shape = (int(starts[-1]), answers.shape[1])
                    logits = np.lib.format.open_memmap(path / "logits.npy", "w+", dtype=np.float32, shape=shape)
                logits[_rows_of(starts, np.array([example["example_id"] for example in batch]))] = answers
                bar.update(len(batch))
    assert logits is not None, "an EpochDataset with examples was asked for"
    logits.flush()
    np.save(path / "starts.npy", starts)
    _write_header(path, TaskLogitsCache.kind, fingerprint)
    return TaskLogitsCache.open(path, fingerprint=fingerprint)


class TopKCache:
    """A masked language model's likeliest tokens at every masked position, by epoch and example: 6k + 2 bytes each.

    The masks are keyed by epoch and example, so the student's collator hides the tokens that the teacher's did. As many epochs
    as were asked for are there; train on `static_masks` of so many to go round them.
    """

    kind = "top-k log-probabilities"

    def __init__(self, ids: np.ndarray, log_probs: np.ndarray, starts: np.ndarray) -> None:
        self.ids = ids
        self.log_probs = log_probs
        self.starts = starts

    @classmethod
    def open(cls, folder: str | Path, *, fingerprint: Fingerprint) -> TopKCache:
        """Map a cache into memory; see [`TaskLogitsCache.open`]."""
        path = Path(folder)
        header = _read_header(path, cls.kind, fingerprint)
        starts = np.load(path / "starts.npy")
        num_targets, k = int(starts[-1, -1]), header["k"]
        return cls(
            np.memmap(path / "ids.int32", dtype=np.int32, mode="r", shape=(num_targets, k)),
            np.memmap(path / "log_probs.float16", dtype=_HALF, mode="r", shape=(num_targets, k + 1)),
            starts,
        )

    @property
    def num_epochs(self) -> int:
        """Epochs that it holds."""
        return len(self.starts)

    def lookup(
        self,
        example_ids: Sequence[int] | np.ndarray | torch.Tensor,
        epochs: Sequence[int] | np.ndarray | torch.Tensor | int = 0,
    ) -> TopKTargets:
        """Return the targets of examples, one example after the other.

        Args:
            example_ids: ``[B]``.
            epochs: ``[B]``, or one for all.

        Raises:
            InputError: If an example or an epoch is not in the cache.
        """
        ids = _checked_ids(example_ids, self.starts.shape[1] - 1)
        rounds = np.broadcast_to(np.asarray(epochs), ids.shape)
        if rounds.size and rounds.max() >= self.num_epochs:
            raise InputError(
                f"epoch {rounds.max()} is not in the cache, which holds {self.num_epochs}: build it for more, or train with "
                f"static_masks={self.num_epochs}"
            )
        rows = _ranges(self.starts[rounds, ids], self.starts[rounds, ids + 1])
        # What 16 bits have rounded adds up to one again.
        log_probs = torch.from_numpy(self.log_probs[rows].astype(np.float32)).log_softmax(-1)
        return TopKTargets(torch.from_numpy(self.ids[rows].astype(np.int64)), log_probs[:, :-1], log_probs[:, -1])


def build_top_k(
    teacher_forward: Callable[[Examples], tuple[torch.Tensor, torch.Tensor]],
    dataset: Any,
    folder: str | Path,
    *,
    fingerprint: Fingerprint,
    num_epochs: int = 1,
    k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> TopKCache:
    """Ask a masked language model for its predictions at every masked position and keep the likeliest tokens.

    Args:
        teacher_forward: Takes examples, with `example_id` and `epoch`, and returns the logits at the masked positions, one
            example after the other, ``[T, V]``, and how many positions each example has, ``[B]``.
        dataset: Map-style examples; the row is the id.
        folder: Where to write; an older cache in it is replaced.
        fingerprint: What the cache belongs to; see [`cache_fingerprint`]. The options of masking, the seed, k and the temperature
            are part of it.
        num_epochs: Epochs to keep, each with masks of its own.
        k: Tokens to keep at a position.
        temperature: What the logits are divided by; the mass of the tail cannot be found at another one later.
        batch_size: Examples the teacher is asked for at a time.

    Returns:
        The cache, opened.
    """
    path, examples = _fresh_folder(folder), EpochDataset.wrap(dataset)
    starts, total = np.zeros((num_epochs, len(examples) + 1), dtype=np.int64), 0
    bar = tqdm(total=num_epochs * len(examples), desc="Asking the teacher", unit=" examples", delay=2, disable=None)
    with bar, open(path / "ids.int32", "wb") as ids_file, open(path / "log_probs.float16", "wb") as log_probs_file:
        for epoch in range(num_epochs):
            starts[epoch, 0] = total
            for batch in _windows(examples, size=batch_size, epoch=epoch):
                logits_TV, counts_B = teacher_forward(batch)
                kept = top_k_targets(logits_TV.detach(), k=k, temperature=temperature)
                ids_file.write(kept.ids.cpu().numpy().astype(np.int32).tobytes())
                columns = torch.cat([kept.log_probs, kept.tail[:, None]], dim=1)
                log_probs_file.write(columns.cpu().numpy().astype(_HALF).tobytes())
                row = batch[0]["example_id"] + 1
                starts[epoch, row : row + len(batch)] = total + counts_B.cpu().numpy().cumsum()
                total += len(logits_TV)
                bar.update(len(batch))
            assert starts[epoch, -1] == total, "the teacher counts the rows that it returns"
    if not total:
        raise InputError(
            "the teacher was asked at no position: examples need masked tokens, by mlm_probability above 0"
        )
    np.save(path / "starts.npy", starts)
    _write_header(path, TopKCache.kind, fingerprint, k=min(k, logits_TV.shape[1]))
    return TopKCache.open(path, fingerprint=fingerprint)


def _rows_of(starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the rows of examples, one example after the other."""
    return _ranges(starts[ids], starts[ids + 1])


def _ranges(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])


def _checked_ids(example_ids: Sequence[int] | np.ndarray | torch.Tensor, count: int) -> np.ndarray:
    ids = np.asarray(example_ids)
    strangers = ids[(ids < 0) | (ids >= count)]
    if strangers.size:
        raise InputError(
            f"example {strangers[0]} is not in the cache, which holds {count} examples: build it from the data at hand"
        )
    return ids
