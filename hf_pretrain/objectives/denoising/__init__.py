"""Sequence-to-sequence denoising: BART, T5, UL2, prefix language modelling and MASS, on any encoder-decoder."""

from hf_pretrain.objectives.denoising.arguments import DenoisingModelArguments, DenoisingTrainingArguments
from hf_pretrain.objectives.denoising.collator import DataCollatorForDenoising
from hf_pretrain.objectives.denoising.modeling import DenoisingConfig, DenoisingForPreTraining
from hf_pretrain.objectives.denoising.trainer import METHOD, DenoisingTrainer

__all__ = [
    "METHOD",
    "DataCollatorForDenoising",
    "DenoisingConfig",
    "DenoisingForPreTraining",
    "DenoisingModelArguments",
    "DenoisingTrainer",
    "DenoisingTrainingArguments",
]
