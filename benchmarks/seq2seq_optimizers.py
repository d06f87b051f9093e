"""Which optimizers train a T5? AdamW, AdamW with parameter scale and Adafactor over the same steps, in one plot and one table.

    python benchmarks/seq2seq_optimizers.py --train_file books.txt [--validation_file valid.txt] [--output_dir t5-optimizers]
    python benchmarks/seq2seq_optimizers.py --arm adamw_rms=2e-2 adamw_torch_fused=2e-2 --max_steps 300 --demo_corpus true
    python benchmarks/seq2seq_optimizers.py --output_dir t5-optimizers --table

An arm is the name of an optimizer with its peak learning rate. Each arm is a run of `hf-pretrain denoise --noise t5`, one after
the other, with equal weights, text, spans and steps; options that this program does not know are passed on to all of them. T5's
usual initialisation is what makes it hard: the numbers of its word table are near 1, those of the other matrices near 0.05.
Adafactor scales its updates by the size of each matrix too, as T5's own training did (`scale_parameter=true`).

A run that is there already is not repeated. A run whose loss is not finite ends early; its log is then that of its last
checkpoint. The plot is `optimizers.png` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from timing import options_parser, print_table

ARMS = ("adamw_torch_fused=1e-2", "adamw_torch_fused=1e-3", "adamw_rms=1e-2", "adafactor=1e-2")
OPTIONS = {"adafactor": {"optim_args": "scale_parameter=true"}}
# A gated feed-forward layer and no dropout, as in version 1.1; the table of words is the output layer too, as in every stock T5.
MODEL = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}


def command_of(arm: str, args: argparse.Namespace, others: Sequence[str]) -> list[str]:
    """Return the command of an arm's run."""
    optim, _, rate = arm.partition("=")
    every = max(1, args.max_steps // 10)
    options = {
        "noise": "t5",
        "model_type": "t5",
        "num_hidden_layers": args.num_hidden_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": max(1, args.hidden_size // 64),
        "intermediate_size": 4 * args.hidden_size,
        "config_overrides": json.dumps(MODEL),
        "vocab_size": args.vocab_size,
        "tokenizer_type": "unigram",
        "block_size": args.block_size,
        "max_steps": args.max_steps,
        "warmup_steps": 0.1,
        "per_device_train_batch_size": args.batch_size,
        "weight_decay": 0.0,
        "seed": args.seed,
        "optim": optim,
        "learning_rate": rate,
        "logging_steps": max(1, args.max_steps // 100),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 1,
        "output_dir": folder_of(arm, args),
        "overwrite_output_dir": "true",
    } | OPTIONS.get(optim, {})
    for name in ("train_file", "validation_file"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "hf_pretrain.cli", "denoise", *words, *others]


def folder_of(arm: str, args: argparse.Namespace) -> Path:
    """Return the folder of an arm's run."""
    return Path(args.output_dir) / arm.replace("=", "-")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log of a run; of one that ended early, that of its last checkpoint; of none, no rows."""
    states = sorted(
        folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1])
    )
    whole = folder / "trainer_state.json"
    for path in ([whole] if whole.is_file() else states)[-1:]:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return rows
    return []


def series(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return a value of the log by step."""
    return {row["step"]: row[name] for row in rows if name in row}


def row_of(arm: str, rows: Sequence[Mapping[str, Any]], max_steps: int) -> list[object]:
    """Return the arm's line of the table."""
    train, held_out = series(rows, "loss"), series(rows, "eval_loss")
    if not train:
        return [arm, 0, "-", "-", "-", "-"]
    losses, last = list(train.values()), max(train)
    tail = losses[-max(1, len(losses) // 10) :]
    end = f"{mean(tail):.3f}" if last >= max_steps else "ended early"
    lowest, final = (f"{value:.3f}" if held_out else "-" for value in _lowest_and_last(held_out))
    return [arm, last, end, f"{max(losses[len(losses) // 10 :]):.3f}", lowest, final]


def _lowest_and_last(values: Mapping[int, float]) -> tuple[float, float]:
    return (min(values.values()), values[max(values)]) if values else (float("nan"), float("nan"))


def draw(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the losses of all arms over the steps: in training thin, on held-out text thick."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (arm, rows) in enumerate(logs.items()):
        colour = f"C{number}"
        train, held_out = series(rows, "loss"), series(rows, "eval_loss")
        axes.plot(list(train), list(train.values()), color=colour, linewidth=0.7, alpha=0.6)
        axes.plot(
            list(held_out), list(held_out.values()), color=colour, linewidth=1.8, label=arm.replace("=", ", rate ")
        )
    axes.set(xlabel="step", ylabel="loss (nats a target)", title="T5 from scratch, span corruption")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(title="held-out text (thin: training)")
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the arms that are missing, print the table and draw the plot."""
    parser = options_parser(
        __doc__,
        max_steps=1000,
        batch_size=16,
        block_size=128,
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=4,
        seed=0,
    )
    parser.add_argument("--train_file", help="text to train on")
    parser.add_argument("--validation_file", help="held-out text; by default some of the documents")
    parser.add_argument("--output_dir", default="t5-optimizers", help="folder of the runs and the plot")
    parser.add_argument("--arm", nargs="+", default=list(ARMS), help="optimizers with their rates")
    parser.add_argument("--table", action="store_true", help="only read what was run")
    args, others = parser.parse_known_args(argv)
    for arm in args.arm:
        if not args.table and not (folder_of(arm, args) / "trainer_state.json").is_file():
            print(f"== {arm}", flush=True)
            status = subprocess.run(command_of(arm, args, others)).returncode
            # 1: the run could not go on, such as with a loss that is not finite.
            if status not in (0, 1):
                sys.exit(status)
    logs = {arm: read_log(folder_of(arm, args)) for arm in args.arm}
    headers = [
        "optimizer=rate",
        "steps",
        "training loss, last tenth",
        "its highest after the warm-up",
        "held-out, lowest",
    ]
    print_table([row_of(arm, rows, args.max_steps) for arm, rows in logs.items()], [*headers, "held-out, at the end"])
    draw(logs, Path(args.output_dir) / "optimizers.png")


if __name__ == "__main__":
    main()
