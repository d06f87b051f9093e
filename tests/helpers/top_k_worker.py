"""Trains from a cache of the teacher's answers on two ranks, of which the first asks it."""

import os

import torch

from helpers.distilled import UNCACHED
from helpers.method_matrix import build, teacher_of
from hf_pretrain.objectives.distillation import METHOD as distil

# Before the ranks are there, of which only the first could write.
TEACHER = teacher_of(distil)


def main(folder):
    rank = int(os.environ["RANK"])
    trainer = build(distil, folder / "run", per_device_train_batch_size=4, max_steps=2, cache_top_k=8, **UNCACHED)
    trainer.train()
    torch.save(trainer.recorder.gradients[0], folder / f"gradients-{rank}.pt")
