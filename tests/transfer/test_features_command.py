"""`hf-pretrain features` from its command line to the table that it prints and the folder that it writes."""

import json
import re

import numpy as np
import pytest
from transformers import AutoModel, BertConfig, set_seed

from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import FeatureClassifier, FeatureRegressor
from hf_pretrain.cli import main
from hf_pretrain.data import draws
from hf_pretrain.hub.record import read_record
from hf_pretrain.transfer.classic_heads import fit_tfidf

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}


def rows(count, *, seed, flips=0.0):
    """Words of which one says the label; a share of the labels is wrong."""
    keys = draws.row_keys(range(count), seed=seed, stream="features command")
    words, chances = draws.integers(keys, 4, high=20).tolist(), draws.uniforms(keys, 1)[:, 0]
    found = []
    for row, chance in zip(words, chances, strict=True):
        number = row[0] % 3 // 2
        label = 1 - number if chance < flips else number
        found.append((f"w{20 + row[1]} w{number} w{20 + row[2]}", ("bad", "good")[label], 10.0 * label + row[3] / 20))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("features")
    set_seed(0)
    AutoModel.from_config(BertConfig(**SIZES)).save_pretrained(place / "encoder")
    tiny_tokenizer().save_pretrained(place / "encoder")
    for name, count, seed in (("train", 150, 0), ("dev", 80, 1), ("other", 80, 2)):
        lines = ["text\tother\tlabel\tvalue"]
        lines += [f"{text}\tw40 w41\t{label}\t{value}" for text, label, value in rows(count, seed=seed)]
        (place / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (place / "tasks.yaml").write_text(
        "single: {type: classification, text: text, label: label, metric: matthews, train_file: train.tsv, "
        "validation_file: dev.tsv}\n"
        "pair: {type: classification, text: [text, other], label: label, train_file: train.tsv}\n"
        "words: {type: tokens, text: text, label: label, train_file: train.tsv}\n"
    )
    return place


def run(place, *options):
    return main(["features", str(place / "encoder"), *map(str, options)])


def table(text):
    """Return the rows of the printed table: name -> numbers."""
    lines = text[text.index("train cv") :].splitlines()[1:]
    found = {}
    for line in lines:
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) > 1 and re.fullmatch(r"-?\d+\.\d+", cells[-1]):
            found[cells[0]] = [float(cell) for cell in cells if re.fullmatch(r"-?\d+\.\d{3}", cell)]
    return found


def test_all_classifiers_beside_tfidf_and_the_best_by_cross_validation_is_written(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run(
            place,
            "--tasks",
            place / "tasks.yaml",
            "--task",
            "single",
            "--classifier",
            "all",
            "--folds",
            "3",
            "--output_dir",
            out,
        )
        == 0
    )
    text = capsys.readouterr().out
    found = table(text)
    assert list(found) == [
        "most frequent class",
        "TF-IDF + linear_svc",
        "logistic",
        "linear_svc",
        "rbf_svm",
        "random_forest",
    ]
    # The metric of the task is the first one behind the cross-validation.
    assert "train cv Matthews  matthews" in text and found["most frequent class"][0] == 0.0
    heads = {
        name: numbers
        for name, numbers in found.items()
        if name in ("logistic", "linear_svc", "rbf_svm", "random_forest")
    }
    assert all(numbers[1] > 0.3 for numbers in heads.values())
    best = json.loads((out / "feature_head.json").read_text())["head"]
    assert heads[best][0] == max(numbers[0] for numbers in heads.values())
    model = FeatureClassifier.from_pretrained(out)
    texts, labels, _ = zip(*rows(80, seed=1), strict=True)
    (evaluation,) = read_record(out).evaluations
    assert evaluation.metrics["accuracy"] == pytest.approx(model.score(list(texts), labels))
    assert evaluation.baseline_name == "TF-IDF + linear_svc" and evaluation.num_examples == 80
    assert AutoModel.from_pretrained(out).config.hidden_size == 24


def test_the_validation_rows_choose_nothing(place, tmp_path, capsys):
    """With other validation rows the cross-validation, the strength and the head stay as they are."""
    heads, printed = [], []
    for name in ("dev", "other"):
        out = tmp_path / name
        options = ["--train_file", place / "train.tsv", "--validation_file", place / f"{name}.tsv"]
        assert (
            run(place, *options, "--text_columns", "text", "--classifier", "all", "--folds", "3", "--output_dir", out)
            == 0
        )
        heads.append((out / "feature_head.json").read_text())
        printed.append(table(capsys.readouterr().out))
    assert heads[0] == heads[1]
    assert printed[0]["logistic"][0] == printed[1]["logistic"][0] and printed[0] != printed[1]


