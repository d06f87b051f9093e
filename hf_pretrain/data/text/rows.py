"""Rows of JSON and of tables with commas or tabs: the text of each, and where to go on behind it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from typing import Any

from hf_pretrain.data.text.kinds import file_suffix, is_cut_off
from hf_pretrain.data.text.lines import (
    AtLine,
    BadText,
    LineBefore,
    decode_lines,
    normalized_lines,
    open_bytes,
    read_lines,
    readable,
)
from hf_pretrain.errors import InputError

# A text as it is, or the error of one that is no text, and the position behind it.
Row = tuple[str | BadText, int]

_CHUNK = 1 << 18
_DECODER = json.JSONDecoder()
# Python refuses whole numbers of more than some thousand digits. Their value does not matter here.
_LONG_NUMBERS = json.JSONDecoder(parse_int=float)
# Bytes that are not UTF-8, as "surrogateescape" decodes them; halves of a surrogate pair; both are no characters.
_BAD_BYTE = re.compile("[\udc80-\udcff\0]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BETWEEN_VALUES = re.compile(r"[\s,\ufeff]*")
_NOT_UTF8 = "is not text in UTF-8; convert it, e.g. with iconv, or drop the row"
_MOST_COLUMNS, _MOST_LETTERS = 20, 40
_SAMPLE_CHARACTERS = 1 << 22
_LONGEST_FIELD = 1 << 30


def missing_column(text_column: str, where: str, columns: Iterable[Any]) -> InputError:
    """Return the error of a column that is not there."""
    names = [
        repr(str(name) if len(str(name)) <= _MOST_LETTERS else f"{str(name)[:_MOST_LETTERS]}…") for name in columns
    ]
    if len(names) > _MOST_COLUMNS:
        names[_MOST_COLUMNS:] = [f"{len(names) - _MOST_COLUMNS} more"]
    return InputError(f"text_column={text_column!r} is not in {where}; its columns are {', '.join(names)}")


def json_line_rows(path: str, start: int, stop: float, text_column: str, *, line_end: bytes = b"\n") -> Iterator[Row]:
    """Yield the rows of JSON lines that begin in a part of a file, each with the byte behind it."""
    for line, begin in read_lines(path, start, stop, end=line_end):
        if begin >= stop:
            return
        behind = begin + len(line)
        try:
            text = decode_lines(path, line, begin)
            if text and not text.isspace():
                where = LineBefore(path, behind, line_end)
                yield _field(_line_value(text, where), text_column, where, may_be_bad="\\u" in text), behind
        except BadText as error:
            yield error, behind


def _line_value(line: str, where: LineBefore) -> Any:
    try:
        return _decoded(line.strip(), 0, is_line=True)[0]
    except json.JSONDecodeError as error:
        raise BadText(AtLine(where, f"is not JSON ({error}); write one object a line")) from error
    except RecursionError as error:
        raise BadText(AtLine(where, "is JSON with too many brackets inside of each other; drop the line")) from error


def _decoded(text: str, begin: int, *, is_line: bool = False) -> tuple[Any, int]:
    """Return the JSON value at an index of text, and the index behind it."""
    try:
        value, stop = _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError:
        raise
    except ValueError:
        value, stop = _LONG_NUMBERS.raw_decode(text, begin)
    if is_line and stop < len(text):
        raise json.JSONDecodeError("Extra data", text, stop)
    return value, stop


def _field(row: Any, text_column: str, where: Any, may_be_bad: bool) -> str | BadText:
    """Return the text of a JSON object."""
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a JSON {type(row).__name__}, not an object; write one object a line")
    if text_column not in row:
        raise missing_column(text_column, str(where), row)
    text = row[text_column]
    if not isinstance(text, str | None):
        raise InputError(f"text_column={text_column!r} of {where} is a {type(text).__name__}, not text; name another")
    if may_be_bad and text is not None and _SURROGATE.search(text):
        if _BAD_BYTE.search(text):
            return BadText(AtLine(where, _NOT_UTF8))
        return BadText(AtLine(where, "holds half of a surrogate pair, which is no character; repair or drop the line"))
    return text or ""


def json_rows(path: str, position: int, text_column: str) -> Iterator[Row]:
    """Yield the rows of arrays of objects, or of objects over several lines, each with its number, from 1.

    An object without the field that has one list of objects is read as their container, however deep.

    Args:
        path: The file.
        position: Rows to leave out.
        text_column: Name of the field.
    """
    rows = ((row, where) for value, where in _json_values(path) for row in _objects_in(value, text_column))
    for number, (row, where) in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"{where} holds a JSON list of {type(row).__name__}, not of objects; write one object a line"
            )
        if number > position:
            yield _field(row, text_column, where, may_be_bad=True), number


def _objects_in(value: Any, text_column: str) -> Iterator[Any]:
    if isinstance(value, dict) and text_column not in value:
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        if len(lists) == 1:
            for inner in lists[0]:
                yield from _objects_in(inner, text_column)
            return
    yield value


def _json_values(path: str) -> Iterator[tuple[Any, str]]:
    """Yield the values of a file that are in nothing but arrays, and for messages the line that each begins in."""
    with readable(path), open_bytes(path) as stream:
        # Bytes that are not UTF-8 come as halves of a surrogate pair.
        characters = TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        text, at, line, depth = "", 0, 1, 0
        while True:
            at, begin = _BETWEEN_VALUES.match(text, at).end(), at  # type: ignore[union-attr]
            line += text.count("\n", begin, at)
            where = f"{path}, line {line}"
            if at == len(text):
                text, at = characters.read(_CHUNK), 0
                if not text:
                    break
            elif text[at] in "[]":
                depth += 1 if text[at] == "[" else -1
                at += 1
            else:
                value, text, at, begin = _next_value(text, at, characters, where)
                line += text.count("\n", begin, at)
                yield value, where
        if depth:
            raise InputError(f"{path} is not JSON: a bracket is not closed; is it whole?")


def _next_value(text: str, at: int, characters: TextIOWrapper, where: str) -> tuple[Any, str, int, int]:
    """Return a JSON value, the text that was read, and where in it the value ends and begins."""
    while True:
        try:
            value, stop = _decoded(text, at)
            return value, text, stop, at
        except RecursionError as error:
            raise InputError(f"{where} is JSON with too many brackets inside of each other") from error
        except json.JSONDecodeError as error:
            # As much again, so that a very long value is not tried over and over.
            more = characters.read(max(_CHUNK, len(text) - at)) if is_cut_off(error, text) else ""
            if not more:
                raise InputError(
                    f"{where} is not JSON ({error.msg}); write one object a line, or an array of objects"
                ) from error
            text, at = text[at:] + more, 0


class _TableLines:
    """The lines of a table as the module csv wants them, and the byte behind the last one that was taken."""

    def __init__(self, path: str, start: int, line_end: bytes, *, has_quotes: bool = True) -> None:
        self.behind = start
        self._has_quotes = has_quotes
        self._lines = read_lines(path, start, math.inf, end=line_end)

    def __iter__(self) -> Iterator[str]:
        """Yield the lines."""
        is_quoted = False
        for line, begin in self._lines:
            self.behind = begin + len(line)
            text = line.decode(errors="surrogateescape").replace("\r\n", "\n")
            body, end = (text[:-1], "\n") if text.endswith(("\n", "\r")) else (text, "")
            # Outside of quotes, a carriage return would end the row.
            pieces: list[str] = []
            for piece in body.split("\r"):
                if pieces:
                    pieces.append("\n" if is_quoted and self._has_quotes else " ")
                pieces.append(piece)
                is_quoted ^= piece.count('"') % 2 == 1
            yield normalized_lines("".join(pieces) + end)


def table_rows(path: str, position: int, text_column: str, *, line_end: bytes = b"\n") -> Iterator[Row]:
    """Yield the rows of a table with a header, each with the byte behind it.

    Args:
        path: The file; its fields are divided by commas, or by semicolons, tabs or bars if the header is.
        position: First byte; 0, or one that was yielded.
        text_column: Name of the column.
        line_end: What ends a line.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    options, header = _table_options(path, text_column, line_end)
    lines = _TableLines(path, position, line_end, has_quotes="quoting" not in options)
    rows = csv.reader(lines, **options)
    column, is_header = header.index(text_column), position == 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            where = LineBefore(path, lines.behind, line_end)
            raise InputError(
                f"{where} is no row of a table ({error}); put quotation marks around fields that have such or line ends in "
                "them and double those inside, or write JSON lines"
            ) from error
        if row is None:
            return
        if is_header or not any(row):
            is_header = is_header and not any(row)
            continue
        where = LineBefore(path, lines.behind, line_end)
        if len(row) <= column or any(row[len(header) :]):
            raise InputError(
                f"{where} has {len(row)} fields, but the header has {len(header)}; put quotation marks around fields with "
                f"{options['delimiter']!r} in them, or write JSON lines"
            )
        is_bad = _BAD_BYTE.search(row[column])
        yield BadText(AtLine(where, _NOT_UTF8)) if is_bad else row[column], lines.behind


