"""What is chosen: presets, schedules, what is frozen, and what is refused at construction."""

from dataclasses import fields

import pytest
import torch
from transformers import BertForMaskedLM, BertModel

from helpers.distilled import ALL, bert, collator, examples, pair
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import DistillationTrainingArguments, join
from hf_pretrain.objectives.distillation.arguments import RELATIONS
from method_matrix import build


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
