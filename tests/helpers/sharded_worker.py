"""Trains methods with FSDP2 on two ranks of a CPU, as `fsdp2.yaml` has it, and takes a checkpoint up again.

accelerate shards on accelerators only, and would train with DDP here without a word: it is made to take gloo for one.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.commands import launch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from helpers.method_matrix import build, log_of, programs, teacher_of
from hf_pretrain.training.processes import is_sharded

CONFIGURATION = Path(__file__).parents[2] / "trainers" / "accelerate" / "fsdp2.yaml"
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
# Made before the ranks are forked, because only the first rank may write a model.
TEACHERS = [teacher_of(program) for program in programs().values()]


def shard_on_a_cpu():
    """Set this process up as `accelerate launch` does on GPUs, but with the CPU as device."""
    launch.multi_gpu_launcher = lambda args: os.environ.update(prepare_multi_gpu_env(args))
    command = ["--config_file", str(CONFIGURATION), "--num_processes", "2", "--main_process_port", "0", "program"]
    launch.launch_command(launch.launch_command_parser().parse_args(command))
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)


def options_of(method):
    """Additional options of a method: some of them train with optimizers that transformers does not have."""
    return STEPS | {
        "mlm": {"optim": "muon"},
        "rtd": {"adam_bias_correction": False},
        "encoder": {"optim": "stable_adamw"},
        "recurrent-lm": {"optim": "adamw_rms", "learning_rate": 0.1},
    }.get(method, {})


def train(method, folder, *, resume_from=None):
    trainer = build(programs()[method], folder, per_device_train_batch_size=4, **options_of(method))
    # A sharded parameter cannot be compared like the others.
    trainer.remove_callback(trainer.recorder)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def whole_state(trainer):
    state = trainer.model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def main(folder):
    shard_on_a_cpu()
    for method in json.loads((folder / "methods.json").read_text()):
        trainer = train(method, folder / method)
        trainer.save_model()
        found = {
            "log": log_of(trainer),
            "evaluation": trainer.evaluate()["eval_loss"],
            "state": whole_state(trainer),
            "units": {type(m).__name__ for m in trainer.model.modules() if isinstance(m, FSDPModule)},
            "is_sharded": is_sharded(trainer.model),
            "is_sharded_whole": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        }
        resumed = train(method, folder / f"{method}-resumed", resume_from=str(folder / method / "checkpoint-2"))
        found |= {"resumed_log": log_of(resumed), "resumed_state": whole_state(resumed)}
        torch.save(found, folder / f"{method}-{os.environ['RANK']}.pt")
