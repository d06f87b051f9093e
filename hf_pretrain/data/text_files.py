"""Reading text files: plain, compressed, JSON lines and Parquet as a stream of documents.

Text is cut into lines, and lines are joined into documents, as bytes: so a part of a file can be read on its own, from any
byte on, and the place behind each document is known. What begins in a part is read to its end, wherever that is.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from hf_pretrain.data.text_lines import (
    CHUNK,
    OPENERS,
    LineBefore,
    decode_lines,
    is_blank,
    read_lines,
    readable,
)
from hf_pretrain.errors import InputError

DocumentSeparator = Literal["blank_line", "line", "file"]

JSON_FORMATS = (".jsonl", ".ndjson", ".json")
_READABLE = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_UNREADABLE = (".csv", ".tsv", ".arrow", ".zip", ".zst", ".tar", ".7z", ".pdf", ".docx", ".html")
_BATCH_ROWS = 256


def read_documents(
    paths: str | Path | Sequence[str | Path],
    *,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
) -> Iterator[str]:
    """Read documents one after the other, in memory that does not grow with the files.

    Args:
        paths: Files, folders (all their ``.txt``, ``.jsonl`` and ``.parquet`` files, compressed ones too) or globs.
            ``.jsonl``, ``.json`` and ``.parquet`` hold one document a row; any other file is read as UTF-8 text.
            ``.gz``, ``.xz`` and ``.bz2`` are decompressed on the fly.
        document_separator: What ends a document of a text file: ``"blank_line"``, ``"line"`` or only its end,
            ``"file"``.
        text_column: Name of the field (JSON) or column (Parquet) that holds the text.

    Yields:
        Documents without white space around them; blank ones are left out.

    Raises:
        InputError: If a file is missing, empty, binary, not UTF-8 or damaged, or has no such column.
    """
    check_separator(document_separator)
    for path in resolve_paths(paths):
        documents = read_part(path, document_separator=document_separator, text_column=text_column)
        yield from map(itemgetter(0), documents)


def read_part(
    path: str,
    *,
    start: int = 0,
    stop: int | None = None,
    position: int = 0,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
) -> Iterator[tuple[str, int]]:
    """Read the documents of a part of a file; those of the parts that make up a file are those of the file, in order.

    Args:
        path: The file.
        start: First byte of the part; of a Parquet file, its first row group.
        stop: First byte, or row group, behind the part; by default the end of the file.
        position: Where to go on: a position that was yielded with a document of the part, or 0 for its front.
        document_separator: What ends a document of a text file; parts need another than ``"file"``.
        text_column: Name of the field or column that holds the text.

    Yields:
        As `read_documents`, each document with the position behind it: a byte (of what is decompressed), or of a Parquet
        file the number of the row in the part.

    Raises:
        InputError: As `read_documents`; the first part raises it if there is no text in the whole file.
    """
    is_empty = True
    for document, behind in _rows(path, document_separator, text_column, (start, stop), position):
        if document := document.strip():
            is_empty = False
            yield document, behind
    if is_empty and start == position == 0:
        others = _rows(path, document_separator, text_column, (stop, None), 0) if stop else iter([])
        if not any(document.strip() for document, _ in others):
            raise InputError(f"{path} holds no text; give a file that does, or leave it out")


def check_separator(document_separator: str) -> None:
    """Raise InputError if there is no such separator of documents."""
    if document_separator not in get_args(DocumentSeparator):
        names = ", ".join(get_args(DocumentSeparator))
        raise InputError(f"document_separator={document_separator!r} is unknown; choose one of {names}")


def read_rows(path: str | Path, *, text_column: str = "text") -> Iterator[str]:
    """Read the rows of one file, blank ones too: the lines of a text, or the values of a JSON field or Parquet column.

    Args:
        path: File, compressed or not; one that is neither JSON lines nor Parquet is read as UTF-8 text.
        text_column: Name of the field or column.

    Returns:
        The texts as they are, lines with their ends.

    Raises:
        InputError: As `read_documents` when a row is read, but that a file may be empty.
    """
    return (text for text, _ in _rows(str(path), "line", text_column, (0, None), 0))


def resolve_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the files that paths, folders and globs stand for, each once: in the order given, sorted inside of each.

    Raises:
        InputError: If one stands for no file, or for a file of a format that is not read.
    """
    files: dict[str, None] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        found = _expand(Path(path).expanduser())
        if not found:
            raise InputError(f"{path} is no file, no folder with {', '.join(_READABLE)} files and no pattern of any")
        for file in found:
            if file_format(file) in _UNREADABLE:
                raise InputError(f"{file} has a format that is not read; turn it into .txt, .jsonl or .parquet")
            files[str(file)] = None
    if not files:
        raise InputError(f"paths={paths!r} names no file")
    return list(files)


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and file_format(file) in _READABLE)
    return sorted(file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file())


