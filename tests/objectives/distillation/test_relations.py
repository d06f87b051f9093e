"""MiniLM's relations against their definition, row by row."""

import pytest
import torch

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.observing.capture import AttentionRecord
from hf_pretrain.objectives.distillation import losses
from hf_pretrain.objectives.distillation.losses import (
    attention_distribution_loss,
    check_relation_heads,
    relation_loss,
)

LENGTHS = (6, 3, 1)


def mask_of(lengths=LENGTHS, width=None):
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def states(seed, width, length=6, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator)


def record(seed, *, heads=3, width=4, bias=False):
    query, key, value = (
        states(3 * seed + n, heads * width).unflatten(-1, (heads, width)).transpose(1, 2) for n in range(3)
    )
    added = states(seed + 90, 6 * heads).unflatten(-1, (heads, 6)).transpose(1, 2) if bias else None
    return AttentionRecord(query.requires_grad_(), key.requires_grad_(), value, width**-0.5, added)


def divergence(teacher_scores, student_scores):
    p, q = teacher_scores.softmax(-1), student_scores.softmax(-1)
    return (p * (p / q).log()).sum()


def by_loops(student, teacher, mask, heads):
    sums = []
    for row, length in enumerate(mask.sum(1).tolist()):
        total = torch.zeros((), dtype=torch.float64)
        for head in range(heads):
            scores = []
            for one in (teacher, student):
                width = one.shape[-1] // heads
                part = one[row, :length, head * width : (head + 1) * width].double()
                scores.append(part @ part.T / width**0.5)
            for i in range(length):
                total = total + divergence(scores[0][i], scores[1][i])
        sums.append(total)
    return torch.stack(sums)


class TestRelations:
    @pytest.mark.parametrize(("student_width", "teacher_width"), [(12, 12), (12, 24), (6, 12)])
    @pytest.mark.parametrize("heads", [1, 3, 6])
    def test_are_divergences_of_the_student_from_the_teacher(self, student_width, teacher_width, heads):
        student, teacher, mask = states(0, student_width).requires_grad_(), states(1, teacher_width), mask_of()
        result = relation_loss(student, teacher, mask, relation_heads=heads)
        exact = student.detach().double().requires_grad_()
        expected = by_loops(exact, teacher, mask, heads)
        torch.testing.assert_close(result.sum.double(), expected, rtol=1e-5, atol=1e-5)
        assert result.count.tolist() == [heads * length for length in LENGTHS]
        result.sum.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
        reverse = relation_loss(teacher, student, mask, relation_heads=heads).sum
        assert not torch.allclose(reverse[:2], result.sum[:2], rtol=1e-2)

    def test_any_heads_on_both_sides(self):
        student, teacher = record(0, heads=2, width=6), record(1, heads=4, width=12)
        student.query.retain_grad()
        pair = student.concatenated("query"), teacher.concatenated("query")
        assert [one.shape[-1] for one in pair] == [12, 48]
        relation_loss(*pair, mask_of(), relation_heads=6).sum.sum().backward()
        assert student.query.grad.abs().sum() > 0

    def test_one_relation_head_does_not_tell_attention_heads_apart(self):
        student, teacher, mask = record(0), record(1), mask_of()
        turned = student._replace(query=student.query[:, [1, 2, 0]])
        for heads, is_same in ((1, True), (3, False)):
            one, other = (
                relation_loss(
                    each.concatenated("query"), teacher.concatenated("query"), mask, relation_heads=heads
                ).sum
                for each in (student, turned)
            )
            assert torch.allclose(one, other, rtol=1e-4) == is_same

    def test_some_heads_at_a_time_give_the_same(self, monkeypatch):
        student, teacher, mask = states(0, 12).requires_grad_(), states(1, 24), mask_of()
        results = []
        for limit in (1, 200, 1 << 20):
            monkeypatch.setattr(losses, "_SCORES_AT_ONCE", limit)
            result = relation_loss(student, teacher, mask, relation_heads=6).sum
            results.append((result, *torch.autograd.grad(result.sum(), student)))
        for other in results[1:]:
            for one, same in zip(results[0], other, strict=True):
                torch.testing.assert_close(one, same)

    def test_hold_no_scores_of_all_heads(self, monkeypatch):
        monkeypatch.setattr(losses, "_SCORES_AT_ONCE", 1)
        student, teacher, mask = (
            states(0, 12, length=40).requires_grad_(),
            states(1, 12, length=40),
            mask_of((40, 9, 4)),
        )
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
            relation_loss(student, teacher, mask, relation_heads=6)
        # Scores of no head are kept for the backward pass, and those of one are made at a time.
        assert not any(len(shape) == 4 and shape[-2:] == (40, 40) and shape[1] > 1 for shape in kept)

    @pytest.mark.parametrize("heads", [0, 5, 24])
    def test_heads_that_do_not_divide_both_widths_are_refused(self, heads):
        message = f"relation_heads={heads} has to divide.*student, 12,.*teacher, 24: choose a divisor of 12"
        with pytest.raises(InputError, match=message):
            relation_loss(states(0, 12), states(1, 24), mask_of(), relation_heads=heads)
        with pytest.raises(InputError, match=message):
            check_relation_heads(heads, student_width=12, teacher_width=24)

    def test_documents_of_a_row_are_as_if_alone(self):
        student, teacher = states(0, 12, length=8, batch=1), states(1, 24, length=8, batch=1)
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
        packed = relation_loss(student, teacher, (documents >= 0).long(), relation_heads=3, document_ids=documents)
        alone = [
            relation_loss(student[:, part], teacher[:, part], torch.ones(1, part.stop - part.start), relation_heads=3)
            for part in (slice(0, 3), slice(3, 7))
        ]
        torch.testing.assert_close(packed.sum, alone[0].sum + alone[1].sum)
        assert packed.count == alone[0].count + alone[1].count


