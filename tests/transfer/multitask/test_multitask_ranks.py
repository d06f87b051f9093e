"""Several tasks on two ranks: both have the task of a step, and together they do what one process does."""

import pytest
import torch

from helpers.multitask_runs import moved
from helpers.multitask_worker import RUNS, SIZES, write
from helpers.two_ranks import run_on_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write(folder)
    run_on_ranks("helpers.multitask_worker", folder, world_size=[1, 2])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process(folder, name):
    one, first, second = (torch.load(folder / f"{name}-{ranks}.pt") for ranks in ("1-0", "2-0", "2-1"))
    assert not moved(first["after"], second["after"])
    torch.testing.assert_close(first["after"], one["after"], rtol=1e-3, atol=1e-5)
    assert moved(first["before"], first["after"]) == moved(one["before"], one["after"])
    # Each step is of one task on both, the same as in one process, and its loss is the mean of both.
    tasks = [[key for key in row if key.startswith("loss_")] for row in one["rows"]]
    assert all(len(found) == 1 for found in tasks) and len({found[0] for found in tasks}) == len(SIZES)
    for ranks in (first, second):
        assert [[key for key in row if key.startswith("loss_")] for row in ranks["rows"]] == tasks
    for row, other, (task,) in zip(one["rows"], first["rows"], tasks, strict=True):
        # A mean over tokens of two halves is not that of all: classes of words have other weights.
        if task != "loss_tags":
            assert other[task] == pytest.approx(row[task], rel=2e-3)
    assert first["scores"].keys() == one["scores"].keys()
    assert first["scores"]["eval_mean"] == pytest.approx(one["scores"]["eval_mean"], abs=0.06)
