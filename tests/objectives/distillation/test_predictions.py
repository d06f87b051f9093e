"""The losses of predictions against their definitions, with those whose gradient is by hand through autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers.made_tensors import MadeTensors
from hf_pretrain.modeling.observing.outputs import TopKTargets, top_k_targets
from hf_pretrain.objectives.distillation import predictions as token_losses
from hf_pretrain.objectives.distillation.predictions import (
    Predictions,
    kl_divergence,
    soft_and_hard_losses,
    top_k_divergence,
    value_difference,
)

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
    monkeypatch.setattr(token_losses, "_LOGITS_AT_ONCE", VOCABULARY)
    student, teacher, labels = logits()
    with MadeTensors() as forward:
        soft, hard = soft_and_hard_losses(student, teacher, labels, temperature=2.0)
    with MadeTensors() as backward:
        gradient = torch.autograd.grad(soft.sum() + hard.sum(), student)[0]
    inputs = {one.untyped_storage().data_ptr() for one in (student, teacher)}
    large = ROWS * VOCABULARY
    assert not forward.storages_of(large) - inputs
    assert backward.storages_of(large) - inputs == {gradient.untyped_storage().data_ptr()}


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


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_regression_is_to_the_teachers_value(shape):
    student, teacher = torch.randn(shape, dtype=torch.bfloat16), torch.randn(shape)
    result = value_difference(Predictions(student, teacher, None))
    expected = (student.float() - teacher).square().reshape(4, -1).mean(1)
    torch.testing.assert_close(result.sum, expected)
    assert result.count.tolist() == [1.0] * 4


class TestDivergence:
    @pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
    def test_are_compared_by_their_definition(self, temperature):
        student, teacher = torch.randn(2, 7, 11, dtype=torch.float64) * 3
        p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
        cross_entropy = -(p * q.log()).sum(-1) * temperature**2
        entropy = -(p * p.log()).sum(-1) * temperature**2
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        result = kl_divergence(student, teacher, temperature=temperature)
        torch.testing.assert_close(result.double(), cross_entropy - entropy, **tolerance)
        assert kl_divergence(teacher, teacher, temperature=temperature).abs().max() == 0

    def test_the_gradient_keeps_its_size_at_any_temperature(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 40, 30)
        student.requires_grad_()
        norms = [
            torch.autograd.grad(kl_divergence(student, teacher, temperature=temperature).mean(), student)[0].norm()
            for temperature in (1.0, 4.0, 16.0)
        ]
        assert max(norms) < 1.35 * min(norms)

    def test_at_high_temperature_logits_are_regressed(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 40, 30)
        student.requires_grad_()
        grad = torch.autograd.grad(kl_divergence(student, teacher, temperature=300.0).sum(), student)[0]
        centred = [logits - logits.mean(-1, keepdim=True) for logits in (student, teacher)]
        torch.testing.assert_close(grad, (centred[0] - centred[1]) / 30, rtol=0.03, atol=1e-3)

    def test_small_divergences_survive_half_precision_logits_under_autocast(self):
        torch.manual_seed(0)
        teacher = torch.randn(50, 100)
        student = teacher + 0.03 * torch.randn(50, 100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = kl_divergence(student, teacher, temperature=1.0)
        expected = kl_divergence(student.double(), teacher.double(), temperature=1.0)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.mean(), expected.mean().float(), rtol=1e-3, atol=0)

    def test_no_target_gives_nothing_with_a_graph(self):
        student = torch.randn(0, 9, requires_grad=True)
        empty = torch.zeros(0, 3)
        for result in (
            kl_divergence(student, student.detach(), temperature=2.0),
            top_k_divergence(student, empty.long(), empty, torch.zeros(0), temperature=2.0),
        ):
            result.sum().backward()
            assert result.shape == (0,) and result.sum() == 0


def top_k(teacher, k, temperature):
    log_probs = (teacher / temperature).log_softmax(-1)
    best = log_probs.topk(k)
    rest = log_probs.scatter(-1, best.indices, -math.inf).logsumexp(-1)
    return best.indices, best.values, rest


class TestBestTokens:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_with_its_tail_is_a_divergence_that_grows_to_the_full_one(self, temperature):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 60, 40) * 2
        full = kl_divergence(student, teacher, temperature=temperature)
        divergences = [
            top_k_divergence(student, *top_k(teacher, k, temperature), temperature=temperature)
            for k in (1, 4, 16, 39, 40)
        ]
        assert all((one > -1e-4).all() for one in divergences)
        assert all((fewer < more + 1e-4).all() for fewer, more in zip(divergences, divergences[1:], strict=False))
        assert (full - divergences[0] > 0.05).any()
        for whole in divergences[3:]:
            torch.testing.assert_close(whole, full, rtol=1e-4, atol=1e-4)

    def test_without_its_tail_would_be_negative(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 60, 40) * 0.5
        ids, log_probs, _ = top_k(teacher, 4, 1.0)
        without = (log_probs.exp() * (log_probs - student.log_softmax(-1).gather(-1, ids))).sum(-1)
        # A student that is sure of what the teacher finds likely.
        sure = torch.zeros(60, 40).scatter(-1, ids, 5.0)
        negative = (log_probs.exp() * (log_probs - sure.log_softmax(-1).gather(-1, ids))).sum(-1)
        assert (negative < -0.05).all() and not torch.equal(without, negative)
        assert (top_k_divergence(sure, *top_k(teacher, 4, 1.0), temperature=1.0) > 0).all()

    def test_gradient_is_that_of_the_classes(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 8, 12, dtype=torch.float64)
        student.requires_grad_()
        ids, log_probs, tail = top_k(teacher, 3, 2.0)
        result = top_k_divergence(student, ids, log_probs, tail, temperature=2.0)
        probs = (student / 2.0).softmax(-1)
        best = probs.gather(-1, ids)
        expected = -4 * ((log_probs.exp() * best.log()).sum(-1) + tail.exp() * (1 - best.sum(-1)).log())
        grads = [torch.autograd.grad(one.sum(), student, retain_graph=True)[0] for one in (result, expected)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)

    def test_a_sure_student_still_has_a_gradient(self):
        student = torch.zeros(1, 20)
        student[0, 3] = 60.0
        student.requires_grad_()
        ids, log_probs = torch.tensor([[3]]), torch.tensor([[0.5]]).log()
        loss = top_k_divergence(student, ids, log_probs, log_probs[:, 0], temperature=1.0)
        # Less the teacher's entropy, that of a fair coin.
        assert loss.item() == pytest.approx(0.5 * (60 - math.log(19)) - math.log(2), rel=1e-4)
        loss.sum().backward()
        assert student.grad[0, 3].item() == pytest.approx(0.5, rel=1e-4)
