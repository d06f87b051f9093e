"""The commands from their command line to what they print and write."""

import json

import pytest

from hf_pretrain import cli
from hf_pretrain.data.text import read_documents


def run(capsys, *argv):
    status = cli.main([str(part) for part in argv])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out


@pytest.fixture
def corpus(tmp_path):
    texts = [f"Document {k} begins here. It says the number {k} again, and ends with {k * k}." for k in range(12)]
    texts.insert(5, texts[3].upper())
    path = tmp_path / "in" / "corpus.txt"
    path.parent.mkdir()
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def test_deduplicate(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("document 7 begins here. it says the number 7 again, and ends with 49.", encoding="utf-8")
    shown = run(capsys, "deduplicate", "--train_file", corpus, "--output_dir", out, "--against", held_out)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert any(line.startswith("documents read 13 100.0%") for line in lines)
    assert any(line.startswith("equal to one before 1 7.7%") for line in lines)
    assert any(line.startswith("equal or near to one of --against 1 7.7%") for line in lines)
    assert any(line.startswith("kept 11 84.6%") for line in lines)
    assert any(line.startswith("1 corpus.txt:3 DOCUMENT 3 BEGINS HERE.") for line in lines)
    assert f"{out / 'documents'}" in shown and f"{out / 'deduplication.json'}" in shown
    assert len(list(read_documents(out / "documents"))) == 11
    assert cli.main(["deduplicate", "--train_file", str(corpus), "--output_dir", str(out)]) == 2
    assert "in use" in capsys.readouterr().err


def test_deduplicate_without_against_says_nothing_of_it(corpus, tmp_path, capsys):
    shown = run(capsys, "deduplicate", "--train_file", corpus, "--output_dir", tmp_path / "out")
    assert "--against" not in shown and "near to one before" in shown


def test_deduplicate_refuses_bad_numbers_before_reading(tmp_path, capsys):
    argv = ["deduplicate", "--train_file", "nowhere", "--output_dir", str(tmp_path / "out")]
    for option, value in (("similarity_threshold", "2"), ("shingle_size", "0"), ("shard_bytes", "0")):
        assert cli.main([*argv, f"--{option}", value]) == 2
        assert f"{option}={value}" in capsys.readouterr().err
    assert cli.main(argv) == 2
    assert "nowhere is no file" in capsys.readouterr().err


def test_statistics_with_a_tokenizer_that_is_there(corpus, tmp_path, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "statistics.json"
    options = ["--tokenizer_name", tmp_path / "tokenizer", "--block_size", 16, "--output_file", file]
    shown = run(capsys, "statistics", "--train_file", corpus, *options)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["documents"] == 13 and result["block_size"] == 16 and result["unknown_share"] == 1
    assert shown.startswith(f"13 documents; WordLevel of {len(tokenizer)} tokens\n")
    for name in (*result["lengths"], *result["packing"], "tokens a word", "100.000%", "longer than 16 tokens"):
        assert name in shown
    assert f"{result['packing']['full_sentences']['padding_share']:.2%}" in shown
    assert max(map(len, shown.splitlines())) <= 130


def test_statistics_trains_a_tokenizer_and_leaves_nothing(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    shown = run(capsys, "statistics", "--train_file", corpus, "--vocab_size", 150)
    assert "WordPiece of" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_statistics_refuses_a_file_that_cannot_be_written_before_reading(tmp_path, capsys):
    argv = ["statistics", "--train_file", "nowhere", "--output_file", str(tmp_path / "no" / "file.json")]
    assert cli.main(argv) == 2
    assert "output_file=" in capsys.readouterr().err
    assert cli.main([*argv[:3], "--block_size", "0"]) == 2
    assert "block_size=0 must be positive" in capsys.readouterr().err


def test_statistics_overwrites_no_file_that_it_reads_or_was_not_told_to(corpus, tmp_path, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["statistics", "--train_file", str(corpus), "--tokenizer_name", str(tmp_path / "tokenizer")]
    text, file = next(path for path in [corpus, *corpus.rglob("*")] if path.is_file()), tmp_path / "statistics.json"
    before = text.read_bytes()
    for output in (text, tmp_path / "tokenizer" / "tokenizer.json"):
        for flags in ([], ["--overwrite_output_file", "true"]):
            assert cli.main([*options, "--output_file", str(output), *flags]) == 2
            assert f"output_file='{output}'" in capsys.readouterr().err
    assert text.read_bytes() == before
    file.write_text("mine")
    assert cli.main([*options, "--output_file", str(file)]) == 2
    assert "--overwrite_output_file true" in capsys.readouterr().err and file.read_text() == "mine"
    assert not cli.main([*options, "--output_file", str(file), "--overwrite_output_file", "true"])
    assert json.loads(file.read_text())["unknown_character_share"] == 1
