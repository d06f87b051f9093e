"""Where a stream's text comes from: shards of files or of a streamed dataset, each readable from any document on.

`list_shards` cuts files into parts of about one size. Together the parts hold the documents of the files, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, get_args

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from hf_pretrain.data.text.files import (
    BadTextCount,
    DocumentSeparator,
    OnBadText,
    open_arrow,
    open_parquet,
    read_part,
)
from hf_pretrain.data.text.kinds import file_kind
from hf_pretrain.data.text.rows import missing_column
from hf_pretrain.data.text.search import resolve_paths
from hf_pretrain.errors import InputError, check_choice, check_range, one_line

_NUM_SHARDS, _BATCH_ROWS = 256, 256
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
        paths: Files, folders or globs, see `hf_pretrain.data.text.files.read_documents`.
        most_bytes: Size of a part; by default a 256th of all the files, but from 1 to 64 MB. Text, JSON lines and, between
            row groups or batches, Parquet and Arrow files are cut; a file that is compressed, or a table with commas or
            tabs, or JSON that is not JSON lines, is one part.
        document_separator: What ends a document of a text file; with ``"file"`` it is not cut.

    Returns:
        The parts in the order of the files, at least one a file.

    Raises:
        InputError: If a path stands for no file or one of a format that is not read, or ``most_bytes`` is not positive.
    """
    check_choice(document_separator, get_args(DocumentSeparator), name="document_separator")
    if most_bytes is not None:
        check_range(most_bytes, "[1, inf)", name="most_bytes", hint=f"{_MOST_BYTES} is usual for a large corpus")
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
        start: Where to go on: a position that was yielded with a document of this shard, or 0 for its front. Earlier text
            is not read again, but decompressed if the file is compressed, and a Parquet file is read from the row
            group on that the position lies in.
        document_separator: What ends a document of a text file.
        text_column: Name of the field or column that holds the text.
        bad: Whether to refuse or skip a document that is no text; by default it is refused.

    Yields:
        Each document as `hf_pretrain.data.text.files.read_documents` yields it, with the position behind it.

    Raises:
        InputError: As `read_documents`.
    """
    check_choice(document_separator, get_args(DocumentSeparator), name="document_separator")
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


class ShardSource(Protocol):
    """Text in shards; any object like this can be streamed."""

    @property
    def num_shards(self) -> int:
        """Number of shards, each of which a different process can read."""

    def read(self, shard: int, *, start: int = 0, epoch: int = 0) -> Iterator[tuple[str, int]]:
        """Yield the documents of a shard, each with the position behind it: the `start` of a call that yields the rest.

        Args:
            shard: Number of the shard.
            start: 0, or a position that an earlier call has yielded.
            epoch: For a source that changes from epoch to epoch.
        """

    def identity(self) -> Any:
        """Return plain data that differs for another text."""


class FileShards:
    """Text files, cut into parts where their format allows it.

    Args:
        paths: Files, folders or globs, as `hf_pretrain.data.text.datasets.read_documents` takes them.
        document_separator: What ends a document of a text file.
        text_column: Field or column that holds the text of JSON, tables, Parquet and Arrow.
        on_bad_text: Whether to refuse or skip a document that is no text, see `hf_pretrain.data.text.files.BadTextCount`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        document_separator: DocumentSeparator = "blank_line",
        text_column: str = "text",
        on_bad_text: OnBadText = "skip",
    ) -> None:
        self.shards = list_shards(paths, document_separator=document_separator)
        self.document_separator = document_separator
        self.text_column = text_column
        self.bad = BadTextCount(on_bad_text)

    @property
    def num_shards(self) -> int:
        """Number of parts of all files."""
        return len(self.shards)

    def read(self, shard: int, *, start: int = 0, epoch: int = 0) -> Iterator[tuple[str, int]]:
        """Yield the documents of a part; see [`ShardSource`]."""
        return read_shard(
            self.shards[shard],
            start=start,
            document_separator=self.document_separator,
            text_column=self.text_column,
            bad=self.bad,
        )

    def identity(self) -> Any:
        """Return the names of the files, without their folders, and how they are read."""
        return [[name for name, *_ in self.cuts()], self.document_separator, self.text_column]

    def cuts(self) -> Any:
        """Return how each file is cut, as plain data: its name, format and size, and start and stop of each part."""
        return [
            [
                Path(path).name,
                file_kind(path).format,
                Path(path).stat().st_size,
                [[part.start, part.stop] for part in parts],
            ]
            for path, parts in itertools.groupby(self.shards, attrgetter("path"))
        ]

    def cut_like(self, cuts: Any) -> list[str]:
        """Cut the files as they were cut before, also if some of them have been changed since.

        Args:
            cuts: What `cuts` returned then, of files of the same names.

        Returns:
            The names of the files that are longer or shorter now.

        Raises:
            InputError: If a file is of another format now.
        """
        shards, changed = [], []
        paths = dict.fromkeys(shard.path for shard in self.shards)
        for path, (name, form, size, _), (_, form_before, size_before, spans) in zip(
            paths, self.cuts(), cuts, strict=True
        ):
            if form != form_before:
                raise InputError(
                    f"{path} was {form_before} when the checkpoint was made and is {form} now: bring it back"
                )
            parts = [Shard(path, start, stop) for start, stop in spans]
            if size != size_before:
                changed.append(name)
                # The last part takes the new text behind its end too.
                parts[-1] = Shard(path, parts[-1].start, None)
            shards += parts
        self.shards = shards
        return changed


