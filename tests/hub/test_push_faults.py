"""What goes wrong with a push: missing rights are found before training, a failing Hub costs no training and no export."""

import getpass
import io
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.loopback_hub import READ_TOKEN, TOKEN, LoopbackHub, connected, hub_environment
from helpers.method_matrix import build, programs
from hf_pretrain.cli import run_program
from hf_pretrain.errors import InputError, RunError
from hf_pretrain.files import is_whole
from hf_pretrain.hub.pushing import reason
from hf_pretrain.options import write_recipe

MLM, RTD = programs()["mlm"], programs()["rtd"]
REPO = "tester/model"
ALL_TRIES = 6  # of the client, for what it repeats


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub, connected(hub.url):
        yield hub
        assert hub.unknown == []


@pytest.fixture
def run(hub, tmp_path, caplog, monkeypatch):
    """Makes a Trainer that pushes."""
    # transformers keeps its log to itself.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_pretrain"), "propagate", True)

    def make(program=MLM, **options):
        defaults = {"push_to_hub": True, "hub_model_id": REPO, "hub_always_push": True, "hub_strategy": "every_save"}
        defaults |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1e-2}
        return build(program, tmp_path / "run", **defaults | options)

    return make


def told(caplog):
    """The library's own warnings."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_pretrain")]


def pushed_steps(hub, repo=REPO):
    return [int(step) for said in hub.said(repo) for step in re.findall(r"in progress, step (\d+)", said)]


def stored(hub, repo=REPO, **options):
    return {path: file.read_bytes() for path, file in hub.files(repo, **options).items()}


def on_disk(folder):
    """The export: what is pushed of an output folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not re.match("_|checkpoint-", name)}


