"""Where bf16 pays, and that it is really computed in."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from helpers.method_matrix import build, programs
from hf_pretrain.training.arguments import bf16_is_fast

PROGRAMS = programs()
# A small divergence of two predictions would be lost in the rounding of 16-bit logits.
LOGITS_IN_FP32 = {"distil", "distil-task"}


@pytest.fixture
def device(monkeypatch):
    """Pretend that the machine has an accelerator of a type, or none."""

    def pretend(name):
        found = None if name is None else torch.device(name)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)

    return pretend


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_a_cpu_is_fast_with_either_kind_of_matrix_unit(device, monkeypatch, avx512, amx):
    device(None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert bf16_is_fast() is (avx512 or amx)


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_fast_if_it_does_not_emulate(device, monkeypatch, supported):
    device("cuda")

    def is_supported(including_emulation=True):
        return True if including_emulation else supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert bf16_is_fast() is supported


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_elsewhere_it_has_to_be_asked_for(device, name):
    device(name)
    assert bf16_is_fast() is False


def linear_types(trainer, run):
    """Return the types that the linear layers put out while `run` runs."""
    seen, hooks = set(), []
    for module in trainer.model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):  # Conv1D is GPT-2's linear layer
            hooks.append(module.register_forward_hook(lambda module, args, output: seen.add(output.dtype)))
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("method", sorted(PROGRAMS))
@pytest.mark.parametrize(("bf16", "expected"), [(True, {torch.bfloat16}), (False, {torch.float32})])
def test_the_forward_computes_in_the_type_that_was_chosen(tmp_path, method, bf16, expected):
    trainer = build(PROGRAMS[method], tmp_path, bf16=bf16)
    expected = expected | {torch.float32} if method in LOGITS_IN_FP32 else expected
    assert linear_types(trainer, trainer.evaluate) == expected
    assert linear_types(trainer, trainer.train) == expected
    # The evaluation behind the training is that of the export.
    assert linear_types(trainer, trainer.evaluate) == expected
    # Weights, gradients and what is logged stay in full precision.
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in trainer.recorder.gradients[0].values()} == {torch.float32}
