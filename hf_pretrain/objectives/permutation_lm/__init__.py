"""Permutation language modelling: XLNet's objective."""

from hf_pretrain.objectives.permutation_lm.collator import DataCollatorForPermutationLM, PermutationArguments
from hf_pretrain.objectives.permutation_lm.modeling import (
    PermutationLMConfig,
    PermutationLMForPreTraining,
    PermutationLMModelArguments,
    stock_inputs,
)
from hf_pretrain.objectives.permutation_lm.scoring import TextScore, log_likelihood, score_permutations
from hf_pretrain.objectives.permutation_lm.trainer import (
    METHOD,
    PermutationLMTrainer,
    PermutationLMTrainingArguments,
    plm_inputs,
)

__all__ = [
    "METHOD",
    "DataCollatorForPermutationLM",
    "PermutationArguments",
    "PermutationLMConfig",
    "PermutationLMForPreTraining",
    "PermutationLMModelArguments",
    "PermutationLMTrainer",
    "PermutationLMTrainingArguments",
    "TextScore",
    "log_likelihood",
    "plm_inputs",
    "score_permutations",
    "stock_inputs",
]
