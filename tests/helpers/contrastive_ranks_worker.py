"""Trains vectors of texts on each rank, and once in one process, and writes the gradients of all steps."""

import os

import torch

from helpers.method_matrix import build, programs, tiny_data

OPTIONS = {"views": "neighbours", "beside": "mlm", "max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.0}
SIZES = {"plain": (8, 1), "parts": (2, 4)}
PROGRAM, DATA = programs()["contrastive"], tiny_data(train=13)


def train(folder, name, *, ranks):
    """Return the gradients of all steps of two epochs, each of an even number of texts and one."""
    batch, parts = SIZES[name]
    sizes = {"per_device_train_batch_size": batch // ranks, "gradient_accumulation_steps": parts}
    trainer = build(PROGRAM, folder / f"{name}-{ranks}", DATA, **sizes, **OPTIONS)
    trainer.train()
    return trainer.recorder.gradients


def main(folder):
    """Train on this rank."""
    for name in SIZES:
        gradients = train(folder, name, ranks=int(os.environ["WORLD_SIZE"]))
        torch.save(gradients, folder / f"{name}-{os.environ['RANK']}.pt")
