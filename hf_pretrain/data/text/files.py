"""Documents of text files, as a stream: plain or compressed text, JSON, tables, Parquet and Arrow.

`read_documents` reads whole files, `read_part` a part of one. Text is cut into lines, and lines are joined into
documents, as bytes. So a part of a file can be read on its own, from any byte on, and the position behind each
document is known. A document that begins in a part is read to its end, also behind the end of the part.
`numbered_documents` names the file of each document.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from hf_pretrain.data.text.kinds import FileKind, file_kind, text_kind
from hf_pretrain.data.text.lines import CHUNK, BadText, decode_lines, is_blank, read_lines, readable
from hf_pretrain.data.text.rows import Row, json_line_rows, json_rows, missing_column, table_rows
from hf_pretrain.data.text.search import pipe_digest, resolve_paths
from hf_pretrain.errors import InputError, check_choice, one_line

DocumentSeparator = Literal["blank_line", "line", "file"]
OnBadText = Literal["refuse", "skip"]
_Item = TypeVar("_Item")

_BATCH_ROWS = 256
# Documents that are no text may be skipped up to this number, and beyond it up to this share.
_MOST_SKIPPED, _MOST_SKIPPED_SHARE = 10, 0.01
_FIRST_SHOWN = 3
# A column without a type holds nothing but nulls.
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)


class BadTextCount:
    """Skips documents that are no text, and says so; or refuses the first.

    Args:
        on_bad_text: ``"refuse"``; or ``"skip"``: up to 10, and of more than 1 000 documents up to 1 %.
    """

    def __init__(self, on_bad_text: OnBadText = "refuse") -> None:
        check_choice(on_bad_text, get_args(OnBadText), name="on_bad_text")
        self.on_bad_text = on_bad_text
        self.num_documents = 0
        self.num_skipped = 0

    def skip(self, error: BadText) -> None:
        """Count a document that is left out, and print why, if it is one of the first.

        Raises:
            BadText: If it must not be left out.
            InputError: If too many were.
        """
        if self.on_bad_text == "refuse":
            raise error
        self.num_skipped += 1
        if self.num_skipped > max(_MOST_SKIPPED, _MOST_SKIPPED_SHARE * (self.num_documents + self.num_skipped)):
            raise InputError(
                f"{self.num_skipped} of {self.num_documents + self.num_skipped} documents are no text, which is too many to "
                f"skip; the last: {error}"
            )
        if self.num_skipped <= _FIRST_SHOWN or self.num_skipped in (10, 100, 1000, 10_000, 100_000):
            print(f"skipped a document ({self.num_skipped} so far): {error}", flush=True)


def read_documents(
    paths: str | Path | Sequence[str | Path],
    *,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
    on_bad_text: OnBadText = "refuse",
) -> Iterator[str]:
    """Read documents one after the other, in memory that does not grow with the files.

    Args:
        paths: Files, folders (see `hf_pretrain.data.text.search.find_files`), globs, pipes, or ``"-"`` for the standard
            input. JSON, CSV, TSV, Parquet and Arrow files hold one document a row; any other file is read as UTF-8 text.
            Files compressed by gzip, xz, bzip2, zstd or lz4 are decompressed on the fly.
        document_separator: What ends a document of a text file: ``"blank_line"``, ``"line"`` or only its end,
            ``"file"``.
        text_column: Name of the field or column that holds the text.
        on_bad_text: Whether to refuse or skip a document that is not UTF-8, or a row that is not JSON, see [`BadTextCount`].

    Yields:
        Documents without white space around them; blank ones are left out.

    Raises:
        InputError: If a file is missing, empty, of a kind that is not read, not UTF-8 or damaged, or has no such column.
    """
    check_choice(document_separator, get_args(DocumentSeparator), name="document_separator")
    bad = BadTextCount(on_bad_text)
    for path in resolve_paths(paths):
        documents = read_part(path, document_separator=document_separator, text_column=text_column, bad=bad)
        yield from map(itemgetter(0), documents)


def read_part(
    path: str,
    *,
    start: int = 0,
    stop: int | None = None,
    position: int = 0,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
    bad: BadTextCount | None = None,
) -> Iterator[tuple[str, int]]:
    """Read the documents of a part of a file; those of the parts that make up a file are those of the file, in order.

    Args:
        path: The file.
        start: First byte of the part; of a Parquet file, its first row group; of an Arrow file, its first batch.
        stop: First byte, row group or batch behind the part; by default the end of the file.
        position: Where to go on: a position that was yielded with a document of the part, or 0 for its front.
        document_separator: What ends a document of a text file; parts need another than ``"file"``.
        text_column: Name of the field or column that holds the text.
        bad: Whether to refuse or skip a document that is no text; by default it is refused.

    Yields:
        As `read_documents`, each document with the position behind it: a byte (after decompression), or in a Parquet,
        Arrow or JSON file that is not JSON lines the number of the row in the part.

    Raises:
        InputError: As `read_documents`; the first part raises it if there is no text in the whole file.
    """
    bad = BadTextCount() if bad is None else bad
    kind = text_kind(path)
    is_empty = True
    for document, behind in _rows(path, kind, document_separator, text_column, (start, stop), position):
        if isinstance(document, BadText):
            is_empty = False
            bad.skip(document)
        elif document := document.strip():
            is_empty = False
            bad.num_documents += 1
            yield document, behind
    if is_empty and start == position == 0:
        others = _rows(path, kind, document_separator, text_column, (stop, None), 0) if stop else iter([])
        if not any(isinstance(document, BadText) or document.strip() for document, _ in others):
            raise InputError(f"{path} holds no text; give a file that does, or leave it out")


def read_rows(path: str | Path, *, text_column: str | None = None) -> Iterator[str | BadText]:
    """Read the rows of one file, blank ones too: its lines, or the values of a field or column.

    Args:
        path: The file, compressed or not.
        text_column: Name of the field or column; without it, lines are read, which end at line feeds alone.

    Returns:
        The texts as they are, lines with their ends; a text that is none comes as an error.

    Raises:
        InputError: As `read_documents` when a row is read, but that a file may be empty.
    """
    kind = text_kind(path)
    if text_column is None:
        if kind.line_end != b"\n":
            raise InputError(
                f"{path} has carriage returns, but no line feeds, so it is one line; turn them into line feeds: "
                "tr '\\r' '\\n'"
            )
        kind = kind._replace(format="text")
    return (text for text, _ in _rows(str(path), kind, "line", text_column or "", (0, None), 0))


def _rows(
    path: str,
    kind: FileKind,
    separator: DocumentSeparator,
    text_column: str,
    part: tuple[int, int | None],
    position: int,
) -> Iterator[Row]:
    """Yield the texts of a part of a file as they are, blank ones too, each with the position behind it."""
    start, stop = part
    if kind.format == "parquet":
        return _parquet_rows(path, text_column, part, position)
    if kind.format == "arrow":
        return _arrow_rows(path, text_column, part, position)
    if kind.format == "json":
        return json_rows(path, position, text_column)
    if kind.format == "csv":
        return table_rows(path, position, text_column, line_end=kind.line_end)
    # A part that has been read to a position goes on as one that starts there.
    end = math.inf if stop is None else stop
    begin = position or start
    if kind.format == "json_lines":
        return json_line_rows(path, begin, end, text_column, line_end=kind.line_end)
    is_tag = _is_document_tag if kind.format == "marked_text" else None
    if separator == "line":
        return _text_lines(path, begin, end, kind.line_end, leave_out=is_tag)
    return _text_documents(
        path, begin, end, kind.line_end, ends=is_tag or (is_blank if separator == "blank_line" else None)
    )


def _is_document_tag(line: bytes) -> bool:
    return line.startswith((b"<doc ", b"</doc>")) or line.lstrip(b"\xef\xbb\xbf").startswith(b"<doc ")


def _text_lines(
    path: str, start: int, stop: float, line_end: bytes, *, leave_out: Callable[[bytes], bool] | None = None
) -> Iterator[Row]:
    for line, begin in read_lines(path, start, stop, end=line_end):
        if begin >= stop:
            return
        if leave_out is None or not leave_out(line):
            yield _text_row(path, [line], begin + len(line))


def _text_documents(
    path: str, start: int, stop: float, line_end: bytes, *, ends: Callable[[bytes], bool] | None
) -> Iterator[Row]:
    """Yield the documents behind an ending line that begins in the part, and the first one of a file."""
    document: list[bytes] = []
    begin, is_ours = start, start == 0
    for line, begin in read_lines(path, start, stop, end=line_end):
        if ends is not None and ends(line):
            if document:
                yield _text_row(path, document, begin)
                document = []
            is_ours = begin < stop
        elif is_ours:
            document.append(line)
        if not is_ours and begin >= stop:
            return
    if document:
        yield _text_row(path, document, begin + len(document[-1]))


def _text_row(path: str, lines: list[bytes], behind: int) -> Row:
    text = b"".join(lines)
    try:
        return decode_lines(path, text, behind - len(text)), behind
    except BadText as error:
        return error, behind


@contextmanager
def _whole(path: str, kind: str) -> Iterator[None]:
    """Turn the errors of a file of tables into an InputError that names the file and its kind."""
    with readable(path):
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no whole {kind} file: {one_line(error)}") from error


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Raises:
        InputError: If it is none, or is found damaged while it is read.
    """
    # Buffered, a column of a row group is not held as a whole.
    with _whole(path, "Parquet"), pq.ParquetFile(path, buffer_size=CHUNK) as file:
        yield file


