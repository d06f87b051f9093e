"""Files of word vectors, as word2vec, GloVe and fastText write them.

Four kinds are read and written; all hold one word and its numbers a row:

- "word2vec": text. The first line is the header, "V D": the number of words and of dimensions.
- "fasttext": the same, with a space behind each row (`.vec`).
- "glove": text without a header. A word may contain spaces: the last D fields of a line are its numbers.
- "word2vec_binary": a header line, then a word, a space and D numbers as float32, little-endian. word2vec's own program
  writes a newline behind each row, and gensim none; both are read.

[`read_vectors`] knows the kind by the content, compressed or not.
"""

from __future__ import annotations

import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from transformers.utils import logging

from hf_pretrain.data.text.lines import open_bytes, read_lines, readable
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.files import write_bytes

logger = logging.get_logger(__name__)

Kind = Literal["word2vec", "word2vec_binary", "glove", "fasttext"]
"""Kinds of files of word vectors."""

# Lines parsed at a time: 40 MB of text at 100 dimensions.
_LINES = 1 << 15
# Bytes that say what a file is: some rows of any usual width.
_HEAD = 1 << 18
_HEADER = re.compile(rb"\s*(\d+)[ \t]+(\d+)\s*")
_MARK = b"\xef\xbb\xbf"
# No vectors, but often given in their place: first bytes -> what to do.
_OTHERS = {
    b"PK\x03\x04": "it is a zip archive: unzip it, and give the text file in it",
    b"\xba\x16\x4f\x2f": "it is a model of fastText (.bin): give the .vec file beside it",
}
# Ends of lines, byte order marks, and halves of surrogate pairs.
_UNWRITABLE = re.compile("[\n\ufeff\ud800-\udfff]")


class VectorTable(NamedTuple):
    """Words and their vectors, as a file holds them.

    Attributes:
        words: ``[V]``, each different.
        vectors: ``float32 [V, D]``.
    """

    words: tuple[str, ...]
    vectors: np.ndarray


def read_vectors(path: str | Path, *, kind: Kind | None = None) -> VectorTable:
    """Read a file of word vectors.

    Of a word that comes twice, the first row stays; bytes that are not UTF-8 become U+FFFD. A warning tells of both, and of
    more rows than the header says (GloVe writes one more, `<unk>`).

    Args:
        path: The file, compressed or not.
        kind: Kind of the file; by default what its content says.

    Returns:
        Its words in the order of the file.

    Raises:
        InputError: If it is no such file, is cut short, or a row is not right; the message has the line, or the word's number.
    """
    path = str(path)
    if kind is not None:
        check_choice(kind, get_args(Kind), name="kind")
    if not Path(path).is_file():
        raise InputError(f"path={path!r} is no file")
    head = _head(path)
    found = kind or _kind_of(head, path)
    if found == "word2vec_binary":
        with readable(path), open_bytes(path) as file:
            names, vectors = _binary_rows(file.read(), path)
    else:
        names, vectors = _text_rows(path, has_header=found != "glove")
    return _without_repetitions(_decoded(names, path), vectors, path)


