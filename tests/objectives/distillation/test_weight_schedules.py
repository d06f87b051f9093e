"""Every weight may be a schedule, from the command line to the step."""

from dataclasses import fields

import pytest
import torch

from helpers.distilled import ALL
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import DistillationTrainingArguments, TaskDistillationTrainingArguments
from hf_pretrain.training.parsing import parse_arguments
from method_matrix import build


@pytest.mark.parametrize("arguments", [DistillationTrainingArguments, TaskDistillationTrainingArguments])
def test_every_loss_has_a_weight_with_a_help(arguments):
    options = {field.name: field for field in fields(arguments)}
    for name in arguments.loss_names:
        option = options[f"{name}_weight"]
        assert option.default is None and len(option.metadata["help"]) > 20
        # A loss that is off at the end, or at the start, is computed nevertheless.
        args = arguments(output_dir="unused", bf16=False, **{f"{name}_weight": "0:1, 5:0"})
        assert name in args.weights()
        args = arguments(output_dir="unused", bf16=False, **{f"{name}_weight": "0:0, 5:1"})
        assert name in args.weights()


def test_from_the_command_line(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--relation_kk_weight", "0%:1, 100%:0", "--cosine_weight", "3"]
    *_, args = parse_arguments(distil.arguments, argv, prog="distil", description="")
    assert args.relation_kk_weight.at(1, 4) == 0.75
    assert args.weights()["cosine"] == 3.0


@pytest.mark.parametrize("name", sorted(set(ALL) - {"prediction", "mlm"}))
def test_the_weight_is_that_of_the_step(tmp_path, name):
    """Of two losses, one is off at the first step and on at the second."""
    weights = {f"{other}_weight": 0.0 for other in ALL} | {"mlm_weight": 1.0}
    schedule = {f"{name}_weight": "0:0, 1:2"}
    model_options = {"hidden_size": 48}
    scheduled = build(distil, tmp_path / "a", max_steps=2, model_options=model_options, **weights | schedule)
    scheduled.train()
    rows = [row for row in scheduled.state.log_history if "loss" in row]
    for weight, row in zip((0.0, 2.0), rows, strict=True):
        assert row[f"{name}_weight"] == weight
        assert row["loss"] == pytest.approx(row["mlm_loss"] + weight * row[f"{name}_loss"], rel=1e-5)
    plain = build(distil, tmp_path / "b", model_options=model_options, **weights)
    plain.train()
    for parameter, gradient in plain.recorder.gradients[0].items():
        torch.testing.assert_close(scheduled.recorder.gradients[0][parameter], gradient, rtol=1e-4, atol=1e-6)
