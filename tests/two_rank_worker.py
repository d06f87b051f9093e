"""Runs every method on two ranks and writes what it saw."""

import json
import os

import torch

from method_matrix import build, log_of, programs, teacher_of

# Before the ranks are there, of which only the first could write.
TEACHERS = [teacher_of(program) for program in programs().values()]


def main(folder):
    rank = int(os.environ["RANK"])
    for name, program in programs().items():
        trainer = build(
            program, folder / f"{name}-run", per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2
        )
        batch = next(iter(trainer.get_train_dataloader()))
        torch.save(batch, folder / f"{name}-batch-{rank}.pt")
        # Before training on purpose: accelerate then used to leave the model out of DDP.
        (folder / f"{name}-eval-{rank}.json").write_text(json.dumps(trainer.evaluate()))
        trainer.train()
        torch.save(trainer.recorder.gradients[0], folder / f"{name}-gradients-{rank}.pt")
        torch.save(trainer.model.state_dict(), folder / f"{name}-weights-{rank}.pt")
        (folder / f"{name}-log-{rank}.json").write_text(json.dumps(log_of(trainer)))
