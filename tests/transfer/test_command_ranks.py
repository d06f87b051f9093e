"""Commands on two ranks: together they do what one process does, write one folder, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, set_seed

from helpers.method_matrix import relative_difference
from helpers.task_runs import SIZES, write_encoder, write_tasks
from helpers.two_ranks import run_on_ranks
from hf_pretrain import cli
from hf_pretrain.data.documents.tokenizers import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = [
    "the patient has hepatitis and a rare steatosis in the liver",
    "the patient had a pain in the liver and a cat sat on the mat",
]
# Plain gradient descent: sums in another order stay small differences. 16 examples a step on any number of ranks.
STILL = "--optim sgd --learning_rate 0.1 --max_steps 6 --warmup_steps 0 --logging_steps 1 --disable_tqdm true --use_cpu true"
RUNS = {
    "full": "finetune {encoder} {tasks} --task classification --strategy full --tfidf false --max_examples 96",
    "span": "finetune {encoder} {tasks} --task span --strategy gradual --unfreeze_every 2 --max_length 24",
    "lora": "finetune {encoder} {tasks} --task classification --strategy lora --tfidf false",
    "multitask": "multitask {encoder} {tasks} --task classification regression --sampling equal --max_length 16",
    "adapt": "adapt {model} --train_file {text} --new_words auto:2 --adapter lora --adapter_rank 2 --block_size 32 --bf16 false",
}
FOLDERS = {"multitask": ("", "classification", "regression"), "adapt": ("", "../{}-start")}
SLOW = {"lora"}


def words_of(name, place, size, *more, out=None):
    text = RUNS[name].format(
        encoder=place / "encoder",
        model=place / "model",
        tasks=f"--tasks {place / 'tasks.yaml'}",
        text=place / "text.txt",
    )
    batch = ["--per_device_train_batch_size", 16 // size, "--per_device_eval_batch_size", 12]
    out = place / f"{name}-{size}" if out is None else out
    return [*text.split(), *STILL.split(), *map(str, batch), "--output_dir", str(out), *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what all runs read."""
    place = tmp_path_factory.mktemp("ranks")
    write_tasks(place)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_encoder(place / "encoder", **still)
    write_encoder(place / "encoder_with_dropout")
    set_seed(0)
    tokenizer = train_tokenizer(TEXT[1:] * 30, kind="wordpiece", vocab_size=100)
    tokenizer.save_pretrained(place / "model")
    sizes = SIZES | still | {"vocab_size": len(tokenizer)}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(place / "model")
    (place / "text.txt").write_text("\n\n".join(f"{TEXT[i % 2]} {TEXT[i % 3 % 2]}" for i in range(90)))
    return place


@pytest.fixture(scope="module")
def runs(place):
    """The folder after all runs on one rank and on two; a further one is stopped on one of two ranks, and goes on."""
    found = {size: [{"name": name, "argv": words_of(name, place, size)} for name in RUNS] for size in (1, 2)}
    cut = words_of("span", place, 2, out=place / "cut")
    found[2].append({"name": "cut", "argv": cut, "fault": (1, 3, "stop")})
    found[2].append({"name": "resumed", "argv": [*cut, "--resume_from_checkpoint", "true"]})
    random = words_of("full", place, 2, "--save_strategy", "steps", "--save_steps", "6", out=place / "random")
    random[1] = str(place / "encoder_with_dropout")
    found[2].append({"name": "random", "argv": random})
    # The first program of two: the others follow in the same processes, while the first rank still reports.
    found[2].sort(key=lambda entry: entry["name"] != "adapt")
    found[2][0]["late"] = 1.5
    (place / "commands.json").write_text(json.dumps(found))
    run_on_ranks("helpers.command_ranks_worker", place, world_size=[1, 2])
    return place


def log(runs, name, *, rank, kind):
    return (runs / f"{name}-2-{rank}.{kind}").read_text()


