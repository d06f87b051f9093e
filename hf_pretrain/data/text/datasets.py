"""Text as a `datasets.Dataset` with a column ``text``: from files, from the Hub or from a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from hf_pretrain.data import draws
from hf_pretrain.data.text.files import (
    DocumentSeparator,
    OnBadText,
    check_text_column,
    read_documents,
)
from hf_pretrain.data.text.lines import DISK_FULL
from hf_pretrain.data.text.rows import missing_column
from hf_pretrain.data.text.search import pipe_digest, resolve_paths
from hf_pretrain.errors import InputError, one_line

TEXT_FEATURES = datasets.Features({"text": datasets.Value("string")})
# Part of every fingerprint: raise it when the documents of the same files change.
_VERSION = 2
_BATCH_ROWS = 1000
_STREAM_SHARDS = 64


def text_dataset(
    source: datasets.Dataset | str | Path | Sequence[str | Path],
    *,
    text_column: str = "text",
    document_separator: DocumentSeparator = "blank_line",
    on_bad_text: OnBadText = "refuse",
    language: str | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Return documents as a dataset with the column ``text``, memory-mapped where they come from files.

    Args:
        source: Files, folders or globs as in `read_documents`, or a dataset with a column of text.
        text_column: Name of the column that holds the text.
        document_separator: What ends a document of a text file.
        on_bad_text: Whether to refuse or skip a document of a file that is no text, see `read_documents`.
        language: Language of all the documents, for a column ``lang``; by default there is no such column.
        cache_dir: Folder of the Arrow files; the cache of 🤗 datasets by default. The same files, unchanged, and the
            same options are read once.

    Raises:
        InputError: As `read_documents`; or if the dataset is empty or has no such column of text.
    """
    if isinstance(source, datasets.Dataset):
        check_text_column(source.data.table.schema, text_column, "the dataset")
        if not len(source):
            raise InputError("the dataset has no rows; name another split")
        texts = _column(source, text_column)
        return texts if language is None else with_language(texts, language)
    if isinstance(source, datasets.DatasetDict | datasets.IterableDataset):
        raise InputError(
            f"source is a {type(source).__name__}, not a datasets.Dataset; pick a split that is not streamed"
        )
    paths = resolve_paths(source)
    options = {"document_separator": document_separator, "text_column": text_column, "on_bad_text": on_bad_text}
    key = (file_stamps(paths), options)
    texts = generate_dataset(read_documents, {"paths": paths, **options}, key=key, cache_dir=cache_dir)
    return texts if language is None else with_language(texts, language)


def _column(source: datasets.Dataset, text_column: str) -> datasets.Dataset:
    """Return the one column of text, without rows that have none."""
    texts = source.select_columns([text_column]).with_format(None)
    if text_column != "text":
        texts = texts.rename_column(text_column, "text")
    is_null = [
        pc.is_null(batch["text"]).to_numpy(zero_copy_only=False)
        for batch in texts.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    ]
    rows = np.flatnonzero(~np.concatenate(is_null))
    if not len(rows):
        raise InputError(f"text_column={text_column!r} of the dataset has no text; name another column or split")
    kind = texts.data.table.schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        texts = texts.with_format("arrow").map(_as_strings, batched=True, features=TEXT_FEATURES).with_format(None)
    return texts if len(rows) == len(texts) else texts.select(rows)


def _as_strings(batch: pa.Table) -> pa.Table:
    return pa.table({"text": pa.array(batch.column("text").to_pylist(), pa.string())})


def with_language(texts: datasets.Dataset, language: str) -> datasets.Dataset:
    """Return texts with a column ``lang`` that holds the one language of all of them."""
    fingerprint = Hasher.hash((texts._fingerprint, language))
    return texts.add_column("lang", [language] * len(texts), new_fingerprint=fingerprint)


def file_stamps(paths: Sequence[str]) -> list[tuple[str | int, ...]]:
    """Return the identity of files, by which caches are keyed.

    Args:
        paths: Files.

    Returns:
        For each file its path, the times (ns) of the last change of its text and of its status, which can not be set back,
        and its size (bytes); of a pipe, a digest of what came through it.
    """
    stamps: list[tuple[str | int, ...]] = []
    for path in paths:
        digest = pipe_digest(path)
        stat = Path(path).stat()
        identity = (str(Path(path).resolve()), stat.st_mtime_ns, stat.st_ctime_ns)
        stamps.append((*(identity if digest is None else ("pipe", digest)), stat.st_size))
    return stamps


def _rows(
    generator: Callable[..., Iterator[str | tuple[str, ...]]], columns: tuple[str, ...], **options: Any
) -> Iterator[dict[str, str]]:
    for row in generator(**options):
        yield dict(zip(columns, (row,) if isinstance(row, str) else row, strict=True))


