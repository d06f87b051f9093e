"""Replaced token detection: ELECTRA's objective."""

from hf_pretrain.objectives.replaced_token_detection.building import ReplacedTokenDetectionModelArguments, build_model
from hf_pretrain.objectives.replaced_token_detection.modeling import (
    ReplacedTokenDetectionConfig,
    ReplacedTokenDetectionForPreTraining,
)
from hf_pretrain.objectives.replaced_token_detection.trainer import (
    METHOD,
    DataCollatorForReplacedTokenDetection,
    ReplacedTokenDetectionTrainer,
    ReplacedTokenDetectionTrainingArguments,
    print_wrong_words,
)

__all__ = [
    "METHOD",
    "DataCollatorForReplacedTokenDetection",
    "ReplacedTokenDetectionConfig",
    "ReplacedTokenDetectionForPreTraining",
    "ReplacedTokenDetectionModelArguments",
    "ReplacedTokenDetectionTrainer",
    "ReplacedTokenDetectionTrainingArguments",
    "build_model",
    "print_wrong_words",
]
