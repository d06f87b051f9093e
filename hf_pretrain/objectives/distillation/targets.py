"""The teacher's predictions as part of the examples: run once, kept on disk, and brought by every batch.

[`cache_teacher_top_k`] keeps a masked language model's likeliest tokens, [`cache_teacher_logits`] the logits of a
task. Both run the teacher on the first process, or find its cache in `output_dir`, and return data whose examples
bring the predictions; a collator makes them part of the batch. [`report_label_agreement`] compares the teacher with
the labels of augmented sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import IterableDataset

from hf_pretrain.data import draws
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED, begin_in_column_0
from hf_pretrain.modeling.observing.cache import (
    Examples,
    TaskLogitsCache,
    TopKCache,
    build_task_logits,
    build_top_k,
    cache_fingerprint,
    has_cache,
)
from hf_pretrain.modeling.observing.outputs import OutputRequest
from hf_pretrain.objectives.distillation.arguments import (
    DistillationTrainingArguments,
    TaskDistillationTrainingArguments,
)
from hf_pretrain.objectives.distillation.modeling import DistillationModel, Teacher
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.tasks.augmentation import SOURCE_ID
from hf_pretrain.tasks.batches import DataCollatorForTask, count_predictions
from hf_pretrain.training.arguments import PretrainingArguments

# A leading underscore keeps a folder out of what is pushed to the Hub.
_TOP_K_FOLDER, _LOGITS_FOLDER = "_teacher_top_k", "_teacher_logits"
# Augmented rows whose labels are compared with the teacher.
_MOST_ROWS = 2048


class TeacherTargetsDataset(EpochDataset):
    """Examples with the teacher's predictions: `teacher_top_k` at masked positions, or `teacher_logits` of a task.

    Args:
        base: Map-style examples.
        cache: The predictions for these. Of masked tokens it has as many epochs as each example has maskings; they
            come in turn.
    """

    def __init__(self, base: Any, cache: TopKCache | TaskLogitsCache) -> None:
        super().__init__(base)
        self.cache = cache
        self.column = "teacher_top_k" if isinstance(cache, TopKCache) else "teacher_logits"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example, see [`EpochDataset`], with its predictions."""
        return self._with_targets(super().__getitem__(index))

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return examples with their predictions."""
        return [self._with_targets(example) for example in super().__getitems__(indices)]

    def _with_targets(self, example: dict[str, Any]) -> dict[str, Any]:
        epoch = example["epoch"] % self.cache.num_epochs
        return {**example, self.column: self.cache.lookup([example["example_id"]], epoch)}


class DataCollatorForDistillation(DataCollatorForMaskedLM):
    """Masks examples, and adds the teacher's likeliest tokens at the targets where the examples bring them.

    The batch is that of [`DataCollatorForMaskedLM`], for examples of a [`TeacherTargetsDataset`] with two tensors
    more:

    - `teacher_ids`: ``[T, k]`` int64, tokens at the targets in the order of `target_positions`;
    - `teacher_log_probs`: ``[T, k + 1]`` fp32, log-probabilities of these, and in the last column that of all others
    together.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of examples."""
        batch = super().__call__(examples)
        if "teacher_top_k" not in examples[0]:
            return batch
        ids, log_probs, tail = (
            torch.cat(parts) for parts in zip(*(one["teacher_top_k"] for one in examples), strict=True)
        )
        missing = len(batch["target_positions"]) - len(ids)
        assert len(ids) == (batch["labels"] != IGNORED).sum(), "the cache has the masks of this collator"
        log_probs = torch.cat([log_probs, tail[:, None]], dim=1)
        # The cache has nothing for targets that only fill up a fixed shape.
        filled = (F.pad(values, (0, 0, 0, missing)) for values in (ids, log_probs))
        return batch | dict(zip(("teacher_ids", "teacher_log_probs"), filled, strict=True))


def _logits_of(
    teacher: Teacher, collate: Callable[[Examples], dict[str, torch.Tensor]], examples: Examples, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the teacher's logits of examples, and the labels of their batch."""
    batch = {name: values.to(device) for name, values in collate(examples).items()}
    labels, positions = batch.pop("labels", None), batch.pop("target_positions", None)
    if positions is None:
        # The stock heads of sequences read column 0.
        batch, _ = begin_in_column_0(batch, [])
    logits = teacher(batch, positions).logits
    assert logits is not None, "the request of this teacher has logits"
    return logits, labels


