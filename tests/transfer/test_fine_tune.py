"""`fine_tune`: a model, a task and a strategy joined."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers.task_runs import QUICK, TYPES, write_encoder, write_tasks
from hf_pretrain.errors import InputError
from hf_pretrain.tasks.spec import load_task, read_tasks
from hf_pretrain.transfer.fine_tuning import FineTuningArguments
from hf_pretrain.transfer.tuning.fine_tune import fine_tune
from hf_pretrain.transfer.tuning.heads import open_for_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place)
    write_encoder(place / "encoder")
    return place


def arguments(folder, **options):
    return FineTuningArguments(**QUICK | {"output_dir": str(folder)} | options)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_learned_and_scored_above_the_constant(place, tmp_path, kind):
    task = read_tasks(place / "tasks.yaml")[kind]
    found = fine_tune(str(place / "encoder"), task, arguments(tmp_path))
    name = found.data.main_metric
    assert found.score > max(found.baseline[name] + 0.2, 0.7), (found.scores, found.baseline)
    # The numbers are those of the predictions, in the rows' order.
    again = found.data.score("validation", found.predictions, tokenizer=found.tokenizer)
    assert again == found.scores and found.step == 60
    assert "fresh head" in found.head and found.fresh
