"""An ELMo on tasks whose words its tokenizer does not know: what it learns, it has read from their characters."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from helpers.method_matrix import tiny_tokenizer
from helpers.task_runs import write_tasks
from hf_pretrain import ElmoConfig, ElmoModel, ElmoTokenizer, cli
from hf_pretrain.hub.card import snippets
from hf_pretrain.tasks.spec import load_task, read_tasks

SIZES = {"hidden_size": 24, "cell_size": 24, "character_embedding_size": 8, "filters": [[1, 16], [2, 16]]}
SIZES |= {"max_characters": 10, "hidden_dropout_prob": 0.0, "classifier_dropout": 0.0, "num_hidden_layers": 1}


def strangers(line):
    """A line in which the words that decide are none of the vocabulary."""
    return line.replace(" w0 ", " ax ").replace(" w1 ", " by ").replace('"w0"', '"ax"').replace('"w1"', '"by"')


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("elmo")
    write_tasks(place)
    for path in place.glob("*.jsonl"):
        path.write_text("".join(map(strangers, path.open())))
    set_seed(0)
    tokenizers = {
        "words": ElmoTokenizer.from_fast(tiny_tokenizer(), max_characters=10),
        "characters": ElmoTokenizer.without_vocabulary(max_characters=10),
    }
    for name, tokenizer in tokenizers.items():
        model = ElmoModel(ElmoConfig(vocab_size=len(tiny_tokenizer()) if name == "words" else 0, **SIZES))
        if name == "words":
            letters = torch.tensor(tokenizer.vocabulary_characters(), dtype=torch.int32)
            model.embeddings.characters.copy_(letters)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


def command(place, out, name, *options):
    given = [name, *options, "--tasks", place / "tasks.yaml", "--output_dir", out]
    assert cli.main([*map(str, given)]) == 0
    return out


TRAINED = (
    "--strategy full --learning_rate 1e-2 --max_steps 60 --per_device_train_batch_size 16 --use_cpu true --bf16 false"
)
TRAINED = [*TRAINED.split(), "--disable_tqdm", "true"]


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_fine_tuning_reads_the_characters(place, tmp_path, kind, capsys, monkeypatch):
    out = command(
        place, tmp_path / "out", "finetune", place / kind, "--task", "classification", "--tfidf", "false", *TRAINED
    )
    assert json.loads((out / "all_results.json").read_text())["scores"]["accuracy"] > 0.95
    assert "trust_remote_code=True" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = model(**tokenizer([line["text"] for line in lines], padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose([line["logits"] for line in lines], logits, atol=1e-5)
    monkeypatch.chdir(out)
    codes = snippets((out / "README.md").read_text())
    assert codes and all("trust_remote_code=True" in code for code in codes)
    for code in codes:
        exec(code, {})


@pytest.mark.parametrize("task", ["tokens", "entities"])
def test_words_have_their_classes_by_their_characters(place, tmp_path, task):
    out = command(place, tmp_path / "out", "finetune", place / "words", "--task", task, "--tfidf", "false", *TRAINED)
    assert json.loads((out / "all_results.json").read_text())["scores"]["accuracy"] > 0.95


def test_several_tasks_read_the_characters(place, tmp_path):
    names = ["--task", "classification", "tokens", "--sampling", "equal"]
    out = command(place, tmp_path / "out", "multitask", place / "words", *names, *TRAINED, "--max_steps", "100")
    scores = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for name in ("classification", "tokens"):
        assert next(row[f"eval_{name}_accuracy"] for row in reversed(scores) if f"eval_{name}_accuracy" in row) > 0.95


def test_features_read_the_characters(place, tmp_path, capsys):
    options = ["--task", "classification", "--classifier", "logistic", "--layer", "0"]
    given = ["features", place / "words", "--tasks", place / "tasks.yaml", *options]
    assert cli.main([*map(str, given)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "logistic" in line)
    assert "1.000" in line


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_has_the_characters_of_each_word_and_none_at_padding(place, side):
    data = load_task(read_tasks(place / "tasks.yaml")["classification"])
    tokenizer = AutoTokenizer.from_pretrained(place / "words")
    tokenizer.padding_side = side
    rows = data.encoded("validation", tokenizer, max_length=16)
    # Two bytes a character.
    assert rows.features["character_ids"].feature.feature.dtype == "int16"
    short = {name: value[:3] if isinstance(value, list) else value for name, value in rows[1].items()}
    batch = data.collator(tokenizer)([rows[0], short])
    assert batch["character_ids"].shape == (*batch["input_ids"].shape, 10)
    is_word = (batch["character_ids"] != 0).any(-1)
    assert torch.equal(is_word, batch["attention_mask"].bool()) and not is_word[1].all()
    whole = tokenizer([data.rows("validation")["text"][0]], return_tensors="pt")
    assert torch.equal(batch["character_ids"][0], whole["character_ids"][0])
