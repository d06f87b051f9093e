"""`accelerate launch trainers/mlm.py` is `hf-pretrain mlm` on several processes.

The method is in `hf_pretrain/objectives/encoder/trainer.py`; `hf-pretrain mlm --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "mlm")
