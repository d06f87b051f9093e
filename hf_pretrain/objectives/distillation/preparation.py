"""From options to examples in the vocabulary of the student, and to what the teacher says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData, prepare_data
from hf_pretrain.data.tokenizer_training import check_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import from_pretrained
from hf_pretrain.objectives.distillation.arguments import TaskDistillationTrainingArguments
from hf_pretrain.objectives.distillation.building import teacher_name
from hf_pretrain.objectives.distillation.cache import TaskLogitsCache, build_task_logits, has_cache
from hf_pretrain.objectives.distillation.fingerprints import cache_fingerprint
from hf_pretrain.objectives.distillation.modeling import DistillationModel
from hf_pretrain.objectives.distillation.student import StudentArguments
from hf_pretrain.objectives.distillation.task_data import TaskDataArguments, prepare_task
from hf_pretrain.objectives.distillation.task_examples import (
    AnsweredDataset,
    DataCollatorForTask,
    count_predictions,
)
from hf_pretrain.objectives.distillation.vocabulary_trimming import trim_vocabulary, used_ids
from hf_pretrain.training.arguments import PretrainingArguments

# A leading underscore keeps a folder out of what is pushed to the Hub.
_ANSWERS = "_teacher_logits"


def load_text(
    data_args: DataArguments,
    model_args: StudentArguments,
    args: PretrainingArguments,
    *,
    special_tokens: Sequence[str] = ("mask", "pad"),
) -> PreparedData:
    """Read text and cut it into examples, with the teacher's tokenizer or the student's.

    Raises:
        InputError: As [`hf_pretrain.data.prepare.prepare_data`].
    """

    def prepare(tokenizer: PreTrainedTokenizerBase) -> PreparedData:
        return prepare_data(
            data_args,
            seed=args.seed,
            output_dir=args.output_dir,
            tokenizer=tokenizer,
            first=args.main_process_first(local=False, desc="data"),
        )

    return _in_vocabulary(prepare, data_args.tokenizer_name, model_args, special_tokens)


def load_task(
    data_args: TaskDataArguments,
    model_args: StudentArguments,
    args: TaskDistillationTrainingArguments,
    *,
    special_tokens: Sequence[str] = ("pad",),
) -> PreparedData:
    """Read the examples of a task; see [`prepare_task`]."""
    config = from_pretrained(AutoConfig, teacher_name(model_args))

    def prepare(tokenizer: PreTrainedTokenizerBase) -> PreparedData:
        first = args.main_process_first(local=False, desc="data")
        return prepare_task(data_args, tokenizer=tokenizer, config=config, task=args.task, seed=args.seed, first=first)

    return _in_vocabulary(prepare, data_args.tokenizer_name, model_args, special_tokens)


def _in_vocabulary(
    prepare: Callable[[PreTrainedTokenizerBase], PreparedData],
    tokenizer_name: str | None,
    model_args: StudentArguments,
    special_tokens: Sequence[str],
) -> PreparedData:
    """Prepare examples, and once more with a trimmed tokenizer if that is asked for."""
    name = tokenizer_name or model_args.model_name_or_path or teacher_name(model_args)
    tokenizer = from_pretrained(AutoTokenizer, name)
    check_tokenizer(tokenizer, roles=special_tokens)
    if model_args.trim_vocabulary and name != model_args.teacher_name_or_path:
        raise InputError(
            f"trim_vocabulary=True trims the teacher's vocabulary, but the tokenizer is that of {name!r}: leave out one"
        )
    data = prepare(tokenizer)
    if not model_args.trim_vocabulary:
        return data
    if data.train_documents is None:
        raise InputError("trim_vocabulary=True has to know all the text: leave out streaming")
    teacher = from_pretrained(AutoModel, name)
    _, trimmed = trim_vocabulary(teacher, tokenizer, used_ids(data.train_documents))
    trimmed_data = prepare(trimmed)
    trimmed_data.description["trimmed_from"] = len(tokenizer)
    return trimmed_data


def check_labels(data: PreparedData, args: TaskDistillationTrainingArguments) -> None:
    """Refuse examples without labels for a loss that needs them."""
    for dataset in (data.train_dataset, data.eval_dataset):
        if "labels" in args.weights() and dataset is not None and "labels" not in EpochDataset.wrap(dataset)[0]:
            raise InputError(
                f"labels_weight={args.labels_weight}, but the examples have no labels: name their label_column, or leave it out"
            )


def ask_once(model: DistillationModel, data: PreparedData, args: TaskDistillationTrainingArguments) -> PreparedData:
    """Ask the teacher for its logits of every example, or find them in `output_dir`, where no loss needs more of it.

    Args:
        model: Student and teacher.
        data: Examples of a task.
        args: Options of the run.

    Returns:
        The data, with examples that bring `teacher_logits`; as it was, if the teacher has to see every batch anew.
    """
    teacher = model.teacher
    if teacher is None or not args.cache_teacher or not teacher.wanted.predictions or teacher.wanted.depth:
        return data
    asked, collate = teacher, DataCollatorForTask(data.tokenizer)

    def logits_of(examples: list[dict[str, Any]]) -> torch.Tensor:
        batch = {name: value.to(args.device) for name, value in collate(examples).items() if name != "labels"}
        positions = batch.pop("target_positions", None)
        logits = asked(batch, positions).logits
        assert logits is not None, "predictions are wanted of this teacher"
        return logits

    def answered(dataset: Any, name: str) -> AnsweredDataset:
        dataset = EpochDataset.wrap(dataset).base
        folder = Path(args.output_dir) / _ANSWERS / name
        fingerprint = cache_fingerprint(asked.model, dataset, data.tokenizer)
        with args.main_process_first(local=False, desc="the teacher's answers"):
            if args.process_index == 0 and not has_cache(folder):
                build_task_logits(
                    logits_of,
                    dataset,
                    folder,
                    fingerprint=fingerprint,
                    counts=count_predictions(dataset),
                    batch_size=args.per_device_eval_batch_size,
                )
            return AnsweredDataset(dataset, TaskLogitsCache.open(folder, fingerprint=fingerprint))

    data.train_dataset = answered(data.train_dataset, "train")
    if data.eval_dataset is not None:
        data.eval_dataset = answered(data.eval_dataset, "held_out")
    return data
