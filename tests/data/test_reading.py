"""Files as people have them: what each is, what a folder leaves out, and what one bad document costs."""

import contextlib
import csv
import errno
import gzip
import io
import json
import os
import subprocess
import sys
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.streaming.sources import DatasetShards, FileShards, Shard, list_shards, read_shard
from hf_pretrain.data.text import lines as text_lines
from hf_pretrain.data.text.datasets import load_text_dataset, text_dataset
from hf_pretrain.data.text.files import numbered_documents, read_documents
from hf_pretrain.data.text.kinds import file_kind
from hf_pretrain.data.text.search import find_files, resolve_paths
from hf_pretrain.errors import InputError


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


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


ROWS = '{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n'
PAGE = "<{0}><page><title>River</title><text>The '''river''' is cold.</text></page></{0}>\n\n"


class TestKinds:
    @pytest.mark.parametrize("name", ["part-00000", "wiki_00", "a.txt", "a.md", "a.text.gz", "part-00000.gz"])
    def test_json_lines_are_told_by_their_content(self, write, name):
        content = gzip.compress(ROWS.encode()) if name.endswith("gz") else ROWS
        assert list(read_documents(write(name, content))) == ["one", "two"]
        assert "columns are 'id', 'text'" in refused(write(name, content), text_column="body")

    @pytest.mark.parametrize(
        "content",
        [
            "{Applause} He said.\n",
            '{"Hello", he said, "is what one says."}\n',
            '{"a": 1}\nand prose behind it\n',
            "{{Infobox | name = River}}\n",
            "{\n  a: 1\n}\n",
            "[1] A footnote.\n",
            '["a", "b"] is a list.\n',
            '[{"cut off": \n',
            "<3 is a heart.\n",
            "<s> a sentence </s>\n<s> a sentence </s>\n<s> a sentence </s>\n<s> another </s>\n",
            "<nick> hello\n<other> hi\n<nick> bye\n",
            "<b>Bold</b> is how <i>it</i> begins, and <b>then</b> " + "there are words. " * 40 + "\n",
            "<!-- a comment -->\n# A title\n",
            "a <html> b\n",
            "BZh is no archive, and GIF no image.\n",
        ],
    )
    @pytest.mark.parametrize("name", ["a.txt", "a", "a.md"])
    def test_prose_stays_prose(self, write, name, content):
        assert list(read_documents(write(name, content))) == [content.strip()]

    @pytest.mark.parametrize("name", ["a.xml", "a.htm", "a.HTML", "a.svg", "a.xml.gz", "a.txt", "a", "a.wiki"])
    @pytest.mark.parametrize("root", ["mediawiki", "html", "corpus"])
    def test_markup_is_refused(self, write, name, root):
        content = PAGE.format(root) * 5
        path = write(name, gzip.compress(content.encode()) if name.endswith("gz") else content)
        message = refused(path)
        assert f"{name} is XML or HTML" in message and "WikiExtractor" in message
        with pytest.raises(InputError, match="XML or HTML"):
            list(read_shard(Shard(str(path), 0, None)))

    @pytest.mark.parametrize(
        "start", ["<?xml version='1.0'?>", "\ufeff<?xml ?>", "<!DOCTYPE html>", "\n\n<HTML>", "<!-- c --><html>"]
    )
    def test_markup_is_told_by_its_first_tag(self, write, start):
        assert "XML or HTML" in refused(write("a", f"{start} text\n"))

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"%PDF-1.7\n%\xe2", "a PDF"),
            (b"PK\x03\x04\x14\0", "an archive or an office document"),
            (b"\x89PNG\r\n\x1a\n\0", "an image"),
            (b"a.txt" + b"\0" * 252 + b"ustar\x0000" + b"\0" * 248, "a tar archive"),
            (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", "a web archive"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ],
    )
    @pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
    def test_what_is_no_text_is_named(self, write, content, what, compress):
        assert what in refused(write("a.txt", compress(content)))
        assert what in refused(write("a", compress(content)))
        write("f/a", compress(content))
        write("f/b.txt", "text")
        found = find_files(write("f/b.txt", "text").parent)
        assert [(entry.path, what in entry.reason) for entry in found.left_out] == [("a", True)]

    def test_other_suffixes_are_refused_by_name(self, write):
        for name in ("a.docx", "a.tar.gz", "a.pdf", "a.ipynb", "a.zip", "a.safetensors"):
            assert f"{name} is a" in refused(write(name, "a")) and ".jsonl" in refused(write("a.pdf", "a"))

    def test_languages_are_no_suffixes_of_other_kinds(self, write):
        for name in ("train.pt", "train.so", "train.ps", "train.bin", "corpus.2024"):
            assert list(read_documents(write(name, "text"))) == ["text"]
        assert "an archive" in refused(write("model.pt", b"PK\x03\x04"))

    def test_compression_is_told_by_content(self, write):
        for name in ("a.txt", "a", "a.txt.bz2", "a.txt.zst"):
            for compress in (gzip.compress, zstd):
                assert list(read_documents(write(name, compress(b"one\n\ntwo")))) == ["one", "two"]
        assert "compressed twice" in refused(write("a.gz", gzip.compress(zstd(b"text"))))
        assert "a.txt.zst can not be read" in refused(write("a.txt.zst", "plain"))

    def test_zstd_of_several_frames_and_cut(self, write):
        first, second = zstd(b"one\n\ntw" * 1), zstd(b"o\n\nthree")
        skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
        assert list(read_documents(write("a.zst", skipped + first + skipped + second))) == ["one", "two", "three"]
        whole = zstd(os.urandom(20_000).hex().encode())
        assert "a.zst can not be read" in refused(write("a.zst", whole[:-3]))
        assert "a.zst can not be read" in refused(write("a.zst", whole[:5000]))

    def test_wikiextractor_marks_documents(self, write):
        content = "".join(
            f'<doc id="{n}" url="u?id={n}" title="T">\nT{n}\n\nText.\n\nMore.\n</doc>\n' for n in range(9)
        )
        path = write("AA/wiki_00", content)
        expected = [f"T{n}\n\nText.\n\nMore." for n in range(9)]
        assert list(read_documents(path.parent)) == expected
        assert list(read_documents(path, document_separator="line"))[:4] == ["T0", "Text.", "More.", "T1"]
        for most_bytes in (1, 40, 200):
            shards = list_shards(path, most_bytes=most_bytes)
            assert [text for shard in shards for text, _ in read_shard(shard)] == expected
            for shard in shards:
                whole = list(read_shard(shard))
                for number, (_, behind) in enumerate(whole, start=1):
                    assert list(read_shard(shard, start=behind)) == whole[number:]

    def test_marks_and_carriage_returns(self, write):
        both = b"\xef\xbb\xbf" + ROWS.encode()
        assert list(read_documents(write("cat.jsonl", both + both))) == ["one", "two"] * 2
        assert list(read_documents(write("cat.txt", "\ufeffa\n\n\ufeffb\n\ufeff\nc\ufeff"))) == ["a", "b", "c\ufeff"]
        assert list(read_documents(write("a.csv", "\ufefftext,n\na,1\n"))) == ["a"]
        log = write("log.txt", "10 %\r20 %\r30 %\nnext\n" * 3)
        assert list(read_documents(log, document_separator="line")) == ["10 %\n20 %\n30 %", "next"] * 3
        far = write("far.txt", "word\r" * 20_000 + "\nnext\n")
        assert len(list(read_documents(far, document_separator="line"))) == 2
        mac = write("mac.jsonl", ROWS.replace("\n", "\r"))
        assert list(read_documents(mac)) == ["one", "two"]


