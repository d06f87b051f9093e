"""The teacher: a stock model that is asked and never trained.

The student with what it is trained through, and the losses between it and its teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import layer_modules
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.losses import ExampleSum, PretrainingOutput, begin_in_column_0
from hf_pretrain.modeling.observing.observation import Observation, Observer, TopKTargets, Wanted
from hf_pretrain.objectives.distillation import losses as between
from hf_pretrain.objectives.distillation import predictions
from hf_pretrain.objectives.distillation.arguments import OF_PREDICTIONS, RELATIONS, DistillationConfig
from hf_pretrain.objectives.distillation.losses import attention_distribution_loss, relation_loss


class Teacher:
    """A stock model in evaluation mode, without a graph, that runs no deeper than it is asked.

    It is no module: what holds it does not register it, so that no optimizer, no distributed wrapper, no checkpoint and no change
    of mode ever reaches it.

    Args:
        model: The stock model. It is frozen, put into evaluation mode and cast in place.
        wanted: What it is asked for.
        gathers: Whether its head runs on chosen positions.
        dtype: Type of its weights; logits are in fp32 nevertheless.
        device: Where it runs, if not where the batch is; batches are sent there, and what it makes of them comes back.
        compiles: Whether its layers run under torch.compile.

    Raises:
        InputError: If there is no such device, or layers are to be compiled whose attention is looked into.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: Wanted,
        *,
        gathers: bool,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        compiles: bool = False,
    ) -> None:
        if compiles and wanted.attention:
            raise InputError(
                "teacher_compile=True: a loss of attention or relations looks into the teacher's layers, which a compiled layer "
                "does not let it; leave out one of the two"
            )
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.device = None if device is None else _checked(device)
        self.observer = Observer(model, wanted, gathers=gathers)
        self._compiled = _compiled_layers(model) if compiles else {}

    @property
    def wanted(self) -> Wanted:
        """What it is asked for."""
        return self.observer.wanted

    @torch.compiler.disable
    def __call__(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor | None = None) -> Observation:
        """Return what the teacher makes of a batch, on the batch's device; see [`Observer`]."""
        home = inputs["input_ids"].device
        device = home if self.device is None else self.device
        if self.model.device != device:
            self.model.to(device)
        inputs = {name: values.to(device) for name, values in inputs.items()}
        positions = None if positions is None else positions.to(device)
        # The student's autocast is not the teacher's: it has a type of its own.
        autocast = nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
        with torch.no_grad(), autocast, self._running_compiled():
            return self.observer(self.model, inputs, positions).to(home)

    @contextmanager
    def _running_compiled(self) -> Iterator[None]:
        """Let the layers run compiled, in the block alone: others who use the model find it as it was."""
        for layer, forward in self._compiled.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._compiled:
                del layer.forward


def _checked(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"teacher_device={str(device)!r} cannot be used ({reason}): name one such as cpu or cuda:1"
        ) from error


def _compiled_layers(model: PreTrainedModel) -> dict[nn.Module, Callable[..., Any]]:
    """Return the layers with their forward under torch.compile; layers of one class share what is compiled.

    Only the forward, without the hooks around it, by which states are read.
    """
    layers = dict.fromkeys(layer_modules(model.base_model))
    forwards = {kind: torch.compile(kind.forward) for kind in {type(layer) for layer in layers}}
    return {layer: partial(forwards[type(layer)], layer) for layer in layers}


# The usual name of the class of tokens that belong to no entity.
_OUTSIDE = "O"


@dataclass(frozen=True)
class Lesson:
    """A batch as both models saw it.

    Attributes:
        student: What was read off the student.
        teacher: What was read off the teacher.
        mask: ``[B, L]`` attention mask.
        document_ids: ``[B, L]`` document of each token, where the documents of a row do not see each other.
    """

    student: Observation
    teacher: Observation
    mask: torch.Tensor
    document_ids: torch.Tensor | None


