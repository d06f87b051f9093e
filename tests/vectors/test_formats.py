"""Files of word vectors: each kind, each oddity, and what is refused."""

import logging
import struct
import zipfile

import numpy as np
import pytest

from hf_pretrain.errors import InputError
from hf_pretrain.vectors.formats import read_vectors, write_vectors

KINDS = ["word2vec", "word2vec_binary", "glove", "fasttext"]


@pytest.fixture
def told(caplog):
    """The warnings of the library, which keeps its loggers to itself."""
    logger = logging.getLogger("hf_pretrain.vectors.formats")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def numbers(rows=50, width=7, *, seed=0):
    """Numbers of all sizes that float32 has, and the odd ones among them."""
    table = np.random.default_rng(seed).integers(0, 1 << 32, size=(rows, width), dtype=np.uint32).view(np.float32)
    table = np.where(np.isfinite(table), table, np.float32(0.1))
    table[0, :6] = [-0.0, 1e-45, 3.4028235e38, 1e-5, 16777216, 0.1]
    return table


def write(tmp_path, content, name="words.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def same_bits(left, right):
    return left.dtype == right.dtype == np.float32 and np.array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read_bit_by_bit(kind, suffix, tmp_path):
    words = tuple(f"wörd{row}" for row in range(50))
    path = write_vectors(tmp_path / f"vectors{suffix}", words, numbers(), kind=kind)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == bool(suffix)
    for given in (None, kind):
        found = read_vectors(path, kind=given)
        assert found.words == words and same_bits(found.vectors, numbers())
    assert path.read_bytes() == write_vectors(tmp_path / f"again{suffix}", words, numbers(), kind=kind).read_bytes()


def test_the_bytes_of_each_kind(tmp_path):
    words, table = ("a", "bc"), np.array([[0.1, -2], [1e-5, 3]], dtype=np.float32)
    floats = [struct.pack("<2f", *row) for row in table]
    expected = {
        "word2vec": b"2 2\na 0.1 -2\nbc 0.00001 3\n",
        "fasttext": b"2 2\na 0.1 -2 \nbc 0.00001 3 \n",
        "glove": b"a 0.1 -2\nbc 0.00001 3\n",
        "word2vec_binary": b"2 2\na " + floats[0] + b"\nbc " + floats[1] + b"\n",
    }
    for kind, content in expected.items():
        assert write_vectors(tmp_path / "x", words, table, kind=kind).read_bytes() == content
    for name, kind in {"x.vec": "fasttext", "x.bin": "word2vec_binary", "x.txt": "word2vec"}.items():
        assert write_vectors(tmp_path / name, words, table).read_bytes() == expected[kind]


def test_a_file_of_many_lines_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_pretrain.vectors.formats._LINES", 7)
    words = tuple(f"w{row}" for row in range(50))
    for kind in KINDS:
        found = read_vectors(write_vectors(tmp_path / "x", words, numbers(), kind=kind))
        assert found.words == words and same_bits(found.vectors, numbers())


@pytest.mark.parametrize("newline", [b"", b"\n"], ids=["gensim", "word2vec"])
def test_binary_rows_may_end_in_a_newline_or_not(newline, tmp_path):
    # The bytes of the first number are a newline and a space.
    table = np.frombuffer(b"\n   \x00\x00\x80?" + struct.pack("<2f", 0.1, 1.0), dtype="<f4").reshape(2, 2)
    content = b"2 2\none " + table[0].tobytes() + newline + b"two " + table[1].tobytes() + newline
    found = read_vectors(write(tmp_path, content))
    assert found.words == ("one", "two") and same_bits(found.vectors, table)


@pytest.mark.parametrize("kind", ["word2vec_binary", "word2vec", "glove"])
def test_bytes_that_are_not_utf8_are_replaced_and_told(kind, tmp_path, told):
    table = np.array([[0.1, 0.3], [0.2, 0.4]], dtype=np.float32)
    content = write_vectors(tmp_path / "x", ("caf?", "\ufffd"), table, kind=kind).read_bytes()
    found = read_vectors(write(tmp_path, content.replace(b"caf?", b"caf\xe9")))
    assert found.words == ("caf\ufffd", "\ufffd") and same_bits(found.vectors, table)
    assert "1 words that are not UTF-8, such as 'caf\ufffd'" in told.text


@pytest.mark.parametrize("end", ["\n", " \n", "\r\n", " \t\r\n"])
def test_lines_may_end_in_spaces(end, tmp_path):
    for header in ("", "2 2"):
        lines = [*([header] if header else []), "a 1 2", "b 3 4"]
        found = read_vectors(write(tmp_path, "".join(line + end for line in lines)))
        assert found.words == ("a", "b") and found.vectors.tolist() == [[1, 2], [3, 4]]
    assert read_vectors(write(tmp_path, "\ufeff2 2\na 1 2\nb 3 4\n\n")).words == ("a", "b")
    assert read_vectors(write(tmp_path, "\ufeffa 1 2\nb 3 4")).words == ("a", "b")


def test_words_with_spaces_are_split_from_the_right(tmp_path):
    names = (". . .", "at name@domain.com", "a\u00a0b", "c\u2028d", "x\x85y", " ", "", "1 2", "plain", "e f")
    table = numbers(len(names), 6)
    for kind in ("glove", "word2vec", "fasttext"):
        found = read_vectors(write_vectors(tmp_path / "x", names, table, kind=kind))
        assert found.words == names and same_bits(found.vectors, table)


def test_one_dimension_and_words_that_are_numbers(tmp_path):
    assert read_vectors(write(tmp_path, "2 1\n7 5\n8 6\n")).words == ("7", "8")
    found = read_vectors(write(tmp_path, "7 5\n8 6\n9 7\n"))
    assert found.words == ("7", "8", "9") and found.vectors.ravel().tolist() == [5, 6, 7]
    assert read_vectors(write(tmp_path, "1 2 3\n4 5 6\n")).words == ("1", "4")
    assert read_vectors(write(tmp_path, "2 2\na +1 2\nb 3 4_0\n".replace("_", ""))).vectors.tolist() == [
        [1, 2],
        [3, 40],
    ]


def test_one_row_more_than_the_header_says(tmp_path, told):
    found = read_vectors(write(tmp_path, "2 2\na 1 2\nb 3 4\n<unk> 5 6\n"))
    assert found.words == ("a", "b", "<unk>") and found.vectors[2].tolist() == [5, 6]
    assert "3 rows, but its header says 2" in told.text


def test_the_first_of_words_that_come_twice_stays(tmp_path, told):
    found = read_vectors(write(tmp_path, "a 1 2\nb 3 4\na 5 6\nb 7 8\nc 9 9\n"))
    assert found.words == ("a", "b", "c") and found.vectors.tolist() == [[1, 2], [3, 4], [9, 9]]
    assert "2 words twice or more, such as 'a'" in told.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("2 2\na 1 2\nb 3\n", r"line 3: 1 numbers behind the word, but 2"),
        ("2 2\na 1 2\n\nb 3 x\n", r"line 4: 'x' is no finite number"),
        ("a 1 2\nb 3 nan\nc 1 1\n", r"line 2"),
        ("a 1 2\nb inf 3\nc 1 1\n", r"line 2"),
        ("a 1 2\nb 1e39 3\nc 1 1\n", r"line 2"),
        ("a 1 2\nb 3  4\nc  5\n", r"line 2: '' is no finite number"),
        ("3 2\na 1 2\nb 3 4\n", r"2 of the 3 words"),
        ("word\nother\n", r"line 1: there is no word followed by numbers"),
        ("", r"no row"),
        (b"2 2\na " + struct.pack("<2f", 1, 2) + b"\nb " + struct.pack("<f", 1), r"word 2 of 2|too short"),
        (b"1 2\na " + struct.pack("<4f", 1, 2, 3, 4), r"8 bytes behind the 1 words"),
        (b"1 2\na " + struct.pack("<2f", 1, float("nan")), r"word 1: .* not finite"),
        (b"9 200\na " + struct.pack("<2f", 1, 2), r"too short"),
        (struct.pack("<i", 793712314) + b"\x0c\0\0\0", r"model of fastText"),
        (b"\x1f\x8b\x08\0", r"whole"),
    ],
)
def test_broken_files_are_refused_with_the_line(content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_vectors(write(tmp_path, content))


def test_other_things_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "glove.zip", "w") as archive:
        archive.writestr("glove.txt", "a 1 2\n")
    with pytest.raises(InputError, match="unzip it"):
        read_vectors(tmp_path / "glove.zip")
    with pytest.raises(InputError, match="no file"):
        read_vectors(tmp_path / "nowhere")
    with pytest.raises(InputError, match="kind='pickle'"):
        read_vectors(tmp_path / "glove.zip", kind="pickle")
    with pytest.raises(InputError, match='kind="glove"'):
        read_vectors(write(tmp_path, "a 1 2\n"), kind="word2vec")