def _parquet_rows(path: str, text_column: str, part: tuple[int, int | None], position: int) -> Iterator[Row]:
    with open_parquet(path) as file:
        check_text_column(file.schema_arrow, text_column, path)
        groups = list(range(file.num_row_groups)[slice(*part)])
        row = 0
        while groups and row + file.metadata.row_group(groups[0]).num_rows <= position:
            row += file.metadata.row_group(groups.pop(0)).num_rows
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=[text_column]):
            yield from _batch_rows(path, batch.column(0), row, position)
            row += len(batch)


@contextmanager
def open_arrow(path: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Open an Arrow file, or the stream that `datasets.Dataset.save_to_disk` writes: its schema and its batches.

    Raises:
        InputError: If it is none, or is found damaged while it is read.
    """
    with _whole(path, "Arrow"), pa.memory_map(path) as file:
        if file.size() and file.read_at(6, 0) == b"ARROW1":
            opened = pa.ipc.open_file(file)
            yield opened.schema, map(opened.get_batch, range(opened.num_record_batches))
        else:
            stream = pa.ipc.open_stream(file)
            yield stream.schema, iter(stream)


def _arrow_rows(path: str, text_column: str, part: tuple[int, int | None], position: int) -> Iterator[Row]:
    with open_arrow(path) as (schema, batches):
        check_text_column(schema, text_column, path)
        row = 0
        for batch in itertools.islice(batches, *part):
            if row + len(batch) > position:
                column = batch.column(text_column)
                _check_whole(column)
                yield from _batch_rows(path, column, row, position)
            row += len(batch)


def _check_whole(column: pa.Array) -> None:
    """Raise ArrowInvalid if a column of a file points to where there is nothing: reading it would end the process."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


def _batch_rows(path: str, column: pa.Array, row: int, position: int) -> Iterator[Row]:
    """Yield the texts of a batch that begins at a row of the part, from the position on."""
    num_known = min(max(position - row, 0), len(column))
    for first in range(num_known, len(column), _BATCH_ROWS):
        piece = column[first : first + _BATCH_ROWS]
        try:
            texts: list[str | None | BadText] = piece.to_pylist()
        except UnicodeDecodeError:
            texts = [_value(path, value, number) for number, value in enumerate(piece, row + first + 1)]
        for behind, text in enumerate(texts, row + first + 1):
            yield "" if text is None else text, behind


def _value(path: str, value: pa.Scalar, number: int) -> str | None | BadText:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        name = "Parquet" if file_kind(path).format == "parquet" else "Arrow"
        return BadText(
            f"{path} is no whole {name} file: the text of row {number} is not UTF-8; convert it or drop the row"
        )


def check_text_column(schema: pa.Schema, text_column: str, where: str) -> None:
    """Raise InputError if an Arrow schema has no such column, or one that is not text."""
    if text_column not in schema.names:
        raise missing_column(text_column, where, schema.names)
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_text(kind) for is_text in _TEXT_TYPES):
        raise InputError(f"text_column={text_column!r} of {where} is of type {kind}, not text; name another column")


