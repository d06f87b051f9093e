"""The losses of tokens whose gradient is made by hand, against their definitions through autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_pretrain.modeling.observing.observation import TopKTargets, top_k_targets
from hf_pretrain.objectives.distillation import predictions as token_losses
from hf_pretrain.objectives.distillation.losses import kl_divergence, top_k_divergence
from hf_pretrain.objectives.distillation.predictions import soft_and_hard_losses

ROWS, VOCABULARY = 13, 40


def logits(*, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, ROWS, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[[2, 7]] = -100
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def naive(student, teacher, labels, *, temperature):
    """In float64, by the definitions."""
    ours, theirs = ((one.double() / temperature).log_softmax(-1) for one in (student, teacher))
    kl = temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1)
    return kl, F.cross_entropy(student.double(), labels, ignore_index=-100, reduction="none")


@pytest.fixture(params=[1, 3 * VOCABULARY, 1 << 20], ids=["a row", "three rows", "all rows"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(token_losses, "_LOGITS_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("temperature", [1.0, 2.0, torch.tensor(0.5)])
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)])
def test_values_and_gradients_are_those_of_the_definitions(asked, temperature):
    student, teacher, labels = logits()
    weights = torch.linspace(-1, 2, ROWS), torch.linspace(3, 1, ROWS)
    chosen = [one if wanted else None for one, wanted in zip((teacher, labels), asked, strict=True)]
    found = soft_and_hard_losses(student, *chosen, temperature=temperature)
    expected = naive(student, teacher, labels, temperature=temperature)
    totals = []
    for losses in (found, expected):
        terms = [(loss * weight).sum() for loss, weight, use in zip(losses, weights, asked, strict=True) if use]
        totals.append(sum(terms))
    for one, other, use in zip(found, expected, asked, strict=True):
        assert (one is None) != use
        if use:
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(total, student)[0] for total in totals]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_one_of_the_losses_may_stay_without_a_gradient():
    student, teacher, labels = logits()
    soft, hard = soft_and_hard_losses(student, teacher, labels, temperature=2.0)
    expected = naive(student, teacher, labels, temperature=2.0)
    for one, other in ((soft, expected[0]), (hard, expected[1])):
        found = [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (one, other)]
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_no_rows():
    student = torch.zeros(0, VOCABULARY, requires_grad=True)
    soft, hard = soft_and_hard_losses(student, student.detach(), torch.zeros(0, dtype=torch.long), temperature=1.0)
    (soft.sum() + hard.sum()).backward()
    assert student.grad.shape == (0, VOCABULARY)


def test_16_bits_are_compared_in_32():
    student, teacher, labels = logits(dtype=torch.bfloat16)
    found = soft_and_hard_losses(student, teacher, labels, temperature=2.0)
    expected = naive(student, teacher, labels, temperature=2.0)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)
    sum(loss.sum() for loss in found).backward()
    assert student.grad.dtype == torch.bfloat16


def test_of_all_that_is_as_large_as_the_logits_only_their_gradient_is_made(monkeypatch):
    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.large = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= ROWS * VOCABULARY:
                self.large.add(result.untyped_storage().data_ptr())
            return result

    monkeypatch.setattr(token_losses, "_LOGITS_AT_ONCE", VOCABULARY)
    student, teacher, labels = logits()
    with Sizes() as forward:
        soft, hard = soft_and_hard_losses(student, teacher, labels, temperature=2.0)
    with Sizes() as backward:
        gradient = torch.autograd.grad(soft.sum() + hard.sum(), student)[0]
    inputs = {one.untyped_storage().data_ptr() for one in (student, teacher)}
    assert not forward.large - inputs
    assert backward.large - inputs == {gradient.untyped_storage().data_ptr()}


class TestTopK:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_all_tokens_give_the_whole_divergence(self, temperature):
        student, teacher, _ = logits()
        target = top_k_targets(teacher, k=VOCABULARY, temperature=temperature)
        found = top_k_divergence(student, *target, temperature=temperature)
        expected = kl_divergence(student, teacher, temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
    def test_all_others_are_one_class(self, k):
        student, teacher, _ = logits()
        target = top_k_targets(teacher, k=k)
        sides = []
        for one in (student.detach(), teacher):
            probs = one.double().softmax(-1)
            kept = probs.gather(1, target.ids)
            sides.append(torch.cat([kept, 1 - kept.sum(1, keepdim=True)], dim=1))
        expected = (sides[1] * (sides[1] / sides[0]).log()).sum(1)
        found = top_k_divergence(student, *target, temperature=1.0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    def test_of_itself_it_is_zero_where_the_teacher_is_sure_too(self):
        sure = torch.tensor([[90.0, 0.0, 0.0, -200.0]])
        target = top_k_targets(sure, k=2)
        assert isinstance(target, TopKTargets)
        assert top_k_divergence(sure, *target, temperature=1.0).abs() < 1e-6
