"""What a run shows while it trains, and that it keeps to its minutes."""

import io
import itertools
from functools import partial

import pytest
import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from helpers.method_matrix import build, programs
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.observing.profile import peak_of_tensors
from hf_pretrain.training import progress
from hf_pretrain.training.progress import Progress, TimeBudget, introduce

MLM, RTD = programs()["mlm"], programs()["rtd"]


def shown(trainer, *, width=100):
    """Put a live table on a terminal of the test's own; return what is written there."""
    trainer.pop_callback(Progress)
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=width, color_system=None)
    trainer.progress = Progress(is_live=True, introduce=partial(introduce, trainer), console=console)
    trainer.add_callback(trainer.progress)
    return terminal


def test_without_a_terminal_each_row_of_the_log_is_a_line(tmp_path, capsys):
    trainer = build(RTD, tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert lines[0].startswith("data   ") and f"{len(trainer.train_dataset):,} examples" in lines[0]
    assert "full)" not in lines[0], "nobody knows how full examples of another kind are"
    assert lines[1].startswith("model  ReplacedTokenDetectionForPreTraining") and f"{count / 1e6:.1f} M" in lines[1]
    batch = trainer.get_total_train_batch_size(trainer.args)
    assert lines[2].startswith(f"plan   4 steps of {batch} examples, fp32 on cpu")
    rows = [line for line in lines if line.startswith("step ")]
    training = [line for line in rows if "held out" not in line]
    assert [line.split()[1] for line in training] == ["2/4", "4/4"]
    logged = [row for row in trainer.state.log_history if "rtd_loss" in row]
    for line, row in zip(training, logged, strict=True):
        for name in ("loss", "mlm_loss", "rtd_loss", "disc_gain"):
            assert f"  {name} {progress._number(row[name])}" in line
        assert "tokens/s" in line and "num_tokens" not in line and "memory" not in line
    assert "{" not in "".join(lines), "no raw dictionaries"


def test_held_out_losses_stand_beside_those_of_training(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2)
    terminal = shown(trainer)
    trainer.train()
    last = terminal.getvalue().split("step 4 of 4")[-1]
    evaluated = [row for row in trainer.state.log_history if "eval_mlm_loss" in row][-1]
    logged = [row for row in trainer.state.log_history if "mlm_loss" in row][-1]
    cells = {row.split()[0]: row.split()[1:] for row in last.splitlines() if len(row.split()) == 3}
    assert cells["mlm_loss"] == [progress._number(logged["mlm_loss"]), progress._number(evaluated["eval_mlm_loss"])]
    assert "preparation" not in last and "runtime" not in last


def test_the_table_ends_with_an_error_too(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=4)
    shown(trainer)
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.progress._live is None


def test_an_evaluation_alone_shows_how_far_it_is(tmp_path):
    trainer = build(MLM, tmp_path, per_device_eval_batch_size=2)
    terminal = shown(trainer)
    trainer.evaluate()
    count = len(trainer.get_eval_dataloader())
    assert count > 1 and f"of {count}" in terminal.getvalue()
    assert trainer.progress._live is None


def test_an_evaluation_that_fails_leaves_the_terminal_as_it_was(tmp_path):
    trainer = build(MLM, tmp_path, per_device_eval_batch_size=2)
    shown(trainer)
    trainer._reduce_statistics = trainer.compute_metrics = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert trainer.progress._live is None


def test_a_loss_may_have_step_in_its_name():
    assert not progress._is_hidden("next_step_loss") and progress._is_hidden("eval_steps_per_second")
    assert progress._is_hidden("epoch") and progress._is_hidden("step")


def test_neither_bar_nor_raw_rows_of_transformers_are_left(tmp_path):
    for disable_tqdm in (True, False):
        trainer = build(MLM, tmp_path, disable_tqdm=disable_tqdm)
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert kinds.count(Progress) == 1 and not {PrinterCallback, ProgressCallback} & set(kinds)


class Clock:
    """A clock that a test moves: a step takes 2 seconds, and an evaluation 10."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)

    def slow(self, trainer, name, seconds):
        stock = getattr(trainer, name)

        def slowed(*args, **kwargs):
            self.now += seconds
            return stock(*args, **kwargs)

        setattr(trainer, name, slowed)


@pytest.mark.parametrize(("evaluations", "expected"), [({}, 30), ({"eval_strategy": "steps", "eval_steps": 10}, 17)])
def test_a_run_fits_its_steps_to_its_minutes(evaluations, expected, tmp_path, monkeypatch):
    """One minute: 30 steps of 2 s; or n steps with evaluations of 10 s, a share of n/10 and one at the end."""
    clock = Clock(monkeypatch)
    trainer = build(MLM, tmp_path, max_steps=500, max_minutes=1.0, warmup_steps=4, logging_steps=1, **evaluations)
    clock.slow(trainer, "training_step", 2.0)
    clock.slow(trainer, "evaluation_loop", 0.0)
    if evaluations:
        stock = trainer.prediction_step
        batches = itertools.count()

        def prediction_step(*args, **kwargs):
            # The first batch of an evaluation is over when its clock starts.
            next(batches)
            clock.now += 10.0 / len(trainer.get_eval_dataloader())
            return stock(*args, **kwargs)

        trainer.prediction_step = prediction_step
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    assert abs(trainer.state.global_step - expected) <= (3 if evaluations else 0)
    assert clock.now <= 62
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    # A linear decay to zero over the steps that were done.
    assert rates[-1] == pytest.approx(trainer.args.learning_rate / (trainer.state.max_steps - 4), rel=1e-6)
    assert max(rates) <= trainer.args.learning_rate


def test_evaluations_leave_half_of_the_minutes_to_the_steps(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = build(MLM, tmp_path, max_steps=500, max_minutes=1.0)
    clock.slow(trainer, "training_step", 2.0)
    clock.slow(trainer, "prediction_step", 60.0)
    trainer.evaluate()
    trainer.args.eval_on_start = True
    trainer.train()
    assert abs(trainer.state.global_step - 15) <= 1


def test_max_steps_remain_the_most(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=20, max_minutes=60.0)
    trainer.train()
    assert trainer.state.global_step == 20
    undisturbed = build(MLM, tmp_path / "undisturbed", max_steps=20)
    undisturbed.train()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, undisturbed.model.state_dict()[name]), name


def main(folder):
    """On two ranks with clocks of their own: the second one's is ten times as fast."""
    import os

    rank = int(os.environ["RANK"])
    trainer = build(MLM, folder / "out", max_steps=400, max_minutes=0.05, logging_steps=1, use_cpu=True)
    stock = progress.time.perf_counter
    progress.time.perf_counter = lambda: stock() * (10 if rank else 1)
    trainer.train()
    (folder / f"steps-{rank}").write_text(f"{trainer.state.global_step} {trainer.state.max_steps}")


def test_all_processes_follow_one_clock(tmp_path):
    run_on_two_ranks("test_progress", tmp_path)
    first, second = ((tmp_path / f"steps-{rank}").read_text() for rank in range(2))
    assert first == second and int(first.split()[0]) < 400


def test_what_needs_the_number_of_steps_at_the_start_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"max_minutes=1.0: .* mlm_probability='0%:0.3, 100%:0.15'"):
        build(MLM, tmp_path, max_minutes=1.0, mlm_probability="0%:0.3, 100%:0.15")


