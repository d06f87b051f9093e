"""The output folder of a run: claimed, taken over by a resume or replaced, and locked while it is used."""

import json
import os
import subprocess
import sys

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from hf_pretrain.data.arguments import MultilingualDataArguments
from hf_pretrain.data.prepare import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.files import begin_folder, write_marker
from hf_pretrain.objectives.distillation import StudentArguments
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.output_folder import OutputFolder, note_own_folders, output_directory, paths_in


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "out"


@pytest.fixture
def make(folder):
    return lambda **options: PretrainingArguments(output_dir=str(folder), bf16=False, **options)


@pytest.fixture
def used(folder):
    """A folder with what an earlier run and its user left."""
    for step in (2, 10):
        checkpoint(folder / f"checkpoint-{step}", step=step)
    (folder / "checkpoint-x").mkdir()
    (folder / "notes.txt").write_text("precious")
    return folder


def checkpoint(folder, *, step, whole=True):
    """What a run goes on from; one that is not whole was cut off before its marker."""
    begin_folder(folder)
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    torch.save({}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if whole:
        write_marker(folder, step=step, world_size=1, has_hashes=True)
    return folder


def of_an_earlier_version(folder, *, step):
    """A checkpoint of a version that did not mark them."""
    checkpoint(folder, step=step)
    (folder / "complete.json").unlink()
    return folder


def contents(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_folder_is_made_and_only_locked_while_it_is_used(make, folder):
    with output_directory(make()) as claimed:
        assert claimed.path == folder and folder.is_dir()
        with pytest.raises(Timeout):
            FileLock(folder / "_lock").acquire(blocking=False)
        (folder / "model").write_text("new")
    assert contents(folder) == {"model"}


def test_an_empty_folder_is_taken(make, folder):
    folder.mkdir(parents=True)
    with output_directory(make()):
        pass
    assert contents(folder) == set()


def test_a_used_folder_is_refused_and_left_alone(make, used):
    before = contents(used)
    with pytest.raises(InputError) as refused, output_directory(make()):
        raise AssertionError("the program must not run")
    message = str(refused.value)
    assert str(used) in message and "--overwrite_output_dir" in message and "--resume_from_checkpoint true" in message
    assert contents(used) == before


@pytest.fixture
def earlier(folder):
    """A folder with nothing but what an earlier run left."""
    for step in (2, 10):
        checkpoint(folder / f"checkpoint-{step}", step=step)
    for name in ("tokenizer.json", "_tokenizer_training.json", "model.safetensors", "README.md", "trainer_state.json"):
        (folder / name).write_text("old")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_text("old")
    return folder


class TestOverwriting:
    def test_the_earlier_run_goes_when_training_begins(self, make, earlier):
        neighbour = earlier.parent / "other"
        neighbour.mkdir()
        (neighbour / "corpus.txt").write_text("precious")
        (earlier / "runs").symlink_to(neighbour)
        (earlier / "config.json").symlink_to(neighbour / "corpus.txt")
        before = contents(earlier)
        with output_directory(make(overwrite_output_dir=True)) as claimed:
            # Nothing of it is seen, and all of it is there.
            assert {path.name for path in earlier.iterdir()} == {"_lock", "_unfinished", "_replaced"}
            assert contents(earlier / "_replaced") == before
            (earlier / "tokenizer.json").write_text("new")
            claimed.training_begins()
            assert contents(earlier) == {"_lock", "_unfinished", "tokenizer.json"}
        assert contents(earlier) == {"tokenizer.json"}
        assert (neighbour / "corpus.txt").read_text() == "precious"

    def test_it_is_back_if_training_never_begins(self, make, earlier):
        before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
        (earlier / "_tokenizer_training.json").unlink()
        del before[earlier / "_tokenizer_training.json"]
        with pytest.raises(InputError, match="cannot be read"), output_directory(make(overwrite_output_dir=True)):
            (earlier / "tokenizer.json").write_text("new")
            (earlier / "_tokenizer_training.json").write_text("new")
            raise InputError("the text cannot be read")
        assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == before

    def test_it_is_back_after_a_kill(self, make, earlier):
        before = contents(earlier)
        claimed = OutputFolder(make(overwrite_output_dir=True))
        claimed.claim()
        (earlier / "tokenizer.json").write_text("new")
        claimed.lock.release()
        with pytest.raises(InputError, match="is in use"), output_directory(make()):
            raise AssertionError("the program must not run")
        assert contents(earlier) == before and (earlier / "tokenizer.json").read_text() == "old"

    @pytest.mark.parametrize(
        "name", ["thesis.tex", "src/main.py", ".git/HEAD", "plots/data.csv", "checkpoint-2/notes.txt", "data.json"]
    )
    def test_what_is_not_of_a_run_is_named_and_nothing_goes(self, make, earlier, name):
        (earlier / name).parent.mkdir(exist_ok=True)
        (earlier / name).write_text("precious")
        before = contents(earlier)
        with (
            pytest.raises(InputError, match=f"{name.split('/')[0]}.* is not of a run"),
            output_directory(make(overwrite_output_dir=True)),
        ):
            raise AssertionError("the program must not run")
        assert contents(earlier) == before and (earlier / name).read_text() == "precious"

    def test_the_folders_that_a_run_has_noted_go_with_it(self, make, earlier):
        for name in ("sst2", "seed-0"):
            (earlier / name).mkdir()
            (earlier / name / "model.safetensors").write_text("old")
            note_own_folders(earlier, [name])
        assert json.loads((earlier / "_folders.json").read_text()) == ["sst2", "seed-0"]
        with output_directory(make(overwrite_output_dir=True)) as claimed:
            claimed.training_begins()
        assert contents(earlier) == set()

    @pytest.mark.parametrize(
        "name", ["mine/model.safetensors", "seed-1/README.md", "sst2/notes.txt", "sst2/deep/a.py"]
    )
    def test_beside_noted_folders_the_files_of_others_stay(self, make, earlier, name):
        note_own_folders(earlier, ["sst2", "seed-0"])
        (earlier / name).parent.mkdir(parents=True)
        (earlier / name).write_text("precious")
        before = contents(earlier)
        with (
            pytest.raises(InputError, match=f"{name.split('/')[0]}.* is not of a run"),
            output_directory(make(overwrite_output_dir=True)),
        ):
            raise AssertionError("the program must not run")
        assert contents(earlier) == before

    def test_a_folder_without_a_run_stays(self, make, folder):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("precious")
        with pytest.raises(InputError, match="is no run"), output_directory(make(overwrite_output_dir=True)):
            raise AssertionError("the program must not run")
        assert contents(folder) == {"README.md"}

    @pytest.mark.parametrize("below", ["", "deeper"])
    def test_the_home_folder_and_the_one_that_one_is_in_stay(self, make, earlier, below, monkeypatch):
        (earlier / "checkpoint-2" / below).mkdir(exist_ok=True)
        monkeypatch.chdir(earlier / "checkpoint-2" / below)
        with (
            pytest.raises(InputError, match="the one that you are in"),
            output_directory(make(overwrite_output_dir=True)),
        ):
            raise AssertionError("the program must not run")
        monkeypatch.chdir("/")
        monkeypatch.setenv("HOME", str(earlier))
        with pytest.raises(InputError, match="the home folder"), output_directory(make(overwrite_output_dir=True)):
            raise AssertionError("the program must not run")
        assert (earlier / "model.safetensors").exists()

    @pytest.mark.parametrize("read", ["", "checkpoint-10", "tokenizer.json"])
    def test_what_the_same_command_reads_stays(self, make, earlier, read):
        before = contents(earlier)
        with (
            pytest.raises(InputError, match=f"this run reads {earlier / read}"),
            output_directory(make(overwrite_output_dir=True), inputs=[str(earlier / read)]),
        ):
            raise AssertionError("the program must not run")
        assert contents(earlier) == before

    def test_an_empty_folder_needs_no_marks(self, make, folder):
        with output_directory(make(overwrite_output_dir=True)) as claimed:
            claimed.training_begins()


def test_every_way_to_name_a_file_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.en", "c.de", "recipe.yaml", "vectors.txt", "out"):
        (tmp_path / name).write_text("text")
    data = MultilingualDataArguments(language_file=["en=a.txt,b.txt"], parallel_file=["de-en=c.de,c.en"])
    model = StudentArguments(teacher_name_or_path="vectors.txt", student_layers="first")
    args = PretrainingArguments("out", bf16=False, run_name="out")
    argv = ["--config", "recipe.yaml", "--config=recipe.yaml", "--output_dir", "out"]
    found = set(paths_in((data, model, args), argv))
    assert found == {"a.txt", "b.txt", "c.en", "c.de", "vectors.txt", "recipe.yaml"}
    assert set(paths_in((DataArguments(train_file=["?.txt"]),))) == {"a.txt", "b.txt"}


def test_overwriting_waits_for_no_one(make, used):
    """What another process is writing to is not cleared."""
    with FileLock(used / "_lock"):
        with (
            pytest.raises(InputError, match="in use by another process"),
            output_directory(make(overwrite_output_dir=True)),
        ):
            raise AssertionError("the program must not run")
        assert (used / "notes.txt").read_text() == "precious"
        assert (used / "_lock").exists()


@pytest.mark.parametrize("word", ["true", "True", "auto", "AUTO"])
def test_resume_finds_the_last_checkpoint(make, used, word, capsys):
    before = contents(used)
    args = make(resume_from_checkpoint=word)
    with output_directory(args):
        assert args.resume_from_checkpoint == str(used / "checkpoint-10")
    assert contents(used) == before
    assert capsys.readouterr().out == f"going on from step 10: {used / 'checkpoint-10'}\n"


@pytest.mark.parametrize("word", ["true", "auto"])
def test_resume_passes_over_what_was_cut_off(make, used, word, capsys):
    checkpoint(used / "checkpoint-300", step=300, whole=False)
    (used / "checkpoint-400").mkdir()
    before = contents(used)
    args = make(resume_from_checkpoint=word)
    with output_directory(args):
        assert args.resume_from_checkpoint == str(used / "checkpoint-10")
    assert contents(used) == before
    said = "checkpoint-400, checkpoint-300 are incomplete (killed while saving?): going on from step 10: "
    assert capsys.readouterr().out == f"{said}{used / 'checkpoint-10'}\n"


def test_resume_and_overwriting_exclude_each_other(make, used):
    for asked in ("true", str(used / "checkpoint-10")):
        args = make(resume_from_checkpoint=asked, overwrite_output_dir=True)
        with pytest.raises(InputError, match="leave out one of the two"), output_directory(args):
            raise AssertionError("the program must not run")
    # For the same command at every start.
    args = make(resume_from_checkpoint="auto", overwrite_output_dir=True)
    with output_directory(args):
        assert args.resume_from_checkpoint == str(used / "checkpoint-10")
    assert (used / "notes.txt").read_text() == "precious"


def test_a_damaged_checkpoint_is_passed_over(make, used, capsys):
    flip(used / "checkpoint-10" / "scheduler.pt")
    args = make(resume_from_checkpoint="auto")
    with output_directory(args):
        assert args.resume_from_checkpoint == str(used / "checkpoint-2")
    assert (
        "checkpoint-10 is damaged (scheduler.pt is not as it was saved): going on from step 2"
        in capsys.readouterr().out
    )
    flip(used / "checkpoint-2" / "model.safetensors")
    for asked in ("auto", "true"):
        with (
            pytest.raises(InputError, match="checkpoint-10 is damaged .*checkpoint-2 is damaged"),
            output_directory(make(resume_from_checkpoint=asked)),
        ):
            raise AssertionError("the program must not run")
    with (
        pytest.raises(InputError, match=r"is damaged \(model.safetensors is not as it was saved\)"),
        output_directory(make(resume_from_checkpoint=str(used / "checkpoint-2"))),
    ):
        raise AssertionError("the program must not run")


def flip(path):
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("make_checkpoint", [checkpoint, of_an_earlier_version])
def test_resume_from_a_named_folder(make, used, tmp_path, make_checkpoint, capsys):
    other = make_checkpoint(tmp_path / "elsewhere" / "checkpoint-7", step=7)
    args = make(resume_from_checkpoint=str(other))
    with output_directory(args):
        assert args.resume_from_checkpoint == str(other)
    assert capsys.readouterr().out == f"going on from step 7: {other}\n"


@pytest.mark.parametrize("word", ["true", "auto"])
def test_a_checkpoint_of_an_earlier_version_has_to_be_named(make, folder, word):
    """Nothing tells whether it is whole; starting anew would write over it some day."""
    earlier = of_an_earlier_version(folder / "checkpoint-7", step=7)
    (folder / "_unfinished").touch()
    with (
        pytest.raises(InputError, match=f"of an earlier version.* --resume_from_checkpoint {earlier}$"),
        output_directory(make(resume_from_checkpoint=word)),
    ):
        raise AssertionError("the program must not run")


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_resume_is_refused(make, folder, exists):
    if exists:
        checkpoint(folder / "checkpoint-3", step=3, whole=False)
    with (
        pytest.raises(InputError, match="holds no checkpoint: .*start without it, or with auto") as refused,
        output_directory(make(resume_from_checkpoint="true")),
    ):
        raise AssertionError("the program must not run")
    assert ("checkpoint-3 is incomplete" in str(refused.value)) == exists


class TestAuto:
    """The same command, started again until it comes to its end."""

    def test_it_starts_where_nothing_is(self, make, folder):
        args = make(resume_from_checkpoint="auto")
        with output_directory(args):
            assert args.resume_from_checkpoint is None
        assert contents(folder) == set()

    def test_it_starts_anew_on_what_a_killed_run_has_left(self, make, folder, capsys):
        """Only such a run leaves the note that it has not ended."""
        with output_directory(make()):
            (folder / "tokenizer.json").write_text("new")
            checkpoint(folder / "checkpoint-2", step=2, whole=False)
            left = contents(folder) - {"_lock"}
        (folder / "_unfinished").touch()
        args = make(resume_from_checkpoint="auto")
        with output_directory(args):
            assert args.resume_from_checkpoint is None
            assert contents(folder) - {"_lock"} == left
        assert "cut off before its first checkpoint: starting anew" in capsys.readouterr().out
        assert not (folder / "_unfinished").exists()

    def test_it_starts_anew_after_a_run_that_failed(self, make, folder):
        with pytest.raises(ZeroDivisionError), output_directory(make()):
            (folder / "tokenizer.json").write_text("new")
            (folder / "checkpoint-2").mkdir()
            raise ZeroDivisionError
        with pytest.raises(InputError, match="in use"), output_directory(make()):
            raise AssertionError("the program must not run")
        with output_directory(make(resume_from_checkpoint="auto")):
            pass

    def test_it_does_not_take_what_a_run_has_ended_with(self, make, folder):
        with output_directory(make(save_strategy="no")):
            (folder / "model.safetensors").write_text("precious")
        with (
            pytest.raises(InputError, match="is in use and holds no checkpoint: name another"),
            output_directory(make(resume_from_checkpoint="auto")),
        ):
            raise AssertionError("the program must not run")
        assert (folder / "model.safetensors").read_text() == "precious"


def test_what_is_refused_does_not_stay_locked(make, folder):
    with pytest.raises(InputError, match="is no folder"), output_directory(make(resume_from_checkpoint="nowhere")):
        raise AssertionError("the program must not run")
    assert not (folder / "_lock").exists()
    with output_directory(make()):
        pass


def test_a_try_that_was_refused_leaves_the_folder_free(make, folder):
    with pytest.raises(InputError, match="model_type"), output_directory(make()):
        (folder / "tokenizer.json").write_text("new")
        (folder / "_tokenizer_training.json").write_text("of which text")
        raise InputError("model_type is wrong")
    with output_directory(make()):
        # What took a while is not made again.
        assert (folder / "tokenizer.json").read_text() == "new"
    # A run that has ended is no try.
    with pytest.raises(InputError, match="in use"), output_directory(make()):
        raise AssertionError("the program must not run")


def test_a_folder_that_nothing_was_written_to_is_not_left(make, folder):
    with pytest.raises(InputError), output_directory(make()):
        raise InputError("model_type is wrong")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["file/out", "locked/out", "/proc/none/out"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "locked").mkdir(mode=0o500)
    place = str(tmp_path / name)
    if os.access(tmp_path / "locked", os.W_OK) and "locked" in name:
        place = "/sys/none"  # The superuser may write where others may not.
    with (
        pytest.raises(InputError, match=f"output_dir='{place}' cannot be written: "),
        output_directory(PretrainingArguments(place, bf16=False)),
    ):
        raise AssertionError("the program must not run")


def test_the_lock_is_gone_before_it_is_free(make, folder, monkeypatch):
    """A start in between would hold the lock of a file that is gone."""
    seen = []
    release = FileLock.release

    def released(lock, **options):
        seen.append((folder / "_lock").exists())
        release(lock, **options)

    monkeypatch.setattr(FileLock, "release", released)
    with output_directory(make()):
        pass
    assert seen[0] is False


def test_the_lock_of_a_file_that_is_gone_does_not_count(make, folder, monkeypatch):
    acquire = FileLock.acquire

    def acquired(lock, **options):
        acquire(lock, **options)
        (folder / "_lock").unlink()

    monkeypatch.setattr(FileLock, "acquire", acquired)
    with pytest.raises(InputError, match="in use by another process"), output_directory(make()):
        raise AssertionError("the program must not run")


def test_a_file_is_refused(make, folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("precious")
    with (
        pytest.raises(InputError, match="is a file: name a folder"),
        output_directory(make(overwrite_output_dir=True)),
    ):
        raise AssertionError("the program must not run")
    assert folder.read_text() == "precious"


def test_a_second_run_is_refused_while_the_first_goes_on(make, folder):
    with output_directory(make()):
        with (
            pytest.raises(InputError, match="in use by another process: wait for it or name another"),
            output_directory(make()),
        ):
            raise AssertionError("the program must not run")
        assert (folder / "_lock").exists()
    with output_directory(make()):
        pass


def test_a_second_process_is_refused(make, folder):
    """The lock is one that other processes see."""
    program = (
        "import sys; from filelock import FileLock, Timeout\n"
        "try: FileLock(sys.argv[1]).acquire(blocking=False)\n"
        "except Timeout: sys.exit(7)"
    )
    with output_directory(make()):
        assert subprocess.run([sys.executable, "-c", program, str(folder / "_lock")]).returncode == 7


def test_the_lock_of_a_killed_process_is_no_obstacle(make, folder):
    folder.mkdir(parents=True)
    (folder / "_lock").touch()
    with output_directory(make()):
        pass
    assert contents(folder) == set()


def test_the_lock_goes_when_the_run_fails(make, folder):
    with pytest.raises(ZeroDivisionError), output_directory(make()):
        raise ZeroDivisionError
    assert contents(folder) == set()
