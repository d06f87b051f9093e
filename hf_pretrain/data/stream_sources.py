"""Where a stream's text comes from: shards of files or of a streamed dataset, each readable from any place in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from hf_pretrain.data.file_kinds import file_kind
from hf_pretrain.data.shards import Shard, list_shards, read_shard
from hf_pretrain.data.text_files import BadTextCount, DocumentSeparator, OnBadText, missing_column
from hf_pretrain.errors import InputError

_BATCH_ROWS = 256


class ShardSource(Protocol):
    """Text in shards; any object like this can be streamed."""

    @property
    def num_shards(self) -> int:
        """Number of shards, each of which a different process can read."""

    def read(self, shard: int, *, start: int = 0, epoch: int = 0) -> Iterator[tuple[str, int]]:
        """Yield the documents of a shard and, with each, the place behind it: `start` of a call that yields the rest.

        Args:
            shard: Number of the shard.
            start: 0, or a place that an earlier call has yielded.
            epoch: For a source that changes from epoch to epoch.
        """

    def identity(self) -> Any:
        """Return what tells this text from another, as plain data."""


class FileShards:
    """Text files, cut into parts where their format allows it.

    Args:
        paths: Files, folders or globs, as `hf_pretrain.data.text.read_documents` takes them.
        document_separator: What ends a document of a text file.
        text_column: Field or column that holds the text of JSON, tables, Parquet and Arrow.
        on_bad_text: What becomes of a document that is no text, see `hf_pretrain.data.text_files.BadTextCount`.
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
                # The last part takes what is behind its end now.
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
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the streamed dataset can not be read: {reason}; is it whole, and within reach?"
            ) from error

    def identity(self) -> Any:
        """Return the number of shards and the column: a streamed dataset tells no more of itself."""
        return [self.num_shards, self.text_column]


def as_source(
    source: Any, *, document_separator: DocumentSeparator, text_column: str, on_bad_text: OnBadText = "skip"
) -> ShardSource:
    """Return a source of what a user gives: paths, a `datasets.IterableDataset`, or a source.

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
