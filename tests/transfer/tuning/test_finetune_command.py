"""`hf-pretrain finetune` from its command line to the table that it prints and the folder that it writes."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from helpers.loopback_hub import LoopbackHub, connected
from helpers.task_runs import TYPES, write_encoder, write_tasks
from hf_pretrain.cli import main
from hf_pretrain.hub.card import snippets
from hf_pretrain.hub.record import read_record
from hf_pretrain.tasks.answers import answer_questions
from hf_pretrain.tasks.spec import load_task, read_tasks
from hf_pretrain.transfer.tuning.fine_tune import TaskTrainer

QUICK = (
    "--learning_rate 5e-3 --max_steps 40 --per_device_train_batch_size 16 --use_cpu true --disable_tqdm true".split()
)
# TF-IDF is measured where a test looks at it.
QUICK += ["--tfidf", "false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place)
    write_encoder(place / "encoder")
    return place


def run(place, out, *options, task="classification", strategy="full"):
    given = ["--tasks", place / "tasks.yaml", "--task", task, "--strategy", strategy, "--output_dir", out]
    return main(["finetune", *map(str, (place / "encoder", *given, *QUICK, *options))])


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def reopened(folder, place, kind, *, max_length=40):
    """What the exported folder says of the validation rows, by transformers alone."""
    data = load_task(read_tasks(place / "tasks.yaml")[kind])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = data.auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows = data.encoded("validation", tokenizer, max_length=max_length, doc_stride=max_length // 3)
    rows = rows.select_columns([name for name in rows.column_names if name in ("input_ids", "token_type_ids")])
    collate, outputs = data.collator(tokenizer), []
    for row in rows:
        with torch.no_grad():
            found = model(**collate([row]))
        outputs.append((found.start_logits, found.end_logits) if kind == "span" else (found.logits,))
    longest = max(part[0].shape[1] for part in outputs)
    if kind in ("tokens", "entities", "span"):
        parts = [
            np.concatenate([_widened(part[place_].numpy(), longest) for part in outputs])
            for place_ in range(len(outputs[0]))
        ]
    else:
        parts = [np.concatenate([part[0].numpy() for part in outputs])]
    logits = tuple(parts) if kind == "span" else parts[0]
    return data, model, tokenizer, data.decode("validation", logits, tokenizer=tokenizer), parts[0]


def _widened(array, length):
    padding = [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, padding, constant_values=-100)


@pytest.mark.parametrize("kind", TYPES)
def test_the_export_gives_the_predictions_of_the_file_and_the_card_runs(place, tmp_path, capsys, monkeypatch, kind):
    out = tmp_path / "out"
    assert run(place, out, "--tfidf", "true", task=kind) == 0
    shown = capsys.readouterr().out
    assert "\nstep 40/40  loss " in shown and "{'loss'" not in shown
    data, model, tokenizer, decoded, logits = reopened(out, place, kind)
    lines = predictions(out)
    if kind == "regression":
        np.testing.assert_allclose([line["predicted"] for line in lines], decoded, atol=1e-5)
    else:
        assert [line["predicted"] for line in lines] == decoded
    if kind in ("classification", "choice"):
        np.testing.assert_allclose([line["logits"] for line in lines], logits, atol=1e-5)
    results = json.loads((out / "all_results.json").read_text())
    assert results["scores"][data.main_metric] > results["references"][next(iter(results["references"]))].get(
        data.main_metric, 0
    )
    # The card's numbers are the run's, and its code runs where the folder is.
    (evaluation,) = read_record(out).evaluations
    assert evaluation.metrics == pytest.approx(results["scores"]) and evaluation.num_examples == 40
    assert ("TF-IDF" in evaluation.baseline_name) == (kind in ("classification", "pair", "regression"))
    monkeypatch.chdir(out)
    codes = snippets((out / "README.md").read_text())
    assert codes and (out / "plots" / "loss.png").is_file()
    for code in codes:
        exec(code, {})
    assert f"{results['scores'][data.main_metric]:.3f}" in shown and str(out) in shown
    if kind == "span":
        question, context, said = (lines[0][name] for name in ("question", "context", "predicted"))
        assert answer_questions(model, tokenizer, [question], [context], max_length=40)[0][0].text == said


def test_the_recipe_starts_the_run_again(place, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    assert run(place, out, "--seed", "7", "--max_length", "16", strategy="layerwise_decay") == 0
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["seed"] == 7 and recipe["max_length"] == 16 and recipe["layerwise_learning_rate_decay"] == 0.8
    assert main(["finetune", "--config", str(out / "recipe.yaml"), "--output_dir", str(again)]) == 0
    assert predictions(out) == predictions(again)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert run(place, out) == 2 and "is in use" in capsys.readouterr().err
    assert run(place, out, "--overwrite_output_dir") == 0
    assert predictions(out) != predictions(again)


def test_a_run_goes_on_from_its_checkpoint_and_exports_the_same(place, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    save = ("--save_strategy", "steps", "--save_steps", "10", "--save_total_limit", "2", "--max_steps", "20")
    assert run(place, whole, *save, strategy="gradual") == 0
    assert run(place, cut, *save, strategy="gradual") == 0
    for path in cut.iterdir():
        if path.name != "checkpoint-10" and path.is_file():
            path.unlink()
    shutil.rmtree(cut / "checkpoint-20")
    capsys.readouterr()
    assert run(place, cut, *save, "--resume_from_checkpoint", "true", strategy="gradual") == 0
    assert "going on from step 10" in capsys.readouterr().out
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert predictions(whole) == predictions(cut)
    # A damaged checkpoint is not gone on from.
    (cut / "checkpoint-20" / "model.safetensors").write_bytes(b"0" * 100)
    assert run(place, cut, *save, "--resume_from_checkpoint", "true", strategy="gradual") == 0
    assert "going on from step 10" in capsys.readouterr().out


# peft asks for an old name of transformers.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_are_merged_or_alone(place, tmp_path, monkeypatch):
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    assert run(place, merged, strategy="lora") == 0
    assert run(place, alone, "--export", "adapter", strategy="lora") == 0
    *_, decoded, logits = reopened(merged, place, "classification")
    np.testing.assert_allclose([line["logits"] for line in predictions(merged)], logits, atol=1e-4)
    assert [line["predicted"] for line in predictions(merged)] == decoded
    assert not (alone / "_README.before.md").exists() and "an adapter (LORA)" in (alone / "README.md").read_text()
    assert (alone / "adapter_config.json").is_file() and not (alone / "model.safetensors").exists()
    monkeypatch.chdir(alone)
    (code, *_) = snippets((alone / "README.md").read_text())
    names = {}
    exec(code, names)
    texts = [line["text"] for line in predictions(alone)]
    batch = names["tokenizer"](texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = names["model"].eval()(**batch).logits
    np.testing.assert_allclose([line["logits"] for line in predictions(alone)], found, atol=1e-4)


def test_seeds_have_folders_and_a_mean(place, tmp_path, capsys):
    out = tmp_path / "out"
    steps = ("--max_steps", "10")
    seeds = ("--seeds", "3", "4", "--save_strategy", "steps", "--save_steps", "5", *steps)
    assert run(place, out, *seeds) == 0
    shown = capsys.readouterr().out
    runs = [json.loads((out / f"seed-{seed}" / "all_results.json").read_text()) for seed in (3, 4)]
    values = [entry["scores"]["accuracy"] for entry in runs]
    whole = json.loads((out / "all_results.json").read_text())
    assert whole["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert whole["deviation"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in shown and not (out / "config.json").exists()
    # One seed by itself is the same run.
    assert run(place, tmp_path / "one", "--seed", "4", *steps) == 0
    assert predictions(tmp_path / "one") == predictions(out / "seed-4") != predictions(out / "seed-3")
    recipe = str(out / "seed-3" / "recipe.yaml")
    assert main(["finetune", "--config", recipe, "--output_dir", str(tmp_path / "again")]) == 0
    assert predictions(tmp_path / "again") == predictions(out / "seed-3")
    assert run(place, out, *seeds) == 2
    # Going on finds each seed's own checkpoint.
    capsys.readouterr()
    assert run(place, out, *seeds, "--resume_from_checkpoint", "auto") == 0
    assert len(re.findall("going on from step 10", capsys.readouterr().out)) == 2
    # What others have put there is named, and stays.
    for stranger in ("seed-3/thesis.tex", "seed-9/model.safetensors"):
        (out / stranger).parent.mkdir(exist_ok=True)
        (out / stranger).write_text("precious")
        assert run(place, out, *seeds, "--overwrite_output_dir") == 2
        assert "is not of a run" in capsys.readouterr().err and (out / stranger).read_text() == "precious"
        assert (out / "seed-4" / "model.safetensors").exists()
        (out / stranger).unlink()
    (out / "seed-9").rmdir()
    # One run takes the place of several.
    assert run(place, out, "--max_steps", "1", "--overwrite_output_dir") == 0
    assert (out / "model.safetensors").exists() and not list(out.glob("seed-*"))


def test_two_stages(place, tmp_path, capsys):
    """The output of an intermediate task is the model of the next one."""
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    assert run(place, first, task="regression") == 0
    stages = ["--tasks", str(place / "tasks.yaml"), *QUICK, "--strategy", "frozen"]
    assert main(["finetune", str(first), *stages, "--task", "classification", "--output_dir", str(second)]) == 0
    shown = capsys.readouterr().out
    assert "with a fresh head (classifier): the checkpoint's is for values, not for bad, good" in shown
    encoders = [AutoModel.from_pretrained(folder).state_dict() for folder in (first, second)]
    for name, tensor in encoders[0].items():
        assert name.startswith("pooler") or torch.equal(tensor, encoders[1][name]), name
    assert main(["finetune", str(second), *stages, "--task", "pair", "--output_dir", str(third)]) == 0
    assert "with the head that the checkpoint has" in capsys.readouterr().out
    assert "Fine-tuned from a local checkpoint (regression (regression))" in (second / "README.md").read_text()


def test_files_without_a_yaml(place, tmp_path, capsys):
    files = ["--train_file", str(place / "choice_train.jsonl"), "--text_columns", "text", "--task_type", "choice"]
    out = str(tmp_path / "out")
    options = [*files, "--choice_columns", "first", "second", *QUICK, "--strategy", "full", "--output_dir", out]
    assert main(["finetune", str(place / "encoder"), *options]) == 0
    shown = capsys.readouterr().out
    assert "115 examples to train on, 13 to measure on" in shown and "most frequent choice" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give the examples by --tasks"),
        (["--tasks", "tasks.yaml"], "has 7 tasks: name one by --task"),
        (["--tasks", "tasks.yaml", "--task", "clasification"], "did you mean 'classification'"),
        (["--train_file", "choice_train.jsonl", "--text_columns", "text", "--task_type", "choice"], "choice_columns"),
        (["--tasks", "tasks.yaml", "--task", "span", "--metric", "accuracy"], "metric='accuracy'"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--doc_stride", "8"], "doc_stride=8 has no effect"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--lora_rank", "8"], "lora_rank=8 has no effect"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--seeds", "1", "1"], "seeds=[1, 1]"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--seeds", "1", "2", "--push_to_hub"], "push_to_hub=True"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--max_steps", "0"], "max_steps=0 trains nothing"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--hub_strategy", "every_save"], "hub_strategy='every_save'"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--license", "apache"], "license='apache'"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--max_length", "100"], "max_length=100: "),
        (["--tasks", "tasks.yaml", "--task", "span", "--strategy", "scalar_mix"], "scalar_mix"),
        (["--tasks", "tasks.yaml", "--task", "pair", "--resume_from_checkpoint", "true"], "holds no checkpoint"),
    ],
)
def test_refused_in_one_line(options, message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    assert main(["finetune", "encoder", *options, "--output_dir", str(out)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not out.exists()


def test_the_hub_gets_the_model_without_the_texts(place, tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub, connected(hub.url):
        assert run(place, tmp_path / "out", "--push_to_hub", "true", "--hub_model_id", "tester/mine") == 0
        files = hub.files("tester/mine")
    assert {"model.safetensors", "README.md", "tokenizer.json", "all_results.json", "recipe.yaml"} <= set(files)
    assert "predictions.jsonl" not in files and not any("checkpoint" in name for name in files)
    assert 'model="tester/mine"' in (tmp_path / "out" / "README.md").read_text()


def test_sigterm_saves_a_checkpoint_to_go_on_from(place, tmp_path, capsys, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(place, whole, strategy="probe_then_tune") == 0
    step = TaskTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 24:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "training_step", interrupted)
        assert run(place, cut, strategy="probe_then_tune") == 143
    assert "--resume_from_checkpoint true" in capsys.readouterr().err and not (cut / "README.md").exists()
    assert run(place, cut, "--resume_from_checkpoint", "true", strategy="probe_then_tune") == 0
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
