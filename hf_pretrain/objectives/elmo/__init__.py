"""Two language models in opposite directions over words made of characters: ELMo's objective.

`arguments.py` has the options, `modeling.py` the model with its losses and the draw of a sampled softmax, and `trainer.py` the
batches and the Trainer.
"""

from hf_pretrain.objectives.elmo.arguments import ElmoDataArguments, ElmoModelArguments, ElmoTrainingArguments
from hf_pretrain.objectives.elmo.modeling import (
    BidirectionalLMConfig,
    BidirectionalLMForPreTraining,
    draw_negatives,
)
from hf_pretrain.objectives.elmo.trainer import METHOD, DataCollatorForElmo, ElmoTrainer

__all__ = [
    "METHOD",
    "BidirectionalLMConfig",
    "BidirectionalLMForPreTraining",
    "DataCollatorForElmo",
    "ElmoDataArguments",
    "ElmoModelArguments",
    "ElmoTrainer",
    "ElmoTrainingArguments",
    "draw_negatives",
]
