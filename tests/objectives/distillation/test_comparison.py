"""A student beside its teacher: what is counted is theirs, whatever the batches."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    set_seed,
)

from helpers.method_matrix import VOCAB_SIZE, tiny_examples, tiny_tokenizer
from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.objectives.distillation.comparison import _longest_first, _spread, compare, comparison_rows
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.tasks.batches import DataCollatorForTask

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
ONCE = {"repeats": 1, "timed_batch_sizes": (1, 4)}


def pair(auto_class, **options):
    set_seed(0)
    return [auto_class.from_config(BertConfig(**SIZES | options, num_hidden_layers=n)) for n in (1, 3)]


def task_collator(examples):
    batch = {}
    for name in ("input_ids", "token_type_ids"):
        if name in examples[0]:
            batch[name], valid = stack_column(examples, name)
    batch["attention_mask"] = valid
    batch = {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}
    if "label" in examples[0]:
        batch["labels"] = torch.tensor([example["label"] for example in examples])
    return batch


def task_rows(count=30, **columns):
    return Dataset.from_dict({**tiny_examples(count, seed=0).to_dict(), **columns})


def masked(model, dataset):
    """Logits and labels at all masked positions, one example at a time."""
    collator, logits, labels = DataCollatorForMaskedLM(tiny_tokenizer()), [], []
    for row in range(len(dataset)):
        batch = collator([dataset[row]])
        targets = batch.pop("labels").flatten()[positions := batch.pop("target_positions")]
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits[0, positions])
        labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


def test_masked_language_models_over_targets():
    """Means are over targets, not over examples or batches; fillers of fixed shapes are no targets."""
    student, teacher = pair(AutoModelForMaskedLM)
    dataset = EpochDataset(tiny_examples(30, seed=0))
    collator = DataCollatorForMaskedLM(tiny_tokenizer(), target_slots=16)
    found = compare(student, teacher, dataset, collator=collator, batch_size=7, **ONCE)
    (ours, labels), (theirs, _) = masked(student, dataset), masked(teacher, dataset)
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    for name, logits in (("student", ours), ("teacher", theirs)):
        expected = float(torch.nn.functional.cross_entropy(logits, labels))
        assert found[f"{name}_mlm_loss"] == pytest.approx(expected, rel=1e-4)


def test_sizes_count_tied_weights_once_and_times_are_a_ratio():
    student, teacher = pair(AutoModelForMaskedLM)
    found = compare(
        student, teacher, tiny_examples(8, seed=0), collator=DataCollatorForMaskedLM(tiny_tokenizer()), **ONCE
    )
    layer = sum(parameter.numel() for parameter in student.bert.encoder.layer[0].parameters())
    assert found["teacher_parameters"] - found["student_parameters"] == 2 * layer
    embeddings = student.get_input_embeddings().weight.numel()
    assert found["student_parameters"] == sum(p.numel() for n, p in student.named_parameters())
    assert embeddings < found["student_parameters"] < 2 * embeddings + 2 * layer
    assert found["student_megabytes"] == pytest.approx(found["student_parameters"] * 4e-6)
    for size in (1, 4):
        times = [found[f"{name}_milliseconds_batch_{size}"] for name in ("teacher", "student")]
        assert found[f"speed_up_batch_{size}"] == pytest.approx(times[0] / times[1]) and min(times) > 0


def test_classifiers():
    student, teacher = pair(AutoModelForSequenceClassification, num_labels=3)
    labels = [i % 3 for i in range(30)]
    rows = task_rows(label=labels)
    found = compare(student, teacher, rows, collator=task_collator, batch_size=4, **ONCE)
    with torch.no_grad():
        ours, theirs = (
            torch.cat([model.eval()(torch.tensor([ids])).logits for ids in rows["input_ids"]])
            for model in (student, teacher)
        )
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["student_accuracy"] == pytest.approx(float((ours.argmax(-1) == torch.tensor(labels)).float().mean()))
    assert found["teacher_accuracy"] == pytest.approx(
        float((theirs.argmax(-1) == torch.tensor(labels)).float().mean())
    )
    assert "student_mlm_loss" not in found


def test_labels_may_be_missing_or_missing_in_places():
    student, teacher = pair(AutoModelForSequenceClassification, num_labels=2)
    found = compare(student, teacher, task_rows(), collator=task_collator, **ONCE)
    assert "agreement" in found and "student_accuracy" not in found
    with torch.no_grad():
        student.classifier.bias[:] = torch.tensor([-100.0, 100.0])
    rows = task_rows(label=[1, -100, 0] * 10)
    assert compare(student, teacher, rows, collator=task_collator, **ONCE)["student_accuracy"] == 0.5


def test_regression():
    student, teacher = pair(AutoModelForSequenceClassification, num_labels=1)
    rows = task_rows(label=[0.5] * 30)
    found = compare(student, teacher, rows, collator=task_collator, **ONCE)
    with torch.no_grad():
        ours, theirs = (
            torch.cat([model.eval()(torch.tensor([ids])).logits for ids in rows["input_ids"]])
            for model in (student, teacher)
        )
    assert found["squared_difference"] == pytest.approx(float((ours - theirs).square().mean()), rel=1e-4)
    assert found["teacher_squared_error"] == pytest.approx(float((theirs - 0.5).square().mean()), rel=1e-4)
    assert "kl" not in found and "agreement" not in found


@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_a_copy_is_its_teachers_equal(auto_class):
    _, teacher = pair(auto_class)
    collator = DataCollatorForMaskedLM(tiny_tokenizer()) if auto_class is AutoModelForMaskedLM else task_collator
    found = compare(copy.deepcopy(teacher), teacher, task_rows(), collator=collator, **ONCE)
    assert found["agreement"] == 1 and found["kl"] == pytest.approx(0, abs=1e-6)


def test_bare_encoders_are_sized_and_timed():
    student, teacher = pair(AutoModel)
    found = compare(student, teacher, task_rows(), collator=task_collator, **ONCE)
    assert {name.split("_", 1)[1] for name in found if name.startswith("student")} == {
        "parameters",
        "megabytes",
        "milliseconds_batch_1",
        "milliseconds_batch_4",
    }


def test_a_student_of_another_architecture_is_not_shown_token_types():
    _, teacher = pair(AutoModelForSequenceClassification)
    config = DistilBertConfig(
        vocab_size=VOCAB_SIZE, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32
    )
    student = AutoModelForSequenceClassification.from_config(config)
    rows = tiny_examples(6, seed=0)
    rows = rows.add_column("token_type_ids", [[i % 2 for i in range(len(ids))] for ids in rows["input_ids"]])
    seen = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    assert "agreement" in compare(student, teacher, rows, collator=task_collator, **ONCE)
    assert all(kwargs["token_type_ids"].any() for kwargs in seen)


def test_a_teacher_in_half_precision_is_measured_in_the_students():
    student, teacher = pair(AutoModelForSequenceClassification)
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    found = compare(student, half, task_rows(), collator=task_collator, **ONCE)
    assert half.dtype == torch.bfloat16
    assert found["teacher_megabytes"] == pytest.approx(4e-6 * teacher.num_parameters())


def test_batches_change_nothing_and_modes_are_left():
    student, teacher = pair(AutoModelForMaskedLM)
    student.train()
    collator, rows = DataCollatorForMaskedLM(tiny_tokenizer()), tiny_examples(30, seed=0)
    one, other = (
        compare(student, teacher, rows, collator=collator, batch_size=size, max_examples=11, **ONCE) for size in (1, 8)
    )
    assert one["kl"] == pytest.approx(other["kl"], rel=1e-4) and one["agreement"] == other["agreement"]
    assert student.training and student.bert.training and not student.bert._forward_hooks


def test_examples_are_spread_over_the_data():
    assert _spread(100, 5).tolist() == [0, 25, 50, 74, 99] and len(_spread(100, 500)) == 100
    lengths = [len(example["input_ids"]) for example in _longest_first(list(tiny_examples(100, seed=0)))]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_all_examples_are_compared_unless_fewer_are_wanted():
    """Also those behind the first window of batches."""
    student, teacher = pair(AutoModelForSequenceClassification, num_labels=2)
    with torch.no_grad():
        student.classifier.bias[:] = torch.tensor([-100.0, 100.0])
    rows = task_rows(150, label=[1] * 75 + [0] * 75)
    found = compare(student, teacher, rows, collator=task_collator, batch_size=1, **ONCE)
    assert found["student_accuracy"] == 0.5


def test_padding_on_the_left_changes_nothing():
    """The stock heads of sequences read column 0."""
    student, teacher = pair(AutoModelForSequenceClassification, num_labels=3)
    tokenizer, rows = tiny_tokenizer(), task_rows(label=[i % 3 for i in range(30)])
    rows = rows.rename_column("label", "labels").select_columns(["input_ids", "labels"])
    found = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        found.append(compare(student, teacher, rows, collator=DataCollatorForTask(tokenizer), batch_size=7, **ONCE))
    for name in ("kl", "agreement", "student_accuracy", "teacher_accuracy"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


def test_rows_of_the_card():
    found = {
        "student_parameters": 1_000_000,
        "teacher_parameters": 4_000_000,
        "student_megabytes": 4.0,
        "teacher_megabytes": 16.0,
        "student_milliseconds_batch_1": 2.0,
        "teacher_milliseconds_batch_1": 5.0,
        "speed_up_batch_1": 2.5,
        "agreement": 0.75,
        "kl": 0.125,
    }
    assert comparison_rows(found) == [
        ("", "Student", "Teacher"),
        ("Parameters", "1,000,000", "4,000,000"),
        ("Size in fp32, MB", "4", "16"),
        ("Forward pass, batch of 1, ms", "2", "5"),
        ("Speed-up, batch of 1", "2.5", "1"),
        ("Same prediction as the teacher", "0.75", ""),
        ("Divergence from the teacher, nats", "0.125", ""),
    ]
