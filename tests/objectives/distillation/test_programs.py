"""The programs `distil` and `distil-task` from the command line to the card."""

import itertools

import datasets
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
)

from helpers.distilled_tasks import AUTO_CLASSES, TASKS, save_teacher, task_files
from helpers.method_matrix import TINY, tiny_teacher
from hf_pretrain.cli import main
from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.hub.card import snippets
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import DistillationTrainingArguments, StudentArguments, load_text
from hf_pretrain.objectives.distillation.targets import labelled_variants
from hf_pretrain.tasks.augmentation import AugmentationArguments, augment

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


COMMON = {"max_steps": 2, "report_to": "none", "bf16": "false", "logging_steps": 1, "max_length": 24}
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["".join(pair) for pair in itertools.product("bfkpvz", "aioulmnrst")]


def run_task(**options):
    parts = (part for name, value in (COMMON | options).items() for part in (f"--{name}", str(value)))
    return main(["distil-task", *parts])


@pytest.mark.parametrize("task", TASKS)
def test_both_stages_leave_a_stock_model_with_a_card_whose_code_runs(task, tmp_path, monkeypatch):
    train, dev = task_files(task, tmp_path)
    common = {
        "task": task,
        "teacher_name_or_path": save_teacher(task, tmp_path / "teacher"),
        "train_file": train,
        "validation_file": dev,
        **({"doc_stride": 4} if task == "question-answering" else {}),
    }
    first, second = tmp_path / "1", tmp_path / "2"
    assert run_task(**common, training_stage="intermediate", student_layers="uniform", output_dir=first) == 0
    assert run_task(**common, model_name_or_path=first, output_dir=second) == 0
    loaded, info = AUTO_CLASSES[task].from_pretrained(second, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys")) and loaded.config.num_hidden_layers == 2
    card, earlier = ModelCard.load(second / "README.md"), (first / "README.md").read_text()
    assert card.data.pipeline_tag == task
    for text in (
        "## Beside its teacher",
        "| Accuracy |",
        "| F1 |",
        "Continued from a local checkpoint and distilled from",
    ):
        assert text in card.text, text
    assert "Cut from a local teacher, layers 1 and 3 of 0 to 3, and distilled from it" in earlier
    assert "**Encoder only**" in earlier and "jiao2020tinybert" in card.text
    monkeypatch.chdir(second)
    for code in snippets(card.text):
        exec(compile(code, task, "exec"), {})


@pytest.fixture
def words_teacher(tmp_path):
    """A masked language model and a classifier with words of letters."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *WORDS])}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=32)
    config = BertConfig(**TINY, vocab_size=len(vocabulary), initializer_range=0.5, num_labels=3)
    torch.manual_seed(0)
    for auto_class, name in ((AutoModelForMaskedLM, "lm"), (AutoModelForSequenceClassification, "teacher")):
        auto_class.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("stage", ["intermediate", "prediction"])
def test_augmented_sentences(words_teacher, stage, capsys):
    numbers = draws.integers(draws.row_keys(range(24), seed=0, stream="rows"), 8, high=len(WORDS)).tolist()
    texts = [" ".join(WORDS[i] for i in row) for row in numbers]
    labels = [row[0] % 3 for row in numbers]
    lines = [f"{text}\t{label}\n" for text, label in zip(texts, labels, strict=True)]
    (words_teacher / "train.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    out = words_teacher / "out"
    assert run_task(
        teacher_name_or_path=words_teacher / "teacher",
        train_file=words_teacher / "train.tsv",
        validation_fraction=0,
        augmentation_model=words_teacher / "lm",
        augmentation_rows=3,
        augmentation_stop_words="none",
        training_stage=stage,
        num_hidden_layers=1,
        **({"layer_map": "2"} if stage == "intermediate" else {}),
        output_dir=out,
    ) == 0  # fmt: skip
    # The same rows once more, and the teacher asked for each by itself.
    tokenizer = AutoTokenizer.from_pretrained(words_teacher / "teacher")
    teacher = AutoModelForSequenceClassification.from_pretrained(words_teacher / "teacher").eval()
    rows = augment(
        datasets.Dataset.from_dict({"sentence": texts, "label": labels}),
        model=AutoModelForMaskedLM.from_pretrained(words_teacher / "lm"),
        tokenizer=tokenizer,
        text_columns=["sentence"],
        args=AugmentationArguments(augmentation_rows=3, augmentation_stop_words="none"),
        seed=42,
    )
    variants = [row for row in rows if row["sentence"] != texts[row["source_id"]]]
    assert len(variants) > 50
    with torch.no_grad():
        hits = [
            int(teacher(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax()) == row["label"]
            for row in variants
        ]
    share = sum(hits) / len(hits)
    shown = capsys.readouterr().out
    assert f"Of {len(variants)} augmented rows the teacher gives {share:.1%} the label of their source." in shown
    card = (out / "README.md").read_text()
    assert f"| Augmented examples | {len(rows)} |" in card and f"| Teacher label agreement | {share:.4g} |" in card


def test_variants_with_labels_are_spread_and_sources_are_none_of_them():
    rows = datasets.Dataset.from_dict(
        {"source_id": [0, 0, 0, 1, 2, 2, 3, 3], "labels": [1, 1, 1, 0, 2, 2, -100, -100]}
    )
    assert labelled_variants(rows, most=99).tolist() == [1, 2, 5]
    assert labelled_variants(rows, most=2).tolist() == [1, 5]
    assert not len(labelled_variants(rows.remove_columns("labels"), most=9))
