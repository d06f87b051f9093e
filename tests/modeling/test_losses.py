"""The losses against their definitions."""

import math

import pytest
import torch

from hf_pretrain.modeling.losses import IGNORED, binary_token_loss, masked_lm_accuracy, masked_lm_loss

SHAPE = torch.Size((3, 8))
# Two targets in row 0, none in row 1, one in row 2, then a filler that points into row 1.
WHERE = {"positions": torch.tensor([0, 7, 17, 9]), "shape": SHAPE}
TARGETS = torch.tensor([4, 0, 2, IGNORED])


def test_zero_logits_cost_the_logarithm_of_the_vocabulary():
    loss = masked_lm_loss(torch.zeros(4, 11), TARGETS, **WHERE)
    torch.testing.assert_close(loss.sum, torch.tensor([2.0, 0.0, 1.0]) * math.log(11))
    assert loss.count.tolist() == [2, 0, 1]


def test_masked_lm_loss_by_hand():
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    p = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    loss = masked_lm_loss(logits, TARGETS, **WHERE)
    expected = torch.stack([-p[0, 4].log() - p[1, 0].log(), torch.zeros(()), -p[2, 2].log()])
    torch.testing.assert_close(loss.sum.double(), expected, atol=0, rtol=1e-6)


def test_a_filler_has_no_gradient():
    logits = torch.randn(4, 11, requires_grad=True)
    masked_lm_loss(logits, TARGETS, **WHERE).sum.sum().backward()
    assert logits.grad[:3].abs().sum(-1).min() > 0
    assert not logits.grad[3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_fp32(dtype):
    """In the logits' own type the sum of 512 terms would stick."""
    count = 512
    logits = torch.randn(count, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    targets = torch.arange(count) % 64
    loss = masked_lm_loss(logits, targets, positions=torch.arange(count), shape=torch.Size((1, count)))
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert loss.sum.dtype == loss.count.dtype == torch.float32
    assert float(loss.sum) == pytest.approx(float(exact), rel=1e-5)
    scores = logits[:, :1]
    binary = binary_token_loss(scores, torch.ones(count, 1), mask=torch.ones(count, 1, dtype=torch.long))
    exact = torch.nn.functional.softplus(-scores.double()).sum()
    assert binary.sum.dtype == torch.float32
    assert float(binary.sum.sum()) == pytest.approx(float(exact), rel=1e-5)


def test_accuracy_counts_targets_only():
    right = masked_lm_accuracy(torch.tensor([4, 1, 2, IGNORED]), TARGETS, **WHERE)
    assert right.count.tolist() == [2, 0, 1]
    # The filler "predicts" what stands in its label; row 1 must not gain a hit without a target.
    right = masked_lm_accuracy(torch.tensor([4, 1, 2, 5]), TARGETS, **WHERE)
    assert right.sum.tolist() == [1, 0, 1]


def test_binary_loss_by_hand_over_real_tokens_only():
    logits = torch.tensor([[0.0, 2.0, -1.0, 50.0], [0.5, 9.0, 9.0, 9.0]])
    labels = torch.tensor([[0, 1, 0, 1], [1, 0, IGNORED, IGNORED]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    loss = binary_token_loss(logits, labels, mask=mask)

    def cost(logit, label):
        return -math.log(1 / (1 + math.exp(-logit if label else logit)))

    expected = [cost(0, 0) + cost(2, 1) + cost(-1, 0), cost(0.5, 1)]
    torch.testing.assert_close(loss.sum, torch.tensor(expected))
    assert loss.count.tolist() == [3, 1]


def test_zero_logits_of_a_decision_cost_ln_2():
    loss = binary_token_loss(torch.zeros(2, 5), torch.eye(2, 5), mask=torch.ones(2, 5))
    torch.testing.assert_close(loss.sum, torch.full((2,), 5 * math.log(2)))


def test_binary_loss_is_finite_for_a_certain_model():
    logits = torch.full((1, 2), 1e4, requires_grad=True)
    loss = binary_token_loss(logits, torch.tensor([[0, 1]]), mask=torch.ones(1, 2))
    assert loss.sum.tolist() == [1e4]
    loss.sum.backward()
    assert logits.grad.tolist() == [[1.0, 0.0]]


def test_padding_has_no_gradient():
    logits = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    binary_token_loss(logits, torch.zeros(2, 4), mask=mask).sum.sum().backward()
    assert torch.equal(logits.grad != 0, mask.bool())