def _table_options(path: str, text_column: str, line_end: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return how a table is written, and its header.

    Raises:
        InputError: If it has no such column.
    """
    has_tabs = file_suffix(path) in (".tsv", ".tab")
    columns: list[str] | None = None
    for delimiter in "\t,;|" if has_tabs else ",;\t|":
        options: dict[str, Any] = {"delimiter": delimiter, "strict": True}
        if delimiter == "\t" and not _has_quotes(path, line_end):
            options["quoting"] = csv.QUOTE_NONE
        try:
            header = next(filter(any, csv.reader(_TableLines(path, 0, line_end), **options)), [])
        except csv.Error:
            header = []
        names = [name.strip() for name in header]
        if text_column in names:
            return options, names
        columns = names if columns is None else columns
    raise missing_column(text_column, str(path), columns or ["none"])


def _has_quotes(path: str, line_end: bytes) -> bool:
    """Return whether quotation marks in a table with tabs enclose fields: whether all rows are as wide as the header then."""
    sample, size = [], 0
    for line in _TableLines(path, 0, line_end):
        sample.append(line)
        size += len(line)
        if size > _SAMPLE_CHARACTERS:
            break
    if not any(line.startswith('"') or '\t"' in line for line in sample):
        return False
    widths: list[int] = []
    try:
        widths.extend(len(row) for row in csv.reader(sample, delimiter="\t", strict=True) if row)
    except csv.Error as error:
        if size <= _SAMPLE_CHARACTERS or "unexpected end" not in str(error):
            return False
    return len(set(widths)) == 1
