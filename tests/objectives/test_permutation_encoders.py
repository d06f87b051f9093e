"""Permutation language modelling of stock encoders: gradients of all parameters, precision, checkpointing."""

import pytest
import torch

from helpers.method_matrix import TINY, tiny_tokenizer
from helpers.permuted_batches import permuted
from hf_pretrain.objectives.permutation_lm import PermutationLMForPreTraining, PermutationLMModelArguments


def encoder(kind, **options):
    torch.manual_seed(0)
    args = PermutationLMModelArguments(**{**TINY, "model_type": kind, **options})
    return PermutationLMForPreTraining.from_arguments(args, tiny_tokenizer())


def labelled_inputs():
    batch = permuted(segments=False)
    labels = batch.input_ids.gather(1, batch.target_columns)
    return {name: value for name, value in batch._asdict().items() if value is not None} | {"labels": labels}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "albert", "distilbert", "modernbert"])
def test_every_parameter_of_an_encoder_has_a_gradient(kind):
    model = encoder(kind)
    model(**labelled_inputs()).losses["plm"].sum.sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_encoder_runs_in_bf16_weights_and_in_autocast(kind):
    exact = encoder(kind).eval()(**labelled_inputs()).losses["plm"].sum
    for model, is_mixed in ((encoder(kind).eval(), True), (encoder(kind).eval().to(torch.bfloat16), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            found = model(**labelled_inputs()).losses["plm"].sum
        assert found.dtype == torch.float32 and not torch.equal(found, exact)
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=0)
        found.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "part"), [("bert", "encoder.layer.0.intermediate"), ("modernbert", "layers.0.mlp.Wi")]
)
def test_checkpointing_an_encoder_changes_no_gradient(kind, part):
    gradients = []
    for is_on in (False, True):
        model, calls = encoder(kind, config_overrides=None).train(), []
        if is_on:
            model.activation_checkpointing_enable()
        module = model.model.base_model.get_submodule(part)
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        model(**labelled_inputs()).losses["plm"].sum.sum().backward()
        assert len(calls) == 1 + is_on
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
