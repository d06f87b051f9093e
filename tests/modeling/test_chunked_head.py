"""A head with its cross-entropy in chunks: equal to the dense computation, and no larger than a chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.causal_models import CHANGED_LOGITS, OWN_SIZES, causal_lm
from helpers.made_tensors import MadeTensors
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.kernels import OutputMap, linear_cross_entropy
from hf_pretrain.modeling.visibility.causal import causal_body
from hf_pretrain.objectives.causal_lm.modeling import ChunkedHead

T, D, V = 23, 8, 50


def material(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(size, generator=generator) for size in ((T, D), (V, D), (V,)))
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[[0, 7, 8, T - 1]] = -100
    return [value.to(dtype).requires_grad_() for value in (states, weight, bias)], targets


def dense(states, weight, bias, targets):
    return F.cross_entropy(F.linear(states, weight, bias).float(), targets, reduction="none")


@pytest.mark.parametrize("rows", [1, 4, 23, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_losses_and_gradients_are_those_of_the_dense_head(rows, with_bias):
    (states, weight, bias), targets = material()
    bias = bias if with_bias else None
    inputs = [states, weight] + ([bias] if with_bias else [])
    expected = dense(states, weight, bias, targets)
    found = linear_cross_entropy(states, weight, targets, bias=bias, chunk_logits=rows * V)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and not found[targets == -100].any()
    # Neither the sum nor the scale is known to the forward pass.
    wanted = torch.autograd.grad(0.37 * expected.sum(), inputs)
    for gradient, right in zip(torch.autograd.grad(0.37 * found.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_has_no_gradient_and_changes_no_other(frozen):
    inputs, targets = material()
    inputs[frozen].requires_grad_(False)
    found = []
    for losses in (dense(*inputs, targets), linear_cross_entropy(*inputs[:2], targets, bias=inputs[2])):
        losses.sum().backward()
        found.append([value.grad for value in inputs])
        for value in inputs:
            value.grad = None
    for right, gradient in zip(*found, strict=True):
        assert (gradient is None) == (right is None)
        assert gradient is None or torch.allclose(gradient, right, atol=1e-5)
    assert found[1][frozen] is None


def test_a_tied_table_gets_both_gradients():
    (_, weight, _), targets = material()
    ids = torch.arange(T) % V
    gradients = []
    for loss in (dense, lambda states, weight, bias, targets: linear_cross_entropy(states, weight, targets)):
        gradients += torch.autograd.grad(loss(F.embedding(ids, weight), weight, None, targets).sum(), [weight])
    torch.testing.assert_close(*gradients)


def test_weights_of_single_positions_are_refused_and_a_second_backward_too():
    (states, weight, bias), targets = material()
    losses = linear_cross_entropy(states, weight, targets, bias=bias)
    with pytest.raises(RuntimeError, match="weighted differently"):
        (losses * torch.arange(T)).sum().backward()
    losses = linear_cross_entropy(states, weight, targets, bias=bias).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run backward once"):
        losses.backward()


def test_under_autocast_it_rounds_as_the_dense_head_does():
    (states, weight, bias), targets = material()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = dense(states, weight, bias, targets)
        found = linear_cross_entropy(states, weight, targets, bias=bias, chunk_logits=5 * V)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    inputs = [states, weight, bias]
    exact = torch.autograd.grad(dense(*inputs, targets).sum(), inputs)
    rounded = torch.autograd.grad(expected.sum(), inputs)
    for gradient, near, right in zip(torch.autograd.grad(found.sum(), inputs), rounded, exact, strict=True):
        assert gradient.dtype == torch.float32
        # The sums over chunks are in fp32, so it is no further from the exact gradient.
        assert (gradient - right).norm() <= 1.2 * (near - right).norm() + 1e-6


def test_weights_in_bfloat16_have_gradients_in_bfloat16():
    inputs, targets = material(torch.bfloat16)
    found = torch.autograd.grad(linear_cross_entropy(*inputs[:2], targets, bias=inputs[2]).sum(), inputs)
    expected = torch.autograd.grad(dense(*inputs, targets).sum(), inputs)
    for gradient, right in zip(found, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - right).norm() < 0.02 * right.norm()


def test_no_targets_have_no_loss():
    (states, weight, bias), targets = material()
    loss = linear_cross_entropy(states[:0], weight, targets[:0], bias=bias).sum()
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any()


def test_no_more_logits_exist_than_a_chunk_and_none_of_the_gradients_without_grad():
    (states, weight, bias), targets = material()
    with MadeTensors() as largest:
        linear_cross_entropy(states, weight, targets, bias=bias, chunk_logits=9 * V).sum().backward()
    assert largest.most == 9 * V and (T, V) not in largest.shapes
    with torch.no_grad(), MadeTensors() as largest:
        linear_cross_entropy(states, weight, targets, bias=bias, chunk_logits=V)
    # Neither the gradient of the weight nor its scale.
    assert largest.most <= V * D and (T, D) not in largest.shapes


def test_its_products_are_counted():
    (states, weight, bias), targets = material()
    counted = []
    for loss in (dense, lambda *inputs: linear_cross_entropy(*inputs[:2], targets, bias=bias)):
        with FlopCounterMode(display=False) as counter:
            loss(states, weight, bias, targets).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 2 * T * D * V


# The heads of stock models


def head_of(model, **options):
    return ChunkedHead(model, causal_body(model), **options)


def tried(model):
    found = OutputMap(model)
    assert found.find() is None
    with found.watched() as watch:
        watch(head_of(model).logits(torch.randn(3, 32)))
    with found.watched() as watch:
        assert watch is None
    return found


@pytest.mark.parametrize("model_type", OWN_SIZES)
def test_a_trial_finds_out_which_heads_end_in_a_linear_map(model_type):
    model = causal_lm(model_type)
    head, found = head_of(model), tried(model)
    assert (found.find() is not None) == (model_type not in CHANGED_LOGITS)
    if found.find() is not None:
        states = torch.randn(5, 32)
        with torch.no_grad():
            with found.left_out():
                read = head.logits(states)
            assert torch.equal(F.linear(read, *found.find()), head.logits(states))
    head.check(torch.arange(4, 20).view(2, 8))
    # The stock model is as it was.
    assert "forward" not in vars(causal_body(model)) and not model.training
    assert "forward" not in vars(model.get_output_embeddings()) and not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("scale", [1e-4, 0.0])
def test_small_weights_do_not_hide_a_soft_cap(scale):
    model = causal_lm("gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    assert tried(model).find() is None


class EndsIn(GPT2LMHeadModel):
    """Does something to the logits that leaves them where they are, or that changes nothing."""

    after = staticmethod(lambda logits: logits)

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids, **inputs)
        output.logits = self.after(output.logits)
        return output


@pytest.mark.parametrize(
    ("after", "is_map"),
    [
        (lambda logits: logits, True),
        (lambda logits: logits.view(*logits.shape), True),
        (lambda logits: logits.mul_(2), False),
        (lambda logits: logits + 0, False),
        (lambda logits: logits[..., :50], False),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_done_to_the_logits_is_seen_also_where_there_are_no_numbers(after, is_map, device):
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
    with torch.device(device):
        model = EndsIn(config)
        model.after = after
        found, ids = OutputMap(model), torch.zeros(1, 4, dtype=torch.long)
        with found.watched() as watch:
            watch(model(ids).logits)
        assert (found.find() is not None) == is_map


def test_a_table_with_hooks_or_of_another_class_is_left_alone():
    model = causal_lm("gpt2")
    found, table = tried(model), model.get_output_embeddings()
    hook = table.register_forward_hook(lambda module, args, out: 2 * out)
    assert found.find() is None
    hook.remove()
    assert found.find() is not None
    with torch.autocast("cpu", dtype=torch.float16):
        assert found.find() is None
    table.__class__ = type("Another", (torch.nn.Linear,), {})
    assert found.find() is None


@pytest.mark.parametrize("model_type", ["gpt2", "modernbert-decoder", "gemma2", "cohere"])
def test_a_head_in_chunks_is_the_head_as_a_whole(model_type):
    model = causal_lm(model_type)
    states = torch.randn(13, 32, requires_grad=True)
    targets = torch.arange(13) + 4
    targets[3] = -100
    inputs = [
        states,
        *(value for name, value in model.named_parameters() if "layers" not in name and ".h." not in name),
    ]
    whole = F.cross_entropy(head_of(model).logits(states).float(), targets, reduction="none")
    expected = torch.autograd.grad(2.5 * whole.sum(), inputs, allow_unused=True)
    head = head_of(model, chunk_logits=4 * 60)
    head.check(torch.arange(4, 20).view(2, 8))
    head(states.detach(), targets)
    with MadeTensors() as largest:
        found = head(states, targets, with_guesses=True)
        gradients = torch.autograd.grad(2.5 * found.nll.sum(), inputs, allow_unused=True)
    assert (13, 60) not in largest.shapes and (1, 13, 60) not in largest.shapes and largest.most <= 60 * 32
    torch.testing.assert_close(found.nll, whole, rtol=1e-5, atol=1e-5)
    for gradient, right in zip(gradients, expected, strict=True):
        assert (gradient is None) == (right is None)
        assert gradient is None or (gradient - right).abs().max() <= 1e-5 * (1 + right.abs().max())
    with torch.no_grad():
        assert torch.equal(found.guesses, head.logits(states).argmax(-1))
        torch.testing.assert_close(head(states, targets).nll, whole, rtol=1e-5, atol=1e-5)


def test_float16_leaves_the_gradient_to_autograd_which_scales_it_first():
    model = causal_lm("gpt2")
    head, states, targets = head_of(model), torch.randn(3, 32, requires_grad=True), torch.tensor([4, 5, 6])
    with torch.autocast("cpu", dtype=torch.float16):
        loss = head(states, targets).nll.sum()
    assert "LinearCrossEntropy" not in str(loss.grad_fn.next_functions)
    (gradient,) = torch.autograd.grad(1024 * loss, [states])
    assert gradient.any()


class ReadsTokens(GPT2LMHeadModel):
    """Its logits depend on more than the states."""

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids, **inputs)
        output.logits = output.logits + F.one_hot(input_ids, self.config.vocab_size)
        return output


def test_a_head_that_reads_more_than_states_is_refused():
    model = ReadsTokens(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3))
    with pytest.raises(InputError, match="ReadsTokens cannot be trained a chunk of positions at a time"):
        head_of(model).check(torch.arange(4, 20).view(2, 8))
