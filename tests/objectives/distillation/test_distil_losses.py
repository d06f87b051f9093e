"""The losses of distillation against their definitions, position by position."""

import math

import pytest
import torch

from helpers.made_tensors import MadeTensors
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.observing.capture import AttentionRecord
from hf_pretrain.objectives.distillation import losses
from hf_pretrain.objectives.distillation.losses import (
    attention_distribution_loss,
    attention_loss,
    attention_probability_loss,
    cosine_loss,
    hidden_loss,
)

LENGTHS = (6, 3, 1)


def mask_of(lengths=LENGTHS, width=None):
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def record(*, seed, heads=3, width=4, batch=3, length=6, bias=False, window=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, batch, heads, length, width, generator=generator, dtype=dtype)
    scores = torch.randn(batch, heads, length, length, generator=generator, dtype=dtype) if bias else None
    leaves = [leaf.requires_grad_() if leaf is not None else None for leaf in (query, key, value, scores)]
    return AttentionRecord(*leaves[:3], width**-0.5, leaves[3], window)


def in_float64(original):
    query, key, value = (states.detach().double().requires_grad_() for states in original[:3])
    bias = None if original.bias is None else original.bias.detach().double().requires_grad_()
    return original._replace(query=query, key=key, value=value, bias=bias)


def by_loops(student, teacher, mask, compare):
    """Sum a function of two score rows over examples, heads and real queries."""
    sums = []
    for row, length in enumerate(mask.sum(1).tolist()):
        total = torch.zeros((), dtype=torch.float64)
        for head in range(student.num_heads):
            for i in range(length):
                windows = [one.window for one in (student, teacher) if one.window is not None]
                keys = [j for j in range(length) if all(abs(i - j) <= window for window in windows)]
                scores = []
                for one in (student, teacher):
                    products = one.query[row, head, i] @ one.key[row, head, keys].T * one.scaling
                    scores.append(products if one.bias is None else products + one.bias[row, head, i, keys])
                total = total + compare(*scores)
        sums.append(total)
    return torch.stack(sums)


def squared(student, teacher):
    return (student - teacher).square().sum()


def squared_probabilities(student, teacher):
    return (student.softmax(-1) - teacher.softmax(-1)).square().sum()


