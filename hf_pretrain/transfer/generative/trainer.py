"""GPT-1's fine-tuning: the task's loss, and the language-model loss as an auxiliary one.

The model is in `modeling.py`, the inputs are made in `inputs.py`. The order here: the options, the Trainer,
and the metrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_pretrain.errors import InputError, check_range
from hf_pretrain.modeling.backbone import longest_text
from hf_pretrain.modeling.kernels import fast_dropout
from hf_pretrain.modeling.losses import SumAccumulator
from hf_pretrain.options import option
from hf_pretrain.transfer.generative.inputs import DataCollatorForGenerativeTransfer, longest_row
from hf_pretrain.transfer.generative.modeling import (
    LM_LOSS_WEIGHT,
    GenerativeTransferModel,
    GenerativeTransferOutput,
    is_labelled,
)


@dataclass
class GenerativeTransferArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the weight of the language-model loss, and GPT-1's defaults.

    Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1.
    """

    lm_loss_weight: float = option(
        LM_LOSS_WEIGHT,
        "Weight of the language-model loss; 0 is plain fine-tuning, without the layer that predicts tokens.",
    )
    learning_rate: float = option(6.25e-5, "Peak learning rate.")
    weight_decay: float = option(0.01, "Decoupled weight decay of matrices and tables; vectors have none.")
    warmup_steps: float = option(0.002, "Steps of warm-up, or their share of all steps if below 1.")
    num_train_epochs: float = option(3.0, "Passes over the examples.")
    per_device_train_batch_size: int = option(32, "Examples a step and device.")

    def __post_init__(self) -> None:
        """Check the weight, then let transformers check the rest."""
        check_range(self.lm_loss_weight, "[0, inf)", name="lm_loss_weight", hint="0.5 is GPT-1's, 0 is none")
        if self.label_smoothing_factor:
            raise InputError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect on two losses: leave it out"
            )
        super().__post_init__()


