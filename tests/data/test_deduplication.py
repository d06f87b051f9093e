"""Removing repeated documents, against exact Jaccard similarities and by the files that are written."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_pretrain.curation import deduplication
from hf_pretrain.curation.deduplication import DOCUMENTS, REPORT, deduplicate_files
from hf_pretrain.curation.near_duplicates import Deduplicator, Match, jaccard, normalized, num_bands, shingle_hashes
from hf_pretrain.data import draws
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError


def words(number, count, *, stream="words"):
    """Random words, almost never the same by chance."""
    keys = draws.row_keys([number], seed=1, stream=stream)
    return [f"w{value:x}" for value in draws.integers(keys, count, high=1 << 31)[0].tolist()]


def changed(text, num_changes, *, gap=5):
    """Replace words that lie so far apart that each costs `gap` shingles of that size."""
    edited = text.split()
    for place in range(num_changes):
        edited[gap + 2 * gap * place] = f"new{place}"
    return " ".join(edited)


def runs_of(text, size):
    tokens = text.split()
    return {tuple(tokens[k : k + size]) for k in range(max(len(tokens) - size + 1, 1))}


def textbook_jaccard(first, second):
    return len(first & second) / len(first | second)


def kinds(texts, **options):
    return [match.kind for match in Deduplicator(**options).compare(texts)]


def write(path, texts, separator="\n\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(separator.join(texts), encoding="utf-8")
    return str(path)


def kept_texts(folder):
    return list(read_documents(folder / DOCUMENTS))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shingles_are_those_of_a_plain_loop(size):
    texts = [" ".join(words(k, count)) for k, count in enumerate((0, 1, 4, 5, 6, 40, 3, 0, 11))]
    hashes, bounds = shingle_hashes(texts, size=size)
    seen = {}
    for text, low, high in zip(texts, bounds[:-1], bounds[1:], strict=True):
        tokens = text.split()
        runs = [tuple(tokens[k : k + size]) for k in range(len(tokens) - size + 1)]
        runs = runs or [tuple(tokens)] * bool(tokens)
        assert high - low == len(runs)
        for run, value in zip(runs, hashes[low:high].tolist(), strict=True):
            assert seen.setdefault(run, value) == value
    assert len(set(seen.values())) == len(seen)


def test_the_order_of_words_and_of_characters_counts():
    hashes, _ = shingle_hashes(["abc def", "def abc", "bac def", "ab cdef", "abcdef"], size=2)
    assert len(set(hashes.tolist())) == 5


def test_similarity_is_the_textbook_jaccard():
    text = " ".join(words(0, 300))
    for num_changes in (0, 1, 5, 20):
        other = changed(text, num_changes)
        assert jaccard(text, other, size=5) == pytest.approx(textbook_jaccard(runs_of(text, 5), runs_of(other, 5)))
    # Each change takes five shingles from both sides: (296 - 25) / (296 + 25).
    assert jaccard(text, changed(text, 5), size=5) == pytest.approx(271 / 321)
    assert jaccard("", "", size=5) == 0


def test_planted_near_duplicates_well_above_go_and_well_below_stay():
    originals = [" ".join(words(k, 600)) for k in range(40)]
    near = [changed(text, 5) for text in originals]  # (596 - 25) / (596 + 25)
    far = [changed(text, 30) for text in originals]  # (596 - 150) / (596 + 150)
    assert 0.91 < jaccard(originals[0], near[0], size=5) < 0.93
    assert 0.59 < jaccard(originals[0], far[0], size=5) < 0.61
    matches = Deduplicator().compare([*originals, *near, *far])
    assert matches[:40] == [Match("kept", k) for k in range(40)]
    assert matches[40:80] == [Match("near", k) for k in range(40)]
    assert matches[80:] == [Match("kept", k) for k in range(80, 120)]


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_the_threshold_counts(threshold):
    text = " ".join(words(0, 600))
    others = {0.96: changed(text, 2), 0.72: changed(text, 19), 0.34: changed(text, 58)}
    for similarity, other in others.items():
        assert jaccard(text, other, size=5) == pytest.approx(similarity, abs=0.02)
        expected = "near" if similarity > threshold else "kept"
        assert kinds([text, other], similarity_threshold=threshold) == ["kept", expected]


def test_random_documents_agree_with_brute_force():
    """Three hundred documents of one to three passages of twelve: no similarity lies within the error of the estimate."""
    passages = [words(k, 120, stream="passages") for k in range(12)]
    picks = draws.integers(draws.row_keys(np.arange(300), seed=2), 3, high=12)
    texts = [" ".join(sum((passages[k] for k in sorted(set(row))), [])) for row in picks.tolist()]
    texts = [changed(text, number % 2) for number, text in enumerate(texts)]
    expected, kept, seen = [], [], []
    for number, text in enumerate(texts):
        runs = runs_of(text, 5)
        similarities = {other: textbook_jaccard(runs, other_runs) for other, other_runs in kept}
        seen += similarities.values()
        near = [other for other, similarity in similarities.items() if similarity >= 0.8]
        expected.append(min(near, default=number))
        if not near:
            kept.append((number, runs))
    assert not [similarity for similarity in seen if 0.7 < similarity < 0.9]
    assert 100 < len(kept) < 250 and sum(similarity > 0.3 for similarity in seen) > 1000
    assert [match.original for match in Deduplicator(num_permutations=512).compare(texts)] == expected


def test_how_often_similar_documents_are_found():
    """The error of the estimate and of the bands, over many pairs: near the threshold a half, far from it all."""
    base = [" ".join(words(k, 300, stream="rates")) for k in range(150)]
    rates = {}
    for num_changes in (3, 6, 7, 14):
        similarity = jaccard(base[0], changed(base[0], num_changes), size=5)
        matches = Deduplicator().compare([*base, *(changed(text, num_changes) for text in base)])[150:]
        rates[round(similarity, 2)] = np.mean([match.kind == "near" for match in matches])
    assert list(rates) == [0.9, 0.82, 0.79, 0.62]
    assert rates[0.9] >= 0.99 and rates[0.62] == 0
    assert 0.5 < rates[0.82] < 0.9 and 0.15 < rates[0.79] < 0.55


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("num_permutations", [64, 128, 256])
def test_bands_find_what_is_as_similar_as_the_threshold(threshold, num_permutations):
    bands = num_bands(threshold, num_permutations)
    assert num_permutations % bands == 0
    recall = 1 - (1 - threshold ** (num_permutations // bands)) ** bands
    assert recall >= 0.99
    fewer = [k for k in range(1, bands) if num_permutations % k == 0]
    assert all(1 - (1 - threshold ** (num_permutations // k)) ** k < 0.99 for k in fewer)


def test_a_chain_of_changes_is_compared_with_what_was_kept():
    first = " ".join(words(0, 600))
    second = changed(first, 9)
    third = " ".join(reversed(changed(" ".join(reversed(second.split())), 9).split()))
    assert jaccard(first, second, size=5) == jaccard(second, third, size=5) > 0.85
    assert jaccard(first, third, size=5) < 0.75
    wide = {"num_permutations": 512}  # a standard error of 0.018
    assert kinds([first, second, third], **wide) == ["kept", "near", "kept"]
    assert kinds([second, first, third], **wide) == ["kept", "near", "near"]


def test_a_copy_of_a_removed_document_goes_with_it():
    text = " ".join(words(0, 200))
    near = changed(text, 1)
    assert Deduplicator().compare([text, near, near, text]) == [
        Match("kept", 0),
        Match("near", 0),
        Match("exact", 0),
        Match("exact", 0),
    ]


def test_case_white_space_and_composition_make_no_difference():
    text = "Caf\u00e9 au lait,\n see  No. 5"
    same = ["CAF\u00c9 AU LAIT, SEE NO. 5", "cafe\u0301 au lait, see no. 5", "caf\u00e9 au\u3000lait, see no.\t5"]
    assert kinds([text, *same]) == ["kept", "exact", "exact", "exact"]
    # White space around punctuation changes the text but none of its words.
    assert kinds([text, text.replace("lait,", "lait ,")]) == ["kept", "near"]
    assert kinds([text, text.replace("5", "6"), text.replace(",", "")]) == ["kept"] * 3
    assert normalized(" A\u00a0 B\n") == "a b"


def test_documents_shorter_than_a_shingle_and_without_words():
    assert kinds(["one two", "one two", "one two three", "two one", "One  two"]) == [
        "kept",
        "exact",
        "kept",
        "kept",
        "exact",
    ]
    # Nothing but characters that no word has.
    assert kinds(["\u200b\u200b", "\u200b", "", "\u200b", ""]) == ["kept", "kept", "kept", "exact", "exact"]


def test_text_without_spaces_has_a_word_a_character():
    start = ord("\u4e00")
    characters = [chr(start + value) for value in draws.integers(draws.row_keys([0], seed=3), 400, high=8000)[0]]
    text = "".join(characters)
    near = "".join([*characters[:200], "\u9fa0", *characters[201:]])
    far = "".join([*characters[200:], *characters[:10]])
    assert jaccard(text, near, size=5) == pytest.approx(391 / 401)
    assert kinds([text, near, far]) == ["kept", "near", "kept"]


def test_verdicts_do_not_depend_on_the_groups():
    texts = [" ".join(words(k % 37, 60)) for k in range(100)]
    texts = [changed(text, k % 2, gap=3) for k, text in enumerate(texts)]
    whole = Deduplicator().compare(texts)
    for size in (1, 7, 50):
        deduplicator = Deduplicator()
        parts = [deduplicator.compare(texts[k : k + size]) for k in range(0, 100, size)]
        assert sum(parts, []) == whole


def test_all_references_count_even_those_near_to_each_other():
    first = " ".join(words(0, 600))
    second = changed(first, 9)
    third = " ".join(reversed(changed(" ".join(reversed(second.split())), 9).split()))
    deduplicator = Deduplicator(num_permutations=512)
    deduplicator.add_references([first, second])
    # Near to the second only.
    assert deduplicator.compare([third, first]) == [Match("near", 1), Match("exact", 0)]


def corpus():
    """Thirty documents; of each tenth an exact and a near copy; with one that is near to held-out text."""
    texts = [" ".join(words(k, 120)) for k in range(30)]
    copies = [copy for k in range(0, 30, 10) for copy in (texts[k].upper(), changed(texts[k], 1))]
    return [*texts[:15], *copies, *texts[15:]], texts


def test_files_to_files(tmp_path):
    read, originals = corpus()
    files = [write(tmp_path / "in" / "a.txt", read[:20]), write(tmp_path / "in" / "more" / "b.txt", read[20:])]
    held_out = write(tmp_path / "held_out.txt", ["something else", changed(originals[7], 1), originals[20]])
    report = deduplicate_files(files, output_dir=tmp_path / "out", against=held_out, shard_bytes=4000)
    # The copies of 20 lie before it, but it is in the held-out text; so they are near to that.
    left = [text for k, text in enumerate(originals) if k not in (7, 20)]
    assert kept_texts(tmp_path / "out") == left
    counts = {name: value["documents"] for name, value in report["counts"].items()}
    assert counts == {
        "against": 3,
        "read": 36,
        "exact_duplicates": 2,
        "near_duplicates": 2,
        "in_against": 4,
        "kept": 28,
    }
    assert report["counts"]["kept"]["bytes"] == sum(len(text.encode()) for text in left)
    total = sum(value["bytes"] for name, value in report["counts"].items() if name not in ("against", "read"))
    assert report["counts"]["read"]["bytes"] == total == sum(len(text.encode()) for text in read)
    assert json.loads((tmp_path / "out" / REPORT).read_text(encoding="utf-8")) == report
    largest = report["clusters"][0]
    assert (largest["source"], largest["number"], largest["against"], largest["removed"]) == (
        "held_out.txt",
        2,
        True,
        3,
    )
    assert report["clusters"][1] | {"excerpt": ""} == {
        "source": "a.txt",
        "number": 0,
        "against": False,
        "removed": 2,
        "excerpt": "",
    }


def test_the_files_are_what_the_report_says(tmp_path):
    read, _ = corpus()
    source = write(tmp_path / "in.txt", read)
    report = deduplicate_files(source, output_dir=tmp_path / "out", shard_bytes=4000)
    rows = []
    for file in report["files"]:
        data = (tmp_path / "out" / file["name"]).read_bytes()
        assert len(data) == file["bytes"] <= 4000
        lines = data.decode().splitlines()
        assert len(lines) == file["documents"]
        rows += map(json.loads, lines)
    assert len(report["files"]) > 3 and {"name": "documents/00000.jsonl"}.items() <= report["files"][0].items()
    assert {row["source"] for row in rows} == {"in.txt"}
    assert all(read[row["number"]] == row["text"] for row in rows)
    assert [row["number"] for row in rows] == sorted(row["number"] for row in rows)
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "out" / "documents" / "*.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded["text"] == [row["text"] for row in rows]


def test_a_document_larger_than_a_file_and_odd_characters(tmp_path):
    texts = ['a\u2028b \u00e9 \U0001f600 \x85 "quoted" \\', "x " * 300 + "y"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    report = deduplicate_files(source, output_dir=tmp_path / "out", text_column="body", shard_bytes=10)
    assert [file["documents"] for file in report["files"]] == [1, 1]
    assert list(read_documents(tmp_path / "out" / DOCUMENTS, text_column="body")) == texts


def test_the_same_files_give_the_same_bytes_in_any_process(tmp_path):
    read, _ = corpus()
    source = write(tmp_path / "in.txt", read)
    program = (
        "import sys; from hf_pretrain.curation.deduplication import deduplicate_files; "
        "deduplicate_files(sys.argv[1], output_dir=sys.argv[2], shard_bytes=4000)"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, source, str(tmp_path / seed)], check=True, env=environment)
    names = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_how_the_text_is_split_into_files_does_not_matter(tmp_path):
    read, _ = corpus()
    whole = write(tmp_path / "in.txt", read)
    parts = [write(tmp_path / "parts" / f"{k}.txt", read[9 * k : 9 * k + 9]) for k in range(4)]
    Path(parts[1]).rename(parts[1] + ".plain")
    with gzip.open(parts[1] + ".gz", "wb") as stream:
        stream.write(Path(parts[1] + ".plain").read_bytes())
    parts[1] += ".gz"
    one = deduplicate_files(whole, output_dir=tmp_path / "one")
    four = deduplicate_files(parts, output_dir=tmp_path / "four")
    assert one["counts"] == four["counts"]
    assert kept_texts(tmp_path / "one") == kept_texts(tmp_path / "four")


def test_a_folder_in_use_is_refused_and_an_unfinished_one_is_taken(tmp_path):
    source = write(tmp_path / "in.txt", ["one text"])
    (tmp_path / "bad.txt").write_bytes(b"fine\n\nnot \xff")
    with pytest.raises(InputError, match="UTF-8"):
        deduplicate_files([source, tmp_path / "bad.txt"], output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / DOCUMENTS).exists() and not (tmp_path / "out" / REPORT).exists()
    deduplicate_files(source, output_dir=tmp_path / "out")
    assert kept_texts(tmp_path / "out") == ["one text"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [REPORT, DOCUMENTS]
    with pytest.raises(InputError, match="in use"):
        deduplicate_files(source, output_dir=tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        deduplicate_files(source, output_dir=source)


class TestFolder:
    """One process at a time, nothing of anybody else's removed, nothing left of a run that failed."""

    def failing_after_a_file(self, monkeypatch, error):
        """Let the second group of documents fail, when a file has been begun."""
        original = deduplication.in_groups

        def groups(documents, *, num_characters):
            yield from itertools.islice(original(documents, num_characters=1), 1)
            raise error

        monkeypatch.setattr(deduplication, "in_groups", groups)

    def test_a_second_program_is_refused_and_harms_nothing(self, tmp_path, monkeypatch):
        source, output = write(tmp_path / "in.txt", [" ".join(words(n, 9)) for n in range(5)]), tmp_path / "out"
        original, refusals = deduplication.in_groups, []

        def meanwhile(*args, **kwargs):
            for number, group in enumerate(original(*args, **kwargs)):
                if number == 0:
                    yield group
                    command = [sys.executable, "-c", _START, str(source), str(output)]
                    refusals.append(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
                else:
                    yield group

        monkeypatch.setattr(deduplication, "in_groups", meanwhile)
        deduplicate_files(source, output_dir=output)
        assert "is in use by another process" in refusals[0]
        assert len(kept_texts(output)) == 5
        assert sorted(path.name for path in output.iterdir()) == [REPORT, DOCUMENTS]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("is_new", [True, False])
    def test_a_run_that_fails_leaves_nothing(self, tmp_path, monkeypatch, error, is_new):
        source, output = write(tmp_path / "in.txt", ["one text", "another"]), tmp_path / "out"
        if not is_new:
            output.mkdir()
        self.failing_after_a_file(monkeypatch, error)
        with pytest.raises(type(error)):
            deduplicate_files(source, output_dir=output)
        assert output.exists() != is_new
        assert is_new or not list(output.iterdir())

    def test_a_report_that_cannot_be_written_leaves_nothing(self, tmp_path, monkeypatch):
        source, output = write(tmp_path / "in.txt", ["one text"]), tmp_path / "out"
        original = Path.write_text

        def full(path, *args, **kwargs):
            if path.name == REPORT:
                raise OSError(28, "No space left on device")
            return original(path, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            deduplicate_files(source, output_dir=output)
        assert not output.exists()

    def test_what_a_killed_run_left_is_removed_and_nothing_else(self, tmp_path):
        source, output = write(tmp_path / "in.txt", ["one text"]), tmp_path / "out"
        left = output / "documents.unfinished"
        left.mkdir(parents=True)
        (left / "00000.jsonl").write_text("{}")
        (output / "_lock").touch()
        own = left / "thesis.tex"
        own.write_text("precious")
        with pytest.raises(InputError, match="thesis.tex, which is not of deduplicate"):
            deduplicate_files(source, output_dir=output)
        assert own.read_text() == "precious" and (left / "00000.jsonl").exists()
        own.unlink()
        deduplicate_files(source, output_dir=output)
        assert kept_texts(output) == ["one text"]

    @pytest.mark.parametrize("name", ["train_file", "against"])
    def test_a_file_in_the_output_folder_is_refused(self, tmp_path, name):
        outside, inside = tmp_path / "in.txt", tmp_path / "out" / "more.txt"
        inside.parent.mkdir()
        write(outside, ["one text"])
        write(inside, ["another text"])
        files = {"train_file": outside, "against": None} | {name: inside}
        with pytest.raises(InputError, match=f"{name}='.*more.txt' lies in output_dir"):
            deduplicate_files(files["train_file"], output_dir=tmp_path / "out", against=files["against"])
        assert inside.read_text() == "another text"

    def test_what_is_written_into_the_folder_that_is_read_is_not_read(self, tmp_path):
        for number in range(3):
            write(tmp_path / f"{number}.txt", [" ".join(words(number, 9))])
        report = deduplicate_files(tmp_path, output_dir=tmp_path / "clean", shard_bytes=1)
        assert report["counts"]["read"]["documents"] == report["counts"]["kept"]["documents"] == 3


_START = """
import sys
from hf_pretrain.curation.deduplication import deduplicate_files
try:
    deduplicate_files(sys.argv[1], output_dir=sys.argv[2])
except Exception as error:
    print(error)
"""


def test_a_file_held_against_itself_is_refused(tmp_path):
    source = write(tmp_path / "in.txt", ["one text"])
    with pytest.raises(InputError, match="in train_file too"):
        deduplicate_files(source, output_dir=tmp_path / "out", against=tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_the_library_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(InputError, match=r"pip install 'hf-pretrain\[dedup\]'"):
        deduplicate_files(write(tmp_path / "in.txt", ["one"]), output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_threshold": 0.0}, r"similarity_threshold=0.0 must be in \(0, 1\]"),
        ({"similarity_threshold": 1.1}, r"similarity_threshold=1.1 must be in \(0, 1\]"),
        ({"similarity_threshold": 0.02}, "too low for num_permutations=128"),
        ({"shingle_size": 0}, "shingle_size=0 must be positive"),
        ({"similarity_threshold": float("nan")}, r"similarity_threshold=nan must be in \(0, 1\]"),
        ({"num_permutations": 0}, "num_permutations=0 must be positive"),
        ({"num_permutations": float("nan")}, "num_permutations=nan must be positive"),
        ({"num_permutations": 10**7}, "num_permutations=10000000 must be at most 4096"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Deduplicator(**options)
