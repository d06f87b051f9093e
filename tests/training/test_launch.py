"""`accelerate launch`: its configurations say what is meant, and a run through it is the run of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import (
    _filter_args,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from safetensors.torch import load_file
from torch.distributed import run as torchrun

from helpers.method_matrix import NO_DROPOUT, TINY, relative_difference, tiny_tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "trainers" / "accelerate"
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}
# Of each configuration: its kind, and what it makes of the environment of the processes.
CONFIGURATIONS = {
    "single": ("NO", {"ACCELERATE_USE_CPU": "False"}),
    "cpu": ("MULTI_GPU", {}),
    "ddp": ("MULTI_GPU", {}),
    "fsdp2": (
        "FSDP",
        {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_OFFLOAD_PARAMS": "false",
            "FSDP_ACTIVATION_CHECKPOINTING": "false",
        },
    ),
    "zero2": ("DEEPSPEED", ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    "zero3": (
        "DEEPSPEED",
        ZERO
        | {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        },
    ),
}
# accelerate's launchers, and what each makes of its arguments before it starts the processes.
LAUNCHERS = {
    "simple_launcher": lambda args: prepare_simple_launcher_cmd_env(args)[1],
    "multi_gpu_launcher": prepare_multi_gpu_env,
    "deepspeed_launcher": lambda args: prepare_deepspeed_cmd_env(args)[1],
}


@pytest.fixture
def plan(monkeypatch):
    """Return what `accelerate launch` would start: a function of a configuration and the rest of the command line."""
    for variable in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(variable)
    started = []
    for name, prepare in LAUNCHERS.items():
        monkeypatch.setattr(launch, name, lambda args, prepare=prepare: started.append((args, prepare(args))))

    def plan(name, *options):
        command = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0", *options]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
        return started.pop()

    return plan


def test_every_configuration_is_expected():
    assert {path.stem for path in FOLDER.iterdir()} == CONFIGURATIONS.keys()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_accelerate_knows_every_key(name):
    """It refuses unknown keys itself at the top, but lets those of its plugins pass without a word."""
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == CONFIGURATIONS[name][0]
    assert config.mixed_precision == "no"  # the program decides
    known = {action.dest for action in launch.launch_command_parser()._actions}
    for plugin in ("fsdp_config", "deepspeed_config"):
        assert yaml.safe_load(path.read_text()).get(plugin, {}).keys() <= known


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_reaches_the_processes(plan, name):
    args, environment = plan(name, "trainers/mlm.py", "--max_steps", "1")
    kind, expected = CONFIGURATIONS[name]
    assert expected.items() <= environment.items()
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    # What the program decides, transformers tells DeepSpeed.
    assert not {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & environment.keys()
    if kind != "NO":
        assert args.nproc_per_node == ("2" if name == "cpu" else "8")


@pytest.mark.parametrize("program", [["trainers/mlm.py"], ["-m", "hf_pretrain.trainers.mlm"]], ids=["file", "module"])
def test_a_program_is_started_by_its_file_or_its_module(plan, program):
    args, _ = plan("ddp", "--num_processes", "2", *program, "--max_steps", "1")
    own = ["--training_script", args.training_script, "--training_script_args", args.training_script_args]
    config, command, arguments = torchrun.config_from_args(_filter_args(args, torchrun.get_args_parser(), own))
    assert config.nproc_per_node == 2 and command == sys.executable
    assert arguments == ["-u", *program, "--max_steps", "1"]


STEPS = 4
PROCESSES = {"single": 1, "cpu": 2}
# Where DeepSpeed is installed.
DEEPSPEED = {"zero2": 2, "zero3": 2}


def start(name, home):
    """Start a program by `accelerate launch`, with the same global batch whatever the configuration."""
    processes = (PROCESSES | DEEPSPEED)[name]
    options = {
        "train_file": home / "corpus.txt",
        "tokenizer_name": home / "tokenizer",
        "output_dir": home / name,
        "block_size": "24",
        "validation_fraction": "0.1",
        "config_overrides": NO_DROPOUT,
        "use_cpu": "true",
        "bf16": "false",
        "max_steps": str(STEPS),
        "logging_steps": "1",
        "save_steps": "2",
        "disable_tqdm": "true",
        "per_device_train_batch_size": 8 // processes,
        **TINY,
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    program = ["--num_processes", str(processes), "--main_process_port", "0", "trainers/mlm.py"]
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed takes it for granted that there is a GPU
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *program, *given], cwd=ROOT, env=environment, **streams)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the runs of one process and of two, and what each has printed."""
    home = tmp_path_factory.mktemp("launch")
    words = [f"w{i % 37} w{i % 11} w{i % 7}" for i in range(400)]
    (home / "corpus.txt").write_text("\n\n".join(" ".join(words[i : i + 5]) for i in range(0, 400, 5)))
    tiny_tokenizer().save_pretrained(home / "tokenizer")
    processes = {name: start(name, home) for name in PROCESSES}
    printed = {name: process.communicate(timeout=600) for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, printed[name][1][-4000:]
        (home / f"{name}.out").write_text(printed[name][0])
    return home


def training_rows(home, name):
    log = json.loads((home / name / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]


def test_a_launch_leaves_one_of_everything(home):
    for name in PROCESSES:
        found = [path.name for path in (home / name).iterdir()]
        for kind in ("README.md", "recipe.yaml", "trainer_state.json", "model.safetensors"):
            assert found.count(kind) == 1
        assert not {"_lock", "_unfinished"} & set(found)
    files = [{str(path.relative_to(home / name)) for path in (home / name).rglob("*")} for name in PROCESSES]
    # Only the states of dropout are each rank's own.
    assert all("rng_state" in path for path in files[0] ^ files[1])


def test_both_ranks_take_part(home):
    states = sorted((home / "cpu" / f"checkpoint-{STEPS}").glob("rng_state*.pth"))
    assert [path.name for path in states] == ["rng_state_0.pth", "rng_state_1.pth"]
    first, second = (torch.load(path, weights_only=False)["cpu"] for path in states)
    assert not torch.equal(first, second)


def test_two_processes_log_each_component_once_and_as_one_does(home):
    one, two = (training_rows(home, name) for name in PROCESSES)
    assert [row["step"] for row in two] == [row["step"] for row in one] == [*range(1, STEPS + 1)]
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        for name in ("loss", "mlm_loss", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-5), name
        assert other["num_tokens"] == row["num_tokens"]
    for name in PROCESSES:
        printed = (home / f"{name}.out").read_text()
        assert len(re.findall(r"^step \S+  loss .* mlm_loss ", printed, flags=re.MULTILINE)) == STEPS


def test_two_processes_export_the_model_of_one(home):
    one, two = (load_file(home / name / "model.safetensors") for name in PROCESSES)
    assert relative_difference(one, two) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_trains_as_one_process_does(home, name):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed, and no part of this library needs it")
    process = start(name, home)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-4000:]
    for row, other in zip(training_rows(home, "single"), training_rows(home, name), strict=True):
        for key in ("loss", "mlm_loss", "grad_norm"):
            assert other[key] == pytest.approx(row[key], rel=1e-5), key
    one, other = (load_file(home / run / "model.safetensors") for run in ("single", name))
    assert relative_difference(one, other) < 1e-5
    assert any((home / name / f"checkpoint-{STEPS}").glob("global_step*/zero_pp_rank_1_*"))
