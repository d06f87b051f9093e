"""`accelerate launch trainers/electric.py` is `hf-pretrain electric` on several processes.

The method is in `hf_pretrain/objectives/electric/trainer.py`; `hf-pretrain electric --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "electric")
