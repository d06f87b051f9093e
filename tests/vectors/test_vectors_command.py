"""The program of static vectors: every method makes a folder that opens, and options without effect are refused."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from helpers.tiny_text import write_models, write_text
from hf_pretrain import cli
from hf_pretrain.commands import vectors as command
from hf_pretrain.commands import vectors_card
from hf_pretrain.vectors.folder import WordVectors
from hf_pretrain.vectors.formats import read_vectors
from hf_pretrain.vectors.text_vectors import SparseTextVectorizer

SPARSE = ("onehot", "counts", "tfidf")
DENSE = {
    "cooccurrence": [],
    "pmi": ["--window", "3", "--window_direction", "left"],
    "ppmi": ["--window_direction", "separate", "--shift", "2"],
    "lsa": ["--idf", "textbook"],
    "skipgram": ["--backend", "torch", "--epochs", "2"],
    "cbow": ["--backend", "torch", "--hierarchical", "true", "--epochs", "2"],
    "glove": ["--x_max", "100", "--epochs", "3"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with text and tiny models, in which a test runs."""
    write_text(tmp_path)
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv, expected=0):
    assert cli.main(["vectors", *argv, "--output_dir", "out"]) == expected


@pytest.mark.parametrize("method", DENSE)
def test_a_method_makes_vectors_that_both_libraries_open(method, folder, capsys):
    run("--method", method, "--train_file", "corpus.txt", "--dimensions", "4", "--min_count", "2", *DENSE[method])
    assert f"made   {method}" in capsys.readouterr().out
    text = "The ship was fine today."
    model, tokenizer = AutoModel.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    pooled = model(**tokenizer([text], return_tensors="pt")).pooler_output.detach().numpy()
    assert pooled.shape == (1, 4) and np.abs(pooled).max() > 0
    np.testing.assert_array_equal(SentenceTransformer("out", device="cpu").encode([text]), pooled)
    vectors = WordVectors.open("out")
    assert vectors.counts is not None and (np.diff(vectors.counts) <= 0).all()
    assert model.config.method == method and model.config.training["train_file"] == ["corpus.txt"]
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert vectors_card._DESCRIPTIONS[method][0] in card and "## Neighbours" in card and "plots/words.svg" in card
    assert (folder / "out" / "plots" / "words.svg").is_file() and not (folder / "out" / "_work").exists()


@pytest.mark.parametrize("method", SPARSE)
def test_sparse_vectors_are_a_folder_too(method, folder):
    run("--method", method, "--train_file", "corpus.txt", "--min_count", "2")
    vectorizer = SparseTextVectorizer.from_pretrained("out")
    row = vectorizer.transform(["the ship, the ship"]).toarray()[0]
    counts = {word: row[column] for column, word in enumerate(vectorizer.get_feature_names_out()) if row[column]}
    assert set(counts) >= {"the", "ship"}
    assert counts["ship"] == {"onehot": 1, "counts": 2}.get(method, pytest.approx(counts["ship"]))
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        'SparseTextVectorizer.from_pretrained(".")' in card and 'AutoModel.from_pretrained(".", trust_remote' in card
    )
    model, tokenizer = AutoModel.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    pooled = model(**tokenizer(["the ship, the ship"], return_tensors="pt")).pooler_output
    np.testing.assert_array_equal(pooled.to_dense().detach().numpy()[0], row.astype(np.float32))


def test_an_encoder_gives_its_tokens_vectors(folder):
    run("--method", "distil", "--model_name_or_path", "my-bert", "--dimensions", "6")
    assert SentenceTransformer("out", device="cpu").encode(["The ship was fine."]).shape == (1, 6)


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.bin", "vectors.vec"])
def test_what_is_exported_is_imported_again(name, folder):
    run("--train_file", "corpus.txt", "--dimensions", "4", "--min_count", "2", "--export_file", name)
    made = WordVectors.open("out")
    (folder / "out").rename(folder / "first")
    run("--method", "import", "--vectors_file", name)
    found = WordVectors.open("out")
    assert found.words == made.words == read_vectors(name).words
    np.testing.assert_array_equal(found.vectors, made.vectors)