class TestAttention:
    @pytest.mark.parametrize("teacher_width", [4, 7])
    @pytest.mark.parametrize("kind", [{}, {"bias": True}, {"window": 1}])
    @pytest.mark.parametrize(
        ("loss", "compare"), [(attention_loss, squared), (attention_probability_loss, squared_probabilities)]
    )
    def test_is_the_sum_over_heads_and_pairs(self, loss, compare, kind, teacher_width):
        student, teacher, mask = record(seed=0, **kind), record(seed=1, width=teacher_width), mask_of()
        result = loss(student, teacher, mask)
        slow = in_float64(student)
        expected = by_loops(slow, in_float64(teacher), mask, compare)
        torch.testing.assert_close(result.sum.double(), expected, rtol=1e-5, atol=1e-5)
        result.sum.sum().backward()
        expected.sum().backward()
        for fast, exact in zip((student.query, student.key), (slow.query, slow.key), strict=True):
            torch.testing.assert_close(fast.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
        pairs = [36, 9, 1] if "window" not in kind else [16, 7, 1]
        assert result.count.tolist() == [3.0 * number for number in pairs]

    def test_of_long_rows_close_to_each_other(self):
        teacher = record(seed=0, heads=2, width=64, batch=1, length=256)
        noise = record(seed=1, heads=2, width=64, batch=1, length=256)
        # A loss of a thousandth of the scores' energy.
        near = [(a + 0.022 * b).detach().requires_grad_() for a, b in zip(teacher[:2], noise[:2], strict=True)]
        student = teacher._replace(query=near[0], key=near[1])
        slow, exact_teacher = in_float64(student), in_float64(teacher)
        difference = (slow.query @ slow.key.mT - exact_teacher.query @ exact_teacher.key.mT) * 0.125
        expected = difference.square().sum()
        energy = (exact_teacher.query @ exact_teacher.key.mT * 0.125).square().sum()
        assert 5e-4 < expected / energy < 2e-3
        result = attention_loss(student, teacher, torch.ones(1, 256)).sum
        assert result.item() == pytest.approx(expected.item(), rel=1e-3)
        result.sum().backward()
        expected.backward()
        for fast, exact in ((near[0], slow.query), (near[1], slow.key)):
            assert (fast.grad - exact.grad).norm() < 1e-4 * exact.grad.norm()

    @pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6])
    def test_its_value_stays_right_as_a_student_comes_near(self, step):
        """In fp32 a billionth of the scores' energy would be lost among the large numbers that cancel."""
        teacher = record(seed=0, heads=2, width=32, batch=1, length=200)
        noise = record(seed=1, heads=2, width=32, batch=1, length=200)
        near = [(3 * a + step * b).detach().requires_grad_() for a, b in zip(teacher[:2], noise[:2], strict=True)]
        teacher = teacher._replace(query=3 * teacher.query.detach(), key=3 * teacher.key.detach())
        student = teacher._replace(query=near[0], key=near[1])
        slow, exact = in_float64(student), in_float64(teacher)
        expected = ((slow.query @ slow.key.mT - exact.query @ exact.key.mT) * 32**-0.5).square().sum()
        result = attention_loss(student, teacher, torch.ones(1, 200)).sum
        # What the weights of fp32 can hold of such a step.
        assert result.item() == pytest.approx(expected.item(), rel=max(1e-4, 1e-6 / step))

    def test_of_other_widths_its_error_is_that_of_the_scores_energy(self):
        teacher, student = (record(seed=n, heads=2, width=24 - 8 * n, batch=1, length=100) for n in (0, 1))
        slow, exact = in_float64(student), in_float64(teacher)
        scores = [one.query @ one.key.mT * one.query.shape[-1] ** -0.5 for one in (slow, exact)]
        result = attention_loss(student, teacher, torch.ones(1, 100)).sum.item()
        energy = sum(one.square().sum().item() for one in scores)
        assert abs(result - (scores[0] - scores[1]).square().sum().item()) < 1e-6 * energy

    def test_no_tensor_of_all_pairs_is_made(self):
        length = 50
        student, teacher = (record(seed=seed, length=length) for seed in (0, 1))
        mask = mask_of((50, 20, 7))
        with MadeTensors() as plain:
            attention_loss(student, teacher, mask).sum.sum().backward()
        with MadeTensors() as materialised:
            attention_loss(student, record(seed=2, length=length, bias=True), mask).sum.sum().backward()
        assert plain.shapes and not any(shape[-2:] == (length, length) for shape in plain.shapes)
        assert any(shape[-2:] == (length, length) for shape in materialised.shapes)

    def test_is_of_scores_not_of_probabilities(self):
        student, teacher, mask = record(seed=0), record(seed=1), mask_of()
        shifted = student._replace(bias=torch.randn(3, 3, 6, 1).expand(-1, -1, -1, 6))
        before, after = (attention_loss(one, teacher, mask).sum for one in (student, shifted))
        assert ((before - after).abs() > 0.01 * before).all()
        before, after = (attention_probability_loss(one, teacher, mask).sum for one in (student, shifted))
        torch.testing.assert_close(before, after)

    def test_heads_are_told_apart(self):
        student, teacher, mask = record(seed=0), record(seed=1), mask_of()
        turned = student._replace(query=student.query[:, [1, 2, 0]], key=student.key[:, [1, 2, 0]])
        assert not torch.allclose(
            attention_loss(student, teacher, mask).sum, attention_loss(turned, teacher, mask).sum
        )

    @pytest.mark.parametrize("loss", [attention_loss, attention_probability_loss])
    def test_other_numbers_of_heads_are_refused(self, loss):
        message = "student's 2 attention heads cannot learn from the teacher's 3.*num_attention_heads=3.*relation"
        with pytest.raises(InputError, match=message):
            loss(record(seed=0, heads=2), record(seed=1), mask_of())

    @pytest.mark.parametrize("loss", [attention_loss, attention_probability_loss])
    def test_some_heads_at_a_time_give_the_same(self, loss, monkeypatch):
        student, teacher, mask = record(seed=0, bias=True), record(seed=1), mask_of()
        results = []
        for limit in (1, 1 << 20):
            monkeypatch.setattr(losses, "_SCORES_AT_ONCE", limit)
            result = loss(student, teacher, mask).sum
            results.append((result, *torch.autograd.grad(result.sum(), [student.query, student.bias])))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("loss", [attention_loss, attention_probability_loss])
    def test_documents_of_a_row_are_as_if_alone(self, loss):
        student, teacher = (record(seed=seed, batch=1, length=8) for seed in (0, 1))
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
        packed = loss(student, teacher, (documents >= 0).long(), document_ids=documents)
        alone = []
        for part in (slice(0, 3), slice(3, 7)):
            cut = [one._replace(query=one.query[:, :, part], key=one.key[:, :, part]) for one in (student, teacher)]
            alone.append(loss(*cut, torch.ones(1, part.stop - part.start)))
        torch.testing.assert_close(packed.sum, alone[0].sum + alone[1].sum)
        assert packed.count == alone[0].count + alone[1].count


