"""`accelerate launch trainers/rtd.py` is `hf-pretrain rtd` on several processes.

The method is in `hf_pretrain/objectives/replaced_token_detection/trainer.py`; `hf-pretrain rtd --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "rtd")
