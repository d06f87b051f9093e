"""Replaced token detection: ELECTRA's objective."""

from hf_pretrain.objectives.replaced_token_detection.building import ReplacedTokenDetectionModelArguments, build_model
from hf_pretrain.objectives.replaced_token_detection.collator import DataCollatorForReplacedTokenDetection
from hf_pretrain.objectives.replaced_token_detection.demonstration import print_suspicions
from hf_pretrain.objectives.replaced_token_detection.modeling import (
    ReplacedTokenDetectionConfig,
    ReplacedTokenDetectionForPreTraining,
)
from hf_pretrain.objectives.replaced_token_detection.trainer import (
    ReplacedTokenDetectionTrainer,
    ReplacedTokenDetectionTrainingArguments,
)

__all__ = [
    "DataCollatorForReplacedTokenDetection",
    "ReplacedTokenDetectionConfig",
    "ReplacedTokenDetectionForPreTraining",
    "ReplacedTokenDetectionModelArguments",
    "ReplacedTokenDetectionTrainer",
    "ReplacedTokenDetectionTrainingArguments",
    "build_model",
    "print_suspicions",
]
