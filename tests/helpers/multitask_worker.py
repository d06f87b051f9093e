"""Trains several tasks on the ranks of a group, and writes what each rank ends with."""

import os

import torch

from helpers.multitask_runs import load_tasks, trainer, weights, write_encoder

# A step has 8 examples on any number of ranks.
RUNS = {
    "equal": {"sampling": "equal"},
    "accumulated": {"sampling": "annealed", "gradient_accumulation_steps": 2, "strategy": "layerwise_decay"},
    "gradual": {"sampling": "proportional", "strategy": "gradual"},
}
SIZES = {"topic": 24, "tags": 40, "span": 16}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def train(name, folder, *, world_size):
    options = RUNS[name]
    batch = 8 // world_size // options.get("gradient_accumulation_steps", 1)
    # Plain gradient descent: sums in another order stay small differences.
    still = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "num_train_epochs": 2, "weight_decay": 0.1}
    tasks = load_tasks(folder / f"tasks-{os.environ['RANK']}", SIZES)
    run = trainer(folder, folder.parent / "encoder", tasks, per_device_train_batch_size=batch, **still, **options)
    without_dropout(run.model)
    before = weights(run.model)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    return {"before": before, "after": weights(run.model), "rows": rows, "scores": run.evaluate()}


def main(folder):
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for name in RUNS:
        torch.save(train(name, folder / f"{name}-{size}", world_size=size), folder / f"{name}-{size}-{rank}.pt")


def write(folder):
    write_encoder(folder / "encoder")
