"""`accelerate launch trainers/distil_task.py` is `hf-pretrain distil-task` on several processes.

The method is in `hf_pretrain/objectives/distillation/trainer.py`; `hf-pretrain distil-task --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "distil-task")
