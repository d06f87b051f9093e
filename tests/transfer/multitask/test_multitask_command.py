"""`hf-pretrain multitask` from its command line to the folder that it writes, and to a next training from there."""

import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from helpers.multitask_runs import load_tasks, moved, tokenizer, weights, write_encoder, write_tasks
from hf_pretrain.cli import main
from hf_pretrain.hub.record import read_record

SIZES = {"topic": 24, "tags": 16, "value": 16}
SHORT = ["--max_length", "32", "--doc_stride", "8", "--per_device_train_batch_size", "4", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("multitask")
    write_encoder(place / "encoder")
    write_tasks(place / "tasks", SIZES)
    return place


def run(place, out, *options, model="encoder"):
    given = [
        "multitask",
        place / model,
        "--tasks",
        place / "tasks" / "tasks.yaml",
        "--output_dir",
        out,
        *SHORT,
        *options,
    ]
    return main([str(part) for part in given])


@pytest.fixture(scope="module")
def first(place):
    options = ["--sampling", "temperature", "--sampling_temperature", "3", "--loss_weights", '{"tags": 2}']
    assert run(place, place / "first", *options, "--num_train_epochs", "2", "--learning_rate", "0.01") == 0
    return place / "first"


def test_the_folder_has_stock_models_a_card_and_a_recipe(place, first):
    for folder in ("", "topic", "tags", "value"):
        assert AutoTokenizer.from_pretrained(first / folder)("w1 w2")["input_ids"] == tokenizer()("w1 w2")["input_ids"]
    model, info = AutoModelForSequenceClassification.from_pretrained(first / "topic", output_loading_info=True)
    assert not info["missing_keys"] and model.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert moved(weights(AutoModel.from_pretrained(place / "encoder")), weights(AutoModel.from_pretrained(first)))
    card = read_record(first)
    assert [one.task for one in card.evaluations] == list(SIZES) and card.objective.name == "multitask"
    data = load_tasks(place / "again", SIZES)["topic"]
    rows = data.encoded("validation", tokenizer(), max_length=32)
    with torch.no_grad():
        out = model.eval()(**data.collator(tokenizer())([rows[i] for i in range(len(rows))]))
    assert card.evaluations[0].metrics == pytest.approx(data.score("validation", out.logits.numpy()), abs=1e-6)
    text = (first / "README.md").read_text()
    assert (
        'from_pretrained(".", subfolder="topic")' in text
        and "| `tags` | `AutoModelForTokenClassification` | stock | 16 |" in text
    )
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    assert recipe["sampling_temperature"] == 3.0 and recipe["loss_weights"] == {"tags": 2}


def test_the_same_run_again_from_its_recipe_is_equal(place, first, tmp_path):
    out = tmp_path / "again"
    assert (
        main(["multitask", "--config", str(first / "recipe.yaml"), "--output_dir", str(out), "--use_cpu", "true"]) == 0
    )
    assert not moved(weights(AutoModel.from_pretrained(first)), weights(AutoModel.from_pretrained(out)))


@pytest.mark.parametrize("folder", ["", "topic"])
def test_the_output_is_the_model_of_a_next_training(place, first, tmp_path, capsys, folder):
    """Intermediate tasks before the target task."""
    out = tmp_path / "next"
    assert run(place, out, "--task", "value", "--max_steps", "2", model=first.relative_to(place) / folder) == 0
    names = {path.name for path in out.iterdir() if path.is_dir()}
    assert names & {"topic", "tags", "value"} == {"value"}
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 2/2  loss ") for line in lines) and not any("{'loss'" in line for line in lines)
    row = next(line.split() for line in lines if line.strip().startswith("value "))
    assert row[:2] == ["value", "regression"] and "2 (100.0%)" in " ".join(row)
    assert any(re.match(r"\s*mean\s+-?\d\.\d{3}", line) for line in lines)


def test_a_run_goes_on_from_its_last_checkpoint(place, tmp_path, capsys):
    options = [
        "--save_strategy",
        "steps",
        "--save_steps",
        "5",
        "--max_steps",
        "8",
        "--learning_rate",
        "0.01",
        "--save_total_limit",
        "3",
    ]
    assert run(place, tmp_path / "whole", *options) == 0
    before = weights(AutoModel.from_pretrained(tmp_path / "whole"))
    (tmp_path / "whole" / "model.safetensors").unlink()
    for path in (tmp_path / "whole").glob("checkpoint-8/*"):
        path.unlink()
    (tmp_path / "whole" / "checkpoint-8").rmdir()
    assert run(place, tmp_path / "whole", *options, "--resume_from_checkpoint", "true") == 0
    assert not moved(before, weights(AutoModel.from_pretrained(tmp_path / "whole")))
    capsys.readouterr()
    assert run(place, tmp_path / "whole", *options) == 2
    assert "is in use" in capsys.readouterr().err
    assert run(place, tmp_path / "none", *options, "--resume_from_checkpoint", "true") == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_an_earlier_run_is_replaced_with_its_folders_and_nothing_else_is(place, first, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(first, out)
    for stranger in ("topic/notes.txt", "mine/model.safetensors"):
        (out / stranger).parent.mkdir(exist_ok=True)
        (out / stranger).write_text("precious")
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert run(place, out, "--task", "value", "--max_steps", "1", "--overwrite_output_dir") == 2
        assert f"{out / stranger.split('/')[0]}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        (out / stranger).unlink()
    (out / "mine").rmdir()
    assert run(place, out, "--task", "value", "--max_steps", "1", "--overwrite_output_dir") == 0
    assert (out / "value" / "model.safetensors").exists() and not (out / "topic").exists()


@pytest.mark.parametrize("name", ["plots", "pretraining", "seed-1", "runs"])
def test_a_task_may_not_have_the_name_of_a_folder_of_the_run(place, tmp_path, capsys, name):
    path = place / "tasks" / "named.yaml"
    path.write_text((place / "tasks" / "tasks.yaml").read_text().replace("topic:", f"{name}:"))
    given = [
        "multitask",
        place / "encoder",
        "--tasks",
        path,
        "--output_dir",
        tmp_path / "out",
        *SHORT,
        "--max_steps",
        1,
    ]
    status = main([str(part) for part in given])
    if name == "seed-1":
        assert status == 0 and (tmp_path / "out" / "seed-1").is_dir()
    else:
        assert status == 2 and f"task {name!r} has the name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "topics"], "task='topics' must be one of topic, tags, value"),
        (["--sampling_cap", "5"], "sampling_cap=5 has no effect"),
        (["--sampling", "weights", "--sampling_weights", '{"topic": 1}'], "one weight for each of topic, tags, value"),
        (["--max_length", "0"], "max_length=0"),
        (["--loss_weights", "3"], "JSON object"),
    ],
)
def test_mistakes_are_said_in_one_line(place, tmp_path, capsys, options, message):
    assert run(place, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_task_without_rows_to_train_on_is_refused(place, tmp_path, capsys):
    path = place / "tasks" / "only.yaml"
    path.write_text(
        "topic: {type: classification, text: text, labels: [bad, good, odd], validation_file: topic.dev.jsonl}\n"
    )
    assert (
        main(["multitask", str(place / "encoder"), "--tasks", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    )
    assert "task 'topic' has no rows to train on" in capsys.readouterr().err


ON_TOP = ["--architecture", "bilstm", "--architecture_options", '{"lstm_size": 6}', "--mix_layers", "true"]


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_each_task_has_the_architecture_with_weights_of_its_own(place, tmp_path, strategy):
    out = tmp_path / "out"
    assert run(place, out, *ON_TOP, "--strategy", strategy, "--learning_rate", "0.02", "--num_train_epochs", "2") == 0
    scores = {one.task: one.metrics for one in read_record(out).evaluations}
    heads = {}
    for name, data in load_tasks(tmp_path / "again", SIZES).items():
        # The folder opens with its code, and says what the run has measured.
        model, info = data.auto_class.from_pretrained(out / name, output_loading_info=True)
        assert not any(info.values()) and (out / name / "modeling_task_heads.py").is_file()
        assert model.config.architecture == "bilstm" and model.scalar_mix is not None
        rows = data.encoded("validation", tokenizer(), max_length=32)
        with torch.no_grad():
            found = model.eval()(**data.collator(tokenizer())([rows[i] for i in range(len(rows))]))
        assert data.score("validation", found.logits.numpy(), tokenizer=tokenizer()) == pytest.approx(
            scores[name], abs=1e-5
        )
        heads[name] = model.architecture.state_dict(), weights(model.encoder), weights(model.scalar_mix)
    (topic, encoder, mix), (tags, other, other_mix) = heads["topic"], heads["tags"]
    assert not moved(encoder, other) and moved(mix, other_mix)
    assert any(topic[name].shape != tags[name].shape or not topic[name].equal(tags[name]) for name in topic)
    start = weights(AutoModel.from_pretrained(place / "encoder"))
    assert moved({name: start[name] for name in encoder}, encoder)
    assert 'subfolder="topic", trust_remote_code=True' in (out / "README.md").read_text()
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["architecture"] == "bilstm" and recipe["architecture_options"] == {"lstm_size": 6}


def test_a_run_with_architectures_goes_on_from_its_checkpoint(place, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    save = ["--save_strategy", "steps", "--save_steps", "6", "--save_total_limit", "2", "--max_steps", "12"]
    for out in (whole, cut):
        assert run(place, out, *ON_TOP, *save, "--learning_rate", "0.02") == 0
    shutil.rmtree(cut / "checkpoint-12")
    assert run(place, cut, *ON_TOP, *save, "--learning_rate", "0.02", "--resume_from_checkpoint", "true") == 0
    for name in SIZES:
        one, two = (load_file(folder / name / "model.safetensors") for folder in (whole, cut))
        assert not moved(one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--architecture", "attention_pooling"], "task 'tags': architecture='attention_pooling'"),
        (
            ["--architecture", "bilstm", "--task", "span"],
            "task 'span': architecture='bilstm' does not go with type='span'",
        ),
        (["--mix_layers", "true"], "mix_layers=True has no effect"),
        (["--architecture_options", '{"lstm_size": 6}'], "architecture_options"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused_before_anything_is_opened(
    place, tmp_path, capsys, options, message
):
    write_tasks(tmp_path / "tasks", SIZES | {"pair": 8, "span": 8})
    words = [
        "multitask",
        "no-model",
        "--tasks",
        tmp_path / "tasks" / "tasks.yaml",
        "--output_dir",
        tmp_path / "out",
        *options,
    ]
    words += [] if "--task" in options else ["--task", *SIZES]
    assert main([*map(str, words)]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not (tmp_path / "out").exists()