def test_pairs_held_out_rows_layers_and_a_cache(place, tmp_path, capsys):
    options = [
        "--tasks",
        place / "tasks.yaml",
        "--task",
        "pair",
        "--layer",
        "-1",
        "-2",
        "--layer_weights",
        "0.5",
        "0.5",
    ]
    options += ["--cache_dir", tmp_path / "cache", "--folds", "0", "--pooling", "max", "--max_examples", "100"]
    assert run(place, *options, "--output_dir", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "100 examples to train on" in text and list((tmp_path / "cache").rglob("*.safetensors"))
    model = FeatureClassifier.from_pretrained(tmp_path / "out")
    assert model.reads_pairs_ and model.features.combination == (0.5, 0.5) and model.features.layer == (-1, -2)
    assert model.cv_score_ is None and model.predict([("w0", "w1")])[0] in ("bad", "good")
    assert main(["features", str(place / "encoder"), *map(str, options)]) == 0
    strip = lambda shown: [line for line in shown.splitlines() if not line.startswith(("model", "       in"))]  # noqa: E731
    assert strip(capsys.readouterr().out) == strip(text)


def test_columns_of_usual_names_are_found_and_printed(place, capsys):
    files = ["--train_file", place / "train.tsv", "--validation_file", place / "dev.tsv", "--folds", "3"]
    assert run(place, *files) == 0
    found = capsys.readouterr().out
    assert "columns: text text, label label" in found
    assert run(place, *files, "--text_columns", "text", "--label_column", "label") == 0
    assert table(capsys.readouterr().out) == table(found)


def test_values(place, tmp_path, capsys):
    options = ["--train_file", place / "train.tsv", "--validation_file", place / "dev.tsv", "--text_columns", "text"]
    options += [
        "--label_column",
        "value",
        "--task_type",
        "regression",
        "--folds",
        "3",
        "--output_dir",
        tmp_path / "out",
    ]
    assert run(place, *options) == 0
    found = table(capsys.readouterr().out)
    assert list(found) == ["mean of the training rows", "TF-IDF + ridge", "ridge"] and found["ridge"][1] > 0.3
    predicted = FeatureRegressor.from_pretrained(tmp_path / "out").predict(["w1 w20", "w0 w20"])
    assert predicted.dtype == np.float64 and predicted[0] != predicted[1]


def test_an_earlier_classifier_is_replaced_and_what_is_of_others_stays(place, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--train_file", place / "train.tsv", "--validation_file", place / "dev.tsv", "--text_columns", "text"]
    options += ["--folds", "0", "--max_examples", "40", "--output_dir", out]
    assert run(place, *options) == 0
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(place, *options) == 2 and "--overwrite_output_dir" in capsys.readouterr().err
    (out / "notes.txt").write_text("precious")
    assert run(place, *options, "--overwrite_output_dir") == 2
    assert f"{out / 'notes.txt'} is not of a run" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    # What fails leaves the earlier one as it was.
    assert run(place, *options, "--overwrite_output_dir", "--classifier", "logistic", "--label_column", "none") == 2
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert run(place, *options, "--overwrite_output_dir", "--classifier", "linear_svc") == 0
    assert json.loads((out / "feature_head.json").read_text())["head"] == "linear_svc"
    assert not {"_lock", "_unfinished", "_replaced"} & {path.name for path in out.iterdir()}


def test_words_of_a_pair_are_told_apart_by_tfidf():
    """The label is which of the two texts holds the word: one bag of both knows nothing of it."""
    pairs = [("yes thing", "other") if number % 2 else ("other", "yes thing") for number in range(40)]
    fitted = fit_tfidf(pairs, np.arange(40) % 2, kind="classification", folds=4)
    assert fitted.score == 1.0 and fitted.pipeline.predict(pairs).tolist() == (np.arange(40) % 2).tolist()
    # Two words in a row are features too.
    orders = ["a b c", "b a c"] * 20
    assert fit_tfidf(orders, np.arange(40) % 2, kind="classification").score == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give the examples by --tasks"),
        (["--train_file", "train.tsv", "--task_type", "regression", "--label_column", "none"], "label names 'none'"),
        (["--tasks", "tasks.yaml"], "has 3 tasks: name one by --task"),
        (["--tasks", "tasks.yaml", "--task", "sinlge"], "did you mean 'single'"),
        (["--tasks", "tasks.yaml", "--task", "words"], "type='tokens'"),
        (["--tasks", "tasks.yaml", "--task", "single", "--classifier", "ridge"], "classifier='ridge'"),
        (["--tasks", "tasks.yaml", "--task", "single", "--layer", "7"], "layer=7"),
        (["--tasks", "tasks.yaml", "--label_column", "label"], "label_column"),
        (["--tasks", "tasks.yaml", "--task", "single", "--output_dir", "."], "is in use"),
        (["--train_file", "train.tsv", "--text_columns", "text", "--task", "single"], "task"),
        (
            ["--tasks", "tasks.yaml", "--layer", "1", "2", "--layer_weights", "1", "2", "--combination", "sum"],
            "no effect",
        ),
    ],
)
def test_refused_in_one_line(options, message, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["features", "encoder", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "train cv" not in captured.out
