"""The logits of a teacher on disk, by example and epoch; refused for any other teacher, data or tokenizer.

A cache is a folder of arrays and a header, which is written last. The header holds a fingerprint: digests of the
model, the examples, the tokenizer and the options. A builder runs the teacher once; `open` compares fingerprints and
maps the arrays.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.errors import InputError
from hf_pretrain.files import is_whole, read_marker, write_marker
from hf_pretrain.modeling.observing.outputs import TopKTargets, top_k_targets

# Fields of a configuration that do not change the outputs.
_IRRELEVANT = ("_name_or_path", "architectures", "dtype", "transformers_version")
# Columns of an example that decide the teacher's inputs and targets.
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
    """Return digests of the teacher, the examples, the tokenizer and the options; a cache belongs to these alone.

    Args:
        teacher: The teacher; another dtype is another teacher.
        dataset: Map-style examples with `input_ids`, in the order of their ids; `is_target` marks the tokens with a
            prediction.
        tokenizer: The tokenizer of the examples.
        **options: All else that decides the logits, such as the options of masking, the seed or the temperature.
    """
    return {
        "teacher": weights_fingerprint(teacher),
        "data": _data_fingerprint(EpochDataset.wrap(dataset)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **{name: _digest(json.dumps(value, sort_keys=True, default=str)) for name, value in options.items()},
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer's rules; the truncation and padding of its last call are left out."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]
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
Numbers = Sequence[int] | np.ndarray | torch.Tensor
Fingerprint = Mapping[str, str]

# Written last: a folder without it, or without a file that it names, is not finished.
_HEADER = "cache.json"
# Batches that are read at a time and sorted by length together.
_WINDOW = 64
# Type of log-probabilities on disk.
_HALF = np.float16


def has_cache(folder: str | Path) -> bool:
    """Whether a folder holds a finished cache, of whatever teacher, with all of its files."""
    return is_whole(folder, name=_HEADER)


class TeacherCache(ABC):
    """Arrays with one row a prediction; those of an example come together, in the order of the examples, epoch by epoch.

    Args:
        *columns: ``[R, ...]`` arrays.
        starts: ``[E, N + 1]`` first row of each example in each epoch, and where the last one ends.
    """

    kind: ClassVar[str]

    def __init__(self, *columns: np.ndarray, starts: np.ndarray) -> None:
        self.columns = columns
        self.starts = np.atleast_2d(starts)

    @classmethod
    def open(cls, folder: str | Path, *, fingerprint: Fingerprint) -> Self:
        """Map a cache into memory.

        Args:
            folder: Folder of the builder.
            fingerprint: See [`cache_fingerprint`].

        Raises:
            InputError: If it is not finished, or belongs to another teacher, other data or another tokenizer.
        """
        path = Path(folder)
        header = cls._read_header(path, fingerprint)
        starts = np.load(path / "starts.npy")
        return cls(*cls._open_columns(path, int(starts.flat[-1]), header), starts=starts)

    @classmethod
    def _read_header(cls, folder: Path, fingerprint: Fingerprint) -> Mapping[str, Any]:
        header = read_marker(folder, name=_HEADER)
        what = f"cache folder {str(folder)!r}"
        if header is None or not has_cache(folder):
            raise InputError(f"{what} holds no finished cache: build it first, or name another folder")
        if header["kind"] != cls.kind:
            raise InputError(f"{what} holds {header['kind']}, not {cls.kind}: name another folder")
        found = header["fingerprint"]
        names = sorted(name for name in {*found, *fingerprint} if found.get(name) != fingerprint.get(name))
        if names:
            others = " and another ".join(names)
            raise InputError(f"{what} was made with another {others}: remove it, or name another folder")
        return header

    @classmethod
    @abstractmethod
    def _open_columns(cls, folder: Path, num_rows: int, header: Mapping[str, Any]) -> tuple[np.ndarray, ...]: ...

    @property
    def num_epochs(self) -> int:
        """The number of epochs that it holds."""
        return len(self.starts)

    def rows(self, example_ids: Numbers, epochs: Numbers | int = 0) -> np.ndarray:
        """Return the rows of examples, one example after the other.

        Args:
            example_ids: ``[B]``.
            epochs: ``[B]``, or one for all.

        Raises:
            InputError: If an example or an epoch is not in the cache.
        """
        ids, count = np.asarray(example_ids), self.starts.shape[1] - 1
        unknown = ids[(ids < 0) | (ids >= count)]
        if unknown.size:
            raise InputError(
                f"example {unknown[0]} is not in the cache, which holds {count} examples: build it from the data at hand"
            )
        rounds = np.broadcast_to(np.asarray(epochs), ids.shape)
        if rounds.size and rounds.max() >= self.num_epochs:
            raise InputError(
                f"epoch {rounds.max()} is not in the cache, which holds {self.num_epochs}: build it for more, or train with "
                f"static_masks={self.num_epochs}"
            )
        return _rows_of(self.starts[rounds, ids], self.starts[rounds, ids + 1])


class TaskLogitsCache(TeacherCache):
    """The teacher's logits for every example of a task, ``[R, C]`` in fp32: a few bytes a prediction."""

    kind = "task logits"

    @classmethod
    def _open_columns(cls, folder: Path, num_rows: int, header: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        return (np.load(folder / "logits.npy", mmap_mode="r"),)

    def lookup(self, example_ids: Numbers, epochs: Numbers | int = 0) -> torch.Tensor:
        """Return the logits of examples ``[R, C]``, on the CPU; see [`TeacherCache.rows`]."""
        (logits,) = self.columns
        return torch.from_numpy(np.array(logits[self.rows(example_ids, epochs)]))


class TopKCache(TeacherCache):
    """A masked language model's likeliest tokens at every masked position, by epoch and example: 6k + 2 bytes each.

    The masks are keyed by epoch and example, so the student's collator masks the same tokens. It holds a fixed number
    of epochs: train with `static_masks` of this number to repeat them.
    """

    kind = "top-k log-probabilities"

    @classmethod
    def _open_columns(cls, folder: Path, num_rows: int, header: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        k = header["k"]
        return (
            np.memmap(folder / "ids.int32", dtype=np.int32, mode="r", shape=(num_rows, k)),
            np.memmap(folder / "log_probs.float16", dtype=_HALF, mode="r", shape=(num_rows, k + 1)),
        )

    def lookup(self, example_ids: Numbers, epochs: Numbers | int = 0) -> TopKTargets:
        """Return the targets of examples, one example after the other; see [`TeacherCache.rows`]."""
        rows, (ids, halves) = self.rows(example_ids, epochs), self.columns
        # Rounding to 16 bits changed the sum: here the probabilities add up to one again.
        log_probs = torch.from_numpy(halves[rows].astype(np.float32)).log_softmax(-1)
        return TopKTargets(torch.from_numpy(ids[rows].astype(np.int64)), log_probs[:, :-1], log_probs[:, -1])


def build_task_logits(
    teacher_forward: Callable[[Examples], torch.Tensor],
    dataset: Any,
    folder: str | Path,
    *,
    fingerprint: Fingerprint,
    counts: np.ndarray | None = None,
    batch_size: int = 64,
) -> TaskLogitsCache:
    """Run a teacher on every example and keep its logits.

    Args:
        teacher_forward: Takes examples, with `example_id`, and returns their logits, one row a prediction ``[R, C]``,
            one example after the other.
        dataset: Map-style examples with `input_ids`; the row is the id. Those of one batch are of about one length.
        folder: Output folder; an older cache in it is replaced.
        fingerprint: See [`cache_fingerprint`].
        counts: ``[N]`` predictions of each example; one by default.
        batch_size: Examples in a batch.

    Returns:
        The cache, opened.
    """
    path, examples, logits = _fresh_folder(folder), EpochDataset.wrap(dataset), None
    starts = np.append(0, np.cumsum(np.ones(len(examples), dtype=np.int64) if counts is None else counts))
    with _progress(len(examples)) as bar:
        for window in _windows(examples, size=_WINDOW * batch_size):
            window.sort(key=lambda example: -len(example["input_ids"]))
            for begin in range(0, len(window), batch_size):
                batch = window[begin : begin + batch_size]
                found = teacher_forward(batch).detach().float().cpu().numpy()
                if logits is None:
                    shape = (int(starts[-1]), found.shape[1])
                    logits = np.lib.format.open_memmap(path / "logits.npy", "w+", dtype=np.float32, shape=shape)
                ids = np.array([example["example_id"] for example in batch])
                logits[_rows_of(starts[ids], starts[ids + 1])] = found
                bar.update(len(batch))
    assert logits is not None, "an EpochDataset has examples"
    logits.flush()
    np.save(path / "starts.npy", starts)
    write_marker(path, name=_HEADER, kind=TaskLogitsCache.kind, fingerprint=dict(fingerprint))
    return TaskLogitsCache.open(path, fingerprint=fingerprint)


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
    """Run a masked language model on every example and keep its likeliest tokens at every masked position.

    Args:
        teacher_forward: Takes examples, with `example_id` and `epoch`, and returns the logits at the masked positions,
            one example after the other, ``[T, V]``, and how many positions each example has, ``[B]``.
        dataset: Map-style examples; the row is the id.
        folder: Output folder; an older cache in it is replaced.
        fingerprint: See [`cache_fingerprint`]; with the options of masking, the seed, k and the temperature.
        num_epochs: Epochs to keep, each with masks of its own.
        k: Tokens to keep at a position.
        temperature: Divisor of the logits; the mass of the tail at another one cannot be computed later.
        batch_size: Examples in a batch.

    Returns:
        The cache, opened.
    """
    path, examples = _fresh_folder(folder), EpochDataset.wrap(dataset)
    starts, total = np.zeros((num_epochs, len(examples) + 1), dtype=np.int64), 0
    files = open(path / "ids.int32", "wb"), open(path / "log_probs.float16", "wb")
    with files[0] as ids_file, files[1] as log_probs_file, _progress(num_epochs * len(examples)) as bar:
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
            "the teacher predicts at no position: examples need masked tokens, by mlm_probability above 0"
        )
    np.save(path / "starts.npy", starts)
    k = min(k, logits_TV.shape[1])
    write_marker(path, name=_HEADER, kind=TopKCache.kind, fingerprint=dict(fingerprint), k=k)
    return TopKCache.open(path, fingerprint=fingerprint)


def _fresh_folder(folder: str | Path) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / _HEADER).unlink(missing_ok=True)
    return path


def _progress(total: int) -> Any:
    return tqdm(total=total, desc="Running the teacher", unit=" examples", delay=2, disable=None)


def _windows(dataset: EpochDataset, *, size: int, epoch: int = 0) -> Iterator[Examples]:
    for begin in range(0, len(dataset), size):
        rows = range(begin, min(begin + size, len(dataset)))
        yield dataset.__getitems__([epoch * EPOCH_STRIDE + row for row in rows])


def _rows_of(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
