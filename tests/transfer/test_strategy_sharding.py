"""Fine-tuning with FSDP2: some strategies train and export as one process does, the others are refused by name at once."""

import json
from typing import get_args

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpers.method_matrix import relative_difference
from helpers.task_runs import write_encoder, write_tasks
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain import cli
from hf_pretrain.errors import InputError
from hf_pretrain.transfer.arguments import Strategy
from hf_pretrain.transfer.fine_tuning import SHARDED, FineTuningArguments

STILL = (
    "--optim sgd --learning_rate 0.1 --max_steps 6 --warmup_steps 0 --disable_tqdm true --use_cpu true --tfidf false"
)
OPTIONS = {"full": "--task span --max_length 24"}
# Of plain gradient descent there is no state to go on with.
ADAM = "--optim adamw_torch --learning_rate 1e-3 --save_strategy steps --save_steps 3 --save_total_limit 2".split()
STAGED = sorted(set(get_args(Strategy)) - set(SHARDED))


def words_of(strategy, place, size, *more, out=None):
    options = OPTIONS.get(strategy, "").split()
    task = [] if "--task" in options else ["--task", "classification"]
    out = place / f"{strategy}-{size}" if out is None else out
    given = ["--tasks", place / "tasks.yaml", *task, "--strategy", strategy, "--output_dir", out]
    given += ["--per_device_train_batch_size", 16 // size, *STILL.split(), *options, *more]
    return ["finetune", *map(str, [place / "encoder", *given])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs of one process, and of two that share the weights."""
    place = tmp_path_factory.mktemp("sharded")
    write_tasks(place)
    write_encoder(place / "encoder", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for strategy in SHARDED:
        assert cli.main(words_of(strategy, place, 1)) == 0
    found = [{"name": strategy, "argv": words_of(strategy, place, 2)} for strategy in SHARDED]
    whole = words_of("layerwise_decay", place, 2, *ADAM, out=place / "whole")
    goes_on = ["--resume_from_checkpoint", str(place / "whole" / "checkpoint-3")]
    resumed = words_of("layerwise_decay", place, 2, *ADAM, *goes_on, out=place / "resumed")
    found += [{"name": "whole", "argv": whole}, {"name": "resumed", "argv": resumed}]
    (place / "commands.json").write_text(json.dumps({"2": found}))
    run_on_two_ranks("helpers.sharded_command_worker", place)
    return place


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SHARDED)
def test_ranks_that_share_the_weights_do_what_one_process_does(runs, strategy):
    assert [(runs / f"{strategy}-2-{rank}.json").read_text() for rank in (0, 1)] == ["0", "0"]
    one, two = (runs / f"{strategy}-{size}" for size in (1, 2))
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert relative_difference(*weights) < 1e-5
    # What a strategy leaves alone is the same to the bit; else the test would say nothing of it.
    begin = load_file(runs / "encoder" / "model.safetensors")
    names = {name for name in begin if name.endswith("weight") and f"bert.{name}" in weights[0]}
    same = [{name for name in names if found[f"bert.{name}"].equal(begin[name])} for found in weights]
    assert same[0] == same[1] and bool(same[0]) == (strategy in ("top_layers", "frozen", "bitfit"))
    for left, right in zip(predictions(one), predictions(two), strict=True):
        np.testing.assert_allclose(left.pop("logits", 0), right.pop("logits", 0), rtol=1e-4, atol=1e-5)
        assert left == right


@pytest.mark.slow
def test_the_export_is_a_stock_model_with_its_card(runs):
    _, info = AutoModelForSequenceClassification.from_pretrained(runs / "layerwise_decay-2", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    files = [{path.name for path in (runs / f"bitfit-{size}").iterdir() if path.is_file()} for size in (1, 2)]
    assert files[0] == files[1]
    results = [json.loads((runs / f"bitfit-{size}" / "all_results.json").read_text()) for size in (1, 2)]
    assert results[0]["trained_parameters"] == results[1]["trained_parameters"]


@pytest.mark.slow
def test_a_checkpoint_of_shared_weights_is_taken_up_bit_for_bit(runs):
    assert (runs / "resumed-2-0.json").read_text() == "0"
    assert "going on from step 3" in (runs / "resumed-2-0.out").read_text()
    whole, resumed = (load_file(runs / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("strategy", STAGED)
def test_other_strategies_are_refused_before_anything_is_read(strategy, sharding, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    options = ["--peft_config", '{"peft_type": "IA3"}'] if strategy == "peft" else []
    words = [
        "finetune",
        "no-model",
        "--tasks",
        "none.yaml",
        "--strategy",
        strategy,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert cli.main([*words, *options]) == 2
    shown = capsys.readouterr().err
    named = "FSDP" if sharding == "FSDP" else "DeepSpeed"
    assert f"strategy={strategy!r} does not go with {named}" in shown and ", ".join(SHARDED) in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_several_tasks_are_refused_before_anything_is_read(sharding, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    words = ["multitask", "no-model", "--tasks", "none.yaml", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, "--strategy", "full"]) == 2
    assert "several tasks do not go with" in capsys.readouterr().err


def test_fsdp_that_accelerate_would_leave_out_is_refused(tmp_path, monkeypatch, capsys):
    """On a CPU, or for one process, accelerate does not share anything out, and says nothing."""
    write_tasks(tmp_path)
    write_encoder(tmp_path / "encoder")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    FineTuningArguments(str(tmp_path / "out"), strategy="full", use_cpu=True)
    assert cli.main(words_of("layerwise_decay", tmp_path, 1)) == 2
    assert "FSDP was asked for, but accelerate shares parameters out on several GPUs only" in capsys.readouterr().err
    assert not (tmp_path / "layerwise_decay-1").exists()
    with pytest.raises(InputError, match="strategy='gradual' does not go with FSDP"):
        FineTuningArguments(str(tmp_path / "out"), strategy="gradual", use_cpu=True)
