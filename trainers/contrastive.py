"""`accelerate launch trainers/contrastive.py` is `hf-pretrain contrastive` on several processes.

The method is in `hf_pretrain/objectives/contrastive/trainer.py`; `hf-pretrain contrastive --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "contrastive")
