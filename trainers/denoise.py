"""`accelerate launch trainers/denoise.py` is `hf-pretrain denoise` on several processes.

The method is in `hf_pretrain/objectives/denoising/trainer.py`; `hf-pretrain denoise --help` lists its options.
"""

from hf_pretrain.cli import launch

launch(__name__, "denoise")
