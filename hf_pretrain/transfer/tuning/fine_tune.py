"""Fine-tune a model on a task: one function for the command, for several tasks and for comparisons."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec, load_task
from hf_pretrain.training.processes import StopOnRequest, first_process_first, not_finite, nothing_trained, stopped
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer
from hf_pretrain.transfer.tuning.heads import (
    OpenedModel,
    architecture_of,
    check_head,
    chosen_head,
    name_labels,
    open_for_task,
    reads_apart,
    settle_length,
    settle_padding,
)

_LENGTHS = {"span": 128}


class TaskTrainer(FineTuningTrainer):
    """A [`FineTuningTrainer`] of a task: it scores with the task's metrics.

    | method | why |
    | --- | --- |
    | `create_model_card` | the card with what was measured |

    Args:
        model: The model with the task's head.
        args: The options.
        data: The task.
        max_length: Most tokens of an example.
        doc_stride: Of spans: tokens that a window shares with the next.
        **kwargs: Other arguments of `transformers.Trainer`; `processing_class` is the tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: FineTuningArguments,
        *,
        data: TaskData,
        max_length: int,
        doc_stride: int,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        self.data, self.max_length, self.doc_stride = data, max_length, doc_stride
        self.scores: dict[str, float] = {}
        self.write_card: Callable[[], None] = lambda: None
        apart = reads_apart(model)
        lengths: dict[str, Any] = {"max_length": max_length, "doc_stride": doc_stride, "apart": apart}
        with first_process_first(args):
            train, validation = (data.encoded(split, processing_class, **lengths) for split in ("train", "validation"))
        super().__init__(
            model,
            args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=data.collator(processing_class, apart=apart),
            processing_class=processing_class,
            compute_metrics=self._score,
            preprocess_logits_for_metrics=lambda outputs, _: _logits_of_head(data, outputs),
            **kwargs,
        )

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions = cast(Any, prediction.predictions)
        self.scores = self.data.score("validation", predictions, tokenizer=cast(Any, self.processing_class))
        return self.scores

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card that the export has set as `write_card`; see `export_fine_tuned`."""
        if self.is_world_process_zero():
            self.write_card()


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A model that was fine-tuned on a task, and its scores on the validation rows.

    Attributes:
        trainer: The Trainer; its `model` has the adapters of a strategy that adds some.
        data: The task.
        predictions: Of the rows that `data.encoded("validation", ...)` returns: logits, as `data.score` takes them.
        scores: Scores of the predictions.
        baseline: Scores of a constant: the most frequent class, the mean of the values, no answer.
        step: Step of these weights: the last one, or the best with `load_best_model_at_end`.
        seconds: Wall-clock time of the training alone.
        head: What became of the head when the model was opened, in one line; "" of a live model.
        fresh: Names of the parameters that were drawn anew.
    """

    trainer: TaskTrainer
    data: TaskData
    predictions: Any
    scores: dict[str, float]
    baseline: dict[str, float]
    step: int
    seconds: float
    head: str = ""
    fresh: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The score that counts, better where larger."""
        return self.scores[self.data.main_metric]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return cast(PreTrainedTokenizerBase, self.trainer.processing_class)


def task_trainer(
    model: str | PreTrainedModel,
    task: TaskSpec | TaskData,
    args: FineTuningArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    architecture: str | None = None,
    architecture_options: Mapping[str, Any] | None = None,
    mix_layers: bool = False,
    max_length: int | None = None,
    doc_stride: int | None = None,
    **kwargs: Any,
) -> tuple[TaskTrainer, str, tuple[str, ...]]:
    """Return the Trainer of [`fine_tune`], what became of the head in one line, and what was drawn anew."""
    data = load_task(task, seed=args.seed) if isinstance(task, TaskSpec) else task
    data.rows("train")
    if args.load_best_model_at_end and not args.chooses_metric:
        args.metric_for_best_model, args.greater_is_better = data.main_metric, True
    if tokenizer is None:
        if not isinstance(model, str):
            raise InputError("tokenizer is missing: give that of the model")
        tokenizer = cast(PreTrainedTokenizerBase, from_pretrained(AutoTokenizer, model))
    head = {"architecture": architecture, "architecture_options": architecture_options, "mix_layers": mix_layers}
    if isinstance(model, str):
        head["architecture"] = architecture or architecture_of(args.strategy, model, data.spec)
        opened = open_for_task(model, data, seed=args.seed, **cast(Any, head))
    elif any(head.values()):
        name, value = next((name, value) for name, value in head.items() if value)
        raise InputError(
            f"{name}={value!r} has no effect on a live model, which has its head: give the name of a checkpoint"
        )
    else:
        opened = OpenedModel(model, "", ())
        # A live model may have an architecture that does not fit.
        chosen_head(model).check(data.spec)
    model, note, fresh = opened
    name_labels(model, data)
    settle_padding(model, tokenizer)
    length = settle_length(max_length, model, data)
    stride = min(_LENGTHS["span"], length // 3) if doc_stride is None else doc_stride
    # Dropout, and adapters that draw without a key.
    set_seed(args.seed)
    trainer = TaskTrainer(
        model, args, data=data, max_length=length, doc_stride=stride, processing_class=tokenizer, **kwargs
    )
    return trainer, note, fresh


def fine_tune(
    model: str | PreTrainedModel,
    task: TaskSpec | TaskData,
    args: FineTuningArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    architecture: str | None = None,
    architecture_options: Mapping[str, Any] | None = None,
    mix_layers: bool = False,
    max_length: int | None = None,
    doc_stride: int | None = None,
    begins: Callable[[TaskTrainer, str], None] | None = None,
    **kwargs: Any,
) -> FineTuned:
    """Fine-tune a model on a task with a strategy, and score it on the validation rows. Nothing is exported.

    Args:
        model: A checkpoint, opened with the head of the task (see `open_for_task`), or a live model with such a head.
        task: The task, or its examples; rows to train on and labels to evaluate on are needed.
        args: Strategy and options of training. With `load_best_model_at_end` the best weights are those with the best main metric
            of the task, unless `metric_for_best_model` names another. `resume_from_checkpoint` goes on from a checkpoint.
        tokenizer: That of a live model; by default the checkpoint's.
        architecture: What stands on top of the encoder, such as "bilstm", see [`TaskHeadConfig`]; by default a stock head, or
            that of the checkpoint.
        architecture_options: Its options, such as `{"lstm_size": 64}`.
        mix_layers: Whether it reads a learned mean of all layers.
        max_length: Most tokens of an example, of texts that are read apart of each; by default 128, of spans 384, or fewer if
            the model takes no more.
        doc_stride: Of spans: tokens that a window shares with the next; by default 128, at most a third of `max_length`.
        begins: Called with the Trainer, and what became of the head, when all is read and checked and before the first step.
        **kwargs: Other arguments of `transformers.Trainer`, such as `callbacks`.

    Returns:
        The trained model with its predictions and scores.

    Raises:
        InputError: If model, task and options do not fit each other.
        RunError: If no step was trained, a `StopOnRequest` among the callbacks stopped the run, or the predictions are not
            finite.
    """
    trainer, note, fresh = task_trainer(
        model,
        task,
        args,
        tokenizer=tokenizer,
        architecture=architecture,
        architecture_options=architecture_options,
        mix_layers=mix_layers,
        max_length=max_length,
        doc_stride=doc_stride,
        **kwargs,
    )
    data, baseline = trainer.data, trainer.data.baseline()
    if begins is not None:
        begins(trainer, note)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - begin
    if any(isinstance(each, StopOnRequest) and each.has_stopped for each in trainer.callback_handler.callbacks):
        raise stopped(args.output_dir, trainer.state.global_step)
    step = trainer.state.global_step
    if not step:
        raise nothing_trained(len(data.rows("train")))
    predictions = trainer.predict(cast(Any, trainer.eval_dataset)).predictions
    if not all(np.isfinite(part).all() for part in _parts(predictions)):
        raise not_finite(args.output_dir, "the predictions are not finite numbers")
    best = trainer.state.best_global_step if args.load_best_model_at_end else None
    return FineTuned(
        trainer=trainer,
        data=data,
        predictions=predictions,
        scores=dict(trainer.scores),
        baseline=baseline,
        step=best or step,
        seconds=seconds,
        head=note,
        fresh=fresh,
    )


def _parts(predictions: Any) -> Sequence[np.ndarray]:
    return predictions if isinstance(predictions, tuple) else (predictions,)


def head_scores(
    model: str, data: TaskData, *, max_length: int | None = None, batch_size: int = 64
) -> dict[str, float]:
    """Score a model that was fine-tuned on a task by the head that it has. Nothing is trained.

    Args:
        model: The checkpoint.
        data: The task; its labels are those of the head, in the same order.
        max_length: Most tokens of an example; by default as in fine-tuning.
        batch_size: Examples in a batch.

    Returns:
        The scores on the validation rows.

    Raises:
        InputError: If the checkpoint has no head for these labels, or predicts what is no finite number.
    """
    check_head(model, data)
    tokenizer = cast(PreTrainedTokenizerBase, from_pretrained(AutoTokenizer, model))
    opened, note, fresh = open_for_task(model, data)
    if fresh:
        raise InputError(
            f"model={model!r} lacks {fresh[0]}, which would be drawn at random ({note}): copy the model again"
        )
    settle_padding(opened, tokenizer)
    length = settle_length(max_length, opened, data)
    apart, stride = reads_apart(opened), min(_LENGTHS["span"], length // 3)
    encoded = data.encoded("validation", tokenizer, max_length=length, doc_stride=stride, apart=apart)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            opened,
            args,
            data_collator=data.collator(tokenizer, apart=apart),
            preprocess_logits_for_metrics=lambda outputs, _: _logits_of_head(data, outputs),
        )
        predictions = trainer.predict(cast(Any, encoded)).predictions
    if not all(np.isfinite(part).all() for part in _parts(predictions)):
        raise InputError(f"model={model!r} predicts numbers that are not finite: name another checkpoint")
    return data.score("validation", predictions, tokenizer=tokenizer)


def _logits_of_head(data: TaskData, outputs: Any) -> Any:
    """Return what is scored: some architectures return states too."""
    if data.spec.type == "span":
        return tuple(outputs[:2])
    return outputs[0] if isinstance(outputs, tuple) else outputs