def cache_teacher_top_k(
    model: DistillationModel,
    data: PreparedData,
    args: DistillationTrainingArguments,
    *,
    collator: DataCollatorForMaskedLM,
) -> PreparedData:
    """Run the teacher once for its likeliest tokens at all masked positions, or find them in `output_dir`.

    One process runs it while the others wait, which may take long: raise `ddp_timeout`, or start with one process and
    go on with many. Held-out examples are left as they are: the teacher runs on these at each evaluation.

    Args:
        model: Student and teacher.
        data: Text, cut into examples.
        args: Options of the run.
        collator: Masks the examples, now as in training.

    Returns:
        The data, with training examples that bring the teacher's predictions; as it was, if `cache_top_k` is 0.

    Raises:
        InputError: If the examples are a stream, or a cache in the folder is of another teacher, data or masking.
    """
    if not args.cache_top_k:
        return data
    if isinstance(data.train_dataset, IterableDataset):
        raise InputError(
            f"cache_top_k={args.cache_top_k} looks examples up again, which a stream does not allow: leave out streaming, or the "
            "cache"
        )
    teacher = model.teacher
    assert teacher is not None and args.temperature is not None, "the options were resolved"
    dataset = EpochDataset.wrap(data.train_dataset).base
    folder = Path(args.output_dir) / _TOP_K_FOLDER
    kept: dict[str, Any] = {"k": args.cache_top_k, "temperature": args.temperature, "num_epochs": args.static_masks}
    masking = {"draws": draws.VERSION, "seed": args.seed, **asdict(args.masking)}
    fingerprint = cache_fingerprint(teacher.model, dataset, data.tokenizer, masking=masking, kept=kept)

    def forward(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = _logits_of(teacher, collator, examples, args.device)
        assert labels is not None, "masked tokens have labels"
        counts_B = (labels != IGNORED).sum(dim=1)
        return logits[: int(counts_B.sum())], counts_B

    with args.main_process_first(local=False, desc="the teacher's predictions"):
        if args.process_index == 0 and not has_cache(folder):
            size = args.per_device_eval_batch_size
            build_top_k(forward, dataset, folder, fingerprint=fingerprint, batch_size=size, **kept)
        data.train_dataset = TeacherTargetsDataset(dataset, TopKCache.open(folder, fingerprint=fingerprint))
    return data


def cache_teacher_logits(
    model: DistillationModel, data: PreparedData, args: TaskDistillationTrainingArguments
) -> PreparedData:
    """Run the teacher once for its logits of every example of a task, or find them in `output_dir`.

    Args:
        model: Student and teacher.
        data: Examples of a task.
        args: Options of the run.

    Returns:
        The data, with examples that bring `teacher_logits`; as it was, if a loss needs the teacher's states in every
        step.
    """
    teacher = model.teacher
    if teacher is None or not args.cache_teacher or not teacher.request.logits or teacher.request.depth:
        return data
    collate = DataCollatorForTask(data.tokenizer)

    def cached(dataset: Any, name: str) -> TeacherTargetsDataset:
        dataset = EpochDataset.wrap(dataset).base
        folder = Path(args.output_dir) / _LOGITS_FOLDER / name
        fingerprint = cache_fingerprint(teacher.model, dataset, data.tokenizer)
        with args.main_process_first(local=False, desc="the teacher's predictions"):
            if args.process_index == 0 and not has_cache(folder):
                build_task_logits(
                    lambda examples: _logits_of(teacher, collate, examples, args.device)[0],
                    dataset,
                    folder,
                    fingerprint=fingerprint,
                    counts=count_predictions(dataset),
                    batch_size=args.per_device_eval_batch_size,
                )
            return TeacherTargetsDataset(dataset, TaskLogitsCache.open(folder, fingerprint=fingerprint))

    data.train_dataset = cached(data.train_dataset, "train")
    if data.eval_dataset is not None:
        data.eval_dataset = cached(data.eval_dataset, "held_out")
    return data


def report_label_agreement(model: DistillationModel, data: PreparedData, args: PretrainingArguments) -> None:
    """Print on how many augmented rows the teacher gives the label of their source, and note it for the card.

    Nothing is done where no row is augmented, or there are no classes.

    Args:
        model: Student and teacher.
        data: Examples of a task; its description gets `teacher_label_agreement`.
        args: Options of the run.
    """
    rows = EpochDataset.wrap(data.train_dataset).base
    if model.teacher is None or model.config.head != "classification" or args.process_index:
        return
    variants = labelled_variants(rows, most=_MOST_ROWS)
    if not len(variants):
        return
    known, collate, size = model.teacher, DataCollatorForTask(data.tokenizer), args.per_device_eval_batch_size
    # The request of the losses may be without logits.
    request = OutputRequest(logits=True)
    teacher = Teacher(known.model, request, gathers=False, dtype=known.model.dtype, device=known.device)
    hits = 0
    for begin in range(0, len(variants), size):
        examples = [rows[int(row)] for row in variants[begin : begin + size]]
        logits, labels = _logits_of(teacher, collate, examples, args.device)
        assert labels is not None, "augmented rows have the labels of their sources"
        hits += int(torch.eq(logits.argmax(-1), labels).sum())
    share = hits / len(variants)
    print(f"\nOf {len(variants):,} augmented rows the teacher gives {share:.1%} the label of their source.")
    data.description["teacher_label_agreement"] = share


def labelled_variants(rows: datasets.Dataset, *, most: int) -> np.ndarray:
    """Return the numbers of labelled rows that are variants of another row, evenly spread over all of them."""
    if not {SOURCE_ID, "labels"} <= set(getattr(rows, "column_names", ())):
        return np.empty(0, dtype=np.int64)
    sources, labels = (np.asarray(rows[name][:]) for name in (SOURCE_ID, "labels"))
    # The first row of each source is the source itself.
    is_variant = np.append(False, sources[1:] == sources[:-1])
    variants = np.flatnonzero(is_variant & (labels != IGNORED))
    chosen = np.linspace(0, len(variants) - 1, min(most, len(variants))).round().astype(np.int64)
    return variants[chosen]
