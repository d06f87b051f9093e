"""The program `distil-task` on classes of words, on questions and on augmented sentences, from the command line to the card."""

import itertools

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
)

from helpers.distilled_tasks import AUTO_CLASSES, TASKS, save_teacher, task_files
from hf_pretrain.cli import main
from hf_pretrain.data import draws
from hf_pretrain.hub.card import snippets
from hf_pretrain.objectives.distillation.targets import labelled_variants
from hf_pretrain.tasks.augmentation import AugmentationArguments, augment
from method_matrix import TINY

COMMON = {"max_steps": 2, "report_to": "none", "bf16": "false", "logging_steps": 1, "max_length": 24}
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["".join(pair) for pair in itertools.product("bfkpvz", "aioulmnrst")]


def run(**options):
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
    assert run(**common, training_stage="intermediate", student_layers="uniform", output_dir=first) == 0
    assert run(**common, model_name_or_path=first, output_dir=second) == 0
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
    assert run(
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
