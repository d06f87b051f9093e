"""Runs every method on two ranks and writes what it saw; started by torch.distributed.run."""

import json
import os
import sys
from pathlib import Path

import torch

from method_matrix import build, log_of, programs


def main(folder):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
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
    (folder / f"done-{rank}").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's exit can abort while gloo's threads still run; all results are on disk.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