class TestRows:
    def test_arrays_and_containers(self, write):
        rows = [{"text": f"text {n}", "tags": [{"text": "no"}]} for n in range(2000)]
        expected = [row["text"] for row in rows]
        nested = {
            "info": {"n": 1},
            "data": [{"title": "t", "parts": rows[:1000]}, {"title": "u", "parts": rows[1000:]}],
        }
        for content in (
            json.dumps(rows),
            json.dumps(rows, indent=2),
            json.dumps([rows[:7], rows[7:]]),
            json.dumps(nested),
            json.dumps(nested, indent=1),
            "\n".join(json.dumps(row, indent=2) for row in rows),
            "\ufeff" + json.dumps(rows),
        ):
            path = write("a.json", content)
            assert list(read_documents(path)) == expected
            (shard,) = list_shards(path, most_bytes=100)
            read = list(read_shard(shard))
            assert list(read_shard(shard, start=read[700][1])) == read[701:]
        assert list(read_documents(write("part-0", json.dumps(rows, indent=2)))) == expected

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('[{"text": "a"}, 3]', "line 1 holds a JSON list of int"),
            ('[\n{"text": "a"},\n{"text": 3}]', "line 3 is a int"),
            ('[\n{"text": "a"},\n{"body": "b"}]', "not in .*line 3; its columns are 'body'"),
            ('[{"text": "a"}, {"text": "b"', "is not JSON"),
            ('[{"text": "a"}, {"text": "b"}', "not closed"),
            ('[{"text": "a"}] x', "is not JSON"),
            ('{"a": [{"b": 1}], "c": [{"b": 1}]}', "its columns are 'a', 'c'"),
        ],
    )
    def test_bad_arrays(self, write, content, message):
        path = write("a.json", content)
        with pytest.raises(InputError, match=message):
            list(read_documents(path))

    def test_numbers_and_brackets_without_end(self, write):
        digits, brackets = "1" * 5000, "[" * 100_000
        row = f'{{"id": {digits}, "text": "a"}}\n'
        assert list(read_documents(write("a.jsonl", row * 2))) == ["a", "a"]
        assert list(read_documents(write("a.json", f"[{row}]"))) == ["a"]
        assert "is a float" in refused(write("a.jsonl", f'{{"text": {digits}}}\n'))
        assert "line 2 is JSON with too many brackets" in refused(write("a.jsonl", f'{row}{{"text": {brackets}\n'))
        refused(write("a.json", brackets))
        refused(write("a.json", f'[{{"text": {brackets}'))

    def test_tables(self, write):
        rows = [("n", "text"), (1, 'He said: "No, never."\nAnd left; twice.'), (2, ""), (3, "tab\there | é")]
        expected = ['He said: "No, never."\nAnd left; twice.', "tab\there | é"]
        for name, delimiter in (("a.csv", ","), ("A.CSV", ";"), ("b.tsv", "\t"), ("c.csv", "|"), ("d.csv", "\t")):
            out = io.StringIO(newline="")
            csv.writer(out, delimiter=delimiter).writerows(rows)
            assert list(read_documents(write(name, out.getvalue()))) == expected
        raw = write("raw.tsv", 'text\tn\n"Well," he said\t1\na "b\t2\n"open\t3\n')
        assert list(read_documents(raw)) == ['"Well," he said', 'a "b', '"open']
        long = write("long.csv", "text\n" + "x" * 300_000 + "\n")
        assert list(read_documents(long)) == ["x" * 300_000]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("body,n\na,1\n", "text_column='text' is not in .*a.csv; its columns are 'body', 'n'"),
            ("text,n\na,1\nb, and c,2\n", "a.csv, line 3 has 3 fields, but the header has 2"),
            ("n,text\n1,a\n2\n", "a.csv, line 3 has 1 fields"),
            ('text,n\n"a" b,1\n', "a.csv, line 2 is no row"),
            ('text,n\n"a,1\n', "a.csv, line 2 is no row"),
            ("text\n\n\n", "holds no text"),
            ("", "columns are 'none'|holds no text"),
            ("x" * 9000, "…"),
        ],
    )
    def test_bad_tables(self, write, content, message):
        path = write("a.csv", content)
        with pytest.raises(InputError, match=message) as error:
            list(read_documents(path))
        assert len(str(error.value)) < 500

    def test_columns_of_arrow(self, write, tmp_path):
        texts = ["one", None, "two"]
        category = pa.dictionary(pa.int32(), pa.large_string())
        for kind in (pa.large_string(), pa.string_view(), category, pa.dictionary(pa.int8(), pa.string())):
            table = pa.table({"text": pa.array(texts, pa.string()).cast(kind)})
            pq.write_table(table, tmp_path / "a.parquet")
            assert list(read_documents(tmp_path / "a.parquet")) == ["one", "two"]
            assert text_dataset(datasets.Dataset(table))["text"][:] == ["one", "two"]
        for column in (pa.array([b"a"]), pa.array([["a"]]), pa.array([1])):
            pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
            assert "not text" in refused(tmp_path / "b.parquet")
        assert "a.arrow is no whole Arrow file" in refused(write("a.arrow", "plain text"))


