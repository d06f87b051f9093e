"""Lines of text files as bytes, and where they are: so that a file can be read from any byte on."""

from __future__ import annotations

import bisect
import bz2
import codecs
import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from hf_pretrain.errors import InputError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# Bytes read at a time: little against a part of a file, because as much is read in vain behind its end.
CHUNK = 1 << 16
# First bytes of the characters that are white space to Unicode.
_BLANKS = frozenset(blank.encode()[0] for blank in "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\u1680\u2000\u3000")


def is_compressed(path: str | Path) -> bool:
    """Return whether a file is decompressed as a whole."""
    return Path(path).suffix.lower() in OPENERS


def is_blank(line: bytes) -> bool:
    """Return whether a line is white space, of any kind that Unicode knows."""
    return line[0] in _BLANKS and line.decode(errors="replace").isspace()


def decode_lines(path: str, text: bytes, begin: int) -> str:
    """Return text, which begins at byte ``begin`` of a file, with a line feed at the end of each line, whichever it had.

    Raises:
        InputError: If it is not UTF-8 or holds a NUL.
    """
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        nul = text.find(b"\0", 0, error.start)
        raise _not_text(path, begin + (error.start if nul < 0 else nul)) from error
    if "\0" in decoded:
        raise _not_text(path, begin + text.index(b"\0"))
    return decoded.replace("\r\n", "\n").replace("\r", "\n") if "\r" in decoded else decoded


def _not_text(path: str, byte: int) -> InputError:
    return InputError(f"{path} is not text in UTF-8: byte {byte} is not; convert it, e.g. with iconv, or leave it out")


def open_bytes(path: str) -> IO[bytes]:
    """Open a file to read what is in it, or in what was compressed."""
    opener: Callable[..., IO[bytes]] = OPENERS.get(Path(path).suffix.lower(), partial(open, buffering=0))
    return opener(path, "rb")


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn what the system and the decompressors say about a file into an InputError."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise InputError(f"{path} can not be read: {' '.join(str(error).split())}; is it whole?") from error


def read_lines(path: str, start: int, stop: float) -> Iterator[tuple[list[bytes], int]]:
    """Yield the lines that begin at byte ``start`` or later, with their ends, and not yet decoded.

    Yields:
        A few lines at a time, with the byte at which the first of them begins. Those that begin at byte ``stop`` or later
        come too, unless they are all.

    Raises:
        InputError: If the file is missing or damaged.
    """
    mark = codecs.BOM_UTF8
    with readable(path), open_bytes(path) as stream:
        head = stream.read(len(mark)) if start <= len(mark) else b""
        if head == mark:
            yield from _split(stream, b"", len(mark))
        elif start:
            stream.seek(start - 1)
            rest, begin = _behind_line(stream, start - 1, stop)
            if begin < stop:
                yield from _split(stream, rest, begin)
        else:
            yield from _split(stream, head, 0)


def _behind_line(stream: IO[bytes], offset: int, stop: float) -> tuple[bytes, int]:
    """Return what was read behind the line that byte ``offset`` is in, and where it begins, if that is before ``stop``."""
    data = stream.read(CHUNK)
    while len(lines := data.splitlines(keepends=True)) == 1 and offset < stop and (more := stream.read(CHUNK)):
        # A carriage return may be half of a line's end.
        offset += len(data) - 1
        data = data[-1:] + more
    behind = len(lines[0]) if lines else 0
    return data[behind:], offset + behind


def _split(stream: IO[bytes], rest: bytes, offset: int) -> Iterator[tuple[list[bytes], int]]:
    """Yield the lines of ``rest``, which begins at byte ``offset``, and of what follows in the stream."""
    # As much again as there is of a line, so that a very long one is not copied over and over.
    while data := stream.read(max(CHUNK, len(rest))):
        data = rest + data
        # Where it finds the same lines, readlines is faster on long ones.
        lines = data.splitlines(keepends=True) if b"\r" in data else BytesIO(data).readlines()
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        yield lines, offset
        offset += len(data) - len(rest)
    if rest:
        yield rest.splitlines(keepends=True), offset


class LineBefore(NamedTuple):
    """The line that ends before a byte of a file, for messages: lines are only counted when it is named."""

    path: str
    byte: int

    def __str__(self) -> str:
        number = 0
        for lines, begin in read_lines(self.path, 0, self.byte):
            if begin >= self.byte:
                break
            begins = list(itertools.accumulate(map(len, lines[:-1]), initial=begin))
            number += bisect.bisect_left(begins, self.byte) if lines else 0
        return f"{self.path}, line {number}"
