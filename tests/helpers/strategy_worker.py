"""Fine-tunes with each strategy on the ranks of a group, and writes the weights that each rank ends with."""

import os

import torch

from helpers.strategy_runs import WITHOUT_DROPOUT, classifier, fine_tuner, weights

# A step has 8 examples on any number of ranks. Each stage of a strategy has steps.
RUNS = {
    "gradual": {"strategy": "gradual", "num_train_epochs": 5},
    "probe": {"strategy": "probe_then_tune", "num_train_epochs": 2, "gradient_accumulation_steps": 2},
    "frozen": {"strategy": "frozen"},
    "layers": {"strategy": "top_layers", "reinit_layers": 1},
    "rates": {"strategy": "layerwise_decay", "freeze_embeddings": True},
    "lora": {"strategy": "lora"},
}


def train(name, folder, *, world_size):
    options = RUNS[name]
    batch = 8 // world_size // options.get("gradient_accumulation_steps", 1)
    # Plain gradient descent: sums in another order stay small differences.
    still = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    trainer = fine_tuner(folder, classifier(**WITHOUT_DROPOUT), per_device_train_batch_size=batch, **still, **options)
    trainer.train()
    return weights(trainer.model)


def main(folder):
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for name in RUNS:
        torch.save(train(name, folder / name, world_size=size), folder / f"{name}-{size}-{rank}.pt")
