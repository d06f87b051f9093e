"""Students that classify tokens or answer questions: losses and metrics written out, training, cache and export."""

import copy
import shutil

import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from helpers.distilled_tasks import AUTO_CLASSES, TASKS, build_task, model, token_rows
from helpers.method_matrix import TINY, collate, relative_difference, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import DataCollatorForTask, TaskDistillationTrainingArguments, join
from hf_pretrain.objectives.distillation.comparison import compare

TOKENS, QUESTIONS = "token-classification", "question-answering"
ALL = ("prediction", "labels", "cosine", "embedding", "hidden", "attention", "relation_vv")


def pair(task, *names, student=None, teacher=None, **options):
    student = model(task, seed=1) if student is None else student
    teacher = model(task, num_hidden_layers=4, hidden_size=48) if teacher is None else teacher
    weights = {f"{name}_weight": 1.0 for name in names} if names else {}
    args = TaskDistillationTrainingArguments(
        **{"output_dir": "unused", "bf16": False, "task": task, "prediction_weight": 0.0, **weights, **options}
    )
    return join(student, teacher, args).eval()


def rows(task):
    """Three texts of different lengths; not all of their tokens are asked for, nor all labels known."""
    lengths = (4, 6, 11)
    found = [{"input_ids": [2, *range(5, 3 + n), 3]} for n in lengths]
    for row, n in zip(found, lengths, strict=True):
        if task == TOKENS:
            row["is_target"] = [False, *[True] * (n - 2), False]
            row["labels"] = [-100, *[-100 if i % 3 == 2 else i % 3 for i in range(n - 2)], -100]
        else:
            row["is_target"] = [True, False, *[True] * (n - 3), False]
            row["labels"] = [[2, 2], [-100, -100], [3, 5]][lengths.index(n)]
    return found


def batch(task, **changes):
    return DataCollatorForTask(tiny_tokenizer(), **changes)(rows(task))


def each(joined, task):
    """Logits of both models of each text alone, at its targets: of starts and ends, ``[2, targets]``, or ``[targets, C]``."""
    for row in rows(task):
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        outputs = [m(**inputs) for m in (joined.student, joined.teacher.model)]
        chosen = torch.tensor(row["is_target"])
        if task == TOKENS:
            yield row, [output.logits[0, chosen] for output in outputs]
        else:
            yield row, [torch.cat([output.start_logits, output.end_logits])[:, chosen] for output in outputs]


