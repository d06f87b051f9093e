"""The options of distillation: which layers are compared, which losses have an effect, and weights with a schedule."""

from dataclasses import fields

import pytest
import torch
from transformers import BertForMaskedLM, BertModel

from helpers.distilled import ALL, bert, collator, examples, pair
from helpers.method_matrix import build
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import DistillationTrainingArguments, TaskDistillationTrainingArguments, join
from hf_pretrain.objectives.distillation.arguments import RELATIONS, layer_map
from hf_pretrain.training.parsing import parse_arguments


class TestFrozen:
    """What no loss reaches is frozen: distributed training would wait for its gradient."""

    @pytest.mark.parametrize("method", ["distilbert", "tinybert", "minilm", "minilmv2"])
    def test_what_is_not_frozen_gets_a_gradient(self, method):
        model_class = BertForMaskedLM if method == "distilbert" else BertModel
        args = DistillationTrainingArguments(output_dir="unused", bf16=False, distillation_method=method)
        joined = join(bert(model_class, seed=1), bert(model_class, num_hidden_layers=4), args)
        masking = args.masking
        losses = joined(**collator(masking=masking)(examples())).losses
        sum(loss.sum.sum() for loss in losses.values()).backward()
        for name, parameter in joined.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name
        frozen = {name for name, parameter in joined.named_parameters() if not parameter.requires_grad}
        assert bool(frozen) == method.startswith("minilm")
        assert all(".encoder.layer.1." in name for name in frozen)

    def test_an_encoder_alone_has_no_pooler(self):
        joined = pair("hidden", student=bert(BertModel), teacher=bert(BertModel, num_hidden_layers=4))
        assert joined.student.pooler is None and joined.config.head == "none"


class TestOptions:
    def test_presets_and_what_wins_over_them(self):
        args = DistillationTrainingArguments(output_dir="unused", bf16=False)
        assert (args.weights(), args.temperature, args.mlm_probability) == (
            {"prediction": 5.0, "mlm": 2.0, "cosine": 1.0},
            2.0,
            0.15,
        )
        args = DistillationTrainingArguments(
            output_dir="unused", bf16=False, distillation_method="tinybert", hidden_weight=0.0, relation_qq_weight=0.5
        )
        assert args.weights() == {"embedding": 1.0, "attention": 1.0, "relation_qq": 0.5}
        assert (args.temperature, args.mlm_probability) == (1.0, 0.0)
        scheduled = DistillationTrainingArguments(
            output_dir="unused", bf16=False, distillation_method="minilmv2", mlm_weight="0:0, 10:1"
        )
        assert "mlm" in scheduled.weights() and scheduled.mlm_probability == 0.15

    def test_every_loss_has_its_option(self):
        names = {field.name for field in fields(DistillationTrainingArguments)}
        assert {f"{name}_weight" for name in ALL} <= names

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must be at least 0"),
            ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
            ({"teacher_layer": 0}, "teacher_layer=0 must be at least 1"),
            ({"mlm_probability": 0.0}, "mlm_probability=0 leaves no target for the mlm and prediction loss"),
            ({"distillation_method": "tinyberd"}, "distillation_method='tinyberd'"),
            ({"prediction_weight": 0.0, "mlm_weight": 0.0, "cosine_weight": 0.0}, "all losses have weight 0"),
        ],
    )
    def test_bad_values_are_refused(self, options, match):
        with pytest.raises(InputError, match=match):
            DistillationTrainingArguments(output_dir="unused", bf16=False, **options)

    @pytest.mark.parametrize("name", ["attention", "attention_distribution", "value_relation"])
    def test_other_heads_are_refused_with_a_proposal(self, name):
        """Relations train where attention cannot."""
        heads = {"teacher": bert(num_attention_heads=4)}
        with pytest.raises(InputError, match="relation"):
            pair(name, **heads)
        losses = pair("relation_qq", "relation_kk", "relation_vv", **heads)(**collator()(examples())).losses
        assert set(losses) < set(RELATIONS)

    @pytest.mark.parametrize(
        ("names", "options", "match"),
        [
            (("hidden",), {"layer_map": "1,5"}, "layer_map"),
            (("hidden",), {"layer_map": "4,1"}, "layer_map"),
            (("hidden",), {"teacher": bert(num_hidden_layers=3)}, "uniform"),
            (("relation_qq",), {"relation_heads": 5}, "relation_heads=5"),
            (("relation_qq",), {"teacher_layer": 5}, "teacher_layer=5: the teacher has 4"),
            (("prediction",), {"teacher": bert(vocab_size=70)}, "60 tokens and the teacher 70"),
            (("prediction",), {"teacher": bert(BertModel)}, "both need the same task"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, names, options, match):
        with pytest.raises(InputError, match=match):
            pair(*names, **options)

    def test_a_scheduled_temperature_is_that_of_the_step(self, tmp_path):
        seen = []
        trainer = build(distil, tmp_path, max_steps=3, temperature="0:8, 2:2")
        trainer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("temperature")), with_kwargs=True)
        trainer.train()
        assert [float(value) for value in seen] == [8.0, 5.0, 2.0]
        trainer.evaluate()
        assert seen[-1] is None


class TestTemperature:
    def test_its_square_keeps_the_size_of_the_gradient(self):
        norms = []
        for temperature in (1.0, 4.0, 16.0):
            joined = pair("prediction", temperature=temperature, teacher=bert(seed=7))
            joined(**collator()(examples())).losses["prediction"].sum.sum().backward()
            norms.append(torch.stack([p.grad.norm() for p in joined.parameters() if p.grad is not None]).norm())
        assert max(norms) < 1.35 * min(norms)


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),
        ("uniform", 3, 3, (1, 2, 3)),
        ("last", 4, 12, (9, 10, 11, 12)),
        ("3,6,9,12", 4, 12, (3, 6, 9, 12)),
        (" 1, 5", 2, 6, (1, 5)),
        ([2, 2, 4], 3, 4, (2, 2, 4)),
        ("21", 1, 24, (21,)),
    ],
)
def test_maps(spec, student, teacher, expected):
    assert layer_map(spec, student_layers=student, teacher_layers=teacher) == expected


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "message"),
    [
        ("uniform", 5, 12, "'uniform': 5 student layers do not divide 12 teacher layers"),
        ("uniform", 12, 4, "do not divide"),
        ("last", 6, 4, "leaves the teacher's layers, 1 to 4"),
        ("3,6", 3, 12, "has 2 entries for 3 student layers"),
        ("3,6,13", 3, 12, "leaves the teacher's layers, 1 to 12"),
        ([0, 6, 12], 3, 12, "leaves the teacher's layers"),
        ("6,3,9", 3, 12, "falls"),
        ("first", 3, 12, "'first' is unknown: use 'uniform', 'last'"),
        ("", 3, 12, "is unknown"),
    ],
)
def test_refusals(spec, student, teacher, message):
    with pytest.raises(InputError, match=message):
        layer_map(spec, student_layers=student, teacher_layers=teacher)


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
