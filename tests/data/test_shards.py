"""Shards: whatever the cut and wherever reading goes on, the documents of the files, each once and in order."""

import bz2
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import os
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_pretrain.data.streaming.sources import Shard, list_shards, read_shard
from hf_pretrain.data.text import files as text_files
from hf_pretrain.data.text import lines as text_lines
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError

SEPARATORS = ["blank_line", "line", "file"]
# White space that ends no line here, though str.splitlines and str.isspace say so.
ODD = "\x85\u2028\u2029\x0b\x0c\x1c"
TEXTS = {
    "short": "a",
    "no_final_newline": "one\n\ntwo\nlines\n\nthree",
    "blank_lines": "\n\n \n\none\n\n\n\t\n\r\n\n two\n\u3000\xa0\nthree\n\n\n\n",
    "endings": "one\r\n\r\ntwo\rtwo\r\rthree\n\rfour\r\r\n\nfive\r\n \r\nsix\r",
    "mark": "\ufeffone\n\ntwo\n\n\ufeffthree\n",
    "mark_then_blank": "\ufeff\n\none\n\ntwo",
    "mark_only_line": "\ufeff\r\none\r\n\r\ntwo",
    "characters": "\u00e9\u20ac\U0001f600\n\n\U0001f468\u200d\U0001f469\n\u3042\u3044\n\n\u0435\u0434\u0430\n\u00e9",
    "odd_white_space": f"one{ODD}more\n{ODD}\ntwo{ODD}\n\n\u2028three\x85\n\x1c\nfour",
    "long_paragraph": "x\n" * 25 + "\n" + "y\n",
    "long_line": "a\n\n" + "\u20ac" * 15 + "\n\nb",
}
ROWS = ["one", "", " ", "two\n\nlines \U0001f600", None, "\u2028", "three\r\n" * 4, "\u00e9" * 20, " end\t"]
JSON = "".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\n\r\n"[i % 3 :] for i, text in enumerate(ROWS))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_all(shards, **options):
    return [document for shard in shards for document, _ in read_shard(shard, **options)]


def check_every_cut(path, separator="blank_line"):
    """Every size of the parts, from one byte on; and going on behind every document of every part."""
    expected = list(read_documents(path, document_separator=separator))
    cuts = {}
    for most_bytes in range(1, path.stat().st_size + 2):
        shards = list_shards(path, most_bytes=most_bytes, document_separator=separator)
        cuts.setdefault(len(shards), shards)
        assert read_all(shards, document_separator=separator) == expected, most_bytes
    for shard in itertools.chain.from_iterable(cuts.values()):
        check_every_start(shard, document_separator=separator)
    return cuts


def check_every_start(shard, **options):
    whole = list(read_shard(shard, **options))
    for number, (_, position) in enumerate(whole, start=1):
        assert list(read_shard(shard, start=position, **options)) == whole[number:], (shard, position)


