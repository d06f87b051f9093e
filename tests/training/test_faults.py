"""A run is killed, finds the disk full, loses a worker or learns NaN: it says so, and the next start goes on to the same end."""

import errno
import json
import os
import signal

import pytest
import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from helpers.killed_runs import Fault, KilledRuns
from helpers.method_matrix import build, programs
from hf_pretrain.errors import InputError, RunError
from hf_pretrain.training.processes import is_full_disk, last_whole_checkpoint, reported_faults

MLM = programs()["mlm"]
VOLATILE = ("per_second", "runtime", "peak_memory_mib", "flos", "preparation_time", "train_loss")
# Steps 3, 6 and 8 are saved; the second epoch begins in between, and training ends inside it.
OPTIONS = {
    "vocab_size": 200,
    "block_size": 32,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "bf16": "false",
    "disable_tqdm": "true",
    "push_to_hub": "true",
    "hub_strategy": "end",
    "resume_from_checkpoint": "auto",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with KilledRuns(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(f"Sentence number {i} has {i % 7} words. And {i * 3} is another." for i in range(140)))
    return path


@pytest.fixture(scope="module")
def start(runs, corpus):
    """Starts the same command, always for the same folder."""

    def start(folder, *, fault=None, world_size=1, **options):
        given = OPTIONS | options
        if given["push_to_hub"] == "false":
            given = {name: value for name, value in given.items() if name != "hub_strategy"}
        argv = [word for name, value in given.items() for word in (f"--{name}", value)]
        return runs.run("--train_file", corpus, "--output_dir", folder, *argv, fault=fault, world_size=world_size)

    return start


def result(folder):
    """The weights and the log that a run has left."""
    state = json.loads((folder / "trainer_state.json").read_text())
    rows = [{k: v for k, v in row.items() if not any(n in k for n in VOLATILE)} for row in state["log_history"]]
    return (folder / "model.safetensors").read_bytes(), rows, (folder / "recipe.yaml").read_text().splitlines()


def same_result(folder, other):
    mine, its = result(folder), result(other)
    assert mine[1] == its[1]
    assert mine[0] == its[0]
    # The folder is all that the options differ in.
    assert [line for line in mine[2] if "output_dir" not in line] == [
        line for line in its[2] if "output_dir" not in line
    ]


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    ended = start(folder)
    assert ended.statuses == [0], ended.output
    assert not {path.name for path in folder.iterdir()} & {"_lock", "_unfinished"}
    return folder


class TestKilled:
    # Where it is killed, whether that is in the first start or the next, and what the start after it says.
    CHAIN = (
        (Fault(r"open .*_tokenizer_training\.json"), "cut off before its first checkpoint"),
        (Fault(r"half .*/checkpoint-3/model\.safetensors"), "cut off before its first checkpoint"),
        (Fault("step", times=5), "going on from step 3: "),
        (
            Fault(r"half .*/checkpoint-6/optimizer\.pt"),
            "checkpoint-6 is incomplete (killed while saving?): going on from step 3: ",
        ),
        (Fault(r"open .*/checkpoint-6/trainer_state\.json"), "checkpoint-6 is incomplete"),
        (Fault(r"rename .*/checkpoint-6/complete\.json"), "checkpoint-6 is incomplete"),
        # The folder is emptied before it is written again: that is the first time.
        (Fault(r"remove .*scheduler\.pt", times=2), "\ngoing on from step 6: "),
        (Fault("step", times=1), "\ngoing on from step 6: "),
        (Fault(r"half .*/out/model\.safetensors"), "going on from step 8: "),
        (Fault(r"open .*README\.md"), "all 8 steps are done already: exporting"),
        (Fault("push"), "all 8 steps are done already: exporting"),
    )

    def test_killed_at_every_turn_it_ends_as_if_undisturbed(self, start, undisturbed, tmp_path):
        folder = tmp_path / "out"
        said = ""
        for fault, next_says in (*self.CHAIN, (None, None)):
            ended = start(folder, fault=fault)
            assert said in "\n" + ended.output, (fault, ended.output)
            assert ended.statuses == [0 if fault is None else -signal.SIGKILL], (fault, ended.output)
            said = next_says
        same_result(folder, undisturbed)
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]
        assert not {path.name for path in folder.iterdir()} & {"_lock", "_unfinished"}

    def test_a_finished_run_is_not_trained_again(self, start, undisturbed):
        before = result(undisturbed)
        stamp = (undisturbed / "checkpoint-8" / "complete.json").stat().st_mtime_ns
        ended = start(undisturbed)
        assert ended.statuses == [0] and "all 8 steps are done already: exporting" in ended.output
        assert result(undisturbed) == before
        assert (undisturbed / "checkpoint-8" / "complete.json").stat().st_mtime_ns == stamp

    @pytest.mark.slow
    @pytest.mark.parametrize("first", range(6))
    def test_killed_at_any_write_it_ends_as_if_undisturbed(self, start, undisturbed, tmp_path, first):
        """Each start comes some writes further than the one before, or is killed at the same one of a later run."""
        folder, times = tmp_path / "out", 1 + first
        while True:
            ended = start(folder, fault=Fault(rf" {folder}/|remove|half|push|step", times=times))
            if ended.statuses == [0]:
                break
            assert ended.statuses == [-signal.SIGKILL], ended.output
            times += 6
        same_result(folder, undisturbed)

    def test_of_two_processes_one_is_killed(self, start, tmp_path):
        options = {"per_device_train_batch_size": 4, "push_to_hub": "false"}
        assert start(tmp_path / "whole" / "out", world_size=2, **options).statuses == [0, 0]
        folder = tmp_path / "killed" / "out"
        fault = Fault(r"half .*/checkpoint-6/rng_state_1\.pth", rank=1)
        ended = start(folder, world_size=2, fault=fault, **options)
        # The other one is ended by what started them, or says by itself what happened.
        assert ended.statuses in ([], [1]) and "Traceback" not in ended.output, ended.output
        assert last_whole_checkpoint(folder) == folder / "checkpoint-3"
        ended = start(folder, world_size=2, **options)
        assert ended.statuses == [0, 0], ended.output
        assert ended.output.count("checkpoint-6 is incomplete (killed while saving?): going on from step 3: ") == 1
        same_result(folder, tmp_path / "whole" / "out")


