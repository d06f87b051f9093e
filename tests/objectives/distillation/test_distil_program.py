"""The programs `distil` and `distil-task` from the command line to the card."""

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_pretrain.cli import main
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import DistillationTrainingArguments, StudentArguments, load_text
from method_matrix import tiny_teacher

MASKED_LM, CLASSIFIER = AutoModelForMaskedLM, AutoModelForSequenceClassification


@pytest.fixture
def corpus(tmp_path):
    """Sixty documents of some of the teacher's words."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(" ".join(f"w{(i * j) % 37}" for j in range(1, 30)) for i in range(60)))
    return path


@pytest.fixture
def task(tmp_path):
    for name, count in (("train", 60), ("dev", 20)):
        rows = "".join(f"w{i % 40} w{i % 7}\t{i % 3}\n" for i in range(count))
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    return ["--train_file", str(tmp_path / "train.tsv"), "--validation_file", str(tmp_path / "dev.tsv")]


def run(method, auto_class, output, *options):
    teacher = ["--teacher_name_or_path", tiny_teacher(auto_class).name, "--output_dir", str(output)]
    speed = ["--max_steps", "2", "--report_to", "none", "--bf16", "false", "--logging_steps", "1"]
    return main([method, *teacher, *speed, *map(str, options)])


def test_general_distillation(tmp_path, corpus, capsys):
    out = tmp_path / "out"
    assert run("distil", MASKED_LM, out, "--train_file", corpus, "--num_hidden_layers", 2, "--block_size", 24) == 0
    shown = capsys.readouterr().out
    assert "beside its teacher" in shown and "Speed-up, batch of 32" in shown
    loaded, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert loaded.config.num_hidden_layers == 2 and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert (
        AutoTokenizer.from_pretrained(out).get_vocab().keys()
        == AutoTokenizer.from_pretrained(tiny_teacher(MASKED_LM).name).get_vocab().keys()
    )
    card = (out / "README.md").read_text()
    for text in (
        "| Parameters |",
        "| MLM loss |",
        "Divergence from the teacher",
        "Speed-up, batch of 1 ",
        "DistilBERT",
        "KL",
    ):
        assert text in card, text
    assert "Encoder only" not in card and "pipeline_tag: fill-mask" in card
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["prediction_weight"], recipe["temperature"]) == (5.0, 2.0)
    # The recipe starts the same run again.
    assert main(["distil", "--config", str(out / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]) == 0


def test_an_encoder_only_student_says_so(tmp_path, corpus):
    options = [
        "--train_file",
        corpus,
        "--block_size",
        24,
        "--distillation_method",
        "minilmv2",
        "--student_layers",
        "last",
    ]
    assert run("distil", MASKED_LM, tmp_path / "out", *options) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "**Encoder only**" in card and "`BertModel`" in card and "MLM loss" not in card and "wang2021minilmv2" in card
    )
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3


def test_both_stages_of_a_task(tmp_path, task, capsys):
    first, second = tmp_path / "1", tmp_path / "2"
    options = [*task, "--max_length", 16, "--training_stage"]
    assert (
        run("distil-task", CLASSIFIER, first, *options, "intermediate", "--num_hidden_layers", 2, "--hidden_size", 32)
        == 0
    )
    assert run("distil-task", CLASSIFIER, second, *options, "prediction", "--model_name_or_path", first) == 0
    loaded, info = AutoModelForSequenceClassification.from_pretrained(second, output_loading_info=True)
    assert loaded.config.num_labels == 3 and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    card = (second / "README.md").read_text()
    for text in (
        "| Accuracy |",
        "Same prediction as the teacher",
        "## Beside its teacher",
        "pipeline_tag: text-classification",
    ):
        assert text in card, text
    assert str(tmp_path) not in card
    # What the teacher answered stays here.
    assert (second / "_teacher_logits" / "train" / "cache.json").is_file()


def test_a_trimmed_vocabulary(tmp_path, corpus):
    """Of the sixty tokens the text has 37; the teacher is asked in the student's ids and answers the same."""
    out = tmp_path / "out"
    options = ["--train_file", corpus, "--block_size", 24, "--student_layers", "first", "--trim_vocabulary"]
    assert run("distil", MASKED_LM, out, *options) == 0
    tokenizer, student = AutoTokenizer.from_pretrained(out), AutoModelForMaskedLM.from_pretrained(out)
    assert len(tokenizer) == student.config.vocab_size == 37 + 5
    assert "| Trimmed from | 60 |" in (out / "README.md").read_text()

    name = tiny_teacher(MASKED_LM).name
    data_args = DataArguments(train_file=[str(corpus)], block_size=24)
    model_args = StudentArguments(teacher_name_or_path=name, student_layers="first", trim_vocabulary=True)
    args = DistillationTrainingArguments(output_dir=str(tmp_path / "python"), bf16=False, report_to=[])
    data = load_text(data_args, model_args, args)
    trainer = distil.build_trainer(data, model_args, args)
    ids = torch.from_numpy(data.train_dataset[0]["input_ids"]).long()[None]
    whole, whole_ids = AutoModelForMaskedLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    words = data.tokenizer.convert_ids_to_tokens(ids[0])
    teacher_ids = torch.tensor([whole_ids.convert_tokens_to_ids(words)])
    kept = whole_ids.convert_tokens_to_ids(data.tokenizer.convert_ids_to_tokens(range(len(data.tokenizer))))
    with torch.no_grad():
        expected = whole(teacher_ids).logits[0][:, kept]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers = trainer.model.teacher(batch, torch.arange(ids.numel())).logits
    torch.testing.assert_close(answers, expected, atol=1e-5, rtol=1e-5)


class TestBadInput:
    def refused(self, capsys, method, *argv):
        assert main([method, *map(str, argv)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    def test_no_teacher(self, tmp_path, corpus, capsys):
        for method in ("distil", "distil-task"):
            line = self.refused(capsys, method, "--train_file", corpus, "--output_dir", tmp_path / method)
            assert "teacher_name_or_path is missing" in line

    def test_a_teacher_that_is_not_there(self, tmp_path, corpus, capsys):
        options = [
            "--teacher_name_or_path",
            tmp_path / "nobody",
            "--train_file",
            corpus,
            "--output_dir",
            tmp_path / "out",
        ]
        assert "nobody" in self.refused(capsys, "distil", *options)

    def test_no_student(self, tmp_path, corpus, capsys):
        teacher = tiny_teacher(MASKED_LM).name
        options = ["--teacher_name_or_path", teacher, "--train_file", corpus, "--output_dir", tmp_path / "out"]
        assert "no student is named" in self.refused(capsys, "distil", *options, "--block_size", 24)

    def test_blocks_longer_than_the_positions_of_the_teacher(self, tmp_path, corpus, capsys):
        teacher = tiny_teacher(MASKED_LM).name
        options = ["--teacher_name_or_path", teacher, "--train_file", corpus, "--output_dir", tmp_path / "out"]
        line = self.refused(capsys, "distil", *options, "--num_hidden_layers", 2, "--block_size", 64)
        assert "block_size=64 is longer than the 32 positions" in line

    def test_a_vocabulary_to_trim_that_is_not_the_teachers(self, tmp_path, corpus):
        name = tiny_teacher(MASKED_LM).name
        args = DistillationTrainingArguments(output_dir=str(tmp_path / "out"), bf16=False)
        model_args = StudentArguments(teacher_name_or_path=name, model_name_or_path=name + "/", trim_vocabulary=True)
        with pytest.raises(InputError, match="trim_vocabulary"):
            load_text(DataArguments(train_file=[str(corpus)]), model_args, args)