class TestAttentionDistributions:
    @pytest.mark.parametrize("bias", [False, True])
    def test_are_divergences_over_real_keys(self, bias):
        student, teacher, mask = record(0, bias=bias), record(1, width=8), mask_of()
        result = attention_distribution_loss(student, teacher, mask)
        expected = torch.zeros(3)
        for row, length in enumerate(LENGTHS):
            for head in range(3):
                for i in range(length):
                    scores = [one.scores()[row, head, i, :length] for one in (teacher, student)]
                    expected[row] += divergence(*scores).detach()
        torch.testing.assert_close(result.sum, expected, rtol=1e-4, atol=1e-5)
        assert result.count.tolist() == [3.0 * length for length in LENGTHS]

    def test_are_the_query_key_relations_of_as_many_heads(self):
        # A relation of states to themselves is an attention whose queries are its keys.
        student, teacher = record(0), record(1)
        alike = [one._replace(key=one.query) for one in (student, teacher)]
        relation = [one.concatenated("query") for one in (student, teacher)]
        torch.testing.assert_close(
            attention_distribution_loss(*alike, mask_of()).sum,
            relation_loss(*relation, mask_of(), relation_heads=3).sum,
        )

    def test_do_not_see_a_shift_of_all_scores(self):
        student, teacher = record(0), record(1)
        shifted = student._replace(bias=torch.randn(3, 3, 6, 1))
        losses_of = [attention_distribution_loss(one, teacher, mask_of()).sum for one in (student, shifted)]
        torch.testing.assert_close(*losses_of, rtol=1e-4, atol=1e-5)

    def test_other_numbers_of_heads_are_refused(self):
        with pytest.raises(InputError, match="3 attention heads cannot learn from the teacher's 2"):
            attention_distribution_loss(record(0), record(1, heads=2), mask_of())


CASES = {
    "relation": lambda student, teacher, mask: relation_loss(student, teacher, mask, relation_heads=3),
    "distribution": lambda student, teacher, mask: attention_distribution_loss(
        *(
            AttentionRecord(*[one.unflatten(-1, (3, -1)).transpose(1, 2)] * 3, scaling=0.5, bias=None)
            for one in (student, teacher)
        ),
        mask,
    ),
}


class TestPadding:
    @pytest.mark.parametrize("name", CASES)
    def test_counts_for_nothing(self, name):
        student, teacher, mask = states(0, 12).requires_grad_(), states(1, 12), mask_of()
        short = CASES[name](student, teacher, mask)
        grad = torch.autograd.grad(short.sum.sum(), student)[0]
        assert torch.equal(grad[mask == 0], torch.zeros_like(grad[mask == 0]))
        assert grad[mask == 1].abs().sum(-1).count_nonzero() == 9
        longer = [torch.nn.functional.pad(one, (0, 0, 0, 4), value=30.0) for one in (student, teacher)]
        long = CASES[name](*longer, mask_of(width=10))
        torch.testing.assert_close(long.sum, short.sum, rtol=1e-5, atol=1e-6)
        assert torch.equal(long.count, short.count)

    @pytest.mark.parametrize("name", CASES)
    def test_everywhere_gives_zero_with_a_graph(self, name):
        student = states(0, 12).requires_grad_()
        result = CASES[name](student, states(1, 12), torch.zeros(3, 6, dtype=torch.long))
        assert result.sum.tolist() == result.count.tolist() == [0.0] * 3
        result.sum.sum().backward()
        assert torch.equal(student.grad, torch.zeros_like(student.grad))

    @pytest.mark.parametrize("name", CASES)
    def test_a_student_like_its_teacher_has_no_loss(self, name):
        one = states(0, 12)
        assert not CASES[name](one, one, mask_of()).sum.any()

    @pytest.mark.parametrize("name", CASES)
    def test_precision_is_full_under_autocast(self, name):
        student, teacher, mask = states(0, 12).requires_grad_(), states(1, 12), mask_of()
        expected = CASES[name](student, teacher, mask).sum
        exact = torch.autograd.grad(expected.sum(), student)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = CASES[name](student, teacher, mask).sum
        assert torch.equal(result, expected)
        assert torch.equal(torch.autograd.grad(result.sum(), student)[0], exact)
