"""Pre-training of an encoder with any combination of objectives that can share it."""

from hf_pretrain.objectives.encoder.arguments import EncoderTrainingArguments
from hf_pretrain.objectives.encoder.collator import DataCollatorForEncoder
from hf_pretrain.objectives.encoder.trainer import (
    MASKED_LM,
    METHOD,
    EncoderTrainer,
    MaskedLMTrainer,
    build_model,
    encoder_examples,
    load_examples,
)

__all__ = [
    "METHOD",
    "MASKED_LM",
    "DataCollatorForEncoder",
    "EncoderTrainer",
    "EncoderTrainingArguments",
    "MaskedLMTrainer",
    "build_model",
    "encoder_examples",
    "load_examples",
]
