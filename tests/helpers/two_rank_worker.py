"""Runs every method on two ranks and writes what it saw."""

import json
import os

import torch

from helpers.method_matrix import all_programs, build, log_of, teacher_of, tiny_data

# Made before the ranks are forked, because only the first rank may write a model.
TEACHERS = [teacher_of(program) for program in all_programs().values()]
# Of 13 examples an epoch's second step has 5. In its second turn one rank has one example, and the other has none.
UNEVEN = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 3}
# About five of the thirteen held-out examples.
PART_TOKENS = 60
# By name: the method, and options. A model with a memory is left out: it has as many lanes as examples in a step.
UNEVEN_RUNS = {name: (name, {}) for name in all_programs() if name not in ("recurrent-lm", "plm")} | {
    "plm": ("plm", {"mem_len": 0}),
    "rtd-decoupled": ("rtd", {"training_mode": "decoupled"}),
}


def build_uneven(name, folder, **sizes):
    """Return a Trainer of two epochs of two steps, the second of which is short."""
    method, options = UNEVEN_RUNS[name]
    return build(all_programs()[method], folder, tiny_data(train=13), **UNEVEN, **options, **sizes)


def train_uneven(name, folder, rank):
    """Train in one run, and again from the middle of the second epoch."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for run, resume_from in (("whole", None), ("resumed", str(folder / f"{name}-whole" / "checkpoint-3"))):
        trainer = build_uneven(name, folder / f"{name}-{run}", **sizes)
        trainer.train(resume_from_checkpoint=resume_from)
        result = {"gradients": trainer.recorder.gradients[-1], "log": log_of(trainer)}
        torch.save(result, folder / f"{name}-{run}-{rank}.pt")


def main(folder):
    rank = int(os.environ["RANK"])
    for name, program in all_programs().items():
        trainer = build(
            program, folder / f"{name}-run", per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2
        )
        batch = next(iter(trainer.get_train_dataloader()))
        torch.save(batch, folder / f"{name}-batch-{rank}.pt")
        # Evaluate before training: accelerate then used to leave the model out of DDP.
        (folder / f"{name}-eval-{rank}.json").write_text(json.dumps(trainer.evaluate()))
        trainer.args.max_eval_tokens = PART_TOKENS
        (folder / f"{name}-part-{rank}.json").write_text(json.dumps(trainer.evaluate()))
        trainer.train()
        torch.save(trainer.recorder.gradients[0], folder / f"{name}-gradients-{rank}.pt")
        torch.save(trainer.model.state_dict(), folder / f"{name}-weights-{rank}.pt")
        (folder / f"{name}-log-{rank}.json").write_text(json.dumps(log_of(trainer)))
    for name in (name for name, (method, _) in UNEVEN_RUNS.items() if method in all_programs()):
        train_uneven(name, folder, rank)