def test_what_people_said_of_words_is_compared(folder, capsys):
    (folder / "pairs.tsv").write_text(
        "ship\tsea\t9\nship\ttoday\t2\nfine\tpoor\t7\nship\tunheard\t1\n", encoding="utf-8"
    )
    (folder / "questions.txt").write_text(": gram1\nship sea fine poor\n", encoding="utf-8")
    vocabulary = {word for line in (folder / "corpus.txt").read_text().split("\n") for word in line.lower().split()}
    assert {"ship", "today"} <= {word.strip(".") for word in vocabulary}
    options = ["--word_similarity_file", "pairs.tsv", "--analogy_file", "questions.txt"]
    run("--train_file", "corpus.txt", "--dimensions", "4", "--min_count", "1", *options)
    assert "of 4 pairs" in capsys.readouterr().out
    assert json.loads((folder / "out" / "pretraining" / "run.json").read_text())


def test_a_run_that_was_cut_off_goes_on(folder, monkeypatch, capsys):
    options = ["--method", "glove", "--train_file", "corpus.txt", "--dimensions", "4", "--min_count", "2"]
    run(*options, "--epochs", "4")
    whole = WordVectors.open("out").vectors
    (folder / "out").rename(folder / "first")
    train = command.train_glove

    def cut_off(counts, glove, **places):
        train(counts, command.GloVeOptions(**vars(glove) | {"epochs": 2}), **places)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train_glove", cut_off)
    run(*options, "--epochs", "4", expected=130)
    monkeypatch.setattr(command, "train_glove", train)
    run(*options, "--epochs", "4", expected=2)
    assert "holds a run that was cut off: go on with --resume true" in capsys.readouterr().err
    run(*options, "--epochs", "5", "--resume", "true", expected=2)
    assert "epochs=5 was 4 in the run" in capsys.readouterr().err
    run(*options, "--epochs", "4", "--resume", "true")
    np.testing.assert_array_equal(WordVectors.open("out").vectors, whole)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "method='ppmi' reads text: give --train_file"),
        (["--train_file", "corpus.txt", "--demo_corpus", "true"], "method='ppmi' reads text"),
        (["--method", "distil"], "method='distil' needs --model_name_or_path"),
        (["--method", "import"], "method='import' needs --vectors_file"),
        (["--method", "skipgran", "--train_file", "corpus.txt"], "skipgram"),
        (["--train_file", "corpus.txt", "--epochs", "3"], "epochs=3 has no effect with method='ppmi'"),
        (["--train_file", "corpus.txt", "--negatives", "3"], "negatives=3 has no effect"),
        (["--method", "lsa", "--train_file", "corpus.txt", "--window", "3"], "window=3 has no effect"),
        (["--train_file", "corpus.txt", "--dimensions", "100000"], "dimensions=100000 must be from 1 to"),
        (["--train_file", "corpus.txt", "--min_count", "100000"], "min_count=100000"),
        (["--train_file", "corpus.txt", "--resume", "true"], "resume"),
        (
            ["--method", "cbow", "--train_file", "corpus.txt", "--crosses_lines", "true"],
            "crosses_lines=True has no effect",
        ),
        (["--train_file", "corpus.txt", "--analogy_file", "none.txt"], "'none.txt' is no file"),
        (["--train_file", "corpus.txt", "--export_file", "none/v.txt"], "export_file='none/v.txt' is in no folder"),
        (["--method", "import", "--vectors_file", "corpus.txt"], "corpus.txt"),
    ],
)
def test_bad_options_are_refused_in_one_line(argv, message, folder, capsys):
    run(*argv, expected=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (folder / "out" / "_work").exists()


def test_a_folder_in_use_is_left_alone(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "letter.txt").write_text("dear")
    run("--train_file", "corpus.txt", expected=2)
    assert "output_dir='out' is in use" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["letter.txt"]


def test_the_card_answers_analogies_of_known_words(tmp_path):
    # Axes: person, royal, female.
    table = {"man": [1, 0, 0], "king": [1, 1, 0], "woman": [1, 0, 1], "queen": [1, 1, 1], "he": [0, 1, 1]}
    vectors = WordVectors(tuple(table), np.array(list(table.values()), dtype=np.float32))
    sections = vectors_card._sections(vectors, tmp_path)
    assert sections["Analogies"].splitlines()[2:] == ["| man : king = woman : ? | queen, he |"]
    without = WordVectors(("he", "man"), np.eye(2, dtype=np.float32))
    assert "Analogies" not in vectors_card._sections(without, tmp_path)
