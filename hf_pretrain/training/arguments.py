"""Options that every method has, and a check of them before any text is read."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import InputError, check_choice, check_numbers, nearest, one_line
from hf_pretrain.hub.branches import check_branches
from hf_pretrain.hub.identifiers import check_identifiers
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.surgery.adapters import AdapterArguments
from hf_pretrain.names import SYNONYMS
from hf_pretrain.optimizers import check_bias_correction, optimizer_of, schedule_of, stock_optimizer_name
from hf_pretrain.options import check_options, option, schedules_of
from hf_pretrain.training.phases.course import Course
from hf_pretrain.training.processes import first_process_first

# A collator makes batches faster than a step takes; more processes only take memory.
_MOST_WORKERS = 4
_COUNT, _STEPS = "[1, 1048576]", "[0, 2147483647]"

# Options beside those of every method that are read at each step.
_READ_IN_TRAINING = {"generator_learning_rate", "generator_steps"}
_MADE_BEFORE = (
    "the data, the collator or the model was made with it; train with each value in turn, or search over options of the "
    "optimizer, the schedule or the losses' weights"
)
_USER_METRICS = "compute_metrics is not used here: a method's metrics come from sums over all held-out examples"
_ALWAYS_TRAINS = "the programs always train, and evaluate as eval_strategy says"
_HALF_EXPORT = "evaluation computes in the training's precision, and the exported weights stay in fp32"
_SAMPLING = "the order of the examples follows from the seed and the epoch alone"
_LIGER = "Liger has no kernels for encoders and their objectives"

REFUSED: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (True, "each loss is divided by its targets on all devices"),
    "batch_eval_metrics": (False, _USER_METRICS),
    "bf16_full_eval": (False, _HALF_EXPORT),
    "do_predict": (False, _ALWAYS_TRAINS),
    "do_train": (False, _ALWAYS_TRAINS),
    "eval_do_concat_batches": (True, _USER_METRICS),
    "eval_use_gather_object": (False, "evaluation gathers tensors of sums and counts"),
    "fp16_full_eval": (False, _HALF_EXPORT),
    "include_for_metrics": ([], _USER_METRICS),
    "include_num_input_tokens_seen": ("no", "num_tokens is in every log row"),
    "label_names": (None, "each objective knows its own labels"),
    "label_smoothing_factor": (0.0, "the losses are those of the objectives, without smoothing"),
    "length_column_name": ("length", _SAMPLING),
    "liger_kernel_config": (None, _LIGER),
    "parallelism_config": (None, "one model is divided by FSDP or ZeRO only: use fsdp, or accelerate launch"),
    "prediction_loss_only": (False, "evaluation never gathers logits"),
    "remove_unused_columns": (False, "it would drop example ids and word boundaries"),
    "train_sampling_strategy": ("random", _SAMPLING),
    "use_cache": (False, "no model keeps a cache in training"),
    "use_liger_kernel": (False, _LIGER),
}
"""Options of `transformers.TrainingArguments` that would have no effect, or a wrong one: the only value allowed, and why."""


def bf16_is_fast() -> bool:
    """Return whether the accelerator, or else the CPU, has bf16 matrix units (GPUs with bf16; AVX512-BF16 or AMX)."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if accelerator.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Elsewhere (mps, xpu, ...) bf16 autocast is not known to pay: the user must set bf16.
    return False


