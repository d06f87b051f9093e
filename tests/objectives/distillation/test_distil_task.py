"""Task distillation: examples and labels, the teacher's cached answers, the two stages, batches of one length."""

import copy

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, RobertaConfig

from helpers.distilled import PREDICTION
from helpers.method_matrix import TINY, VOCAB_SIZE, as_task, build, collate, tiny_data, tiny_teacher, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import TASK_METHOD as distil_task
from hf_pretrain.objectives.distillation import (
    DataCollatorForTask,
    StudentArguments,
    TaskDistillationTrainingArguments,
    join,
)

SIZES = {**TINY, "vocab_size": VOCAB_SIZE}
INTERMEDIATE = {
    "training_stage": "intermediate",
    "cosine_weight": 0.0,
    "relation_vv_weight": 0.0,
    "labels_weight": 0.0,
}


def classifier(*, seed=0, **sizes):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "initializer_range": 0.2, "num_labels": 3, **sizes}))


def pair(student=None, teacher=None, **options):
    student = classifier(seed=1) if student is None else student
    teacher = classifier(num_hidden_layers=4, hidden_size=48) if teacher is None else teacher
    args = TaskDistillationTrainingArguments(**{"output_dir": "unused", "bf16": False, **options})
    return join(student, teacher, args).eval()


def batch(labels=None):
    rows = [{"input_ids": [2, *range(5, 5 + n), 3]} for n in (1, 4, 9)]
    if labels is not None:
        rows = [row | {"labels": label} for row, label in zip(rows, labels, strict=True)]
    return DataCollatorForTask(tiny_tokenizer())(rows)


class TestLosses:
    def test_predictions_of_whole_sequences(self):
        joined = pair(temperature=2.0)
        ours, theirs = (m(**batch()).logits / 2 for m in (joined.student, joined.teacher.model))
        kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1) * 4
        losses = joined(**batch()).losses
        torch.testing.assert_close(losses["prediction"].sum, kl)
        assert losses["prediction"].count.tolist() == [1, 1, 1] and set(losses) == {"prediction"}

    def test_labels_where_there_are_any(self):
        joined = pair(prediction_weight=0.0, labels_weight=1.0)
        inputs = batch(labels=[2, -100, 0])
        output = joined(**inputs)
        logits = joined.student(**{**inputs, "labels": None}).logits
        expected = torch.nn.functional.cross_entropy(logits, inputs["labels"], ignore_index=-100, reduction="none")
        torch.testing.assert_close(output.losses["labels"].sum, expected)
        assert output.losses["labels"].count.tolist() == [1, 0, 1]
        assert int(joined.count_targets(inputs)["labels"]) == 2
        assert output.metrics["accuracy"].count.tolist() == [1, 0, 1]

    def test_a_regression_learns_the_teachers_values(self):
        joined = pair(classifier(seed=1, num_labels=1), classifier(num_labels=1), labels_weight=1.0)
        inputs = batch(labels=[0.5, float("nan"), -1.0])
        losses = joined(**inputs).losses
        ours, theirs = (m(**{**inputs, "labels": None}).logits[:, 0] for m in (joined.student, joined.teacher.model))
        torch.testing.assert_close(losses["prediction"].sum, (ours - theirs) ** 2)
        assert losses["labels"].count.tolist() == [1, 0, 1] and losses["labels"].sum[1] == 0
        sum(loss.sum.sum() for loss in losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in joined.parameters() if p.grad is not None)

    def test_types_only_for_a_model_that_has_them(self):
        """Of a pair of texts, BERT reads which is which; a RoBERTa student has one type only."""
        torch.manual_seed(0)
        config = RobertaConfig(**{**SIZES, "max_position_embeddings": 40, "num_labels": 3, "type_vocab_size": 1})
        joined = pair(AutoModelForSequenceClassification.from_config(config))
        inputs = batch() | {"token_type_ids": (torch.arange(11) > 4).long().expand(3, 11)}
        changed = (
            joined.teacher(inputs).logits
            - joined.teacher(batch() | {"token_type_ids": torch.zeros(3, 11).long()}).logits
        )
        assert changed.abs().max() > 1e-3
        assert joined(**inputs).losses["prediction"].sum.isfinite().all()

    def test_another_task_is_refused(self):
        with pytest.raises(InputError, match="with 2 labels.*with 3"):
            pair(classifier(num_labels=2))
        several = classifier(num_hidden_layers=4, problem_type="multi_label_classification")
        with pytest.raises(InputError, match="multi_label"):
            pair(teacher=several)


