"""Shards: parts of text files, each read on its own, from any document on, and together the files' documents in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_pretrain.data.file_kinds import file_kind
from hf_pretrain.data.text_files import (
    BadTextCount,
    DocumentSeparator,
    check_separator,
    open_arrow,
    open_parquet,
    read_part,
    resolve_paths,
)
from hf_pretrain.errors import InputError

_NUM_SHARDS = 256
_LEAST_BYTES, _MOST_BYTES = 10**6, 64 * 10**6


@dataclass(frozen=True)
class Shard:
    """A part of a file.

    Args:
        path: The file.
        start: First byte of the part, which may be inside of a document or a character; of a Parquet file, its first
            row group; of an Arrow file, its first batch.
        stop: First byte, row group or batch behind the part; None for the end of the file.
    """

    path: str
    start: int
    stop: int | None


def list_shards(
    paths: str | Path | Sequence[str | Path],
    *,
    most_bytes: int | None = None,
    document_separator: DocumentSeparator = "blank_line",
) -> list[Shard]:
    """Cut files into parts of about one size, which depend on nothing but the files and the options.

    Args:
        paths: Files, folders or globs, see `hf_pretrain.data.text_files.read_documents`.
        most_bytes: Size of a part; by default a 256th of all the files, but from 1 to 64 MB. Text, JSON lines and, between
            row groups or batches, Parquet and Arrow files are cut; a file that is compressed, or a table with commas or
            tabs, or JSON that is not JSON lines, is one part.
        document_separator: What ends a document of a text file; with ``"file"`` it is not cut.

    Returns:
        The parts in the order of the files, at least one a file.

    Raises:
        InputError: If a path stands for no file or one of a format that is not read, or ``most_bytes`` is not positive.
    """
    check_separator(document_separator)
    if most_bytes is not None and most_bytes < 1:
        raise InputError(f"most_bytes={most_bytes} must be positive; {_MOST_BYTES} is usual for a large corpus")
    files = resolve_paths(paths)
    if most_bytes is None:
        total = sum(Path(file).stat().st_size for file in files)
        most_bytes = min(max(total // _NUM_SHARDS, _LEAST_BYTES), _MOST_BYTES)
    return [Shard(file, start, stop) for file in files for start, stop in _parts(file, most_bytes, document_separator)]


def read_shard(
    shard: Shard,
    *,
    start: int = 0,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
    bad: BadTextCount | None = None,
) -> Iterator[tuple[str, int]]:
    """Read the documents that begin in a shard, the last one to its end.

    Args:
        shard: One that `list_shards` returned for the same ``document_separator``.
        start: Where to go on: a position that was yielded with a document of this shard, or 0 for its front. What lies
            before is not read again, but decompressed if the file is compressed, and a Parquet file is read from the row
            group on that the position lies in.
        document_separator: What ends a document of a text file.
        text_column: Name of the field or column that holds the text.
        bad: What becomes of a document that is no text; by default, it is refused.

    Yields:
        Each document as `hf_pretrain.data.text_files.read_documents` yields it, with the position behind it.

    Raises:
        InputError: As `read_documents`.
    """
    check_separator(document_separator)
    return read_part(
        shard.path,
        start=shard.start,
        stop=shard.stop,
        position=start,
        document_separator=document_separator,
        text_column=text_column,
        bad=bad,
    )


def _parts(file: str, most_bytes: int, document_separator: DocumentSeparator) -> Iterator[tuple[int, int | None]]:
    """Yield start and stop of each part of a file."""
    kind = file_kind(file)
    if kind.format in ("parquet", "arrow") and not kind.reason:
        return _joined_groups(_parquet_groups(file) if kind.format == "parquet" else _arrow_groups(file), most_bytes)
    if (
        kind.is_compressed
        or kind.format in ("csv", "json")
        or (kind.format == "text" and document_separator == "file")
    ):
        return iter([(0, None)])
    size = Path(file).stat().st_size
    num_parts = max(-(-size // most_bytes), 1)
    return itertools.pairwise(size * part // num_parts for part in range(num_parts + 1))


def _joined_groups(sizes: Iterable[int], most_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield neighbouring groups of rows together, as long as they have at most so many bytes."""
    start = size = number = 0
    for number, group_size in enumerate(sizes, start=1):
        if size and size + group_size > most_bytes:
            yield start, number - 1
            start, size = number - 1, 0
        size += group_size
    yield start, number


def _parquet_groups(file: str) -> Iterator[int]:
    with open_parquet(file) as parquet:
        for group in range(parquet.num_row_groups):
            yield parquet.metadata.row_group(group).total_byte_size


def _arrow_groups(file: str) -> Iterator[int]:
    with open_arrow(file) as (_, batches):
        for batch in batches:
            yield batch.nbytes
