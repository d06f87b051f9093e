"""Lines of text files as bytes, and where they are: so that a file can be read from any byte on."""

from __future__ import annotations

import bz2
import errno
import gzip
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from hf_pretrain.errors import InputError, one_line

# Suffixes of compressed files. The first bytes of a file say with what it is compressed.
COMPRESSED_SUFFIXES = (".gz", ".gzip", ".xz", ".bz2", ".zst", ".zstd", ".lz4")
# Bytes read at a time: little against a part of a file, because as much is read in vain behind its end.
CHUNK = 1 << 16
_MAGIC_BYTES = 16
_MAGIC: dict[str, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    # A zstd file may begin with a frame that is to be skipped.
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
_OPENERS: dict[str, Callable[..., Any]] = {
    "": partial(open, mode="rb", buffering=0),
    "gzip": gzip.open,
    "xz": lzma.open,
    "bz2": bz2.open,
    "zstd": partial(pa.input_stream, compression="zstd"),
    "lz4": partial(pa.input_stream, compression="lz4"),
}
_MARK = b"\xef\xbb\xbf"
_MARKS_AT_LINE_STARTS = re.compile("^\ufeff+", re.MULTILINE)
# First bytes of the characters that are white space to Unicode.
_BLANKS = frozenset(blank.encode()[0] for blank in "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\u1680\u2000\u3000")
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_NOT_PERMITTED = (errno.EACCES, errno.EPERM)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BadText(InputError):
    """Raised for a document that is no text, where the documents around it can still be read."""


def has_compressed_name(path: str | Path) -> bool:
    """Return whether the suffix of a file says that it is compressed."""
    return Path(path).suffix.lower() in COMPRESSED_SUFFIXES


def compression_of(head: bytes) -> str:
    """Return the compression of a file that begins with these bytes; empty if it has none."""
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), "")


def is_blank(line: bytes) -> bool:
    """Return whether a line is white space, of any kind that Unicode knows, or a byte order mark."""
    while line.startswith(_MARK):
        line = line[len(_MARK) :]
    return not line or (line[0] in _BLANKS and line.decode(errors="replace").isspace())


def decode_lines(path: str, text: bytes, begin: int) -> str:
    """Return text, which begins at byte ``begin`` of a file, with line feeds at its lines' ends and no byte order mark.

    Raises:
        BadText: If it is not UTF-8 or holds a NUL.
    """
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        nul = text.find(b"\0", 0, error.start)
        raise _not_text(path, begin + (error.start if nul < 0 else nul)) from error
    if "\0" in decoded:
        raise _not_text(path, begin + text.index(b"\0"))
    return normalized_lines(decoded)


def normalized_lines(text: str) -> str:
    """Return text with a line feed at the end of each line, and without byte order marks at their starts."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _MARKS_AT_LINE_STARTS.sub("", text) if "\ufeff" in text else text


def _not_text(path: str, byte: int) -> BadText:
    return BadText(f"{path} is not text in UTF-8: byte {byte} is not; convert it, e.g. with iconv, or leave it out")


def open_bytes(path: str) -> IO[bytes]:
    """Open a file to read its bytes, decompressed if its first bytes say so, whatever its suffix is.

    Raises:
        InputError: If its suffix says that it is compressed, and it is not.
        OSError: If it can not be opened.
    """
    with open(path, "rb", buffering=0) as file:
        head = file.read(_MAGIC_BYTES)
    compression = compression_of(head)
    if head and not compression and has_compressed_name(path):
        raise InputError(
            f"{path} can not be read: it is not compressed, as its suffix says; is it whole? Or give it its right name"
        )
    return _OPENERS[compression](path)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn the errors of the system and of decompressors into an InputError that names the file."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        number = getattr(error, "errno", None)
        if number in DISK_FULL:
            raise  # the text is being written elsewhere: not the fault of this file
        if number in _TOO_MANY_FILES:
            raise InputError(
                f"{path} can not be read: too many files are open; raise the limit (ulimit -n) or lower "
                "dataloader_num_workers"
            ) from error
        if number in _NOT_PERMITTED:
            raise InputError(f"{path} can not be read: there is no permission; change its mode or owner") from error
        raise InputError(f"{path} can not be read: {one_line(error)}; is it whole?") from error


def read_lines(path: str, start: int, stop: float, *, end: bytes = b"\n") -> Iterator[tuple[bytes, int]]:
    """Yield the lines that begin at byte ``start`` or later, with their ends, and not yet decoded.

    Args:
        path: The file.
        start: First byte.
        stop: Where the part ends: no line is read if none begins before this byte.
        end: What ends a line: a line feed, or a carriage return in a file that has no line feeds.

    Yields:
        Each line with the byte at which it begins. If a line begins before ``stop``, those behind ``stop`` come too.

    Raises:
        InputError: If the file is missing or damaged.
    """
    with readable(path), open_bytes(path) as stream:
        rest, begin = b"", 0
        if start:
            _skip_to(stream, start - 1)
            rest, begin = _behind_line(stream, start - 1, stop, end)
        if begin < stop:
            for line in _split(stream, rest, end):
                yield line, begin
                begin += len(line)


def _skip_to(stream: IO[bytes], offset: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset and (data := stream.read(min(offset, 1 << 20))):
        offset -= len(data)


def _behind_line(stream: IO[bytes], offset: int, stop: float, end: bytes) -> tuple[bytes, int]:
    """Return the bytes read behind the line at byte ``offset``, and where they begin, if that is before ``stop``."""
    while offset < stop and (data := stream.read(CHUNK)):
        behind = data.find(end) + 1
        if behind:
            return data[behind:], offset + behind
        offset += len(data)
    return b"", offset


def _split(stream: IO[bytes], rest: bytes, end: bytes) -> Iterator[bytes]:
    """Yield the lines of ``rest`` and of the stream behind it."""
    # As much again as there is of a line, so that a very long one is not copied over and over.
    while data := stream.read(max(CHUNK, len(rest))):
        lines = _cut(rest + data, end)
        rest = b"" if lines[-1].endswith(end) else lines.pop()
        yield from lines
    yield from _cut(rest, end)


def _cut(data: bytes, end: bytes) -> list[bytes]:
    if end == b"\n":
        return BytesIO(data).readlines()
    lines = [line + end for line in data.split(end)]
    last = lines.pop()[: -len(end)]
    return [*lines, last] if last else lines


class LineBefore(NamedTuple):
    """The line that ends before a byte of a file, for messages: lines are only counted when it is named."""

    path: str
    byte: int
    end: bytes = b"\n"

    def __str__(self) -> str:
        lines = read_lines(self.path, 0, self.byte, end=self.end)
        number = sum(1 for _ in itertools.takewhile(lambda line: line[1] < self.byte, lines))
        return f"{self.path}, line {number}"


class AtLine(NamedTuple):
    """A message about the line before a byte of a file; lines are only counted if it is shown."""

    where: Any
    problem: str

    def __str__(self) -> str:
        return f"{self.where} {self.problem}"
