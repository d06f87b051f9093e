"""Training of several tasks with one encoder: the options and the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

from hf_pretrain.errors import InputError, check_range
from hf_pretrain.options import check_options, option
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.training.arguments import global_batch_size
from hf_pretrain.training.output_folder import note_own_folders
from hf_pretrain.training.parsing import check_changed
from hf_pretrain.training.processes import sharding_of
from hf_pretrain.transfer.adapters import merge_for_export
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer
from hf_pretrain.transfer.multitask.card import write_multitask_card
from hf_pretrain.transfer.multitask.modeling import MultiTaskModel
from hf_pretrain.transfer.multitask.sampling import (
    TASK,
    MultiTaskRows,
    MultiTaskSampler,
    Sampling,
    TaskRows,
    tasks_of_steps,
)
from hf_pretrain.transfer.strategies import StrategyPlan, is_adapted
from hf_pretrain.transfer.tuning.heads import reads_apart

_MEAN = "mean"


@dataclass
class MultiTaskArguments(FineTuningArguments):
    """The options of a training of several tasks: a strategy of fine-tuning, how tasks are drawn, and how losses are weighted.

    An epoch has as many steps as all examples fill; the draws decide which tasks these are of.
    """

    ranges: ClassVar[dict[str, str]] = {"sampling_temperature": "(0, inf)", "sampling_cap": "[1, inf)"}
    needs: ClassVar[dict[str, str]] = {
        "sampling_temperature": "sampling=temperature",
        "sampling_cap": "sampling=capped",
        "sampling_weights": "sampling=weights",
        "loss_weights": "loss_weighting=fixed",
    }

    sampling: Sampling = option(
        "proportional",
        "How the task of a step is drawn: 'proportional' (to its examples, n), 'equal', 'temperature' (n^(1/T)), 'capped' "
        "(min(n, K)), 'annealed' (from n to n^0.2 in the end), or 'weights'.",
    )
    sampling_temperature: float | None = option(None, "For 'temperature': T; by default 2. More is more even.")
    sampling_cap: int | None = option(None, "For 'capped': K, in examples; by default 65,536.")
    sampling_weights: dict | None = option(
        None, "For 'weights': a weight for each task, as JSON such as '{\"sst2\": 1, \"mnli\": 4}'."
    )
    loss_weighting: Literal["fixed", "uncertainty"] = option(
        "fixed", "'fixed': by loss_weights; 'uncertainty': each task learns its weight (Kendall et al. 2018)."
    )
    loss_weights: dict | None = option(None, "Factor of the loss of some tasks, as JSON; 1 for the others.")
    task_learning_rates: dict | None = option(
        None, "Peak learning rate of the heads of some tasks, as JSON; head_learning_rate for the others."
    )

    def __post_init__(self) -> None:
        """Check the options, and choose the best checkpoint by the mean of the tasks if nothing else is said."""
        check_options(self)
        check_changed(self)
        if sharding := sharding_of(self):
            raise InputError(
                f"several tasks do not go with {sharding}, which shares weights out among processes: launch with ddp.yaml"
            )
        # The collators of the tasks choose their columns.
        self.remove_unused_columns = False
        if self.label_smoothing_factor:
            raise InputError(
                f"label_smoothing_factor={self.label_smoothing_factor} does not go with tasks of several types: leave it out"
            )
        if self.export == "adapter":
            raise InputError("export='adapter': each task is exported as a stock model; leave it out")
        for name in ("sampling_weights", "loss_weights", "task_learning_rates"):
            for task, value in (getattr(self, name) or {}).items():
                check_range(
                    value, "[0, inf)" if name == "task_learning_rates" else "(0, inf)", name=f"{name} of {task}"
                )
        if self.sampling == "weights" and not self.sampling_weights:
            raise InputError("sampling='weights' needs sampling_weights: a weight for each task")
        if self.load_best_model_at_end and cast(Any, self).metric_for_best_model is None:
            self.metric_for_best_model: str | None = f"eval_{_MEAN}"
        super().__post_init__()

    def sampling_options(self, tasks: Iterable[str]) -> dict[str, Any]:
        """Return the options of `task_probabilities` for tasks in their order.

        Raises:
            InputError: If the weights are not those of the tasks.
        """
        names = list(tasks)
        options: dict[str, Any] = {"sampling": self.sampling}
        if self.sampling_temperature is not None:
            options["temperature"] = self.sampling_temperature
        if self.sampling_cap is not None:
            options["cap"] = self.sampling_cap
        if self.sampling_weights is not None:
            if set(self.sampling_weights) != set(names):
                raise InputError(
                    f"sampling_weights={self.sampling_weights} must have one weight for each of {', '.join(names)}"
                )
            options["weights"] = [self.sampling_weights[name] for name in names]
        return options


class MultiTaskCollator:
    """Makes a batch of examples of one task, with its collator.

    Args:
        collators: The collator of each task by name.
    """

    def __init__(self, collators: Mapping[str, Any]) -> None:
        self.collators = dict(collators)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch, with the name of the task as `task`.

        Raises:
            InputError: If the examples are of several tasks.
        """
        names = {example[TASK] for example in examples}
        if len(names) > 1:
            raise InputError(f"a batch has examples of {', '.join(sorted(names))}: one batch is of one task")
        name = names.pop()
        rows = [{key: value for key, value in example.items() if key != TASK} for example in examples]
        return {**self.collators[name](rows), TASK: name}