def test_what_a_file_cannot_hold_is_not_written(tmp_path):
    path, table = tmp_path / "x", np.ones((1, 2), dtype=np.float32)
    for word, kind in (("a\nb", "glove"), ("a b", "word2vec_binary"), ("\ud800", "word2vec"), ("\ufeffa", "glove")):
        with pytest.raises(InputError, match=kind):
            write_vectors(path, [word], table, kind=kind)
    with pytest.raises(InputError, match="not finite"):
        write_vectors(path, ["a"], table * np.inf)
    with pytest.raises(InputError, match=r"\(1, 2\) for 2 words"):
        write_vectors(path, ["a", "b"], table)
    assert not path.exists()


def test_gensim_reads_and_writes_the_same(tmp_path):
    keyed = pytest.importorskip("gensim.models").KeyedVectors
    words, table = tuple(f"w{row}" for row in range(50)), numbers()
    for kind, binary in (("word2vec", False), ("fasttext", False), ("word2vec_binary", True)):
        theirs = keyed.load_word2vec_format(write_vectors(tmp_path / "x", words, table, kind=kind), binary=binary)
        assert tuple(theirs.index_to_key) == words and same_bits(theirs.vectors, table)
        theirs.save_word2vec_format(tmp_path / "y", binary=binary)
        found = read_vectors(tmp_path / "y")
        assert found.words == words and same_bits(found.vectors, table)
