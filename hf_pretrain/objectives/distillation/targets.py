"""Training on what a teacher predicted once: examples that bring its likeliest tokens, and batches of these.

What becomes of labels when sentences are augmented: how often the teacher would still give them.
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
from hf_pretrain.evaluation.students import AskedModel, Collator
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.modeling.observing.cache import TopKCache, build_top_k, cache_fingerprint, has_cache
from hf_pretrain.objectives.distillation.arguments import DistillationTrainingArguments
from hf_pretrain.objectives.distillation.modeling import DistillationModel
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.tasks.augmentation import SOURCE_ID
from hf_pretrain.tasks.examples import DataCollatorForTask
from hf_pretrain.training.arguments import PretrainingArguments

# A leading underscore keeps a folder out of what is pushed to the Hub.
_ANSWERS = "_teacher_top_k"


class TopKDataset(EpochDataset):
    """Examples with what the teacher predicts at their masked positions, in `teacher_top_k`.

    Args:
        base: Map-style examples.
        cache: The teacher's likeliest tokens for these, for as many epochs as each has maskings; they come in turn.
    """

    def __init__(self, base: Any, cache: TopKCache) -> None:
        super().__init__(base)
        self.cache = cache

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example, see [`EpochDataset`], with its [`TopKTargets`]."""
        return self._answered(super().__getitem__(index))

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return examples with their targets."""
        return [self._answered(example) for example in super().__getitems__(indices)]

    def _answered(self, example: dict[str, Any]) -> dict[str, Any]:
        masking = example["epoch"] % self.cache.num_epochs
        return {**example, "teacher_top_k": self.cache.lookup([example["example_id"]], masking)}


class DataCollatorForDistillation(DataCollatorForMaskedLM):
    """Masks examples, and hands on what the teacher predicted at the targets where they bring it.

    The batch is that of [`DataCollatorForMaskedLM`], for examples of a [`TopKDataset`] with two tensors more:

    - `teacher_ids`: ``[T, k]`` int64, tokens at the targets in the order of `target_positions`;
    - `teacher_log_probs`: ``[T, k + 1]`` fp32, log-probabilities of these, and in the last column that of all others together.
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
        assert len(ids) == (batch["labels"] != IGNORED).sum(), "the teacher was asked with other masks"
        log_probs = torch.cat([log_probs, tail[:, None]], dim=1)
        # Of targets that only fill up a fixed shape, the teacher says nothing.
        filled = (F.pad(values, (0, 0, 0, missing)) for values in (ids, log_probs))
        return batch | dict(zip(("teacher_ids", "teacher_log_probs"), filled, strict=True))


def ask_for_top_k(
    model: DistillationModel,
    data: PreparedData,
    args: DistillationTrainingArguments,
    *,
    collator: DataCollatorForDistillation,
) -> PreparedData:
    """Ask the teacher for its likeliest tokens at all masked positions, or find them in `output_dir`.

    One process asks while the others wait, which may take long: raise `ddp_timeout`, or start with one process and go on with
    many. Held-out examples are left as they are: the teacher answers these in full at each evaluation.

    Args:
        model: Student and teacher.
        data: Text, cut into examples.
        args: Options of the run.
        collator: Masks the examples, now as in training.

    Returns:
        The data, with training examples that bring the teacher's answers; as it was, if `cache_top_k` is 0.

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
    assert model.teacher is not None and args.temperature is not None, "the options were resolved"
    dataset = EpochDataset.wrap(data.train_dataset).base
    folder = Path(args.output_dir) / _ANSWERS
    kept: dict[str, Any] = {"k": args.cache_top_k, "temperature": args.temperature, "num_epochs": args.static_masks}
    masking = {"draws": draws.VERSION, "seed": args.seed, **asdict(args.masking)}
    fingerprint = cache_fingerprint(model.teacher.model, dataset, data.tokenizer, masking=masking, kept=kept)
    with args.main_process_first(local=False, desc="the teacher's answers"):
        if args.process_index == 0 and not has_cache(folder):
            forward = _forward(model, collator, args.device)
            size = args.per_device_eval_batch_size
            build_top_k(forward, dataset, folder, fingerprint=fingerprint, batch_size=size, **kept)
        data.train_dataset = TopKDataset(dataset, TopKCache.open(folder, fingerprint=fingerprint))
    return data


def _forward(
    model: DistillationModel, collator: DataCollatorForDistillation, device: torch.device
) -> Callable[[list[dict[str, Any]]], tuple[torch.Tensor, torch.Tensor]]:
    """Return what asks the teacher for its logits at the masked positions of examples."""

    def forward(examples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = {name: values.to(device) for name, values in collator(examples).items()}
        labels, positions = batch.pop("labels"), batch.pop("target_positions")
        counts_B = (labels != IGNORED).sum(dim=1)
        assert model.teacher is not None
        logits = model.teacher(batch, positions).logits
        assert logits is not None, "predictions are wanted of this teacher"
        return logits[: int(counts_B.sum())], counts_B

    return forward


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
