"""Strategies on two ranks: parts that begin to move late have the gradients of both."""

import pytest
import torch

from helpers.strategy_runs import WITHOUT_DROPOUT, classifier, fine_tuner, moved, weights
from helpers.strategy_worker import RUNS
from helpers.two_ranks import run_on_ranks
from hf_pretrain.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks("helpers.strategy_worker", folder, world_size=[1, 2])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_move_as_one_process(folder, name):
    one, first, second = (torch.load(folder / f"{name}-{ranks}.pt") for ranks in ("1-0", "2-0", "2-1"))
    assert not moved(first, second)
    torch.testing.assert_close(first, one, rtol=1e-3, atol=1e-5)
    before = weights(fine_tuner(folder, classifier(**WITHOUT_DROPOUT), **RUNS[name]).model)
    # What moves, and what stays to the bit, is the same on two ranks.
    assert moved(before, first) == moved(before, one) and moved(before, one)
    if name in ("gradual", "probe"):
        assert len(moved(before, first)) == len(first)


def test_processes_that_would_wait_for_a_gradient_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(InputError, match="ddp_find_unused_parameters=False"):
        fine_tuner(tmp_path, strategy="gradual", ddp_find_unused_parameters=False)
