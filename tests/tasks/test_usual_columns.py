"""Columns of texts and labels by their usual names: as GLUE's files lie there, and in tables, JSON lines and Parquet alike."""

import json

import datasets
import pytest

from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.suite import find_tasks
from hf_pretrain.tasks.files import column_names
from hf_pretrain.tasks.spec import TaskSpec, load_task, read_tasks, with_text_columns

# What files begin with, their type, and which columns are meant.
FILES = {
    "sst2": ("classification", "sentence\tlabel\nw1 w2\t0\nw3\t1\n", ("sentence",), "label"),
    "cola": ("classification", "gj04\t1\t\tw1 w2\ngj04\t0\t*\tw3 w4\n", ("sentence",), "label"),
    "rte": (
        "classification",
        "index\tsentence1\tsentence2\tlabel\n0\tw1\tw2\tentailment\n1\tw3\tw4\tnot_entailment\n",
        ("sentence1", "sentence2"),
        "label",
    ),
    "qnli": (
        "classification",
        "index\tquestion\tsentence\tlabel\n0\tw1\tw2\tentailment\n1\tw3\tw4\tnot_entailment\n",
        ("question", "sentence"),
        "label",
    ),
    "qqp": (
        "classification",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tw1\tw2\t0\n1\t3\t4\tw3\tw4\t1\n",
        ("question1", "question2"),
        "is_duplicate",
    ),
    "mrpc": (
        "classification",
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\tw1 "w2\tw3\n0\t7\t8\tw4\tw5\n',
        ("#1 String", "#2 String"),
        "Quality",
    ),
    "stsb": (
        "regression",
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tw1\tw2\t5.0\n1\tnews\tw3\tw4\t1.5\n",
        ("sentence1", "sentence2"),
        "score",
    ),
    "stsb_bare": ("regression", "w1 w2\tw3\t5.0\nw4\tw5\t1.5\n", ("sentence1", "sentence2"), "label"),
    "capitals": ("classification", "Text\tLabel\nw1\tgood\nw2\tbad\n", ("Text",), "Label"),
    "imdb": ("classification", "review\tsentiment\nw1 w2\tpositive\nw3\tnegative\n", ("review",), "sentiment"),
    "words": ("tokens", "tokens\tner_tags\ttext\nw1 w2\tO B-PER\tw1 w2\nw3\tO\tw3\n", ("tokens",), "ner_tags"),
}


def write(folder, name, text, *, suffix="tsv"):
    path = folder / f"{name}.{suffix}"
    if suffix == "tsv":
        path.write_text(text)
    elif suffix == "csv":
        quoted = [['"' + cell.replace('"', '""') + '"' for cell in line.split("\t")] for line in text.splitlines()]
        path.write_text("\n".join(map(",".join, quoted)) + "\n")
    else:
        header, *lines = (line.split("\t") for line in text.splitlines())
        path.write_text("".join(json.dumps(dict(zip(header, line, strict=True))) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_files_as_they_are(name, tmp_path):
    kind, text, texts, label = FILES[name]
    for suffix in ("tsv", "csv") if name in ("cola", "stsb_bare") else ("tsv", "csv", "jsonl"):
        path = write(tmp_path, name, text, suffix=suffix)
        spec = TaskSpec(name=name, type=kind, train_file=(path,), validation_file=(path,))
        data = load_task(spec)
        assert (data.spec.text, data.spec.label, len(data.train)) == (texts, label, 2), suffix
        assert data.columns == f"text {' and '.join(texts)}, label {label}"
        assert with_text_columns(spec).text == texts
        if kind != "tokens":
            assert set(texts) <= set(column_names(path))
    # A named column is taken, whatever else has a usual name.
    named = TaskSpec(name=name, type=kind, text=texts, label=label, train_file=(path,), validation_file=(path,))
    assert load_task(named).train[0] == data.train[0]


def test_the_words_of_a_row_stay_with_their_column(tmp_path):
    """A quotation mark of a .tsv is a character, and of a .csv a cell's border."""
    text = FILES["mrpc"][1]
    for suffix in ("tsv", "csv", "jsonl"):
        path = write(tmp_path, "mrpc", text, suffix=suffix)
        spec = TaskSpec(name="mrpc", type="classification", train_file=(path,), validation_file=(path,))
        assert load_task(spec).texts("train") == [('w1 "w2', "w3"), ("w4", "w5")], suffix


def test_names_of_parquet_are_known_without_its_rows(tmp_path):
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"premise": ["w1"], "hypothesis": ["w2"], "label": [0]}).to_parquet(path)
    assert column_names(path) == ["premise", "hypothesis", "label"]
    assert column_names(write(tmp_path, "b", "w1\tgood\nw2\tgood\n")) == ["sentence", "label"]


