"""Branches by the tokens read: which marks, which weights, what goes to the Hub, and what a resume and a failing Hub do."""

import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from helpers.loopback_hub import LoopbackHub, connected, hub_environment
from helpers.method_matrix import build, programs
from helpers.two_ranks import run_on_ranks
from hf_pretrain.errors import InputError, RunError
from hf_pretrain.hub.branches import BranchMarks, check_branches
from hf_pretrain.hub.card import snippets
from hf_pretrain.hub.record import read_record
from hf_pretrain.training.output_folder import output_directory

MLM = programs()["mlm"]
REPO = "tester/model"
STEPS = 6


class Patient(TrainerCallback):
    """Lets each upload end before the next step begins, so that what fails is known then."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        for job in self.trainer.branches._jobs.values():
            job.exception()


class Snapshots(TrainerCallback):
    """Keeps the weights of each step, and stops the process hard, as a kill would, where it is asked to."""

    def __init__(self, *, killed_at=None):
        self.weights, self.killed_at = {}, killed_at

    def on_step_end(self, args, state, control, model=None, **kwargs):
        root = getattr(model, "module", model).root
        self.weights[state.global_step] = {name: value.clone() for name, value in root.state_dict().items()}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.killed_at:
            raise KeyboardInterrupt


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub, connected(hub.url):
        yield hub
        assert hub.unknown == []


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_pretrain"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_pretrain")]


def make(folder, program=MLM, *, killed_at=None, **options):
    options = {"max_steps": STEPS, "learning_rate": 1e-2, "hub_branches": "every 100"} | options
    trainer = build(program, folder, **options)
    trainer.snapshots = Snapshots(killed_at=killed_at)
    trainer.add_callback(trainer.snapshots)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is never cut off, without the Hub."""
    trainer = make(tmp_path_factory.mktemp("branches") / "run", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    return trainer


PUSH = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "end"}


def tokens_by_step(trainer):
    return {row["step"]: row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row}


def expected(trainer, branches=None):
    """The branch of each mark and the step that passes it, from the rows of the log."""
    rows, words = tokens_by_step(trainer), (branches or trainer.args.hub_branches).split()
    every = range(int(words[-1]), max(rows.values()) + 1, int(words[-1]))
    marks = every if words[0] == "every" else map(int, words)
    return {f"tokens_{mark}": min(step for step, tokens in rows.items() if tokens >= mark) for mark in marks}


def branches_of(hub):
    return {name for name in hub.branches[REPO] if name != "main"}


def pushes(hub, branch):
    """What the commits of a branch say, without the one that it began with."""
    return [hub.summaries[commit] for commit in reversed(hub.history(REPO, branch)[:-1])]


def same(weights, found):
    # A tied table is stored once.
    assert found and all(torch.equal(weights[name], value) for name, value in found.items())


class TestMarks:
    def test_every(self):
        marks = BranchMarks.parse("every 1M")
        assert marks.between(0, 999_999) == []
        assert marks.between(0, 1_000_000) == [(1_000_000, "1M")]
        assert marks.between(1_000_000, 3_000_001) == [(2_000_000, "2M"), (3_000_000, "3M")]
        assert marks.between(999_999_999, 10**9) == [(10**9, "1000M")], "in one unit, as BabyLM has it"
        assert [label for _, label in BranchMarks.parse("Every 0.5m").between(0, 2 * 10**6)] == [
            "0.5M",
            "1M",
            "1.5M",
            "2M",
        ]

    def test_a_list(self):
        marks = BranchMarks.parse("2M 500K, 1B 1M 1.5m 1234")
        labels = ["1234", "500K", "1M", "1.5M", "2M", "1B"]
        assert [label for _, label in marks.between(0, 10**12)] == labels
        assert marks.between(1234, 10**6) == [(500_000, "500K"), (10**6, "1M")]

    def test_the_scale_of_babylm(self):
        """All names that its evaluation asks for."""
        names = [f"{n}M" for n in (*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100))]
        found = BranchMarks.parse("babylm").between(0, 10**12)
        assert [label for _, label in found] == names and len(names) == 28
        assert all(tokens == int(label[:-1]) * 10**6 for tokens, label in found)

    @pytest.mark.parametrize(
        "text", ["", "every", "every 1M 2M", "1M 1000K", "0", "every 0", "1.5", "-1M", "1T", "often", "babylm 1M"]
    )
    def test_what_is_none(self, text, tmp_path):
        with pytest.raises(InputError, match=f"^hub_branches={re.escape(repr(text))}.*every 1M"):
            make(tmp_path, hub_branches=text)

    @pytest.mark.parametrize("name", ["main", "{}{}", "a b{}", "a/{}", "{0}", ".{}", "{}.lock", "{}."])
    def test_names_that_no_branch_can_have(self, name):
        with pytest.raises(InputError, match=f"hub_branch_name={re.escape(repr(name))} .*chck_"):
            check_branches(None, name)


