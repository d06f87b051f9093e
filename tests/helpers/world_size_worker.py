"""Trains every method on two ranks and takes its checkpoints up again, on as many ranks and on more."""

import json
import os

import torch

from helpers.method_matrix import build, log_of, programs, teacher_of

GLOBAL_BATCH = 8
HALF, WHOLE = 2, 4
# Made before the ranks are forked, because only the first rank may write a model.
TEACHERS = [teacher_of(program) for program in programs().values()]


def build_run(program, folder, *, world_size, dropout=False):
    """Return a Trainer of four steps with a checkpoint after two, whose global batch does not depend on the ranks."""
    options = {
        "max_steps": WHOLE,
        "save_strategy": "steps",
        "save_steps": HALF,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
    }
    return build(program, folder, **options, **({"model_options": {"config_overrides": None}} if dropout else {}))


def train(program, folder, name, *, world_size, dropout=False, resume_from=None):
    """Train, and write down the log and the weights as `<name>-<rank>.pt`."""
    trainer = build_run(program, folder / name, world_size=world_size, dropout=dropout)
    trainer.train(resume_from_checkpoint=resume_from)
    result = {"log": log_of(trainer), "weights": trainer.model.state_dict()}
    torch.save(result, folder / f"{name}-{os.environ['RANK']}.pt")


def main(folder):
    world_size = int(os.environ["WORLD_SIZE"])
    on_four = json.loads((folder / "on_four.json").read_text())
    for method, program in programs().items():
        home = folder / method
        if world_size == 2:
            home.mkdir(exist_ok=True)
            train(program, home, "dropout", world_size=2, dropout=True)
            half = str(home / "dropout" / f"checkpoint-{HALF}")
            train(program, home, "dropout-resumed", world_size=2, dropout=True, resume_from=half)
            train(program, home, "plain", world_size=2)
        elif method in on_four:
            half = str(home / "plain" / f"checkpoint-{HALF}")
            train(program, home, f"on-{world_size}", world_size=world_size, resume_from=half)
