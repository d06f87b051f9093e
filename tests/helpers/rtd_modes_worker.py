"""Trains replaced token detection on two ranks, in every mode and where one rank has no target, and writes what came out."""

import os

import torch

from helpers.method_matrix import build
from helpers.replaced_tokens import MODES, PROGRAM, STEPS, data_with_an_empty_rank


def main(folder):
    rank = os.environ["RANK"]
    for name, options in MODES.items():
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = build(PROGRAM, folder / name, **STEPS, **options, **sizes)
        trainer.train()
        torch.save(trainer.model.state_dict(), folder / f"{name}-{rank}.pt")
    trainer = build(PROGRAM, folder / "empty", data_with_an_empty_rank(), per_device_train_batch_size=4)
    trainer.train()
    torch.save(trainer.recorder.gradients[0], folder / f"empty-{rank}.pt")