def divergences(student, teacher):
    return torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    )


OF_PAIRS = [
    (attention_loss, squared),
    (attention_probability_loss, squared_probabilities),
    (attention_distribution_loss, divergences),
]


class TestGradientsByHand:
    """They are made before it is known what they are multiplied by."""

    @pytest.mark.parametrize("shape", [(3, 3), (1, 3), (3, 1), (1, 1)])
    @pytest.mark.parametrize(("loss", "compare"), OF_PAIRS)
    def test_examples_weigh_differently_and_heads_and_examples_share_a_bias(self, loss, compare, shape, monkeypatch):
        monkeypatch.setattr(losses, "_SCORES_AT_ONCE", 1)
        bias = torch.randn(*shape, 6, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
        student, teacher, mask = record(seed=0)._replace(bias=bias), record(seed=1), mask_of()
        slow, slow_bias = in_float64(student), bias.detach().double().requires_grad_()
        weights = torch.tensor([0.5, -2.0, 3.0])
        expected = (
            by_loops(slow._replace(bias=slow_bias.expand(3, 3, 6, 6)), in_float64(teacher), mask, compare)
            @ weights.double()
        )
        found = loss(student, teacher, mask).sum @ weights
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        exact = torch.autograd.grad(expected, [slow.query, slow.key, slow_bias])
        for one, other in zip(torch.autograd.grad(found, [student.query, student.key, bias]), exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("loss", [loss for loss, _ in OF_PAIRS])
    def test_small_ones_survive_half_precision(self, loss):
        """As a scaled loss needs: they are a thousand times smaller than what float16 tells from zero."""
        mask, results = mask_of(), []
        for dtype in (torch.float32, torch.float16):
            student, teacher = (record(seed=seed) for seed in (0, 1))
            small = [(each.detach() * 2.0**-10).half().to(dtype).requires_grad_() for each in student[:2]]
            bias = torch.zeros(1, 1, 6, 6)
            one = student._replace(query=small[0], key=small[1], bias=bias)
            other = teacher._replace(query=teacher.query.detach() * 2.0**-10, bias=bias)
            results.append(torch.autograd.grad(loss(one, other, mask).sum.sum() * 2.0**20, small))
        for exact, found in zip(*results, strict=True):
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.float(), exact, rtol=2e-3, atol=1e-3)

    @pytest.mark.parametrize("loss", [loss for loss, _ in OF_PAIRS])
    def test_no_scores_are_kept(self, loss):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
            loss(record(seed=0, length=40), record(seed=1, length=40), mask_of((40, 9, 4)))
        assert kept and not any(shape[-2:] == (40, 40) for shape in kept)


def attention_results(seed, mask, loss, **options):
    length = mask.shape[1]
    student, teacher = (record(seed=seed + one, length=length, **options) for one in (0, 1))
    return loss(student, teacher, mask), (student.query, student.key)


def state_results(seed, mask, loss):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *mask.shape, 5, generator=generator)
    return loss(student.requires_grad_(), teacher, mask), (student,)


MASKED = {
    "attention": lambda mask: attention_results(0, mask, attention_loss),
    "attention with bias": lambda mask: attention_results(0, mask, attention_loss, bias=True),
    "attention probabilities": lambda mask: attention_results(0, mask, attention_probability_loss),
    "hidden": lambda mask: state_results(0, mask, hidden_loss),
    "cosine": lambda mask: state_results(0, mask, cosine_loss),
}