class DatasetShards:
    """A streamed dataset, with the shards that it has.

    Args:
        dataset: The dataset; shuffled or not.
        text_column: Column that holds the text.
    """

    def __init__(self, dataset: datasets.IterableDataset, *, text_column: str = "text") -> None:
        names = dataset.column_names
        if names is not None and text_column not in names:
            raise missing_column(text_column, "the dataset", names)
        self.dataset = dataset
        self.text_column = text_column

    @property
    def num_shards(self) -> int:
        """Number of shards that the dataset was made of."""
        return self.dataset.num_shards

    def read(self, shard: int, *, start: int = 0, epoch: int = 0) -> Iterator[tuple[str, int]]:
        """Yield the rows of a shard from row `start` on; the rows before are read and left out."""
        rows = self.dataset.shard(self.num_shards, shard)
        rows.set_epoch(epoch)
        # iter(batch_size), unlike plain iteration, does not share the shard out among the workers once more.
        batches = (rows.skip(start) if start else rows).iter(batch_size=_BATCH_ROWS)
        texts = itertools.chain.from_iterable(batch[self.text_column] for batch in batches)
        try:
            for number, text in enumerate(texts, start + 1):
                if not isinstance(text, str | None):
                    raise InputError(
                        f"text_column={self.text_column!r} of the dataset is a {type(text).__name__}, not text; name another"
                    )
                if text:  # a row without text is null
                    yield text, number
        except InputError:
            raise
        except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
            cause = one_line(error, line=0)
            raise InputError(
                f"the streamed dataset can not be read: {cause}; is it whole, and within reach?"
            ) from error

    def identity(self) -> Any:
        """Return the number of shards and the column: more is not known of a streamed dataset."""
        return [self.num_shards, self.text_column]


def as_source(
    source: Any, *, document_separator: DocumentSeparator, text_column: str, on_bad_text: OnBadText = "skip"
) -> ShardSource:
    """Return a source for paths, a `datasets.IterableDataset`, or a source itself.

    Raises:
        InputError: If it is none of them, or there is no text of that column.
    """
    if isinstance(source, datasets.IterableDataset):
        return DatasetShards(source, text_column=text_column)
    if hasattr(source, "read") and hasattr(source, "num_shards"):
        return source
    if isinstance(source, str | Path) or not isinstance(source, Sequence) or not source:
        raise InputError(f"source={source!r} must be a list of at least one path, or a datasets.IterableDataset")
    return FileShards(source, document_separator=document_separator, text_column=text_column, on_bad_text=on_bad_text)
