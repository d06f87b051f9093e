"""ELMo's mean of layers. An export has the file that the class is in at this place."""

from hf_pretrain.models.elmo.scalar_mix import ScalarMix as ScalarMix

__all__ = ["ScalarMix"]