@pytest.fixture
def small_chunks(monkeypatch):
    def _set(size):
        monkeypatch.setattr(text_lines, "CHUNK", size)

    return _set


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("name", TEXTS)
def test_every_cut_of_text(tmp_path, name, separator):
    path = write(tmp_path / "a.txt", TEXTS[name])
    cuts = check_every_cut(path, separator)
    assert set(cuts) >= ({1} if separator == "file" else {1, path.stat().st_size})


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["endings", "mark_only_line", "characters", "odd_white_space"])
def test_every_cut_however_much_is_read_at_a_time(tmp_path, small_chunks, name, chunk):
    path = write(tmp_path / "a.txt", TEXTS[name])
    expected = {separator: list(read_documents(path, document_separator=separator)) for separator in SEPARATORS}
    small_chunks(chunk)
    for separator in SEPARATORS:
        assert list(read_documents(path, document_separator=separator)) == expected[separator]
        check_every_cut(path, separator)


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("name", [*TEXTS, "old_mac"])
def test_documents_are_those_of_the_decoded_text(tmp_path, name, separator):
    """An independent reader of the same text: line feeds end lines, carriage returns only where there are none."""
    text = {**TEXTS, "old_mac": "one\rone\r\rtwo\r\ufeff\rthree\r"}[name]
    path = write(tmp_path / "a.txt", text)
    end = "\n" if "\n" in text else "\r"
    lines = [re.sub("^\ufeff+", "", line) for line in re.findall(f"[^{end}]*{end}|[^{end}]+", text)]
    if separator == "blank_line":
        groups = itertools.groupby(lines, lambda line: not line.strip())
        paragraphs = ["".join(group) for blank, group in groups if not blank]
    else:
        paragraphs = lines if separator == "line" else ["".join(lines)]
    expected = [re.sub("\r\n?", "\n", paragraph).strip() for paragraph in paragraphs if paragraph.strip()]
    assert list(read_documents(path, document_separator=separator)) == expected
    check_every_cut(path, separator)


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json"])
def test_every_cut_of_json_lines(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", "\ufeff" * (suffix == "json") + JSON)
    cuts = check_every_cut(path)
    assert read_all(cuts[1]) == [text.strip() for text in ROWS if text and text.strip()]
    shards = list_shards(path, most_bytes=40, document_separator="file")
    assert len(shards) > 1
    assert read_all(shards, document_separator="file") == read_all(cuts[1])


@pytest.mark.parametrize("group_size", [1, 2, 4, 9, 100])
def test_every_cut_of_parquet(tmp_path, group_size, monkeypatch):
    monkeypatch.setattr(text_files, "_BATCH_ROWS", 3)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(18), "text": [*ROWS, *ROWS]}), path, row_group_size=group_size)
    expected = [text.strip() for text in [*ROWS, *ROWS] if text and text.strip()]
    num_groups = -(-18 // group_size)
    seen = set()
    for most_bytes in (1, 200, 300, 500, 900, 10**6):
        shards = list_shards(path, most_bytes=most_bytes)
        seen.add(len(shards))
        assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
        assert read_all(shards) == expected
        for shard in shards:
            check_every_start(shard)
    assert {1, num_groups} <= seen


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_compressed_files_are_whole(tmp_path, suffix, compress):
    for name, content in (("a.txt", TEXTS["endings"]), ("a.jsonl", JSON)):
        path = write(tmp_path / f"{name}.{suffix}", compress(content.encode()))
        assert list_shards(path, most_bytes=1) == [Shard(str(path), 0, None)]
        check_every_cut(path)


def test_every_white_space_makes_a_line_blank(tmp_path):
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    path = write(tmp_path / "a.txt", "".join(f"{number}\n{space}\n" for number, space in enumerate(spaces)))
    assert list(read_documents(path)) == [str(number) for number in range(len(spaces))]


def test_long_text_with_many_documents(tmp_path):
    """More than is read at a time, in parts that are smaller and larger than that."""
    paragraphs = [f"{n} " + "wörter \U0001f600 " * (n * 7 % 40) for n in range(3000)]
    path = write(tmp_path / "a.txt", "\r\n \r\n".join(paragraphs))
    expected = [paragraph.strip() for paragraph in paragraphs]
    for most_bytes in (20_000, 65_536, 300_000):
        shards = list_shards(path, most_bytes=most_bytes)
        assert len(shards) == -(-path.stat().st_size // most_bytes)
        assert read_all(shards) == expected
    documents = list(read_shard(shards[1]))
    for number in range(0, len(documents), 50):
        assert list(read_shard(shards[1], start=documents[number][1])) == documents[number + 1 :]


def test_shards_of_several_files(tmp_path):
    first, second = write(tmp_path / "b.txt", "one\n\ntwo"), write(tmp_path / "a.jsonl", '{"text": "three"}')
    shards = list_shards([first, second], most_bytes=4)
    assert [shard.path for shard in shards] == [str(first)] * 2 + [str(second)] * 5
    assert read_all(shards) == ["one", "two", "three"]
    assert shards == list_shards([str(first), str(second)], most_bytes=4)
    assert [Shard(**json.loads(json.dumps(dataclasses.asdict(shard)))) for shard in shards] == shards
    assert len({*shards, *shards}) == len(shards)


def test_default_size_follows_the_files(tmp_path):
    def shards_of(megabytes):
        with (tmp_path / "a.txt").open("wb") as file:
            file.truncate(megabytes * 10**6)
        return len(list_shards(tmp_path / "a.txt"))

    assert [shards_of(megabytes) for megabytes in (0, 1, 5, 256, 2560, 64_000)] == [1, 1, 5, 256, 256, 1000]


class CountingFile(io.FileIO):
    num_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        CountingFile.num_bytes += len(data)
        return data


@pytest.fixture
def count(monkeypatch):
    def _count(shard, **options):
        CountingFile.num_bytes = 0
        documents = list(read_shard(shard, **options))
        return documents, CountingFile.num_bytes

    monkeypatch.setattr(text_lines, "open_bytes", lambda path: CountingFile(path, "rb"))
    return _count


@pytest.mark.parametrize(
    ("name", "document"), [("a.txt", "some words of text\n\n"), ("a.jsonl", '{"text": "words"}\n')]
)
def test_nothing_is_read_again(tmp_path, count, name, document):
    path = write(tmp_path / name, document * 100_000)
    shards, size = list_shards(path, most_bytes=500_000), path.stat().st_size
    assert sum(count(shard)[1] for shard in shards) <= size + 2 * len(shards) * text_lines.CHUNK
    documents, num_bytes = count(shards[1])
    assert num_bytes <= shards[1].stop - shards[1].start + 2 * text_lines.CHUNK
    rest, num_bytes = count(shards[1], start=documents[-100][1])
    assert len(rest) == 99
    assert num_bytes <= 2 * text_lines.CHUNK


def test_a_part_inside_of_a_long_line_is_not_read_to_its_end(tmp_path, count):
    path = write(tmp_path / "a.txt", "x" * 10**6)
    shards = list_shards(path, most_bytes=10_000)
    assert [len(count(shard)[0]) for shard in shards] == [1] + [0] * 99
    assert count(shards[1])[1] <= 2 * text_lines.CHUNK


def test_parquet_skips_row_groups(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(100)]}), path, row_group_size=10)
    read = []
    iter_batches = pq.ParquetFile.iter_batches

    def recorded(self, *args, row_groups, **options):
        read.append(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    shard = Shard(str(path), 3, 7)
    assert [document for document, _ in read_shard(shard)] == [f"text {n}" for n in range(30, 70)]
    assert [document for document, _ in read_shard(shard, start=25)] == [f"text {n}" for n in range(55, 70)]
    assert [document for document, _ in read_shard(shard, start=30)] == [f"text {n}" for n in range(60, 70)]
    assert list(read_shard(shard, start=40)) == []
    assert read == [[3, 4, 5, 6], [5, 6], [6], []]


def test_memory_is_that_of_a_document(tmp_path):
    path = write(tmp_path / "a.txt", b"some words of text\n\n" * 200_000 + b"\n" + b"long " * 10**6)

    def peak(shard, **options):
        tracemalloc.start()
        count = sum(1 for _ in read_shard(shard, **options))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, size

    count, size = peak(Shard(str(path), 0, 3_900_000))
    assert count > 190_000 and size < 2**20
    assert peak(Shard(str(path), 4_500_000, 4_600_000)) == (0, pytest.approx(0, abs=2**20))
    count, size = peak(Shard(str(path), 4_000_000, None))
    assert count == 1 and size < 25e6


@pytest.mark.parametrize("before", [0, 3, 70_000, 200_000])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_bad_bytes_are_named_by_their_place_in_the_file(tmp_path, before, suffix):
    line = '{"text": "aé"}\n' if suffix == "jsonl" else "aé\n\n"
    start = (line * (before // 5 + 1)).encode()[:before].decode(errors="ignore").encode()
    for bad in (b"\xff", b"\0", b"\xc3(", b"\xed\xa0\x80"):
        path = write(tmp_path / f"a.{suffix}", start + bad + b" more text \xff\0\n")
        for most_bytes in (10**4, 10**6):
            with pytest.raises(InputError, match=f"a.{suffix} is not text in UTF-8: byte {len(start)} "):
                read_all(list_shards(path, most_bytes=most_bytes))


def test_bad_rows_are_named_by_their_line(tmp_path):
    good = '{"text": "a"}\r\n\n' * 1000
    for line, message in (
        ("{", "is not JSON"),
        ("[]", "JSON list"),
        ('{"body": 1}', "'body'"),
        ('{"text": 1}', "int"),
    ):
        path = write(tmp_path / "a.jsonl", f"{good}{line}\n{good}")
        for shard in list_shards(path, most_bytes=5000)[:3]:
            assert list(read_shard(shard))
        with pytest.raises(InputError, match=r"a.jsonl, line 2001\b") as error:
            read_all(list_shards(path, most_bytes=5000))
        assert message in str(error.value) and "\n" not in str(error.value)


def refused(path, **options):
    with pytest.raises(InputError) as error:
        read_all(list_shards(path, most_bytes=options.pop("most_bytes", None)), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_and_missing_is_refused_like_by_read_documents(tmp_path):
    assert "a.txt.gz" in refused(write(tmp_path / "a.txt.gz", gzip.compress(os.urandom(5000).hex().encode())[:-3000]))
    assert "a.txt.xz" in refused(write(tmp_path / "a.txt.xz", b"plain text"))
    assert "a.parquet is no whole Parquet file" in refused(write(tmp_path / "a.parquet", b"plain text"))
    invalid = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"text": invalid}), tmp_path / "c.parquet")
    assert "c.parquet is no whole Parquet file" in refused(tmp_path / "c.parquet")
    assert "nothing.txt" in refused(tmp_path / "nothing.txt")
    pq.write_table(pa.table({"n": [1], "body": ["a"]}), tmp_path / "b.parquet")
    assert "'n', 'body'" in refused(tmp_path / "b.parquet")
    assert "int64" in refused(tmp_path / "b.parquet", text_column="n")
    shards = list_shards(write(tmp_path / "gone.txt", "text"))
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(InputError, match="gone.txt"):
        read_all(shards)
    with pytest.raises(InputError, match="most_bytes=0 "):
        list_shards(tmp_path / "b.parquet", most_bytes=0)
    for function in (list_shards, lambda _, **options: read_shard(Shard("a", 0, None), **options)):
        with pytest.raises(InputError, match="document_separator='page'"):
            function(tmp_path / "b.parquet", document_separator="page")


@pytest.mark.parametrize("most_bytes", [1, 3, None])
def test_a_file_without_text_is_named(tmp_path, most_bytes):
    for content in ("", " \n\n\t\n", "\ufeff", "\n" * 20):
        path = write(tmp_path / "empty.txt", content)
        assert "empty.txt holds no text" in refused(path, most_bytes=most_bytes)
    path = write(tmp_path / "empty.jsonl", '{"text": " "}\n{"text": null}\n')
    assert "empty.jsonl holds no text" in refused(path, most_bytes=most_bytes)
    pq.write_table(
        pa.table({"text": [None, " ", ""]}, pa.schema([("text", pa.string())])), tmp_path / "empty.parquet", 1
    )
    assert "empty.parquet holds no text" in refused(tmp_path / "empty.parquet", most_bytes=most_bytes)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "no_rows.parquet")
    assert "no_rows.parquet holds no text" in refused(tmp_path / "no_rows.parquet", most_bytes=most_bytes)
