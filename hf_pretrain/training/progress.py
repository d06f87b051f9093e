"""What a run measures and shows: tokens, memory and learning rates; three lines before training, then a table.

The lines are on the data, the model and the plan. On a terminal the table of the losses stays in its place and changes; elsewhere
each row of the log is a plain line. [`TimeBudget`] fits the number of steps to a number of minutes.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, has_length

from hf_pretrain.errors import InputError
from hf_pretrain.files import plain

if TYPE_CHECKING:
    from hf_pretrain.modeling.base import PretrainingModel
    from hf_pretrain.training.trainer import PretrainingTrainer

# Parts of the names of what the log keeps for the card and for plots, but nobody follows while a run trains.
_NOT_SHOWN = ("runtime", "_per_second", "preparation_time", "num_tokens", "peak_memory_mib", "total_flos")
# Shown below the losses.
_RATES = ("grad_norm", "learning_rate")
_FIRST_ESTIMATE = 8


# What is measured


class TokenCount:
    """Counts the tokens of a training over all processes, and how many there are a second.

    Args:
        trainer: The Trainer; its state keeps the number, and travels with the checkpoints.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # On the device, so that no step waits: those of this process since `add_new`.
        self.new = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
        self.begin()

    def begin(self) -> None:
        """Begin the next row of the log: what was counted before is of no row."""
        self.new.zero_()
        self._since_row = 0
        self._clock = time.perf_counter()

    def add_new(self) -> None:
        """Add the new tokens of all processes to the state."""
        tokens = int(self.trainer.accelerator.reduce(self.new, reduction="sum").item())
        self.new.zero_()
        self._since_row += tokens
        self.trainer.state.num_input_tokens_seen += tokens

    def row(self) -> dict[str, float]:
        """Return the numbers for a row of the log, and begin the next."""
        self.add_new()
        tokens, seconds = self._since_row, time.perf_counter() - self._clock
        self.begin()
        return {
            "num_tokens": self.trainer.state.num_input_tokens_seen,
            "tokens_per_second": round(tokens / seconds, 1),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something whose time is not that of the training."""
        trained = time.perf_counter() - self._clock
        yield
        self._clock = time.perf_counter() - trained


def peak_memory_mib() -> float:
    """Return the most memory held so far, in MiB: the accelerator's allocations, or the process's resident set without one."""
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        return round(torch.accelerator.max_memory_allocated() / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class LearningRates(TrainerCallback):
    """Notes the learning rate of each step where it has changed enough to draw; the rows of a log may be too few for that.

    A resumed run has the steps before from its schedule, where that agrees with the rows of the log.
    """

    _CHANGE = 1 / 64  # of the greatest rate
    _MOST = 1024

    def __init__(self) -> None:
        self._noted: dict[int, float] = {}
        self._last: tuple[int, float] | None = None
        self._greatest = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training."""
        self._noted = _scheduled_rates(kwargs.get("lr_scheduler"), state) if state.global_step else {}
        self._last, self._greatest = None, max(self._noted.values(), default=0.0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rate of this step, which the optimizer has just taken."""
        optimizer = kwargs.get("optimizer")
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else None
        if not isinstance(rate, float):  # a tensor on the device is not waited for
            return
        before, self._last = self._last, (state.global_step + 1, rate)
        known = next(reversed(self._noted.values()), None)
        self._greatest = max(self._greatest, rate)
        if known is None or abs(rate - known) > self._CHANGE * self._greatest:
            # With the step before, a line that was level stays so.
            self._noted |= dict(filter(None, (before, self._last)))
        if len(self._noted) > self._MOST:
            self._noted = dict(list(self._noted.items())[::2])

    @property
    def noted(self) -> tuple[tuple[float, float], ...]:
        """(step, rate) in order, the last step included."""
        return tuple(sorted((self._noted | dict([self._last] if self._last else [])).items()))


def _scheduled_rates(scheduler: Any, state: TrainerState) -> dict[int, float]:
    """Return the rates of the steps that are done, by the schedule; {} where the log has others, or there is no formula."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        return {}

    def rate(step: int) -> float:
        return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step - 1))

    logged = {row["step"]: row["learning_rate"] for row in state.log_history if "learning_rate" in row}
    if any(not math.isclose(value, rate(step), rel_tol=1e-6, abs_tol=1e-12) for step, value in logged.items()):
        return {}
    done = state.global_step
    return {step: rate(step) for step in sorted({1 + (done - 1) * i // 256 for i in range(257)})}


# Before training


def data_line(description: Mapping[str, Any], train_dataset: Any) -> str:
    """Return one line on the data: documents, tokens, the share of unknown ones, examples and how full they are."""
    parts = [str(description["source"])] if "source" in description else []
    parts += [f"{description[name]:,} {name}" for name in ("documents", "tokens") if name in description]
    if "unknown_share" in description:
        parts.append(f"{description['unknown_share']:.2%} unknown")
    if isinstance(train_dataset, Sized):
        fill = f" ({description['filled_share']:.1%} full)" if "filled_share" in description else ""
        parts.append(f"{len(train_dataset):,} examples{fill}")
    return ", ".join(parts) or type(train_dataset).__name__


def model_line(model: PretrainingModel) -> str:
    """Return one line on the model: its class and the parameters, in all and in what is exported."""
    count = sum(parameter.numel() for parameter in model.parameters())
    root = model.root
    exported = sum(parameter.numel() for parameter in root.parameters())
    others = "" if exported == count else f", {_millions(exported)} of them in the exported {type(root).__name__}"
    if model.adapters.parts:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        kinds = ", ".join(dict.fromkeys(str(plain(config.peft_type)) for config in model.adapters.parts.values()))
        others += f"; {_millions(trained)} of them are trained ({kinds})"
    return f"{type(model).__name__}, {_millions(count)} parameters{others}"


def plan_line(trainer: PretrainingTrainer, max_steps: int) -> str:
    """Return one line on the plan: steps, examples a step, precision, devices, attention, and the minutes if they are limited."""
    args = trainer.args
    batch = trainer.get_total_train_batch_size(args)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    devices = f"{args.world_size} x {args.device.type}" if args.world_size > 1 else args.device.type
    limit = "" if args.max_minutes is None else f", at most {args.max_minutes:g} minutes"
    measured, known = trainer.measured_examples()
    part = f", evaluated on {measured:,} of {known:,} held-out examples" if measured < known else ""
    attention = f", attention {trainer.runner.fast_attention({})}" if trainer.attention else ""
    return f"{max_steps:,} steps of {batch:,} examples, {precision} on {devices}{attention}{limit}{part}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


# While it trains


class Progress(TrainerCallback):
    """Shows the last value of each loss and metric, on training and held-out text, with speed and the time left.

    Args:
        is_live: Whether the table stays in its place, which takes a terminal; else each row of the log is a line.
        introduce: Gives the lines before the first step, from the number of steps.
        console: Where to write; standard output by default.
    """

    def __init__(
        self,
        *,
        is_live: bool,
        introduce: Callable[[int], Sequence[str]] = lambda steps: (),
        console: Console | None = None,
    ) -> None:
        self.introduce = introduce
        self.console = Console(highlight=False) if console is None else console
        self.is_live = is_live
        self._live: Live | None = None
        self._forget()

    def _forget(self) -> None:
        self.training: dict[str, float] = {}
        self.held_out: dict[str, float] = {}
        self._speed: float | None = None
        # Batches of the evaluation that runs: those that are done, and how many there are.
        self._evaluated, self._to_evaluate = 0, ""
        self._steps: deque[tuple[int, float]] = deque(maxlen=100)
        self._max_steps = self._step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print what is trained on what, and show the empty table."""
        self._forget()
        self._max_steps, self._step = state.max_steps, state.global_step
        if not state.is_world_process_zero:
            return
        for line in self.introduce(state.max_steps):
            self.say(line)
        if self.is_live:
            self._show(self._table)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when a step ended, for the time left."""
        self._step, self._max_steps = state.global_step, state.max_steps
        self._steps.append((state.global_step, time.perf_counter()))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count the batches of an evaluation; outside of a training, show their number until the evaluation ends."""
        self._evaluated += 1
        self._to_evaluate = f" of {len(eval_dataloader):,}" if has_length(eval_dataloader) else ""
        if self.is_live and self._live is None and state.is_world_process_zero:
            self._show(lambda: Text(self._status()), transient=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget how long an evaluation took: the time left is that of steps."""
        self.end_evaluation()

    def end_evaluation(self) -> None:
        """Show no evaluation any more, also after an error."""
        if self._live is not None and self._live.transient:
            self.close()
        self._evaluated = 0
        self._steps.clear()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take over a row of the log."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        rows = {name: value for name, value in logs.items() if isinstance(value, int | float) and not _is_hidden(name)}
        held_out = {name.removeprefix("eval_"): value for name, value in rows.items() if name.startswith("eval_")}
        self._speed = logs.get("tokens_per_second", self._speed)
        (self.held_out if held_out else self.training).update(held_out or rows)
        if self._live is None:
            self.say(self._line(held_out or rows, state, is_held_out=bool(held_out)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last table where it is."""
        self.close()

    def _show(self, render: Callable[[], RenderableType], *, transient: bool = False) -> None:
        self._live = Live(get_renderable=render, console=self.console, refresh_per_second=4, transient=transient)
        self._live.start()

    def close(self) -> None:
        """End the live table, also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining steps will take at the pace of the last hundred; None before there is one."""
        if len(self._steps) < 3:
            return None
        (first, begun), (last, ended) = self._steps[0], self._steps[-1]
        return (self._max_steps - last) * (ended - begun) / (last - first)

    def _status(self) -> str:
        if self._evaluated:
            return f"evaluating, batch {self._evaluated:,}{self._to_evaluate}"
        parts = [] if self._speed is None else [f"{self._speed:,.0f} tokens/s"]
        parts += [] if not self.seconds_left else [f"{_clock(self.seconds_left)} left"]
        return ", ".join(parts)

    def _line(self, values: Mapping[str, float], state: TrainerState, *, is_held_out: bool) -> str:
        where = f"step {state.global_step:,}/{state.max_steps:,}"
        numbers = "  ".join(f"{name} {_number(value)}" for name, value in values.items())
        status = "" if is_held_out or not self._status() else f"  ({self._status()})"
        return f"{where}  {'held out: ' if is_held_out else ''}{numbers}{status}"

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 2), show_edge=False)
        table.add_column(f"step {self._step:,} of {self._max_steps:,}")
        table.add_column("training", justify="right")
        table.add_column("held out", justify="right")
        names = dict.fromkeys((*self.training, *self.held_out))
        for name in sorted(names, key=_RATES.__contains__):
            table.add_row(name, *(_number(part.get(name)) for part in (self.training, self.held_out)))
        status = Table.grid(padding=(0, 2))
        status.add_row(
            ProgressBar(total=max(1, self._max_steps), completed=self._step, width=40), Text(self._status())
        )
        return Group(table, status)

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)


def _is_hidden(name: str) -> bool:
    return name.removeprefix("eval_") in ("epoch", "step") or any(part in name for part in _NOT_SHOWN)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:,.4f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show_progress(trainer: Trainer, introduce: Callable[[int], Sequence[str]] = lambda steps: ()) -> Progress:
    """Replace the progress bar and the raw rows of transformers by the table.

    Args:
        trainer: Any Trainer.
        introduce: See [`Progress`].
    """
    trainer.pop_callback(PrinterCallback)
    is_live = trainer.pop_callback(ProgressCallback) is not None
    progress = Progress(is_live=is_live and sys.stdout.isatty(), introduce=introduce)
    trainer.add_callback(progress)
    return progress


def introduce(trainer: PretrainingTrainer, steps: int) -> list[str]:
    """Return the lines before the first of so many steps of pre-training: text, model and plan."""
    return [
        f"data   {data_line(trainer.data_description, trainer.train_dataset)}",
        f"model  {model_line(trainer.model)}",
        f"plan   {plan_line(trainer, steps)}",
    ]


# A budget of time


class TimeBudget(TrainerCallback):
    """Fits the number of steps to `max_minutes`, so that the schedule of the learning rate comes to its end.

    It measures how long steps and evaluations take, and shortens the run to the steps that there is time for: first after a few
    steps, then whenever it has done twice as many. `max_steps` remains the most. All processes follow the first one's clock.

    Args:
        trainer: The Trainer whose `max_minutes` it keeps to.

    Raises:
        InputError: If something else was already fitted to the number of steps.
    """

    def __init__(self, trainer: PretrainingTrainer) -> None:
        if trainer.is_deepspeed_enabled:
            raise InputError("max_minutes cannot change the schedule of DeepSpeed: give max_steps instead")
        self.trainer = trainer
        self._forget()

    def _forget(self) -> None:
        self._begun = time.perf_counter()
        # Ends of the last step and begin of the evaluation that runs; the first step, which may compile, is not timed.
        self._last_step: float | None = None
        self._evaluation_begun: float | None = None
        self._seconds, self._num_timed, self._evaluation_seconds = 0.0, 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._forget()
        self._most, self._first = state.max_steps, state.global_step
        self._next_estimate = state.global_step + _FIRST_ESTIMATE

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when an evaluation began."""
        if self._evaluation_begun is None:
            self._evaluation_begun = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how long an evaluation took; it is no part of a step."""
        now = time.perf_counter()
        self._evaluation_seconds = now - (now if self._evaluation_begun is None else self._evaluation_begun)
        self._evaluation_begun = None
        self._last_step = None if self._last_step is None else now

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Time the step, and now and then fit the number of steps to the time that is left."""
        now = time.perf_counter()
        if self._last_step is not None:
            self._seconds += now - self._last_step
            self._num_timed += 1
        self._last_step = now
        if state.global_step == self._next_estimate and state.global_step < state.max_steps:
            # All processes take the number of the first one.
            total = broadcast_object_list([self._fitting(args, state.global_step, now)])[0]
            self._next_estimate += (state.global_step - self._first) // 2
            if total != state.max_steps:
                state.max_steps = total
                self._fit_schedule(total, state.global_step)

    def _fitting(self, args: TrainingArguments, step: int, now: float) -> int:
        """Return the step at which the run is to end: evaluations on the way, and one at the end, take their time too.

        Where they would take most of it, steps have half of the minutes all the same.
        """
        minutes: float = args.max_minutes
        left = minutes * 60 - (now - self._begun) - self._evaluation_seconds
        left = max(left, minutes * 30 - self._seconds)
        seconds = self._seconds / self._num_timed
        if args.eval_strategy == IntervalStrategy.STEPS:
            seconds += self._evaluation_seconds / args.eval_steps
        return min(self._most, step + max(1, int(left / seconds)))

    def _fit_schedule(self, total: int, step: int) -> None:
        """Give the learning rates the schedule of a run of `total` steps, of which `step` are done."""
        trainer: Any = self.trainer
        optimizer, trainer.lr_scheduler = trainer.lr_scheduler.optimizer, None
        schedule = trainer.create_scheduler(total, optimizer=optimizer)
        schedule.last_epoch = step - 1
        schedule.step()
