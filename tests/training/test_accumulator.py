"""Running sums between two log lines."""

import pytest
import torch

from hf_pretrain.modeling.losses import ExampleSum, SumAccumulator


def pair(sums, counts):
    return ExampleSum(torch.tensor(sums), torch.tensor(counts))


def alone(tensor):
    return tensor


def test_means_are_weighted_by_counts():
    accumulator = SumAccumulator()
    accumulator.add({"a": pair([1.0, 2.0], [1.0, 3.0]), "b": pair([4.0, 0.0], [2.0, 0.0])})
    accumulator.add({"a": pair([30.0], [6.0]), "b": pair([0.0], [2.0])})
    # The mean of the two batches' means would be 2.875 for a.
    assert accumulator.means(alone) == {"a": 3.3, "b": 1.0}


def test_each_call_starts_anew():
    accumulator = SumAccumulator()
    assert accumulator.means(alone) == {}
    accumulator.add({"a": pair([6.0], [2.0])})
    assert accumulator.means(alone) == {"a": 3.0}
    assert accumulator.means(alone) == {}
    accumulator.add({"a": pair([5.0], [1.0])})
    assert accumulator.means(alone) == {"a": 5.0}


def test_what_has_no_target_has_no_mean():
    accumulator = SumAccumulator()
    accumulator.add({"a": pair([0.0], [0.0]), "b": pair([1.0], [1.0])})
    assert accumulator.means(alone) == {"b": 1.0}
    accumulator.add({"a": pair([0.0], [0.0])})
    accumulator.add({"a": pair([2.0], [4.0])})
    assert accumulator.means(alone) == {"a": 0.5}


def test_a_name_may_join_late():
    accumulator = SumAccumulator()
    accumulator.add({"a": pair([1.0], [1.0])})
    accumulator.add({"b": pair([4.0], [2.0]), "a": pair([3.0], [1.0])})
    assert accumulator.means(alone) == {"a": 2.0, "b": 2.0}


def test_one_reduction_sums_over_ranks_before_the_division():
    here, there = SumAccumulator(), SumAccumulator()
    here.add({"b": pair([1.0], [1.0]), "a": pair([10.0], [1.0])})
    there.add({"a": pair([0.0], [4.0]), "b": pair([8.0], [2.0])})
    sent = []
    there.means(lambda tensor: sent.append(tensor.clone()) or tensor)
    calls = []

    def reduce(tensor):
        calls.append(tensor)
        return tensor + sent[0]

    assert here.means(reduce) == {"a": 2.0, "b": 3.0}
    assert len(calls) == 1


def test_many_small_terms_are_not_lost():
    """In fp32 the count would stick at 2**24."""
    accumulator = SumAccumulator()
    accumulator.add({"a": pair([2.0**24], [2.0**24])})
    for _ in range(64):
        accumulator.add({"a": pair([2.0], [1.0])})
    assert accumulator.means(alone)["a"] == pytest.approx((2**24 + 128) / (2**24 + 64), rel=1e-12)


def test_no_graph_is_kept():
    accumulator = SumAccumulator()
    freed = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.watch = Watch()
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Watch:
        def __del__(self):
            freed.append(True)

    weight = torch.ones(2, requires_grad=True)
    accumulator.add({"a": ExampleSum(Spy.apply(weight), torch.ones(2))})
    assert freed == [True]
    assert accumulator.means(alone) == {"a": 1.0}
