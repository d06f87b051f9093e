"""No training step may wait for the device: model and batch stand on `meta`, where whatever asks for a value raises."""

import pytest
import torch

from method_matrix import build, collate, programs

PROGRAMS = programs()


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_meta, value))
    return value


def step_on_meta(trainer, batch):
    """Forward, weighted total and backward of a training step, with every tensor on `meta`."""
    model = trainer.model.to("meta").train()
    batch = {name: on_meta(value) for name, value in batch.items()}
    counts = model.count_targets(batch)
    output = model(**batch)
    total = sum(loss.sum.sum() / counts[name].clamp(min=1) for name, loss in output.losses.items())
    total.backward()


@pytest.mark.parametrize("method", sorted(PROGRAMS))
def test_a_step_waits_for_nothing(method, tmp_path):
    trainer = build(PROGRAMS[method], tmp_path)
    step_on_meta(trainer, collate(trainer, [trainer.train_dataset[i] for i in range(4)]))