class TestFolders:
    def test_what_is_left_out_is_counted_and_named(self, write, tmp_path, capsys):
        for name in ("a.txt", "b.md", "sub/c.py", "sub/d", "sub/README.md", ".hidden/x.txt", "__MACOSX/y.txt"):
            write(f"corpus/{name}", f"text of {name}")
        write("corpus/README.md", "about")
        write("corpus/.x.txt", "hidden")
        write("corpus/._a.txt", b"\0\5\x16\7")
        write("corpus/e.jsonl", ROWS)
        write("corpus/f.html", "<html>")
        write("corpus/g.bin", b"\0\1")
        write("corpus/h.dat", b"\xff\0")
        write("corpus/i.txt", " \n\n")
        write("corpus/_SUCCESS", "")
        write("corpus/l.parquet", "")
        write("corpus/j.txt~", "text")
        os.symlink(tmp_path / "nowhere", tmp_path / "corpus/k.txt")
        os.symlink(tmp_path / "corpus/sub", tmp_path / "corpus/link")
        found = find_files(tmp_path / "corpus")
        root = tmp_path / "corpus"
        assert found.paths == [
            str(root / name) for name in ("a.txt", "b.md", "e.jsonl", "sub/README.md", "sub/c.py", "sub/d")
        ]
        assert dict(found.left_out) == {
            ".hidden/": "hidden",
            "__MACOSX/": "a folder of macOS",
            "README.md": "about the text",
            ".x.txt": "hidden",
            "._a.txt": "hidden",
            "f.html": "XML or HTML",
            "g.bin": "not text in UTF-8",
            "h.dat": "not text in UTF-8",
            "i.txt": "empty",
            "_SUCCESS": "empty",
            "l.parquet": "empty",
            "j.txt~": "a copy or a part of a file",
            "k.txt": "a broken link",
            "link/": "a link to a folder; name it",
        }
        for _ in range(2):
            assert resolve_paths(root) == found.paths
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(
            f"reading 6 files of {root} (2 .md, 1 .txt, 1 .jsonl, 1 .py, 1 without a suffix); left out 14: "
        )
        assert "and 7 more" in line and line.count("(hidden)") == 3

    def test_only_the_first_process_prints(self, write, capsys, monkeypatch):
        folder = write("corpus/a.txt", "text").parent
        monkeypatch.setenv("RANK", "1")
        resolve_paths(folder)
        assert capsys.readouterr().out == ""
        monkeypatch.setenv("RANK", "0")
        resolve_paths(folder)
        assert "reading 1 file of" in capsys.readouterr().out

    def test_nothing_to_read_is_refused_with_the_reasons(self, write, tmp_path):
        write("f/a.pdf", b"%PDF-1")
        write("f/.b.txt", "b")
        message = refused(tmp_path / "f")
        assert "left out 2: .b.txt (hidden), a.pdf (a PDF)" in message
        assert "a.pdf (a PDF)" in refused(str(tmp_path / "f/*.pdf"))
        assert "a.pdf is a PDF" in refused(tmp_path / "f/a.pdf")

    def test_globs_leave_out_too_and_look_into_folders(self, write, tmp_path):
        write("f/a.txt", "one")
        write("f/g/b.txt", "two")
        write("f/g/c.png", b"\x89PNG")
        found = find_files(str(tmp_path / "f/*"))
        assert [os.path.basename(path) for path in found.paths] == ["a.txt", "b.txt"]
        assert [tuple(entry) for entry in found.left_out] == [("g/c.png", "an image")]
        assert find_files(str(tmp_path / "f/**/*.txt")).paths == found.paths

    @pytest.mark.parametrize("mark", ["_unfinished", "tokenizer_config.json", "checkpoint-10/trainer_state.json"])
    def test_a_run_inside_of_the_corpus_is_no_text(self, write, tmp_path, mark):
        write("f/a.txt", "one")
        for run in ("run", "deep/run"):
            write(f"f/{run}/vocab.txt", "[PAD]")
            write(f"f/{run}/{mark}", "{}")
            write(f"f/{run}/pretraining/run.json", "{}")
        write("f/deep/b.txt", "two")
        write("f/model/config.json", "{}")
        write("f/model/model.safetensors", b"\0")
        write("f/data/config.json", '{"text": "three"}')
        expected = ["one", "three", "two"]
        assert list(read_documents(tmp_path / "f")) == expected
        assert list(read_documents(str(tmp_path / "f/**"))) == expected
        found = find_files(tmp_path / "f")
        assert [entry.path for entry in found.left_out] == ["deep/run/", "model/", "run/"]
        # Text and run in one folder.
        write(f"f/{mark}", "{}")
        write("f/vocab.txt", "[PAD]")
        write("f/recipe.yaml", "seed: 1")
        assert list(read_documents(tmp_path / "f")) == expected

    def test_saved_datasets(self, tmp_path):
        texts = [f"text {n}" for n in range(30)]
        rows = datasets.Dataset.from_dict({"text": texts, "n": range(30)})
        rows.save_to_disk(tmp_path / "saved", num_shards=3)
        datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "dict")
        datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "test_only")
        for name in ("saved", "dict"):
            assert list(read_documents(tmp_path / name)) == texts
            assert load_text_dataset(str(tmp_path / name))["text"][:] == texts
            half = load_text_dataset(str(tmp_path / name), split="train[:50%]")
            assert half["text"][:] == texts[:15]
            streamed = load_text_dataset(str(tmp_path / name), streaming=True)
            assert [row["text"] for row in streamed] == texts
        assert [entry.path for entry in find_files(tmp_path / "dict").left_out] == ["test/"]
        assert "without a split 'train'" in refused(tmp_path / "test_only")
        with pytest.raises(InputError, match="dataset_name"):
            load_text_dataset(str(tmp_path / "dict"), split="validation")
        (tmp_path / "saved/data-00001-of-00003.arrow").unlink()
        assert "lacks data-00001-of-00003.arrow" in refused(tmp_path / "saved")


