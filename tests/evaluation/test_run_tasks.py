"""`--evaluation_tasks`: the numbers before and after training are those that `hf-pretrain evaluate` finds."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from helpers.distilled import arguments
from helpers.distilled import pair as composite
from helpers.method_matrix import QUIET, all_programs, build, tiny_data, tiny_teacher, tiny_tokenizer
from hf_pretrain.cli import main
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.suite import EvaluatedModel, LoadedTask, MeasureOptions, find_tasks, measure_task
from hf_pretrain.evaluation.suite.runs import AFTER, BEFORE, RESULTS
from hf_pretrain.hub.card import read_record
from hf_pretrain.modeling.surgery.cutting import cut_student
from hf_pretrain.objectives.distillation import DistillationTrainer, DistillationTrainingArguments, StudentArguments

PROGRAMS = all_programs()
ROWS = 40


def sentence(row):
    return " ".join(f"w{number}" for number in row)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scored pairs, classes that a probe can learn, minimal pairs, and tags."""
    data = tmp_path_factory.mktemp("data")
    for name in ("stsb", "sst2", "blimp"):
        (data / name).mkdir()
    for split, seed in (("train", 0), ("dev", 1)):
        rows = draws.integers(draws.row_keys(range(ROWS), seed=seed, stream="tasks"), 4, high=50).tolist()
        lines = [f"{sentence(row)}\t{int(row[0] < 20)}\n" for row in rows]
        (data / "sst2" / f"{split}.tsv").write_text("".join(lines))
        lines = [f"{sentence(row)},{sentence(row[:2] + row[:1] * 2)},{row[3] / 10}\n" for row in rows]
        (data / "stsb" / f"{split}.csv").write_text("".join(lines))
    pairs = [{"sentence_good": f"w{i} w{i}", "sentence_bad": f"w{i} w{2 * i + 1}"} for i in range(9)]
    pairs = [pair | {"UID": "p", "field": "f"} for pair in pairs]
    (data / "blimp" / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    (data / "tags.yaml").write_text("tags: {type: tokens, text: words, label: tags, train_file: tags.jsonl}\n")
    (data / "tags.jsonl").write_text('{"words": ["w1"], "tags": ["O"]}\n')
    (data / "corpus.txt").write_text(
        "\n\n".join(" ".join(f"w{(i * j) % 37}" for j in range(1, 30)) for i in range(60))
    )
    return data


@pytest.fixture
def unread(monkeypatch):
    """A program that comes to read its text fails the test."""
    monkeypatch.setattr("hf_pretrain.training.program._build", lambda *_: pytest.fail("the text is read"))


def by_hand(folder, data, *names, limit=None):
    """Scores of a folder, by the suite: task -> metrics."""
    options = MeasureOptions(max_train_examples=limit, max_examples=limit)
    tasks = find_tasks(names, data_dir=data)
    return {
        task.name: measure_task(EvaluatedModel(str(folder)), LoadedTask(task, options), task.hows[0]).metrics
        for task in tasks
    }


def stored(folder):
    content = json.loads((folder / RESULTS).read_text())["models"]
    return {label: {entry["task"]: entry["metrics"] for entry in entries} for label, entries in content.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for task, metrics in expected.items():
        assert found[task] == pytest.approx(metrics, abs=2e-6), task


def options(data, *names):
    return {"evaluation_tasks": list(names), "evaluation_data_dir": str(data)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_method_has_the_numbers_of_its_exports(tmp_path, data, name):
    """Before training those of the fresh export, after it those of the trained one, in the card and in the file."""
    trainer = build(PROGRAMS[name], tmp_path / "run", learning_rate=0.05, **options(data, "stsb"))
    trainer.save_model(tmp_path / "fresh")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    found, card = stored(tmp_path / "run"), read_record(tmp_path / "run")
    same(found[BEFORE], by_hand(tmp_path / "fresh", data, "stsb"))
    same(found[AFTER], by_hand(tmp_path / "run", data, "stsb"))
    assert found[BEFORE] != found[AFTER]
    assert ("teacher" in found) == name.startswith("distil")
    same({entry.task: entry.metrics for entry in card.evaluations}, found[AFTER])
    (table,) = (text for title, text in card.sections.items() if title.startswith("Tasks"))
    for scores in found.values():
        assert f" {scores['stsb']['spearmanr']:.3f} " in table


class TestDistillation:
    def run(self, data, output, *argv):
        teacher = tiny_teacher(AutoModelForMaskedLM).name
        line = ["distil", "--teacher_name_or_path", teacher, "--output_dir", output, "--train_file"]
        line += [data / "corpus.txt", "--block_size", 24, "--max_steps", 3, "--report_to", "none", "--bf16", "false"]
        line += ["--evaluation_data_dir", data, "--learning_rate", 0.01, *argv]
        return main([str(word) for word in line])

    def test_the_program_sets_teacher_and_student_side_by_side(self, tmp_path, data, capsys):
        out = tmp_path / "out"
        tasks = ["--evaluation_tasks", "stsb", "sst2", "blimp"]
        assert self.run(data, out, "--student_layers", "every_other", "--num_hidden_layers", 2, *tasks) == 0
        shown, found = capsys.readouterr().out, stored(out)
        teacher, names = tiny_teacher(AutoModelForMaskedLM).name, ("stsb", "sst2", "blimp")
        model = AutoModelForMaskedLM.from_pretrained(teacher)
        cut_student(model, (0, 5)).save_pretrained(tmp_path / "cut")
        tiny_tokenizer().save_pretrained(tmp_path / "cut")
        same(found["teacher"], by_hand(teacher, data, *names))
        same(found[BEFORE], by_hand(tmp_path / "cut", data, *names))
        same(found[AFTER], by_hand(out, data, *names))
        (row,) = (line.split() for line in shown.splitlines() if line.startswith("  stsb "))
        expected = [f"{found[label]['stsb']['spearmanr']:.3f}" for label in ("teacher", BEFORE, AFTER)]
        assert row[3:6] == expected and len(set(expected)) == 3
        header = next(line for line in shown.splitlines() if line.split()[:2] == ["task", "metric"])
        assert header.index("teacher") < header.index(BEFORE) < header.index(AFTER)
        assert shown.index("before training on") < shown.index("step 0/3")

    def test_a_teacher_in_memory_is_measured_as_it_is(self, tmp_path, data):
        """Not as the checkpoint that it came from, whose weights it may no longer have."""
        teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher(AutoModelForMaskedLM).name)
        with torch.no_grad():
            teacher.get_input_embeddings().weight[5:] = teacher.get_input_embeddings().weight[5:].flip(0)
        teacher.save_pretrained(tmp_path / "teacher")
        tiny_tokenizer().save_pretrained(tmp_path / "teacher")
        args = DistillationTrainingArguments(
            **QUIET, output_dir=str(tmp_path / "run"), distillation_method="distilbert", **options(data, "stsb")
        )
        student = StudentArguments(student_layers="first", num_hidden_layers=2)
        trainer = DistillationTrainer(None, args, teacher=teacher, model_args=student, train_dataset=tiny_data())
        trainer.train()
        same(stored(tmp_path / "run")["teacher"], by_hand(tmp_path / "teacher", data, "stsb"))

    def test_so_is_that_of_a_composite_made_by_hand(self, tmp_path, data):
        model = composite("hidden")
        model.teacher.model.save_pretrained(tmp_path / "teacher")
        tiny_tokenizer().save_pretrained(tmp_path / "teacher")
        args = arguments("hidden", **QUIET | {"output_dir": str(tmp_path / "run")}, **options(data, "stsb"))
        trainer = DistillationTrainer(model, args, train_dataset=tiny_data(), processing_class=tiny_tokenizer())
        trainer.train()
        same(stored(tmp_path / "run")["teacher"], by_hand(tmp_path / "teacher", data, "stsb"))

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["--evaluation_tasks", "stsbb"], "did you mean 'stsb'"),
            (["--evaluation_tasks", "tags.yaml"], "is measured by fine-tuning"),
            # Without a loss of predictions the student has no head that could score a sentence.
            (["--evaluation_tasks", "blimp", "--distillation_method", "minilmv2"], "does not score text"),
            (["--evaluation_tasks", "stsb", "--evaluation_max_examples", "4"], "evaluation_max_examples=4"),
            ([], "evaluation_data_dir="),
        ],
    )
    def test_what_cannot_be_measured_is_refused_before_any_text_is_read(
        self, tmp_path, data, capsys, unread, argv, said
    ):
        argv = [str(data / word) if word == "tags.yaml" else word for word in argv]
        assert self.run(data, tmp_path / "out", "--num_hidden_layers", 2, *argv) == 2
        shown = capsys.readouterr()
        assert said in shown.err and len(shown.err.strip().splitlines()) == 1

    def test_a_damaged_task_is_refused_before_any_text_is_read(self, tmp_path, data, capsys, unread):
        (tmp_path / "stsb").mkdir()
        (tmp_path / "stsb" / "dev.csv").write_text("a b,c d,2.0\n" * 30 + "a b,c d,much\n")
        argv = ["--evaluation_tasks", "stsb", "--evaluation_data_dir", tmp_path]
        assert self.run(data, tmp_path / "out", "--num_hidden_layers", 2, *argv) == 2
        shown = capsys.readouterr()
        assert "much" in shown.err


