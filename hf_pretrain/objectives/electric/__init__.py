"""Electric: energy-based cloze models by noise-contrastive estimation."""

from hf_pretrain.objectives.electric.modeling import ElectricConfig, ElectricForPreTraining, score_texts
from hf_pretrain.objectives.electric.trainer import (
    METHOD,
    DataCollatorForElectric,
    ElectricModelArguments,
    ElectricTrainer,
    ElectricTrainingArguments,
    build_model,
)
from hf_pretrain.objectives.electric.two_tower import TwoTowerClozeConfig, TwoTowerClozeModel

__all__ = [
    "METHOD",
    "DataCollatorForElectric",
    "ElectricConfig",
    "ElectricForPreTraining",
    "ElectricModelArguments",
    "ElectricTrainer",
    "ElectricTrainingArguments",
    "TwoTowerClozeConfig",
    "TwoTowerClozeModel",
    "build_model",
    "score_texts",
]
