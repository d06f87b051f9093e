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

from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.hub.text import Row, number
from hf_pretrain.modeling.backbone import evaluating, num_token_types
from hf_pretrain.modeling.heads import HeadKind, boundary_logits, entity_counts, head_kind, span_scores
from hf_pretrain.modeling.losses import IGNORED, GatheredHead
from hf_pretrain.modeling.visibility.isolation import isolated_inputs

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
Batch = dict[str, torch.Tensor]

_BYTES_IN_FP32 = 4
_INPUTS = ("input_ids", "attention_mask", "document_ids", "position_ids")


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
    batch: at `target_positions` of masked language models and classifiers of tokens, one an example of classifiers of texts, two
    (where the answer begins and ends) of models that answer questions; bare encoders have none.

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
        labels `_mlm_loss` (nats), `_accuracy` or `_squared_error`, of tokens of entities `_f1`, of spans `_exact_match` and
        `_f1`. Of both: `speed_up_batch_<n>`; `agreement`, the share of
        targets with the same best prediction, and `kl`, the student's divergence from the teacher in nats a target; or for one
        output `squared_difference`.
    """
    if teacher.dtype != student.dtype:
        teacher = copy.deepcopy(teacher).to(student.dtype)
    models = {"student": AskedModel(student), "teacher": AskedModel(teacher)}
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
        if all(asked.head != "none" for asked in models.values()):
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


class AskedModel:
    """A stock model, asked for its logits: at the targets alone where they are tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.head = head_kind(model)
        self._inputs = (*_INPUTS, "token_type_ids") if num_token_types(model.config) > 1 else _INPUTS

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the logits: ``[T, C]`` of tokens, ``[B, C]`` of texts, ``[B, L, 2]`` of spans; of a bare encoder its states."""
        inputs = isolated_inputs(self.model, **{name: batch[name] for name in self._inputs if name in batch})
        if self.head in ("masked_lm", "token_classification") and "target_positions" in batch:
            with GatheredHead(self.model) as head:
                return head(self.model, batch["target_positions"], **inputs)
        if self.head == "question_answering":
            output = self.model(**inputs)
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        return self.model(**inputs)[0]

    def predict(self, batch: Batch) -> torch.Tensor:
        """Return the logits of each prediction of a batch, ``[T, C]`` in fp32."""
        logits = self(batch).float()
        if self.head != "question_answering":
            return logits
        positions = batch["target_positions"]
        return boundary_logits(logits.flatten(0, 1)[positions], positions, batch["attention_mask"].shape)

    @property
    def outside(self) -> int | None:
        """The class of tokens of no entity, where there are tokens of entities."""
        return self.model.config.label2id.get("O") if self.head == "token_classification" else None


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
    models: Mapping[str, AskedModel], examples: Sequence[dict[str, Any]], *, collator: Collator, batch_size: int
) -> dict[str, float]:
    totals: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    head = models["student"].head
    begins = range(0, len(examples), batch_size)
    for begin in tqdm(begins, desc="Comparing with the teacher", unit=" batches", delay=2, disable=None):
        batch = _on_device(collator(list(examples[begin : begin + batch_size])), models["student"].model.device)
        logits = {name: asked.predict(batch) for name, asked in models.items()}
        labels = batch.get("labels")
        if labels is not None and labels.ndim == 2:
            labels = labels.flatten()
            labels = labels if head == "question_answering" else labels[batch["target_positions"]]
        if labels is not None and head == "masked_lm":
            # Fillers of a fixed shape have none.
            logits = {name: values[labels != IGNORED] for name, values in logits.items()}
            labels = labels[labels != IGNORED]
        found = _each(_differences(**logits))
        if labels is not None:
            for name, asked in models.items():
                scores = _scores(logits[name], labels, head=head, outside=asked.outside)
                found |= {f"{name}_{quantity}": values for quantity, values in scores.items()}
        for quantity, parts in found.items():
            totals[quantity] += [float(part.double().sum()) for part in parts]
    return {quantity: float(total / count) for quantity, (total, count) in totals.items() if count}


def _differences(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return how far predictions differ at each target: ``[T]`` by name, from logits ``[T, C]``."""
    if student.shape[1] == 1:
        return {"squared_difference": (student - teacher).square().squeeze(1)}
    divergence_TC = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return {"agreement": student.argmax(-1) == teacher.argmax(-1), "kl": divergence_TC.sum(-1)}


def _scores(
    logits: torch.Tensor, labels: torch.Tensor, *, head: HeadKind, outside: int | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return how good predictions are: by name, what is to be summed, and what its sum is to be divided by."""
    if head == "masked_lm":
        return _each({"mlm_loss": F.cross_entropy(logits, labels, reduction="none")})
    if head == "regression":
        return _each({"squared_error": (logits.squeeze(1) - labels)[~labels.isnan()].square()})
    is_known, guesses = labels != IGNORED, logits.argmax(-1)
    scores = _each({"accuracy": (guesses == labels)[is_known]})
    if outside is not None:
        scores["f1"] = entity_counts(guesses[is_known], labels[is_known], outside=outside)
    if head == "question_answering":
        is_known_B = is_known.view(-1, 2).all(dim=1)
        scores |= _each(span_scores(guesses.view(-1, 2)[is_known_B], labels.view(-1, 2)[is_known_B]))
    return scores


def _each(values: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (value, torch.ones_like(value, dtype=torch.float32)) for name, value in values.items()}


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
