"""Adapters that `finetune` and `adapt` export alone: whatever opens a model opens them, with the adapter in the weights."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    set_seed,
)

from helpers.method_matrix import tiny_tokenizer
from helpers.task_runs import SIZES, write_encoder, write_tasks
from hf_pretrain import PretrainedFeatures, cli
from hf_pretrain.evaluation.suite.adapters import open_encoder
from hf_pretrain.tasks.spec import load_task, read_tasks
from hf_pretrain.transfer.tuning.heads import open_for_task

TEXTS = ["w1 w2 w3", "w0 w9", "w20 w21 w22 w23"]
QUICK = "--max_steps 6 --per_device_train_batch_size 8 --use_cpu true --disable_tqdm true --bf16 false --learning_rate 0.02"
KINDS = ("finetune", "adapt")


def run(*words):
    assert cli.main([*map(str, words)]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an adapter alone of each command, and the same adapter in the weights of the whole model."""
    place = tmp_path_factory.mktemp("adapters")
    write_tasks(place)
    write_encoder(place / "encoder")
    set_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(place / "mlm")
    tiny_tokenizer().save_pretrained(place / "mlm")
    (place / "text.txt").write_text("\n\n".join(" ".join(f"w{i * j % 50}" for j in range(1, 20)) for i in range(60)))
    task = ["--tasks", place / "tasks.yaml", "--task", "classification", "--tfidf", "false", "--strategy", "lora"]
    run(
        "finetune", place / "encoder", *task, "--export", "adapter", "--output_dir", place / "finetune", *QUICK.split()
    )
    text = ["--train_file", place / "text.txt", "--block_size", "32", "--adapter", "lora", "--adapter_rank", "2"]
    run("adapt", place / "mlm", *text, "--adapter_export", "adapter", "--output_dir", place / "adapt", *QUICK.split())
    below = {
        "finetune": AutoModelForSequenceClassification.from_pretrained(place / "encoder", num_labels=2),
        "adapt": BertForMaskedLM.from_pretrained(place / "mlm"),
    }
    for kind, model in below.items():
        with warnings.catch_warnings():
            # peft asks for an old name of transformers.
            warnings.simplefilter("ignore")
            whole = PeftModel.from_pretrained(model, place / kind).merge_and_unload()
        whole.save_pretrained(place / f"{kind}-whole")
        AutoTokenizer.from_pretrained(place / kind).save_pretrained(place / f"{kind}-whole")
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_merged_model(place, kind):
    alone, whole, without = (
        PretrainedFeatures(str(place / name)).fit().transform(TEXTS)
        for name in (kind, f"{kind}-whole", {"finetune": "encoder", "adapt": "mlm"}[kind])
    )
    np.testing.assert_allclose(alone, whole, atol=1e-6)
    assert np.abs(alone - without).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_stands_on_the_adapted_encoder(place, kind):
    data = load_task(read_tasks(place / "tasks.yaml")["tokens"])
    models = [open_for_task(str(place / name), data, seed=3) for name in (kind, f"{kind}-whole")]
    assert models[0].fresh == models[1].fresh and "fresh head" in models[0].note
    for (name, one), (other, two) in zip(*(opened.model.named_parameters() for opened in models), strict=True):
        assert name == other
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    # One for the very labels of the adapter is drawn anew too: the configuration below does not know them.
    assert open_for_task(str(place / kind), load_task(read_tasks(place / "tasks.yaml")["classification"])).fresh


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_open_it(place, tmp_path, capsys, kind):
    tasks = ["--tasks", place / "tasks.yaml"]
    run(
        "finetune",
        place / kind,
        *tasks,
        "--task",
        "classification",
        "--tfidf",
        "false",
        "--output_dir",
        tmp_path / "tuned",
        *QUICK.split(),
    )
    run(
        "multitask",
        place / kind,
        *tasks,
        "--task",
        "classification",
        "tokens",
        "--output_dir",
        tmp_path / "multi",
        *QUICK.split(),
    )
    for folder in (tmp_path / "multi", tmp_path / "tuned"):
        _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not {name for name in info["missing_keys"] if "pooler" not in name}
    capsys.readouterr()
    shown = []
    for name in (kind, f"{kind}-whole"):
        named = ["--tasks", f"{place / 'tasks.yaml'}:classification", "--seeds", "0", "--batch_size", "16"]
        fast = ["--least_steps", "4", "--num_train_epochs", "1", "--results", tmp_path / f"{name}.json"]
        run("compare", place / name, *named, *fast, "--strategies", "full", "features")
        runs = json.loads((tmp_path / f"{name}.json").read_text())["runs"]
        shown.append([(entry["run"]["strategy"], entry["scores"]["accuracy"]) for entry in runs])
    assert shown[0] == shown[1]
    capsys.readouterr()
    out = ["--output_file", tmp_path / "evaluation.json"]
    run("evaluate", place / kind, "--tasks", f"{place / 'tasks.yaml'}:classification", *out)
    assert f"  {kind}" in capsys.readouterr().out


def test_an_adapter_without_its_model_is_refused_in_one_line(place, tmp_path, capsys):
    (tmp_path / "lost").mkdir()
    for path in Path(place / "adapt").iterdir():
        if path.is_file():
            (tmp_path / "lost" / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "lost" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "lost" / "adapter_config.json").write_text(json.dumps(config))
    assert (
        cli.main(
            ["features", str(tmp_path / "lost"), "--tasks", str(place / "tasks.yaml"), "--task", "classification"]
        )
        == 2
    )
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "gone" in shown


def test_a_whole_model_is_opened_as_it_is(place):
    opened, expected = open_encoder(str(place / "encoder")), AutoModel.from_pretrained(place / "encoder")
    assert all(torch.equal(one, two) for one, two in zip(opened.parameters(), expected.parameters(), strict=True))
