"""Language modelling with a memory: Transformer-XL's objective."""

from hf_pretrain.objectives.recurrent_lm.modeling import (
    RecurrentLMConfig,
    RecurrentLMForPreTraining,
    TransformerXLModelArguments,
    build_model,
)
from hf_pretrain.objectives.recurrent_lm.trainer import (
    DataCollatorForRecurrentLM,
    RecurrentLMTrainer,
    RecurrentLMTrainingArguments,
    lane_inputs,
)

__all__ = [
    "DataCollatorForRecurrentLM",
    "RecurrentLMConfig",
    "RecurrentLMForPreTraining",
    "RecurrentLMTrainer",
    "RecurrentLMTrainingArguments",
    "TransformerXLModelArguments",
    "build_model",
    "lane_inputs",
]
