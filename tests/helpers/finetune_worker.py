"""One rank of `hf-pretrain finetune`; the folder has the tasks and the encoder of `task_runs`."""

import os
from pathlib import Path

from hf_pretrain.cli import main as run


def main(folder):
    folder, size = Path(folder), int(os.environ.get("WORLD_SIZE", "1"))
    options = ["--tasks", folder / "tasks.yaml", "--task", "classification", "--strategy", "full"]
    options += ["--per_device_train_batch_size", 16 // size, "--per_device_eval_batch_size", 12, "--max_steps", 20]
    options += ["--learning_rate", "5e-3", "--use_cpu", "true", "--disable_tqdm", "true"]
    options += ["--output_dir", folder / f"ranks-{size}"]
    assert run(["finetune", str(folder / "encoder_without_dropout"), *map(str, options)]) == 0