class NumberedDocument(NamedTuple):
    """A document: its text, the name of its file and which of the file's documents it is, from 0."""

    source: str
    number: int
    text: str


def numbered_documents(
    paths: str | Path | Sequence[str | Path],
    *,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
) -> Iterator[NumberedDocument]:
    """Read documents as `read_documents` does, each with its file and its number in it.

    Args:
        paths: Files, folders and globs.
        document_separator: What ends a document of a text file.
        text_column: Name of the field or column that holds the text.

    Yields:
        The documents; ``source`` is the path below the folder that all the files lie in.

    Raises:
        InputError: As `read_documents`.
    """
    files = resolve_paths(paths)
    real_paths = [Path(file).resolve() for file in files if pipe_digest(file) is None]
    root = os.path.commonpath([path.parent for path in real_paths]) if real_paths else ""
    for file in files:
        is_piped = pipe_digest(file) is not None
        source = Path(file).name if is_piped else Path(file).resolve().relative_to(root).as_posix()
        texts = read_documents(file, document_separator=document_separator, text_column=text_column)
        for number, text in enumerate(texts):
            yield NumberedDocument(source, number, text)


def in_groups(
    items: Iterable[_Item], *, num_characters: int, text: Callable[[_Item], str] = attrgetter("text")
) -> Iterator[list[_Item]]:
    """Yield neighbouring documents, or other items with a text, together, until they reach so many characters."""
    group: list[_Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += len(text(item))
        if size >= num_characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def excerpt(text: str, *, num_characters: int = 72) -> str:
    """Return the beginning of a text on one line, with an ellipsis where something is left out."""
    line = " ".join(text[: 4 * num_characters].split())
    return (
        line if len(line) <= num_characters and len(text) <= 4 * num_characters else f"{line[: num_characters - 1]}…"
    )
