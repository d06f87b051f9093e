"""What every program does around its training: the output folder is claimed, the run leaves its recipe and export."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from hf_pretrain.data.prepare import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.checkpoints import begin_folder, write_marker
from hf_pretrain.training.output_folder import output_directory
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import run
from method_matrix import TINY_TRAINING, data_for, known_options, programs, tiny_data, tiny_model_options

PROGRAMS = programs()


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
        write_marker(folder, step=step, world_size=1)
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
        assert claimed == folder and folder.is_dir()
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


def test_overwriting_clears_the_folder_and_nothing_else(make, used):
    neighbour = used.parent / "other"
    neighbour.mkdir()
    (neighbour / "corpus.txt").write_text("precious")
    (used / "link").symlink_to(neighbour)
    (used / "file_link").symlink_to(neighbour / "corpus.txt")
    (used / ".hidden").write_text("old")
    with output_directory(make(overwrite_output_dir=True)):
        assert contents(used) == {"_lock", "_unfinished"}
    assert contents(used) == set()
    assert (neighbour / "corpus.txt").read_text() == "precious"


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


def test_resume_wins_over_overwriting(make, used):
    args = make(resume_from_checkpoint="true", overwrite_output_dir=True)
    with output_directory(args):
        assert (used / "checkpoint-10" / "model.safetensors").exists()


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


def ran(program, folder, *argv):
    """Run a program's parts, all but the reading of text, and return its Trainer and options."""
    tiny = []
    for name, value in tiny_options(program).items():
        tiny += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    argv = [*tiny, "--output_dir", str(folder), "--bf16", "false", *argv]
    argv = ["--logging_steps", "1", "--max_steps", "2", "--warmup_steps", "0", "--save_strategy", "no", *argv]
    options = parse_arguments(program.ARGUMENTS, argv, prog="hf-pretrain", description="")
    with output_directory(options[-1]):
        trainer = program.build_trainer(data_for(program), options[1], options[-1])
        run(trainer, options)
    return trainer, options


def tiny_options(program):
    """What makes a program's model tiny, and its training fit the tiny text."""
    return tiny_model_options(program) | known_options(program.ARGUMENTS[-1], TINY_TRAINING)


class TestRun:
    @pytest.fixture(scope="class", params=sorted(PROGRAMS))
    @classmethod
    def finished(cls, request, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run") / "out"
        extra = ["--learning_rate", "3e-4", "--train_file", str(folder.parent / "räume.txt"), "--seed", "7"]
        return *ran(PROGRAMS[request.param], folder, *extra), folder

    def test_it_leaves_everything(self, finished):
        trainer, _, folder = finished
        expected = {
            "README.md",
            "recipe.yaml",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "trainer_state.json",
        }
        assert expected | {"plots/loss.png"} <= contents(folder)
        parts = [part for part in trainer.model.export_parts if part]
        assert {f"{part}/model.safetensors" for part in parts} <= contents(folder)
        assert not (folder / "_lock").exists()
        # Trained, then evaluated, then exported.
        assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row][-1] == 2
        root = getattr(trainer.model, trainer.model.export_parts[""])
        loaded = type(root).from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in root.state_dict().items())

    def test_the_recipe_gives_the_same_options_again(self, finished):
        trainer, options, folder = finished
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        assert text.startswith(f"# hf-pretrain {trainer.objective.name}\n")
        types = [type(option) for option in options]
        again = parse_arguments(types, ["--config", str(folder / "recipe.yaml")], prog="hf-pretrain", description="")
        for first, second in zip(options, again, strict=True):
            for option in fields(first):
                assert plain(getattr(first, option.name)) == plain(getattr(second, option.name)), option.name

    def test_the_recipe_holds_what_was_set_and_nothing_of_the_machine(self, finished):
        trainer, _, folder = finished
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        given = {*tiny_options(PROGRAMS[trainer.objective.name]), "output_dir", "bf16"}
        given |= {"logging_steps", "max_steps", "warmup_steps"}
        given |= {"save_strategy", "learning_rate", "train_file", "seed"}
        # What a preset of losses stands for is written out, and a batch that was lowered to fit the lanes held out.
        given |= {name for name in recipe if name.endswith("_weight")} | {"temperature", "mlm_probability"}
        given |= {"per_device_eval_batch_size"} if hasattr(trainer.args, "eval_lanes") else set()
        assert recipe["learning_rate"] == 3e-4 and recipe["max_steps"] == 2
        # Else a recipe written on a machine without a GPU would never use one again.
        assert recipe.keys() <= given

    def test_the_card_tells_nothing_of_the_machine(self, finished):
        _, _, folder = finished
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "learning_rate: 0.0003" in card and "räume.txt" in card
        assert str(folder.parent) not in card


def plain(value):
    return value.to_dict() if hasattr(value, "to_dict") else value


def test_known_tokenizer_of_the_checkpoint_is_used(tmp_path, monkeypatch):
    """On resume the tokenizer of the checkpoint wins, then the one named, then that of the model continued from."""
    from hf_pretrain.training import program as program_module

    seen = []
    monkeypatch.setattr(program_module, "prepare_data", lambda data_args, **options: seen.append(options))
    tokenizer = tiny_data().tokenizer
    for name in ("checkpoint", "model", "named"):
        tokenizer.add_tokens([f"only-{name}"])
        tokenizer.save_pretrained(tmp_path / name)
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "model"))
    for data_args, resume in (
        (DataArguments(), str(tmp_path / "checkpoint")),
        (DataArguments(tokenizer_name=str(tmp_path / "named")), str(tmp_path / "checkpoint")),
        (DataArguments(), None),
        (DataArguments(tokenizer_name=str(tmp_path / "named")), None),
    ):
        args = PretrainingArguments(
            output_dir=str(tmp_path / "out"), bf16=False, resume_from_checkpoint=resume, seed=5
        )
        program_module.load_data(data_args, model_args, args)
    found = [options["tokenizer"] for options in seen]
    sizes = [len(tokenizer) for tokenizer in found]
    base = len(tiny_data().tokenizer)
    assert sizes == [base + 1, base + 1, base + 2, base + 3]
    assert all(options["seed"] == 5 and options["output_dir"] == str(tmp_path / "out") for options in seen)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "maskless")
    with pytest.raises(InputError, match="no mask_token"):
        options = PretrainingArguments(str(tmp_path / "out"), bf16=False)
        program_module.load_data(DataArguments(tokenizer_name=str(tmp_path / "maskless")), model_args, options)
    assert len(seen) == 4
    nowhere = ModelArguments(model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot be loaded with AutoTokenizer"):
        program_module.load_data(DataArguments(), nowhere, PretrainingArguments(str(tmp_path / "out"), bf16=False))