@pytest.mark.parametrize(
    ("kind", "text", "match"),
    [
        (
            "classification",
            "opinion\tstars\nw1\t1\nw2\t0\n",
            "no column of texts .*: the rows have opinion, stars; .*--text_columns",
        ),
        (
            "classification",
            "text\tsentence\tlabel\nw1\tw2\t0\n",
            "usual names of texts, sentence, or text: .*--text_columns",
        ),
        (
            "classification",
            "text\tstars\nw1\t1\nw2\t0\n",
            "usual name of labels .*the rows have text, stars; .*--label_column",
        ),
        ("classification", "text\tscore\nw1\t1\nw2\t0\n", "--task_type regression"),
        ("regression", "text\tscore\tlabel\nw1\t1\t2\n", "usual names of labels, score, or label: .*--label_column"),
        ("tokens", "tokens\tner_tags\tpos_tags\nw1\tO\tX\n", "usual names of labels, ner_tags, or pos_tags"),
        ("tokens", "tokens\twords\ttags\nw1\tw1\tO\n", "usual names of texts, tokens, or words"),
        ("span", "question\tpassage\tanswers\nw1\tw2\tw2\n", "the rows have question, passage, answers"),
    ],
)
def test_what_is_not_clear_is_refused(kind, text, match, tmp_path):
    path = write(tmp_path, "train", text)
    with pytest.raises(InputError, match=match) as caught:
        load_task(TaskSpec(name="mine", type=kind, train_file=(path,), validation_file=(path,)))
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


def test_choices_need_their_text():
    with pytest.raises(InputError, match=r"text=\[\]: name one column"):
        TaskSpec(name="mine", type="choice", choices=("a", "b"), train_file=("x.tsv",))


def test_a_yaml_without_columns_is_measured_as_what_it_is(tmp_path):
    """Pairs with values are measured by similarity, so the columns have to be known before."""
    write(tmp_path, "stsb", FILES["stsb"][1])
    (tmp_path / "tasks.yaml").write_text("stsb: {type: regression, train_file: stsb.tsv, validation_file: stsb.tsv}\n")
    assert read_tasks(tmp_path / "tasks.yaml")["stsb"].text == ()
    (task,) = find_tasks([str(tmp_path / "tasks.yaml")])
    assert task.spec.text == ("sentence1", "sentence2") and task.hows[0] == "similarity"


def test_a_folder_of_scores_is_of_values_and_one_that_is_not_clear_is_refused(tmp_path):
    for name, text in (
        ("mine", FILES["stsb"][1]),
        ("both", "text\tsentence\tlabel\nw1\tw2\t0\n"),
        ("qqp", FILES["qqp"][1]),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "train", text)
    mine, qqp = find_tasks(["mine", "qqp"], data_dir=tmp_path)
    assert (mine.spec.type, mine.spec.label) == ("regression", "score")
    assert (qqp.spec.type, qqp.spec.label) == ("classification", "is_duplicate")
    with pytest.raises(
        InputError, match="several columns have usual names of texts.*describe the task 'both' in a YAML file"
    ):
        find_tasks(["both"], data_dir=tmp_path)
