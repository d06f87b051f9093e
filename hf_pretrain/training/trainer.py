"""Running sums of named quantities, kept on the device between two log lines.

Peak memory of the process.

The base of every method's Trainer.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from hf_pretrain.data import draws
from hf_pretrain.data.examples.epochs import (
    FILLER,
    CollatorOfFilled,
    EpochDataset,
    EpochSampler,
    FilledDataset,
    FilledSampler,
)
from hf_pretrain.errors import InputError
from hf_pretrain.hub.record import ObjectiveDescription
from hf_pretrain.modeling.base import PretrainingModel, check_trainable
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput
from hf_pretrain.schedules import TrainingSteps
from hf_pretrain.training.arguments import AdamWithoutBiasCorrection, PretrainingArguments, linear_product_schedule
from hf_pretrain.training.checkpoints import not_finite
from hf_pretrain.training.processes import check_batches, check_sharding, sharded_by_blocks
from hf_pretrain.training.pushing import PushingMixin
from hf_pretrain.training.streams import StreamTrainingMixin


class SumAccumulator:
    """Adds up sums and counts by name; nothing is copied to the host before [`SumAccumulator.means`]."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, sums: Mapping[str, ExampleSum]) -> None:
        """Add one micro-batch."""
        for name, value in sums.items():
            total = torch.stack([value.sum.detach().sum(), value.count.detach().sum()]).double()
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the mean of each quantity since the last call, over all ranks.

        Args:
            reduce: Sums a tensor over the ranks; called once, on every rank.
        """
        if not self._totals:
            return {}
        names = sorted(self._totals)
        sums, counts = reduce(torch.stack([self._totals[name] for name in names])).T.tolist()
        self._totals.clear()
        return {name: s / c for name, s, c in zip(names, sums, counts, strict=True) if c > 0}


def peak_memory_mib() -> float:
    """Return the most memory held so far, in MiB: the accelerator's allocations, or the process's resident set without one."""
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        return round(torch.accelerator.max_memory_allocated() / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


# Options beside those of every method that are read at each step.
_READ_IN_TRAINING = {"generator_learning_rate", "generator_steps"}
_MADE_BEFORE = (
    "the data, the collator or the model was made with it; train with each value in turn, or search over options of the "
    "optimizer, the schedule or the losses' weights"
)


class PretrainingTrainer(StreamTrainingMixin, PushingMixin, Trainer):
    """Trains a [`PretrainingModel`], dividing each of its losses by that loss's own global count.

    The model returns sums. Before a step, the targets of every loss are counted over all its micro-batches and all ranks, so
    the gradient does not depend on how the global batch is cut. All components are logged, and evaluated weighted by tokens.

    A method gives its `objective` and, if it has any, its `evaluation_metrics`; a loss called "x" is weighted by the option
    `x_weight` (1 if there is none). An option `y_schedule` changes the option `y` in the course of training; evaluation keeps
    to `y` itself, so that totals can be compared.

    Args:
        model: The composite to train; None if `model_init`, a function that makes one, is among the other arguments, as
            `hyperparameter_search` needs it.
        args: Options.
        train_dataset: Examples; a map-style dataset is wrapped in [`EpochDataset`], so that collators know ids and epochs.
        eval_dataset: Held-out examples, or a dictionary of several sets.
        data_description: Numbers and names about the data, for the model card.
        **kwargs: Other arguments of `transformers.Trainer`, but `compute_metrics`.

    Raises:
        InputError: If the arguments ask for what cannot be right, such as one process driving several GPUs.
    """

    objective: ClassVar[ObjectiveDescription]
    # The loss that compute_loss returns is already the share of this micro-batch in the whole step's mean.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PretrainingModel | None,
        args: PretrainingArguments,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        data_description: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "compute_metrics" in kwargs:
            raise InputError(
                "compute_metrics is not used here: override evaluation_metrics, which sees scores and labels"
            )
        if args.n_gpu > 1:
            raise InputError(
                f"one process would drive {args.n_gpu} GPUs: start with `accelerate launch`, a process a GPU"
            )
        if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
            raise InputError(f"max_steps={args.max_steps}: a stream has no known end, say how many steps to train")
        schedules = args.parse_schedules()
        if isinstance(train_dataset, IterableDataset) and "mlm_probability" in schedules:
            raise InputError(
                "mlm_probability_schedule needs each example's place in training, which a stream does not know: leave out "
                "streaming, or the schedule"
            )
        if eval_dataset is None:
            if args.eval_strategy != "no":
                name = args.eval_strategy.value
                raise InputError(
                    f"eval_strategy={name!r} without held-out text: name a validation_file, or set it to 'no'"
                )
            args.eval_on_start = False
        elif isinstance(eval_dataset, dict):
            eval_dataset = {name: _with_epochs(dataset) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = _with_epochs(eval_dataset)
        if model is not None:
            check_trainable(model, gradient_checkpointing=bool(args.activation_checkpointing))
        super().__init__(
            model,
            args,
            train_dataset=None if train_dataset is None else _with_epochs(train_dataset),
            eval_dataset=eval_dataset,
            compute_metrics=self._reduce_statistics,
            **kwargs,
        )
        check_sharding(self.accelerator)
        check_batches(self.accelerator)
        self._schedules = schedules
        self.data_description = dict(data_description or {})
        if self._isolates_documents and isinstance(self.train_dataset, EpochDataset) and len(self.train_dataset):
            self._refuse_lost_documents(self.data_collator([self.train_dataset[0]]))
        self.recipe: dict[str, Any] = {}
        self._components = SumAccumulator()
        self._statistic_names: list[str] = []
        # Counted on the device since the last look, and found since the last row of the log.
        self._num_tokens = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._tokens_since_row = 0
        self._clock = time.perf_counter()

    @property
    def _isolates_documents(self) -> bool:
        return self.data_description.get("block_mode") == "isolated_documents"

    def _refuse_lost_documents(self, batch: Mapping[str, Any]) -> None:
        """Refuse a collator that drops `document_ids` where documents are kept apart: they would see each other."""
        if self._isolates_documents and "document_ids" not in batch:
            raise InputError(
                f"block_mode='isolated_documents', but the batches of {type(self.data_collator).__name__} have no document_ids: "
                "choose another block_mode, such as 'doc_sentences'"
            )

    # Normalisation

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """Return the micro-batches of a step and their counts; see `transformers.Trainer`."""
        batches, counts = super().get_batch_samples(*args)
        for batch in batches:
            self._refuse_lost_documents(batch)
            if FILLER not in batch:
                self._num_tokens += batch["attention_mask"].sum().to(self._num_tokens.device)
        return batches, counts

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> dict[str, torch.Tensor] | None:
        """Count the targets of every loss over the step's micro-batches and all ranks."""
        if not batch_samples:
            return None
        counts = [self._count_targets(batch) for batch in batch_samples]
        names = sorted(counts[0])
        totals = torch.stack([torch.stack([count[name] for name in names]) for count in counts]).sum(dim=0)
        totals = self.accelerator.reduce(totals.to(device).double(), reduction="sum")
        return dict(zip(names, totals, strict=True))

    def _count_targets(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the targets of each loss in a micro-batch; none where it only keeps this process in step."""
        counts = self.model.count_targets({name: value for name, value in batch.items() if name != FILLER})
        return {name: torch.zeros_like(count) for name, count in counts.items()} if FILLER in batch else counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, PretrainingOutput]:
        """Return this micro-batch's share of the step's loss: the weighted sum of its sums over the global counts."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        assert num_items_in_batch is not None, "there is a batch, so it was counted"
        is_filler = FILLER in inputs
        outputs = self.run_model(model, {name: value for name, value in inputs.items() if name != FILLER})
        if is_filler:
            # The other processes wait for these gradients, which have to be zero.
            outputs.losses, outputs.metrics = _nothing(outputs.losses), _nothing(outputs.metrics)
        total = torch.zeros((), device=self.args.device)
        for name, loss in outputs.losses.items():
            mean = loss.sum.sum() / num_items_in_batch[name].clamp(min=1.0).float()
            weight = self.loss_weight(name)
            total = total + (self.scheduled(f"{name}_weight", weight) if model.training else weight) * mean
        if model.training:
            self._components.add({f"{name}_loss": loss for name, loss in outputs.losses.items()} | outputs.metrics)
        # Distributed training averages gradients over ranks; the counts are already global, so what is wanted is their sum.
        total = total * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Return what the model makes of a micro-batch, in training and in evaluation."""
        return cast(PretrainingOutput, model(**inputs))

    def loss_weight(self, name: str) -> float:
        """Return the weight of a loss in the total: the option `<name>_weight`, else 1; its schedule is for training alone."""
        return getattr(self.args, f"{name}_weight", 1.0)

    def scheduled(self, option: str, constant: float) -> float:
        """Return an option's value at this step of training: by its schedule if it has one, else the constant given."""
        schedule = self._schedules.get(option)
        return constant if schedule is None else schedule.at(self.state.global_step, self.state.max_steps)

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """Return what transformers finds out about the course of training, and tell the collator; no batch is made before."""
        values = super().set_initial_training_values(args, dataloader)
        if hasattr(self.data_collator, "training_steps"):
            _, per_epoch, _, _, examples_per_step, _, total = values
            self.data_collator.training_steps = TrainingSteps(examples_per_step, per_epoch, total)
        return values

    # Data order

    def _get_train_sampler(self, train_dataset: Dataset) -> Sampler | None:
        """Shuffle by the seed and the epoch alone, and send the epoch along with each index."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(cast(Sized, train_dataset)), seed=seed)

    def _get_dataloader(self, dataset: Dataset, *, is_training: bool = False, **options: Any) -> DataLoader:
        """Return a loader of examples; those that fill the last turn of several processes in training are marked as such."""
        load = partial(super()._get_dataloader, is_training=is_training)
        if not is_training or self.args.world_size == 1 or isinstance(dataset, IterableDataset):
            return load(dataset, **options)
        sampler = options["sampler_fn"](dataset)
        if not isinstance(sampler, EpochSampler):
            # Of another's making: accelerate knows how to draw the same on all processes.
            return load(dataset, **options)
        filled: Sampler[int] = sampler
        if not self.args.dataloader_drop_last:
            turn = self.get_total_train_batch_size(self.args) // self.args.gradient_accumulation_steps
            dataset, filled = FilledDataset(dataset), FilledSampler(sampler, multiple=turn)
        collate: Any = self.data_collator
        self.data_collator: Any = CollatorOfFilled(collate)
        try:
            loader = load(dataset, **(options | {"sampler_fn": lambda _: filled}))
        finally:
            self.data_collator = collate
        # Where batches are skipped after a resume, accelerate looks here for what has to be told the epoch.
        loader.batch_sampler.sampler = filled
        return loader

    # Optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return the stock optimizer, or Adam without bias correction where the recipe wants it."""
        if args.adam_bias_correction:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return AdamWithoutBiasCorrection, kwargs | {"fused": True}

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the stock schedule, or the product of decay and warm-up where the recipe wants it."""
        if getattr(self, "lr_scheduler", None) is None and self.args.decay_during_warmup:
            self.lr_scheduler: LRScheduler = linear_product_schedule(
                self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # Training and logging

    def _prepare_for_training(self, *args: Any) -> Any:
        """Wrap the model for distributed training; see `transformers.Trainer`."""
        with sharded_by_blocks(self.model):
            return super()._prepare_for_training(*args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        # An evaluation before training marks the model as prepared, and accelerate would then leave it out of DDP.
        for wrapped in (self.model, self.model_wrapped):
            # Between two trials of a search there is none.
            if wrapped is not None:
                wrapped._is_accelerate_prepared = False
        self._seed_dropout()
        # What an earlier training counted after its last row of the log belongs to no row of this one.
        self._components = SumAccumulator()
        self._num_tokens.zero_()
        self._tokens_since_row = 0
        self._clock = time.perf_counter()
        return super().train(*args, **kwargs)

    def _seed_dropout(self) -> None:
        """Give each rank dropout of its own: transformers seeds all alike. A resume restores each rank's own state."""
        torch.manual_seed(draws.generator_seed(self.args.process_index, seed=self.args.seed, stream="dropout"))

    # Search of hyper-parameters

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a fresh model from `model_init`; see `transformers.Trainer.call_model_init`."""
        model = super().call_model_init(trial)
        check_trainable(model, gradient_checkpointing=bool(self.args.activation_checkpointing))
        # transformers sets the seed before each.
        self._seed_dropout()
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Set the options of a trial.

        Raises:
            InputError: If one of them cannot change any more, because the data, the collator or the model was made with it.
        """
        before = dict(vars(self.args))
        super()._hp_search_setup(trial)
        known = {field.name for field in fields(PretrainingArguments)} | _READ_IN_TRAINING
        for name in (name for name, value in vars(self.args).items() if value != before.get(name)):
            if name not in known and not name.endswith(("_weight", "_schedule")):
                raise InputError(f"{name}={getattr(self.args, name)!r} cannot be searched over: {_MADE_BEFORE}")
            if name.endswith("batch_size") and getattr(self.train_dataset, "group_size", 1) > 1:
                raise InputError(
                    f"{name} cannot be searched over: all examples of a step are of one kind; {_MADE_BEFORE}"
                )
        self._schedules = self.args.parse_schedules()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every component, throughput and peak memory to a training step's log line."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                what = f"the loss is {logs['loss']} at step {self.state.global_step}"
                raise not_finite(self.args.output_dir, what)
            means = self._components.means(self._sum_over_ranks)
            logs |= means | self.training_metrics(means)
            done = self.state.global_step - 1  # before the last step, whose values these are
            logs |= {name: schedule.at(done, self.state.max_steps) for name, schedule in self._schedules.items()}
            logs |= self._throughput()
        super().log(logs, start_time)

    def training_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return further metrics for a row of the training log, from the means of the components since the last one."""
        return {}

    def _throughput(self) -> dict[str, float]:
        self._count_tokens()
        tokens, self._tokens_since_row = self._tokens_since_row, 0
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        return {
            "num_tokens": self.state.num_input_tokens_seen,
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_mib": peak_memory_mib(),
        }

    def _count_tokens(self) -> None:
        """Add the tokens that the devices counted to the state, which travels with the checkpoints."""
        tokens = int(self._sum_over_ranks(self._num_tokens).item())
        self._num_tokens.zero_()
        self._tokens_since_row += tokens
        self.state.num_input_tokens_seen += tokens

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The checkpoint may lie between two rows of the log.
        self._count_tokens()
        super()._save_checkpoint(model, trial)

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; masks and samples are fixed, so two calls give the same numbers. See `transformers.Trainer.evaluate`."""
        trained = time.perf_counter() - self._clock
        # A data loader draws a seed when it is opened; training must not depend on how often it is evaluated.
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(*args, **kwargs)
        # Not a sum: with several held-out sets this call contains one for each.
        self._clock = time.perf_counter() - trained
        # Of several sets each is evaluated with a prefix of its own, and then all together.
        if self.is_in_train and kwargs.get("metric_key_prefix", "eval") == "eval":
            self._check_best_metric(metrics)
        return metrics

    def _check_best_metric(self, metrics: Mapping[str, float]) -> None:
        """Refuse a `metric_for_best_model` that an evaluation has not measured, at the first one and not with a checkpoint."""
        name = self.args.metric_for_best_model
        if name is None or f"eval_{name.removeprefix('eval_')}" in metrics:
            return
        about_speed = ("_runtime", "_per_second", "_time")
        found = sorted(key.removeprefix("eval_") for key in metrics if not key.endswith(about_speed))
        raise InputError(f"metric_for_best_model={name!r} is not measured here: take one of {', '.join(found)}")

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Return each example's sums and counts instead of logits: small, and free of the repeats that fill the last batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.run_model(model, inputs)
        sums = {f"{name}_loss": loss for name, loss in outputs.losses.items()} | outputs.metrics
        self._statistic_names = sorted(sums)
        columns = [part for name in self._statistic_names for part in sums[name]]
        statistics = torch.stack(columns, dim=1)
        if outputs.scores is None:
            return None, (statistics,), torch.zeros_like(statistics)
        return None, (statistics, outputs.scores), outputs.score_labels

    def _reduce_statistics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Turn the sums and counts of all examples into means weighted by targets."""
        statistics, *scores = (
            prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
        )
        totals = np.asarray(statistics, dtype=np.float64).sum(axis=0).reshape(-1, 2)
        means = {
            name: float(total / count)
            for name, (total, count) in zip(self._statistic_names, totals, strict=True)
            if count > 0
        }
        losses = {name.removesuffix("_loss"): mean for name, mean in means.items() if name.endswith("_loss")}
        means["loss"] = sum(self.loss_weight(name) * mean for name, mean in losses.items())
        if scores:
            is_real = prediction.label_ids != IGNORED
            means |= self.evaluation_metrics(scores[0][is_real], prediction.label_ids[is_real], means)
        return means

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return further metrics from the model's binary scores.

        Args:
            scores: ``[N]`` logits of all real tokens of the held-out set.
            labels: ``[N]`` zeros and ones.
            means: The means computed so far.
        """
        return {}


def _nothing(sums: Mapping[str, ExampleSum]) -> dict[str, ExampleSum]:
    return {name: ExampleSum(value.sum * 0, value.count * 0) for name, value in sums.items()}


def _with_epochs(dataset: Dataset) -> Dataset:
    return dataset if isinstance(dataset, IterableDataset) else EpochDataset.wrap(dataset)
