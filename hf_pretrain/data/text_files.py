"""Reading text files: plain, compressed, JSON lines and Parquet as a stream of documents."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from hf_pretrain.errors import InputError

DocumentSeparator = Literal["blank_line", "line", "file"]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_JSON = (".jsonl", ".ndjson", ".json")
_READABLE = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_UNREADABLE = (".csv", ".tsv", ".arrow", ".zip", ".zst", ".tar", ".7z", ".pdf", ".docx", ".html")
_CHUNK = 1 << 20
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
    if document_separator not in get_args(DocumentSeparator):
        names = ", ".join(get_args(DocumentSeparator))
        raise InputError(f"document_separator={document_separator!r} is unknown; choose one of {names}")
    for path in resolve_paths(paths):
        is_empty = True
        for document in _read_file(path, document_separator, text_column):
            is_empty = False
            yield document
        if is_empty:
            raise InputError(f"{path} holds no text; give a file that does, or leave it out")


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
    return _file_rows(str(path), "line", text_column)


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
            if _format(file) in _UNREADABLE:
                raise InputError(f"{file} has a format that is not read; turn it into .txt, .jsonl or .parquet")
            files[str(file)] = None
    if not files:
        raise InputError(f"paths={paths!r} names no file")
    return list(files)


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _format(file) in _READABLE)
    return sorted(file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file())


def _format(path: Path) -> str:
    """Return the suffix that tells the format, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: str, separator: DocumentSeparator, text_column: str) -> Iterator[str]:
    for document in _file_rows(path, separator, text_column):
        if document := document.strip():
            yield document


def _file_rows(path: str, separator: DocumentSeparator, text_column: str) -> Iterator[str]:
    kind = _format(Path(path))
    if kind == ".parquet":
        return _parquet_rows(path, text_column)
    if kind in _JSON:
        return _json_rows(path, text_column)
    return _text_documents(_lines(path), separator)


def _text_documents(lines: Iterator[str], separator: DocumentSeparator) -> Iterator[str]:
    if separator == "line":
        yield from lines
        return
    document: list[str] = []
    for line in lines:
        if separator == "blank_line" and line.isspace():
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _open(path: str) -> IO[bytes]:
    opener: Callable[..., IO[bytes]] = _OPENERS.get(Path(path).suffix.lower(), open)
    return opener(path, "rb")


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what the system and the decompressors say about a file into an InputError."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise InputError(f"{path} can not be read: {' '.join(str(error).split())}; is it whole?") from error


def _lines(path: str) -> Iterator[str]:
    """Yield lines, each with one line feed at its end, whichever end it had."""
    with _readable(path), _open(path) as stream, TextIOWrapper(stream, encoding="utf-8-sig") as text:
        try:
            for line in text:
                if "\0" in line:
                    break
                yield line
            else:
                return
        except UnicodeDecodeError:
            pass
        raise InputError(
            f"{path} is not text in UTF-8: byte {_first_bad_byte(path)} is not; "
            "convert it, e.g. with iconv, or leave it out"
        )


def _first_bad_byte(path: str) -> int:
    """Return the offset, after decompression, of the first byte that is NUL or not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = num_pending = 0
    with _open(path) as stream:
        while chunk := stream.read(_CHUNK):
            nul = chunk.find(b"\0")
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                bad = offset - num_pending + error.start
                return bad if nul < 0 else min(bad, offset + nul)
            if nul >= 0:
                return offset + nul
            num_pending = len(decoder.getstate()[0])
            offset += len(chunk)
    return offset - num_pending


def _json_rows(path: str, text_column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{where} holds a JSON {type(row).__name__}, not an object; write one object a line")
        if text_column not in row:
            raise missing_column(text_column, where, row)
        text = row[text_column]
        if not isinstance(text, str | None):
            raise InputError(
                f"text_column={text_column!r} of {where} is a {type(text).__name__}, not text; name another"
            )
        if "\\u" in line and text is not None and not _is_encodable(text):
            raise InputError(f"{where} holds half of a surrogate pair, which is no character; repair or drop the line")
        yield text or ""


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: str, text_column: str) -> Iterator[str]:
    with _readable(path):
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error
        with file:
            check_text_column(file.schema_arrow, text_column, path)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[text_column]):
                yield from (text or "" for text in batch.column(0).to_pylist())


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
