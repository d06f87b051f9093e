"""`accelerate launch trainers/distil.py` is `hf-pretrain distil` on several processes.

The method is in `hf_pretrain/objectives/distillation/trainer.py`; `hf-pretrain distil --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "distil")