def mlm(output, **changes):
    return build(PROGRAMS["mlm"], output, **changes)


def adapted(output, **changes):
    """A run that trains adapters of a checkpoint."""
    args = QUIET | {"output_dir": str(output), "adapter": "lora", "max_steps": 3} | changes
    name = tiny_teacher(AutoModelForMaskedLM).name
    return PROGRAMS["mlm"].trainer(name, PROGRAMS["mlm"].arguments[2](**args), train_dataset=tiny_data())


def test_training_does_not_depend_on_the_tasks(tmp_path, data):
    """Neither the order of the examples nor dropout: the weights are the same to the bit."""
    weights = []
    for name, chosen in (("with", options(data, "sst2", "stsb")), ("without", {})):
        drops = {"config_overrides": '{"hidden_dropout_prob": 0.3}'}
        trainer = mlm(tmp_path / name, model_options=drops, max_steps=4, **chosen)
        trainer.train()
        trainer.save_model()
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_limit_is_of_rows_to_learn_from_and_of_rows_to_score(tmp_path, data):
    trainer = mlm(tmp_path / "run", **options(data, "sst2"), evaluation_max_examples=12)
    trainer.save_model(tmp_path / "fresh")
    trainer.train()
    trainer.create_model_card()
    (evaluation,) = read_record(tmp_path / "run").evaluations
    assert evaluation.num_examples == 12 and "12 training rows" in evaluation.method
    same(stored(tmp_path / "run")[BEFORE], by_hand(tmp_path / "fresh", data, "sst2", limit=12))


