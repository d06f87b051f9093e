"""A student beside its teacher: sizes, times, and how good and how equal their predictions are.

[`compare`] measures two stock models on any examples. The Trainer of a distillation needs only [`measure_costs`]: its
own evaluation has the numbers of the predictions, by the same [`prediction_metrics`], on the whole held-out set.
[`comparison_rows`] makes a table of either for the card.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.hub.text import Row, number
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.modeling.heads import HeadKind, head_kind
from hf_pretrain.modeling.losses import begin_in_column_0
from hf_pretrain.modeling.observing.outputs import ModelOutputs, ModelRunner, OutputRequest
from hf_pretrain.objectives.distillation.predictions import OUTSIDE, Predictions, prediction_metrics

Examples = list[dict[str, Any]]
Batch = dict[str, torch.Tensor]
Collator = Callable[[Examples], Batch]

_BYTES_IN_FP32 = 4
_INPUTS = ("input_ids", "attention_mask", "document_ids", "position_ids", "token_type_ids")
# Examples whose lengths the timed batches have.
_EXAMPLES_TO_TIME = 512


class _Side(NamedTuple):
    """A model that is ready to be measured."""

    model: PreTrainedModel
    head: HeadKind
    runner: ModelRunner

    def run(self, batch: Batch) -> ModelOutputs:
        """Run a forward pass with the head at the targets of a batch."""
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        if self.head in ("classification", "regression"):
            # The stock heads of sequences read column 0.
            inputs, _ = begin_in_column_0(inputs, [])
        return self.runner(self.model, inputs, batch.get("target_positions"))


@contextmanager
def _ready(student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[dict[str, _Side]]:
    """Yield both models in evaluation mode and in the student's dtype; they are left as they were."""
    if teacher.dtype != student.dtype:
        teacher = copy.deepcopy(teacher).to(student.dtype)
    sides = {}
    with ExitStack() as stack:
        for name, model in {"student": student, "teacher": teacher}.items():
            head = head_kind(model)
            layers = () if head != "none" else (model.config.num_hidden_layers,)
            request, gathers = OutputRequest(head != "none", layers), head in ("masked_lm", "token_classification")
            stack.enter_context(evaluating(model))
            runner = stack.enter_context(ModelRunner(model, request, gathers=gathers))
            sides[name] = _Side(model, head, runner)
        yield sides


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Any,
    *,
    collator: Collator,
    max_examples: int | None = None,
    batch_size: int = 32,
    timed_batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 3,
) -> dict[str, float]:
    """Measure a student beside its teacher on held-out examples.

    Both run in the student's dtype, under the caller's autocast, without dropout. Predictions are compared at the
    targets of the batch: at `target_positions` of masked language models and classifiers of tokens, one an example of
    classifiers of texts, two (begin and end of the answer) of models that answer questions; bare encoders have none.

    Args:
        student: A stock model.
        teacher: A stock model with the same kind of head, on the same device.
        dataset: Map-style held-out examples with `input_ids`.
        collator: Makes the batches of both models, such as the Trainer's.
        max_examples: Number of examples to compare predictions on, evenly spread over the data; all by default.
        batch_size: Examples in a batch of these.
        timed_batch_sizes: See [`measure_costs`].
        repeats: See [`measure_costs`].

    Returns:
        The numbers of [`measure_costs`], and those of [`prediction_metrics`]: means over targets of both, such as
        `agreement`, and of each side with "student_" or "teacher_" in front.
    """
    data = EpochDataset.wrap(dataset)
    options: dict[str, Any] = {"collator": collator, "timed_batch_sizes": timed_batch_sizes, "repeats": repeats}
    found = measure_costs(student, teacher, data, **options)
    totals: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    with _ready(student, teacher) as sides:
        if any(side.head == "none" for side in sides.values()):
            return found
        rows = _spread(len(data), len(data) if max_examples is None else max_examples)
        with tqdm(total=len(rows), desc="Comparing with the teacher", unit=" examples", delay=2, disable=None) as bar:
            for begin in range(0, len(rows), batch_size):
                examples = data.__getitems__(rows[begin : begin + batch_size].tolist())
                batch = _on_device(collator(examples), student.device)
                for name, (values, counts) in _metrics(sides, batch).items():
                    totals[name] += [float(values.double().sum()), float(counts.double().sum())]
                bar.update(len(examples))
    return found | by_side({name: float(total / count) for name, (total, count) in totals.items() if count})