class TestFolders:
    """Without the Hub."""

    def test_the_weights_are_those_of_the_step_that_passes_the_mark(self, run):
        folder = Path(run.args.output_dir)
        marks = expected(run)
        assert len(set(marks.values())) > 3, "several steps pass one"
        assert {path.name for path in (folder / "branches").iterdir()} == marks.keys()
        for name, step in marks.items():
            same(
                run.snapshots.weights[step],
                AutoModelForMaskedLM.from_pretrained(folder / "branches" / name).state_dict(),
            )
            assert AutoTokenizer.from_pretrained(folder / "branches" / name)("w1")["input_ids"]

    def test_the_card_tells_its_tokens(self, run):
        rows = tokens_by_step(run)
        for name, step in expected(run).items():
            folder = Path(run.args.output_dir, "branches", name)
            text, card = (folder / "README.md").read_text(), read_record(folder)
            assert f"**Branch `{name}`:** the weights after {rows[step]:,} tokens" in text
            assert f"at step {step:,}." in text and f"| Tokens seen | {rows[step]:,} |" in text
            assert (card.compute.tokens, card.compute.steps, card.branch) == (rows[step], step, name)
            assert card.log_history[-1]["step"] == step, "with the row of its own step, and none of later ones"

    def test_no_state_of_training(self, run):
        folder = Path(run.args.output_dir, "branches", "tokens_100")
        names = {path.name for path in folder.rglob("*")}
        assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "complete.json"}

    def test_the_log_is_that_of_a_run_without(self, run, tmp_path):
        plain = make(tmp_path / "run", hub_branches=None, save_strategy="steps", save_steps=2)
        plain.train()
        assert tokens_by_step(plain) == tokens_by_step(run) and not (tmp_path / "run" / "branches").exists()
        same(plain.snapshots.weights[STEPS], run.snapshots.weights[STEPS])

    def test_marks_between_two_rows_of_the_log(self, run, tmp_path):
        """Tokens and weights are those of the step, however seldom the run logs."""
        trainer = make(tmp_path / "run", logging_steps=STEPS, hub_branch_name="chck_{}")
        trainer.train()
        for name, step in expected(run).items():
            folder = tmp_path / "run" / "branches" / name.replace("tokens", "chck")
            assert read_record(folder).compute.tokens == tokens_by_step(run)[step]
            same(run.snapshots.weights[step], load_file(folder / "model.safetensors"))
        assert tokens_by_step(trainer) == {STEPS: tokens_by_step(run)[STEPS]}

    def test_a_run_with_branches_can_be_replaced(self, run, tmp_path):
        folder = tmp_path / "run"
        make(folder, max_steps=2, save_strategy="steps", save_steps=1).train()
        options = {"output_dir": str(folder), "overwrite_output_dir": True, "report_to": []}
        with output_directory(MLM.arguments[2](**options)) as claimed:
            claimed.training_begins()
            assert not (folder / "branches").exists()

    def test_marks_that_a_step_jumps_over_by_the_dozen(self, tmp_path):
        with pytest.raises(InputError, match=r"hub_branches='every 2' has \d+ marks in a step of \d+ tokens"):
            make(tmp_path / "run", hub_branches="every 2").train()

    def test_a_search(self, tmp_path):
        with pytest.raises(InputError, match="hub_branches='every 100': each trial"):
            make(tmp_path / "run").hyperparameter_search()


@pytest.mark.parametrize("method", programs())
def test_the_branch_of_every_method_is_its_export(method, tmp_path):
    trainer = make(tmp_path / "run", programs()[method], max_steps=1, hub_branches="1")
    trainer.train()
    trainer.save_model()

    def files(folder):
        paths = [
            path for path in folder.rglob("*") if path.is_file() and "branches" not in path.relative_to(folder).parts
        ]
        return {path.relative_to(folder): path.read_bytes() for path in paths}

    export, branch = files(tmp_path / "run"), files(tmp_path / "run" / "branches" / "tokens_1")
    assert any(path.suffix == ".safetensors" for path in export)
    assert {path: branch[path] for path in export} == export
    others = {str(path) for path in branch.keys() - export.keys() if path.parts[0] != "plots"}
    assert others == {"README.md", "trainer_state.json", "_branch.json", "pretraining/run.json"}