class TestPipes:
    def test_a_pipe_is_read_once_and_cached_by_its_content(self, tmp_path, cache, capsys):
        def piped(content):
            path = tmp_path / f"pipe{len(os.listdir(tmp_path))}"
            os.mkfifo(path)
            writer = threading.Thread(target=path.write_bytes, args=(content,))
            writer.start()
            paths = resolve_paths(path)
            writer.join()
            assert resolve_paths(str(path)) == paths
            return path

        # Compressed once: the bytes hold the second at which they were made.
        compressed = gzip.compress(ROWS.encode())
        path = piped(compressed)
        assert list(read_documents(path)) == ["one", "two"]
        assert [(row.source, row.text) for row in numbered_documents([path])] == [("pipe", "one"), ("pipe", "two")]
        first = text_dataset(path)
        again = text_dataset(piped(compressed))
        assert first._fingerprint == again._fingerprint
        assert text_dataset(piped(b"other"))["text"][:] == ["other"]
        with pytest.raises(InputError, match="nothing came"):
            piped(b"")

    def test_standard_input_and_its_copy_goes_with_the_process(self, cache):
        code = (
            "import datasets; from pathlib import Path; from hf_pretrain.data.text.files import read_documents, resolve_paths\n"
            f"datasets.config.HF_DATASETS_CACHE = Path({str(cache)!r})\n"
            "print(list(read_documents('-')), list(read_documents(['-'])), resolve_paths('-')[0])"
        )
        out = subprocess.run([sys.executable, "-c", code], input=b"one\n\ntwo", capture_output=True, check=True).stdout
        found = out.decode().rsplit(maxsplit=1)
        assert found[0] == "['one', 'two'] ['one', 'two']"
        assert found[1].endswith("standard_input") and not os.path.exists(found[1])

    def test_several_processes_can_not_read_a_pipe(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "only one of several processes" in refused("-")


class TestBadText:
    def test_a_bad_document_is_skipped_and_counted(self, write, capsys):
        good = [f"text {n}" for n in range(40)]
        text = b"\n\n".join([*(row.encode() for row in good[:20]), b"b\xffd", *(row.encode() for row in good[20:])])
        lines = [json.dumps({"text": row}).encode() for row in good]
        lines[20:20] = [b'{"text": "b\xff"}', b'{"text": ', b'{"text": "a\\ud800"}', b'{"text": "\0"}']
        table = [
            b"text,n",
            *(f"{row},1".encode() for row in good[:20]),
            b"b\xffd,1",
            *(f"{row},1".encode() for row in good[20:]),
        ]
        array = b'[{"text": "text 0"}, {"text": "b\xffd"}, ' + b", ".join(lines[1:20] + lines[24:]) + b"]"
        for name, content, count in (
            ("a.txt", text, 1),
            ("a.jsonl", b"\n".join(lines), 4),
            ("a.csv", b"\n".join(table), 1),
            ("a.json", array, 1),
            ("a.txt.zst", zstd(text), 1),
        ):
            path = write(name, content)
            assert "UTF-8" in refused(path)
            assert list(read_documents(path, on_bad_text="skip")) == good
            shown = capsys.readouterr().out.splitlines()
            assert len(shown) == min(count, 3) and all(name in line and "skipped a document" in line for line in shown)
            source = FileShards([path])
            rows = [row for shard in range(source.num_shards) for row in source.read(shard)]
            assert [row for row, _ in rows] == good and source.bad.num_skipped == count
            assert [row for row, _ in source.read(0, start=rows[18][1])] == good[19:]
            capsys.readouterr()

    def test_columns(self, tmp_path):
        offsets = pa.array([0, 3, 4, 7], pa.int32()).buffers()[1]
        invalid = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"one\xfftwo"))
        pq.write_table(pa.table({"text": invalid}), tmp_path / "a.parquet")
        with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("text", pa.string())])) as writer:
            writer.write_batch(pa.record_batch({"text": invalid}))
        for name in ("a.parquet", "a.arrow"):
            assert list(read_documents(tmp_path / name, on_bad_text="skip")) == ["one", "two"]
            assert f"{name} is no whole" in refused(tmp_path / name)

    def test_too_many_are_refused(self, write):
        latin = "schön\n\n".encode("latin-1")
        assert len(list(read_documents(write("a.txt", b"good\n\n" + latin * 10), on_bad_text="skip"))) == 1
        assert "11 of 12 documents are no text" in refused(
            write("a.txt", b"good\n\n" + latin * 11), on_bad_text="skip"
        )
        files = [write(f"{n}.txt", latin) for n in range(11)]
        assert "11 of 11 documents" in refused(files, on_bad_text="skip")
        many = write("b.txt", (b"good\n\n" * 200 + latin) * 20)
        assert len(list(read_documents(many, on_bad_text="skip"))) == 4000
        assert "on_bad_text='drop'" in refused(files, on_bad_text="drop")

    def test_a_wrong_column_is_never_skipped(self, write):
        assert "'body'" in refused(write("a.jsonl", '{"text": "a"}\n{"body": "b"}\n'), on_bad_text="skip")
        assert "is a int" in refused(write("a.jsonl", '{"text": "a"}\n{"text": 3}\n'), on_bad_text="skip")

    def test_the_option_is_of_files(self):
        with pytest.raises(InputError, match="on_bad_text='skip'"):
            DataArguments(on_bad_text="skip", dataset_name="x")
        assert DataArguments(on_bad_text="skip", train_file=["x"]).on_bad_text == "skip"


