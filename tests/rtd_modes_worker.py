"""Trains replaced token detection in every mode on two ranks and writes the weights; started by torch.distributed.run."""

import os
import sys
from pathlib import Path

import torch

from method_matrix import build
from replaced_tokens import MODES, PROGRAM, STEPS


def main(folder):
    torch.set_num_threads(1)
    for name, options in MODES.items():
        trainer = build(PROGRAM, folder / name, **STEPS, **options, per_device_train_batch_size=4)
        trainer.train()
        torch.save(trainer.model.state_dict(), folder / f"{name}-{os.environ['RANK']}.pt")
    (folder / f"done-{os.environ['RANK']}").touch()
    # The interpreter's exit can abort while gloo's threads still run; all results are on disk.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
