"""`accelerate launch trainers/clm.py` is `hf-pretrain clm` on several processes.

The method is in `hf_pretrain/objectives/causal_lm/trainer.py`; `hf-pretrain clm --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "clm")