class TestPadding:
    @pytest.mark.parametrize("name", MASKED)
    def test_has_no_gradient(self, name):
        mask = mask_of()
        result, leaves = MASKED[name](mask)
        for grad in torch.autograd.grad(result.sum.sum(), leaves):
            tokens = grad if grad.dim() == 3 else grad.transpose(1, 2).flatten(2)
            assert torch.equal(tokens[mask == 0], torch.zeros_like(tokens[mask == 0]))
            # A token that sees itself only has no choice of probabilities.
            assert tokens[mask == 1].abs().sum(-1).count_nonzero() == (9 if "probabilities" in name else 10)

    @pytest.mark.parametrize("name", MASKED)
    def test_everywhere_gives_zero_with_a_graph(self, name):
        result, leaves = MASKED[name](torch.zeros(3, 6, dtype=torch.long))
        assert result.sum.tolist() == result.count.tolist() == [0.0, 0.0, 0.0]
        for grad in torch.autograd.grad(result.sum.sum(), leaves):
            assert torch.equal(grad, torch.zeros_like(grad))

    @pytest.mark.parametrize("loss", [attention_loss, attention_probability_loss])
    def test_of_any_length_and_content_gives_the_same(self, loss):
        student, teacher = record(seed=0), record(seed=1, bias=loss is attention_probability_loss)
        short = loss(student, teacher, mask_of())

        # Plain products do not even ask what stands there.
        content = math.nan if loss is attention_loss else 50.0

        def longer(one):
            padded = [torch.nn.functional.pad(states, (0, 0, 0, 4), value=content) for states in one[:3]]
            bias = None if one.bias is None else torch.nn.functional.pad(one.bias, (0, 4, 0, 4), value=-70.0)
            return one._replace(query=padded[0], key=padded[1], value=padded[2], bias=bias)

        long = loss(longer(student), longer(teacher), mask_of(width=10))
        torch.testing.assert_close(long.sum, short.sum, rtol=1e-5, atol=1e-6)
        assert torch.equal(long.count, short.count)

    @pytest.mark.parametrize("loss", [hidden_loss, cosine_loss])
    def test_of_states_may_be_anything(self, loss):
        student, teacher, mask = torch.randn(3, 6, 5), torch.randn(3, 6, 5), mask_of()
        garbage = teacher.masked_fill(mask[..., None] == 0, math.nan)
        assert torch.equal(loss(student, garbage, mask).sum, loss(student, teacher, mask).sum)


class TestStates:
    def test_hidden_loss_is_averaged_over_the_width_only(self):
        student, teacher = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
        result = hidden_loss(student, teacher, torch.tensor([[1, 1, 1], [1, 1, 0]]))
        assert result.sum.tolist() == [12.0, 8.0] and result.count.tolist() == [3.0, 2.0]

    def test_cosine_loss_is_of_directions(self):
        student = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
        teacher = torch.tensor([[[5.0, 0.0], [0.0, -1.0], [0.0, 1.0]]])
        result = cosine_loss(student, teacher, torch.ones(1, 3))
        assert result.sum.tolist() == [3.0] and result.count.tolist() == [3.0]

    def test_a_student_like_its_teacher_has_no_loss(self):
        one, states, mask = record(seed=0), torch.randn(3, 6, 5), mask_of()
        energy = by_loops(in_float64(one), in_float64(one), mask, lambda s, t: s.square().sum())
        assert (attention_loss(one, one, mask).sum <= 1e-6 * energy).all()
        assert not attention_probability_loss(one, one, mask).sum.any()
        assert not hidden_loss(states, states, mask).sum.any()
        assert cosine_loss(states, states, mask).sum.abs().max() < 1e-5

    def test_precision_is_full_under_autocast(self):
        student, teacher, mask = record(seed=0, width=16), record(seed=1, width=16), mask_of()
        biased = record(seed=2, width=16, bias=True)
        for loss, pair in ((attention_loss, (student, teacher)), (attention_loss, (biased, teacher))):
            expected = loss(*pair, mask).sum
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(loss(*pair, mask).sum, expected)
            half = [one._replace(query=one.query.bfloat16(), key=one.key.bfloat16()) for one in pair]
            assert loss(*half, mask).sum.dtype == torch.float32
