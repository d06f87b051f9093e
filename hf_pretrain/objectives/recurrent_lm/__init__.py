"""Language modelling with a memory: Transformer-XL's objective."""

from hf_pretrain.objectives.recurrent_lm.modeling import (
    RecurrentLMConfig,
    RecurrentLMForPreTraining,
    TransformerXLModelArguments,
    build_model,
)
from hf_pretrain.objectives.recurrent_lm.trainer import (
    METHOD,
    DataCollatorForRecurrentLM,
    RecurrentLMTrainer,
    RecurrentLMTrainingArguments,
    lane_inputs,
)

__all__ = [
    "METHOD",
    "DataCollatorForRecurrentLM",
    "RecurrentLMConfig",
    "RecurrentLMForPreTraining",
    "RecurrentLMTrainer",
    "RecurrentLMTrainingArguments",
    "TransformerXLModelArguments",
    "build_model",
    "lane_inputs",
]
