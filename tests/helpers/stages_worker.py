"""One rank of `hf-pretrain stages`; the folder has a plan, the tasks and the encoder of `task_runs`."""

import os
from pathlib import Path

from hf_pretrain.cli import main as run

PLAN = """
model_name_or_path: encoder_without_dropout
per_device_train_batch_size: {batch}
per_device_eval_batch_size: 12
max_steps: 8
learning_rate: 5e-3
use_cpu: true
disable_tqdm: true
tasks: tasks.yaml
stages:
  - finetune: {{task: classification}}
  - finetune: {{task: pair}}
  - evaluate: {{tasks: "tasks.yaml:pair"}}
"""


def main(folder):
    folder, size = Path(folder), int(os.environ.get("WORLD_SIZE", "1"))
    # Each rank writes the same.
    plan = folder / f"plan-{size}-{os.environ.get('RANK', '0')}.yaml"
    plan.write_text(PLAN.format(batch=16 // size))
    assert run(["stages", str(plan), "--output_dir", str(folder / f"stages-{size}")]) == 0
