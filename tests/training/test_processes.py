"""What processes have in common: who prepares first, how long one waits, when all stop; and SIGTERM."""

import json
import multiprocessing
import os
import signal
import sys
import time

import pytest
from transformers import TrainerCallback

from helpers.method_matrix import build, programs
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain import cli
from hf_pretrain.errors import RunError, StoppedError, Terminated
from hf_pretrain.files import is_whole
from hf_pretrain.training.processes import StopOnRequest, Stopping, reported_faults, stopping_on_sigterm
from hf_pretrain.training.program import run

MLM = programs()["mlm"]


class AtStep(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def send():
    os.kill(os.getpid(), signal.SIGTERM)


def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


class TestSigterm:
    def test_training_ends_with_a_whole_checkpoint_and_goes_on_from_it(self, tmp_path, capsys):
        trainer = build(MLM, tmp_path, max_steps=6)
        trainer.add_callback(AtStep(3, send))
        before = signal.getsignal(signal.SIGTERM)
        with stopping_on_sigterm() as stopping, pytest.raises(StoppedError) as stopped:
            run(trainer, (trainer.args,), stopping=stopping)
        assert signal.getsignal(signal.SIGTERM) is before
        assert "after step 3: start again with --resume_from_checkpoint true (the last whole" in str(stopped.value)
        assert is_whole(tmp_path / "checkpoint-3") and not (tmp_path / "model.safetensors").exists()
        assert "saving a checkpoint" in capsys.readouterr().err
        again = build(MLM, tmp_path, max_steps=6, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        run(again, (again.args,))
        undisturbed = build(MLM, tmp_path / "undisturbed", max_steps=6)
        run(undisturbed, (undisturbed.args,))
        weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "undisturbed")]
        assert weights[0] == weights[1]

    def test_a_second_one_ends_at_once(self, tmp_path):
        trainer = build(MLM, tmp_path, max_steps=3)
        trainer.add_callback(AtStep(2, lambda: (send(), send())))
        with stopping_on_sigterm() as stopping, pytest.raises(Terminated):
            run(trainer, (trainer.args,), stopping=stopping)
        assert not list(tmp_path.glob("checkpoint-*"))

    def test_before_and_after_training_it_is_an_interrupt(self, capsys):
        def program(argv):
            with stopping_on_sigterm():
                send()
                time.sleep(5)
            raise AssertionError("the signal came first")

        assert cli.run_program(program) == 143
        assert capsys.readouterr().err == "stopped by SIGTERM\n"

    def test_workers_end_with_it(self, tmp_path):
        def program(argv):
            with stopping_on_sigterm():
                worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
                worker.start()
                (tmp_path / "worker").write_text(str(worker.pid))
                send()
                time.sleep(60)

        def end():
            with (tmp_path / "stderr").open("w") as sys.stderr:
                status = cli.run_program(program)
            os._exit(status)

        process = multiprocessing.get_context("fork").Process(target=end)
        process.start()
        process.join(30)
        assert process.exitcode == 143
        assert (tmp_path / "stderr").read_text().splitlines()[-1] == "stopped by SIGTERM"
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "worker").read_text()), 0)

    def test_a_worker_that_missed_the_signal_is_ended_too(self):
        worker = multiprocessing.get_context("fork").Process(target=deaf)
        worker.start()
        time.sleep(0.5)
        with stopping_on_sigterm(), pytest.raises(Terminated):
            send()
            time.sleep(5)
        # Waited for: nothing of it is left, not even a zombie.
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)
        assert worker.exitcode == -signal.SIGKILL

    def test_a_forked_process_takes_it_as_usual(self):
        ready, begun = os.pipe()
        with stopping_on_sigterm():
            process = os.fork()
            if not process:
                os.write(begun, b"!")
                time.sleep(30)
                os._exit(0)
            # A signal is lost that comes while a process is being forked.
            os.read(ready, 1)
            os.kill(process, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM

    def test_one_that_comes_after_the_last_step_is_not_forgotten(self, tmp_path):
        stop = StopOnRequest(Stopping())
        stop.stopping.is_requested = True
        stop.on_train_end(None, None, None)
        assert stop.has_stopped


def test_a_run_that_trains_nothing_exports_nothing(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=3)
    trainer.train = lambda **options: None
    with pytest.raises(RunError, match="no step was trained on the text of 96 examples, so nothing is exported"):
        run(trainer, (trainer.args,))
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "README.md").exists()


class TestDeadProcess:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:41",
                "has ended",
            ),
            ("[2]: [.../gloo/transport/tcp/pair.cc] Read error: Connection reset by peer", "has ended"),
            ("NCCL communicator was aborted on rank 1.", "has ended"),
            (
                "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation to complete",
                "raise --ddp_timeout",
            ),
            (
                "NCCL error: remote process exited or there was a network error, Timeout(ms)=1800000",
                "raise --ddp_timeout",
            ),
        ],
    )
    def test_it_is_told_in_one_line(self, tmp_path, text, expected):
        with pytest.raises(RunError, match=expected) as told, reported_faults(tmp_path):
            raise RuntimeError(text)
        assert "\n" not in str(told.value) and "another process of the run" in str(told.value)

    def test_other_errors_stay_what_they_are(self, tmp_path):
        with pytest.raises(RuntimeError, match="a bug") as told, reported_faults(tmp_path):
            raise RuntimeError("a bug")
        assert not isinstance(told.value, RunError)


def test_two_ranks(tmp_path):
    """One prepares for longer than the others would wait; both stop after the same step; one line is said once."""
    run_on_two_ranks("helpers.processes_worker", tmp_path)
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["order"] < seen[1]["order"]
    # ddp_timeout is kept, on a CPU too.
    assert "timeout" in seen[0] and seen[0]["waited"] < 3.5
    assert seen[0]["stopped"] == seen[1]["stopped"] and seen[0]["stopped"] in (3, 4, 5)
    assert is_whole(tmp_path / "out" / f"checkpoint-{seen[0]['stopped']}")
    assert [len(row["said"]) for row in seen] == [1, 0]
    assert [row["own"] for row in seen] == [[], ["error: of rank 1"]]