class TestChangedFiles:
    @pytest.fixture
    def small_parts(self, monkeypatch):
        monkeypatch.setattr("hf_pretrain.data.streaming.sources._LEAST_BYTES", 50)
        monkeypatch.setattr("hf_pretrain.data.streaming.sources._NUM_SHARDS", 8)

    def test_a_mended_file_is_read_in_the_old_parts(self, write, small_parts):
        texts = [f"text {number} of words" for number in range(40)]
        path = write("a.txt", "\n\n".join(texts).encode().replace(b"3 of", b"3 \xff", 1))
        other = write("b.jsonl", ROWS)
        before = FileShards([path, other])
        cuts = json.loads(json.dumps(before.cuts()))
        places = {text: (shard, place) for shard in range(before.num_shards) for text, place in before.read(shard)}
        assert before.num_shards > 5 and set(texts) - set(places) == {texts[3]}
        # Longer by more than a part, in front of all others and behind them.
        texts = [f"{texts[0]} and {'more ' * 60}".strip(), *texts[1:], "the last"]
        path.write_text("\n\n".join(texts))
        after = FileShards([path, other])
        assert after.cuts() != cuts
        assert after.identity() == before.identity()
        assert after.cut_like(cuts) == ["a.txt"]
        assert after.num_shards == before.num_shards
        found = [text for shard in range(after.num_shards) for text, _ in after.read(shard)]
        assert found == [*texts, "one", "two"]
        # Behind the first document of a part there are more.
        shard, place = min(place for place in places.values() if place[0] == 4)
        assert [text for text, _ in after.read(shard, start=place)]
        # The parts of a later checkpoint are those of the first.
        third = FileShards([path, other])
        assert third.cut_like(json.loads(json.dumps(after.cuts()))) == []
        assert [shard.start for shard in third.shards] == [shard.start for shard in before.shards]
        path.write_text("short")
        assert FileShards([path, other]).cut_like(cuts) == ["a.txt"]

    def test_other_files_or_formats_are_another_text(self, write):
        path = write("a.txt", "text")
        before = FileShards([path])
        assert FileShards([path], document_separator="line").identity() != before.identity()
        assert FileShards([write("b.txt", "text")]).identity() != before.identity()
        cuts = before.cuts()
        path.write_text(ROWS)
        with pytest.raises(InputError, match="was text when .* is json_lines now"):
            FileShards([path]).cut_like(cuts)


