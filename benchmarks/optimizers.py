"""Which optimizer trains a model in the fewest steps, and in the least time? Losses of several, each at its best rate of a few.

    python benchmarks/optimizers.py --train_file books/train.txt.xz --validation_file books/valid.txt.xz \
        [--sizes 4x128 6x256] [--seeds 0 1] [--output_dir optimizers]
    python benchmarks/optimizers.py --task t5 --train_file books/train.txt.xz [--output_dir t5-optimizers]
    python benchmarks/optimizers.py --arms muon=1e-3,2e-3 adamw_torch_fused=1e-3 --max_steps 300 --demo_corpus true
    python benchmarks/optimizers.py --output_dir optimizers --table

A size is LAYERSxWIDTH; an arm is the name of an optimizer with the peak learning rates to try. Each rate is run with the first
seed; the one with the lowest held-out loss at the end is run with the other seeds too. All runs are runs of `hf-pretrain`, one
after the other, with equal weights, text, masks and steps; options that this program does not know are passed on to all of them.

- `--task mlm` (the default) trains a ModernBERT on masked tokens. The rate is warmed up, stable, and decays (1-sqrt). Gradients
  are clipped to a norm of 1, but for `stable_adamw`, which clips updates.
- `--task t5` trains a T5 by span corruption. T5's usual initialisation is what makes it hard: the numbers of its word table are
  near 1, those of the other matrices near 0.05. Adafactor scales its updates by the size of each matrix, as T5's own training
  did. All rates are drawn.

Times are those of the steps alone, by the run's own `tokens_per_second`: on a busy machine read them with care. A run that is
there already is not repeated. A run whose loss is not finite ends early; its log is then that of its last checkpoint. The plot
is `optimizers.png` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from results import write_first_documents
from timing import options_parser, print_table

ARMS = {
    "mlm": (
        "adamw_torch_fused=5e-4,1e-3,2e-3",
        "stable_adamw=5e-4,1e-3,2e-3",
        "muon=5e-4,1e-3,2e-3",
        "adamw_rms=5e-3,1e-2,2e-2",
    ),
    "t5": ("adamw_torch_fused=1e-3,1e-2", "adamw_rms=1e-2", "adafactor=1e-2"),
}
SIZES = {"mlm": ("4x128", "6x256"), "t5": ("4x256",)}
OPTIONS: dict[str, dict[str, Any]] = {
    "adafactor": {"optim_args": "scale_parameter=true"},
    "stable_adamw": {"max_grad_norm": 0},
}
# Of a T5: a gated feed-forward layer and no dropout, as in version 1.1; the table of words is the output layer too.
TASKS: dict[str, dict[str, Any]] = {
    "mlm": {
        "model_type": "modernbert",
        "tokenizer_type": "bpe",
        "mlm_probability": 0.3,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": json.dumps({"num_decay_steps": 0.2, "decay_type": "1-sqrt"}),
        "weight_decay": 0.01,
    },
    "t5": {
        "noise": "t5",
        "model_type": "t5",
        "tokenizer_type": "unigram",
        "config_overrides": json.dumps({"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}),
        "weight_decay": 0.0,
    },
}


@dataclass(frozen=True)
class Run:
    """A run to make: a size, an optimizer with its rate, and a seed."""

    size: str
    optim: str
    rate: str
    seed: int

    def folder(self, args: argparse.Namespace) -> Path:
        """Return the folder of the run."""
        return Path(args.output_dir) / f"{args.task}-{self.size}-{self.optim}-{self.rate}-seed{self.seed}"

    def rows(self, args: argparse.Namespace) -> list[dict[str, Any]]:
        """Return the log; of a run that ended early, that of its last checkpoint; of none, no rows."""
        folder = self.folder(args)
        states = sorted(
            folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1])
        )
        whole = folder / "trainer_state.json"
        for path in ([whole] if whole.is_file() else states)[-1:]:
            rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            return rows
        return []

    def command(self, args: argparse.Namespace, others: Sequence[str]) -> list[str]:
        """Return the command of the run."""
        layers, width = map(int, self.size.split("x"))
        every = max(1, args.max_steps // 10)
        options: dict[str, Any] = {
            **TASKS[args.task],
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": max(1, width // (32 if args.task == "mlm" else 64)),
            "intermediate_size": (2 if args.task == "mlm" else 4) * width,
            "vocab_size": args.vocab_size,
            "block_size": args.block_size,
            "max_steps": args.max_steps,
            "warmup_steps": 0.1,
            "per_device_train_batch_size": args.batch_size,
            "per_device_eval_batch_size": 64,
            "seed": self.seed,
            "optim": self.optim,
            "learning_rate": self.rate,
            "logging_steps": max(1, args.max_steps // 100),
            "eval_strategy": "steps",
            "eval_steps": every,
            "save_steps": every,
            "save_total_limit": 1,
            "output_dir": self.folder(args),
            "overwrite_output_dir": "true",
            **OPTIONS.get(self.optim, {}),
        }
        for name in ("train_file", "validation_file"):
            if getattr(args, name) is not None:
                options[name] = getattr(args, name)
        tokenizer = next(iter(sorted(Path(args.output_dir).glob(f"{args.task}-*/tokenizer.json"))), None)
        if tokenizer is not None:
            # The same for all runs, and trained once.
            options["tokenizer_name"] = tokenizer.parent
            del options["tokenizer_type"], options["vocab_size"]
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "hf_pretrain.cli", "denoise" if args.task == "t5" else "mlm", *words, *others]

    def make(self, args: argparse.Namespace, others: Sequence[str]) -> None:
        """Run it, unless it is there or only the table is asked for."""
        if args.table or (self.folder(args) / "trainer_state.json").is_file():
            return
        print(f"== {self.size}, {self.optim} at {self.rate}, seed {self.seed}", flush=True)
        status = subprocess.run(self.command(args, others)).returncode
        # 1: the run could not go on, such as with a loss that is not finite.
        if status not in (0, 1):
            sys.exit(status)


def series(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return a value of the log by step."""
    return {row["step"]: row[name] for row in rows if name in row}


