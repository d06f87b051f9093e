"""`accelerate launch trainers/encoder.py` is `hf-pretrain encoder` on several processes.

The method is in `hf_pretrain/objectives/encoder/trainer.py`; `hf-pretrain encoder --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "encoder")
