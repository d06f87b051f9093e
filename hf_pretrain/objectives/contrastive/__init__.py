"""Encoders for one vector a text: contrastive learning, Deep InfoMax, RetroMAE and TSDAE."""

from hf_pretrain.objectives.contrastive.arguments import ContrastiveModelArguments, ContrastiveTrainingArguments
from hf_pretrain.objectives.contrastive.collator import DataCollatorForContrastive
from hf_pretrain.objectives.contrastive.modeling import ContrastiveConfig, ContrastiveForPreTraining
from hf_pretrain.objectives.contrastive.pairs import GivenPairs, load_pairs
from hf_pretrain.objectives.contrastive.trainer import METHOD, ContrastiveTrainer

__all__ = [
    "METHOD",
    "ContrastiveConfig",
    "ContrastiveForPreTraining",
    "ContrastiveModelArguments",
    "ContrastiveTrainer",
    "ContrastiveTrainingArguments",
    "DataCollatorForContrastive",
    "GivenPairs",
    "load_pairs",
]