FEW = {"hub_branches": "every 300"}


class TestOnTheHub:
    def test_stock_transformers_opens_a_revision(self, hub, tmp_path):
        trainer = make(tmp_path / "run", **PUSH, **FEW, hub_branch_name="chck_{}")
        trainer.train()
        trainer.push_to_hub()
        steps = {name.replace("tokens", "chck"): step for name, step in expected(trainer).items()}
        assert branches_of(hub) == steps.keys()
        for name, step in steps.items():
            tokens = tokens_by_step(trainer)[step]
            assert pushes(hub, name) == [f"{tokens:,} tokens, step {step}"]
            weights = trainer.snapshots.weights[step]
            same(weights, load_file(hub.files(REPO, revision=name)["model.safetensors"]))
        options = {"revision": "chck_300", "cache_dir": tmp_path / "cache"}
        opened = AutoModel.from_pretrained(REPO, **options)
        encoder = {f"bert.{name}": value for name, value in opened.state_dict().items() if "pooler" not in name}
        same(trainer.snapshots.weights[steps["chck_300"]], encoder)
        assert AutoTokenizer.from_pretrained(REPO, **options)("w1")["input_ids"]
        assert sorted(path.name for path in (tmp_path / "run" / "branches").iterdir()) == ["_pushed.json"]
        assert not [path for path in hub.files(REPO) if "branches" in path], "they are no part of the export"
        same(trainer.snapshots.weights[STEPS], load_file(hub.files(REPO)["model.safetensors"]))

    def test_the_code_of_its_card_opens_the_branch(self, hub, tmp_path):
        trainer = make(tmp_path / "run", **PUSH | FEW)
        trainer.train()
        trainer.push_to_hub()
        card = hub.files(REPO, revision="tokens_300")["README.md"].read_text()
        named = [line for code in snippets(card) for line in code.splitlines() if f'"{REPO}"' in line]
        assert named and all(f'"{REPO}", revision="tokens_300"' in line for line in named)
        assert "revision=" not in hub.files(REPO)["README.md"].read_text()

    def test_a_branch_holds_its_export_and_nothing_else(self, hub, tmp_path):
        """Whatever lies on the main branch: other weights, a checkpoint with its optimizer."""
        stale = {"onnx/model.onnx": b"\0", "model.safetensors.index.json": b"old"}
        hub.append(REPO, {path: (hub.store(content), False) for path, content in stale.items()})
        save = {"hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 3, "hub_always_push": True}
        trainer = make(tmp_path / "run", **PUSH | FEW | save)
        trainer.train()
        trainer.push_to_hub()
        assert "last-checkpoint/optimizer.pt" in hub.files(REPO)
        whole = set(hub.files(REPO)) - set(stale)
        for name in branches_of(hub):
            found = set(hub.files(REPO, revision=name))
            assert found <= whole | {"trainer_state.json"} and {"README.md", "config.json", "tokenizer.json"} <= found
            assert not [path for path in found if path.startswith(("last-checkpoint", "_", "onnx"))]

    def test_no_path_of_the_machine(self, hub, tmp_path):
        trainer = make(tmp_path / "run", **PUSH | FEW)
        trainer.recipe = {"train_file": [str(tmp_path / "client" / "words.txt")], "output_dir": str(tmp_path / "run")}
        trainer.train()
        trainer.push_to_hub()
        files = hub.files(REPO, revision="tokens_300")
        assert "words.txt" in files["recipe.yaml"].read_text()
        assert not [path for path, file in files.items() if tmp_path.name.encode() in file.read_bytes()]

    def test_training_does_not_wait_for_an_upload(self, hub, tmp_path):
        trainer = make(tmp_path / "run", **PUSH | FEW)
        finish, trainer.branches.finish = trainer.branches.finish, lambda: None
        with hub.held("commit"):
            trainer.train()
            assert trainer.state.global_step == STEPS
            assert all(pushes(hub, name) == [] for name in branches_of(hub))
            assert {path.name for path in (tmp_path / "run" / "branches").iterdir()} == expected(trainer).keys()
        finish()
        assert branches_of(hub) == expected(trainer).keys()

    def test_an_upload_that_ends_while_a_checkpoint_is_saved(self, hub, tmp_path, monkeypatch):
        """The output folder has another name then, since a checkpoint keeps none of the machine."""
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        trainer = make(tmp_path / "run", **PUSH | FEW)
        finish, trainer.branches.finish = trainer.branches.finish, lambda: None
        with trainer.checkpoints.options_to_keep():
            assert trainer.args.output_dir == "run"
        with hub.held("commit"):
            trainer.train()
        with trainer.checkpoints.options_to_keep():
            finish()
        noted = json.loads((tmp_path / "run" / "branches" / "_pushed.json").read_text())
        assert noted.keys() == branches_of(hub) == expected(trainer).keys()
        assert not list((tmp_path / "here").iterdir())

    def test_folders_of_a_run_without_the_hub_can_be_pushed_later(self, hub, tmp_path):
        trainer = make(tmp_path / "run", **FEW)
        trainer.train()
        trainer.args.hub_model_id = REPO
        trainer.push_to_hub()
        assert branches_of(hub) == expected(trainer).keys()
        card = hub.files(REPO, revision="tokens_300")["README.md"].read_text()
        assert f'AutoModel.from_pretrained("{REPO}", revision="tokens_300")' in card


class TestFaults:
    def test_a_failed_upload_is_told_and_tried_again(self, hub, tmp_path, told):
        trainer = make(tmp_path / "run", **PUSH, hub_branches="100 400")
        trainer.add_callback(Patient(trainer))
        hub.fail_next("commit")
        trainer.train()
        (line,) = told()
        assert line.startswith(
            "branch tokens_100 was not pushed to tester/model (503 Service Unavailable: out of order)"
        )
        assert branches_of(hub) == expected(trainer).keys()
        assert all(len(pushes(hub, name)) == 1 for name in branches_of(hub))

    @pytest.mark.parametrize(
        ("route", "times"), [("commits", 6), ("create_branch", 1), ("preupload", 6), ("lfs_put", 6)]
    )
    def test_wherever_it_fails(self, hub, tmp_path, told, route, times):
        trainer = make(tmp_path / "run", **PUSH, max_steps=2)
        hub.fail_next(route, times=times)
        trainer.train()
        trainer.push_to_hub()
        assert len(told()) == 1 and branches_of(hub) == expected(trainer).keys()
        assert all(len(pushes(hub, name)) == 1 for name in branches_of(hub))

    def test_a_failure_at_the_end(self, hub, tmp_path, told):
        """It is an error; until then the branch is empty and no other model; the command of the message pushes it."""
        hub.append(REPO, {})
        hub.append(REPO, {"model.safetensors": (hub.store(b"another model"), True)})
        trainer = make(tmp_path / "run", **PUSH, hub_branches="100", max_steps=2)
        hub.fail_next("commit")
        trainer.train()
        assert hub.files(REPO, revision="tokens_100") == {} and len(told()) == 1
        hub.fail_next("commit", skip=1)
        with pytest.raises(
            RunError, match=r"was pushed to tester/model, but not the branches tokens_100 \(503"
        ) as caught:
            trainer.push_to_hub()
        assert "model.safetensors" in hub.files(REPO) and hub.files(REPO, revision="tokens_100") == {}
        program, *options = shlex.split(str(caught.value).partition("push them with `")[2].removesuffix("`"))
        command, environment = Path(sys.executable).with_name(program), hub_environment(hub.url, tmp_path / "home")
        done = subprocess.run([command, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        same(trainer.snapshots.weights[1], load_file(hub.files(REPO, revision="tokens_100")["model.safetensors"]))
        trainer.push_to_hub()
        assert not (tmp_path / "run" / "branches" / "tokens_100").exists()


class TestResume:
    # Passed by the steps 1, 4, 5 and 6.
    MARKS = "100 400 500 650"
    SAVE = {"save_strategy": "steps", "save_steps": 2, "hub_branches": MARKS}

    def resumed(self, folder, checkpoint, **options):
        trainer = make(folder, **PUSH, **self.SAVE, **options)
        trainer.train(resume_from_checkpoint=str(folder / checkpoint))
        trainer.push_to_hub()
        assert [path.name for path in (folder / "branches").iterdir()] == ["_pushed.json"]

    def check(self, hub, run):
        """All branches are there, once each, with the weights of a run that was never cut off."""
        assert branches_of(hub) == expected(run, self.MARKS).keys()
        for name, step in expected(run, self.MARKS).items():
            assert len(pushes(hub, name)) == 1, name
            same(run.snapshots.weights[step], load_file(hub.files(REPO, revision=name)["model.safetensors"]))

    def test_a_killed_run_goes_on(self, hub, tmp_path, run, told):
        trainer = make(tmp_path / "run", **PUSH, **self.SAVE, killed_at=5)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.branches.finish()
        assert branches_of(hub) == {name for name, step in expected(run, self.MARKS).items() if step <= 5}
        self.resumed(tmp_path / "run", "checkpoint-4")
        self.check(hub, run)
        assert told() == []

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_a_kill_at_the_checkpoint(self, hub, tmp_path, run, moment, monkeypatch):
        """A step passes a mark and is saved: a kill between the two must cost no branch."""
        trainer = make(tmp_path / "run", **PUSH, **self.SAVE)
        name = "save" if moment == "before" else "remove_old"
        original = getattr(trainer.checkpoints, name)

        def killed(*args, **kwargs):
            if trainer.state.global_step == 4:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer.checkpoints, name, killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.branches.finish()
        self.resumed(tmp_path / "run", "checkpoint-2" if moment == "before" else "checkpoint-4")
        self.check(hub, run)

    def test_a_kill_in_the_middle_of_an_upload(self, hub, tmp_path, run):
        trainer = make(tmp_path / "run", **PUSH, **self.SAVE, killed_at=5)
        for _ in range(20):  # each is of one branch
            hub.fail_next("commit", times=100)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.branches.finish()
        hub._faults.clear()
        assert all(pushes(hub, name) == [] for name in branches_of(hub))
        self.resumed(tmp_path / "run", "checkpoint-4")
        self.check(hub, run)

    def test_an_export_that_was_cut_off_is_written_again(self, hub, tmp_path, run):
        trainer = make(tmp_path / "run", **self.SAVE, killed_at=5)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        last = max(
            (name for name, step in expected(run, self.MARKS).items() if step == 5), key=lambda name: int(name[7:])
        )
        folder = tmp_path / "run" / "branches" / last
        (folder / "_branch.json").rename(folder / "_branch.json.part")
        (folder / "model.safetensors").write_bytes(b"half")
        self.resumed(tmp_path / "run", "checkpoint-4")
        self.check(hub, run)

    def test_marks_that_nobody_made(self, tmp_path, told):
        make(tmp_path / "run", **self.SAVE | {"hub_branches": None, "max_steps": 4}).train()
        trainer = make(tmp_path / "run", **self.SAVE)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        passed = {name for name, step in expected(trainer).items() if step > 4}
        assert (
            {path.name for path in (tmp_path / "run" / "branches").iterdir()} == passed == {"tokens_500", "tokens_650"}
        )
        (line,) = told()
        assert (
            line.startswith("hub_branches: tokens_100 to tokens_400 (2 in all) lie before the 439 tokens")
            and "no trace of them" in line
        )

    def test_a_run_from_the_start_makes_them_anew(self, hub, tmp_path):
        for seed in (1, 2):
            trainer = make(tmp_path / "run", **PUSH, seed=seed, hub_branches="100")
            trainer.train()
        same(trainer.snapshots.weights[1], load_file(hub.files(REPO, revision="tokens_100")["model.safetensors"]))
        assert len(pushes(hub, "tokens_100")) == 2


def test_two_ranks_push_once(hub, tmp_path):
    """The tokens of both count; one of them uploads; a resume goes on."""
    options = PUSH | TestResume.SAVE | {"max_steps": 4, "learning_rate": 1e-2, "hub_branches": "every 100"}
    runs = {"first": options | {"max_steps": 2}, "second": options | {"from": "checkpoint-2"}}
    (tmp_path / "url").write_text(hub.url)
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    run_on_ranks("helpers.branches_worker", tmp_path, world_size=2)
    rows = json.loads((tmp_path / "second-0.json").read_text())
    assert rows == json.loads((tmp_path / "second-1.json").read_text()) and len(rows) == 4
    marks = range(100, rows[-1] + 1, 100)
    assert branches_of(hub) == {f"tokens_{mark}" for mark in marks} and marks
    for mark in marks:
        step = next(number for number, tokens in enumerate(rows, start=1) if tokens >= mark)
        assert pushes(hub, f"tokens_{mark}") == [f"{rows[step - 1]:,} tokens, step {step}"]
