"""What is compared: a model with a strategy, what a step of it costs, and one run of it.

An arm is a strategy of fine-tuning, or "features": a classic head on features of the frozen encoder. FLOPs are those of training;
scoring the validation rows is not counted.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback

from hf_pretrain.errors import InputError, nearest
from hf_pretrain.evaluation.probes import tokenize_inputs
from hf_pretrain.modeling.backbone import flops_of_weights
from hf_pretrain.modeling.observing.profile import peak_of_tensors
from hf_pretrain.options import number_or_text
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec
from hf_pretrain.transfer.arguments import Strategy
from hf_pretrain.transfer.classic_heads import HEADS, Kind, fit_head, fit_tfidf
from hf_pretrain.transfer.features import PretrainedFeatures
from hf_pretrain.transfer.fine_tuning import FineTuningArguments
from hf_pretrain.transfer.tuning.fine_tune import FineTuned, fine_tune, task_trainer
from hf_pretrain.transfer.tuning.heads import has_architectures, option_names

FEATURES = "features"
STRATEGIES = (*get_args(Strategy), FEATURES)
# They move few weights, or only fresh ones.
_HIGHER_RATE = frozenset({"frozen", "bitfit", "lora", "dora", "peft", "scalar_mix"})
_RATES = {True: 1e-3, False: 1e-4}
_OF_FEATURES = ("head", "pooling", "layer")
_OF_HEADS = ("architecture", "mix_layers")
# What a comparison sets itself.
_OWN = ("strategy", "output_dir", "max_steps", "num_train_epochs", "seed", "per_device_train_batch_size")
# They change neither the operations nor the memory of a step.
_OF_RATES = ("learning_rate", "head_learning_rate", "probe_learning_rate", "weight_decay", "warmup_steps")
# Rows whose mean length stands for all.
_SAMPLED = 512


@dataclass(frozen=True)
class ComparisonArm:
    """A model with a strategy.

    Attributes:
        model: Name of the model.
        strategy: A strategy of fine-tuning, or "features".
        options: Options of `FineTuningArguments` that differ from the strategy's own; `architecture`, its options, and
            `mix_layers`; of features `head`, `pooling` and `layer`.
    """

    model: str
    strategy: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, model: str, text: str) -> ComparisonArm:
        """Return the arm that a text describes: "lora", or "lora:learning_rate=1e-3,architecture=bilstm,lstm_size=64".

        Raises:
            InputError: If there is no such strategy or option.
        """
        strategy, _, rest = text.partition(":")
        if strategy not in STRATEGIES:
            raise InputError(f"strategies={text!r}: {nearest(strategy, STRATEGIES)}")
        architecture = next((part[13:] for part in rest.split(",") if part.startswith("architecture=")), None)
        known = [*_OF_FEATURES] if strategy == FEATURES else [*_of_training(), *_OF_HEADS, *option_names(architecture)]
        options: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            name, sign, value = part.partition("=")
            if not sign or name not in known or name in _OWN:
                hint = nearest(name, [entry for entry in known if entry not in _OWN])
                raise InputError(f"strategies={text!r}: {part!r} is no option=value of it: {hint}")
            options[name] = _value(value)
        arm = cls(model, strategy, tuple(options.items()))
        if strategy != FEATURES:
            with tempfile.TemporaryDirectory() as folder:
                arm.training(folder, seed=0, steps=1, batch_size=1)
        return arm

    @property
    def name(self) -> str:
        """The strategy with its options, as it is written."""
        options = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.strategy}:{options}" if options else self.strategy

    @property
    def learning_rate(self) -> float | None:
        """The peak rate: the one that is given, or the strategy's; None of features."""
        if self.strategy == FEATURES:
            return None
        return float(dict(self.options).get("learning_rate", _RATES[self.strategy in _HIGHER_RATE]))

    @property
    def names_rate(self) -> bool:
        """Whether the rate is given."""
        return "learning_rate" in dict(self.options)

    def at(self, learning_rate: float) -> ComparisonArm:
        """Return the arm with another rate."""
        options = dict(self.options) | {"learning_rate": float(f"{learning_rate:.3g}")}
        return replace(self, options=tuple(options.items()))

    def without_rates(self) -> ComparisonArm:
        """Return what decides on the cost of a step."""
        return replace(self, options=tuple(each for each in self.options if each[0] not in _OF_RATES))

    def refusal(self, spec: TaskSpec) -> str:
        """Return why the arm does not go with a task, "" if it does."""
        about = f"strategies={self.name} does not go with the task {spec.name!r} of type {spec.type!r}"
        if self.strategy == FEATURES:
            heads = HEADS.get(cast(Kind, spec.type), ())
            head = dict(self.options).get("head")
            if heads and (head is None or head in heads):
                return ""
            return f"{about}: {nearest(str(head), heads)}" if heads else f"{about}: leave one out"
        if self.strategy == "scalar_mix" and not has_architectures(spec.type):
            return f"{about}: leave one out"
        return ""

    def training(self, folder: str, *, seed: int, steps: int, batch_size: int) -> FineTuningArguments:
        """Return the options of a run of so many steps."""
        known = _of_training()
        own = {name: value for name, value in self.options if name in known}
        return tuning_arguments(
            folder, strategy=self.strategy, seed=seed, max_steps=steps, batch_size=batch_size, **own
        )

    @property
    def head(self) -> dict[str, Any]:
        """What stands on top of the encoder, as `fine_tune` takes it."""
        options, known = dict(self.options), [*_of_training(), *_OF_HEADS]
        own = {name: value for name, value in options.items() if name not in known}
        return {name: options[name] for name in _OF_HEADS if name in options} | {"architecture_options": own}


