"""`accelerate launch trainers/recurrent_lm.py` is `hf-pretrain recurrent-lm` on several processes.

The method is in `hf_pretrain/objectives/recurrent_lm/trainer.py`; `hf-pretrain recurrent-lm --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "recurrent-lm")