def _metrics(sides: Mapping[str, _Side], batch: Batch) -> dict[str, Any]:
    """Return the sums by example of the metrics of a batch."""
    student, teacher = (side.run(batch).logits for side in sides.values())
    assert student is not None and teacher is not None, "both have a head"
    head, config = sides["student"].head, sides["student"].model.config
    predictions = Predictions.of_batch(
        student.float(),
        teacher.float(),
        batch.get("labels"),
        head=head,
        positions=batch.get("target_positions"),
        shape=batch["attention_mask"].shape,
    )
    return prediction_metrics(predictions, head=head, outside=config.label2id.get(OUTSIDE))


def measure_costs(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Any,
    *,
    collator: Collator,
    timed_batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 3,
) -> dict[str, float]:
    """Measure the sizes and times of a student and its teacher.

    Args:
        student: A stock model.
        teacher: A stock model with the same kind of head, on the same device.
        dataset: Map-style examples with `input_ids`.
        collator: Makes the batches of both models.
        timed_batch_sizes: Sizes of the batches whose forward pass is timed; the lengths are those of the data.
        repeats: Rounds of timing; both have a turn in each, and the best counts.

    Returns:
        For "student" and "teacher" each: `_parameters`, `_megabytes` (in fp32), `_milliseconds_batch_<n>`; and
        `speed_up_batch_<n>`.
    """
    data, found = EpochDataset.wrap(dataset), {}
    examples = _longest_first(data.__getitems__(_spread(len(data), _EXAMPLES_TO_TIME).tolist()))
    with _ready(student, teacher) as sides:
        for name, side in sides.items():
            found[f"{name}_parameters"] = count = side.model.num_parameters()
            found[f"{name}_megabytes"] = count * _BYTES_IN_FP32 / 1e6
        for size in timed_batch_sizes:
            # Of all lengths; one is of median length.
            middle = ((np.arange(size) + 0.5) / size * len(examples)).astype(np.int64)
            batch = _on_device(collator([examples[i] for i in middle]), student.device)
            seconds = _best_seconds({name: partial(side.run, batch) for name, side in sides.items()}, repeats)
            found |= {f"{name}_milliseconds_batch_{size}": 1e3 * value for name, value in seconds.items()}
            found[f"speed_up_batch_{size}"] = seconds["teacher"] / seconds["student"]
    return found


def _spread(length: int, count: int) -> np.ndarray:
    """Return so many different rows at most, evenly spread over the data."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def _longest_first(examples: Examples) -> Examples:
    return sorted(examples, key=lambda example: -len(example["input_ids"]))


def _on_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def _best_seconds(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
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


_ROWS = {
    "parameters": "Parameters",
    "megabytes": "Size in fp32, MB",
    "mlm_loss": "MLM loss",
    "accuracy": "Accuracy",
    "exact_match": "Exact match",
    "f1": "F1",
    "squared_error": "Squared error",
}
_ROWS_OF_BOTH = {
    "agreement": "Same prediction as the teacher",
    "sentence_agreement": "Same nearest text as the teacher",
    "kl": "Divergence from the teacher, nats",
    "squared_difference": "Squared difference from the teacher",
}


def by_side(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by [`prediction_metrics`]' names, with "student_" in front of those of the student alone."""
    shared = ("teacher_", *_ROWS_OF_BOTH)
    return {name if name.startswith(shared) else f"student_{name}": value for name, value in metrics.items()}


def comparison_rows(found: Mapping[str, float]) -> list[Row]:
    """Return the header and the rows of a table of what [`compare`] measured, for a model card."""
    rows: list[Row] = [("", "Student", "Teacher")]
    names = dict(_ROWS)
    batches = [int(name.rpartition("_")[2]) for name in found if name.startswith("speed_up_batch_")]
    names |= {f"milliseconds_batch_{size}": f"Forward pass, batch of {size}, ms" for size in batches}
    for name, title in names.items():
        values = [found.get(f"{side}_{name}") for side in ("student", "teacher")]
        if values[0] is not None:
            rows.append((title, *("" if value is None else number(value) for value in values)))
    rows += [(f"Speed-up, batch of {size}", number(found[f"speed_up_batch_{size}"]), "1") for size in batches]
    return rows + [(title, number(found[name]), "") for name, title in _ROWS_OF_BOTH.items() if name in found]
