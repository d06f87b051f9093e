"""What becomes of labels when sentences are augmented: how often the teacher would still give them."""

from __future__ import annotations

import datasets
import numpy as np
import torch

from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.evaluation.batches import evaluating
from hf_pretrain.evaluation.students import AskedModel, Collator
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.distillation.augmentation import SOURCE_ID
from hf_pretrain.objectives.distillation.modeling import DistillationModel
from hf_pretrain.objectives.distillation.task_examples import DataCollatorForTask
from hf_pretrain.training.arguments import PretrainingArguments

_MOST_ROWS = 2048


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
    teacher = AskedModel(model.teacher.model.to(model.teacher.device or args.device))
    share = agreement(
        teacher,
        rows.select(variants),
        collator=DataCollatorForTask(data.tokenizer),
        batch_size=args.per_device_eval_batch_size,
    )
    print(f"\nOf {len(variants):,} augmented rows the teacher gives {share:.1%} the label of their source.")
    data.description["teacher_label_agreement"] = share


def labelled_variants(rows: datasets.Dataset, *, most: int) -> np.ndarray:
    """Return the numbers of rows that were made of another and have its label, evenly spread over all of them."""
    if not {SOURCE_ID, "labels"} <= set(getattr(rows, "column_names", ())):
        return np.empty(0, dtype=np.int64)
    sources, labels = (np.asarray(rows[name][:]) for name in (SOURCE_ID, "labels"))
    # The first row of each source is the source itself.
    is_variant = np.append(False, sources[1:] == sources[:-1])
    variants = np.flatnonzero(is_variant & (labels != IGNORED))
    places = np.linspace(0, len(variants) - 1, min(most, len(variants))).round().astype(np.int64)
    return variants[places]


def agreement(teacher: AskedModel, rows: datasets.Dataset, *, collator: Collator, batch_size: int) -> float:
    """Return the share of labelled rows whose label is the teacher's first choice."""
    hits = 0
    with evaluating(teacher.model):
        for begin in range(0, len(rows), batch_size):
            examples = [rows[row] for row in range(begin, min(begin + batch_size, len(rows)))]
            batch = {name: value.to(teacher.model.device) for name, value in collator(examples).items()}
            hits += int(torch.sum(teacher(batch).argmax(-1) == batch["labels"]))
    return hits / len(rows)
