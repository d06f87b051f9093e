"""Left-to-right language modelling on any stock causal language model: GPT's objective.

`arguments.py` has the options, `modeling.py` the stock model with its loss, and `trainer.py` the batches and the Trainer.
"""

from hf_pretrain.objectives.causal_lm.arguments import (
    CausalLMDataArguments,
    CausalLMModelArguments,
    CausalLMTrainingArguments,
)
from hf_pretrain.objectives.causal_lm.modeling import CausalLMConfig, CausalLMForPreTraining
from hf_pretrain.objectives.causal_lm.trainer import METHOD, CausalLMTrainer, DataCollatorForCausalLM

__all__ = [
    "METHOD",
    "CausalLMConfig",
    "CausalLMDataArguments",
    "CausalLMForPreTraining",
    "CausalLMModelArguments",
    "CausalLMTrainer",
    "CausalLMTrainingArguments",
    "DataCollatorForCausalLM",
]