class TestBeforeTraining:
    @pytest.mark.parametrize(
        ("token", "words"),
        [
            (None, "there is no token: log in with `hf auth login`, or give .* HF_TOKEN or hub_token"),
            ("hf_old", "the Hub does not accept the token: log in"),
            (READ_TOKEN, "may not write to hub_model_id='tester/model' .*write permission"),
        ],
    )
    @pytest.mark.parametrize("exists", [True, False])
    def test_a_token_that_will_not_do(self, hub, run, token, words, exists):
        if exists:
            hub.append(REPO, {})
        with connected(hub.url, token=token), pytest.raises(InputError, match=words):
            run()
        assert len(hub.commits.get(REPO, ())) == exists

    def test_the_token_of_the_options_goes_before_the_one_logged_in_with(self, hub, run):
        with connected(hub.url, token=READ_TOKEN):
            assert run(hub_token=TOKEN).hub_model_id == REPO
        with pytest.raises(InputError, match="does not accept the token"):
            run(hub_token="hf_old")

    @pytest.mark.parametrize("exists", [True, False])
    def test_the_repository_of_somebody_else(self, hub, run, exists):
        """One that can be read passes for one's own when it is asked for, and would be found out at the first commit."""
        if exists:
            hub.append("stranger/model", {})
        with pytest.raises(InputError, match="may not write to hub_model_id='stranger/model'.*a name of your own"):
            run(hub_model_id="stranger/model")

    def test_a_repository_that_was_closed_to_the_user(self, hub, run):
        hub.append(REPO, {})
        hub.read_only.add(REPO)
        with pytest.raises(InputError, match="may not write"):
            run()

    def test_the_repository_of_an_organisation(self, hub, run):
        hub.namespaces.add("team")
        assert run(hub_model_id="team/model").hub_model_id == "team/model"
        assert "team/model" in hub.commits

    def test_the_name_of_the_folder_is_the_default(self, hub, run):
        assert run(hub_model_id=None).hub_model_id == "tester/run"

    def test_a_name_that_none_can_have(self, run):
        with pytest.raises(InputError, match="hub_model_id='my model' .*cannot be a repository's"):
            run(hub_model_id="my model")

    def test_no_network_by_choice(self, run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
            run()

    def test_what_should_be_private_and_is_not(self, hub, run):
        hub.append(REPO, {})
        with pytest.raises(InputError, match="hub_private_repo=True, but tester/model is there and public"):
            run(hub_private_repo=True)
        hub.private.add(REPO)
        run(hub_private_repo=True)

    @pytest.mark.parametrize("route", ["create", "auth_check"])
    def test_a_hub_that_is_down(self, hub, run, route):
        hub.fail_next(route)
        with pytest.raises(
            RunError, match="the Hub cannot be reached .503 Service Unavailable: out of order.: start again"
        ):
            run()
        hub.cut_next(route)
        with pytest.raises(RunError, match="the Hub cannot be reached"):
            run()

    def test_the_program_ends_with_one_line(self, hub, run, capsys):
        with connected(hub.url, token=None):
            assert run_program(lambda argv: run() and 0) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: push_to_hub=True, but there is no token")


class TestWhileTraining:
    @pytest.mark.parametrize(
        ("route", "times", "status", "words"),
        [
            ("commit", 1, 503, "503 Service Unavailable: out of order"),
            ("preupload", ALL_TRIES, 500, "500 Internal Server Error"),
            ("lfs_put", ALL_TRIES, 502, "502 Bad Gateway"),
            ("commit", 1, 403, "403 Forbidden"),
            ("lfs_put", ALL_TRIES, None, "Broken pipe|reset|disconnected"),
            ("commit", 1, None, "Broken pipe|reset|disconnected"),
        ],
    )
    def test_a_failed_push_is_told_and_the_next_one_goes_out(self, hub, run, caplog, route, times, status, words):
        trainer = run()
        if status is None:
            hub.cut_next(route, times=times, after=1000)
        else:
            hub.fail_next(route, times=times, status=status)
        trainer.train()
        assert trainer.state.global_step == 3
        assert pushed_steps(hub) == [2, 3]
        (line,) = told(caplog)
        assert line.startswith("step 1 was not pushed to tester/model (") and "\n" not in line
        assert re.search(words, line)
        folder = trainer.args.output_dir
        assert line.endswith(
            f"push by hand: hf upload tester/model {folder} . --exclude '_*' --exclude 'checkpoint-*' "
            "--exclude 'emissions*.csv' --exclude 'runs/*' --exclude 'wandb/*' --exclude 'mlruns/*' --exclude '*tfevents*' "
            "--exclude '*.part' --exclude predictions.jsonl --exclude 'branches/*' --exclude recipe.yaml "
            "--exclude trainer_state.json"
        )

    def test_what_the_client_repeats_by_itself_is_not_told(self, hub, run, caplog):
        trainer = run(max_steps=1)
        hub.cut_next("lfs_put", after=1000)
        hub.fail_next("preupload", times=2)
        trainer.train()
        assert pushed_steps(hub) == [1] and told(caplog) == []

    def test_a_failure_of_the_last_save_is_told_too(self, hub, run, caplog):
        trainer = run(hub_strategy="checkpoint")
        hub.fail_next("commit", skip=4, times=2)
        trainer.train()
        (line,) = told(caplog)
        assert line.startswith("step 3 was not pushed")
        assert line.endswith(f" && hf upload tester/model {trainer.args.output_dir}/checkpoint-3 last-checkpoint")
        trainer.push_to_hub()
        assert stored(hub)["model.safetensors"] == Path(trainer.args.output_dir, "model.safetensors").read_bytes()

    def test_a_checkpoint_that_is_removed_meanwhile_arrives_whole(self, hub, run, caplog, tmp_path):
        """One is kept; the upload of the first still goes on when the second and third are saved."""
        trainer = run(hub_strategy="checkpoint", hub_always_push=False, save_total_limit=1)
        with hub.held("lfs_put"):
            trainer._finish_current_push, finish = (lambda: None), trainer._finish_current_push
            trainer.train()
            assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
        finish()
        assert told(caplog) == []
        arrived = {path for path in stored(hub) if path.startswith("last-checkpoint/")}
        kept = {f"last-checkpoint/{path.name}" for path in (tmp_path / "run" / "checkpoint-3").iterdir()}
        assert arrived == kept
        assert not (tmp_path / "run" / "_uploading").exists()

    def test_what_is_being_pushed_is_not_written_over_at_the_end(self, hub, run, monkeypatch):
        """The stock Trainer writes the last export first and waits for the upload afterwards."""
        trainer = run()
        order = []
        finish, export = trainer._finish_current_push, trainer.model.export
        monkeypatch.setattr(trainer, "_finish_current_push", lambda: (order.append("waited"), finish()))
        monkeypatch.setattr(
            trainer.model, "export", lambda *args, **kw: (order.append("written"), export(*args, **kw))
        )
        trainer.push_to_hub()
        assert order == ["waited", "written"]


HOST = "workstation-of-anna"


class TestNothingOfTheMachineIsPushed:
    @pytest.mark.parametrize("method", ["rtd", "distil"])
    def test_no_path_no_user_and_no_host(self, hub, run, tmp_path, method):
        """In no file of the repository, nor in the name of one: export, all checkpoints, and what people log beside."""
        best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 2}
        trainer = run(programs()[method], hub_strategy="all_checkpoints", **best)
        folder = Path(trainer.args.output_dir)
        client = tmp_path / "client" / "words.txt"
        trainer.recipe = {"train_file": [str(client)], "output_dir": str(folder), "teacher_name_or_path": str(client)}
        trainer.data_description |= {"files": [str(client)]}
        trainer.train()
        trainer.save_state()
        (folder / "runs" / "now").mkdir(parents=True)
        (folder / "runs" / "now" / f"events.out.tfevents.1.{HOST}.0").write_text(str(folder))
        write_recipe(trainer.recipe, folder / "recipe.yaml", program=f"hf-pretrain {method}")
        trainer.push_to_hub()
        files = stored(hub)
        assert {"README.md", "recipe.yaml", "trainer_state.json", "pretraining/run.json"} <= files.keys()
        assert {
            f"checkpoint-{step}/{name}" for step in (1, 2) for name in os.listdir(folder / "checkpoint-2")
        } <= files.keys()
        # A short name is found in the bytes of any weights.
        machine = {name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 5}
        secret = {tmp_path.name, client.parent.name, HOST} | machine
        found = [
            (word, name)
            for name, content in files.items()
            for word in secret
            if word.encode() in unpacked(content) or word in name
        ]
        assert found == []
        assert yaml.safe_load(files["recipe.yaml"]) == {
            "train_file": ["words.txt"],
            "output_dir": "run",
            "teacher_name_or_path": "words.txt",
        }
        assert str(client) in (folder / "recipe.yaml").read_text(), "the local one starts the run again"
        assert str(folder) in (folder / "checkpoint-2" / "trainer_state.json").read_text()
        assert is_whole(folder / "checkpoint-2") and not (folder / "_uploading").exists()
        copy = tmp_path / "copy" / "checkpoint-2"
        for name, content in files.items():
            if name.startswith("checkpoint-2/"):
                (copy / name.partition("/")[2]).parent.mkdir(parents=True, exist_ok=True)
                (copy / name.partition("/")[2]).write_bytes(content)
        assert is_whole(copy), "a run can go on from the copy"

    def test_an_option_is_as_it_was_after_a_save(self, run):
        trainer = run(max_steps=1, hub_strategy="end")
        before = trainer.args.output_dir
        trainer.train()
        assert trainer.args.output_dir == before and Path(before).is_absolute()


