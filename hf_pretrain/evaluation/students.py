"""What a student keeps of its teacher and what it saves: sizes, times, and how often and how far their predictions differ."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.evaluation.batches import evaluating
from hf_pretrain.hub.card_text import Row, number
from hf_pretrain.modeling.gathered import GatheredHead
from hf_pretrain.modeling.losses import IGNORED

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
Batch = dict[str, torch.Tensor]

_BYTES_IN_FP32 = 4
_INPUTS = ("input_ids", "attention_mask")


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Any,
    *,
    collator: Collator,
    max_examples: int = 512,
    batch_size: int = 32,
    timed_batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 3,
) -> dict[str, float]:
    """Measure a student beside its teacher on examples that neither has learned from.

    Both run in the student's dtype, under the caller's autocast, without dropout. Predictions are compared at the targets of the
    batch: at `target_positions` of masked language models, one an example of classifiers; bare encoders have none.

    Args:
        student: A stock model.
        teacher: A stock model with the same kind of head, on the same device.
        dataset: Map-style held-out examples with `input_ids`.
        collator: Makes the batches that both models read, such as the Trainer's.
        max_examples: How many examples predictions are compared on; evenly spread over the data.
        batch_size: Examples in a batch of these; they are sorted by length.
        timed_batch_sizes: Batches whose forward pass is timed; the lengths are those of the data.
        repeats: Rounds of timing, in each of which both have a turn; the best counts.

    Returns:
        For "student" and "teacher" each: `_parameters`, `_megabytes` (in fp32), `_milliseconds_batch_<n>`, and where there are
        labels `_mlm_loss` (nats), `_accuracy` or `_squared_error`. Of both: `speed_up_batch_<n>`; `agreement`, the share of
        targets with the same best prediction, and `kl`, the student's divergence from the teacher in nats a target; or for one
        output `squared_difference`.
    """
    if teacher.dtype != student.dtype:
        teacher = copy.deepcopy(teacher).to(student.dtype)
    models = {"student": _Asked(student), "teacher": _Asked(teacher)}
    examples = _sample(EpochDataset.wrap(dataset), max_examples)
    found: dict[str, float] = {}
    for name, asked in models.items():
        found[f"{name}_parameters"] = count = asked.model.num_parameters()
        found[f"{name}_megabytes"] = count * _BYTES_IN_FP32 / 1e6
    with evaluating(student), evaluating(teacher):
        for size in timed_batch_sizes:
            batch = _on_device(collator(_spread(examples, size)), student.device)
            seconds = _best_seconds({name: partial(asked, batch) for name, asked in models.items()}, repeats)
            found |= {f"{name}_milliseconds_batch_{size}": 1e3 * value for name, value in seconds.items()}
            found[f"speed_up_batch_{size}"] = seconds["teacher"] / seconds["student"]
        if all(asked.has_head for asked in models.values()):
            found |= _compare_predictions(models, examples, collator=collator, batch_size=batch_size)
    return found


def _sample(dataset: EpochDataset, count: int) -> list[dict[str, Any]]:
    """Return examples evenly spread over the data, the longest first."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(np.int64))
    return sorted(dataset.__getitems__(rows.tolist()), key=lambda example: -len(example["input_ids"]))


def _spread(examples: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return so many examples of all lengths; one is of median length."""
    places = ((np.arange(count) + 0.5) / count * len(examples)).astype(np.int64)
    return [examples[place] for place in places]


def _on_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


class _Asked:
    """A stock model, asked for its logits: of a masked language model, at the targets alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.has_head = model is not model.base_model
        self.is_masked_lm = model.get_output_embeddings() is not None
        has_types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
        self._inputs = (*_INPUTS, "token_type_ids") if has_types else _INPUTS

    def __call__(self, batch: Batch) -> torch.Tensor:
        inputs = {name: batch[name] for name in self._inputs if name in batch}
        if self.is_masked_lm and "target_positions" in batch:
            with GatheredHead(self.model) as head:
                return head(self.model, batch["target_positions"], **inputs)
        return self.model(**inputs)[0]


def _best_seconds(sides: Mapping[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, float]:
    """Time both sides in turn, after a round that does not count."""
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(repeats + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def _compare_predictions(
    models: Mapping[str, _Asked], examples: Sequence[dict[str, Any]], *, collator: Collator, batch_size: int
) -> dict[str, float]:
    totals: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    begins = range(0, len(examples), batch_size)
    for begin in tqdm(begins, desc="Comparing with the teacher", unit=" batches", delay=2, disable=None):
        batch = _on_device(collator(list(examples[begin : begin + batch_size])), models["student"].model.device)
        logits = {name: asked(batch).float() for name, asked in models.items()}
        labels = batch.get("labels")
        if labels is not None and "target_positions" in batch:
            labels = labels.flatten()[batch["target_positions"]]
            # Fillers of a fixed shape have none.
            logits = {name: values[labels != IGNORED] for name, values in logits.items()}
            labels = labels[labels != IGNORED]
        found = _differences(**logits)
        if labels is not None:
            for name, asked in models.items():
                scores = _scores(logits[name], labels, is_masked_lm=asked.is_masked_lm)
                found |= {f"{name}_{quantity}": values for quantity, values in scores.items()}
        for quantity, values in found.items():
            totals[quantity] += float(values.double().sum()), len(values)
    return {quantity: float(total / count) for quantity, (total, count) in totals.items() if count}


def _differences(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return how far predictions differ at each target: ``[T]`` by name, from logits ``[T, C]``."""
    if student.shape[1] == 1:
        return {"squared_difference": (student - teacher).square().squeeze(1)}
    divergence_TC = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return {"agreement": student.argmax(-1) == teacher.argmax(-1), "kl": divergence_TC.sum(-1)}


def _scores(logits: torch.Tensor, labels: torch.Tensor, *, is_masked_lm: bool) -> dict[str, torch.Tensor]:
    """Return how good predictions are at each target: ``[T]`` by name."""
    if is_masked_lm:
        return {"mlm_loss": F.cross_entropy(logits, labels, reduction="none")}
    if logits.shape[1] == 1:
        return {"squared_error": (logits.squeeze(1) - labels)[~labels.isnan()].square()}
    return {"accuracy": (logits.argmax(-1) == labels)[labels != IGNORED]}


_ROWS = {
    "parameters": "Parameters",
    "megabytes": "Size in fp32, MB",
    "mlm_loss": "MLM loss",
    "accuracy": "Accuracy",
    "squared_error": "Squared error",
}
_ROWS_OF_BOTH = {
    "agreement": "Same prediction as the teacher",
    "kl": "Divergence from the teacher, nats",
    "squared_difference": "Squared difference from the teacher",
}


def comparison_rows(found: Mapping[str, float]) -> list[Row]:
    """Return the header and the rows of a table of what [`compare`] measured, for a model card."""
    rows: list[Row] = [("", "Student", "Teacher")]
    sides = ("student", "teacher")
    names = dict(_ROWS)
    batches = [int(name.rpartition("_")[2]) for name in found if name.startswith("speed_up_batch_")]
    names |= {f"milliseconds_batch_{size}": f"Forward pass, batch of {size}, ms" for size in batches}
    for name, title in names.items():
        if f"student_{name}" in found:
            rows.append((title, *(number(found[f"{side}_{name}"]) for side in sides)))
    rows += [(f"Speed-up, batch of {size}", number(found[f"speed_up_batch_{size}"]), "1") for size in batches]
    return rows + [(title, number(found[name]), "") for name, title in _ROWS_OF_BOTH.items() if name in found]
