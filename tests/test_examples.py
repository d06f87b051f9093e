"""The programs of ``examples/`` run from the command line to the last file, on made-up text."""

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_pretrain.cli import run_program
from hf_pretrain.data import draws

EXAMPLES = Path(__file__).parents[1] / "examples"
THINGS = ("model", "ship", "cat", "engine", "paper", "garden", "river", "sailor")
# Enough epochs for the same accuracy with the docstrings of any installed packages.
TINY = {
    "base_steps": 3,
    "adaptation_steps": 40,
    "batch_size": 8,
    "block_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 1000,
    "base_corpus_bytes": 60_000,
    "finetuning_learning_rate": 5e-3,
    "finetuning_epochs": 30,
    "learning_rate": 5e-3,
}


@contextmanager
def loaded(name):
    """An example as a module, under the name by which the other examples may import it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def example():
    with loaded("domain_adaptation") as module:
        yield module


@pytest.fixture(scope="module")
def fine_tuning(example):
    with loaded("fine_tuning") as module:
        yield module


@pytest.fixture(scope="module")
def distillation(fine_tuning):
    with loaded("distillation") as module:
        yield module


def sentences(count, *, stream):
    """Pairs of a sentence and its label, which one word of it tells."""
    numbers = draws.integers(draws.row_keys(range(count), seed=0, stream=stream), 2, high=2**20).tolist()
    for first, second in numbers:
        good = second % 2 == 0
        yield (
            f"The {THINGS[first % len(THINGS)]} was {'fine' if good else 'poor'} today.",
            "praise" if good else "blame",
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text = [sentence for sentence, _ in sentences(600, stream="own text")]
    documents = ["\n".join(text[i : i + 6]) for i in range(0, len(text), 6)]
    (folder / "own.txt").write_text("\n\n".join(documents), encoding="utf-8")
    for name, count in (("train", 160), ("dev", 40)):
        lines = [f"{sentence}\t{label}\n" for sentence, label in sentences(count, stream=name)]
        (folder / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def command(files, output_dir, **options):
    given = {
        "train_file": files / "own.txt",
        "task_train": files / "train.tsv",
        "task_validation": files / "dev.tsv",
        "output_dir": output_dir,
        **TINY,
        **options,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def story(example, files, tmp_path_factory):
    """The results of the example without a checkpoint."""
    folder = tmp_path_factory.mktemp("story") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        assert run_program(example.main, command(files, folder)) == 0
    return folder


def test_every_stage_opens_with_stock_transformers(story):
    for stage in ("base", "continued"):
        _, info = AutoModelForMaskedLM.from_pretrained(story / stage, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    model, info = AutoModelForSequenceClassification.from_pretrained(story / "classifier", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "blame", 1: "praise"}
    vocabularies = [
        AutoTokenizer.from_pretrained(story / name).get_vocab() for name in ("base", "continued", "classifier")
    ]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_the_text_was_learned_before_the_task(story):
    """Each classifier is nearest to the checkpoint that it was fine-tuned from."""
    tables = {
        name: load_file(story / name / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
        for name in ("base", "continued", "classifier", "classifier-of-the-base")
    }

    def distance(a, b):
        return float((tables[a] - tables[b]).norm())

    assert distance("base", "continued") > 0
    assert distance("classifier", "continued") < distance("classifier", "base")
    assert distance("classifier-of-the-base", "base") < distance("classifier-of-the-base", "continued")
    log = json.loads((story / "continued" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [row["eval_mlm_loss"] for row in log if "eval_mlm_loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_the_card_says_where_it_comes_from_and_how_good_it_is(story, files):
    card = ModelCard.load(story / "classifier" / "README.md")
    assert "pre-trained from scratch on the docstrings" in card.text
    assert "own.txt" in card.text and str(story) not in card.text and str(files) not in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_name) == ("accuracy", "dev.tsv")
    assert result.metric_value == accuracy(story / "classifier", files / "dev.tsv") > 0.8
    assert f"| the base model, continued (this model) | {result.metric_value:.4f} |" in card.text


def accuracy(folder, path):
    """The accuracy of a saved classifier, computed without the example."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    with torch.no_grad():
        predicted = model(**tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)).logits.argmax(-1)
    right = [model.config.id2label[int(i)] == label for i, (_, label) in zip(predicted, rows, strict=True)]
    return sum(right) / len(right)


