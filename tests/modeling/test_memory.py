"""The memory of a recurrent model as a value: what it keeps, what counts as filled, and what it never does."""

import pytest
import torch

from hf_pretrain.modeling.losses import RecurrentMemory


def empty(size=4, *, batch=2):
    return RecurrentMemory.empty(3, batch, size, 5)


def test_an_empty_memory_has_room_and_nothing_in_it():
    memory = RecurrentMemory.empty(3, 2, 4, 5, dtype=torch.float64)
    assert memory.states.shape == (3, 2, 4, 5) and memory.states.dtype == torch.float64
    assert memory.size == 4 and memory.lengths.tolist() == [0, 0] and not memory.mask().any()


@pytest.mark.parametrize("size", [0, 1, 4, 7])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (3, 2, 6), (9,), (2, 9)])
def test_it_keeps_the_last_in_any_pieces(size, lengths):
    stream = torch.randn(3, 2, sum(lengths), 5)
    memory = empty(size)
    for piece in stream.split(lengths, dim=2):
        memory = memory.append(piece)
    kept = min(size, sum(lengths))
    assert memory.states.shape == (3, 2, size, 5)
    assert torch.equal(memory.states[:, :, size - kept :], stream[:, :, sum(lengths) - kept :])
    assert memory.lengths.tolist() == [kept, kept]
    assert memory.mask().tolist() == [[False] * (size - kept) + [True] * kept] * 2


def test_reset_empties_the_lanes_that_are_named():
    memory = empty().append(torch.full((3, 2, 3, 5), float("inf")))
    reset = memory.reset(torch.tensor([True, False]))
    assert reset.lengths.tolist() == [0, 3]
    assert reset.mask().tolist() == [[False] * 4, [False, True, True, True]]
    assert not reset.states[:, 0].any() and reset.states[:, 1, 1:].isinf().all()
    # The old one is as it was.
    assert memory.lengths.tolist() == [3, 3]
    after = reset.append(torch.ones(3, 2, 2, 5))
    assert after.lengths.tolist() == [2, 4]


def test_no_gradient_passes_and_the_type_stays():
    new = torch.randn(3, 2, 3, 5, requires_grad=True)
    memory = RecurrentMemory.empty(3, 2, 4, 5, dtype=torch.bfloat16).append(new)
    assert not memory.states.requires_grad
    assert memory.states.dtype == torch.bfloat16
