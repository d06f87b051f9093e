"""`accelerate launch trainers/elmo.py` is `hf-pretrain elmo` on several processes.

The method is in `hf_pretrain/objectives/elmo/trainer.py`; `hf-pretrain elmo --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "elmo")
