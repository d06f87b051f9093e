"""Fine-tuning a stock model with a strategy: the options and the Trainer.

`strategies.py` says what moves, from when on and how fast, by the options in `arguments.py`; `layers.py` finds the parts of a
model; `adapters.py` adds those of peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, ORDER_STRIDE, EpochDataset, EpochSampler
from hf_pretrain.errors import InputError
from hf_pretrain.files import begin_folder, share_weights, write_marker
from hf_pretrain.modeling.kernels import fast_dropout
from hf_pretrain.optimizers import check_matrices_are_whole, optimizer_of, schedule_of, stock_optimizer_name
from hf_pretrain.options import option
from hf_pretrain.tasks.batches import LengthGroupedSampler
from hf_pretrain.training.arguments import global_batch_size
from hf_pretrain.training.checkpointing import changed, remove_old_checkpoints
from hf_pretrain.training.processes import check_launch, dropout_of_process, sharded_by_blocks, sharding_of
from hf_pretrain.transfer.adapters import add_adapters, merge_for_export
from hf_pretrain.transfer.arguments import ADAPTERS, StrategyArguments
from hf_pretrain.transfer.layers import layerwise_parameter_groups as layerwise_parameter_groups
from hf_pretrain.transfer.layers import reinitialise_layers
from hf_pretrain.transfer.recomputing import recomputed
from hf_pretrain.transfer.strategies import StrategyPlan, is_adapted, set_gradients

# What moves is the same from the first step to the last, and in the model's own weights.
SHARDED = ("full", "layerwise_decay", "top_layers", "frozen", "bitfit")
"""Strategies that go with FSDP, where each process holds a share of the weights only."""


@dataclass
class FineTuningArguments(StrategyArguments, TrainingArguments):
    """`transformers.TrainingArguments` with a strategy of fine-tuning, and ELECTRA's defaults.

    The defaults are those of its small and base models: each layer learns more slowly than the one above. The large one takes a
    learning rate of 5e-5 and a decay of 0.9. Ten epochs instead of three where there are few examples (RTE, STS-B). Strategies
    that move few weights ("frozen", "bitfit", "lora") usually take a higher rate, such as 1e-3.

    Source: `configure_finetuning.py` of the official ELECTRA code.
    """

    learning_rate: float = option(1e-4, "Peak learning rate, that of the head.")
    weight_decay: float = option(0.01, "Decoupled weight decay of all but biases and norms.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or their share of all steps if below 1.")
    num_train_epochs: float = option(3.0, "Passes over the examples.")
    per_device_train_batch_size: int = option(32, "Examples a step and device.")
    train_sampling_strategy: str = option(
        "group_by_length",
        "'group_by_length': examples of about one length in a step, in another order each epoch; or 'random', 'sequential'.",
    )

    def __post_init__(self) -> None:
        """Check the strategy, then let transformers check the rest."""
        self.settle_strategy()
        sharding = sharding_of(self)
        if sharding and self.strategy not in SHARDED:
            raise InputError(
                f"strategy={self.strategy!r} does not go with {sharding}, which shares weights out among processes: choose "
                f"one of {', '.join(SHARDED)}, or launch with ddp.yaml"
            )
        if torch.accelerator.current_accelerator(check_available=True) is None:
            # There is nothing to pin memory for, and torch would say so in each run.
            self.dataloader_pin_memory = False
        # transformers fills it in, and would not tell its own value from the user's.
        self.chooses_metric = self.metric_for_best_model is not None
        with stock_optimizer_name(self):
            super().__post_init__()
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if self.slanted_triangular and (self.warmup_steps != 0.1 or schedule != "linear"):
            raise InputError(
                f"warmup_steps={self.warmup_steps} and lr_scheduler_type={schedule!r} have no effect with slanted_triangular: "
                "leave them out, and set slanted_cut_fraction and slanted_ratio instead"
            )


class _RowSampler(LengthGroupedSampler):
    """Yields plain numbers of rows, so that the examples stay as the data set has them."""

    def _indices(self, epoch: int) -> Iterator[int]:
        for index in super()._indices(epoch):
            yield index % ORDER_STRIDE % EPOCH_STRIDE


class _ShuffledRows(EpochSampler):
    """Yields plain numbers of rows in a keyed random order."""

    def _indices(self, epoch: int) -> Iterator[int]:
        for index in super()._indices(epoch):
            yield index % ORDER_STRIDE % EPOCH_STRIDE


class _Stages(TrainerCallback):
    """Unfreezes each part of a model at its step. The step alone decides, so a resumed run does the same."""

    def __init__(self, trainer: FineTuningTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze the parts whose step has come; DDP has seen before which parts will be trained."""
        self.trainer.enter_stage(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was given."""
        set_gradients(self.trainer.plan.moving, True)


class FineTuningTrainer(Trainer):
    """The stock Trainer with a strategy of fine-tuning.

    The stock Trainer makes its optimizer from the parameters that require a gradient at that time, so that what is unfrozen later
    never moves. Here the optimizer has groups for all parts that move at some time, and a part that does not move yet has no
    gradient: no decay and no momentum touches it. The plan of `args.strategy` is a function of the step.

    The gradient is the mean over micro-batches and processes, however many they are: stock heads return a mean, which the stock
    Trainer takes for one that is divided by the whole step's count already.

    The stock methods that it overrides:

    | method | why |
    | --- | --- |
    | `train` | draws `reinit_layers` anew before the first step; each process has dropout of its own |
    | `_prepare_for_training` | FSDP gathers each block by itself |
    | `get_optimizer_cls_and_kwargs` | groups of all parts |
    | `set_initial_training_values` | remembers the steps of an epoch, which stages begin with |
    | `create_scheduler` | a schedule for each part |
    | `compute_loss` | a frozen encoder without dropout; less memory with adapters |
    | `_save_checkpoint` | a run that is started again tells a whole checkpoint from one that was cut off |
    | `save_model` | adapters are merged into a stock model |
    | `_get_train_sampler` | examples of about one length in a step |
    | `_get_eval_sampler` | predictions in the order of the data set |

    Args:
        model: A stock model with a head.
        args: A [`FineTuningArguments`].
        **kwargs: Other arguments of `transformers.Trainer`; an optimizer that is passed here keeps the rates that it has.

    Attributes:
        plan: The parts of the model, see `StrategyPlan`.

    Raises:
        InputError: If the strategy does not go with the model or with another option.
    """

    def __init__(self, model: nn.Module, args: FineTuningArguments, **kwargs: Any) -> None:
        if args.strategy in ADAPTERS:
            model = add_adapters(cast(PreTrainedModel, model), args)
        elif args.strategy == "scalar_mix" and not any(
            name.rpartition(".")[2] == "scalar_mix" for name, _ in model.named_modules()
        ):
            raise InputError(
                f"strategy='scalar_mix' needs a model with a module scalar_mix, and {type(model).__name__} has none: set "
                "mix_layers with an architecture, or choose architecture='scalar_mix'"
            )
        self.plan = StrategyPlan(model, args)
        if self.plan.is_staged:
            # A schedule that does not go with stages is refused now, not when training begins.
            self.plan.multipliers(total=100, per_epoch=10)
        self.plan.freeze()
        if self.plan.is_staged and args.ddp_find_unused_parameters is None:
            # Parts that do not move yet have no gradient, and processes must not wait for one.
            args.ddp_find_unused_parameters = True
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._check_processes()
        self._steps_per_epoch = self._total_steps = 0
        self._moving: list[Any] | None = None
        self._is_reinitialised = False
        if self.plan.is_staged:
            self.add_callback(_Stages(self))

    def _check_processes(self) -> None:
        """Refuse what would move other weights than planned, or move none on other processes."""
        check_launch(self.accelerator)
        check_matrices_are_whole(self.args, self.accelerator)
        if self.plan.is_staged and self.args.world_size > 1 and not self.args.ddp_find_unused_parameters:
            raise InputError(
                f"ddp_find_unused_parameters=False: with strategy={self.args.strategy!r} some parts have no gradient at first; "
                "leave it out"
            )
        if self.plan.is_staged and self.optimizer is not None:
            raise InputError(
                f"optimizers: strategy={self.args.strategy!r} sets the rate of each part at each step; leave them out"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`. A resumed run has the layers of its checkpoint, not fresh ones."""
        if self.args.reinit_layers and not resume_from_checkpoint and not self._is_reinitialised:
            reinitialise_layers(self.plan.inner, self.args.reinit_layers, seed=self.args.seed)
            self._is_reinitialised = True
        if self.args.world_size > 1:
            dropout_of_process(self.args)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_for_training(self, *args: Any) -> Any:
        """Wrap the model for several processes; see `transformers.Trainer`."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args)
        with sharded_by_blocks(cast(PreTrainedModel, self.model)):
            found = super()._prepare_for_training(*args)
        # The plan still had the whole weights, and would keep them in memory.
        self.plan = StrategyPlan(cast(nn.Module, self.model), self.args)
        return found

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return the optimizer of the options, to be made with the groups of the parts."""
        optimizer, kwargs = optimizer_of(args, model)
        plan = StrategyPlan(cast(nn.Module, model), args)
        if plan.has_one_rate:
            return optimizer, kwargs
        if {"params", "model", "optimizer_dict"} & set(kwargs):
            raise InputError(
                f"optim={args.optim.value} groups parameters in a way of its own: take another, such as adamw_torch, or set "
                "strategy to 'full'"
            )
        # A Trainer takes these for its own two groups.
        kwargs["params"] = plan.groups(weight_decay=args.weight_decay)
        return optimizer, kwargs

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, *rest: Any) -> Any:
        """Remember how many steps an epoch has; see `transformers.Trainer.set_initial_training_values`."""
        values = super().set_initial_training_values(args, dataloader, *rest)
        self._steps_per_epoch, self._total_steps = values[1], values[6]
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Return the schedule, with a beginning for each part; see `transformers.Trainer.create_scheduler`."""
        if cast(Any, self).lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        if not (self.plan.is_staged or self.args.slanted_triangular):
            scheduled = cast(torch.optim.Optimizer, self.optimizer if optimizer is None else optimizer)
            self.lr_scheduler = schedule_of(self.args, scheduled, steps=num_training_steps)
            self._created_lr_scheduler = True
            return super().create_scheduler(num_training_steps, optimizer)
        groups = cast(Any, self.optimizer if optimizer is None else optimizer).param_groups
        shares = self.plan.multipliers(total=num_training_steps, per_epoch=self._steps_per_epoch)
        # Without parts, all groups follow the one schedule.
        first = next(iter(shares.values()))
        scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            [shares.get(group.get("name", ""), first) for group in groups],
        )
        self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

    def enter_stage(self, step: int) -> None:
        """Unfreeze the parts of the model that are trained at a step, and freeze the parts that begin later.

        Args:
            step: Steps done so far.
        """
        sizes = {"total": self._total_steps, "per_epoch": self._steps_per_epoch}
        self._moving = [part for part in self.plan.moving if part.moves(step, **sizes)]
        for part in self.plan.moving:
            set_gradients([part], part in self._moving)

    def learning_rates(self) -> dict[str, float]:
        """Return the present learning rate of each part of the model by its name, once there is an optimizer."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return {group.get("name", "model"): float(group["lr"]) for group in groups}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a micro-batch forward and backward; see `transformers.Trainer.training_step`."""
        with fast_dropout(self.args.device, is_compiled=self.args.torch_compile):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss; see `transformers.Trainer.compute_loss`.

        A frozen encoder is in eval mode. With adapters cheap results are computed again in backward, to the same bits.
        """
        moving = self.plan.moving if self._moving is None else self._moving
        if model.training and self.plan.freezes_encoder(moving):
            self.plan.set_mode()
        with recomputed() if model.training and self._recomputes() else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _recomputes(self) -> bool:
        """Return whether cheap results are computed twice: adapters are chosen where memory is short."""
        if self.args.strategy not in ADAPTERS or self.args.torch_compile:
            return False
        # By the modules' own marks: the name of the model's property changes between versions of transformers.
        modules = self.plan.inner.modules()
        return not any(getattr(module, "gradient_checkpointing", False) is True for module in modules)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model: a stock one where `export` is "merged"; a checkpoint to resume from has the adapters as they are."""
        is_checkpoint = _internal_call and output_dir is not None
        adapted = cast(Any, self).model
        if self.args.export != "merged" or is_checkpoint or not is_adapted(adapted) or not self.args.should_save:
            super().save_model(output_dir, _internal_call)
            return
        self.model = merge_for_export(adapted)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = adapted

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            begin_folder(folder)
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        # What is older goes when this one is whole.
        with changed(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            share_weights(folder)
            write_marker(folder, has_hashes=True, step=self.state.global_step, world_size=self.args.world_size)
            keep = (folder, self.state.best_model_checkpoint)
            remove_old_checkpoints(folder.parent, limit=limit, keep=keep)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """Shuffle by the seed and the epoch, with examples of about one length in a step for `group_by_length`."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("group_by_length", "random") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        has_ids = isinstance(dataset, datasets.Dataset) and "input_ids" in dataset.column_names
        if strategy == "random" or not has_ids:
            return _ShuffledRows(len(dataset), seed=seed)
        return _RowSampler.of(EpochDataset.wrap(dataset), seed=seed, batch_size=global_batch_size(self.args))

    def _get_eval_sampler(self, eval_dataset: Dataset[Any]) -> Sampler[int] | None:
        """Keep the order of the data set: with `group_by_length` the stock Trainer's predictions have another."""
        has_length = eval_dataset is not None and hasattr(eval_dataset, "__len__")
        return SequentialSampler(cast(Any, eval_dataset)) if has_length and self.args.world_size <= 1 else None