class TestStages:
    def test_the_intermediate_stage_leaves_the_head_alone_and_the_prediction_stage_has_no_projections(self, tmp_path):
        options = {"max_steps": 5, "learning_rate": 1e-2}
        first = build(distil_task, tmp_path / "1", **INTERMEDIATE, **options)
        head = copy.deepcopy(first.model.student.classifier.state_dict())
        body = copy.deepcopy(first.model.student.bert.encoder.state_dict())
        first.train()
        first.save_model()
        assert {row for row in first.state.log_history[0] if row.endswith("_loss")} == {
            "embedding_loss",
            "hidden_loss",
            "attention_loss",
        }
        trained = first.model.student
        assert all(torch.equal(head[name], value) for name, value in trained.classifier.state_dict().items())
        assert not all(torch.equal(body[name], value) for name, value in trained.bert.encoder.state_dict().items())
        frozen = {name.split(".")[1] for name, p in first.model.named_parameters() if not p.requires_grad}
        assert frozen == {"classifier", "bert"} and not first.model.student.bert.pooler.dense.weight.requires_grad
        assert set(first.model.projections) == {"embedding", "hidden"}

        sizes = dict.fromkeys((*TINY, "config_overrides"))
        second = build(
            distil_task,
            tmp_path / "2",
            **PREDICTION,
            **options,
            model_options={**sizes, "model_name_or_path": str(tmp_path / "1")},
        )
        assert all(
            torch.equal(value, trained.state_dict()[name]) for name, value in second.model.student.state_dict().items()
        )
        assert not second.model.projections and all(p.requires_grad for p in second.model.parameters())
        second.train()
        assert not torch.equal(second.model.student.classifier.weight, head["weight"])

    def test_the_card_says_that_the_head_is_not_trained(self, tmp_path):
        trainer = build(distil_task, tmp_path, **INTERMEDIATE)
        trainer.train()
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text()
        assert "**Encoder only**" in card and "Accuracy |" not in card
        assert "| Parameters |" in card and "MSE" in card


class TestCachedAnswers:
    def test_they_are_the_teachers_own_in_any_order(self, tmp_path):
        cached = build(distil_task, tmp_path / "cached", **PREDICTION)
        live = build(distil_task, tmp_path / "live", **PREDICTION, cache_teacher=False)
        rows = [7, 3, 90, 12]
        with_answers = collate(cached, [cached.train_dataset[i] for i in rows])
        without = collate(live, [live.train_dataset[i] for i in rows])
        assert "teacher_logits" not in without
        torch.testing.assert_close(with_answers["teacher_logits"], live.model.teacher(without).logits)
        cached.train()
        live.train()
        for name, gradient in cached.recorder.gradients[0].items():
            torch.testing.assert_close(gradient, live.recorder.gradients[0][name], rtol=1e-4, atol=1e-6)
        first, second = (trainer.evaluate()["eval_prediction_loss"] for trainer in (cached, live))
        assert first == pytest.approx(second, rel=1e-5)

    def test_the_teacher_is_not_asked_again(self, tmp_path):
        build(distil_task, tmp_path, **PREDICTION)
        again = build(distil_task, tmp_path, **PREDICTION)
        again.model.teacher.model.forward = None
        again.train()
        assert again.evaluate()["eval_prediction_loss"] > 0

    def test_another_teacher_is_refused(self, tmp_path):
        build(distil_task, tmp_path / "run", **PREDICTION)
        other = AutoModelForSequenceClassification.from_pretrained(
            tiny_teacher(AutoModelForSequenceClassification).name
        )
        other.classifier.bias.data += 1
        other.save_pretrained(tmp_path / "other")
        tiny_tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(InputError, match="another teacher"):
            build(
                distil_task,
                tmp_path / "run",
                **PREDICTION,
                model_options={"teacher_name_or_path": str(tmp_path / "other")},
            )

    def test_where_layers_are_compared_it_sees_every_batch(self, tmp_path):
        trainer = build(distil_task, tmp_path)
        assert "teacher_logits" not in collate(trainer, [trainer.train_dataset[0]])


def test_examples_need_no_labels(tmp_path):
    data = as_task(tiny_data())
    for name in ("train_dataset", "eval_dataset"):
        base = getattr(data, name).base
        assert isinstance(base, datasets.Dataset)
        setattr(data, name, base.remove_columns(["labels"]))
    teacher = tiny_teacher(AutoModelForSequenceClassification).name
    args = TaskDistillationTrainingArguments(
        output_dir=str(tmp_path), bf16=False, max_steps=2, report_to=[], save_strategy="no"
    )
    trainer = distil_task.build_trainer(data, StudentArguments(**TINY, teacher_name_or_path=teacher), args)
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_agreement" in metrics and "eval_accuracy" not in metrics


def test_labels_that_are_not_there_are_refused(tmp_path):
    data = as_task(tiny_data())
    data.train_dataset = data.train_dataset.base.remove_columns(["labels"])
    teacher = tiny_teacher(AutoModelForSequenceClassification).name
    args = TaskDistillationTrainingArguments(output_dir=str(tmp_path), bf16=False, labels_weight=1.0)
    with pytest.raises(InputError, match="labels_weight=1.0"):
        distil_task.build_trainer(data, StudentArguments(**TINY, teacher_name_or_path=teacher), args)
