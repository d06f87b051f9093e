"""Reading files: what is read, and what is refused in one line."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_pretrain.data import draws
from hf_pretrain.data.text.datasets import (
    load_text_dataset,
    random_subset,
    text_dataset,
    text_sizes,
)
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.data.text.search import resolve_paths
from hf_pretrain.errors import InputError

TEXT = "\ufeffFirst line\r\nsecond é\r\n \t\r\n\r\n  third \U0001f600\rfourth\n\n"
DOCUMENTS = ["First line\nsecond é", "third \U0001f600\nfourth"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    def _write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


def refused(*args, **options):
    with pytest.raises(InputError) as error:
        list(read_documents(*args, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("blank_line", DOCUMENTS),
        ("line", ["First line", "second é", "third \U0001f600\nfourth"]),
        ("file", ["First line\nsecond é\n \t\n\n  third \U0001f600\nfourth"]),
    ],
)
def test_separators(write, separator, expected):
    assert list(read_documents(write("a.txt", TEXT), document_separator=separator)) == expected


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_compressed(write, suffix, compress):
    assert list(read_documents(write(f"a.txt.{suffix}", compress(TEXT.encode())))) == DOCUMENTS
    rows = "".join(json.dumps({"body": document}) + "\n" for document in DOCUMENTS)
    assert list(read_documents(write(f"a.jsonl.{suffix}", compress(rows.encode())), text_column="body")) == DOCUMENTS


def test_json_lines_and_parquet(write, tmp_path):
    path = write(
        "a.jsonl", '{"text": "one\\n\\ntwo \\ud83d\\ude00"}\n\n{"text": null}\n{"text": " "}\n{"text": "three"}'
    )
    assert list(read_documents(path)) == ["one\n\ntwo \U0001f600", "three"]
    texts = [f"text {i}" for i in range(600)]
    pq.write_table(pa.table({"n": range(601), "body": [*texts, None]}), tmp_path / "a.parquet", row_group_size=7)
    assert list(read_documents(tmp_path / "a.parquet", text_column="body")) == texts


def test_folders_and_globs(write, tmp_path):
    write("corpus/b.txt", "two")
    write("corpus/a.txt", "one")
    write("corpus/deep/c.jsonl.gz", gzip.compress(b'{"text": "three"}'))
    write("corpus/readme.md", "not read")
    assert list(read_documents(tmp_path / "corpus")) == ["one", "two", "three"]
    assert list(read_documents(str(tmp_path / "corpus" / "[ab].txt"))) == ["one", "two"]
    paths = [str(tmp_path / "corpus" / "b.txt"), str(tmp_path / "corpus")]
    assert list(read_documents(paths)) == ["two", "one", "three"]
    assert list(read_documents(tmp_path / "corpus" / "readme.md")) == ["not read"]
    write("odd[1].txt", "odd")
    assert list(read_documents(tmp_path / "odd[1].txt")) == ["odd"]


def test_missing_and_unreadable(write, tmp_path):
    assert "nothing.txt" in refused(tmp_path / "nothing.txt")
    assert "*.txt" in refused(str(tmp_path / "*.txt"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty")
    assert "a.csv" in refused(write("a.csv", "x,y"))
    assert "no file" in refused([])
    assert "document_separator='page'" in refused(write("a.txt", "a"), document_separator="page")


@pytest.mark.parametrize("content", [b"", b" \n\n\t\n", "\ufeff".encode()])
def test_empty_file_is_named(write, content):
    good, empty = write("good.txt", "text"), write("empty.txt", content)
    assert "empty.txt holds no text" in refused([good, empty])


@pytest.mark.parametrize("separator", ["blank_line", "line", "file"])
@pytest.mark.parametrize("before", [0, 3, 70_000, 2_500_000])
def test_bad_bytes_are_refused_at_their_offset(write, before, separator):
    start = ("aé\n\n" * (before // 5 + 1)).encode()[:before].decode(errors="ignore").encode()
    for bad in (b"\xff", b"\0", b"\xc3(", b"\xed\xa0\x80"):
        path = write("a.txt", start + bad + b" more text \xff\0")
        assert f"byte {len(start)} " in refused(path, document_separator=separator)
    assert f"byte {len(start)} " in refused(write("a.txt", start + "é".encode()[:1]))
    compressed = write("a.txt.gz", gzip.compress(start + b"\xff"))
    assert f"byte {len(start)} " in refused(compressed)


def test_other_encodings_and_binary(write):
    assert "UTF-8" in refused(write("a.txt", "text".encode("utf-16")))
    assert "UTF-8" in refused(write("a.txt", "naïve".encode("latin-1")))
    assert "UTF-8" in refused(write("a.jsonl", '{"text": "naïve"}'.encode("latin-1")))
    assert "UTF-8" in refused(write("a.txt", bytes(range(256)) * 10))
    assert "byte 4 " in refused(write("a.txt", b"text\0 that is UTF-8 but for what it is"))


def test_damaged_files(write):
    whole = gzip.compress(os.urandom(5000).hex().encode())
    assert "a.txt.gz" in refused(write("a.txt.gz", whole[:-3000]))
    assert "a.txt.gz" in refused(write("a.txt.gz", b"plain text"))
    assert "a.txt.xz" in refused(write("a.txt.xz", b"plain text"))
    assert "a.txt.bz2" in refused(write("a.txt.bz2", b"plain text"))
    assert "a.parquet" in refused(write("a.parquet", b"plain text"))


def test_bad_rows(write, tmp_path):
    message = refused(write("a.jsonl", '{"text": "a"}\n{"body": "b", "id": 1}\n'))
    assert "line 2" in message and "'body', 'id'" in message and "text_column='text'" in message
    assert "line 2 is not JSON" in refused(write("a.jsonl", '{"text": "a"}\n{"text": \n'))
    assert "line 1 holds a JSON list" in refused(write("a.json", '["a"]\n'))
    assert "is a int" in refused(write("a.jsonl", '{"text": 3}\n'))
    assert "surrogate" in refused(write("a.jsonl", '{"text": "a\\ud800"}\n'))
    pq.write_table(pa.table({"n": [1], "body": ["a"]}), tmp_path / "a.parquet")
    assert "'n', 'body'" in refused(tmp_path / "a.parquet")
    assert "int64" in refused(tmp_path / "a.parquet", text_column="n")


def test_memory_does_not_grow_with_the_file(write):
    path = write("a.txt", b"some words of text\n\n" * 400_000)
    documents = read_documents(path)
    next(documents)
    tracemalloc.start()
    count = sum(1 for _ in documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 399_999
    assert peak < 2**20


def test_dataset_from_files(write, cache):
    texts = text_dataset(write("a.txt", TEXT))
    assert texts["text"][:] == DOCUMENTS
    assert texts.features == datasets.Features({"text": datasets.Value("string")})
    assert all(file["filename"].startswith(str(cache)) for file in texts.cache_files) and texts.cache_files


def test_cache_follows_the_files_and_the_options(write, monkeypatch):
    path = write("a.txt", "one\n\ntwo")
    first = text_dataset(path)
    assert text_dataset(path)._fingerprint == first._fingerprint
    by_line = text_dataset(path, document_separator="file")
    assert by_line["text"][:] == ["one\n\ntwo"]
    write("a.txt", "one\n\nTWO")
    os.utime(path, ns=(1, 1))
    assert text_dataset(path)["text"][:] == ["one", "TWO"]
    write("a.txt", "one\n\ntwo\n\nthree")
    assert len(text_dataset(path)) == 3
    write("a.txt", "one\n\ntwo\n\nthree")
    again = text_dataset(path)
    monkeypatch.setattr("hf_pretrain.data.text.datasets._rows", lambda *_, **__: pytest.fail("read twice"))
    assert text_dataset(path)["text"][:] == again["text"][:]


def test_dataset_refuses_what_reading_refuses(write, cache):
    good, bad = write("good.txt", "text"), write("bad.txt", b"text\n\n\xff")
    with pytest.raises(InputError, match="bad.txt is not text in UTF-8: byte 6"):
        text_dataset([good, bad])
    bad.write_bytes(b"mended")
    assert text_dataset([good, bad])["text"][:] == ["text", "mended"]


def test_dataset_from_a_dataset(tmp_path):
    rows = datasets.Dataset.from_dict({"body": ["a", "b"], "n": [1, 2]})
    assert text_dataset(rows, text_column="body")["text"][:] == ["a", "b"]
    with pytest.raises(InputError, match="'body', 'n'"):
        text_dataset(rows)
    with pytest.raises(InputError, match="int64"):
        text_dataset(rows, text_column="n")
    with pytest.raises(InputError, match="no rows"):
        text_dataset(rows.select([]), text_column="body")
    with pytest.raises(InputError, match="DatasetDict"):
        text_dataset(datasets.DatasetDict(train=rows), text_column="body")


def test_named_dataset(write, tmp_path):
    write("data/train.jsonl", '{"body": "a"}\n{"body": "b"}\n')
    folder = str(tmp_path / "data")
    assert load_text_dataset(folder, text_column="body")["text"][:] == ["a", "b"]
    assert [row["body"] for row in load_text_dataset(folder, text_column="body", streaming=True)] == ["a", "b"]
    for options in ({"split": "test", "text_column": "body"}, {"config_name": "other", "text_column": "body"}, {}):
        with pytest.raises(InputError) as error:
            load_text_dataset(folder, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="dataset_name='no/such'"):
        load_text_dataset("no/such")


def test_sizes_and_random_subset():
    texts = datasets.Dataset.from_dict({"text": ["é" * n for n in range(1, 101)] + [None]})
    num_bytes, num_characters = text_sizes(texts)
    assert num_bytes.tolist() == [2 * n for n in range(1, 101)] + [0]
    assert num_characters.tolist() == [*range(1, 101), 0]
    assert text_sizes(texts.select([5, 3]))[1].tolist() == [6, 4]
    subset = random_subset(texts, max_bytes=3000, seed=1)
    lengths = [len(text or "") for text in subset["text"]]
    assert 2700 < 2 * sum(lengths) <= 3000
    assert lengths[:-1] == sorted(lengths[:-1])
    assert lengths != [len(text or "") for text in random_subset(texts, max_bytes=3000, seed=2)["text"]]
    assert min(lengths[:5]) < 20 < 80 < max(lengths)
    assert random_subset(texts, max_bytes=10_100, seed=1) is texts
    with pytest.raises(InputError, match="max_corpus_bytes=1 "):
        random_subset(texts.select(range(50, 90)), max_bytes=1, seed=1)


def lengths_of_subset(lengths, **options):
    texts = datasets.Dataset.from_dict({"text": ["x" * length for length in lengths]})
    return [len(text) for text in random_subset(texts, **options)["text"]]


def test_a_random_subset_passes_over_what_does_not_fit():
    """One book among small texts ends nothing, and is never taken; the texts that fit are as likely as one another."""
    lengths = [100_000, *range(20, 80)]
    taken = np.zeros(len(lengths))
    for seed in range(200):
        subset = lengths_of_subset(lengths, max_bytes=1_000, seed=seed)
        assert 900 < sum(subset) <= 1_000 and subset == sorted(subset)
        taken[[lengths.index(length) for length in subset]] += 1
    assert taken[0] == 0
    # About a third of 2970 bytes; long ones are a little rarer.
    assert 0.2 < taken[1:].min() / 200 and taken[1:].max() / 200 < 0.5
    assert 0.8 < taken[31:].sum() / taken[1:31].sum() < 1


def test_a_random_subset_is_taken_in_rounds_until_nine_tenths_are_filled():
    for seed in range(30):
        lengths = np.random.default_rng(seed).integers(1, 300, 60).tolist()
        waiting = draws.permutation(len(lengths), seed=seed, stream="corpus subset").tolist()
        chosen: list[int] = []
        room = 1_000
        while room > 100:
            waiting = [row for row in waiting if lengths[row] <= room]
            if not waiting:
                break
            while waiting and lengths[waiting[0]] <= room:
                room -= lengths[waiting[0]]
                chosen.append(waiting.pop(0))
        assert lengths_of_subset(lengths, max_bytes=1_000, seed=seed) == [lengths[row] for row in sorted(chosen)]


def test_a_random_subset_of_texts_of_any_size_is_half_full_if_small_ones_suffice():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        lengths = np.concatenate([np.exp(rng.uniform(0, 12, 40)).astype(int) + 1, np.full(60, 10)]).tolist()
        assert 300 <= sum(lengths_of_subset(lengths, max_bytes=600, seed=seed)) <= 600
    with pytest.raises(InputError, match="max_corpus_bytes=9 is less than the 10 bytes of the shortest document"):
        lengths_of_subset([50, 10, 0, 20], max_bytes=9, seed=0)


def test_resolve_paths_keeps_order_and_drops_repeats(write, tmp_path):
    b, a = write("b.txt", "b"), write("a.txt", "a")
    assert resolve_paths([b, tmp_path / "?.txt", a]) == [str(b), str(a)]