class TestSystem:
    @pytest.mark.parametrize(("number", "words"), [(errno.EMFILE, "ulimit -n"), (errno.EACCES, "no permission")])
    def test_what_the_system_refuses_is_one_line(self, write, monkeypatch, number, words):
        path = write("a.txt", "text")

        def fail(_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(text_lines, "open_bytes", fail)
        message = refused(path)
        assert "a.txt" in message and words in message

    def test_a_full_disk_is_not_the_fault_of_the_text(self):
        with pytest.raises(OSError, match="left"), text_lines.readable("a.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")

    @pytest.mark.parametrize("path", ["a" * 5000, "~nobody-of-that-name/x", "a\0b", "/dev/null", "[", "**/[", ""])
    def test_paths_of_all_kinds(self, path, tmp_path):
        with contextlib.chdir(tmp_path):
            (tmp_path / "x.pdf").write_bytes(b"")
            refused(path)

    def test_the_same_size_and_time_is_not_the_same_text(self, write):
        path = write("a.txt", "one\n\ntwo")
        stat = path.stat()
        assert text_dataset(path)["text"][:] == ["one", "two"]
        write("a.txt", "ONE\n\nTWO")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert text_dataset(path)["text"][:] == ["ONE", "TWO"]

    def test_a_kind_is_looked_up_again_when_the_file_changes(self, write, monkeypatch):
        monkeypatch.setattr("hf_pretrain.data.text.kinds._RECENT_SECONDS", -1)
        path = write("a.txt", "text")
        assert file_kind(path).format == "text"
        write("a.txt", ROWS)
        assert file_kind(path).format == "json_lines"

    def test_a_cache_that_can_not_be_written(self, write):
        with pytest.raises(InputError, match="HF_DATASETS_CACHE"):
            text_dataset(write("a.txt", "text"), cache_dir="/proc/none")


def test_rows_without_text_are_left_out_of_named_datasets(tmp_path):
    texts = ["one", None, "two", None]
    datasets.Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "data/train.parquet")
    assert load_text_dataset(str(tmp_path / "data"), text_column="body")["text"][:] == ["one", "two"]
    streamed = load_text_dataset(str(tmp_path / "data"), text_column="body", streaming=True)
    assert [row["body"] for row in streamed] == ["one", "two"]
    source = DatasetShards(datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset())
    assert list(source.read(0)) == [("one", 1), ("two", 3)]
    assert list(source.read(0, start=1)) == [("two", 3)]
    assert text_dataset(datasets.Dataset.from_dict({"text": texts}))["text"][:] == ["one", "two"]
    with pytest.raises(InputError, match="no text"):
        text_dataset(datasets.Dataset(pa.table({"text": pa.array([None, None], pa.string())})))
    broken = datasets.IterableDataset.from_generator(lambda: (int(text) for text in ["no number"]))
    with pytest.raises(InputError, match="can not be read: invalid literal"):
        list(DatasetShards(broken).read(0))
    numbers = datasets.IterableDataset.from_generator(lambda: iter([{"text": 3}]))
    with pytest.raises(InputError, match="is a int, not text"):
        list(DatasetShards(numbers).read(0))