class GenerativeTransferTrainer(Trainer):
    """The stock Trainer for [`GenerativeTransferModel`], alone or inside a `peft.PeftModel`.

    Each of the two losses is a mean over all examples of a step, however many micro-batches and processes share it. Both are
    logged: `task_loss` and `lm_loss`, in evaluation with the prefix `eval_`. The stock Trainer optimises the first loss that a
    model returns: with stock models of two heads, such as `GPT2DoubleHeadsModel`, that is the language model's alone.

    Args:
        model: The model.
        args: A [`GenerativeTransferArguments`].
        **kwargs: Other arguments of `transformers.Trainer`. By default the collator is a [`DataCollatorForGenerativeTransfer`] of
            the tokenizer `processing_class`, and `compute_metrics` is [`transfer_metrics`].

    Raises:
        InputError: If the model is another, rows do not fit its positions, or an argument would have no effect.

    Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", equation 5.
    """

    # The loss of a micro-batch is its share of the whole step's.
    loss_is_scaled_for_ga = True

    def __init__(self, model: nn.Module, args: GenerativeTransferArguments, **kwargs: Any) -> None:
        inner = getattr(model, "get_base_model", lambda: model)()
        if not isinstance(inner, GenerativeTransferModel):
            raise InputError(
                f"model={type(inner).__name__} has no task head of this Trainer: use GenerativeTransferModel.from_model"
            )
        if kwargs.get("compute_loss_func") is not None:
            raise InputError("compute_loss_func has no effect: the model returns the two losses; leave it out")
        if args.n_gpu > 1:
            raise InputError(f"{args.n_gpu} devices in one process: start one for each by `accelerate launch`")
        if kwargs.get("data_collator") is None:
            if kwargs.get("processing_class") is None:
                raise InputError("processing_class is missing: give the tokenizer, or a data_collator")
            kwargs["data_collator"] = DataCollatorForGenerativeTransfer(kwargs["processing_class"])
        for name in ("train_dataset", "eval_dataset"):
            _check_rows(kwargs.get(name), inner, name=name)
        kwargs.setdefault("compute_metrics", transfer_metrics)
        super().__init__(model, args, **kwargs)
        self._trained, self._evaluated = SumAccumulator(), SumAccumulator()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of matrices and tables, which alone are decayed."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> dict[str, torch.Tensor] | None:
        """Count the examples of a step, and those with a label, over micro-batches and processes."""
        labels = [batch["labels"] for batch in batch_samples if "labels" in batch]
        if not labels:
            return None
        own = torch.stack(
            [torch.stack([is_labelled(part).sum(), torch.tensor(len(part)).to(part)]) for part in labels]
        )
        totals = self.accelerator.reduce(own.sum(dim=0).to(device).double(), reduction="sum")
        return dict(zip(("task", "lm"), totals, strict=True))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a micro-batch forward and backward; see `transformers.Trainer.training_step`."""
        with fast_dropout(self.args.device, is_compiled=self.args.torch_compile):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, GenerativeTransferOutput]:
        """Return this micro-batch's share of the step's loss."""
        counts = num_items_in_batch or self._get_num_items_in_batch([inputs], self.args.device)
        if counts is None:
            raise InputError("the examples have no labels: give label_column to transform_examples")
        weights = {"task": 1.0, "lm": self.args.lm_loss_weight}
        output = model(**inputs, lm_loss_weight=weights["lm"])
        total = torch.zeros((), device=self.args.device)
        for name, found in output.losses.items():
            total = total + weights[name] * found.sum.sum() / counts[name].clamp(min=1).float()
        components = self._trained if model.training else self._evaluated
        components.add({f"{name}_loss": found for name, found in output.losses.items()})
        # Gradients are averaged over processes; the counts are already global, so what is wanted is their sum.
        total = total * self.accelerator.num_processes
        return (total, output) if return_outputs else total

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the mean of each loss to the metrics; see `transformers.Trainer.evaluation_loop`."""
        self._evaluated = SumAccumulator()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._evaluated.means(self._sum_over_processes)
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss to a row of training; see `transformers.Trainer.log`."""
        if "loss" in logs:
            logs |= self._trained.means(self._sum_over_processes)
        super().log(logs, start_time)

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")


def _check_rows(dataset: Any, model: GenerativeTransferModel, *, name: str) -> None:
    """Refuse rows that are longer than what the model can read."""
    longest = longest_text(model.model)
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if isinstance(part, datasets.Dataset) and longest is not None and "input_ids" in part.column_names:
            length = longest_row(part)
            if length > longest:
                raise InputError(
                    f"{name} has a row of {length} tokens, and the model {longest} positions: set max_length={longest} in "
                    "transform_examples"
                )


def transfer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the metrics of GLUE for predictions of a [`GenerativeTransferModel`].

    Args:
        prediction: Logits and labels; examples without a label are left out.

    Returns:
        `accuracy` and `matthews_correlation` of classes or answers; `spearmanr` and `pearsonr` of values, 0 where they are not
        defined. Without labels {}.
    """
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    has_label = is_labelled(torch.from_numpy(labels)).numpy()
    logits, labels = logits[has_label], labels[has_label]
    if not len(labels):
        return {}
    if logits.shape[1] > 1:
        guesses = logits.argmax(axis=1)
        scores = {
            "accuracy": accuracy_score(labels, guesses),
            "matthews_correlation": matthews_corrcoef(labels, guesses),
        }
    else:
        has_ranks = len(set(labels.tolist())) > 1 and len(set(logits[:, 0].tolist())) > 1
        both = {"spearmanr": spearmanr, "pearsonr": pearsonr}
        scores = {name: score(logits[:, 0], labels).statistic if has_ranks else 0.0 for name, score in both.items()}
    return {name: float(score) for name, score in scores.items() if math.isfinite(score)}
