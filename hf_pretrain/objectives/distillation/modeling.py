"""The frozen teacher, and the student with its projections and the losses between the two.

A batch goes through both models, each no deeper than the losses need. The head's logits become [`Predictions`] and
their losses; hidden states and attention become the losses of `losses.py`. In evaluation the model also returns
metrics of the predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.modeling.backbone import layer_modules, longest_sequence, without_autocast
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, begin_in_column_0
from hf_pretrain.modeling.observing.outputs import ModelOutputs, ModelRunner, OutputRequest, TopKTargets
from hf_pretrain.modeling.pooling import SentenceModules, from_config
from hf_pretrain.modeling.visibility.backends import Attending
from hf_pretrain.modeling.visibility.rules import has_padding
from hf_pretrain.objectives.distillation.arguments import (
    OF_PREDICTIONS,
    OF_SENTENCES,
    RELATIONS,
    DistillationConfig,
)
from hf_pretrain.objectives.distillation.losses import (
    attention_distribution_loss,
    attention_loss,
    attention_probability_loss,
    cosine_loss,
    hidden_loss,
    relation_loss,
)
from hf_pretrain.objectives.distillation.predictions import (
    OUTSIDE,
    Predictions,
    has_label,
    prediction_losses,
    prediction_metrics,
)
from hf_pretrain.objectives.distillation.sentence_embeddings import nearest_agreement, sentence_losses

# Heads that predict at positions of the batch, not for whole sequences.
_AT_POSITIONS = ("masked_lm", "token_classification", "question_answering")


class Teacher:
    """A frozen stock model in evaluation mode, that runs without a graph and no deeper than its request.

    It is no module, and its owner does not register it: no optimizer, distributed wrapper, checkpoint or change of
    mode reaches it.

    Args:
        model: The stock model. It is frozen, put into evaluation mode and cast in place.
        request: The outputs that the losses need.
        gathers: Whether its head runs on chosen positions.
        dtype: Type of its weights; logits are in fp32 nevertheless.
        device: Its device, if not that of the batch; inputs are sent there, and outputs come back.
        compiles: Whether its layers run under torch.compile.

    Raises:
        InputError: If there is no such device, or layers are to be compiled whose attention is captured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        request: OutputRequest,
        *,
        gathers: bool,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        compiles: bool = False,
    ) -> None:
        if compiles and request.attention:
            raise InputError(
                "teacher_compile=True: a loss of attention or relations looks into the teacher's layers, which a compiled layer "
                "does not let it; leave out one of the two"
            )
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.request = request
        self.device = None if device is None else _checked(device)
        self.runner = ModelRunner(model, request, gathers=gathers)
        self._compiled = _compiled_layers(model) if compiles else {}

    @torch.compiler.disable
    def __call__(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor | None = None) -> ModelOutputs:
        """Return the requested outputs on the batch's device; see [`ModelRunner`]."""
        home = inputs["input_ids"].device
        device = home if self.device is None else self.device
        if self.model.device != device:
            self.model.to(device)
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
        positions = None if positions is None else positions.to(device)
        # The teacher has a type of its own, and the student's autocast does not apply.
        with torch.no_grad(), without_autocast(device), self._running_compiled():
            return self.runner(self.model, inputs, positions).to(home)

    @contextmanager
    def _running_compiled(self) -> Iterator[None]:
        """Let the layers run compiled in the block alone; other users of the model find it as it was."""
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
        raise InputError(
            f"teacher_device={str(device)!r} cannot be used ({one_line(error, line=0)}): name one such as cpu or cuda:1"
        ) from error


def _compiled_layers(model: PreTrainedModel) -> dict[nn.Module, Callable[..., Any]]:
    """Return the layers with their forward under torch.compile; layers of one class share what is compiled.

    Only the forward, without the hooks around it, by which states are read.
    """
    layers = dict.fromkeys(layer_modules(model.base_model))
    forwards = {kind: torch.compile(kind.forward) for kind in {type(layer) for layer in layers}}
    return {layer: partial(forwards[type(layer)], layer) for layer in layers}