def file_format(path: str | Path) -> str:
    """Return the suffix that tells the format, without that of a compression."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _rows(
    path: str, separator: DocumentSeparator, text_column: str, part: tuple[int, int | None], position: int
) -> Iterator[tuple[str, int]]:
    """Yield the texts of a part of a file as they are, blank ones too, each with the position behind it."""
    kind = file_format(path)
    start, stop = part
    if kind == ".parquet":
        return _parquet_rows(path, text_column, part, position)
    # What begins in a part is what it goes on with, so a part that has been read to a position is one that starts there.
    end = math.inf if stop is None else stop
    begin = position or start
    if kind in JSON_FORMATS:
        return _json_rows(path, begin, end, text_column)
    if separator == "line":
        return _text_lines(path, begin, end)
    return _text_documents(path, begin, end, cut_at_blank=separator == "blank_line")


def _text_lines(path: str, start: int, stop: float) -> Iterator[tuple[str, int]]:
    for lines, begin in read_lines(path, start, stop):
        behind = begin
        for line in lines:
            if behind >= stop:
                return
            begin, behind = behind, behind + len(line)
            yield decode_lines(path, line, begin), behind


def _text_documents(path: str, start: int, stop: float, *, cut_at_blank: bool) -> Iterator[tuple[str, int]]:
    """Yield the documents behind a blank line that begins in the part, and the first one of a file."""
    document: list[bytes] = []
    behind, is_ours = start, start == 0
    for lines, begin in read_lines(path, start, stop):
        behind = begin
        for line in lines:
            if cut_at_blank and is_blank(line):
                if document:
                    yield _joined(path, document, behind)
                    document = []
                is_ours = behind < stop
            elif is_ours:
                document.append(line)
            if not is_ours and behind >= stop:
                return
            behind += len(line)
    if document:
        yield _joined(path, document, behind)


def _joined(path: str, document: list[bytes], behind: int) -> tuple[str, int]:
    joined = b"".join(document)
    return decode_lines(path, joined, behind - len(joined)), behind


def _json_rows(path: str, start: int, stop: float, text_column: str) -> Iterator[tuple[str, int]]:
    for line, behind in _text_lines(path, start, stop):
        if not line.isspace():
            yield _json_text(line, text_column, LineBefore(path, behind)), behind


def _json_text(line: str, text_column: str, where: LineBefore) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a JSON {type(row).__name__}, not an object; write one object a line")
    if text_column not in row:
        raise missing_column(text_column, str(where), row)
    text = row[text_column]
    if not isinstance(text, str | None):
        raise InputError(f"text_column={text_column!r} of {where} is a {type(text).__name__}, not text; name another")
    if "\\u" in line and text is not None and not _is_encodable(text):
        raise InputError(f"{where} holds half of a surrogate pair, which is no character; repair or drop the line")
    return text or ""


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Raises:
        InputError: If it is none, or what is read from it turns out to be damaged.
    """
    with readable(path):
        try:
            # Buffered, a column of a row group is not held as a whole.
            with pq.ParquetFile(path, buffer_size=CHUNK) as file:
                yield file
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no whole Parquet file: {' '.join(str(error).split())}") from error


def _parquet_rows(
    path: str, text_column: str, part: tuple[int, int | None], position: int
) -> Iterator[tuple[str, int]]:
    with open_parquet(path) as file:
        check_text_column(file.schema_arrow, text_column, path)
        groups = list(range(file.num_row_groups)[slice(*part)])
        row = 0
        while groups and row + file.metadata.row_group(groups[0]).num_rows <= position:
            row += file.metadata.row_group(groups.pop(0)).num_rows
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=[text_column]):
            num_known = min(max(position - row, 0), len(batch))
            texts = batch.column(0)[num_known:].to_pylist()
            yield from ((text or "", behind) for behind, text in enumerate(texts, row + num_known + 1))
            row += len(batch)


def check_text_column(schema: pa.Schema, text_column: str, where: str) -> None:
    """Raise InputError if an Arrow schema has no such column, or one that is not text."""
    if text_column not in schema.names:
        raise missing_column(text_column, where, schema.names)
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"text_column={text_column!r} of {where} is of type {kind}, not text; name another column")


def missing_column(text_column: str, where: str, columns: Iterable[str]) -> InputError:
    """Return the error of a column that is not there."""
    return InputError(
        f"text_column={text_column!r} is not in {where}; its columns are {', '.join(map(repr, columns))}"
    )
