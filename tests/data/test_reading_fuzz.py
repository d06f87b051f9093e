"""Random text in every format and compression comes back once and as it was; random bytes are read or refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_pretrain.data.examples.bitext import read_bitext
from hf_pretrain.data.streaming.sources import FileShards, list_shards, read_shard
from hf_pretrain.data.text.datasets import text_dataset
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.data.text.search import find_files
from hf_pretrain.errors import InputError

QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


def zstd(data, codec="zstd"):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".bz2": bz2.compress,
    ".zst": zstd,
    ".lz4": lambda data: zstd(data, "lz4"),
}
ODD = "\u2028\u2029\x85\x0b\x0c\x1c\u00a0\u3000\ufeff\u200b\t\"',;|{}[]<>\\é\U0001f600"
characters = st.one_of(
    st.sampled_from(ODD), st.characters(exclude_categories=["Cs"], exclude_characters="\0"), st.sampled_from("abc .")
)
texts = st.lists(st.text(characters, max_size=30), min_size=1, max_size=12)


def as_json_lines(rows, end):
    return "".join(json.dumps({"n": 1, "text": row}, ensure_ascii=False) + end for row in rows).encode()


def as_array(rows, indent):
    return json.dumps([{"text": row, "more": {"text": "no"}} for row in rows], indent=indent).encode()


def as_table(rows, delimiter):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([("n", "text"), *enumerate(rows)])
    return out.getvalue().encode()


def as_stream(rows):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as writer:
        for begin in range(0, len(rows), 3):
            writer.write_batch(pa.record_batch({"text": pa.array(rows[begin : begin + 3], pa.string())}))
    return sink.getvalue().to_pybytes()


def as_columns(rows, kind, write):
    out = io.BytesIO()
    write(pa.table({"text": pa.array(rows, pa.string()).cast(kind)}), out)
    return out.getvalue()


def parquet(table, out):
    pq.write_table(table, out, row_group_size=2)


CATEGORY = pa.dictionary(pa.int32(), pa.string())
# Name without the suffix of a compression -> bytes of rows, and whether the file may be compressed and have no suffix.
ROWS = {
    "a.jsonl": (lambda rows: as_json_lines(rows, "\n"), True),
    "b.ndjson": (lambda rows: as_json_lines(rows, "\r\n"), True),
    "c.json": (lambda rows: as_array(rows, None), True),
    "d.json": (lambda rows: as_array(rows, 2), True),
    "e.json": (lambda rows: json.dumps({"meta": 1, "data": [{"text": row} for row in rows]}).encode(), False),
    "f.csv": (lambda rows: as_table(rows, ","), False),
    "g.csv": (lambda rows: as_table(rows, ";"), False),
    "h.tsv": (lambda rows: as_table(rows, "\t"), False),
    "i.parquet": (lambda rows: as_columns(rows, pa.string(), parquet), None),
    "j.parquet": (lambda rows: as_columns(rows, pa.string_view(), parquet), None),
    "k.parquet": (lambda rows: as_columns(rows, CATEGORY, parquet), None),
    "l.feather": (lambda rows: as_columns(rows, pa.large_string(), pyarrow.feather.write_feather), None),
    "m.arrow": (as_stream, None),
}


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def check_all_readers(path, expected, most_bytes, **options):
    """Read a file in one go, in parts and from every place on: each document once, and equal."""
    if not expected:
        with pytest.raises(InputError, match="holds no text"):
            list(read_documents(path, **options))
        return
    assert list(read_documents(path, **options)) == expected
    found = []
    for shard in list_shards(path, most_bytes=most_bytes, **options):
        whole = list(read_shard(shard, **options))
        found += [text for text, _ in whole]
        for number, (_, position) in enumerate(whole, start=1):
            assert list(read_shard(shard, start=position, **options)) == whole[number:]
    assert found == expected
    source = FileShards([path], **options)
    assert [text for shard in range(source.num_shards) for text, _ in source.read(shard)] == expected


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=12, **QUICK)
@given(rows=texts, compression=st.sampled_from(list(COMPRESSIONS)), has_name=st.booleans(), most=st.integers(1, 60))
def test_rows(folder, name, rows, compression, has_name, most):
    write, may_lack_suffix = ROWS[name]
    if name.endswith((".csv", ".tsv")):
        # Line ends are those of text, and no byte order mark begins a line.
        rows = [re.sub("\r\n?", "\n", row.replace("\ufeff", "")) for row in rows]
    data = write(rows)
    if may_lack_suffix is not None:
        data, name = COMPRESSIONS[compression](data), name + compression
        name = name if has_name or not may_lack_suffix else "part-00000"
    path = folder / name
    path.write_bytes(data)
    check_all_readers(path, [row.strip() for row in rows if row.strip()], most)


line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r\ufeff"), max_size=20).filter(
    str.strip
)
paragraphs = st.lists(st.lists(line, min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=60, **QUICK)
@given(
    paragraphs=paragraphs,
    ends=st.lists(st.sampled_from(["\n", "\r\n"]), min_size=1, max_size=5),
    blanks=st.lists(st.sampled_from(["", " ", "\t\u3000", "\ufeff", "\ufeff \x85"]), min_size=1, max_size=4),
    marks=st.lists(st.sampled_from(["", "", "\ufeff", "\ufeff\ufeff"]), min_size=1, max_size=3),
    has_stray=st.booleans(),
    is_mac=st.booleans(),
    compression=st.sampled_from(list(COMPRESSIONS)),
    most=st.integers(1, 40),
    separator=st.sampled_from(["blank_line", "line"]),
)
def test_text(folder, paragraphs, ends, blanks, marks, has_stray, is_mac, compression, most, separator):
    if has_stray and not is_mac:
        paragraphs = [["x\ry", *lines] for lines in paragraphs]
    written, number = "", 0
    for lines in paragraphs:
        for text in [*lines, blanks[number % len(blanks)]]:
            end = "\r" if is_mac else ends[number % len(ends)]
            written += marks[number % len(marks)] + text + end
            number += 1
    expected = [text for lines in paragraphs for text in lines] if separator == "line" else map("\n".join, paragraphs)
    path = folder / f"text{compression}"
    path.write_bytes(COMPRESSIONS[compression](written.encode()))
    expected = [text.replace("\r", "\n").strip() for text in expected]
    check_all_readers(path, expected, most, document_separator=separator)


@settings(max_examples=12, **QUICK)
@given(rows=texts.filter(lambda rows: any(map(str.strip, rows))), name=st.sampled_from(list(ROWS)))
def test_stored(folder, rows, name):
    rows = [re.sub("\r\n?", "\n", row.replace("\ufeff", "")) for row in rows]
    inside = Path(tempfile.mkdtemp(dir=folder))
    (inside / name).write_bytes(ROWS[name][0](rows))
    stored = text_dataset(inside, cache_dir=str(folder / "cache"))
    assert stored["text"][:] == [row.strip() for row in rows if row.strip()]


SUFFIXES = [
    "",
    ".txt",
    ".md",
    ".csv",
    ".tsv",
    ".jsonl",
    ".json",
    ".parquet",
    ".arrow",
    ".gz",
    ".txt.zst",
    ".json.xz",
    ".xml",
    ".x",
]


def check_read_or_refused(path):
    for read in (
        lambda: list(read_documents(path)),
        lambda: list(read_documents(path, document_separator="line", on_bad_text="skip")),
        lambda: [list(read_shard(shard)) for shard in list_shards(path, most_bytes=7)],
        lambda: list(read_bitext([path], languages=("en", "de"))),
        lambda: list(read_bitext([path, path], languages=("en", "de"))),
        lambda: find_files(path.parent),
    ):
        try:
            read()
        except InputError as error:
            assert len(str(error).splitlines()) == 1


BEGINNINGS = [
    b"",
    b"{",
    b'{"text": "',
    b"[",
    b'[{"text": "',
    b"<",
    b"text\n",
    b"text\tb\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"PAR1",
]


@settings(max_examples=60, **QUICK)
@given(begin=st.sampled_from(BEGINNINGS), data=st.binary(max_size=60), suffix=st.sampled_from(SUFFIXES))
def test_any_bytes_are_read_or_refused(folder, begin, data, suffix):
    inside = Path(tempfile.mkdtemp(dir=folder))
    path = inside / f"file{suffix}"
    path.write_bytes(begin + data)
    check_read_or_refused(path)


@settings(max_examples=60, **QUICK)
@given(
    name=st.sampled_from(list(ROWS)),
    compression=st.sampled_from(list(COMPRESSIONS)),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    is_cut=st.booleans(),
)
def test_damaged_files_are_read_or_refused(folder, name, compression, place, byte, is_cut):
    data = ROWS[name][0]([f"A text of some words, number {number}." for number in range(20)])
    if ROWS[name][1] is not None:
        data, name = COMPRESSIONS[compression](data), name + compression
    at = int(place * len(data))
    inside = Path(tempfile.mkdtemp(dir=folder))
    path = inside / name
    path.write_bytes(data[:at] + (b"" if is_cut else bytes([byte]) + data[at + 1 :]))
    check_read_or_refused(path)