def seconds(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the time of training by step, evaluations left out."""
    tokens, speeds = series(rows, "num_tokens"), series(rows, "tokens_per_second")
    found, before, elapsed = {0: 0.0}, 0.0, 0.0
    for step, speed in speeds.items():
        elapsed += (tokens[step] - before) / speed
        before, found[step] = tokens[step], elapsed
    return found


def final(rows: Sequence[Mapping[str, Any]], max_steps: int) -> float:
    """Return the held-out loss at the end, infinite where the run did not get there."""
    return series(rows, "eval_loss").get(max_steps, float("inf"))


def runs_of(arm: str, size: str, args: argparse.Namespace, others: Sequence[str]) -> Iterator[list[Run]]:
    """Make the runs of an arm; yield those of each rate, all seeds of the best one first."""
    optim, _, rates = arm.partition("=")
    tried = [Run(size, optim, rate, args.seeds[0]) for rate in rates.split(",")]
    for run in tried:
        run.make(args, others)
    tried.sort(key=lambda run: final(run.rows(args), args.max_steps))
    best = [tried[0], *(Run(size, optim, tried[0].rate, seed) for seed in args.seeds[1:])]
    for run in best:
        run.make(args, others)
    yield best
    yield from ([run] for run in tried[1:])


def row_of(runs: Sequence[Run], args: argparse.Namespace, target: float) -> list[object]:
    """Return a line of the table."""
    logs = [rows for run in runs if (rows := run.rows(args))]
    label: list[object] = [runs[0].size, runs[0].optim, runs[0].rate, len(logs)]
    if not logs:
        return [*label, *["-"] * 5]
    ends = [final(rows, args.max_steps) for rows in logs]
    shown = f"{mean(ends):.3f} ± {(max(ends) - min(ends)) / 2:.3f}" if max(ends) < float("inf") else "ended early"
    losses = [loss for rows in logs for loss in list(series(rows, "loss").values())]
    reached = [step for rows in logs if (step := _step_at(rows, target)) is not None]
    needed = f"{mean(reached):.0f}" if len(reached) == len(logs) else "-"
    times = [1000 * seconds(rows)[step] / step for rows in logs if (step := max(seconds(rows)))]
    return [*label, shown, f"{max(losses[len(losses) // 10 :]):.3f}", needed, f"{median(times):.0f}"]


def _step_at(rows: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Return the step at which the held-out loss passes a value, between two evaluations by their line."""
    held_out = series(rows, "eval_loss")
    steps, losses = list(held_out), np.minimum.accumulate(list(held_out.values()) or [np.inf])
    if losses[-1] > target:
        return None
    return float(np.interp(-target, -losses, steps))


def draw(curves: Mapping[str, Mapping[str, Sequence[Run]]], args: argparse.Namespace) -> None:
    """Draw the held-out losses of all arms, over the steps and over the time: mean of the seeds, with the training's thin."""
    figure = Figure(figsize=(11.0, 3.9 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 2, squeeze=False)
    for (size, arms), axes in zip(curves.items(), panels, strict=True):
        for number, (label, runs) in enumerate(arms.items()):
            logs = [rows for run in runs if (rows := run.rows(args))]
            for axis, by_time in zip(axes, (False, True), strict=True):
                for rows in logs:
                    clock, losses = seconds(rows), series(rows, "loss")
                    x = [clock[step] / 60 if by_time else step for step in losses]
                    axis.plot(x, list(losses.values()), color=f"C{number}", linewidth=0.6, alpha=0.4)
                if logs:
                    steps = sorted(set.intersection(*(set(series(rows, "eval_loss")) for rows in logs)))
                    clocks = [seconds(rows) for rows in logs]
                    x = [
                        mean(np.interp(step, list(c), list(c.values())) / 60 for c in clocks) if by_time else step
                        for step in steps
                    ]
                    y = [mean(series(rows, "eval_loss")[step] for rows in logs) for step in steps]
                    axis.plot(x, y, color=f"C{number}", linewidth=1.9, label=label)
        what = "ModernBERT, masked tokens" if args.task == "mlm" else "T5, span corruption"
        for axis, unit in zip(axes, ("step", "minutes of training"), strict=True):
            axis.set(xlabel=unit, ylabel="loss (nats a target)", title=f"{what}, {size}")
            axis.grid(visible=True, which="both", alpha=0.2)
            axis.legend(title="held-out text (thin: training)", fontsize=8)
    figure.savefig(Path(args.output_dir) / "optimizers.png", dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, print the table and draw the plot."""
    parser = options_parser(
        __doc__, max_steps=1000, batch_size=32, block_size=64, vocab_size=8192, held_out_characters=150_000
    )
    parser.add_argument("--task", choices=list(TASKS), default="mlm", help="what is trained")
    parser.add_argument("--train_file", help="text to train on")
    parser.add_argument(
        "--validation_file",
        help="held-out text, of which the first documents of --held_out_characters count; by default some of the documents",
    )
    parser.add_argument("--output_dir", default="optimizers", help="folder of the runs and the plot")
    parser.add_argument("--sizes", nargs="+", help="LAYERSxWIDTH")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="the first one for all rates, the others for the best"
    )
    parser.add_argument("--arms", nargs="+", help="optimizers with their rates: muon=1e-3,2e-3")
    parser.add_argument("--table", action="store_true", help="only read what was run")
    args, others = parser.parse_known_args(argv)
    if args.validation_file is not None and not args.table:
        held_out = Path(args.output_dir, f"held-out-{args.held_out_characters}.txt")
        held_out.parent.mkdir(parents=True, exist_ok=True)
        write_first_documents([args.validation_file], held_out, args.held_out_characters)
        args.validation_file = str(held_out)
    curves: dict[str, dict[str, Sequence[Run]]] = {}
    table = []
    for size in args.sizes or SIZES[args.task]:
        found = [list(runs_of(arm, size, args, others)) for arm in args.arms or ARMS[args.task]]
        # The first arm at its best rate is what the others are measured against.
        target = mean(final(run.rows(args), args.max_steps) for run in found[0][0])
        table += [row_of(runs, args, target) for arm in found for runs in arm]
        drawn = [runs for arm in found for runs in (arm if args.task == "t5" else arm[:1])]
        curves[size] = {f"{runs[0].optim}, rate {runs[0].rate}": runs for runs in drawn}
    headers = [
        "size",
        "optimizer",
        "rate",
        "seeds",
        "held-out loss at the end",
        "highest training loss after the warm-up",
    ]
    print_table(table, [*headers, "steps to the end of the first arm", "ms a step"])
    draw(curves, args)


if __name__ == "__main__":
    main()