def write_vectors(path: str | Path, words: Sequence[str], vectors: np.ndarray, *, kind: Kind | None = None) -> Path:
    """Write words and vectors as a file.

    Numbers of a text have as few digits as tell them from any other float32 number, so [`read_vectors`] returns the same bits.

    Args:
        path: The file; it is compressed if its name ends in ".gz".
        words: ``[V]``, without newlines; in a binary file without spaces too.
        vectors: ``float32 [V, D]``, finite.
        kind: Kind of the file; by default "fasttext" for ".vec", "word2vec_binary" for ".bin", otherwise "word2vec".

    Returns:
        The path.

    Raises:
        InputError: If a word cannot be written, a number is not finite, or the shapes do not fit.
    """
    path = Path(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    suffixes: dict[str, Kind] = {".vec": "fasttext", ".bin": "word2vec_binary"}
    chosen = suffixes.get(suffix, "word2vec") if kind is None else kind
    check_choice(chosen, get_args(Kind), name="kind")
    table = np.ascontiguousarray(vectors, dtype="<f4")
    if table.ndim != 2 or len(table) != len(words) or not table.size:
        raise InputError(f"vectors has the shape {table.shape} for {len(words)} words: give a row of numbers a word")
    if not np.isfinite(table).all():
        raise InputError("vectors has numbers that are not finite: did the training diverge?")
    for word in words:
        if _UNWRITABLE.search(word) or (chosen == "word2vec_binary" and " " in word):
            raise InputError(f"word={word!r} cannot be written as {chosen}: leave it out, or write another kind")
    content = b"" if chosen == "glove" else f"{len(words)} {table.shape[1]}\n".encode()
    content += (
        _binary_content(words, table)
        if chosen == "word2vec_binary"
        else _text_content(words, table, end=" \n" if chosen == "fasttext" else "\n")
    )
    # Without the time, so that the same vectors are the same file.
    return write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _head(path: str) -> bytes:
    with readable(path), open_bytes(path) as file:
        parts: list[bytes] = []
        while (missing := _HEAD - sum(map(len, parts))) > 0 and (part := file.read(missing)):
            parts.append(part)
    return b"".join(parts)


def _kind_of(head: bytes, path: str) -> Kind:
    """Return the kind of a file by its first bytes."""
    cure = next((cure for mark, cure in _OTHERS.items() if head.startswith(mark)), None)
    if cure is not None:
        raise InputError(f"path={path!r} has no word vectors: {cure}")
    first, _, rest = head.removeprefix(_MARK).partition(b"\n")
    second = rest.partition(b"\n")[0].split()
    header = _HEADER.fullmatch(first)
    if header is None:
        return "glove"
    width = int(header[2])
    if len(second) > width > 0 and all(map(_is_number, second[-width:])):
        return "word2vec"
    # Two numbers a line are a header, or a word that is a number with one dimension.
    is_narrow = len(second) == 2 and _is_number(second[1]) and width != 1
    return "glove" if is_narrow else "word2vec" if _is_text(rest[:1024]) else "word2vec_binary"


def _is_number(field: bytes) -> bool:
    try:
        return bool(np.isfinite(float(field)))
    except ValueError:
        return False


def _is_text(part: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters, which numbers in binary are not."""
    # The last character may be cut.
    return _is_utf8(part[:-3]) and not re.search(rb"[\x00-\x08\x0e-\x1f]", part)


def _text_rows(path: str, *, has_header: bool) -> tuple[list[bytes], np.ndarray]:
    """Return the words and vectors of a text file."""
    lines = _numbered_lines(path)
    declared, width = None, 0
    if has_header:
        number, line = next(lines, (1, b""))
        header = _HEADER.fullmatch(line)
        if header is None:
            raise InputError(f'{path}, line {number}: there is no header; give kind="glove" for a file without one')
        declared, width = int(header[1]), int(header[2])
    names: list[bytes] = []
    blocks: list[np.ndarray] = []
    while chunk := list(islice(lines, _LINES)):
        width = width or _width(chunk, path)
        words, numbers = _parsed(chunk, width, path)
        names += words
        blocks.append(numbers)
    if not names:
        raise InputError(f"{path} has no row of a word and its numbers")
    if declared is not None and len(names) < declared:
        raise InputError(f"{path} has {len(names)} of the {declared} words that its header says: is it whole?")
    if declared is not None and len(names) > declared:
        logger.warning(f"{path} has {len(names)} rows, but its header says {declared}; all are read")
    return names, np.concatenate(blocks)


def _numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their numbers, without what ends them."""
    for number, (line, _) in enumerate(read_lines(path, 0, float("inf")), start=1):
        line = line.rstrip(b" \t\r\n")
        line = line.removeprefix(_MARK) if number == 1 else line
        if line:
            yield number, line


def _width(chunk: list[tuple[int, bytes]], path: str) -> int:
    """Return the width of a file without a header: most first lines have it, others have spaces in their words."""
    counts = Counter(line.count(b" ") for _, line in chunk[:1000])
    width, _ = max(counts.items(), key=lambda item: (item[1], -item[0]))
    if not width:
        raise InputError(
            f"{path}, line {chunk[0][0]}: there is no word followed by numbers, with a space between them"
        )
    return width


def _parsed(chunk: list[tuple[int, bytes]], width: int, path: str) -> tuple[list[bytes], np.ndarray]:
    """Return the words of lines and their numbers, ``float32 [lines, width]``."""
    words, rests = [], []
    for number, line in chunk:
        spaces = line.count(b" ")
        if spaces == width:
            word, _, rest = line.partition(b" ")
        elif spaces > width:  # a word with spaces
            word, *fields = line.rsplit(b" ", width)
            rest = b" ".join(fields)
        else:
            raise InputError(f"{path}, line {number}: {spaces} numbers behind the word, but {width} are needed")
        words.append(word)
        rests.append(rest)
    numbers = _numbers(b"\n".join(rests).replace(b" ", b"\n"))
    if numbers is None or len(numbers) != len(words) * width:
        numbers = _slow_numbers(rests, [number for number, _ in chunk], path)
    rows = numbers.reshape(len(words), width)
    is_bad = ~np.isfinite(rows).all(axis=1)
    if is_bad.any():
        where = chunk[int(is_bad.argmax())][0]
        raise InputError(f"{path}, line {where}: there is a number that float32 cannot hold, or that is not finite")
    return words, rows


def _numbers(column: bytes) -> np.ndarray | None:
    """Return a number a line as float32, each rounded once; None if one is none."""
    try:
        table = csv.read_csv(
            pa.BufferReader(column),
            read_options=csv.ReadOptions(column_names=["number"], block_size=1 << 24),
            parse_options=csv.ParseOptions(quote_char=False),
            convert_options=csv.ConvertOptions(
                column_types={"number": pa.float32()}, null_values=[], strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        return None
    return table.column(0).to_numpy()


def _slow_numbers(rests: list[bytes], numbers: list[int], path: str) -> np.ndarray:
    """Return the numbers of rows as Python reads them, or name the line where one is none."""
    rows = np.empty((len(rests), len(rests[0].split(b" "))), dtype=np.float32)
    for row, (rest, number) in enumerate(zip(rests, numbers, strict=True)):
        for column, field in enumerate(rest.split(b" ")):
            if not _is_number(field):
                raise InputError(f"{path}, line {number}: {field.decode(errors='replace')!r} is no finite number")
            with np.errstate(over="ignore"):
                rows[row, column] = float(field)
    return rows


def _binary_rows(content: bytes, path: str) -> tuple[list[bytes], np.ndarray]:
    """Return the words and vectors of a binary file."""
    first, _, _ = content[:64].partition(b"\n")
    header = _HEADER.fullmatch(first)
    if header is None:
        raise InputError(f"{path}, line 1: there is no header of two numbers, of words and of dimensions")
    count, width = int(header[1]), int(header[2])
    position, size = len(first) + 1, 4 * width
    if not size or count * (size + 1) > len(content):
        raise InputError(f"{path} is too short for {count} words with {width} numbers each, as its header says")
    names: list[bytes] = []
    vectors = np.empty((count, width), dtype=np.float32)
    for row in range(count):
        begin = content.find(b" ", position) + 1
        if not begin or begin + size > len(content):
            raise InputError(f"{path} ends in word {row + 1} of {count}: is it whole?")
        names.append(content[position : begin - 1].lstrip(b"\n"))
        vectors[row] = np.frombuffer(content, dtype="<f4", count=width, offset=begin)
        position = begin + size
    is_bad = ~np.isfinite(vectors).all(axis=1)
    if is_bad.any():
        raise InputError(f"{path}, word {int(is_bad.argmax()) + 1}: its numbers are not finite; is the file whole?")
    left = len(content[position:].strip(b"\n"))
    if left:
        raise InputError(
            f"{path} has {left} bytes behind the {count} words that its header says: is the header right?"
        )
    return names, vectors


def _decoded(names: list[bytes], path: str) -> list[str]:
    words = [name.decode(errors="replace") for name in names]
    bad = [word for word, name in zip(words, names, strict=True) if "\ufffd" in word and not _is_utf8(name)]
    if bad:
        logger.warning(
            f"{path} has {len(bad)} words that are not UTF-8, such as {bad[0]!r}: U+FFFD replaces the bytes"
        )
    return words


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _without_repetitions(words: list[str], vectors: np.ndarray, path: str) -> VectorTable:
    first: dict[str, int] = {}
    for row, word in enumerate(words):
        first.setdefault(word, row)
    if len(first) < len(words):
        again = next(word for row, word in enumerate(words) if first[word] != row)
        logger.warning(
            f"{path} has {len(words) - len(first)} words twice or more, such as {again!r}: the first row of each stays"
        )
        vectors = vectors[list(first.values())]
    return VectorTable(tuple(first), vectors)


def _text_content(words: Sequence[str], table: np.ndarray, *, end: str) -> bytes:
    """Return a line a word."""
    width, content = table.shape[1], io.BytesIO()
    for begin in range(0, len(words), _LINES):
        part = table[begin : begin + _LINES]
        offsets = pa.array(np.arange(0, part.size + 1, width), type=pa.int32())
        numbers = pc.binary_join(pa.ListArray.from_arrays(offsets, pa.array(part.ravel()).cast(pa.string())), " ")
        names = words[begin : begin + _LINES]
        lines = (f"{name} {row}{end}" for name, row in zip(names, numbers.to_pylist(), strict=True))
        content.write("".join(lines).encode())
    return content.getvalue()


def _binary_content(words: Sequence[str], table: np.ndarray) -> bytes:
    """Return the rows as word2vec's own program writes them."""
    return b"".join(word.encode() + b" " + row.tobytes() + b"\n" for word, row in zip(words, table, strict=True))
