"""Trains a run with phases on two ranks: once to its end, and once cut off behind a border and resumed."""

import json
import os
from pathlib import Path

import torch

from helpers.phased_runs import PhasedRun, Stopped, Text, state_of

PHASES = [
    {"name": "one", "steps": 3, "mlm_probability": 0.4, "rate": "0%:0, 100%:1"},
    {"name": "two", "steps": 3, "mlm_probability": 0.2, "rate": 1, "per_device_train_batch_size": 7},
]


def main(folder):
    """Do as `order.json` says; the process group ends with each run."""
    folder = Path(folder)
    order = json.loads((folder / "order.json").read_text())
    text = Text.__new__(Text)
    text.tokenizer, text.first, text.second = folder / "tokenizer", folder / "first.txt", folder / "second.txt"
    rank = os.environ["RANK"]
    try:
        # The ranks write one recipe each: they must not read the other's half.
        run = PhasedRun(
            text, folder / order["name"], PHASES, *order["argv"], stop_at=order["stop_at"], recipe=f"{rank}.yaml"
        )
    except Stopped:
        return
    torch.save({"state": state_of(run.trainer), "log": run.log}, folder / f"{order['result']}-{rank}.pt")
