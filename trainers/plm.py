"""`accelerate launch trainers/plm.py` is `hf-pretrain plm` on several processes.

The method is in `hf_pretrain/objectives/permutation_lm/trainer.py`; `hf-pretrain plm --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "plm")