class TestFullDisk:
    def test_a_checkpoint_does_not_fit(self, start, undisturbed, tmp_path):
        folder = tmp_path / "out"
        ended = start(folder, fault=Fault("step", times=5, disk_is_full=True))
        assert ended.statuses == [1]
        last = ended.output.strip().splitlines()[-1]
        assert last.startswith(f"error: the disk of {folder} is full") and "free space, and start again" in last
        assert f"--resume_from_checkpoint true (the last whole checkpoint is {folder / 'checkpoint-3'})" in last
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
        assert start(folder).statuses == [0]
        same_result(folder, undisturbed)

    def test_the_export_does_not_fit(self, start, undisturbed, tmp_path):
        folder = tmp_path / "out"
        ended = start(folder, fault=Fault(r"rename .*/checkpoint-8/complete\.json", disk_is_full=True))
        assert ended.statuses == [1]
        last = ended.output.strip().splitlines()[-1]
        assert last.startswith("error: the disk of ") and str(folder / "checkpoint-8") in last
        assert start(folder).statuses == [0]
        same_result(folder, undisturbed)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_one_of_two_processes_finds_it(self, start, tmp_path, rank):
        """Each ends by itself, and neither waits for the other."""
        folder = tmp_path / "out"
        options = {"per_device_train_batch_size": 4, "push_to_hub": "false"}
        fault = Fault("step", times=5, disk_is_full=True, rank=rank)
        ended = start(folder, world_size=2, fault=fault, **options)
        assert ended.statuses == [1, 1], ended.output
        # What is the same is said once, by the first of them.
        assert 1 <= ended.output.count("error: the disk of ") <= 2
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]

    @pytest.mark.parametrize(
        ("method", "number"),
        [("_save_rng_state", errno.ENOSPC), ("save_progress", errno.EDQUOT), ("save_model", errno.EFBIG)],
    )
    def test_wherever_it_is_found_nothing_but_the_incomplete_one_goes(self, tmp_path, monkeypatch, method, number):
        trainer = build(MLM, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
        original = getattr(trainer, method)

        def full(*args, **kwargs):
            if trainer.state.global_step == 2:
                raise OSError(number, os.strerror(number))
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer, method, full)
        with pytest.raises(RunError, match=r"the disk of .* is full.*checkpoint-1\)$") as stop:
            trainer.train()
        assert "\n" not in str(stop.value)
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]

    def test_other_errors_stay_what_they_are(self, tmp_path, monkeypatch):
        trainer = build(MLM, tmp_path, save_strategy="steps", save_steps=1)
        monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: open(tmp_path / "no" / "where"))
        with pytest.raises(FileNotFoundError):
            trainer.train()

    def test_what_the_libraries_raise_for_it(self):
        messages = [
            "Error while serializing: I/O error: No space left on device (os error 28)",
            "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
            "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file write failed",
            "Caught OSError in DataLoader worker process 0.\nOriginal ...\nOSError: [Errno 28] No space left on device",
        ]
        assert all(is_full_disk(RuntimeError(message)) for message in messages)
        assert not is_full_disk(RuntimeError("unexpected end of file (os error 2)"))
        wrapped = RuntimeError("writing failed")
        wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
        assert is_full_disk(wrapped)


