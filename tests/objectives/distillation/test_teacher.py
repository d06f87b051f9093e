"""The teacher: asked, never trained, never saved, no deeper than needed; and logits that 16 bits do not round."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
)

from helpers.method_matrix import TINY, VOCAB_SIZE, build, tiny_teacher, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.observing.outputs import ModelRunner, OutputRequest
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import DistillationTrainingArguments, StudentArguments, join
from hf_pretrain.objectives.distillation.building import load_teacher
from hf_pretrain.objectives.distillation.modeling import Teacher

SIZES = {**TINY, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 4}


def model(model_class=BertForMaskedLM, **sizes):
    torch.manual_seed(0)
    return model_class(BertConfig(**{**SIZES, **sizes})).eval()


def batch(rows=2, length=8):
    ids = torch.arange(rows * length).reshape(rows, length) % 50 + 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_it_is_no_part_of_what_is_trained(tmp_path):
    trainer = build(distil, tmp_path, max_steps=10, save_strategy="steps", save_steps=10, learning_rate=1e-2)
    teacher = trainer.model.teacher
    before = copy.deepcopy(teacher.model.state_dict())
    trainer.train()
    assert trainer.model.training and not any(module.training for module in teacher.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.model.parameters())
    theirs = {id(parameter) for parameter in teacher.model.parameters()}
    assert not theirs & {id(parameter) for parameter in trainer.model.parameters()}
    assert not theirs & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"student", "projections"}
    wide = {tuple(value.shape) for value in names.values() if 48 in value.shape}
    # Of the teacher's width there is nothing but what the student is projected to.
    assert wide == {(48, 32)}


def test_one_that_comes_in_training_mode_is_frozen_and_put_into_evaluation_mode(tmp_path):
    """As it comes from a Trainer that fine-tuned it."""
    teacher = model().train()
    join(model(num_hidden_layers=2), teacher, DistillationTrainingArguments(output_dir=str(tmp_path), bf16=False))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_it_answers_without_dropout_and_without_a_graph(tmp_path):
    trainer = build(distil, tmp_path, model_options={"config_overrides": None})
    trainer.model.train()
    examples = [trainer.train_dataset[i] for i in range(4)]
    inputs = trainer.data_collator(examples)
    positions, labels = inputs.pop("target_positions"), inputs.pop("labels")
    assert labels.shape == inputs["input_ids"].shape
    teacher = trainer.model.teacher
    first, second = teacher(inputs, positions), teacher(inputs, positions)
    assert torch.equal(first.logits, second.logits) and not first.logits.requires_grad
    for layer, states in first.hidden.items():
        assert torch.equal(states, second.hidden[layer]) and not states.requires_grad
    assert not any(record.query.requires_grad for record in first.attention.values())


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"distillation_method": "minilmv2", "teacher_layer": 2}, 2),
        ({"distillation_method": "tinybert", "layer_map": "1,3"}, 3),
        ({"distillation_method": "minilm", "embedding_weight": 1.0}, 4),
        ({"distillation_method": "minilmv2", "embedding_weight": 1.0, "teacher_layer": 1}, 1),
    ],
)
def test_it_runs_no_deeper_than_the_losses_look(tmp_path, options, depth):
    teacher, ran = model(BertModel), []
    for number, layer in enumerate(teacher.encoder.layer, start=1):
        layer.attention.output.register_forward_hook(lambda *args, number=number: ran.append(number))
    args = DistillationTrainingArguments(output_dir=str(tmp_path), bf16=False, **options)
    joined = join(model(BertModel, num_hidden_layers=2), teacher, args)
    ran.clear()
    with torch.no_grad():
        joined(**batch())
    assert ran == list(range(1, depth + 1))


def test_logits_are_not_rounded_to_16_bits():
    """Not in the student under autocast, not in a teacher of bfloat16; a later cast restores nothing."""
    wanted = OutputRequest(logits=True)
    exact, student = model(), model()
    runner = ModelRunner(student, wanted, gathers=True)
    positions = torch.arange(10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = runner(student, batch(), positions).logits
    teacher = Teacher(copy.deepcopy(exact), wanted, gathers=True, dtype=torch.bfloat16)
    answers = teacher(batch(), positions).logits
    for found in (logits, answers):
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
        torch.testing.assert_close(found, exact(**batch()).logits.flatten(0, 1)[:10], atol=2e-2, rtol=0)


def test_a_copy_of_a_model_computes_its_own_logits():
    original = model()
    ModelRunner(original, OutputRequest(logits=True), gathers=False)
    copied = copy.deepcopy(original)
    with torch.no_grad():
        copied.get_output_embeddings().weight.zero_()
    assert original(**batch()).logits.abs().max() > 0.1
    assert torch.equal(copied(**batch()).logits, copied.get_output_embeddings().bias.expand(2, 8, -1))


def test_the_autocast_of_the_student_is_not_the_teachers():
    teacher = Teacher(model(), OutputRequest(hidden=(2,)), gathers=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = teacher(batch()).hidden[2]
    assert torch.equal(states, teacher(batch()).hidden[2])


@pytest.mark.parametrize(
    ("bf16", "chosen", "expected"),
    [(True, None, "bfloat16"), (False, None, "float32"), (False, "bfloat16", "bfloat16")],
)
def test_its_type(tmp_path, bf16, chosen, expected):
    args = DistillationTrainingArguments(output_dir=str(tmp_path), bf16=bf16, teacher_dtype=chosen)
    joined = join(model(num_hidden_layers=2), model(), args)
    assert joined.teacher.model.dtype == getattr(torch, expected)
    assert joined.student.dtype == torch.float32


class TestLoading:
    def load(self, auto_class, name):
        return load_teacher(
            StudentArguments(teacher_name_or_path=name), auto_class=auto_class, tokenizer=tiny_tokenizer()
        )

    def test_one_without_a_trained_head_is_refused(self):
        encoder = tiny_teacher(AutoModelForSequenceClassification).name
        with pytest.raises(InputError, match="no trained BertForMaskedLM.*minilmv2"):
            self.load(AutoModelForMaskedLM, encoder)
        masked = tiny_teacher(AutoModelForMaskedLM).name
        with pytest.raises(InputError, match="no trained BertForSequenceClassification.*fine-tune"):
            self.load(AutoModelForSequenceClassification, masked)

    def test_none_is_refused(self):
        with pytest.raises(InputError, match="teacher_name_or_path is missing"):
            self.load(AutoModelForMaskedLM, None)

    def test_another_tokenizer_is_refused(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["stranger"])
        args = StudentArguments(teacher_name_or_path=tiny_teacher(AutoModelForMaskedLM).name)
        with pytest.raises(InputError, match="stranger"):
            load_teacher(args, auto_class=AutoModelForMaskedLM, tokenizer=tokenizer)

    def test_the_student_itself_is_refused(self, tmp_path):
        one = model()
        with pytest.raises(InputError, match="are one model"):
            join(one, one, DistillationTrainingArguments(output_dir=str(tmp_path)))
