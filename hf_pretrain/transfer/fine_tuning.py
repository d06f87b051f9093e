"""Fine-tuning a stock model with layer-wise learning rates."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from hf_pretrain.errors import InputError
from hf_pretrain.transfer.layerwise import DecayMode, check_decay, layerwise_parameter_groups


@dataclass
class FineTuningArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the learning rates of each layer, and ELECTRA's defaults.

    Those are the ones of its small and base models; the large one takes a learning rate of 5e-5 and a decay of 0.9. Ten epochs
    instead of three where there are few examples (RTE, STS-B).

    Source: `configure_finetuning.py` of the official ELECTRA code.
    """

    layerwise_learning_rate_decay: float = field(
        default=0.8, metadata={"help": "Factor of the learning rate from one layer to the one below; 1 for none."}
    )
    layerwise_decay_mode: DecayMode = field(
        default="paper",
        metadata={
            "help": "'paper': the last layer's rate is the head's times the factor; 'official': times its square."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate, that of the head."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay of all but biases and norms."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of warm-up, or their share of all steps if below 1."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the examples."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples a step and device."})

    def __post_init__(self) -> None:
        """Check the decay, then let transformers check the rest."""
        check_decay(self.layerwise_learning_rate_decay, self.layerwise_decay_mode)
        super().__post_init__()


class FineTuningTrainer(Trainer):
    """The stock Trainer with a learning rate for each layer.

    The gradient is the mean over micro-batches and processes, however many they are: stock heads return a mean, which the stock
    Trainer takes for one that is divided by the whole step's count already.

    Args:
        model: A stock model with a head.
        args: A [`FineTuningArguments`].
        **kwargs: Other arguments of `transformers.Trainer`; an optimizer that is passed here keeps the rates that it has.
    """

    def __init__(self, model: nn.Module, args: FineTuningArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return the stock optimizer, to be made with the groups of the layers."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.layerwise_learning_rate_decay == 1:
            return optimizer, kwargs
        if {"params", "model", "optimizer_dict"} & set(kwargs):
            raise InputError(
                f"optim={args.optim.value} groups parameters in a way of its own: take another, such as adamw_torch, or set "
                "layerwise_learning_rate_decay to 1"
            )
        # A Trainer takes these for its own two groups.
        kwargs["params"] = layerwise_parameter_groups(
            model,
            learning_rate=args.learning_rate,
            decay=args.layerwise_learning_rate_decay,
            mode=args.layerwise_decay_mode,
            weight_decay=args.weight_decay,
        )
        return optimizer, kwargs
