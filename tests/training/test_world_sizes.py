"""A run on two ranks is taken up again on two, bit for bit, and on one or four with the same global batch, up to rounding."""

import json
from pathlib import Path

import pytest
import torch

from helpers.method_matrix import log_of, programs, relative_difference
from helpers.two_ranks import run_on_ranks
from helpers.world_size_worker import GLOBAL_BATCH, HALF, WHOLE, build_run

METHODS = sorted(programs())
# Four ranks go on as one does. A memory of lanes is dealt out to the ranks besides; the slow tests ask every method.
ON_FOUR = [
    pytest.param(name, marks=() if name in ("mlm", "plm", "recurrent-lm") else pytest.mark.slow) for name in METHODS
]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Runs of every method on two ranks, and of some on four."""
    folder = tmp_path_factory.mktemp("worlds")
    names = [item.name for item in request.session.items if item.path == Path(__file__)]
    on_four = [method for method in METHODS if f"test_four_ranks_go_on[{method}]" in names]
    (folder / "on_four.json").write_text(json.dumps(on_four))
    run_on_ranks("helpers.world_size_worker", folder, world_size=(2, 4))
    return folder


def found(folder, method, name, rank=0):
    """The log and the weights of a run on several ranks, as one of them saw it."""
    result = torch.load(folder / method / f"{name}-{rank}.pt")
    return result["log"], result["weights"]


def check_equal_runs(one, other):
    """Compare two logs with their weights: whole numbers to the last digit, losses and weights to 1e-5."""
    (log, weights), (other_log, other_weights) = one, other
    parts = [{name: value.double() for name, value in state.items()} for state in (weights, other_weights)]
    assert relative_difference(*parts) < 1e-5
    assert [row.keys() for row in log] == [row.keys() for row in other_log]
    assert len(log) == WHOLE + 1  # a row a step, and one for the whole
    for row, other_row in zip(log, other_log, strict=True):
        for name, value in row.items():
            assert other_row[name] == (value if isinstance(value, int) else pytest.approx(value, rel=1e-5)), name


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_go_on_bit_for_bit(folder, method):
    """With dropout, of which each rank has its own."""
    for rank in range(2):
        log, weights = found(folder, method, "dropout", rank)
        resumed_log, resumed_weights = found(folder, method, "dropout-resumed", rank)
        assert resumed_log == log
        assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    checkpoint = folder / method / "dropout" / f"checkpoint-{HALF}"
    # NumPy's state is in there too.
    first, second = (torch.load(checkpoint / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_hold_the_same_model(folder, method):
    ran_on_four = method in json.loads((folder / "on_four.json").read_text())
    runs = {"dropout": 2, "dropout-resumed": 2, "plain": 2} | ({"on-4": 4} if ran_on_four else {})
    for name, world_size in runs.items():
        (log, weights), *others = [found(folder, method, name, rank) for rank in range(world_size)]
        for other_log, other_weights in others:
            assert [row.get("loss") for row in other_log] == [row.get("loss") for row in log]
            assert all(torch.equal(weights[key], other_weights[key]) for key in weights)


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_goes_on(folder, method, tmp_path):
    trainer = build_run(programs()[method], tmp_path, world_size=1)
    assert trainer.args.per_device_train_batch_size == GLOBAL_BATCH
    trainer.train(resume_from_checkpoint=str(folder / method / "plain" / f"checkpoint-{HALF}"))
    check_equal_runs(found(folder, method, "plain"), (log_of(trainer), trainer.model.state_dict()))


@pytest.mark.parametrize("method", ON_FOUR)
def test_four_ranks_go_on(folder, method):
    check_equal_runs(found(folder, method, "plain"), found(folder, method, "on-4"))