class DistillationModel(PretrainingModel):
    """A student and the projections from its width to the teacher's; the teacher is asked, but is no part of it.

    With `official` too, the head is the stock one. TinyBERT's code has a ReLU between pooler and classifier: no weights of BERT's
    stock head compute that, and a student trained with it would compute something else once it is exported. So a fine-tuned
    checkpoint of that code opens, but its logits are others until it is trained further. That code has no dropout there either,
    which is `config_overrides={"classifier_dropout": 0.0}` here.

    Args:
        config: What is compared.
        student: The stock model to train, in place.
        teacher: Whom to ask; None if every batch brings the teacher's logits, and no loss needs more.

    Attributes:
        origin: How the student began, for the card; "" if that is not known.

    Source: Jiao et al. 2020, "TinyBERT"; Sanh et al. 2019, "DistilBERT"; Wang et al. 2020, "MiniLM", and 2021, "MiniLMv2".
    """

    config_class = DistillationConfig
    export_parts = {"": "student"}  # noqa: RUF012
    origin: str = ""

    def __init__(self, config: DistillationConfig, student: PreTrainedModel, teacher: Teacher | None = None) -> None:
        super().__init__(config)
        self.student = student
        self.projections = _projections(config)
        self.teacher = teacher
        self.observer = Observer(student, config.wanted()[0], gathers=config.gathers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings of the student."""
        return self.student.get_input_embeddings()

    def try_out(self, *, gradient_checkpointing: bool = False) -> None:
        """Run one step on a few tokens, and freeze what no loss reaches; see [`PretrainingModel.try_out`].

        Such are a head without a loss of predictions, and what lies behind the queries, keys and values of a last layer of which
        only those are compared. Without a teacher nothing is tried: a batch would have to bring what it predicts.
        """
        if self.teacher is not None:
            super().try_out(gradient_checkpointing=gradient_checkpointing)
        elif gradient_checkpointing:
            self.check_gradient_checkpointing()

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens with labels of the student's head; see [`PretrainingModel.trial_batch`]."""
        config = self.config.student_config
        ids = 5 + torch.arange(8, device=self.device)[None] % max(1, min(config.vocab_size, 100) - 5)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.config.head == "masked_lm":
            batch |= {"labels": ids, "target_positions": torch.arange(2, device=self.device)}
            batch["labels"] = torch.where(torch.arange(8, device=self.device)[None] < 2, ids, -100)
        elif self.config.head == "token_classification":
            batch |= {"labels": torch.zeros_like(ids), "target_positions": torch.arange(8, device=self.device)}
        elif self.config.head == "question_answering":
            batch |= {"labels": ids[:, :2] * 0 + 1, "target_positions": torch.arange(8, device=self.device)}
        elif self.config.head == "regression":
            batch["labels"] = torch.zeros(1, device=self.device)
        elif self.config.head == "classification":
            batch["labels"] = torch.zeros(1, dtype=torch.long, device=self.device)
        return batch

    def stock_models(self) -> list[PreTrainedModel]:
        """Return the student, and the teacher if it is there."""
        return [self.student] if self.teacher is None else [self.student, self.teacher.model]

    # mypy: elsewhere counting needs the batch alone, and the method is static.
    def count_targets(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Return the targets of each loss: tokens, pairs of tokens a head, sequences."""
        lengths = batch["attention_mask"].sum(dim=1)
        tokens, heads = lengths.sum(), self.config.student_config.num_attention_heads
        labels = batch.get("labels")
        labelled = torch.zeros_like(tokens) if labels is None else predictions.has_label(labels).sum()
        of_sequences = torch.full_like(tokens, len(lengths))
        in_tokens = tokens if self.config.prediction_positions == "all" else labelled
        # Of a span, the start and the end.
        predicted = {"masked_lm": in_tokens, "question_answering": 2 * of_sequences}
        if self.config.head == "token_classification":
            predicted["token_classification"] = torch.full_like(tokens, batch["target_positions"].numel())
        counts: dict[str, torch.Tensor] = {
            "prediction": predicted.get(self.config.head, of_sequences),
            "mlm": labelled,
            "labels": labelled,
            "cosine": tokens,
            "embedding": tokens,
            "hidden": tokens,
            "attention": visible_pairs(batch, self.config.attention_windows or [None]) * heads,
            "attention_distribution": tokens * heads,
        } | dict.fromkeys(RELATIONS, tokens * self.config.relation_heads)
        counts["value_relation"] = tokens * heads
        return {name: counts[name] for name in self.config.losses or ()}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        teacher_logits: torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_log_probs: torch.Tensor | None = None,
        *,
        temperature: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> PretrainingOutput:
        """Show a batch to both models and compare what they make of it.

        Args:
            input_ids: ``[B, L]``, the same for both.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]`` original ids at the selected positions, or classes of tokens, -100 elsewhere; ``[B]`` labels of
                sequences; or ``[B, 2]`` places where spans begin and end.
            target_positions: ``[T]`` flat positions of the selected tokens: those that are masked, that have a class, or where
                a span may begin or end.
            teacher_logits: ``[B, C]``, or ``[T, C]`` at these positions: what the teacher predicted when it was asked before; it
                is not asked again.
            teacher_ids: ``[T, k]`` the tokens that the teacher found likeliest at these positions, when it was asked before.
            teacher_log_probs: ``[T, k + 1]`` log-probabilities of these, and of all others together.
            temperature: ``[]``, in place of the configuration's.
            **inputs: Further inputs of both models, such as `token_type_ids`, or `document_ids` and `position_ids` for documents
                that do not see each other.

        Returns:
            The losses that the configuration names; in evaluation also metrics of the predictions.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if self.config.head in ("classification", "regression"):
            # The stock heads of sequences read column 0.
            inputs, _ = begin_in_column_0(inputs, [])
            attention_mask = inputs["attention_mask"]
        positions = self._positions(attention_mask, target_positions)
        teacher = Observation(logits=teacher_logits)
        if teacher_ids is not None and teacher_log_probs is not None:
            teacher.top_k = TopKTargets(teacher_ids, teacher_log_probs[:, :-1], teacher_log_probs[:, -1])
        elif teacher_logits is None and self.teacher is not None:
            teacher = self.teacher(inputs, positions)
        student = self.observer(self.student, inputs, positions)
        answers = None
        if student.logits is not None:
            answers = self._answers(student.logits, teacher, labels, positions, attention_mask.shape)
        # A tensor does all that a number does.
        chosen = self.config.temperature if temperature is None else cast(float, temperature)
        found = self._prediction_losses(answers, temperature=chosen)
        lesson = Lesson(student, teacher, attention_mask, inputs.get("document_ids"))
        found |= {name: self._loss(name, lesson) for name in self.config.losses or () if name not in found}
        output = PretrainingOutput(losses=found, metrics={})
        if not self.training and answers is not None and self.config.head != "regression":
            outside = (self.config.student_config.label2id or {}).get(_OUTSIDE)
            output.metrics.update(predictions.quality(answers, head=self.config.head, outside=outside))
            if "mlm" in found:
                del output.metrics["mlm_loss"]
        return output

    def _positions(self, mask: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor | None:
        """Return the flat positions that predictions are made for, or None where they are made for sequences."""
        if not (self.config.gathers or self.config.head == "question_answering"):
            return None
        is_everywhere = self.config.head == "masked_lm" and self.config.prediction_positions == "all"
        return mask.flatten().nonzero().squeeze(1) if is_everywhere else targets

    def _answers(
        self,
        student: torch.Tensor,
        teacher: Observation,
        labels: torch.Tensor | None,
        positions: torch.Tensor | None,
        shape: torch.Size,
    ) -> predictions.Answers:
        if positions is None:
            return predictions.Answers(student, teacher.logits, labels, None)
        rows: dict[str, Any] = {"positions": positions, "shape": shape}
        if self.config.head == "question_answering":
            return predictions.span_answers(student, teacher.logits, labels, **rows)
        everywhere = self.config.head != "masked_lm" or self.config.prediction_positions == "all"
        at_logits = _at(labels, positions)
        return predictions.Answers(
            student, teacher.logits, at_logits, rows, everywhere=everywhere, top_k=teacher.top_k
        )

    def _prediction_losses(self, answers: predictions.Answers | None, *, temperature: float) -> dict[str, ExampleSum]:
        names = OF_PREDICTIONS & set(self.config.losses or ())
        if not names:
            return {}
        assert answers is not None, "the student's head runs for a loss of predictions"
        options = {"is_regression": self.config.head == "regression", "official": self.config.official}
        return predictions.prediction_losses(answers, names, temperature=temperature, **options)

    def _loss(self, name: str, lesson: Lesson) -> ExampleSum:
        if name in RELATIONS or name == "attention_distribution":
            return self._last_attention_loss(name, lesson)
        last = self.config.student_config.num_hidden_layers
        pairs = {"embedding": [(0, 0)], "cosine": [(last, self.config.teacher_layers)]}.get(name, self.config.pairs)
        if name == "attention":
            scores = self.config.attention_target == "scores"
            compare = between.attention_loss if scores else between.attention_probability_loss
            ours, theirs = lesson.student.attention, lesson.teacher.attention
            return _over_layers(
                compare(ours[m], theirs[n], lesson.mask, document_ids=lesson.document_ids) for m, n in pairs
            )
        compare_states = between.cosine_loss if name == "cosine" else between.hidden_loss
        return _over_layers(
            compare_states(self._project(name, m, lesson.student.hidden[m]), lesson.teacher.hidden[n], lesson.mask)
            for m, n in pairs
        )

    def _last_attention_loss(self, name: str, lesson: Lesson) -> ExampleSum:
        """Return a loss of the student's last layer against the teacher's chosen one."""
        ours = lesson.student.attention[self.config.student_config.num_hidden_layers]
        theirs = lesson.teacher.attention[self.config.teacher_layer]
        if name == "attention_distribution":
            return attention_distribution_loss(ours, theirs, lesson.mask, document_ids=lesson.document_ids)
        part = RELATIONS[name]
        return relation_loss(
            ours.concatenated(part),
            theirs.concatenated(part),
            lesson.mask,
            relation_heads=ours.num_heads if name == "value_relation" else self.config.relation_heads,
            document_ids=lesson.document_ids,
        )

    def _project(self, name: str, layer: int, states: torch.Tensor) -> torch.Tensor:
        key = _projection_of(name, layer, self.config)
        return self.projections[key](states) if key in self.projections else states


def _projection_of(name: str, layer: int, config: DistillationConfig) -> str:
    """Return the name of the projection that a layer's states go through."""
    if config.official and name != "cosine":
        return "shared"
    return f"{name}_{layer}" if name == "hidden" and config.projection == "per_layer" else name


def _projections(config: DistillationConfig) -> nn.ModuleDict:
    """Build the projections that the losses need; none where the widths agree, but in the official code."""
    width, names = config.student_config.hidden_size, config.losses or ()
    layers = {"embedding": [0], "hidden": [m for m, _ in config.pairs], "cosine": [0]}
    keys = {_projection_of(name, layer, config): None for name in layers if name in names for layer in layers[name]}
    return nn.ModuleDict(
        {
            key: nn.Linear(width, config.teacher_size, bias=key == "shared")
            for key in keys
            if width != config.teacher_size or key == "shared"
        }
    )


def visible_pairs(batch: Mapping[str, Any], windows: Sequence[int | None]) -> torch.Tensor:
    """Return how many pairs of tokens see each other, on average over layers.

    Args:
        batch: With `attention_mask`, and where documents of a row do not see each other, `document_ids` and `position_ids`.
        windows: Largest distance of the tokens that see each other, by layer; None for all.

    Returns:
        ``[]``, fp32.
    """
    mask_BL = batch["attention_mask"]
    places_BL = batch["position_ids"] if "document_ids" in batch else mask_BL.cumsum(dim=1) - 1
    pairs = []
    for window in windows:
        # With itself, and with each that comes before it in both directions.
        before_BL = places_BL if window is None else places_BL.clamp(max=window)
        pairs.append(((2 * before_BL + 1) * mask_BL).sum())
    return torch.stack(pairs).float().mean()


def _over_layers(terms: Iterable[ExampleSum]) -> ExampleSum:
    """Add up a loss over layers; the count is their mean, so that the loss is the sum of the layers' means where counts agree."""
    sums, counts = zip(*terms, strict=True)
    return ExampleSum(torch.stack(sums).sum(dim=0), torch.stack(counts).mean(dim=0))


def _at(labels: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor | None:
    return labels if labels is None or positions is None else labels.flatten().index_select(0, positions)
