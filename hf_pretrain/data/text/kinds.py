"""The kind of a file: by its suffix where that says something, and else by its first bytes."""

from __future__ import annotations

import codecs
import json
import os
import re
import time
from pathlib import Path
from typing import Literal, NamedTuple

from hf_pretrain.data.text.lines import COMPRESSED_SUFFIXES, compression_of, normalized_lines, open_bytes, readable
from hf_pretrain.errors import InputError

# "marked_text" has the lines <doc ...> and </doc> around each document, as WikiExtractor writes them; "json_lines" has an
# object a line; "json" has arrays of objects, or objects over several lines.
FileFormat = Literal["text", "marked_text", "json_lines", "json", "csv", "parquet", "arrow"]

_SUFFIXES: dict[FileFormat, str] = {
    "csv": ".csv .tsv .tab",
    "parquet": ".parquet .pq",
    "arrow": ".arrow .feather .ipc",
}
_FORMATS = {suffix: form for form, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
# Text beyond doubt: a file with such a name that is not UTF-8 is an error, not something else.
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
_MARKUP_SUFFIXES = (".xml", ".html", ".htm", ".xhtml", ".svg", ".rss", ".atom", ".tmx", ".sgml", ".sgm")
# None that is a language too, as in train.pt (Portuguese), .so (Somali) and .ps (Pashto): those are known by their content.
_OTHER_SUFFIXES = {
    "an archive": ".zip .tar .tgz .tbz2 .txz .7z .rar .jar .whl .iso .dmg .deb .rpm .epub",
    "an office document": ".doc .docx .odt .rtf .xls .xlsx .ods .ppt .pptx .odp",
    "a PDF": ".pdf",
    "a page description": ".eps .djvu .dvi",
    "an image": ".png .jpg .jpeg .gif .bmp .tif .tiff .webp .ico .heic",
    "a file of sound or video": ".mp3 .wav .flac .ogg .m4a .mp4 .mov .avi .mkv .webm",
    "a program": ".exe .dll .dylib .class .pyc .pyd",
    "a file of weights or arrays": ".safetensors .pth .ckpt .onnx .gguf .npy .npz .pkl .pickle .h5 .hdf5 "
    ".msgpack .orc .avro",
    "a database": ".sqlite .sqlite3",
    "a notebook": ".ipynb",
    "a web archive": ".warc .wet .wat",
}
_REASONS = {suffix: reason for reason, suffixes in _OTHER_SUFFIXES.items() for suffix in suffixes.split()}
_LFS = "a pointer of Git LFS"
_MAGIC: dict[str, re.Pattern[bytes]] = {
    "a PDF": re.compile(rb"%PDF-"),
    "an archive or an office document": re.compile(rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!\x1a|!<arch>\n"),
    "a tar archive": re.compile(rb".{257}ustar", re.DOTALL),
    "an image": re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF.{4}WEBP", re.DOTALL),
    "a file of sound or video": re.compile(rb"ID3[\2-\4]|OggS|fLaC|RIFF.{4}(?:WAVE|AVI )|.{4}ftyp", re.DOTALL),
    "a page description": re.compile(rb"%!PS"),
    "an office document": re.compile(rb"\{\\rtf|\xd0\xcf\x11\xe0"),
    "a program": re.compile(rb"\x7fELF|MZ\x90\0"),
    "a database": re.compile(rb"SQLite format 3\0"),
    "a file of weights or arrays": re.compile(rb"\x93NUMPY|\x89HDF|Obj\x01|ORC[\0-\x1f]"),
    "a web archive": re.compile(rb"WARC/[01]\.\d"),
    _LFS: re.compile(rb"version https://git-lfs\.github\.com/spec/"),
}
_ADVICE = {
    "a tar archive": "unpack it",
    "an archive": "unpack it",
    "an archive or an office document": "unpack it, or turn it into text",
    _LFS: "fetch the file itself with `git lfs pull`",
    "compressed twice": "decompress it once",
    "a compressed table": "decompress it: Parquet and Arrow files are compressed inside",
}
_MARKUP = "XML or HTML"
_MARKUP_ADVICE = (
    "take the text out of it (of a dump of Wikipedia with WikiExtractor --json), or, to train on the markup, write it into "
    "JSON lines"
)
_OTHER_ADVICE = "turn it into .txt, .jsonl, .csv or .parquet"

_HEAD = 1 << 16
# How far to look for a line feed in a file that has carriage returns, and for the end of a first line of JSON.
_FAR_LINE_FEED, _FAR_LINE = 1 << 20, 1 << 30
_CHUNK = 1 << 20
_JSON_ROWS = 20
_RECENT_SECONDS = 2

_DOCUMENT_TAG = re.compile(r'<doc (?:id|url|title)="[^\n]*">[ \t]*\n')
_COMMENT = re.compile(r"<!--.*?-->\s*", re.DOTALL)
_MARKUP_START = re.compile(r"<(?:\?xml|!doctype|html|head|body|mediawiki|rss|feed|svg|tei)\b", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][\w:.-]*(?:\s[^<>]*)?/?>")
_END_TAG = re.compile(r"</([A-Za-z][\w:.-]*)\s*>")
_JSON_KEY = re.compile(r'\{\s*"(?:[^"\\\n]|\\.){0,200}"\s*:')
_JSON_ARRAY = re.compile(r'\[\s*(?:\[\s*)*\{\s*"')
_JSON_LIST_INSIDE = re.compile(r'"\s*:\s*\[\s*\{')
_DECODER = json.JSONDecoder()


class FileKind(NamedTuple):
    """The kind of a file.

    Attributes:
        format: How it is read.
        reason: Its kind in words, if it is not read; else empty.
        line_end: What ends its lines: a line feed, or a carriage return if it has no line feeds.
        is_compressed: Whether it is decompressed as a whole.
        is_utf8: Whether it begins with text.
        is_empty: Whether it holds nothing but white space.
    """

    format: FileFormat = "text"
    reason: str = ""
    line_end: bytes = b"\n"
    is_compressed: bool = False
    is_utf8: bool = True
    is_empty: bool = False

    @property
    def advice(self) -> str:
        """What to do with a file that is not read."""
        return _MARKUP_ADVICE if self.reason == _MARKUP else _ADVICE.get(self.reason, _OTHER_ADVICE)


_known: dict[str, tuple[tuple[int, int, int, int], FileKind]] = {}


def file_kind(path: str | Path) -> FileKind:
    """Return the kind of a file.

    Raises:
        InputError: If it can not be read, or decompressed.
    """
    with readable(path):
        status = os.stat(path)
    key = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = _known.get(str(path))
    if known is not None and known[0] == key:
        return known[1]
    kind = _look(str(path))
    # The clock of a file system may be too coarse to show that a file was written twice in a row.
    if time.time() - max(status.st_mtime, status.st_ctime) > _RECENT_SECONDS:
        _known[str(path)] = (key, kind)
    return kind


def text_kind(path: str | Path) -> FileKind:
    """Return the kind of a file of text.

    Raises:
        InputError: If it is of a kind that is not read, or as `file_kind`.
    """
    kind = file_kind(path)
    if kind.reason:
        raise InputError(f"{path} is {kind.reason}, not text: {kind.advice}")
    return kind


def file_suffix(path: str | Path) -> str:
    """Return the suffix that stands for the format, in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _look(path: str) -> FileKind:
    suffix = file_suffix(path)
    with readable(path):
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        is_compressed = bool(compression_of(head))
        if is_compressed:
            with open_bytes(path) as stream:
                head = stream.read(_HEAD)
    kind = FileKind(is_compressed=is_compressed, is_empty=not head)
    if reason := _unread(suffix, head, is_compressed):
        return kind._replace(reason=reason)
    if (table := _FORMATS.get(suffix) or _table_format(head)) in ("parquet", "arrow"):
        return kind._replace(format=table, reason="a compressed table" if is_compressed else "")
    is_whole = len(head) < _HEAD
    text = normalized_lines(codecs.decode(head, errors="replace").removesuffix("" if is_whole else "\ufffd"))
    kind = kind._replace(
        line_end=_line_end(path, head),
        is_utf8=_is_utf8(head, is_whole),
        is_empty=is_whole and not text.strip(),
    )
    if table is not None:
        return kind._replace(format=table)
    text = text.lstrip()
    layout = _json_layout(path, text, is_whole=is_whole, is_named_so=suffix in _JSON_SUFFIXES)
    if layout is not None:
        return kind._replace(format=layout)
    if _DOCUMENT_TAG.match(text):
        return kind._replace(format="marked_text")
    return kind._replace(reason=_MARKUP if _is_markup(text) else "")


def _unread(suffix: str, head: bytes, is_compressed: bool) -> str:
    """Return in words the kind of a file that is not read; empty if it is read."""
    if _MAGIC[_LFS].match(head):
        return _LFS
    if suffix in _MARKUP_SUFFIXES:
        return _MARKUP
    if suffix in _REASONS:
        return _REASONS[suffix]
    if suffix in _FORMATS or suffix in _JSON_SUFFIXES:
        return ""
    if is_compressed and compression_of(head):
        return "compressed twice"
    return next((reason for reason, magic in _MAGIC.items() if magic.match(head)), "")


def _table_format(head: bytes) -> FileFormat | None:
    if head.startswith(b"PAR1"):
        return "parquet"
    return "arrow" if head.startswith(b"ARROW1\0\0") else None


def _is_utf8(head: bytes, is_whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_whole)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _line_end(path: str, head: bytes) -> bytes:
    """Return what ends the lines: a carriage return only where there is no line feed, as in files of the old Mac."""
    if b"\r" in head and b"\n" not in head and _find(path, b"\n", begin=0, limit=_FAR_LINE_FEED) < 0:
        return b"\r"
    return b"\n"


def _find(path: str, wanted: bytes, *, begin: int, limit: int) -> int:
    """Return the first byte of a file from ``begin`` on that is one of ``wanted``; -1 if there is none before ``limit``."""
    offset = 0
    with readable(path), open_bytes(path) as stream:
        while offset < limit and (data := stream.read(_CHUNK)):
            found = [at for byte in wanted if (at := data.find(bytes([byte]), max(begin - offset, 0))) >= 0]
            if found:
                return offset + min(found)
            offset += len(data)
    return -1


def _is_markup(text: str) -> bool:
    """Return whether text is XML or HTML, and not prose that begins with a tag or has some in it."""
    text = _COMMENT.sub("", text) if text.startswith("<!--") else text
    if not text.startswith("<"):
        return False
    if _MARKUP_START.match(text):
        return True
    ends = _END_TAG.findall(text)
    if not _TAG.match(text) or len(ends) < 3 or len(set(ends)) < 2:
        return False
    return sum(map(len, _TAG.findall(text))) >= 0.08 * len(text)


def _json_layout(path: str, text: str, *, is_whole: bool, is_named_so: bool) -> FileFormat | None:
    """Return how the JSON that text begins with is laid out, or None if it is none."""
    unknown: FileFormat | None = "json_lines" if is_named_so else None
    if text.startswith("["):
        begins = _JSON_ARRAY.match(text)
        is_json = begins is not None and _is_value(text, text.index("{"), is_whole=is_whole)
        return "json" if is_named_so or is_json else None
    if not text.startswith("{") or not (is_named_so or _JSON_KEY.match(text)):
        return unknown
    first, line_feed, rest = text.partition("\n")
    if not line_feed and not is_whole:
        # Only the beginning of the first line was read: it is a row, or the only object, with rows in a list inside.
        has_rows = _JSON_LIST_INSIDE.search(text) is not None
        return "json" if has_rows and _has_one_line(path) else "json_lines"
    if _is_object(first):
        rows = [line for line in rest.split("\n")[: -1 if rest and not is_whole else None] if line.strip()]
        if not is_named_so and not all(map(_is_object, rows[:_JSON_ROWS])):
            return None
        is_one = is_whole and not rest.strip()
        return "json" if is_one and _JSON_LIST_INSIDE.search(first) else "json_lines"
    return "json" if _is_value(text, 0, is_whole=is_whole) else unknown


def _has_one_line(path: str) -> bool:
    """Return whether no other object follows the first line of a file."""
    stop = _find(path, b"\n", begin=0, limit=_FAR_LINE)
    return stop < 0 or _find(path, b"{", begin=stop, limit=_FAR_LINE) < 0


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True  # a number that is too long, or too many brackets: for the reader to say


def is_cut_off(error: json.JSONDecodeError, text: str) -> bool:
    """Return whether JSON is wrong only because text ends inside of a value."""
    return error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string")


def _is_value(text: str, begin: int, *, is_whole: bool) -> bool:
    """Return whether text holds a JSON value from ``begin`` on, or the beginning of one."""
    try:
        _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        return is_cut_off(error, text) and not is_whole
    except (ValueError, RecursionError):
        pass
    return True