def generate_dataset(
    generator: Callable[..., Iterator[str | tuple[str, ...]]],
    options: Mapping[str, Any],
    *,
    key: Any,
    features: datasets.Features = TEXT_FEATURES,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Write the rows of a generator to an Arrow file, or open the one that was written before.

    Args:
        generator: Called with ``options``; yields a text for each row, or several, one a column.
        options: Keyword arguments of the generator.
        key: Whatever decides the rows; the same key gives the same file.
        features: Columns of the rows: a ``text`` by default.
        cache_dir: Folder of the Arrow files.

    Raises:
        InputError: If the generator raises one.
    """
    fingerprint = Hasher.hash((_VERSION, generator.__module__, generator.__qualname__, key))
    try:
        gen_kwargs = {"generator": generator, "columns": tuple(features), **options}
        return datasets.Dataset.from_generator(
            _rows, features, cache_dir=cache_dir, gen_kwargs=gen_kwargs, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    except (PermissionError, FileNotFoundError, NotADirectoryError) as error:
        folder = cache_dir or datasets.config.HF_DATASETS_CACHE
        raise InputError(f"the cache {folder} can not be written ({error.strerror}): set HF_DATASETS_CACHE") from error


def load_text_dataset(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    cache_dir: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset by its name on the Hub or its local folder, see `datasets.load_dataset`.

    Returns:
        A dataset with the one column ``text``; or, streamed, the dataset as it is.

    Raises:
        InputError: If there is no such dataset, configuration or split within reach, or no such column of text.
    """
    loaded: Any
    try:
        if _is_saved(name):
            loaded = _load_saved(name, split)
            loaded = loaded.to_iterable_dataset(num_shards=_num_shards(loaded)) if streaming else loaded
        else:
            loaded = datasets.load_dataset(name, config_name, split=split, streaming=streaming, cache_dir=cache_dir)
    except InputError:
        raise
    except Exception as error:
        # Builders raise whatever the code inside of them does.
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = one_line(cause, line=0)
        raise InputError(f"dataset_name={name!r} ({config_name=}, {split=}) can not be loaded: {reason}") from error
    if not streaming:
        return text_dataset(loaded, text_column=text_column)
    if loaded.column_names is not None and text_column not in loaded.column_names:
        raise missing_column(text_column, f"dataset_name={name!r}", loaded.column_names)
    if loaded.features is not None:
        check_text_column(loaded.features.arrow_schema, text_column, f"dataset_name={name!r}")
    return loaded.filter(_is_text, input_columns=[text_column])


def _is_text(text: str | None) -> bool:
    return text is not None


def _is_saved(name: str) -> bool:
    """Return whether a name is that of a folder that ``save_to_disk`` wrote."""
    return Path(name, "dataset_dict.json").is_file() or (
        Path(name, "state.json").is_file() and Path(name, "dataset_info.json").is_file()
    )


def _load_saved(name: str, split: str) -> datasets.Dataset:
    """Return a split, or a slice of one, of a folder that ``save_to_disk`` wrote."""
    loaded = datasets.load_from_disk(name)
    if isinstance(loaded, datasets.Dataset):
        # A split that was saved alone may have no name.
        own = str(loaded.split or split.partition("[")[0])
        loaded = datasets.DatasetDict({own: loaded})
    lengths = {own: len(rows) for own, rows in loaded.items()}
    parts = [
        loaded[part.splitname].select(range(part.from_, part.to))
        for part in datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _num_shards(rows: datasets.Dataset) -> int:
    """Return in how many parts stored rows are streamed."""
    return max(1, min(_STREAM_SHARDS, len(rows) // _BATCH_ROWS))


def text_sizes(texts: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the length of each text in bytes of UTF-8 and in characters: ``int64 [num_texts]`` both."""
    num_bytes, num_characters = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    batches = texts.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    num_batches = -(-len(texts) // _BATCH_ROWS)
    for batch in tqdm(batches, desc="Measuring text", total=num_batches, delay=2, disable=None):
        column = batch["text"]
        num_bytes.append(pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64))
        num_characters.append(pc.fill_null(pc.utf8_length(column), 0).to_numpy().astype(np.int64))
    return np.concatenate(num_bytes), np.concatenate(num_characters)


def random_subset(texts: datasets.Dataset, *, max_bytes: int, seed: int) -> datasets.Dataset:
    """Return a keyed random part of the texts that has at most so many bytes, in the order of the texts.

    Texts are taken in a random order, in rounds: those longer than the bytes left are left out, and the first that does not
    fit ends the round. There is another one while less than nine tenths of the bytes are filled. So a text is the rarer
    the longer it is, but only where it is long beside `max_bytes`: one of a thousandth of it is hardly ever left out.

    Raises:
        InputError: If not even one text fits.
    """
    num_bytes, _ = text_sizes(texts)
    if num_bytes.sum() <= max_bytes:
        return texts
    order = draws.permutation(len(texts), seed=seed, stream="corpus subset")
    rows: list[np.ndarray] = []
    room = max_bytes
    while room > max_bytes / 10:
        order = order[num_bytes[order] <= room]
        fits = np.cumsum(num_bytes[order]) <= room
        if not fits.any():
            break
        rows.append(order[fits])
        room -= int(num_bytes[rows[-1]].sum())
        order = order[len(rows[-1]) :]
    if room == max_bytes:
        least = num_bytes[num_bytes > 0].min()
        raise InputError(
            f"max_corpus_bytes={max_bytes} is less than the {least} bytes of the shortest document; use more"
        )
    return texts.select(np.sort(np.concatenate(rows)))