def unpacked(content):
    """The bytes of a file, and of the files in it where it is an archive."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


class TestAtTheEnd:
    def failed(self, trainer):
        with pytest.raises(RunError) as caught:
            trainer.push_to_hub()
        message = str(caught.value)
        folder = trainer.args.output_dir
        assert "\n" not in message
        assert message.startswith(
            f"the model is trained and lies whole in {folder}, but was not pushed to tester/model ("
        )
        return message, message.partition("push it with `")[2].removesuffix("`")

    def test_the_export_is_whole_and_the_command_of_the_message_pushes_it(self, hub, run, tmp_path):
        trainer = run(RTD, hub_strategy="end", hub_revision="trained", max_steps=1)
        trainer.train()
        hub.fail_next("commit")
        message, command = self.failed(trainer)
        assert "(503 Service Unavailable: out of order)" in message
        assert stored(hub, revision="trained") == {}
        program, *options = shlex.split(command)
        assert program == "hf"
        done = subprocess.run(
            [Path(sys.executable).with_name("hf"), *options],
            env=hub_environment(hub.url, tmp_path / "home"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        export = on_disk(tmp_path / "run")
        assert {"README.md", "model.safetensors", "pretraining/generator/model.safetensors"} <= export.keys()
        assert (stored(hub, revision="trained"), stored(hub)) == (export, {})

    def test_a_branch_that_is_named_late_is_made(self, hub, run, tmp_path):
        trainer = run(hub_strategy="end", max_steps=1)
        trainer.train()
        trainer.push_to_hub(revision="late")
        assert (stored(hub, revision="late"), stored(hub)) == (on_disk(tmp_path / "run"), {})

    def test_an_upload_that_breaks_off(self, hub, run):
        trainer = run(hub_strategy="end", max_steps=1)
        hub.cut_next("lfs_put", times=ALL_TRIES, after=1000)
        message, _ = self.failed(trainer)
        assert re.search(r"\(\w+Error: .*(Broken pipe|reset|disconnected)", message)
        assert stored(hub) == {}
        trainer.push_to_hub()
        assert "model.safetensors" in stored(hub)

    def test_the_program_ends_with_one_line(self, hub, run, capsys):
        trainer = run(hub_strategy="end")
        hub.fail_next("commit")
        assert run_program(lambda argv: trainer.push_to_hub() and 0) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: the model is trained and lies whole in ")

    def test_rights_that_are_missing_only_then(self, hub, run, tmp_path):
        """Without the option nothing was asked of the Hub before."""
        trainer = run(push_to_hub=False, max_steps=1)
        with connected(hub.url, token=None), pytest.raises(InputError, match="no token.*; the model lies whole in "):
            trainer.push_to_hub()
        assert {"README.md", "model.safetensors", "tokenizer.json"} <= on_disk(tmp_path / "run").keys()
        trainer.push_to_hub(token=TOKEN, private=True)
        assert stored(hub) == on_disk(tmp_path / "run") and hub.private == {REPO}

    def test_a_push_that_nobody_waits_for_is_asked_later(self, hub, run, caplog):
        trainer = run(hub_strategy="end")
        hub.fail_next("commit")
        job = trainer.push_to_hub(blocking=False)
        assert job.exception() is not None
        trainer._finish_current_push()
        assert len(told(caplog)) == 1


class TestWhatIsThere:
    def test_an_existing_repository_keeps_what_is_not_replaced(self, hub, run):
        """Shards of an earlier model beside a new one's single file, or its generator, would be opened or taken for its own."""
        kept = {"LICENSE": b"mine", "onnx/model.onnx": b"\0", "model-q4.safetensors": b"\0", "plots/mine.png": b"\0"}
        stale = dict.fromkeys(["model.safetensors.index.json", "model-00001-of-00002.safetensors"], b"old")
        stale |= {"pretraining/generator/model.safetensors": b"old", "README.md": b"old", "model.safetensors": b"old"}
        hub.append(REPO, {path: (hub.store(content), False) for path, content in (kept | stale).items()})
        trainer = run(hub_strategy="end")
        trainer.push_to_hub()
        assert stored(hub) == kept | on_disk(Path(trainer.args.output_dir))
        assert len(hub.commits[REPO]) == 2

    def test_the_last_checkpoint_is_one_and_not_a_mixture(self, hub, run, tmp_path):
        hub.append(REPO, {"last-checkpoint/rng_state_7.pth": (hub.store(b"of more ranks"), True)})
        run(hub_strategy="checkpoint", max_steps=1).train()
        arrived = {Path(path).name: content for path, content in stored(hub).items() if "last-checkpoint/" in path}
        assert arrived == {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint-1").iterdir()}

    def test_no_secret_is_pushed(self, hub, run, tmp_path):
        """The arguments, token and all, are in every checkpoint of the stock Trainer."""
        with connected(hub.url, token=None):
            trainer = run(hub_strategy="checkpoint", hub_token=TOKEN, max_steps=1)
            trainer.train()
            trainer.push_to_hub()
        assert "last-checkpoint/training_args.bin" in stored(hub)
        assert not [path for path, content in stored(hub).items() if TOKEN.encode() in content]
        saved = torch.load(tmp_path / "run" / "checkpoint-1" / "training_args.bin", weights_only=False)
        assert saved.hub_token is None and saved.output_dir == "run", "no folder of the machine either"
        assert (trainer.args.hub_token, trainer.args.output_dir) == (TOKEN, str(tmp_path / "run"))

    def test_an_export_is_pushed_whole_or_not_at_all(self, hub, run):
        trainer = run(RTD, max_steps=2)
        hub.cut_next("lfs_put", skip=1, times=ALL_TRIES, after=100)
        trainer.train()
        for commit, tree in list(hub.commits[REPO].items())[1:]:
            assert {"model.safetensors", "pretraining/generator/model.safetensors", "README.md"} <= tree.keys()
            assert load_file(hub.files(REPO, revision=commit)["model.safetensors"])


def test_reasons_are_the_root_of_the_matter():
    try:
        try:
            raise BrokenPipeError(32, "Broken pipe")
        except OSError as error:
            raise RuntimeError("Error while uploading\n'model.safetensors'") from error
    except RuntimeError as error:
        assert reason(error) == "BrokenPipeError: [Errno 32] Broken pipe"
    assert reason(TimeoutError()) == "TimeoutError"
