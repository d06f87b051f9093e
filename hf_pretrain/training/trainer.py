"""The Trainer of every method, to be read from top to bottom: losses, data, rates, log, evaluation, checkpoints, export.

The details are in objects that it holds: `inputs.py` makes examples, model and collator of what a user gives,
`data/streaming/reader.py` reads a stream, `steps/runner.py` computes a micro-batch, `steps/evaluation.py` measures held-out
examples, `progress.py` counts tokens, `checkpointing.py` writes checkpoints and finds the one to go on from, `hub/pushing.py`
uploads to the Hub, `hub/branches.py` makes branches by the tokens that were read, and `hub/run.py` keeps the numbers of the card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.epochs import (
    FILLER,
    CollatorOfFilled,
    EpochDataset,
    EpochSampler,
    FilledDataset,
    FilledSampler,
    without_filler,
)
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.data.streaming.reader import ShareOfSteps, StreamReader
from hf_pretrain.errors import InputError
from hf_pretrain.hub.branches import Branches
from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.pushing import Pushing, repository_of
from hf_pretrain.hub.record import PretrainingCard
from hf_pretrain.hub.run import HeldOutNumbers, describe_run
from hf_pretrain.modeling.base import PretrainingModel, check_trainable, tokenizer_for
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.loading import quiet
from hf_pretrain.modeling.losses import PretrainingOutput, SumAccumulator
from hf_pretrain.modeling.observing.profile import Profile
from hf_pretrain.modeling.surgery.adapters import add_adapters
from hf_pretrain.optimizers import check_matrices_are_whole, optimizer_of, schedule_of
from hf_pretrain.options import check_options, schedules_of
from hf_pretrain.schedules import TrainingSteps
from hf_pretrain.training.arguments import (
    PretrainingArguments,
    check_best_metric,
    check_can_be_searched,
    check_searched,
)
from hf_pretrain.training.checkpointing import Checkpointing, check_loaded, fitting_shapes
from hf_pretrain.training.inputs import TrainerInputs
from hf_pretrain.training.method import MethodHooks
from hf_pretrain.training.phases.course import Course, PhaseEnd, kept_options, sampler_from
from hf_pretrain.training.processes import (
    check_launch,
    dropout_of_process,
    is_sharded,
    not_finite,
    release_memory,
    reported_faults,
    sharded_by_blocks,
)
from hf_pretrain.training.progress import (
    LearningRates,
    TimeBudget,
    TokenCount,
    introduce,
    peak_memory_mib,
    show_progress,
)
from hf_pretrain.training.steps.evaluation import Evaluation
from hf_pretrain.training.steps.runner import StepRunner, with_host_inputs

if TYPE_CHECKING:
    from hf_pretrain.evaluation.suite.runs import RunTasks


class PretrainingTrainer(MethodHooks, Trainer):
    """Trains a [`PretrainingModel`], dividing each of its losses by that loss's own global count.

    The model returns sums. Before a step, the targets of every loss are counted over all its micro-batches and all ranks, so
    the gradient does not depend on how the global batch is cut. All components are logged, and evaluated weighted by tokens.

    A method gives its `objective` and, if it has any, its `evaluation_metrics`; a loss called "x" is weighted by the option
    `x_weight` (1 if there is none). An option may be a [`Schedule`], which changes in training; evaluation uses its last value,
    so that totals can be compared. The other hooks of a method are those of [`MethodHooks`], `loss_weight`, `run_model` and
    `save_progress`.

    What is overridden of `transformers.Trainer`, and why; a method that overrides one too is named:

    | Stock method | Why |
    | --- | --- |
    | `get_batch_samples` | counts a step's tokens, and notes how far a stream was taken; contrastive: keeps the micro-batches |
    | `_get_num_items_in_batch` | counts the targets of each loss by name, over micro-batches and ranks |
    | `compute_loss` | divides each sum by its count, weights it, keeps the components; contrastive: fillers are no negatives |
    | `training_step` | flash attention where the models can; rtd: generator and discriminator in turn, or in two stages |
    | `set_initial_training_values` | gives the collator the number of steps before the first batch is made |
    | `get_train_dataloader` | a stream is read by each process alone |
    | `_get_train_sampler` | keyed order that carries the epoch; distil-task: examples of about one length in a step |
    | `_get_eval_sampler` | memory: windows in the order of time |
    | `_get_dataloader` | processes with nothing left take a marked example; an evaluation takes `max_eval_tokens` |
    | `get_optimizer_cls_and_kwargs` | optimizers that transformers does not have, Adafactor's options |
    | `get_decay_parameter_names` | no weight decay of tables of which some rows are trained |
    | `create_optimizer` | rtd: a learning rate of the generator's own |
    | `create_scheduler` | the rates of phases; decay times warm-up; shares of steps; rtd: one schedule for each of two stages |
    | `_prepare_for_training` | FSDP shards the blocks that share no parameter, and keeps the rest together |
    | `train` | seeds dropout by rank, finds the checkpoint to go on from, reports faults in one line |
    | `_init_training_state` | a phase begins its data anew; a stream goes on by itself; no step after the last one |
    | `_evaluate` | what was measured before the first step is not measured again after a resume |
    | `hyperparameter_search` | a model that came by its name is opened anew for each trial |
    | `call_model_init` | a model of a search is checked and seeded as the first |
    | `_hp_search_setup` | refuses to search over an option that has had its effect |
    | `log` | adds components, rates and peak memory; a loss that is not finite ends the run |
    | `evaluate` | leaves the random state and the clock of training alone, and marks whose numbers these are |
    | `evaluation_loop` | memory: an evaluation has memory of its own |
    | `prediction_step` | returns sums and counts by example instead of logits |
    | `_maybe_log_save_evaluate` | makes the branches of the tokens that the step has reached |
    | `_save_checkpoint` | marks a checkpoint as whole when all processes have written it; pushes the export, not the composite |
    | `_load_from_checkpoint` | one line for weights of another shape |
    | `_issue_warnings_after_load` | refuses missing and unexpected weights |
    | `_load_optimizer_and_scheduler` | a phase keeps its own weight decay; memory: loads the memory of the lanes too |
    | `_load_best_model` | notes of which step the weights are |
    | `_save` | outside of a checkpoint, writes the export |
    | `save_model` | waits for an upload that reads the files |
    | `create_model_card` | writes our card, from the log |
    | `init_hf_repo` | finds out before training whether it may push |
    | `push_to_hub` | pushes the export with its card, and branches that wait; says how to repeat a push that failed |
    | `_finish_current_push` | says which uploads failed |

    Args:
        model: What is trained: a model of transformers, with or without its head; its name or folder; options of one to
            build; or a composite of this library. None if `model_init`, a function that makes one, is among the other
            arguments.
        args: Options of training.
        data_collator: Makes batches; by default the method's own.
        train_dataset: Text: a `datasets.Dataset`, `DatasetDict` or `IterableDataset` with a column of text, a list of texts, or
            what `prepare_data` returns. Or examples: a `datasets.Dataset` with `input_ids`, or any dataset with a length.
        eval_dataset: The same, held out, or a dictionary of several sets; by default the split "validation" of a
            `DatasetDict`.
        processing_class: The tokenizer, or its name; by default the one beside the model's weights.
        model_args: Options of a model that is built, or opened by its name.
        data_args: How text is cut into examples, such as `DataArguments(block_size=512)`.
        data_description: Numbers and names about the data, for the model card; by default what is found.
        peft_config: Adapters of PEFT to train, in place of those that `args.adapter` describes.
        **kwargs: Other arguments of `transformers.Trainer`, but `compute_metrics`.

    Raises:
        InputError: If the arguments ask for what cannot be right, such as one process driving several GPUs.
    """

    model: PretrainingModel
    hub_model_id: str | None
    option_classes: ClassVar[tuple[type, type]] = (ModelArguments, PretrainingArguments)
    data_collator: Any
    model_init: Any
    # The loss that compute_loss returns is already the share of this micro-batch in the whole step's mean.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: PretrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        model_args: Any = None,
        data_args: DataArguments | None = None,
        data_description: Mapping[str, Any] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        options = {"model_args": model_args, "data_args": data_args, "processing_class": processing_class}
        self.inputs = TrainerInputs(self, model, args, **options, others=kwargs)
        args = self.inputs.args
        self.course: Course | None = getattr(args, "course", None)
        found = self.inputs.read(train_dataset, eval_dataset, collator=data_collator)
        model = None if "model_init" in kwargs else self.inputs.model
        self._peft_config = peft_config
        if model is not None:
            self._make_trainable(model, args)
        # The stock method opens the repository with them.
        self.held_out, self.checkpoints, self.pushing = HeldOutNumbers(self), Checkpointing(self), Pushing(self)
        self.branches = Branches(self)
        super().__init__(model, args, compute_metrics=self._reduce_statistics, **found, **kwargs)
        # From pinned memory a batch is copied while the device computes.
        self.accelerator.dataloader_config.non_blocking |= self.args.dataloader_pin_memory
        check_launch(self.accelerator)
        check_matrices_are_whole(self.args, self.accelerator)
        self.progress = show_progress(self, partial(introduce, self))
        if self.args.max_minutes is not None:
            self.add_callback(TimeBudget(self))
        self.learning_rates = LearningRates()
        self.add_callback(self.learning_rates)
        if self.course is not None:
            self.add_callback(PhaseEnd(self))
        self._schedules = schedules_of(args)
        self.data_description = self.inputs.describe(data_description)
        # Options that are not the defaults, and all of them, where a program knows those of data and model too.
        self.recipe: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.stream: StreamReader | None = None
        self.has_begun = False
        self.runner, self.evaluation = StepRunner(self), Evaluation(self)
        self.runner.check_collator()
        self._components, self.tokens = SumAccumulator(), TokenCount(self)
        self.tasks = self._find_tasks()

    def _make_trainable(self, model: Any, args: PretrainingArguments) -> None:
        """Refuse what cannot be trained, and put in the adapters."""
        check_trainable(model, gradient_checkpointing=bool(args.activation_checkpointing))
        add_adapters(model, args, seed=args.seed, peft_config=self._peft_config)

    def _find_tasks(self) -> RunTasks | None:
        if not self.args.evaluation_tasks:
            return None
        # Measures are above training, and few runs have tasks.
        from hf_pretrain.evaluation.suite.runs import RunTasks

        return RunTasks(self)

    # Losses

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run a micro-batch forward and backward, on flash attention where the models can; see `transformers.Trainer`."""
        with self.runner.training(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    @property
    def profile(self) -> Profile | None:
        """Clock of the training that runs; None without the option `profile`."""
        return self.runner.profile

    @property
    def attention(self) -> str | None:
        """Names of the attention backends that the stock models run on in a step; None if none of them chooses one."""
        return self.runner.attention

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """Return the micro-batches of a step and their counts; see `transformers.Trainer`."""
        with self.runner.timed("data"):
            batches, counts = super().get_batch_samples(*args)
        self.has_begun = True
        if self.stream is not None:
            self.stream.note(batches)
        self.runner.receive(batches)
        if self.args.hub_branches is not None:
            self.branches.count()
        return batches, counts

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> dict[str, torch.Tensor] | None:
        """Count the targets of every loss over the step's micro-batches and all ranks."""
        if not batch_samples:
            return None
        counts = [self.model.count_targets(without_filler(batch)) for batch in batch_samples]
        names = sorted(counts[0])
        # A filler has no targets: it only keeps this process in step.
        own = [
            torch.stack([count[name] for name in names]) * (FILLER not in batch)
            for batch, count in zip(batch_samples, counts, strict=True)
        ]
        totals = torch.stack(own).sum(dim=0)
        totals = self.accelerator.reduce(totals.to(device).double(), reduction="sum")
        return dict(zip(names, totals, strict=True))

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
        outputs = self.run_model(model, without_filler(inputs))
        if FILLER in inputs:
            # The other processes wait for these gradients, which have to be zero.
            outputs.count_nothing()
        total = torch.zeros((), device=self.args.device)
        for name, loss in outputs.losses.items():
            mean = loss.sum.sum() / num_items_in_batch[name].clamp(min=1.0).float()
            total = total + self.scheduled(f"{name}_weight", self.loss_weight(name)) * mean
        self._components.add({f"{name}_loss": loss for name, loss in outputs.losses.items()} | outputs.metrics)
        # Distributed training averages gradients over ranks; the counts are already global, so what is wanted is their sum.
        total = total * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Return the model's losses of a micro-batch, in training and in evaluation; a temperature follows its schedule."""
        if model.training and "temperature" in self._schedules:
            value = self._schedules["temperature"].at(*self.steps_done())
            # A tensor: a compiled model would be compiled anew for every number.
            inputs = inputs | {"temperature": torch.tensor(value, device=self.args.device)}
        return cast(PretrainingOutput, model(**inputs))

    def loss_weight(self, name: str) -> float:
        """Return the weight of a loss in the total: the option `<name>_weight`, else 1; of a schedule the last value."""
        return float(getattr(self.args, f"{name}_weight", 1.0))

    def scheduled(self, option: str, constant: float) -> float:
        """Return an option's value at this step of training: by its schedule if it has one, else the constant given."""
        schedule = self._schedules.get(option)
        return constant if schedule is None else schedule.at(*self.steps_done())

    def steps_done(self) -> tuple[int, int]:
        """Return the steps done and all steps: of the phase that is trained, or of the run that has no phases."""
        if self.course is None:
            return self.state.global_step, self.state.max_steps
        return self.state.global_step - self.course.phase.start, self.course.phase.steps

    @property
    def begins_phase(self) -> bool:
        """Whether the next step is the first of a phase that goes on from a checkpoint of another one."""
        return self.course is not None and self.course.begins_at(self.state.global_step)

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """Return the course of training as transformers finds it, and give it to the collator, before a batch is made."""
        values = super().set_initial_training_values(args, dataloader)
        if hasattr(self.data_collator, "training_steps"):
            _, per_epoch, _, _, examples_per_step, _, total = values
            first_epoch = 0 if self.course is None else self.course.first_epoch
            total = total if self.course is None else self.course.phase.steps
            self.data_collator.training_steps = TrainingSteps(examples_per_step, per_epoch, total, first_epoch)
        return values

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training examples; that of a stream reads the part of this process."""
        self.stream = None
        if not isinstance(self.train_dataset, StreamingBlocks):
            return super().get_train_dataloader()
        if not any(isinstance(callback, ShareOfSteps) for callback in self.callback_handler.callbacks):
            self.add_callback(ShareOfSteps)
        self.train_dataset.first_epoch = 0 if self.course is None else self.course.first_epoch
        self.stream = StreamReader(self.train_dataset, self.args)
        return self.stream.loader(self._host_collator(), batch_size=self._train_batch_size)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Order by the seed and the epoch alone, or as the dataset says, and send the epoch along with each index."""
        dataset = cast(EpochDataset, self.train_dataset if train_dataset is None else train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(dataset), seed=seed, shuffle=not dataset.in_order)

    def _host_collator(self) -> Any:
        """Return the collator, followed by the model's `host_inputs`."""
        return with_host_inputs(self.data_collator, self.model)

    def _get_dataloader(self, dataset: Dataset, *, is_training: bool = False, **options: Any) -> DataLoader:
        """Return a loader of examples; those that fill the last turn of several processes in training are marked as such."""
        if self.evaluation.is_running and any(dataset is part for part in self.evaluation.sets):
            dataset = self.part_to_evaluate(dataset)
        collate, sampler = self.data_collator, None
        self.data_collator = self._host_collator()
        if is_training and not isinstance(dataset, IterableDataset):
            if self.course is not None:
                options["sampler_fn"] = partial(sampler_from, options["sampler_fn"], self.course.first_epoch)
            if self.args.world_size > 1:
                sampler = options["sampler_fn"](dataset)
        # A sampler of another's making accelerate draws alike on all processes.
        if isinstance(sampler, EpochSampler):
            if not self.args.dataloader_drop_last:
                turn = self.get_total_train_batch_size(self.args) // self.args.gradient_accumulation_steps
                dataset, sampler = FilledDataset(dataset), FilledSampler(sampler, multiple=turn)
            self.data_collator = CollatorOfFilled(self.data_collator)
            options["sampler_fn"] = lambda _: sampler
        try:
            loader = super()._get_dataloader(dataset, is_training=is_training, **options)
        finally:
            self.data_collator = collate
        if isinstance(sampler, EpochSampler | FilledSampler):
            # Where batches are skipped after a resume, accelerate looks here for the sampler, to set its epoch.
            cast(Any, loader.batch_sampler).sampler = sampler
        return loader

    # Rates

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return class and arguments of the optimizer."""
        return optimizer_of(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.model.adapters.undecayed]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the rates of the phases, or the schedule that the options name."""
        if getattr(self, "lr_scheduler", None) is None:
            scheduled = cast(Optimizer, self.optimizer if optimizer is None else optimizer)
            if self.course is not None and self.course.has_rates:
                self.lr_scheduler: LRScheduler = self.course.scheduler(scheduled)
            else:
                self.lr_scheduler = schedule_of(self.args, scheduled, steps=num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: Path of a checkpoint, or True for the last whole one in the output folder.
            **kwargs: Other arguments of the stock method.

        Raises:
            InputError: If there is nothing to resume from, or it does not fit.
            RunError: If a disk is full, a worker died, or what was learned is not finite.
        """
        if self.train_dataset is None:
            raise InputError("train_dataset is missing: give the Trainer a dataset with a column of text")
        # An evaluation before training marks the model as prepared, and accelerate would then leave it out of DDP.
        for wrapped in (self.model, self.model_wrapped):
            # Between two trials of a search there is none.
            if wrapped is not None:
                wrapped._is_accelerate_prepared = False
        dropout_of_process(self.args)
        release_memory()
        self._components = SumAccumulator()
        self.runner.begin()
        self.tokens.begin()
        self.held_out.begin()
        self.begin_training()
        checkpoint = self.checkpoints.find(resume_from_checkpoint)
        self.branches.begin(is_new=checkpoint is None)
        if self.tasks is not None:
            self.tasks.begin(is_new=checkpoint is None)
        with reported_faults(self.args.output_dir), closing(self.progress):
            output = super().train(checkpoint, **kwargs)
            self.runner.end_profile()
        self.held_out.end()
        self.branches.finish()
        return output

    def _prepare_for_training(self, *args: Any) -> Any:
        """Wrap the model for distributed training; see `transformers.Trainer`."""
        with sharded_by_blocks(self.model):
            return super()._prepare_for_training(*args)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Return the epochs that are done, and the batches to skip in the next one."""
        with quiet() if self.course is not None else nullcontext():
            # transformers would warn of the batch size of another phase.
            done, skipped = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, *args)
        if self.course is not None:
            done, steps = divmod(self.state.global_step - self.course.phase.start, steps_per_epoch)
            skipped = 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps
        if self.stream is not None:
            self.stream.resume(None if self.begins_phase else args[0])
            # The stream goes on by itself: there is nothing to skip.
            skipped = 0
        # The stock loop would take one more step where all of them are done.
        return (num_epochs, 0) if self.state.global_step >= max_steps else (done, skipped)

    @property
    def num_steps_trained(self) -> int:
        """Steps since the last call of `train`, without those of the checkpoint that it went on from."""
        return self.state.global_step - self._initial_global_step

    # Search of hyper-parameters

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Search with fresh weights in each trial; see `transformers.Trainer.hyperparameter_search`.

        Raises:
            InputError: If the Trainer cannot make the model anew, or `hub_branches` or `evaluation_tasks` is set.
        """
        check_can_be_searched(self.args)
        if self.model_init is None:
            self.model_init = self.inputs.rebuilding()
        return super().hyperparameter_search(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a fresh model from `model_init`; see `transformers.Trainer.call_model_init`."""
        model = self.inputs.compose(super().call_model_init(trial))
        self._make_trainable(model, self.args)
        # transformers sets the seed before each.
        dropout_of_process(self.args)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Set the options of a trial.

        Raises:
            InputError: If one of them cannot change any more, because the data, the collator or the model was made with it.
        """
        before = dict(vars(self.args))
        super()._hp_search_setup(trial)
        check_searched(self.args, before, group_size=getattr(self.train_dataset, "group_size", 1))
        check_options(self.args)
        self._schedules = schedules_of(self.args)
        self.check_trial()

    # The log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every component, throughput and peak memory to a row of training; see `transformers.Trainer.log`."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                what = f"the loss is {logs['loss']} at step {self.state.global_step}"
                raise not_finite(self.args.output_dir, what)
            means = self._components.means(self._sum_over_ranks)
            logs |= means | self.training_metrics(means)
            done, total = self.steps_done()
            # Before the last step, whose values these are.
            logs |= {name: schedule.at(done - 1, total) for name, schedule in self._schedules.items()}
            logs |= self.tokens.row() | {"peak_memory_mib": peak_memory_mib()}
            if self.profile is not None:
                self.profile.add_row(self.state.global_step, logs["tokens_per_second"])
        if "train_runtime" in logs and not self.num_steps_trained:
            # There is no speed or mean loss of a run that trained no step.
            for name in [name for name in logs if name.startswith("train_")]:
                del logs[name]
        super().log(logs, start_time)

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; masks and samples are fixed, so two calls give the same numbers. See `transformers.Trainer.evaluate`."""
        if self.evaluation.is_running:  # one of several sets, called from below
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        first = len(self.state.log_history)
        with self.evaluation.running():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        is_own = (eval_dataset is None or eval_dataset is self.eval_dataset) and metric_key_prefix == "eval"
        self.held_out.note(self.state.log_history[first:], metrics, is_own=is_own)
        if is_own:
            self.data_description |= self.evaluation.described()
        if self.is_in_train and metric_key_prefix == "eval":
            check_best_metric(self.args, [name[5:] for name in metrics if name.startswith("eval_")])
        self.evaluated(metrics)
        return metrics

    def part_to_evaluate(self, dataset: Any) -> Any:
        """Return the examples of a set of the run's own held-out text that each evaluation measures; see `max_eval_tokens`."""
        return self.evaluation.part_of(dataset)

    def measured_examples(self) -> tuple[int, int]:
        """Return how many held-out examples an evaluation measures, and of how many."""
        return self.evaluation.measured_examples()

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # Only the evaluation before the first step leaves the schedule alone, and a resumed run has had that one.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def evaluate_export(self) -> None:
        """Evaluate the weights that will be exported, if there is held-out text and they were not evaluated so far."""
        if self.eval_dataset is not None and not self.held_out.is_measured():
            self.evaluate()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Return each example's sums and counts instead of logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), self.runner.on_fast_attention(inputs):
            return self.evaluation.pack(self.run_model(model, inputs))

    def _reduce_statistics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Turn the sums and counts of all examples into means weighted by targets."""
        means, scores_and_labels = self.evaluation.unpack(prediction)
        if scores_and_labels is not None:
            means |= self.evaluation_metrics(*scores_and_labels, means)
        return means

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, then push, then remove older ones."""
        # It may lie between two rows of the log.
        self.tokens.add_new()
        write = partial(super()._save_checkpoint, model, trial)
        with self.runner.timed("saving"):
            # A run that goes on from here must not miss them.
            self.branches.write_passed()
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self.checkpoints.save(folder, write=write)
            if self.args.push_to_hub:
                with self.checkpoints.together():
                    self.pushing.push_checkpoint(folder)
            self.checkpoints.remove_old(folder)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.args.hub_branches is not None:
            # With the row of the log and the evaluation of this step in the card.
            self.branches.write_passed()

    def save_progress(self, folder: Path) -> None:
        """Write what else a resume needs into a checkpoint; called on every process, before it is marked as whole."""
        if self.stream is not None:
            self.stream.save(folder, reduce=self._sum_over_ranks)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with fitting_shapes():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        is_phase = self.course is not None and checkpoint is not None and not self.is_deepspeed_enabled
        with kept_options(self) if is_phase else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_loaded(load_result, tied=self.model.all_tied_weights_keys)
        self.model.tie_weights()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.held_out.load(self.state.best_model_checkpoint)

    # Export and card

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the composite into a checkpoint, and the export everywhere else."""
        if self.checkpoints.is_writing:
            with self.checkpoints.options_to_keep():
                super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            self.model.export(folder, state_dict=state_dict)
            if self.processing_class is not None:
                root = self.model.root
                with tokenizer_for(root, self.processing_class) as tokenizer:
                    tokenizer.save_pretrained(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the export; see `transformers.Trainer.save_model`."""
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            # The upload reads the files that would be written over.
            self._finish_current_push()
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, model_name: str | None = None, **facts: Any) -> None:
        """Write the model card and its plots into the output folder, from what was logged.

        Args:
            model_name: Title of the card; by default the name of the repository or the folder.
            **facts: Other fields of [`PretrainingCard`]; those that only the stock card knows are ignored.
        """
        if not self.is_world_process_zero():
            return
        facts |= {} if model_name is None else {"model_name": model_name}
        card = self.describe(**facts)
        if self.tasks is not None:
            # All processes put shards together, and this is one; a program has measured them before.
            if not is_sharded(self.model):
                self.tasks.measure_trained()
            card = self.tasks.on_card(card)
        write_card(card, self.args.output_dir)

    def describe(self, **facts: Any) -> PretrainingCard:
        """Return the facts of the model card, from what was logged; see `create_model_card` for the arguments."""
        known = {field.name for field in fields(PretrainingCard)}
        chosen = {name: value for name, value in facts.items() if name in known and value is not None}
        return describe_run(self, **self.card_facts() | chosen)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find that what is there may be written to; called when the Trainer is made.

        Raises:
            InputError: If token, name or rights do not allow it.
            RunError: If the Hub does not answer.
        """
        if self.is_world_process_zero():
            self.hub_model_id = repository_of(self.args, token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> Any:
        """Push the export with its card; see [`Pushing.push_export`] for the arguments, and for what is refused."""
        options: dict[str, Any] = {"token": token, "revision": revision, "private": private}
        pushed = self.pushing.push_export(commit_message, blocking=blocking, facts=facts, **options)
        self.branches.push_rest(blocking=blocking, token=token)
        return pushed

    def _finish_current_push(self) -> None:
        """Wait for the uploads that go on, and say which failed."""
        self.pushing.finish()