def _of_training() -> list[str]:
    return [entry.name for entry in fields(FineTuningArguments)]


def _value(text: str) -> Any:
    """Return an option's value: a number, true or false, or a word."""
    if text in ("true", "false"):
        return text == "true"
    number = number_or_text(text)
    return int(number) if isinstance(number, float) and text.lstrip("-").isdecimal() else number


def tuning_arguments(
    folder: str, *, strategy: str, seed: int, batch_size: int = 32, **options: Any
) -> FineTuningArguments:
    """Return options of fine-tuning that leave no trace but the model: no logs, no checkpoints.

    Args:
        folder: Folder that the Trainer may write to.
        strategy: The strategy. Where it moves few weights the learning rate is 1e-3 unless another is given, else 1e-4.
        seed: Seed of the head, the order and the dropout.
        batch_size: Rows of a step.
        **options: Further options of `FineTuningArguments`.
    """
    quiet = {"report_to": "none", "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    own: dict[str, Any] = {"learning_rate": _RATES[strategy in _HIGHER_RATE], "disable_tqdm": True, **quiet}
    own |= {"strategy": strategy, "seed": seed, "per_device_train_batch_size": batch_size, "output_dir": folder}
    return FineTuningArguments(**own | options)


def tuned_scores(
    model: str,
    data: TaskData,
    *,
    strategy: str,
    seed: int,
    max_length: int | None = None,
    head: Mapping[str, Any] | None = None,
    **options: Any,
) -> FineTuned:
    """Fine-tune a model on a task, and return its scores; nothing is left on the disk.

    Args:
        model: Name of the model.
        data: The task.
        strategy: The strategy.
        seed: Seed of the head, the order and the dropout.
        max_length: Most tokens of an example.
        head: What stands on top of the encoder, as `fine_tune` takes it; by default the stock head.
        **options: Further options of `FineTuningArguments`.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = tuning_arguments(folder, strategy=strategy, seed=seed, **options)
        # Many runs follow each other: the last line of each is in the table.
        return fine_tune(
            model,
            data,
            args,
            **(head or {}),
            max_length=max_length,
            begins=lambda trainer, _: trainer.remove_callback(PrinterCallback),
        )


class Outcome(NamedTuple):
    """A run of an arm.

    Attributes:
        scores: Scores on the validation rows.
        flops: FLOPs of the training.
        seconds: Wall-clock time of the training alone.
        memory: Bytes of tensors that a step holds at most, see `ArmCost`; 0 where that was not measured.
    """

    scores: dict[str, float]
    flops: float
    seconds: float
    memory: float = 0.0


@dataclass
class ArmCost:
    """What an arm costs on a task, counted once.

    Attributes:
        arm: The arm.
        batch_size: Rows of a step.
        rows: Rows to train on.
        flops: FLOPs of a step of fine-tuning, or of a row's features.
        memory: Bytes of tensors that a step holds at most: the model with gradients, the moments of Adam, and activations; of
            features those of a batch.
    """

    arm: ComparisonArm
    batch_size: int
    rows: int
    flops: float = field(default=0.0)
    memory: float = field(default=0.0)

    def steps(self, examples: int) -> int:
        """Return the steps of fine-tuning with so many examples."""
        return max(1, examples // self.batch_size)

    def read(self, examples: int) -> int:
        """Return the examples that a run with so many reads: features are computed once a row."""
        return min(examples, self.rows) if self.arm.strategy == FEATURES else examples

    def __call__(self, examples: int) -> float:
        """Return the FLOPs of a run with so many examples."""
        return self.flops * (self.read(examples) if self.arm.strategy == FEATURES else self.steps(examples))


def count_cost(arm: ComparisonArm, data: TaskData, *, batch_size: int, max_length: int | None = None) -> ArmCost:
    """Count what an arm costs on a task.

    Fine-tuning: forward and backward of a batch of rows of about the mean length, by torch's FlopCounterMode; what is frozen at
    some time only counts as if it moved. Its memory is that of the same batch. Features: the products of the encoder's weights
    for the mean length, forward.

    Args:
        arm: The arm.
        data: The task with its rows to train on.
        batch_size: Rows of a step.
        max_length: Most tokens of an example.

    Raises:
        InputError: If the arm does not go with the model or the task.
    """
    rows = len(data.rows("train"))
    refusal = arm.refusal(data.spec)
    if refusal:
        raise InputError(refusal)
    if arm.strategy == FEATURES:
        return ArmCost(arm, batch_size, rows, *_cost_of_features(arm, data, batch_size, max_length=max_length))
    with tempfile.TemporaryDirectory() as folder:
        args = arm.training(folder, seed=0, steps=1, batch_size=batch_size)
        trainer, _, _ = task_trainer(arm.model, data, args, **arm.head, max_length=max_length)
        lengths = np.array([_length(ids) for ids in cast(Any, trainer.train_dataset)["input_ids"]])
        near = np.argsort(np.abs(lengths - lengths.mean()), kind="stable")[:batch_size]
        batch: Any = trainer._prepare_inputs(
            trainer.data_collator([cast(Any, trainer.train_dataset)[int(row)] for row in near])
        )
        model = cast(torch.nn.Module, trainer.model).train()
        with torch.random.fork_rng():
            # The counter knows the products that attention and LSTMs are made of, not the fused kernels of a device.
            with (
                # The switch of mkldnn warns of Intel's GPUs.
                warnings.catch_warnings(action="ignore"),
                sdpa_kernel(SDPBackend.MATH),
                torch.backends.mkldnn.flags(enabled=False),
                torch.backends.cudnn.flags(enabled=False),
                FlopCounterMode(display=False) as counter,
            ):
                trainer.compute_loss(model, batch).backward()
            model.zero_grad()
            peak = peak_of_tensors(lambda: trainer.compute_loss(model, batch).backward())
    moving = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    share = batch_size / len(near)
    return ArmCost(arm, batch_size, rows, counter.get_total_flops() * share, _bytes_of(model) + 2 * moving + peak)


def _bytes_of(model: torch.nn.Module) -> int:
    """Return the bytes of a model's weights and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _length(ids: Sequence[Any]) -> int:
    """Return the tokens of an example; those of all choices together."""
    return sum(map(len, ids)) if ids and isinstance(ids[0], Sequence) else len(ids)


def _cost_of_features(
    arm: ComparisonArm, data: TaskData, batch_size: int, *, max_length: int | None
) -> tuple[float, float]:
    """Return the FLOPs of a row's features, and the bytes of tensors that a batch holds at most."""
    features = _features(arm, max_length=max_length, batch_size=batch_size).fit()
    texts = data.texts("train")
    every = max(1, len(texts) // _SAMPLED)
    tokenized = tokenize_inputs(features.encoder, features.text_tokenizer, texts[::every], max_length=max_length)
    length = math.ceil(np.mean([len(ids) for ids in tokenized["input_ids"]]))
    tokens = torch.full((1, length), int(tokenized["input_ids"][0][0]), device=features.encoder.device)
    flops = flops_of_weights(features.encoder, tokens)
    if flops is None:
        raise InputError(
            f"model={arm.model!r} does not run on tokens alone, so its FLOPs are not counted: leave features out"
        )
    with torch.inference_mode():
        peak = peak_of_tensors(lambda: features.encoder(tokens.expand(batch_size, -1)))
    return float(flops * length), float(_bytes_of(features.encoder) + peak)


def _features(arm: ComparisonArm, *, max_length: int | None, batch_size: int) -> PretrainedFeatures:
    options = {name: value for name, value in arm.options if name != "head"}
    return PretrainedFeatures(arm.model, max_length=max_length, batch_size=batch_size, **options)


def run_arm(cost: ArmCost, data: TaskData, *, examples: int, seed: int, max_length: int | None = None) -> Outcome:
    """Run an arm.

    Args:
        cost: The arm with what it costs.
        data: The task. Features are made of all its rows to train on.
        examples: Examples to learn from; fine-tuning reads a row several times where there are fewer rows.
        seed: Seed of the run.
        max_length: Most tokens of an example.
    """
    arm = cost.arm
    if arm.strategy == FEATURES:
        begin = time.perf_counter()
        features = _features(arm, max_length=max_length, batch_size=cost.batch_size).fit()
        kind = cast(Kind, data.spec.type)
        name = str(dict(arm.options).get("head", next(iter(HEADS[kind]))))
        table = features.transform(data.texts("train"))
        head = fit_head(name, table, data.targets("train"), kind=kind, seed=seed).pipeline
        seconds = time.perf_counter() - begin
        predicted = head.predict(features.transform(data.texts("validation")).astype(np.float64))
        return Outcome(_class_scores(data, predicted), cost(examples), seconds, cost.memory)
    tuned = tuned_scores(
        arm.model,
        data,
        strategy=arm.strategy,
        seed=seed,
        max_length=max_length,
        max_steps=cost.steps(examples),
        batch_size=cost.batch_size,
        head=arm.head,
        **{name: value for name, value in arm.options if name in _of_training()},
    )
    return Outcome(tuned.scores, cost(examples), tuned.seconds, cost.memory)


def run_tfidf(data: TaskData, *, seed: int) -> Outcome:
    """Run what needs no encoder: TF-IDF with a linear support vector machine, of values with a ridge regression."""
    begin = time.perf_counter()
    kind = cast(Kind, data.spec.type)
    head = fit_tfidf(data.texts("train"), data.targets("train"), kind=kind, seed=seed).pipeline
    seconds = time.perf_counter() - begin
    return Outcome(_class_scores(data, head.predict(data.texts("validation"))), 0.0, seconds)


def _class_scores(data: TaskData, predicted: np.ndarray) -> dict[str, float]:
    """Score numbers of classes, or values."""
    return data.score("validation", predicted if data.labels is None else np.eye(len(data.labels))[predicted])