def check_same(one, two, name):
    """Two ranks have written what one process has."""
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (one, two)]
    assert {name for name in files[0] ^ files[1] if "rng_state" not in name} == set()
    assert not any(Path(name).name.startswith("_") and name != "_folders.json" for name in files[1])
    for part in FOLDERS.get(name, ("",)):
        left, right = (load_file(f / part.format(f.name) / "model.safetensors") for f in (one, two))
        assert relative_difference(left, right) < 1e-5, part
    if (one / "predictions.jsonl").exists():
        lines = [[*map(json.loads, (f / "predictions.jsonl").read_text().splitlines())] for f in (one, two)]
        for left, right in zip(*lines, strict=True):
            np.testing.assert_allclose(left.pop("logits", 0), right.pop("logits", 0), rtol=1e-4, atol=1e-5)
            assert left == right


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_do_what_one_process_does(runs, name):
    assert [log(runs, name, rank=rank, kind="json") for rank in (0, 1)] == ["0", "0"]
    check_same(runs / f"{name}-1", runs / f"{name}-2", name)
    begin = load_file(runs / ("model" if name == "adapt" else "encoder") / "model.safetensors")
    end = load_file(runs / f"{name}-2" / "model.safetensors")
    begin |= {f"bert.{key}": tensor for key, tensor in begin.items()}
    assert any(end[key].shape != begin[key].shape or not end[key].equal(begin[key]) for key in end if key in begin)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_rank_alone_speaks(runs, name):
    assert log(runs, name, rank=0, kind="out") and not log(runs, name, rank=1, kind="out")


def test_sigterm_on_one_rank_stops_both_and_the_run_goes_on(runs):
    assert [log(runs, "cut", rank=rank, kind="json") for rank in (0, 1)] == ["143", "143"]
    assert log(runs, "cut", rank=0, kind="err").count("stopped by SIGTERM after step") == 1
    assert "stopped by" not in log(runs, "cut", rank=1, kind="err")
    assert [log(runs, "resumed", rank=rank, kind="json") for rank in (0, 1)] == ["0", "0"]
    assert "going on from step" in log(runs, "resumed", rank=0, kind="out")
    whole, cut = (load_file(runs / name / "model.safetensors") for name in ("span-2", "cut"))
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items())


def test_each_rank_has_dropout_of_its_own(runs):
    import torch

    states = [
        torch.load(runs / "random" / "checkpoint-6" / f"rng_state_{rank}.pth", weights_only=False)["cpu"]
        for rank in (0, 1)
    ]
    assert not torch.equal(*states)


ONE_PROCESS = sorted(set(cli.COMMANDS) - set(cli.LAUNCHED))


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_command_of_one_process_is_refused_in_several(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main([name, "model"]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == lines and (f"hf-pretrain {name} runs in one process" in shown) == bool(lines)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert cli.main([name, "--nonsense"]) == 2 and "one process" not in capsys.readouterr().err


def launch(*words, timeout=280):
    """Start what follows by `accelerate launch` on two processes of a CPU; return status, output and errors."""
    settings = ["--config_file", str(ROOT / "trainers" / "accelerate" / "cpu.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_accelerate_launches_it(runs, tmp_path, name):
    found = launch("-m", "hf_pretrain.cli", *words_of(name, runs, 2, out=tmp_path / f"{name}-1"))
    assert found.returncode == 0, found.stderr[-4000:]
    check_same(runs / f"{name}-1", tmp_path / f"{name}-1", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "evaluate", "features"])
def test_accelerate_launches_no_command_of_one_process(place, name):
    found = launch("-m", "hf_pretrain.cli", name, place / "encoder", "--tasks", place / "tasks.yaml")
    assert found.returncode != 0 and found.stderr.count("runs in one process") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_the_others(place, tmp_path, rank):
    fault = json.dumps([rank, 2, "fail"])
    worker = ROOT / "tests" / "helpers" / "command_ranks_worker.py"
    found = launch(worker, fault, *words_of("full", place, 2, out=tmp_path / "out"))
    assert found.returncode != 0 and found.stderr.count("error: this rank has failed") == 1
    lines = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert all("this rank has failed" in line or "another process" in line for line in lines), lines
    assert not (tmp_path / "out" / "README.md").exists() and not (tmp_path / "out" / "_lock").exists()