def loader_workers() -> int:
    """Return how many processes make batches for one training process, by the cores that it has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One core stays for the training process itself.
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
    return max(0, min(_MOST_WORKERS, share))


@dataclass
class PretrainingArguments(AdapterArguments, TrainingArguments):
    """`transformers.TrainingArguments` with what pre-training needs and the defaults that suit it.

    Raises:
        InputError: If a number is out of its range, an option would have no effect, or two contradict each other.
    """

    ranges: ClassVar[dict[str, str]] = {
        "per_device_train_batch_size": _COUNT,
        "per_device_eval_batch_size": _COUNT,
        "gradient_accumulation_steps": _COUNT,
        "num_train_epochs": "[0, 1000000000]",
        "max_steps": "[-1, 2147483647]",
        "max_minutes": "(0, inf)",
        "warmup_steps": _STEPS,
        "adam_beta1": "[0, 1)",
        "adam_beta2": "[0, 1)",
        "adam_epsilon": "(0, 1]",
        "max_grad_norm": "[0, inf)",
        "neftune_noise_alpha": "(0, inf)",
        "torch_empty_cache_steps": _COUNT,
        "logging_steps": _STEPS,
        "eval_steps": _STEPS,
        "eval_delay": _STEPS,
        "eval_accumulation_steps": _COUNT,
        "save_steps": "(0, 2147483647]",
        "save_total_limit": _COUNT,
        "dataloader_num_workers": "[0, 1024]",
        "dataloader_prefetch_factor": "[1, 1024]",
        "ddp_bucket_cap_mb": _COUNT,
        "ddp_timeout": "[1, 2147483647]",
        "max_eval_tokens": "[0, 9223372036854775807]",
        "evaluation_max_examples": "[5, 2147483647]",
    }
    """Of options of transformers; others follow from their names, see `hf_pretrain.errors.check_numbers`."""

    course: ClassVar[Course | None] = None
    """Of an instance whose run has phases: all of them, and which one it is for. A program sets it; it is no option."""

    chosen = frozenset[str]()
    """Of an instance, the options whose value follows from the machine, which a recipe must not fix."""

    also_honoured: ClassVar[Mapping[str, Collection[Any]]] = {}
    """Values that a method honours of options that others refuse, by option; see `REFUSED`."""

    overwrite_output_dir: bool = option(False, "Replace the earlier run in output_dir, once all is read and checked.")
    resume_from_checkpoint: str | None = option(
        None,
        "Go on from the last whole checkpoint in output_dir (`true`), from the checkpoint of this path, or "
        "(`auto`) from the last whole one if there is any and else from the start: for jobs that are started again.",
    )
    bf16: bool | None = option(
        None, "Compute in bf16 autocast; by default on machines whose matrix units are fast in it."
    )
    optim: str = option(
        TrainingArguments.optim,
        "Optimizer: one of transformers.training_args.OptimizerNames (stable_adamw is AdamW with clipped updates), or muon, for "
        "hidden matrices, with AdamW for all else; or adamw_rms, AdamW whose updates are multiplied by the size of each matrix.",
    )
    adam_bias_correction: bool = option(
        True, "Adam's bias correction; the official BERT and ELECTRA optimizers have none."
    )
    decay_during_warmup: bool = option(
        False, "Multiply the linear schedule's decay and warm-up, as the official ELECTRA does."
    )
    weight_decay: float = option(0.01, "Decoupled weight decay of all but biases and norms.")
    learning_rate: float = option(5e-4, "Peak learning rate.")
    warmup_steps: float = option(
        0.1, "Steps of warm-up, or their share of all steps if below 1; recipes of a million steps take 10000."
    )
    phases: list[Any] | None = option(
        None,
        "Phases of the run, each with options of its own: a list in a recipe, not on the command line. See the page Phases of "
        "the documentation.",
    )
    branch_from: str | None = option(
        None,
        "Run or checkpoint to branch off from, with its weights, optimizer and tokenizer; the phases follow. Of a run: the end "
        "of its last phase whose learning rate has not decayed.",
    )
    max_minutes: float | None = option(
        None,
        "Train at most about this many minutes, evaluations included: after a few steps max_steps is lowered to what fits, and "
        "the schedule of the learning rate ends there.",
    )
    dataloader_num_workers: int | None = option(
        None,
        "Processes that make batches beside each training process, 0 for none; by default up to 4 where there is an accelerator "
        "and the text is no stream, and else none. Batches are the same with any number.",
    )
    eval_on_start: bool = option(
        True, "Evaluate before the first step, to compare with; only if there is held-out text."
    )
    max_eval_tokens: int | None = option(
        None,
        "Held-out tokens that an evaluation measures, about, spread over the whole held-out text and the same each time; 0 for "
        "all. By default 2.5 % of the tokens that the run trains on, but at least 16,384; with max_minutes, at most 16,384 for "
        "each minute. A model with a memory reads the beginning of each lane. Labelled rows of a task are all measured.",
    )
    remove_unused_columns: bool = option(False, "Keep off: collators need columns that no model takes.")
    logging_nan_inf_filter: bool = option(
        False, "Hide losses that are not finite, at the price of a device sync a step."
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Let DDP look for parameters without gradient; every objective uses all of its own."
    )

    profile: bool = option(
        False,
        "Write to profile.json, and print at the end, where the time goes: tokens a second, the share of the device's peak, and "
        "the shares of waiting for data, of evaluation and of saving; on a GPU also waits for the device.",
    )
    evaluation_tasks: list[str] | None = option(
        None,
        "Tasks to measure the model on, before and after training, and its teacher: names in evaluation_data_dir, or YAML files, "
        "as in `hf-pretrain evaluate --tasks`.",
    )
    evaluation_data_dir: str = option("data", "Folder of the data of these tasks.")
    evaluation_max_examples: int | None = option(
        None,
        "Rows of each of these tasks, at most: those that a probe learns from, and those that are scored.",
    )

    hub_branches: str | None = option(
        None,
        'Export the model when so many tokens are read, as branches of the Hub: "every 1M", "1M 2M 5M 10M", or "babylm" '
        "(1M to 10M, 20M to 100M, 200M to 1000M). Without push_to_hub they are folders: output_dir/branches/tokens_1M.",
    )
    hub_branch_name: str = option("tokens_{}", "Name of such a branch, with {} for the tokens: chck_{} for BabyLM.")
    language: list[str] | None = option(None, "Codes of the languages of the text, for the model card: en de.")
    license: str | None = option(None, "License of the model, for its card; the Hub's identifier: apache-2.0.")
    datasets: list[str] | None = option(
        None, "Ids of the training data on the Hub, for the model card: allenai/c4; a dataset_name is there anyway."
    )
    tags: list[str] | None = option(None, "More tags of the model on the Hub, such as biomedical.")
    private_text: bool = option(
        False,
        "The text is private: its sentences are no examples in the model card. A private repository has none either.",
    )

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse an unknown option with the known one; the generated `__init__` would only say that it is unexpected."""
        # A class that is no dataclass itself may take other arguments.
        known = [field.name for field in fields(cls)] if "__dataclass_fields__" in vars(cls) else list(options)
        for name in options:
            if name not in known:
                raise InputError(f"{cls.__name__} has no option {name!r}: {_elsewhere(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Choose the precision, then let transformers check the rest."""
        self._check_refused()
        check_identifiers({name: getattr(self, name) for name in ("language", "license", "datasets", "tags")})
        check_branches(self.hub_branches, self.hub_branch_name)
        check_options(self)
        has_accelerator = (
            torch.accelerator.current_accelerator(check_available=True) is not None and not vars(self)["use_cpu"]
        )
        self.chosen = frozenset()
        if self.dataloader_num_workers is None:
            own = () if self.dataloader_persistent_workers else ("dataloader_persistent_workers",)
            self.chosen = frozenset(("dataloader_num_workers", *own))
            self.dataloader_num_workers = loader_workers() if has_accelerator else 0
            self.dataloader_persistent_workers |= self.dataloader_num_workers > 0
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise InputError("dataloader_persistent_workers=True without workers: set dataloader_num_workers too")
        if self.decay_during_warmup and self.lr_scheduler_type != "linear":
            raise InputError(
                f"decay_during_warmup=True is the linear schedule's, not {self.lr_scheduler_type}'s: drop one of the two"
            )
        check_bias_correction(self)
        if torch.accelerator.current_accelerator(check_available=True) is None:
            # transformers refuses bf16 on a CPU unless use_cpu is set.
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast()
        try:
            with stock_optimizer_name(self):
                super().__post_init__()
        except Exception:
            # transformers keeps the settings of DeepSpeed for the whole process; later models would be built for it.
            unset_hf_deepspeed_config()
            raise
        self._check_mappings()
        # Every rank reads a stream and takes its share; batches sent out from rank 0 would have their gathered targets cut.
        self.accelerator_config.dispatch_batches = False

    def read_stream(self) -> None:
        """Take no worker that nobody asked for: each one of a stream reads shards of its own, and there may be one shard."""
        if "dataloader_num_workers" in self.chosen:
            self.dataloader_num_workers, self.dataloader_persistent_workers = 0, False

    def _check_refused(self) -> None:
        """Refuse options that no Trainer of this library honours."""
        for name, (value, why) in REFUSED.items():
            given = getattr(self, name)
            given = {False: "no", True: "all"}.get(given, given) if value == "no" else given
            if given != value and given not in self.also_honoured.get(name, ()):
                raise InputError(f"{name}={given!r} is not supported: {why}: leave it out")

    def _check_mappings(self) -> None:
        """Refuse mappings that are none, and entries without effect."""
        for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise InputError(f'{name}={value!r} is no JSON object: write {{"name": value}}')
        check_numbers(self)
        if self.accelerator_config.dispatch_batches:
            raise InputError(
                "accelerator_config: dispatch_batches=True would cut the targets of a batch: leave it out, every process reads "
                "its own share"
            )
        if not self.accelerator_config.use_seedable_sampler:
            raise InputError(
                "accelerator_config: use_seedable_sampler=False has no effect: the order follows from the seed and the epoch"
            )

    def main_process_first(self, local: bool = True, desc: str = "work") -> AbstractContextManager[None]:
        """Let one process work while the others wait, however long it takes; see `transformers.TrainingArguments`."""
        return super().main_process_first(local=local, desc=desc) if local else first_process_first(self)


def _elsewhere(name: str, known: Collection[str]) -> str:
    """Return where an option belongs that a dataclass of training does not have."""
    # "a|b word" is the first of the options a and b that there is, with the value "word".
    synonym, _, value = SYNONYMS.get(name, name).partition(" ")
    for ours in synonym.split("|"):
        if ours in known:
            return f"did you mean {ours}={value!r}?" if value else f"did you mean {ours!r}?"
    for argument, options in (("data_args", DataArguments), ("model_args", ModelArguments)):
        for ours in synonym.split("|"):
            if ours in (field.name for field in fields(options)):
                return f"give the Trainer {argument}={options.__name__}({ours}={repr(value) if value else '...'})"
    return nearest(name, known, otherwise="its options are those of transformers.TrainingArguments and of the method")


def global_batch_size(args: TrainingArguments) -> int:
    """Return the examples of a step, over all processes and accumulation steps."""
    return args.world_size * args.train_batch_size * args.gradient_accumulation_steps


def check_text(args: TrainingArguments, *, is_stream: bool, holds_out: bool, why: str = "") -> None:
    """Refuse options that do not go with the text.

    Args:
        args: The options of a training.
        is_stream: Whether the text is a stream.
        holds_out: Whether there is held-out text.
        why: Why there is none, in parentheses.

    Raises:
        InputError: Naming the option.
    """
    if args.eval_strategy != "no" and not holds_out:
        raise InputError(
            f"eval_strategy={args.eval_strategy.value!r} without held-out text{why}: name a validation_file, or set it to 'no'"
        )
    if is_stream and args.max_steps <= 0:
        raise InputError(f"max_steps={args.max_steps}: a stream has no known end, say how many steps to train")
    masking = schedules_of(args).get("mlm_probability")
    if is_stream and masking is not None:
        raise InputError(
            f"mlm_probability={masking!r} needs each example's step, which a stream does not know: leave out "
            "streaming, or give one number"
        )
    if getattr(args, "max_minutes", None) is not None and masking is not None:
        raise InputError(
            f"max_minutes={args.max_minutes}: the number of steps changes in training, but mlm_probability={masking!r} needs "
            "it from the start: leave out one of them"
        )


def check_best_metric(args: TrainingArguments, measured: Collection[str]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation measures.

    Args:
        args: The options of a training.
        measured: Names of all metrics of an evaluation, without "eval_".

    Raises:
        InputError: Naming those that are there.
    """
    name = args.metric_for_best_model
    if name is not None and name.removeprefix("eval_") not in measured:
        found = sorted(key for key in measured if not key.endswith(("runtime", "_per_second", "_time")))
        raise InputError(f"metric_for_best_model={name!r} is not measured here: choose one of {', '.join(found)}")


def check_can_be_searched(args: PretrainingArguments) -> None:
    """Refuse a search over hyper-parameters where each trial would do what is done once.

    Args:
        args: The options of the Trainer.

    Raises:
        InputError: If `hub_branches` or `evaluation_tasks` is set.
    """
    if args.hub_branches is not None:
        raise InputError(
            f"hub_branches={args.hub_branches!r}: each trial of a search would write the same branches: leave it out"
        )
    if args.evaluation_tasks:
        raise InputError(
            f"evaluation_tasks={args.evaluation_tasks}: each trial of a search would measure them: leave it out"
        )


def check_searched(args: PretrainingArguments, before: Mapping[str, Any], *, group_size: int) -> None:
    """Refuse a search over options that have had their effect.

    Args:
        args: The options of a trial.
        before: The options as they were.
        group_size: Examples of one kind that follow each other in the training set.

    Raises:
        InputError: Naming the option.
    """
    known = {field.name for field in fields(PretrainingArguments)} | _READ_IN_TRAINING
    for name in (name for name, value in vars(args).items() if value != before.get(name)):
        if name not in known and not name.endswith("_weight"):
            raise InputError(f"{name}={getattr(args, name)!r} cannot be searched over: {_MADE_BEFORE}")
        if name.endswith("batch_size") and group_size > 1:
            raise InputError(f"{name} cannot be searched over: all examples of a step are of one kind; {_MADE_BEFORE}")


def check_training_options(args: PretrainingArguments) -> None:
    """Try what transformers, accelerate and torch would refuse only once there is a Trainer: before any text is read.

    Optimizer and schedule are made for a few numbers, and thrown away.

    Args:
        args: The options of a training.

    Raises:
        InputError: If one of them cannot be used, or has no effect.
    """
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs):
        name = "num_train_epochs" if args.max_steps else "max_steps"
        raise InputError(f"{name}=0 trains nothing: give a positive number of steps or epochs")
    if args.learning_rate == 0:
        raise InputError("learning_rate=0.0 trains nothing: give it a value, such as 5e-4")
    if args.fp16 and args.device.type == "cpu":
        raise InputError("fp16=True needs a GPU: leave it out, or set bf16 on a CPU that computes fast in it")
    if args.fsdp and args.world_size == 1:
        raise InputError(f"fsdp={args.fsdp!r} divides a model over processes, but there is one: use accelerate launch")
    for name in args.report_to:
        _check_report(name)
    known = {"every_n_layers", "offload", *signature(checkpoint).parameters} - {"function", "args", "kwargs"}
    for name in sorted(args.activation_checkpointing_kwargs or {}):
        check_choice(name, sorted(known), name="activation_checkpointing_kwargs")
    with _in_one_line("accelerator_config"):
        GradientAccumulationPlugin(**{"num_steps": 1} | (args.accelerator_config.gradient_accumulation_kwargs or {}))
    # The module's numbers are drawn; a run draws its own as if there were none.
    with torch.random.fork_rng(devices=[]), _in_one_line(f"optim={args.optim}"):
        optimizer = _try_optimizer(args)
    if optimizer is not None:
        _try_schedule(args, optimizer)
    if args.torch_compile:
        with _in_one_line(f"torch_compile_backend={args.torch_compile_backend}, mode={args.torch_compile_mode}"):
            torch.compile(nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)


@contextmanager
def _in_one_line(options: str) -> Iterator[None]:
    """Turn any error into an InputError that begins with the options."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{options}: {one_line(error)}") from error


def _check_report(name: str) -> None:
    check_choice(name, (*INTEGRATION_TO_CALLBACK, "none", "all"), name="report_to")
    if name in ("azure_ml", "flyte"):
        # They are not always listed where they are installed.
        with _in_one_line(f"report_to={name!r}"):
            INTEGRATION_TO_CALLBACK[name]()
    elif name not in get_available_reporting_integrations():
        package = name.replace("_", "-")
        raise InputError(f"report_to={name!r} needs the package {package}: pip install {package}, or leave it out")


def _try_optimizer(args: PretrainingArguments) -> Optimizer | None:
    """Return the optimizer of the options for a tiny module, None where that needs the model itself."""
    if args.optim_args is not None and not re.fullmatch(r"[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*", args.optim_args):
        raise InputError(f"optim_args={args.optim_args!r} must be NAME=VALUE, divided by commas")
    model = nn.Linear(2, 2)
    try:
        kind, kwargs = optimizer_of(args, model)
    except ValueError:
        if args.optim_target_modules is not None and args.optim.startswith(("galore", "apollo")):
            # Its modules are the model's.
            return None
        raise
    for name in ("optim_args", "optim_target_modules"):
        if getattr(args, name) is None:
            continue
        without = copy(args)
        setattr(without, name, None)
        if optimizer_of(without, model) == (kind, kwargs):
            raise InputError(f"{name}={getattr(args, name)!r} has no effect with optim={args.optim}: leave it out")
    if {"params", "model", "optimizer_dict"} & kwargs.keys():
        return None
    optimizer: Optimizer = kind(model.parameters(), **kwargs)
    return optimizer


def _try_schedule(args: PretrainingArguments, optimizer: Optimizer) -> None:
    kwargs = args.lr_scheduler_kwargs
    if args.decay_during_warmup:
        if kwargs:
            raise InputError(
                f"lr_scheduler_kwargs={kwargs} has no effect with decay_during_warmup=True: drop one of the two"
            )
        return
    # Of a run that is counted in epochs, some number of steps.
    steps = args.max_steps if args.max_steps > 0 else 1000
    with _in_one_line(f"lr_scheduler_type={args.lr_scheduler_type.value} with lr_scheduler_kwargs={kwargs or {}}"):
        schedule_of(args, optimizer, steps=steps)