def test_a_checkpoint_of_ones_own_is_continued_and_named_in_the_card(
    story, example, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "out"
    options = {"model_name_or_path": story / "base", "adaptation_steps": 2, "finetuning_epochs": 1}
    given = command(files, folder, **options)
    for size in ("hidden_size", "num_hidden_layers", "vocab_size"):
        # A checkpoint has its own.
        place = given.index(f"--{size}")
        del given[place : place + 2]
    assert run_program(example.main, given) == 0
    assert not (folder / "base").exists()
    text = (folder / "classifier" / "README.md").read_text(encoding="utf-8")
    assert "Base model: `base`, a local checkpoint." in text
    assert str(story) not in text
    shown = capsys.readouterr().out
    assert "Accuracy after fine-tuning:" in shown
    AutoModelForSequenceClassification.from_pretrained(folder / "classifier")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task_train", "no tab here\n", "line 1"),
        ("task_train", "a\tx\nb\tx\n", "nothing to tell apart"),
        ("task_train", "", "no sentence"),
        ("task_validation", "a\tneither\n", "neither"),
        ("task_validation", None, "can not be read"),
        ("output_dir", "used", "in use"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(example, files, tmp_path, capsys, name, content, message):
    folder, wrong = tmp_path / "out", tmp_path / "wrong.tsv"
    options = {} if name == "output_dir" else {name: wrong}
    if name == "output_dir":
        folder.mkdir()
        (folder / "precious.txt").write_text(content)
    elif content is not None:
        wrong.write_text(content)
    assert run_program(example.main, command(files, folder, **options)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not list(folder.glob("*/"))


def options(**given):
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_fine_tuning_needs_neither_a_checkpoint_nor_a_task(fine_tuning, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "out"
    tiny = {"pretraining_steps": 2, "pretraining_bytes": 60_000, "docstrings": 10, "num_train_epochs": 1}
    assert run_program(fine_tuning.main, options(output_dir=folder, **tiny)) == 0
    model, info = AutoModelForSequenceClassification.from_pretrained(folder / "classifier", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sorted(model.config.label2id) == ["numpy", "scipy", "sklearn", "torch", "transformers"]
    assert (folder / "base" / "README.md").is_file()
    shown = capsys.readouterr().out
    assert "majority class" in shown
    # Three layers: the head's rate and four powers of 0.8.
    assert "1.0e-03  8.0e-04  6.4e-04  5.1e-04  4.1e-04" in shown


def test_fine_tuning_of_a_checkpoint_on_a_task(story, fine_tuning, files, tmp_path, capsys):
    folder = tmp_path / "out"
    given = {"task_train": files / "train.tsv", "task_validation": files / "dev.tsv", "output_dir": folder}
    rates = {"learning_rate": 5e-3, "num_train_epochs": 30, "layerwise_learning_rate_decay": 0.9}
    assert run_program(fine_tuning.main, options(model_name_or_path=story / "continued", **given, **rates)) == 0
    measured = accuracy(folder / "classifier", files / "dev.tsv")
    assert measured > 0.8, measured
    shown = capsys.readouterr().out
    labels = [line.split("\t")[1] for line in (files / "dev.tsv").read_text(encoding="utf-8").splitlines()]
    assert any(line.split() == ["fine-tuned", f"{measured:.4f}"] for line in shown.splitlines())
    guesses = {f"{labels.count(label) / len(labels):.4f}" for label in set(labels)}
    assert any(line.split()[:2] == ["majority", "class"] and line.split()[2] in guesses for line in shown.splitlines())


def test_the_task_of_docstrings(fine_tuning):
    task = fine_tuning.docstring_task(10)
    assert len(task.train) + len(task.validation) == 50
    assert set(task.train["label"]) == set(range(5))
    train, held_out = set(task.train["sentence"]), set(task.validation["sentence"])
    assert held_out and not train & held_out
    assert not any(name in text.lower() for name in fine_tuning.PACKAGES for text in train | held_out)
    assert fine_tuning.docstring_task(10).train["sentence"] == task.train["sentence"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task_train": "train.tsv"}, "go together"),
        ({"layerwise_learning_rate_decay": 0}, "above 0"),
        ({"output_dir": "."}, "in use"),
        ({"task_train": "none.tsv", "task_validation": "none.tsv"}, "none.tsv can not be read"),
    ],
)
def test_fine_tuning_refuses_bad_input_before_anything_is_trained(
    fine_tuning, tmp_path, monkeypatch, capsys, given, message
):
    (tmp_path / "precious.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert run_program(fine_tuning.main, options(**({"output_dir": "out"} | given))) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_distillation_needs_neither_a_checkpoint_nor_a_task(distillation, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "out"
    tiny = {"pretraining_steps": 2, "pretraining_bytes": 60_000, "docstrings": 6, "num_train_epochs": 1}
    tiny |= {"hidden_size": 32, "num_hidden_layers": 2, "student_layers": 1, "intermediate_steps": 2}
    tiny |= {"prediction_steps": 2, "augmentation_rows": 1, "max_length": 32}
    assert run_program(distillation.main, options(output_dir=folder, **tiny)) == 0
    for name, layers in (("teacher", 2), ("labels", 1), ("intermediate", 1), ("student", 1)):
        model, info = AutoModelForSequenceClassification.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.config.num_hidden_layers == layers and "numpy" in model.config.label2id
    shown = capsys.readouterr().out
    assert "augmented rows the teacher gives" in shown
    text = (folder / "student" / "README.md").read_text(encoding="utf-8")
    assert "## Beside its teacher" in text and str(tmp_path) not in text


def test_distillation_of_a_checkpoint_on_a_task(story, distillation, files, tmp_path, capsys):
    folder = tmp_path / "out"
    given = {"task_train": files / "train.tsv", "task_validation": files / "dev.tsv", "output_dir": folder}
    rates = {"learning_rate": 5e-3, "num_train_epochs": 30, "distillation_rate": 5e-3, "max_length": 32}
    steps = {"student_layers": 1, "intermediate_steps": 10, "prediction_steps": 40, "augmentation_rows": 0}
    assert (
        run_program(distillation.main, options(model_name_or_path=story / "continued", **given, **rates, **steps)) == 0
    )
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, words in (("teacher", ["teacher"]), ("labels", "student of the labels alone".split())):
        measured = accuracy(folder / name, files / "dev.tsv")
        assert any(line[: len(words) + 1] == [*words, f"{measured:.4f}"] for line in shown), name
    measured = accuracy(folder / "student", files / "dev.tsv")
    assert measured > 0.8, measured
    assert any(line[:5] == ["student", "of", "the", "teacher", f"{measured:.4f}"] for line in shown)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task_train": "train.tsv"}, "go together"),
        ({"output_dir": "."}, "in use"),
        ({"task_train": "none.tsv", "task_validation": "none.tsv"}, "none.tsv can not be read"),
    ],
)
def test_distillation_refuses_bad_input_before_anything_is_trained(
    distillation, tmp_path, monkeypatch, capsys, given, message
):
    (tmp_path / "precious.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert run_program(distillation.main, options(**({"output_dir": "out"} | given))) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