def test_a_budget_restarts_its_clock_with_each_training(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = build(MLM, tmp_path, max_steps=500, max_minutes=1.0)
    clock.slow(trainer, "training_step", 2.0)
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == 30
    [budget] = [call for call in trainer.callback_handler.callbacks if isinstance(call, TimeBudget)]
    assert budget._first == 0


def test_the_peak_of_tensors_is_counted_by_hand():
    weight = torch.randn(256, 256, requires_grad=True)
    rows = torch.randn(1024, 256)  # 1 MiB
    mib = 2**20

    def three_at_a_time():
        first = rows + 1
        second = first * 2
        view = second.view(-1)  # no memory of its own
        view.add_(1)
        del first
        third = second - 1
        return third + second

    assert peak_of_tensors(three_at_a_time) == 3 * mib
    # The input of a layer is there already; relu keeps its result for its own backward.
    assert peak_of_tensors(lambda: (rows @ weight).relu().detach()) == 2 * mib
    kept = []
    assert peak_of_tensors(lambda: kept.append(rows + 1)) == mib
    # Backward: the result, what relu keeps, and gradients of both at a time; nothing of before is counted.
    peak = peak_of_tensors(lambda: (rows @ weight).relu().sum().backward())
    assert 2 * mib < peak <= 4 * mib + 4 * 256 * 256
    weight.grad = None
    assert peak_of_tensors(lambda: (rows @ weight).relu().sum().backward()) == peak
