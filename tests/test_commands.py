"""The commands from their command line to what they print and write."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from helpers.method_matrix import build, programs
from hf_pretrain import cli
from hf_pretrain.commands.export import export_checkpoint, load_composite
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError


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
    assert f"13 documents; WordLevel of {len(tokenizer)} tokens\n" in shown
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
    assert "block_size=0 must be at least 4" in capsys.readouterr().err


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


class TestExport:
    @pytest.fixture(scope="class", params=sorted(programs()))
    @classmethod
    def finished(cls, request, tmp_path_factory):
        """A run with a checkpoint of its last step, and its own export."""
        folder = tmp_path_factory.mktemp("export") / "out"
        trainer = build(programs()[request.param], folder, max_steps=2, save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model()
        return trainer, folder

    def test_it_is_what_the_run_exports(self, finished, capsys):
        trainer, folder = finished
        shown = run(capsys, "export", folder / "checkpoint-2")
        exported = folder / "export-2"
        assert f"{exported}  (opens with stock transformers)" in shown
        names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
        own = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        own = {name for name in own if not name.startswith(("_", "checkpoint-", "export-"))}
        # The arguments of the run are not of the model.
        assert names == own - {"training_args.bin"}
        for name in (name for name in names if name.endswith("model.safetensors")):
            assert (exported / name).read_bytes() == (folder / name).read_bytes(), name
        assert len(AutoTokenizer.from_pretrained(exported)) == len(trainer.processing_class)
        assert not list(folder.glob("*.part"))

    def test_stock_transformers_open_it_with_the_same_outputs(self, finished, tmp_path):
        trainer, folder = finished
        if trainer.objective.name == "recurrent-lm":
            return  # It brings a class of its own.
        export_checkpoint(folder / "checkpoint-2", tmp_path / "new" / "model")
        model = AutoModel.from_pretrained(tmp_path / "new" / "model").eval()
        trained = trainer.model.root.eval().base_model
        ids = torch.tensor([[2, 7, 8, 9, 3]])
        with torch.no_grad():
            assert torch.allclose(model(ids)[0], trained(ids)[0], atol=1e-6)


class TestExportRefuses:
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("refused")
        build(programs()["mlm"], folder, max_steps=1, save_strategy="steps", save_steps=1).train()
        return folder / "checkpoint-1"

    def test_a_place_that_is_in_use(self, checkpoint, tmp_path, capsys):
        (tmp_path / "thesis.tex").write_text("precious")
        assert cli.main(["export", str(checkpoint), "--output_dir", str(tmp_path)]) == 2
        assert "in use" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_what_is_no_checkpoint(self, checkpoint, tmp_path):
        with pytest.raises(InputError, match="is no folder"):
            load_composite(tmp_path / "nowhere")
        with pytest.raises(InputError, match="is no checkpoint of a run"):
            load_composite(tmp_path)
        exported = tmp_path / "exported"
        export_checkpoint(checkpoint, exported)
        with pytest.raises(InputError, match="is no checkpoint of a run"):
            load_composite(exported)

    def test_what_is_damaged_or_incomplete(self, checkpoint, tmp_path):
        copy = tmp_path / "checkpoint-1"
        shutil.copytree(checkpoint, copy)
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-3] ^= 1
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="is damaged .model.safetensors"):
            export_checkpoint(copy, tmp_path / "exported")
        (copy / "model.safetensors").unlink()
        with pytest.raises(InputError, match="is incomplete"):
            export_checkpoint(copy, tmp_path / "exported")
        assert not (tmp_path / "exported").exists()


@contextmanager
def full_disk():
    """Let no file grow over a few bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


class TestFaultsOfTheSystem:
    @pytest.mark.parametrize("place", ["file/out", "/proc/none/out"])
    def test_deduplicate_where_nothing_can_be_written(self, corpus, tmp_path, capsys, place):
        (tmp_path / "file").write_text("precious")
        assert cli.main(["deduplicate", "--train_file", str(corpus), "--output_dir", str(tmp_path / place)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and place.split("/")[-2] in said

    def test_a_full_disk(self, corpus, tmp_path, capsys, tokenizer):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        argv = ["statistics", "--train_file", str(corpus), "--tokenizer_name", str(tmp_path / "tokenizer")]
        with full_disk():
            status = cli.main([*argv, "--block_size", "16", "--output_file", str(tmp_path / "statistics.json")])
        said = capsys.readouterr().err
        assert status == 1 and "Traceback" not in said and said.splitlines()[-1].startswith("error: the disk of ")