class Poison(TrainerCallback):
    """Breaks the weights after a step, as a step that diverges does."""

    def __init__(self, after_step):
        self.after_step = after_step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.after_step:
            with torch.no_grad():
                next(model.parameters())[0] = torch.inf


class TestNotFinite:
    SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 5}

    def test_broken_weights_are_not_saved_and_remove_nothing(self, tmp_path):
        """No row of the log comes before the next checkpoint."""
        trainer = build(MLM, tmp_path, logging_steps=50, **self.SAVING)
        trainer.add_callback(Poison(after_step=3))
        with pytest.raises(
            RunError, match="the weights or the loss are not finite at step 3: lower learning_rate"
        ) as stop:
            trainer.train()
        assert str(stop.value).endswith(f"(the last whole checkpoint is {tmp_path / 'checkpoint-2'})")
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"

    def test_a_loss_that_was_nan_once_is_not_forgotten(self, tmp_path, monkeypatch):
        """A model can look whole again, if a loss of NaN had no gradient."""
        trainer = build(MLM, tmp_path, logging_steps=50, **self.SAVING)
        original = trainer.training_step

        def nan_once(*args, **kwargs):
            return original(*args, **kwargs) * (torch.nan if trainer.state.global_step == 1 else 1)

        monkeypatch.setattr(trainer, "training_step", nan_once)
        with pytest.raises(RunError, match="not finite at step 2"):
            trainer.train()

    def test_a_learning_rate_that_is_absurd_leaves_no_checkpoint(self, tmp_path):
        """A weight of 1e30 is a number, but no weight."""
        trainer = build(MLM, tmp_path, learning_rate=1e30, logging_steps=50, **self.SAVING)
        with pytest.raises(RunError, match=r"auto \(there is no whole checkpoint in "):
            trainer.train()
        assert not list(tmp_path.glob("checkpoint-*"))

    def test_a_program_does_not_export_them(self, tmp_path):
        from hf_pretrain.training.program import run

        trainer = build(MLM, tmp_path, max_steps=2, logging_steps=50)
        trainer.add_callback(Poison(after_step=2))
        with pytest.raises(RunError, match="not finite at step 2"):
            run(trainer, (trainer.args,))
        assert not (tmp_path / "model.safetensors").exists()


class Collator:
    """Does something else in a worker, the second time."""

    def __init__(self, collate, action):
        self.collate, self.action, self.calls = collate, action, 0

    def __call__(self, examples):
        self.calls += 1
        if self.calls == 2 and get_worker_info() is not None:
            self.action()
        return self.collate(examples)


class TestWorkers:
    def train(self, folder, action):
        trainer = build(MLM, folder, dataloader_num_workers=1, max_steps=6, save_strategy="steps", save_steps=1)
        trainer.data_collator = Collator(trainer.data_collator, action)
        trainer.train()

    def test_one_is_killed(self, tmp_path):
        with pytest.raises(
            RunError, match=r"a worker of the data loader died \(.*\), most often because memory"
        ) as stop:
            self.train(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
        message = str(stop.value)
        assert "dataloader_num_workers" in message and "--resume_from_checkpoint" in message and "\n" not in message

    @pytest.mark.parametrize("kind", [InputError, RunError])
    def test_what_one_finds_wrong_comes_through_as_it_is(self, tmp_path, kind):
        def find():
            raise kind("corpus.txt: line 3 is not UTF-8: convert it")

        with pytest.raises(kind) as stop:
            self.train(tmp_path, find)
        assert str(stop.value) == "corpus.txt: line 3 is not UTF-8: convert it"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("DataLoader worker (pid 17) is killed by signal: Killed. ", "died (killed by signal: Killed), "),
            ("DataLoader worker (pid(s) 17, 18) exited unexpectedly", "died (exited unexpectedly), "),
            (
                "DataLoader worker (pid 17) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
                "shared memory. Please try to raise your shared memory limit.",
                "died (killed by signal: Bus error), most often because shared memory ran out",
            ),
        ],
    )
    def test_how_torch_says_it(self, tmp_path, text, expected):
        with pytest.raises(RunError) as stop, reported_faults(tmp_path):
            raise RuntimeError(text)
        assert expected in str(stop.value)
