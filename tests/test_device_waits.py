"""No training step may wait for the device: model and batch stand on `meta`, where whatever asks for a value raises."""

import pytest
import torch

from method_matrix import build, programs

PROGRAMS = programs()
RAGGED, EQUAL = [0, 1, 2, 3], [0, 0, 0, 0]


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(part) for part in value]
    return value


def step_on_meta(trainer, rows):
    """Forward, weighted total and backward of a training step, with every tensor on `meta`."""
    collate = trainer.get_train_dataloader().collate_fn
    batch = collate([trainer.train_dataset[i] for i in rows])
    batch.pop("lanes", None)  # The Trainer takes them out.
    model = trainer.model.to("meta").train()
    batch = {name: on_meta(value) for name, value in batch.items()}
    counts = model.count_targets(batch)
    output = model(**batch)
    total = sum(loss.sum.sum() / counts[name].clamp(min=1) for name, loss in output.losses.items())
    total.backward()


@pytest.mark.parametrize("rows", [RAGGED, EQUAL], ids=["padded", "plain"])
@pytest.mark.parametrize("method", sorted(PROGRAMS))
def test_a_step_waits_for_nothing(method, rows, tmp_path):
    step_on_meta(build(PROGRAMS[method], tmp_path), rows)