@pytest.mark.parametrize("task", TASKS)
class TestLosses:
    def test_predictions_at_the_targets_alone(self, task):
        joined = pair(task, "prediction", temperature=2.0)
        expected, counts = [], []
        for _, logits in each(joined, task):
            ours, theirs = (values.div(2).log_softmax(-1) for values in logits)
            expected.append(4 * (theirs.exp() * (theirs - ours)).sum())
            counts.append(len(ours))
        inputs = batch(task)
        loss = joined(**inputs).losses["prediction"]
        torch.testing.assert_close(loss.sum, torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert loss.count.tolist() == counts
        assert int(joined.count_targets(inputs)["prediction"]) == sum(counts)

    def test_labels_where_they_are_known(self, task):
        joined = pair(task, "labels")
        expected, counts = [], []
        for row, (ours, _) in each(joined, task):
            labels, chosen = torch.tensor(row["labels"]), torch.tensor(row["is_target"])
            if task == TOKENS:
                labels = labels[chosen]
            else:
                # Places among the targets.
                labels = torch.where(labels >= 0, chosen.cumsum(0)[labels.clamp(min=0)] - 1, -100)
            expected.append(torch.nn.functional.cross_entropy(ours, labels, reduction="sum"))
            counts.append(int((labels >= 0).sum()))
        inputs = batch(task)
        loss = joined(**inputs).losses["labels"]
        torch.testing.assert_close(loss.sum, torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert loss.count.tolist() == counts and int(joined.count_targets(inputs)["labels"]) == sum(counts)

    def test_padding_never_counts(self, task):
        joined = pair(task, *ALL, student=model(task, seed=1, hidden_size=48), attention_weight=0.1)
        tokenizer = tiny_tokenizer()
        plain = joined(**batch(task))
        tokenizer.padding_side = "left"
        wider = DataCollatorForTask(tokenizer, pad_to_multiple_of=16)(rows(task))
        wider["input_ids"] = wider["input_ids"].masked_fill(wider["attention_mask"] == 0, 7)
        # Positions of BERT count from the left, so that the text has to be told where it is.
        places = (wider["attention_mask"].cumsum(1) - 1).clamp(min=0)
        moved = joined(**wider, position_ids=places)
        assert plain.losses.keys() == moved.losses.keys() == set(ALL)
        for kind in ("losses", "metrics"):
            for name, value in getattr(plain, kind).items():
                torch.testing.assert_close(getattr(moved, kind)[name].sum, value.sum, rtol=1e-4, atol=1e-4, msg=name)
                assert torch.equal(getattr(moved, kind)[name].count, value.count), name

    def test_a_copy_of_the_teacher_has_nothing_to_learn(self, task):
        teacher = model(task)
        names = [name for name in ALL if name != "labels"]
        joined = pair(task, *names, student=copy.deepcopy(teacher), teacher=teacher)
        output = joined(**batch(task))
        for name, loss in output.losses.items():
            assert loss.sum.abs().max() < 1e-4, name
        assert torch.equal(output.metrics["agreement"].sum, output.metrics["agreement"].count)

    def test_where_no_label_is_known_the_loss_is_zero_with_a_graph(self, task):
        joined, inputs = pair(task, "labels"), batch(task)
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        loss = joined.train()(**inputs).losses["labels"]
        loss.sum.sum().backward()
        assert loss.sum.sum().item() == loss.count.sum().item() == 0
        assert all(p.grad.isfinite().all() for p in joined.parameters() if p.grad is not None)

    def test_another_task_is_refused(self, task):
        other = next(name for name in TASKS if name != task)
        with pytest.raises(InputError, match="both need the same task"):
            pair(task, "prediction", teacher=model(other))


def test_the_f1_of_entities_is_that_of_all_tokens_together():
    joined = pair(TOKENS, "prediction")
    metrics = joined(**batch(TOKENS)).metrics
    guesses, labels = [], []
    for row, (ours, _) in each(joined, TOKENS):
        known = [label for label, chosen in zip(row["labels"], row["is_target"], strict=True) if chosen]
        found = [(int(guess), label) for guess, label in zip(ours.argmax(-1), known, strict=True) if label != -100]
        guesses += [guess for guess, _ in found]
        labels += [label for _, label in found]
    expected = f1_score(labels, guesses, labels=[1, 2], average="micro")
    assert float(metrics["f1"].sum.sum() / metrics["f1"].count.sum()) == pytest.approx(expected)
    right = sum(a == b for a, b in zip(guesses, labels, strict=True))
    assert [float(part.sum()) for part in metrics["accuracy"]] == [right, len(labels)]


def test_spans_that_overlap_count_by_their_tokens():
    """Of the third text the answer is tokens 3 to 5; a student that says 4 to 8 has two of its five and of the three."""
    joined = pair(QUESTIONS, "prediction")
    logits = torch.zeros(3, 11, 2)
    for place, (begin, end) in enumerate([(2, 2), (0, 0), (4, 8)]):
        logits[place, begin, 0] = logits[place, end, 1] = 9.0
    joined.student.qa_outputs.forward = lambda states: logits
    metrics = joined(**batch(QUESTIONS)).metrics
    assert metrics["exact_match"].sum.tolist() == [1, 0, 0] and metrics["exact_match"].count.tolist() == [1, 0, 1]
    assert metrics["f1"].sum.tolist() == pytest.approx([1, 0, 2 * 2 / (5 + 3)])
    assert metrics["accuracy"].sum.tolist() == [2, 0, 0] and metrics["accuracy"].count.tolist() == [2, 0, 2]


@pytest.mark.parametrize("task", TASKS)
class TestTraining:
    ALL = {f"{name}_weight": 1.0 for name in ALL if name != "attention"}  # noqa: RUF012

    def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(self, task, tmp_path):
        whole = build_task(task, tmp_path, **self.ALL)
        whole.train()
        cut = build_task(
            task,
            tmp_path,
            **self.ALL,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            train_sampling_strategy="group_by_length",
        )
        cut.train()
        assert relative_difference(whole.recorder.gradients[0], cut.recorder.gradients[0]) < 1e-4

    def test_cached_answers_are_the_teachers_own_in_any_order(self, task, tmp_path):
        cached = build_task(task, tmp_path)
        live = build_task(task, tmp_path, cache_teacher=False)
        chosen = [7, 3, 40, 12]
        asked = collate(live, [live.train_dataset[i] for i in chosen])
        answers = collate(cached, [cached.train_dataset[i] for i in chosen])["teacher_logits"]
        positions = asked["target_positions"]
        inputs = {name: value for name, value in asked.items() if name not in ("labels", "target_positions")}
        torch.testing.assert_close(answers, live.model.teacher(inputs, positions).logits)
        for trainer in (cached, live):
            trainer.train()
        assert relative_difference(cached.recorder.gradients[0], live.recorder.gradients[0]) < 1e-4
        first, second = (trainer.evaluate() for trainer in (cached, live))
        for name in ("eval_prediction_loss", "eval_agreement", "eval_accuracy", "eval_teacher_f1"):
            assert first[name] == pytest.approx(second[name], rel=1e-5)

    def test_labels_teach_a_teacher_and_it_a_student_without_labels(self, task, tmp_path):
        options = {"max_steps": 150, "learning_rate": 3e-3, "logging_steps": 50}
        first = build_task(task, tmp_path, labels_weight=1.0, prediction_weight=0.0, **options)
        before = first.evaluate(first.train_dataset)
        first.train()
        assert first.evaluate(first.train_dataset)["eval_accuracy"] > max(0.8, before["eval_accuracy"] + 0.3)
        first.save_model()
        shutil.copytree(tmp_path / "out", tmp_path / "next" / "teacher")
        second = build_task(task, tmp_path / "next", **options, model_options={"hidden_size": 48})
        second.train()
        after = second.evaluate(second.train_dataset)
        assert set(second.model.config.losses) == {"prediction"} and after["eval_agreement"] > 0.8
        assert after["eval_accuracy"] > 0.8 * after["eval_teacher_accuracy"]

    def test_the_export_is_stock_and_the_intermediate_stage_comes_before_it(self, task, tmp_path):
        first = build_task(task, tmp_path, training_stage="intermediate", max_steps=2)
        first.train()
        first.save_model()
        sizes = dict.fromkeys((*TINY, "config_overrides"))
        second = build_task(task, tmp_path, model_options={**sizes, "model_name_or_path": str(tmp_path / "out")})
        second.train()
        second.save_model(str(tmp_path / "student"))
        loaded, info = AUTO_CLASSES[task].from_pretrained(tmp_path / "student", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
        ids = torch.arange(5, 15)[None]
        for mine, stock in zip(
            second.model.student.eval()(ids).to_tuple(), loaded.eval()(ids).to_tuple(), strict=True
        ):
            torch.testing.assert_close(mine, stock)
        assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == tiny_tokenizer().get_vocab()

    def test_the_comparison_is_over_targets_whatever_the_batches(self, task, tmp_path):
        trainer = build_task(task, tmp_path)
        student, teacher = trainer.model.student, trainer.model.teacher.model
        data = trainer.eval_dataset.base
        once = {"collator": DataCollatorForTask(tiny_tokenizer()), "repeats": 1, "timed_batch_sizes": (1,)}
        found, other = (compare(student, teacher, data, batch_size=size, **once) for size in (1, 5))
        metrics = trainer.evaluate()
        names = {"agreement": "agreement", "kl": "prediction_loss"}
        names |= {f"student_{name}": name for name in ("accuracy", "f1")}
        names |= {f"teacher_{name}": f"teacher_{name}" for name in ("accuracy", "f1")}
        if task == QUESTIONS:
            names["student_exact_match"] = "exact_match"
        for name, logged in names.items():
            assert found[name] == pytest.approx(other[name], rel=1e-4), name
            assert found[name] == pytest.approx(metrics[f"eval_{logged}"], rel=1e-4, abs=1e-6), name


def test_tiny_rows_have_all_that_is_tested():
    tags = [row["labels"] for row in token_rows(60, seed=1)]
    assert None in tags and {tag for row in tags if row for tag in row} == {"O", "A", "B"}


def test_the_official_average_over_classes_has_no_meaning_for_spans():
    with pytest.raises(InputError, match="tinybert_official=True"):
        pair(QUESTIONS, "prediction", tinybert_official=True)


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="task='tagging' must be one of sequence-classification"):
        TaskDistillationTrainingArguments(output_dir="unused", bf16=False, task="tagging")