def test_a_run_that_goes_on_keeps_the_numbers_of_its_start(tmp_path, data):
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    first = mlm(tmp_path / "run", max_steps=4, **saving, **options(data, "stsb"))
    first.train()
    first.create_model_card()
    begun = stored(tmp_path / "run")
    again = mlm(tmp_path / "run", max_steps=6, **saving, **options(data, "stsb"))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    again.create_model_card()
    found = stored(tmp_path / "run")
    assert found[BEFORE] == begun[BEFORE] and found[AFTER] != begun[AFTER]
    assert list(again.tasks.found) == [BEFORE, AFTER]
    assert f" {begun[BEFORE]['stsb']['spearmanr']:.3f} " in (tmp_path / "run" / "README.md").read_text()


def test_a_run_that_begins_anew_forgets_an_earlier_one(tmp_path, data):
    (tmp_path / "run").mkdir()
    old = {"task": "stsb", "dataset": "stsb", "split": "dev", "metrics": {"spearmanr": 2.0}, "method": "none"}
    content = {"format": "hf_pretrain evaluation", "models": {"teacher": [old], BEFORE: [old]}}
    (tmp_path / "run" / RESULTS).write_text(json.dumps(content))
    trainer = mlm(tmp_path / "run", **options(data, "stsb"))
    trainer.train()
    assert list(stored(tmp_path / "run")) == [BEFORE] and stored(tmp_path / "run")[BEFORE]["stsb"]["spearmanr"] < 2


def test_weights_that_were_changed_by_hand_are_measured_again(tmp_path, data):
    """A number belongs to the very weights that it stands beside."""
    trainer = mlm(tmp_path / "run", **options(data, "stsb"))
    trainer.train()
    trainer.create_model_card()
    before = stored(tmp_path / "run")[AFTER]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter[::2] *= 3
    trainer.save_model()
    trainer.create_model_card()
    assert stored(tmp_path / "run")[AFTER] != before
    same(
        {e.task: e.metrics for e in read_record(tmp_path / "run").evaluations}, by_hand(tmp_path / "run", data, "stsb")
    )


def test_a_card_in_the_middle_of_training_has_no_numbers_of_the_end(tmp_path, data):
    trainer = mlm(tmp_path / "run", **options(data, "stsb"))
    trainer.is_in_train, trainer.state.global_step = True, 1
    trainer.create_model_card()
    assert not read_record(tmp_path / "run").evaluations and not trainer.tasks.found


def test_a_search_and_an_adapter_alone_are_refused(tmp_path, data):
    with pytest.raises(InputError, match="each trial of a search would measure them"):
        mlm(tmp_path / "run", **options(data, "stsb")).hyperparameter_search()
    with pytest.raises(InputError, match="adapter_export='merged'"):
        adapted(tmp_path / "run", adapter_export="adapter", **options(data, "stsb"))


def test_merged_adapters_are_measured(tmp_path, data):
    trainer = adapted(tmp_path / "run", learning_rate=0.1, **options(data, "stsb"))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    same(stored(tmp_path / "run")[AFTER], by_hand(tmp_path / "run", data, "stsb"))
    assert stored(tmp_path / "run")[AFTER] != stored(tmp_path / "run")[BEFORE]
