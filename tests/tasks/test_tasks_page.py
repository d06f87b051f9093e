"""The page on tasks and the lists of tasks among the examples work as they are written."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering

from helpers.method_matrix import TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import load_task, read_tasks
from hf_pretrain.tasks.metrics import METRICS_OF_TYPES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
LINES = {
    "sst2": ["w1 fine\t1", "w2 bad\t0"],
    "cola": ["gj04\t1\t\tw1 w2", "gj04\t0\t*\tw2 w1"],
    "rte": ["index\tsentence1\tsentence2\tlabel", "0\tw1\tw2\tnot_entailment", "1\tw2\tw3\tentailment"],
    "stsb": ["w1 w2,w2 w1,2.5", '"w1, w2",w3,0'],
}
COLUMNS = {
    "boolq": ["question", "passage"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "multirc": ["paragraph", "question", "answer"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "wsc": ["text", "span1_text", "span2_text"],
}


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("reviews").mkdir()
    for name in ("train", "dev"):
        Path(f"reviews/{name}.tsv").write_text("w1 big\t1\nw2 small\t0\nw3 big\t1\n")
    Path("tasks.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)[0])
    torch.manual_seed(0)
    config = BertConfig(**TINY, vocab_size=VOCAB_SIZE)
    for folder, kind in (("my-bert", BertForMaskedLM), ("my-qa", BertForQuestionAnswering)):
        kind(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    tune, metric, ask = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    names = {"text": "w1 was fine today"}
    for part in (tune.replace('report_to="none"', 'report_to="none", use_cpu=True'), metric, ask):
        exec(part, names)
    assert names["trainer"].state.global_step == 3 and names["score"] == {"entity_f1": 1.0}
    assert names["task"].labels == ["negative", "positive"]
    assert 1 <= len(names["answers"]) <= 3 and names["answers"][0].text in "w1 was fine today"


def test_the_pages_table_has_the_metrics_of_each_type():
    rows = {row.split("`")[1]: row.split("|")[5] for row in PAGE.splitlines() if row.startswith("| `")}
    del rows["type"]
    assert {kind: tuple(re.findall(r"`(\w+)`", cell)) for kind, cell in rows.items()} == METRICS_OF_TYPES


def test_the_list_of_glue(tmp_path):
    """As the files lie there: tables without a header, and with one."""
    for task, lines in LINES.items():
        (tmp_path / task).mkdir()
        for name in ("train", "dev"):
            suffix = "csv" if task == "stsb" else "tsv"
            (tmp_path / task / f"{name}.{suffix}").write_text("\n".join(lines) + "\n")
    (tmp_path / "xquad").mkdir()
    asked = [{"question": "who", "answers": [{"text": f"w{i}", "answer_start": 0}]} for i in range(9)]
    articles = [{"paragraphs": [{"context": f"w{i} w1", "qas": [asked[i]]}]} for i in range(9)]
    (tmp_path / "xquad" / "xquad.en.json").write_text(json.dumps({"data": articles}))
    specs = read_tasks(ROOT / "examples" / "tasks" / "glue.yaml", data_dir=tmp_path)
    tasks = {name: load_task(spec) for name, spec in specs.items()}
    assert tasks["sst2"].targets("train").tolist() == [1, 0] and tasks["cola"].main_metric == "matthews"
    assert tasks["cola"].texts("train") == ["w1 w2", "w2 w1"] and tasks["cola"].labels[1] == "acceptable"
    assert tasks["rte"].labels == ["entailment", "not_entailment"]
    assert tasks["stsb"].texts("train")[1] == ("w1, w2", "w3") and tasks["stsb"].targets("train")[0] == 2.5
    assert len(tasks["xquad"].train) == 8 and len(tasks["xquad"].validation) == 1


@pytest.mark.parametrize("name", COLUMNS)
def test_the_list_of_babylm(name, tmp_path):
    path = ROOT / "examples" / "tasks" / "babylm.yaml"
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == list(COLUMNS)
    spec = read_tasks(path, data_dir=tmp_path)[name]
    rows = [{column: f"{column} {label}" for column in COLUMNS[name]} | {"label": label} for label in (0, 1, 2)]
    rows = rows if name == "mnli" else rows[:2]
    for split in ("train", "valid"):
        (tmp_path / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task(spec)
    assert data.targets("train").tolist() == list(range(len(rows))) and len(data.texts("train")[0]) == 2