class MultiTaskTrainer(FineTuningTrainer):
    """Fine-tunes one encoder on several tasks, each with its head, under any strategy of fine-tuning.

    All micro-batches and processes of a step have examples of one task. A head whose task the step is not of has no gradient:
    its weights and its moments in Adam stay as they are. The order of a task's rows is that of `FineTuningTrainer`.

    It logs `loss_TASK`, the mean of a task's loss without its weight, and evaluates each task by its own metrics,
    `eval_TASK_METRIC`. `eval_mean` is the mean of the metrics that count. `save_model` writes the encoder, its card, and a stock
    checkpoint for each task in a folder of its name.

    Beside those of `FineTuningTrainer`, it overrides these stock methods:

    | method | why |
    | --- | --- |
    | `get_optimizer_cls_and_kwargs` | a learning rate for each head |
    | `get_decay_parameter_names` | learned weights of losses do not decay |
    | `compute_loss` | the loss of each task is summed up |
    | `log` | the means of these sums |
    | `evaluate` | each task by its metrics, and their mean |
    | `prediction_step` | the labels of the task's head |
    | `save_model`, `create_model_card` | stock checkpoints, our card |
    | `_get_train_sampler` | one task a step |

    Args:
        model: A `MultiTaskModel` of the tasks.
        args: The options.
        tasks: The tasks by name, with rows to train on.
        tokenizer: The encoder's tokenizer.
        max_length: Most tokens of an example, of two texts that are read apart of each.
        doc_stride: Of spans: tokens that a window shares with the next.
        facts: What the card is told beside what the run knows, such as `license` and `language`.
        **kwargs: Other arguments of `transformers.Trainer`.

    Attributes:
        tasks: The tasks.
        scores: The last metrics of each task on its validation rows, by name.

    Raises:
        InputError: If tasks, model and options do not fit each other.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        args: MultiTaskArguments,
        *,
        tasks: Mapping[str, TaskData],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 128,
        doc_stride: int = 32,
        facts: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if list(tasks) != model.tasks:
            raise InputError(
                f"tasks={list(tasks)} must be those of the model, {', '.join(model.tasks)}, in their order"
            )
        self.tasks, self.facts = dict(tasks), {name: value for name, value in (facts or {}).items() if value}
        for name in args.task_learning_rates or {}:
            if name not in self.tasks:
                raise InputError(f"task_learning_rates names {name!r}, which is none of {', '.join(self.tasks)}")
        if args.task_learning_rates and args.strategy == "probe_then_tune":
            raise InputError("task_learning_rates does not go with strategy='probe_then_tune': leave it out")
        args.sampling_options(self.tasks)
        if args.ddp_find_unused_parameters is None:
            # The heads of other tasks have no gradient, and processes must not wait for one.
            args.ddp_find_unused_parameters = True
        elif not args.ddp_find_unused_parameters and args.world_size > 1 and len(self.tasks) > 1:
            raise InputError("ddp_find_unused_parameters=False: a step leaves other tasks' heads alone; leave it out")
        apart = {name: reads_apart(model.task_model(name)) for name in self.tasks}
        rows, held_out = (
            {
                name: data.encoded(split, tokenizer, max_length=max_length, doc_stride=doc_stride, apart=apart[name])
                for name, data in self.tasks.items()
            }
            for split in ("train", "validation")
        )
        self._losses: dict[str, torch.Tensor] = {}
        self._steps_of: dict[str, int] = {}
        self.scores: dict[str, dict[str, float]] = {}
        super().__init__(
            model,
            args,
            train_dataset=cast(Any, MultiTaskRows(rows)),
            eval_dataset=cast(Any, {name: TaskRows(name, part) for name, part in held_out.items()}),
            data_collator=MultiTaskCollator(
                {name: data.collator(tokenizer, apart=apart[name]) for name, data in self.tasks.items()}
            ),
            processing_class=tokenizer,
            **kwargs,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch: as many as the examples of all tasks fill."""
        return max(1, len(cast(MultiTaskRows, self.train_dataset)) // global_batch_size(self.args))

    @property
    def total_steps(self) -> int:
        """Steps of the training."""
        args = self.args
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch)

    def drawn_tasks(self) -> np.ndarray:
        """Return the number of the task of each step of the training, and of the rest of its last epoch."""
        args, rows, total = self.args, cast(MultiTaskRows, self.train_dataset), self.total_steps
        count = math.ceil(total / self.steps_per_epoch) * self.steps_per_epoch
        seed = args.seed if args.data_seed is None else args.data_seed
        options = cast(MultiTaskArguments, args).sampling_options(self.tasks)
        return tasks_of_steps(rows.sizes, num_steps=count, total_steps=total, seed=seed, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Draw the task of each step; within a task the order is that of `FineTuningTrainer`."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, MultiTaskRows):
            return super()._get_train_sampler(dataset)
        samplers = [
            super(MultiTaskTrainer, self)._get_train_sampler(cast(Any, part)) for part in dataset.tasks.values()
        ]
        return MultiTaskSampler(
            dataset.sizes,
            [partial(_order_of_pass, sampler) for sampler in samplers],
            tasks=self.drawn_tasks(),
            batch_size=global_batch_size(self.args),
            steps_per_epoch=self.steps_per_epoch,
        )

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return the optimizer of the strategy, with a group for each head that has a rate of its own."""
        optimizer, kwargs = FineTuningTrainer.get_optimizer_cls_and_kwargs(args, model)
        rates: Mapping[str, float] = cast(MultiTaskArguments, args).task_learning_rates or {}
        if rates:
            plan = StrategyPlan(cast(nn.Module, model), args)
            groups = kwargs.pop("params", None) or plan.groups(weight_decay=args.weight_decay)
            kwargs["params"] = _with_rates(groups, cast(MultiTaskModel, plan.inner), rates)
        return optimizer, kwargs

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave out the learned weights of losses; see `transformers.Trainer.get_decay_parameter_names`."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_variance")]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the weighted loss of the batch's task, and add the plain one to the task's sum."""
        wants_outputs = args[0] if args else kwargs.pop("return_outputs", False)
        loss, outputs = super().compute_loss(model, inputs, True, *args[1:], **kwargs)
        if "unweighted_loss" in outputs:
            task, plain = inputs[TASK], outputs["unweighted_loss"].float()
            self._losses[task] = self._losses[task] + plain if task in self._losses else plain
            self._steps_of[task] = self._steps_of.get(task, 0) + 1
        return (loss, outputs) if wants_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean loss of each task since the last log; see `transformers.Trainer.log`."""
        if "loss" in logs and self._losses:
            # Each process has had steps of the same tasks.
            sums = self.accelerator.reduce(torch.stack(list(self._losses.values())), reduction="mean")
            for task, value in zip(self._losses, cast(torch.Tensor, sums).tolist(), strict=True):
                logs[f"loss_{task}"] = value / self._steps_of[task]
            self._losses, self._steps_of = {}, {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate each task on its rows.

        Args:
            eval_dataset: `TaskRows` by the names of tasks, which hold the validation rows; by default those of all tasks.
            ignore_keys: See `transformers.Trainer.evaluate`.
            metric_key_prefix: What the names of metrics begin with.

        Returns:
            The metrics of each task, `eval_TASK_METRIC`, and `eval_mean`, the mean of those that count.
        """
        parts = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(parts, Mapping) or not parts or not set(parts) <= set(self.tasks):
            raise InputError(f"eval_dataset must hold rows by the names of tasks, of {', '.join(self.tasks)}")
        found: dict[str, float] = {}
        for name, rows in parts.items():
            prefix = f"{metric_key_prefix}_{name}"
            with self._scored(name):
                metrics = super().evaluate(rows, ignore_keys, prefix)
            found |= metrics
            self.scores[name] = {
                key.removeprefix(f"{prefix}_"): value
                for key, value in metrics.items()
                if key.startswith(f"{prefix}_") and not key.endswith(("_runtime", "_per_second", "_loss"))
            }
        mean = float(np.mean([self.scores[name][self.tasks[name].main_metric] for name in parts]))
        self.log({f"{metric_key_prefix}_{_MEAN}": mean})
        found[f"{metric_key_prefix}_{_MEAN}"] = mean
        # Callbacks that stop early or keep the best look for the mean, which no single task has.
        stock = cast(Any, self)
        stock.control = self.callback_handler.on_evaluate(self.args, self.state, stock.control, found)
        return found

    @contextmanager
    def _scored(self, name: str) -> Iterator[None]:
        """Let the stock evaluation take the labels of a task, and score as the task does."""
        stock: Any = self
        data, kept = self.tasks[name], (stock.compute_metrics, stock.label_names)
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)

        def score(found: EvalPrediction) -> dict[str, float]:
            return data.score("validation", found.predictions, tokenizer=tokenizer)

        stock.compute_metrics = score
        stock.label_names = ["start_positions", "end_positions"] if data.spec.type == "span" else ["labels"]
        try:
            yield
        finally:
            stock.compute_metrics, stock.label_names = kept

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write stock checkpoints and the card; a checkpoint to resume from has the whole model as it is."""
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        if not self.args.should_save:
            return
        folder = Path(cast(str, self.args.output_dir) if output_dir is None else output_dir)
        note_own_folders(folder, self.tasks)
        self.stock_model().export(folder, cast(PreTrainedTokenizerBase, self.processing_class))
        write_multitask_card(self, folder)

    def stock_model(self) -> MultiTaskModel:
        """Return the model with its adapters, if it has some, in its weights."""
        model = cast(Any, self).accelerator.unwrap_model(self.model)
        return cast(MultiTaskModel, merge_for_export(model) if is_adapted(model) else model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `save_model` has written the card."""


def _order_of_pass(sampler: Any, number: int) -> np.ndarray:
    """Return the order of the rows of a task in one of its passes."""
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(number)
    return np.fromiter(sampler, dtype=np.int64, count=len(sampler))


def _with_rates(
    groups: list[dict[str, Any]], model: MultiTaskModel, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Split the groups: the head of each task in `rates` gets a group of its own, with its rate."""
    task_of = {id(p): task for task in rates for p in model.head(task).parameters()}
    found = []
    for group in groups:
        tasks = dict.fromkeys(task_of.get(id(p)) for p in group["params"])
        for task in tasks:
            members = [p for p in group["params"] if task_of.get(id(p)) == task]
            rate = group["lr"] if task is None else float(rates[task])
            found.append({**group, "params": members, "lr": rate})
    return found