@dataclass(frozen=True)
class PairedOutputs:
    """The outputs of both models on one batch.

    Attributes:
        student: Outputs of the student.
        teacher: Outputs of the teacher.
        mask: ``[B, L]`` attention mask.
        document_ids: ``[B, L]`` document of each token, where the documents of a row do not see each other.
    """

    student: ModelOutputs
    teacher: ModelOutputs
    mask: torch.Tensor
    document_ids: torch.Tensor | None


class DistillationModel(PretrainingModel):
    """A student and the projections from its width to the teacher's; the teacher is no part of it.

    With `tinybert_official` too, the head is the stock one. TinyBERT's code has a ReLU between pooler and classifier.
    No weights of BERT's stock head compute that, so a student that was trained with it would compute something else
    after the export. A fine-tuned checkpoint of that code opens, but has other logits until it is trained further.
    That code has no dropout there either: `config_overrides={"classifier_dropout": 0.0}`.

    Args:
        config: The losses, and the layers that they compare.
        student: The stock model to train, in place.
        teacher: The teacher; None if every batch brings its logits, and no loss needs more.

    Attributes:
        origin: How the student began, for the card; "" if that is not known.
        teacher_name: Name or folder of the teacher; "" if that is not known.
        sentence_modules: What makes a vector of a text; None if the teacher has nothing of the kind.

    Source: Jiao et al. 2020, "TinyBERT"; Sanh et al. 2019, "DistilBERT"; Wang et al. 2020, "MiniLM", and 2021,
        "MiniLMv2".
    """

    config_class = DistillationConfig
    export_parts = {"": "student"}  # noqa: RUF012
    refuses_adapters = "makes a student of its own, which has to learn in all its weights"
    origin: str = ""
    teacher_name: str = ""

    def __init__(self, config: DistillationConfig, student: PreTrainedModel, teacher: Teacher | None = None) -> None:
        super().__init__(config)
        self.student = student
        self.sentence_modules = from_config(config.sentence_modules)
        self.projections = _projections(config, self.sentence_modules)
        self.teacher = teacher
        self.runner = ModelRunner(student, config.requests()[0], gathers=config.gathers)
        self._names = frozenset(config.losses or ())
        self._last_layer = config.student_config.num_hidden_layers
        self._pairs = {
            "embedding": [(0, 0)],
            "cosine": [(self._last_layer, config.teacher_layers)],
            **dict.fromkeys(("hidden", "attention"), config.pairs),
        }
        self._outside = (config.student_config.label2id or {}).get(OUTSIDE)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings of the student."""
        return self.student.get_input_embeddings()

    def try_out(self, *, gradient_checkpointing: bool = False) -> None:
        """Run one step on a few tokens, and freeze the weights that no loss reaches; see [`PretrainingModel.try_out`].

        These are a head without a loss of predictions, and all behind the queries, keys and values of a last layer if
        only those are compared. Without a teacher there is no trial: a batch would have to bring its predictions.
        """
        if self.teacher is not None:
            super().try_out(gradient_checkpointing=gradient_checkpointing)
        elif gradient_checkpointing:
            self.check_gradient_checkpointing()

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens with labels of the student's head; see [`PretrainingModel.trial_batch`]."""
        config, count = self.config.student_config, torch.arange(8, device=self.device)
        ids = 5 + count[None] % max(1, min(config.vocab_size, 100) - 5)
        head, batch = self.config.head, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if head == "masked_lm":
            batch |= {"labels": torch.where(count[None] < 2, ids, IGNORED), "target_positions": count[:2]}
        elif head == "token_classification":
            batch |= {"labels": torch.zeros_like(ids), "target_positions": count}
        elif head == "question_answering":
            batch |= {"labels": torch.ones_like(ids[:, :2]), "target_positions": count}
        elif head != "none":
            batch["labels"] = torch.zeros(1, device=self.device)
            if head == "classification":
                batch["labels"] = batch["labels"].long()
        if "sentence_similarity" in self._names:
            # Texts are compared with one another, so there are two.
            fill: dict[str, Any] = {"labels": torch.full_like(ids, IGNORED)} | dict.fromkeys(
                ("input_ids", "attention_mask")
            )
            for name in fill.keys() & batch.keys():
                second = batch[name].flip(1) if fill[name] is None else fill[name]
                batch[name] = torch.cat([batch[name], second])
        return batch

    def stock_models(self) -> list[PreTrainedModel]:
        """Return the student, and the teacher if it is there."""
        return [self.student] if self.teacher is None else [self.student, self.teacher.model]

    def attending(self, *, device: torch.device, dtype: torch.dtype) -> dict[str, Attending]:
        """Return the student, and the teacher on its own device and in its own number format."""
        found = {"student": Attending(self.student, device, dtype)}
        if self.teacher is not None:
            teacher = self.teacher.model
            found["teacher"] = Attending(teacher, self.teacher.device or device, teacher.dtype, drops=False)
        return found

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return both models: a loss of attention reads queries, keys and values, and makes its scores itself."""
        return ("student",) if self.teacher is None else ("student", "teacher")

    # mypy: elsewhere counting needs the batch alone, and the method is static.
    def count_targets(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Return the targets of each loss: tokens, pairs of tokens a head, sequences."""
        lengths = batch["attention_mask"].sum(dim=1)
        tokens, heads = lengths.sum(), self.student.config.num_attention_heads
        labels = batch.get("labels")
        labelled = torch.zeros_like(tokens) if labels is None else has_label(labels).sum()
        of_sequences = torch.full_like(tokens, len(lengths))
        in_tokens = tokens if self.config.prediction_positions == "all" else labelled
        # A span has two targets: the start and the end.
        predicted = {"masked_lm": in_tokens, "question_answering": 2 * of_sequences}
        if self.config.head == "token_classification":
            predicted["token_classification"] = torch.full_like(tokens, batch["target_positions"].numel())
        counts: dict[str, torch.Tensor] = {
            "prediction": predicted.get(self.config.head, of_sequences),
            **dict.fromkeys(("mlm", "labels"), labelled),
            **dict.fromkeys(("cosine", "embedding", "hidden"), tokens),
            **dict.fromkeys(RELATIONS, tokens * self.config.relation_heads),
            **dict.fromkeys(("attention_distribution", "value_relation"), tokens * heads),
            **dict.fromkeys(("sentence_cosine", "sentence_mse"), of_sequences),
            "sentence_similarity": of_sequences * (len(lengths) - 1),
            "attention": _visible_pairs(batch, self.config.attention_windows or [None]) * heads,
        }
        return {name: counts[name] for name in self.config.losses or ()}

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return whether the batch is padded and, for predictions at all tokens, where these are.

        See [`PretrainingModel.host_inputs`].
        """
        found: dict[str, Any] = has_padding(batch)
        if config.head == "masked_lm" and config.prediction_positions == "all":
            found["token_positions"] = batch["attention_mask"].flatten().nonzero().squeeze(1)
        return found

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
        token_positions: torch.Tensor | None = None,
        **inputs: Any,
    ) -> PretrainingOutput:
        """Run both models on a batch and compare their outputs.

        Args:
            input_ids: ``[B, L]``, the same for both.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]`` original ids at the selected positions, or classes of tokens, -100 elsewhere; ``[B]``
                labels of sequences; or ``[B, 2]`` positions where spans begin and end.
            target_positions: ``[T]`` flat positions of the tokens that are masked, that have a class, or where a span
                may begin or end.
            teacher_logits: ``[B, C]``, or ``[T, C]`` at these positions: the teacher's logits from a cache; it does
                not run.
            teacher_ids: ``[T, k]`` the teacher's likeliest tokens at these positions from a cache; it does not run.
            teacher_log_probs: ``[T, k + 1]`` log-probabilities of these, and of all others together.
            temperature: ``[]``, in place of the configuration's.
            token_positions: ``[N]`` flat positions that are not padding; read from `attention_mask`, which waits for the device,
                where they are needed and not given.
            **inputs: Further inputs of both models, such as `token_type_ids`, or `document_ids` and `position_ids` for
                documents that do not see each other.

        Returns:
            The losses that the configuration names; in evaluation also metrics of the predictions.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        head = self.config.head
        if head in ("classification", "regression"):
            # The stock heads of sequences read column 0.
            inputs, _ = begin_in_column_0(inputs, [])
            attention_mask = inputs["attention_mask"]
        is_everywhere = self.config.prediction_positions == "all"
        positions = target_positions if head in _AT_POSITIONS else None
        if head == "masked_lm" and is_everywhere:
            positions = token_positions
            if positions is None:
                positions = attention_mask.flatten().nonzero().squeeze(1)
        teacher = ModelOutputs(logits=teacher_logits)
        if teacher_ids is not None and teacher_log_probs is not None:
            teacher.top_k = TopKTargets(teacher_ids, teacher_log_probs[:, :-1], teacher_log_probs[:, -1])
        elif teacher_logits is None and self.teacher is not None:
            teacher = self.teacher(inputs, positions)
        reads_layers = bool(self.runner.request.hidden or self.runner.request.attention)
        student = (self._read_layers if reads_layers else self.runner)(self.student, inputs, positions)
        predictions = None
        if student.logits is not None:
            rows = {"head": head, "positions": positions, "shape": attention_mask.shape, "everywhere": is_everywhere}
            predictions = Predictions.of_batch(student.logits, teacher.logits, labels, **rows, top_k=teacher.top_k)
        # A tensor does all that a number does.
        chosen = self.config.temperature if temperature is None else cast(float, temperature)
        losses = self._prediction_losses(predictions, temperature=chosen)
        both = PairedOutputs(student, teacher, attention_mask, inputs.get("document_ids"))
        vectors = self._vectors(both)
        losses |= {} if vectors is None else sentence_losses(*vectors, names=self._names)
        losses |= {name: self._loss(name, both) for name in self.config.losses or () if name not in losses}
        output = PretrainingOutput(losses=losses, metrics={})
        if not self.training and vectors is not None:
            output.metrics["sentence_agreement"] = nearest_agreement(*vectors)
        if not self.training and predictions is not None:
            output.metrics.update(prediction_metrics(predictions, head=head, outside=self._outside))
            if "mlm" in losses:
                del output.metrics["mlm_loss"]
        return output

    @torch.compiler.disable
    def _read_layers(
        self, model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor | None
    ) -> ModelOutputs:
        """Run the student where states are read: its hooks are new in each call, and a graph would be compiled anew for them."""
        return self.runner(model, inputs, positions)

    def _vectors(self, both: PairedOutputs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the vectors of all texts, ``[B, E]`` of each model; None if no loss compares them."""
        if not self._names & set(OF_SENTENCES):
            return None
        assert self.sentence_modules is not None, "such a loss has its modules"
        if both.document_ids is not None:
            raise InputError(
                "block_mode='isolated_documents' puts several texts into a row, which has one vector: use 'doc_sentences'"
            )
        states = both.student.hidden[self._last_layer], both.teacher.hidden[self.config.teacher_layers]
        dense = self.projections["sentence"] if "sentence" in self.projections else None
        ours = self.sentence_modules.vectors(states[0], both.mask, dense)
        return ours, self.sentence_modules.vectors(states[1], both.mask)

    def export(self, output_dir: str | Path, *, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the student, and what makes it a model of sentence-transformers; see [`PretrainingModel.export`]."""
        super().export(output_dir, state_dict=state_dict)
        if self.sentence_modules is None:
            return
        projections = self.part_state_dict("projections", state_dict) or self.projections.state_dict()
        self.sentence_modules.write(
            Path(output_dir),
            hidden_size=self.student.config.hidden_size,
            longest=longest_sequence(self.student),
            dense=projections.get("sentence.weight"),
        )

    def _prediction_losses(self, predictions: Predictions | None, *, temperature: float) -> dict[str, ExampleSum]:
        names = OF_PREDICTIONS & self._names
        if not names:
            return {}
        assert predictions is not None, "the student's head runs for a loss of predictions"
        return prediction_losses(
            predictions,
            names,
            temperature=temperature,
            is_regression=self.config.head == "regression",
            averages_classes=self.config.tinybert_official,
        )

    def _loss(self, name: str, both: PairedOutputs) -> ExampleSum:
        if name in RELATIONS or name == "attention_distribution":
            return self._last_attention_loss(name, both)
        pairs = self._pairs[name]
        if name == "attention":
            compare = attention_loss if self.config.attention_target == "scores" else attention_probability_loss
            ours, theirs = both.student.attention, both.teacher.attention
            return _over_layers(
                compare(ours[m], theirs[n], both.mask, document_ids=both.document_ids) for m, n in pairs
            )
        compare_states = cosine_loss if name == "cosine" else hidden_loss
        return _over_layers(
            compare_states(self._project(name, m, both.student.hidden[m]), both.teacher.hidden[n], both.mask)
            for m, n in pairs
        )

    def _last_attention_loss(self, name: str, both: PairedOutputs) -> ExampleSum:
        """Return a loss of the student's last layer against the teacher's chosen one."""
        ours = both.student.attention[self._last_layer]
        theirs = both.teacher.attention[self.config.teacher_layer]
        if name == "attention_distribution":
            return attention_distribution_loss(ours, theirs, both.mask, document_ids=both.document_ids)
        part = RELATIONS[name]
        return relation_loss(
            ours.concatenated(part),
            theirs.concatenated(part),
            both.mask,
            relation_heads=ours.num_heads if name == "value_relation" else self.config.relation_heads,
            document_ids=both.document_ids,
        )

    def _project(self, name: str, layer: int, states: torch.Tensor) -> torch.Tensor:
        key = _projection_of(name, layer, self.config)
        return self.projections[key](states) if key in self.projections else states


def _projection_of(name: str, layer: int, config: DistillationConfig) -> str:
    """Return the name of the projection that a layer's states go through."""
    if config.tinybert_official and name != "cosine":
        return "shared"
    return f"{name}_{layer}" if name == "hidden" and config.projection == "per_layer" else name


def _projections(config: DistillationConfig, modules: SentenceModules | None) -> nn.ModuleDict:
    """Build the projections that the losses need; none where the widths agree, but in the official code."""
    width, names = config.student_config.hidden_size, config.losses or ()
    layers = {"embedding": [0], "hidden": [m for m, _ in config.pairs], "cosine": [0]}
    keys = {_projection_of(name, layer, config): None for name in layers if name in names for layer in layers[name]}
    found = nn.ModuleDict(
        {
            key: nn.Linear(width, config.teacher_size, bias=key == "shared")
            for key in keys
            if width != config.teacher_size or key == "shared"
        }
    )
    if modules is not None and {"sentence_cosine", "sentence_mse"} & set(names) and width != config.teacher_size:
        # A part of the student: its vectors lie in the teacher's space, and the export has the layer too.
        found["sentence"] = nn.Linear(modules.width(width), modules.width(config.teacher_size), bias=False)
    return found


def _visible_pairs(batch: Mapping[str, Any], windows: Sequence[int | None]) -> torch.Tensor:
    """Return the number of pairs of tokens that see each other, on average over layers.

    Args:
        batch: With `attention_mask`, and where documents of a row do not see each other, `document_ids` and
            `position_ids`.
        windows: Largest distance of the tokens that see each other, by layer; None for all.

    Returns:
        ``[]``, fp32.
    """
    mask_BL = batch["attention_mask"]
    positions_BL = batch["position_ids"] if "document_ids" in batch else mask_BL.cumsum(dim=1) - 1
    seen_before = [positions_BL if window is None else positions_BL.clamp(max=window) for window in windows]
    # Each token has one pair with itself, and two with each earlier token.
    return torch.stack([((2 * before_BL + 1) * mask_BL).sum() for before_BL in seen_before]).float().mean()


def _over_layers(terms: Iterable[ExampleSum]) -> ExampleSum:
    """Add up a loss over layers; the count is their mean, so that the loss is the sum of the layers' means where counts agree."""
    sums, counts = zip(*terms, strict=True)
    return ExampleSum(torch.stack(sums).sum(dim=0), torch.stack(counts).mean(dim=0))
