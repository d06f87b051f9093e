"""Scripts and notebooks of ``examples/`` run on made-up text, from the first line to the last file."""

import ast
import itertools
import re
from pathlib import Path

import datasets
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from helpers.tiny_text import run_with, sentences, write_models, write_text

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
NAMES = ("blame", "praise")
# A tiny model learns the made-up task with these.
TASK = {"TASK_EPOCHS": 12, "TASK_RATE": 5e-3}


def script(name):
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


def cells(name):
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, a task and a tiny model, and nothing of this repository."""
    place = tmp_path_factory.mktemp("own")
    write_text(place, names=NAMES)
    write_models(place)
    return place


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """The same folder as the current one, with its own cache."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture(scope="module")
def story(folder, tmp_path_factory):
    """What domain_adaptation.py has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        tiny = {"MODEL": "my-bert", "BLOCK_SIZE": 32, "EPOCHS": 4, "RATE": 5e-3}
        return run_with(script("domain_adaptation"), **tiny, **TASK)


def opened(auto_class, folder):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], folder
    return model


def accuracy(folder, table):
    """The accuracy of a saved classifier, computed without the example."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), opened(AutoModelForSequenceClassification, folder)
    rows = [line.rsplit(",", 1) for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    with torch.no_grad():
        predicted = model(**tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)).logits.argmax(-1)
    right = [model.config.id2label[int(i)] == label for i, (_, label) in zip(predicted, rows, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_one_page_that_stands_alone(name):
    text = script(name)
    assert len(text.splitlines()) <= 60
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not roots & {*SCRIPTS, "argparse", "sys"}
    assert roots <= {"collections", "datasets", "hf_pretrain", "numpy", "pathlib", "sacrebleu", "transformers"}


def test_every_stage_of_the_adaptation_opens_with_stock_transformers(story, folder):
    opened(AutoModelForMaskedLM, folder / "adapted" / "continued")
    for name in ("classifier", "classifier-of-the-old"):
        model = opened(AutoModelForSequenceClassification, folder / "adapted" / name)
        assert model.config.id2label == dict(enumerate(NAMES))
    names = ("my-bert", "adapted/continued", "adapted/classifier")
    vocabularies = [AutoTokenizer.from_pretrained(folder / name).get_vocab() for name in names]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_the_text_was_learned_before_the_task(story, folder):
    """Each classifier is nearest to the checkpoint that it was fine-tuned from."""
    names = {
        "old": "my-bert",
        "new": "adapted/continued",
        "a": "adapted/classifier-of-the-old",
        "b": "adapted/classifier",
    }
    tables = {
        key: load_file(folder / name / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
        for key, name in names.items()
    }

    def distance(a, b):
        return float((tables[a] - tables[b]).norm())

    assert distance("old", "new") > 0
    assert distance("b", "new") < distance("b", "old") and distance("a", "old") < distance("a", "new")
    losses = [row["eval_mlm_loss"] for row in story["trainer"].state.log_history if "eval_mlm_loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert (folder / "adapted/continued/README.md").is_file()


def test_the_adaptation_says_how_good_both_models_are(story, folder):
    assert story["new"] == pytest.approx(accuracy(folder / "adapted/classifier", folder / "dev.csv"))
    assert story["old"] == pytest.approx(accuracy(folder / "adapted/classifier-of-the-old", folder / "dev.csv"))
    assert story["new"] > 0.8


def test_fine_tuning(story, place, capsys):
    run_with(script("fine_tuning"), MODEL="adapted/continued", OUT="tuned", EPOCHS=12, RATE=1e-2)
    shown = capsys.readouterr().out
    # Two layers: the head's rate and three powers of 0.8.
    assert "1.0e-02 8.0e-03 6.4e-03 5.1e-03" in shown
    found = {name: float(value) for name, value in re.findall(r"accuracy of the ([a-z ]+) ([\d.]+)", shown)}
    assert found["classifier"] == pytest.approx(accuracy(place / "tuned", place / "dev.csv"))
    assert found["classifier"] > 0.8 > found["most frequent class"] >= 0.5


@pytest.mark.parametrize("augmentation_model", [None, "my-bert"])
def test_distillation(story, place, capsys, augmentation_model):
    out = f"distilled-{augmentation_model}"
    tiny = {"TEACHER": "adapted/classifier", "LAYERS": 1, "STEPS": 40, "RATE": 5e-3, "BATCH": 8, "OUT": out}
    names = run_with(script("distillation"), **tiny, AUGMENTATION_MODEL=augmentation_model)
    shown = capsys.readouterr().out
    for name, label in (("labels", "student of the labels"), ("student", "student of the teacher")):
        model = opened(AutoModelForSequenceClassification, place / out / name)
        assert model.config.num_hidden_layers == 1 and model.config.id2label == dict(enumerate(NAMES))
        measured = accuracy(place / out / name, place / "dev.csv")
        assert f"{label}: accuracy {measured:.4f}" in shown
    opened(AutoModelForSequenceClassification, place / names["states"])
    assert measured > 0.8
    assert ("augmented rows" in shown) == (augmentation_model is not None)
    assert "## Beside its teacher" in (place / out / "student" / "README.md").read_text(encoding="utf-8")


def write_pairs(folder, split, *, count):
    """Write sentences and what stands for their translations: the same words in another order, one of them another word."""
    lines = [sentence for sentence, _ in sentences(count, stream=f"{split} pairs")]
    others = [" ".join(["Today", *reversed(line.removesuffix(" today.").split())]) + "." for line in lines]
    for language, side in (("en", lines), ("de", others)):
        (folder / f"{split}.{language}").write_text("\n".join(side) + "\n", encoding="utf-8")
    return lines, others


@pytest.mark.slow
def test_translation(place, tmp_path, monkeypatch, capsys):
    from sacrebleu import corpus_bleu

    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, "train", count=200)
    sources, expected = write_pairs(tmp_path, "test", count=12)
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "block_size": 32,
    }
    task = {"max_steps": 80, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "optim": "adafactor"}
    text = [str(place / "corpus.txt"), "train.en", "train.de"]
    run_with(script("translation"), TEXT=text, SIZES=tiny, VOCABULARY=160, STEPS=20, BATCH=8, TASK=task)
    shown = dict(re.findall(r"BLEU after pre-training (\w+): ([\d.]+)", capsys.readouterr().out))
    assert set(shown) == {"T5", "MASS", "none"}
    tokenizer = AutoTokenizer.from_pretrained("translation/t5")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained("translation/mass").get_vocab()
    for name, score in shown.items():
        model = opened(AutoModelForSeq2SeqLM, tmp_path / "translation" / f"{name}-fine-tuned").eval()
        inputs = tokenizer(sources, return_tensors="pt", padding=True, return_token_type_ids=False)
        found = tokenizer.batch_decode(model.generate(**inputs, max_length=128), skip_special_tokens=True)
        assert float(score) == pytest.approx(corpus_bleu(found, [expected]).score, abs=0.01)
        # All were fine-tuned: a token costs a new model about ln 160 = 5.1.
        labels = tokenizer(expected, return_tensors="pt", padding=True)["input_ids"]
        with torch.no_grad():
            loss = model(**inputs, labels=labels.masked_fill(labels == tokenizer.pad_token_id, -100)).loss
        assert float(loss) < 2.5
    assert max(map(float, shown.values())) > 0
    tables = {
        name: load_file(tmp_path / "translation" / name / "model.safetensors")["shared.weight"]
        for name in ("t5", "mass", "T5-fine-tuned", "MASS-fine-tuned", "none-fine-tuned")
    }
    assert len({table.shape for table in tables.values()}) == 1
    # With the same start two models would have learned the same.
    tuned = [tables[f"{name}-fine-tuned"] for name in shown]
    assert not any(a.equal(b) for a, b in itertools.combinations(tuned, 2))
    assert float((tuned[0] - tables["t5"]).norm()) < float((tuned[0] - tables["mass"]).norm())


TABLES = {"TASK": {"train": "train.csv", "validation": "dev.csv"}}
TINY_NOTEBOOKS = {
    "adapt_a_model": {"MODEL": "my-bert", "STEPS": 20, "BLOCK_SIZE": 32, "RATE": 5e-3, **TABLES, **TASK},
    "make_it_small": {
        "MODEL": "my-bert", "LAYERS": 1, "STEPS": 10, "RATE": 5e-3, "TEACHER_EPOCHS": 2, "TEACHER_RATE": 5e-3, **TABLES
    },
    "small_electra": {
        "TEXT": ["corpus.txt"], "VOCABULARY": 120, "BLOCK_SIZE": 32, "HIDDEN_SIZE": 32, "LAYERS": 1, "STEPS": 20, "BATCH": 4,
    },
}  # fmt: skip


def test_every_notebook_is_run():
    assert set(TINY_NOTEBOOKS) == set(NOTEBOOKS) and len(NOTEBOOKS) == 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_output(name):
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_of_a_notebook_run(name, place, tmp_path, monkeypatch, capsys):
    for part in ("corpus.txt", "train.csv", "dev.csv", "my-bert"):
        (tmp_path / part).symlink_to(place / part)
    monkeypatch.chdir(tmp_path)
    names = run_with("\n".join(cells(name)), **TINY_NOTEBOOKS[name])
    if name == "adapt_a_model":
        assert names["after"]["eval_mlm_loss"] < names["before"]["eval_mlm_loss"]
        assert set(names["accuracy"]) == {"old", "new"}
    if name == "make_it_small":
        assert opened(AutoModelForSequenceClassification, "student").config.num_hidden_layers == 1
    if name == "small_electra":
        assert not names["info"]["missing_keys"] and "banana" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_a_kernel(name, folder, tmp_path):
    for part in ("corpus.txt", "train.csv", "dev.csv", "my-bert"):
        (tmp_path / part).symlink_to(folder / part)
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    first = next(i for i, cell in enumerate(book.cells) if cell.cell_type == "code")
    changes = "\n".join(f"{key} = {value!r}" for key, value in TINY_NOTEBOOKS[name].items())
    book.cells.insert(first + 1, nbformat.v4.new_code_cell(changes))
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
